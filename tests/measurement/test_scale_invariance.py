"""Scale-invariant weights: detection, and the effect of their norm."""

import math

import lightning as L
import pytest
import torch
from helpers import CLASSES, WIDTH, Classifier, Steps, loader, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from schedulefree import AdamWScheduleFree
from torch import nn
from torch.nn import functional as F

from lit_lipschitz import LipschitzLR
from lit_lipschitz.measurement.scale_invariance import MAX_COSINE, ScaleInvariance, he_init_norms
from lit_lipschitz.measurement.step_lengths import step_lengths


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.0)


def normalised(width=64):
    """The second matrix knows nothing of its length."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(WIDTH, width), nn.Tanh(), nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(),
        nn.Linear(width, CLASSES),
    )  # fmt: skip


def with_gradients(network, inputs):
    """The parameters after a backward of the cross-entropy."""
    network.zero_grad()
    targets = torch.arange(len(inputs)) % CLASSES
    F.cross_entropy(network(inputs).flatten(1)[:, :CLASSES], targets).backward()
    return list(network.parameters())


CONV = {"kernel_size": 3, "padding": 1}
IMAGES = torch.randn(12, 3, 6, 6, generator=torch.Generator().manual_seed(1))
INVARIANT = {
    "conv, BatchNorm": lambda: nn.Sequential(nn.Conv2d(3, 8, **CONV), nn.BatchNorm2d(8)),
    "conv without bias, GroupNorm": lambda: nn.Sequential(nn.Conv2d(3, 8, **CONV, bias=False), nn.GroupNorm(2, 8)),
    "depthwise conv": lambda: nn.Sequential(nn.Conv2d(3, 6, **CONV, groups=3, bias=False), nn.BatchNorm2d(6)),
    "transposed conv": lambda: nn.Sequential(nn.ConvTranspose2d(3, 8, **CONV, bias=False), nn.BatchNorm2d(8)),
    "linear, LayerNorm": lambda: nn.Sequential(nn.Linear(6, 8, bias=False), nn.LayerNorm(8)),
    "linear, ReLU, BatchNorm": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(108, 8, bias=False), nn.ReLU(), nn.BatchNorm1d(8)
    ),
}
ORTHOGONAL = torch.tensor([[-4.0, 3.0]])  # to (3, 4)


def growth(seen, weight, grad, place=0):
    return float(seen.norm_growth([weight], [grad], [place]))


def followed(body, inputs):
    """The body with an activation and a head after it, so that the loss is more than its normalisation."""
    with torch.no_grad():
        width = body(inputs).flatten(1).shape[1]
    return nn.Sequential(body, nn.Tanh(), nn.Flatten(), nn.Linear(width, CLASSES))


@pytest.mark.parametrize("name", INVARIANT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_weight_in_front_of_a_normalisation_is_told_from_a_head(name, dtype):
    torch.manual_seed(0)
    network, inputs, seen = followed(INVARIANT[name](), IMAGES).to(dtype), IMAGES.to(dtype), ScaleInvariance()
    weights = [p for p in network.parameters() if p.dim() > 1]
    start = weights[0].norm().item()
    for _ in range(8):
        with_gradients(network, inputs)
        found = [growth(seen, p, p.grad, i) for i, p in enumerate(network.parameters()) if p.dim() > 1]
        assert found == pytest.approx([weights[0].norm().item() / start, 1.0], rel=0.01)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.sub_(0.05 * parameter.grad)
            for weight in weights:
                weight.mul_(1.1)
    assert found[0] > 1.9
    if dtype != torch.bfloat16:
        assert seen.num_scale_invariant == 1


def test_a_weight_of_a_known_layer_is_as_long_as_it_is_beside_hes_length():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, **CONV, bias=False), nn.BatchNorm2d(8), nn.Tanh(), nn.Flatten())
    network.append(nn.Linear(8 * 36, CLASSES))
    seen = ScaleInvariance(he_init_norms(network))
    for factor in (1.0, 3.0):
        nn.init.kaiming_normal_(network[0].weight, nonlinearity="relu")
        with torch.no_grad():
            network[0].weight.mul_(factor)
        with_gradients(network, IMAGES)
        found = [growth(seen, p, p.grad, i) for i, p in enumerate(network.parameters()) if p.dim() > 1]
        assert found == pytest.approx([factor, 1.0], rel=0.15)
        assert found[1] == 1.0


def test_how_long_a_weight_is_that_may_be_one_by_chance_is_told_by_itself_alone():
    weight = torch.tensor([[3.0, 4.0]])
    seen = ScaleInvariance({weight: 1.0})
    nearly = ORTHOGONAL + 0.03 * weight  # a cosine of 0.042, over that of random vectors
    almost = ORTHOGONAL + 0.01 * weight  # of 0.014
    assert growth(seen, weight, nearly) == 1.0
    weight.mul_(2)
    assert growth(seen, weight, nearly) == pytest.approx(2.0)
    certain = ScaleInvariance({weight: 2.5})
    assert growth(certain, weight, ORTHOGONAL) == pytest.approx(4.0)
    again = ScaleInvariance({weight: 2.5})
    assert growth(again, weight, almost) == 1.0  # by itself, until a second measurement is as orthogonal
    assert growth(again, weight, almost) == pytest.approx(4.0)


LAYERS = {
    "linear": lambda: nn.Linear(300, 200),
    "conv": lambda: nn.Conv2d(30, 40, 5),
    "grouped": lambda: nn.Conv2d(30, 60, 5, groups=3),
    "transposed": lambda: nn.ConvTranspose2d(30, 40, 5),
}


@pytest.mark.parametrize("name", LAYERS)
def test_hes_length_is_that_of_his_initialisation(name):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    mode = "fan_out" if name == "transposed" else "fan_in"  # torch takes the first dimension for the outputs
    nn.init.kaiming_normal_(layer.weight, mode=mode, nonlinearity="relu")
    assert he_init_norms(nn.Sequential(layer)) == {layer.weight: pytest.approx(layer.weight.norm().item(), rel=0.03)}


def test_what_has_changed_the_loss_once_is_never_taken_for_one():
    weight, seen = torch.tensor([[3.0, 4.0]]), ScaleInvariance()
    growth(seen, weight, ORTHOGONAL)
    weight.mul_(2)
    assert growth(seen, weight, ORTHOGONAL) == pytest.approx(2.0)
    assert growth(seen, weight, weight) == 1.0
    assert growth(seen, weight, ORTHOGONAL) == 1.0
    again = ScaleInvariance()
    again.load_state_dict(seen.state_dict(1))
    assert growth(again, weight, ORTHOGONAL) == 1.0


def test_the_first_length_outlasts_checkpoints_with_no_measurement_in_between():
    weight, other, seen = torch.tensor([[3.0, 4.0]]), torch.eye(2), ScaleInvariance()
    growth(seen, weight, ORTHOGONAL, 1)
    for _ in range(2):
        again = ScaleInvariance()
        again.load_state_dict(seen.state_dict(2))
        growth(again, other, torch.ones(2, 2), 0)  # another one's measurement
        seen = again
    assert growth(seen, 3 * weight, ORTHOGONAL, 1) == pytest.approx(3.0)


def test_a_resumed_measurement_is_not_a_first_one():
    """A cosine between a hundredth and a tenth of the limit gives the same growth before and after a checkpoint."""
    weight = nn.Parameter(torch.ones(8, 8))
    grad = torch.ones(8, 8)
    grad[4:] = -1.0
    measured = ScaleInvariance({weight: 2.0})
    growth(measured, weight, grad)
    resumed = ScaleInvariance({weight: 2.0})
    resumed.load_state_dict(measured.state_dict(1))
    grad[0] += 0.01
    growths = [growth(one, weight, grad) for one in (measured, resumed)]
    ((cosine, _),) = measured.state_dict(1)
    assert MAX_COSINE / 100 < cosine < MAX_COSINE / 10
    assert growths == [8.0 / 2.0, 8.0 / 2.0]


def test_what_chance_makes_orthogonal_is_not_taken_for_one_for_long():
    generator, seen = torch.Generator().manual_seed(0), ScaleInvariance()
    weights = [torch.randn(8, 8, generator=generator) for _ in range(1000)]
    found = []
    for measurement in range(8):
        for place, weight in enumerate(weights):
            found.append(growth(seen, weight.mul_(1.1), torch.randn(8, 8, generator=generator), place))
        if measurement == 0:
            assert seen.num_scale_invariant < 50
    assert 0 < sum(one != 1.0 for one in found[1000:2000]) < 150
    assert set(found[-2000:]) == {1.0}
    assert seen.num_scale_invariant == 0


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan, 1e-25, 1e30])
def test_a_gradient_that_tells_nothing_changes_nothing(value):
    weight, seen = torch.tensor([[3.0, 4.0]]), ScaleInvariance()
    nothing = torch.full_like(weight, value)
    growth(seen, weight, nothing)
    weight.mul_(2)
    assert growth(seen, weight, nothing) == 1.0
    assert growth(seen, weight, ORTHOGONAL) == pytest.approx(2.0)
    assert growth(seen, weight, nothing) == pytest.approx(2.0)


def test_weights_that_start_at_zero_have_not_grown_and_rows_without_a_gradient_tell_nothing():
    weight, seen = torch.zeros(4, 2), ScaleInvariance()
    grad = torch.zeros(4, 2)
    grad[0] = 1.0
    assert growth(seen, weight, grad) == 1.0
    weight[1:] = 1.0
    assert growth(seen, weight, grad) == 1.0
    assert seen.num_scale_invariant == 0
    rows, of_rows = torch.ones(4, 2), ScaleInvariance()
    growth(of_rows, rows, grad)
    assert growth(of_rows, 2 * rows, grad) == 1.0


def test_an_embedding_that_starts_at_zero_has_the_rate_of_any_other(monkeypatch):
    """A few of very many rows have a gradient in each step."""

    class Words(Classifier):
        def __init__(self):
            super().__init__(adamw, nn.Sequential(nn.Embedding(50_000, 8), nn.Linear(8, CLASSES)))
            nn.init.zeros_(self.net[0].weight)

    words = torch.randint(50_000, (256,), generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(words, words % CLASSES), batch_size=16)
    rates = []
    for measured in (True, False):
        torch.manual_seed(0)
        if not measured:
            monkeypatch.setattr(ScaleInvariance, "norm_growth", lambda _, weights, *__: torch.ones(len(weights)))
        trainer(LipschitzLR(schedule="none"), steps := Steps(), max_epochs=1).fit(Words(), data)
        rates.append([rate for (rate,) in steps.rates])
    assert rates[0] == rates[1]


def test_weights_that_have_grown_do_not_change_the_scale():
    """The gradient of a weight that is twice as long is half as long, and the step is the same."""
    network, inputs = normalised(), torch.randn(24, WIDTH, generator=torch.Generator().manual_seed(2))
    parameters = with_gradients(network, inputs)
    optimizer, seen = adamw(parameters), ScaleInvariance()
    before, plain = step_lengths(optimizer, invariance=seen)[:2], step_lengths(optimizer)[:2]
    torch.testing.assert_close(before, plain)
    with torch.no_grad():
        network[2].weight.mul_(2.0)
    with_gradients(network, inputs)
    torch.testing.assert_close(step_lengths(optimizer, invariance=seen)[:2], before, rtol=1e-3, atol=0)
    assert float(step_lengths(optimizer)[0]) < 0.95 * float(plain[0])


def terms_of(callback):
    return {term.symbol: term.value for term in callback.controllers[0].decision.terms}


@pytest.mark.parametrize("optimizer", [adamw, lambda p: AdamWScheduleFree(p, lr=1.0)])
def test_how_long_a_normalised_weight_starts_makes_no_difference_to_the_constant(optimizer):
    """The descent is that of the gradient as it is, which is the shorter the longer the weight."""
    found = []
    for factor in (1.0, 4.0):
        torch.manual_seed(0)
        module = Classifier(optimizer, normalised())
        with torch.no_grad():
            module.net[2].weight.mul_(factor)
        if optimizer is not adamw:
            module.on_train_epoch_start = lambda module=module: module.trainer.optimizers[0].train()
        trainer(callback := LipschitzLR(schedule="none"), max_steps=1).fit(module, loader())
        found.append(terms_of(callback))
        assert callback.rate == pytest.approx(1 / max(found[-1]["K"], found[-1]["P"]))
    assert found[1]["K"] == pytest.approx(found[0]["K"], rel=1e-3)
    assert 0 < found[1]["P"] < found[0]["P"]


class Grow(L.Callback):
    """Makes the matrix in front of the normalisation longer after each step, which the loss does not notice."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        with torch.no_grad():
            pl_module.net[2].weight.mul_(1.05)


