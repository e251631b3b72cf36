"""Norms of updates against the steps that torch's optimizers make, and which classes are known."""

import math

import pytest
import torch
from helpers import ADAPTIVE_OPTIMIZERS, MEASURED_OPTIMIZERS, Lamb, MuonWithAdam, OtherSGD, stepping
from schedulefree import AdamWScheduleFree
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lit_lipschitz import ZeroStartSGD
from lit_lipschitz.measurement import optimizer_updates
from lit_lipschitz.measurement.optimizer_updates import optimizer_info
from lit_lipschitz.measurement.step_lengths import step_lengths, weight_filter
from lit_lipschitz.measurement.step_scale import StepScaleEstimator
from lit_lipschitz.measurement.trial_step import Behaviour


def least_share(optimizer):
    """Half of 1 - b times the displacement by one of many independent gradients, over the norm of the update."""
    b = optimizer.param_groups[0].get("betas", (0.0,))[0]
    return ((1 + b) / (1 - b)) ** 0.5 * (1 - b) / 2


@pytest.mark.parametrize("name", ADAPTIVE_OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_the_length_is_that_of_the_step_which_follows(name, dtype):
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3, 4, generator=generator, dtype=dtype)) for _ in range(2)]
    idle = nn.Parameter(torch.ones(2))
    optimizer = ADAPTIVE_OPTIMIZERS[name]([*parameters, idle])
    decay = optimizer.param_groups[0]["weight_decay"]
    for step in range(12):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=dtype) / (1 + step)
        before = [parameter.detach().clone() for parameter in parameters]
        sign = -1 if optimizer.param_groups[0].get("maximize") else 1
        gradient = [sign * p.grad + decay * b for p, b in zip(parameters, before, strict=True)]
        found = step_lengths(optimizer, is_weight=lambda parameter: False)
        optimizer.step()
        moved = [p.detach() - b for p, b in zip(parameters, before, strict=True)]
        expected = [torch.cat([part.flatten() for part in parts]).norm().real for parts in (gradient, moved)]
        product = -sum((one.conj() * two).sum() for one, two in zip(gradient, moved, strict=True)).real
        norms = sum(one.norm() * two.norm() for one, two in zip(gradient, moved, strict=True)).real
        expected.append(torch.maximum(product, least_share(optimizer) * norms))
        torch.testing.assert_close(found.double(), torch.stack(expected).double(), rtol=2e-5, atol=0)


def test_gradients_that_are_scaled_count_unscaled_and_without_any_the_lengths_are_zero():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], weight_decay=0.0)
    assert step_lengths(optimizer).tolist() == [0.0, 0.0, 0.0]
    parameter.grad = torch.tensor([3.0, 0.0, 4.0]) * 1024
    gradient, step, product = step_lengths(optimizer, torch.tensor(1024.0)).tolist()
    assert gradient == pytest.approx(5.0)
    assert step == pytest.approx(2**0.5, rel=1e-6)
    assert product == pytest.approx(3.0 + 4.0, rel=1e-6)  # with an update of 1, 0 and 1


WEIGHTS = {"matrix": (3, 4), "kernel": (2, 1, 3, 3), "positions": (1, 4, 6)}
OTHERS = {"bias": (4,), "scale of a layer": (5, 1, 1), "token": (1, 1, 6), "number": ()}


def scale_of(optimizer, **settings):
    """Gradient norm over update norm; None without an update."""
    gradient, step, _ = step_lengths(optimizer, **settings).tolist()
    return gradient / step if step else None


@pytest.mark.parametrize("name", ADAPTIVE_OPTIMIZERS)
def test_every_weight_has_the_same_say_in_the_scale_and_biases_have_none(name):
    """Beside the steps that torch makes; one weight in a group of its own, one without a gradient in one step."""
    generator = torch.Generator().manual_seed(0)
    parameters = {
        title: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for title, shape in {**WEIGHTS, **OTHERS}.items()
    }
    optimizer = ADAPTIVE_OPTIMIZERS[name](list(parameters.values())[1:])
    optimizer.add_param_group({"params": [parameters["matrix"]]})
    decay = optimizer.param_groups[0]["weight_decay"]
    for step in range(6):
        for size, parameter in enumerate(parameters.values(), start=1):
            parameter.grad = 10**size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if step == 3:
            parameters["kernel"].grad = None
        found, product = scale_of(optimizer, ratios=[1.0, 7.0]), step_lengths(optimizer, ratios=[1.0, 7.0])[2]
        before = {title: parameter.detach().clone() for title, parameter in parameters.items()}
        optimizer.step()
        ratios, products, norms = [], [], []
        for title, parameter in parameters.items():
            if parameter.grad is not None:
                sign = -1 if optimizer.param_groups[0].get("maximize") else 1
                gradient = sign * parameter.grad + decay * before[title]
                moved = parameter.detach() - before[title]
                ratios += [gradient.norm() / moved.norm()] if title in WEIGHTS else []
                ratio = 7 if title == "matrix" else 1
                products.append(ratio * -(gradient * moved).sum())
                norms.append(ratio * gradient.norm() * moved.norm())
        assert found == pytest.approx(float(sum(ratios)) / len(ratios), rel=2e-5)
        least = least_share(optimizer) * float(sum(norms))
        assert float(product) == pytest.approx(max(float(sum(products)), least), rel=2e-5)


def adamw_of(*parameters, **settings):
    return torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.0, **settings)


def parameter_with(*gradient):
    """A parameter of the gradient's shape."""
    gradient = torch.tensor(gradient)
    parameter = nn.Parameter(torch.ones_like(gradient))
    parameter.grad = gradient
    return parameter


def test_what_has_no_gradient_or_is_held_does_not_count_in_the_scale():
    idle, moving, held = (parameter_with([size] * 2, [size] * 2) for size in (0.0, 3.0, 50.0))
    optimizer = adamw_of(idle, moving)
    optimizer.add_param_group({"params": [held], "lr": 0.0})
    assert scale_of(optimizer, ratios=[1.0, 0.0]) == pytest.approx(3.0)
    idle.grad.fill_(1.0)
    optimizer.step()
    moving.grad.fill_(0.0)  # and still moves, by its first moment
    expected = 1.0 / ((0.1 + 0.9 * 0.1) / (1 - 0.9**2))
    assert scale_of(optimizer, ratios=[1.0, 0.0]) == pytest.approx(expected, rel=1e-5)


def test_without_a_weight_that_moves_all_parameters_have_one_scale_and_without_a_gradient_there_is_none():
    still, bias, held = parameter_with([0.0] * 2, [0.0] * 2), parameter_with(3.0, 0.0, 4.0), parameter_with(70.0, 0.0)
    assert scale_of(adamw_of(nn.Parameter(torch.ones(2, 2)))) is None
    assert scale_of(adamw_of(still)) is None
    for parameters in ([bias], [still, bias]):
        optimizer = adamw_of(*parameters)
        optimizer.add_param_group({"params": [held]})
        assert scale_of(optimizer, ratios=[1.0, 0.0]) == pytest.approx(5.0 / 2**0.5, rel=1e-5)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e25])
@pytest.mark.parametrize("shape", [(2, 2), (3,)])
def test_a_gradient_that_is_not_finite_is_not_measured(value, shape):
    """In a weight, or in a bias beside a weight."""
    broken = nn.Parameter(torch.ones(shape))
    broken.grad = torch.ones(shape)
    broken.grad[0] = value
    read = step_lengths(adamw_of(parameter_with([3.0] * 2, [3.0] * 2), broken))
    assert not torch.isfinite(read).all()