def fit(*callbacks, path=None, **settings):
    """The rates, and the terms of the last one."""
    torch.manual_seed(0)
    ours = LipschitzLR(schedule="none")
    run = trainer(ours, steps := Steps(), *callbacks, max_epochs=8, **settings)
    net = normalised()
    with torch.no_grad():
        net[2].weight.mul_(0.1)  # short, so that most of the gradient is in it
    run.fit(Classifier(adamw, net), loader(), ckpt_path=path)
    return [rate for (rate,) in steps.rates], terms_of(ours)


def test_the_constant_does_not_rise_because_they_grow(monkeypatch):
    inverses = []
    for measured in (True, False):
        if not measured:
            monkeypatch.setattr(ScaleInvariance, "norm_growth", lambda _, weights, *__: torch.ones(len(weights)))
        inverses.append([1 / terms["K"] for _, terms in (fit(), fit(Grow()))])
    (still, grown), (_, before) = inverses
    assert grown > 0.7 * still
    assert before < 0.6 * still


def test_a_run_that_goes_on_from_a_checkpoint_has_the_same_rates(tmp_path):
    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=18, save_top_k=-1)
    whole, _ = fit(Grow(), saved, enable_checkpointing=True)
    path = tmp_path / "step=18.ckpt"
    assert fit(Grow(), path=path)[0] == whole[18:]
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["callbacks"]["LipschitzLR"]["optimizers"][0]["step_scale"]
    assert sum(0 <= cosine < 0.3 and norm > 0 for cosine, norm in state["scale_invariance"]) == 1
    state["scale_invariance"] = []
    torch.save(checkpoint, path)
    assert fit(Grow(), path=path)[0] != whole[18:]