LAYERS = {
    "linear": (lambda: nn.Linear(8, 1), {"weight"}),
    "1x1 convolution": (lambda: nn.Conv2d(8, 1, 1), {"weight"}),
    "transposed": (lambda: nn.ConvTranspose1d(1, 3, 1), {"weight"}),
    "embedding": (lambda: nn.Embedding(5, 1), {"weight"}),
    "attention": (lambda: nn.MultiheadAttention(4, 2), {"in_proj_weight", "out_proj.weight"}),
    "recurrent": (lambda: nn.LSTM(3, 2), {"weight_ih_l0", "weight_hh_l0"}),
    "norm over a map": (lambda: nn.LayerNorm([2, 3, 3]), set()),
    "batch norm": (lambda: nn.BatchNorm2d(4), set()),
    "weight norm": (lambda: weight_norm(nn.Linear(4, 3)), {"parametrizations.weight.original1"}),
    "a single number": (lambda: nn.Linear(1, 1), set()),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_weights_are_told_by_the_layers_that_have_them(name):
    make, expected = LAYERS[name]
    module = make()
    is_weight = weight_filter(nn.Sequential(nn.Identity(), module))
    assert {title for title, parameter in module.named_parameters() if is_weight(parameter)} == expected


def test_a_rank_without_a_gradient_leaves_the_measurement_to_the_others():
    """As with parameters that are flat and sharded: the MAX over the ranks is of both norms."""
    bias, empty = parameter_with(3.0, 0.0, 4.0), nn.Parameter(torch.ones(0))
    ranks = [StepScaleEstimator(adamw_of(one), nn.Identity()) for one in (bias, empty)]
    packed = [one.pack(1.0, [1.0], rank, 2) for rank, one in enumerate(ranks)]
    ranks[1].update(torch.stack(packed).amax(dim=0).tolist())
    displacement = 2**0.5 * ROOT_19
    assert ranks[1].scale.value == pytest.approx(5.0 / displacement, rel=1e-5)


@pytest.mark.parametrize("kind", [torch.optim.Adagrad, torch.optim.Adafactor, Lamb])
def test_an_update_that_is_not_known_is_measured(kind):
    for is_weight in (lambda parameter: True, lambda parameter: False):
        parameter = parameter_with([3.0, 4.0], [0.0, 12.0])
        optimizer = kind([parameter], lr=0.1)
        grad_norm, update_norm, product = step_lengths(optimizer, is_weight=is_weight).tolist()
        before = parameter.detach().clone()
        optimizer.step()
        moved = (before - parameter.detach()) / 0.1
        assert grad_norm / update_norm == pytest.approx(13.0 / float(moved.norm()), rel=1e-3)
        assert product == pytest.approx(float((parameter.grad * moved).sum()), rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.SGD, {}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.SGD, {"momentum": 0.8, "dampening": 0.3}),
        (torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
        (torch.optim.SGD, {"maximize": True}),
        (torch.optim.SGD, {"momentum": 0.8, "maximize": True}),
        (ZeroStartSGD, {"momentum": 0.9}),
    ],
)
def test_a_linear_optimizers_ratio_is_1_and_its_product_that_with_the_velocity(kind, settings):
    """The displacement by one gradient is known, and the velocity is in torch's own buffer after the step."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(2, 3, generator=generator)) for _ in range(2)]
    optimizer = kind(parameters[:1], lr=0.1, **settings)
    optimizer.add_param_group({"params": parameters[1:]})
    for _ in range(4):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        found = step_lengths(optimizer, ratios=[1.0, 7.0], info=optimizer_info(optimizer)).tolist()
        scaled = step_lengths(optimizer, 0.25, ratios=[1.0, 7.0], info=optimizer_info(optimizer)).tolist()
        grads = [parameter.grad.clone() for parameter in parameters]
        optimizer.step()
        sign = -1 if settings.get("maximize") else 1
        velocities = [optimizer.state[p].get("momentum_buffer", sign * p.grad) for p in parameters]
        products = [float((sign * g * v).sum()) for g, v in zip(grads, velocities, strict=True)]
        squares = [float(g.square().sum()) for g in grads]
        # What the gradient adds to the velocity, of which half is the least.
        least = (1 - settings.get("dampening", 0.0)) / 2 * (squares[0] + 7 * squares[1])
        product = max(products[0] + 7 * products[1], least)
        assert found == pytest.approx([1.0, 1.0, product], rel=1e-4, abs=1e-5)
        assert scaled[:2] == [1.0, 1.0]


def test_a_linear_optimizer_without_torchs_buffers_has_the_product_of_the_gradient_with_itself():
    parameter = parameter_with([3.0, 4.0], [0.0, 12.0])
    optimizer = OtherSGD([parameter], lr=0.1)
    info = optimizer_info(optimizer)
    for _ in range(3):
        assert step_lengths(optimizer, info=info).tolist() == pytest.approx([1.0, 1.0, 169.0])
        optimizer.step()


ROOT_19 = math.sqrt(1.9 / 0.1)
GAINS = {
    "SGD": (torch.optim.SGD, {}, 1.0),
    "momentum": (torch.optim.SGD, {"momentum": 0.8}, 5.0),
    "dampening": (torch.optim.SGD, {"momentum": 0.8, "dampening": 0.3}, 3.5),
    "nesterov": (torch.optim.SGD, {"momentum": 0.8, "nesterov": True}, 5.0),
    "ZeroStartSGD": (ZeroStartSGD, {"momentum": 0.9}, 10.0),
    "another SGD": (OtherSGD, {}, 10.0),
    "Adam": (torch.optim.Adam, {}, ROOT_19),
    "AdamW": (torch.optim.AdamW, {"betas": (0.6, 0.99), "weight_decay": 0.0}, 2.0),
    "RMSprop": (torch.optim.RMSprop, {}, 1.0),
    "RMSprop, momentum": (torch.optim.RMSprop, {"momentum": 0.8}, 3.0),
    "Schedule-Free": (AdamWScheduleFree, {"weight_decay": 0.0}, 1.0),
}


@pytest.mark.parametrize("name", GAINS)
def test_the_displacement_by_a_gradient_is_that_of_the_optimizers_own_steps(name):
    """A gradient of one coordinate among those of the others, beside the same steps without it."""
    kind, settings, gain = GAINS[name]
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(1400, 64, generator=generator, dtype=torch.float64)
    changed = gradients.clone()
    changed[1000] *= 1.001

    def walk(gradients):
        """The positions after the last step, and the updates at a rate of 1."""
        parameter = nn.Parameter(torch.zeros(64, dtype=torch.float64))
        optimizer = kind([parameter], lr=1.0, **settings)
        if hasattr(optimizer, "train"):
            optimizer.train()
        positions = [torch.zeros(64, dtype=torch.float64)]
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
            positions.append(optimizer.state[parameter].get("z", parameter).detach().clone())
        return optimizer, torch.stack(positions)

    optimizer, plain = walk(gradients)
    _, moved = walk(changed)
    info = optimizer_info(kind([nn.Parameter(torch.zeros(2, 2))], lr=1.0, **settings))
    found = info.displacement_gain(optimizer.param_groups[0])
    assert found == pytest.approx(gain, rel=1e-9)
    displacement = float((moved[-1] - plain[-1]).norm()) / 0.001
    update = float(gradients[1000].norm())
    if not info.is_linear:  # the root mean square over many steps
        update = float(plain.diff(dim=0)[600:].norm(dim=1).square().mean().sqrt())
    assert displacement / update == pytest.approx(gain, rel=1e-6 if info.is_linear else 0.15)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (torch.optim.SGD, {"momentum": 1.0}, r"momentum=1.0: expected 0 <= momentum < 1"),
        (torch.optim.SGD, {"dampening": 1.0}, "dampening=1.0: expected less than 1"),
        (torch.optim.RMSprop, {"momentum": 1.5}, "momentum=1.5"),
    ],
)
def test_settings_without_a_displacement_are_refused(kind, settings, message):
    optimizer = kind([nn.Parameter(torch.ones(1))], lr=0.1, **settings)
    with pytest.raises(ValueError, match=message):
        optimizer_info(optimizer).displacement_gain(optimizer.param_groups[0])


@pytest.mark.parametrize("decoupled", [False, True])
def test_weight_decay_counts_as_with_a_known_update(decoupled):
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    norms = []
    for make in (kind, stepping(kind)):
        parameters = [parameter_with([3.0, 4.0], [0.0, 12.0]), parameter_with(1.0, 0.0)]
        optimizer = make(parameters, lr=0.1, weight_decay=0.2)
        for _ in range(4):
            norms.append(step_lengths(optimizer, is_weight=lambda parameter: False).tolist())
            optimizer.step()
    for known, measured in zip(norms[:4], norms[4:], strict=True):
        assert measured == pytest.approx(known, rel=1e-3)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax])
def test_counters_are_read_from_the_device_at_once(kind, monkeypatch):
    parameters = [nn.Parameter(torch.randn(3, 2)) for _ in range(4)]
    optimizer = kind(parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.randn(3, 2)
    optimizer.step()
    reads = []
    for name in ("__float__", "item", "tolist"):
        own = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, own=own: reads.append(self) or own(self))
    step_lengths(optimizer)
    assert len(reads) == 1


class Renamed(torch.optim.AdamW):
    """A subclass that changes nothing of the step."""


class Stepping(torch.optim.AdamW):
    """A subclass with a step of its own."""

    def step(self, closure=None):
        return super().step(closure)


def named(name, base=torch.optim.Optimizer):
    """An optimizer of another package with the name of one of torch's."""
    initialize = lambda self, parameters: torch.optim.Optimizer.__init__(self, parameters, {"lr": 0.1})  # noqa: E731
    step = (
        {} if base is not torch.optim.Optimizer else {"__init__": initialize, "step": lambda self, closure=None: None}
    )
    return type(name, (base,), step)


def info_of(kind):
    return optimizer_info(kind([nn.Parameter(torch.ones(1))]))


def test_a_subclass_counts_as_its_class_unless_it_steps_by_itself():
    for _ in range(2):  # torch wraps a class's step when its first instance is made
        assert info_of(Renamed).cls is torch.optim.AdamW
        assert info_of(torch.optim.AdamW).cls is torch.optim.AdamW
        assert info_of(torch.optim.Adam).cls is torch.optim.Adam
        assert info_of(torch.optim.SGD).cls is torch.optim.SGD
    assert info_of(ZeroStartSGD).resolve() is ZeroStartSGD
    for kind in (Stepping, type("Further", (Stepping,), {})):
        measured = info_of(kind)
        assert (measured.cls, measured.update, measured.behaviour) == (kind, None, Behaviour())
        assert dict(measured.rules) == {"strict": "bounded", "smooth": "bounded"}


@pytest.mark.parametrize("name", ["AdamW", "RMSprop", "SGD", "AdamWScheduleFree", "ZeroStartSGD"])
def test_an_optimizer_of_another_package_is_not_known_by_its_name(name):
    assert name in {info.name for info in optimizer_updates.OPTIMIZERS}
    for kind in (named(name), named(name, torch.optim.NAdam)):
        measured = info_of(kind)
        assert (measured.cls, measured.update) == (kind, None)
        assert measured.behaviour is not None
        assert measured.rule_name("paper", {}) is None


def test_the_weight_decay_of_a_group_is_coupled_as_torch_steps():
    """The gradient is 0, so that AdamW's moments see coupled weight decay alone."""
    for name, settings, coupled in (
        ("Adam", {}, True),
        ("AdamW", {}, False),
        ("NAdam", {}, True),
        ("NAdam", {"decoupled_weight_decay": True}, False),
        ("RAdam", {"decoupled_weight_decay": True}, False),
    ):
        parameter = nn.Parameter(torch.ones(2))
        optimizer = getattr(torch.optim, name)([parameter], lr=0.1, weight_decay=0.5, **settings)
        parameter.grad = torch.zeros(2)
        optimizer.step()
        assert bool(optimizer.state[parameter]["exp_avg"].any()) == coupled
        assert optimizer_info(optimizer).couples_weight_decay(optimizer.param_groups[0]) == coupled


def test_rules_see_the_settings_of_torch():
    """By whatever name, or measured; those of a known optimizer are its own."""
    weights = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2))]
    muon = MuonWithAdam(weights)
    assert [optimizer_info(muon).settings(group)["betas"] for group in muon.param_groups] == [(0.95,), (0.9,)]
    for make, expected in (
        (MEASURED_OPTIMIZERS["Lion"], {"betas": (0.9,)}),
        (MEASURED_OPTIMIZERS["Adagrad"], {"betas": (0.0,)}),
        (OtherSGD, {"momentum": 0.9, "dampening": 0.0}),
    ):
        optimizer = make(weights)
        assert optimizer_info(optimizer).settings(optimizer.param_groups[0]) == expected
    known = torch.optim.SGD(weights, lr=0.1)
    assert optimizer_info(known).settings(known.param_groups[0]) is known.param_groups[0]
    odd = {"betas": (None, 0.9)}, {"momentum": True}, {"betas": (1.5, 0.9)}
    info = optimizer_info(muon)
    assert [info.settings(group) for group in odd] == [{"betas": (0.0,)}] * 3
