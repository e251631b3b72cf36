"""``LipschitzLR()`` with losses and layers that are not recognised, in the first step or later: all ranks measure."""

import copy
import logging
import math

import lightning as L
import pytest
import torch
from helpers import CLASSES, WIDTH, Classifier, Keep, Steps, examples, loader, ranks, trainer
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lit_lipschitz import ConfigurationError, LipschitzLR


class Constants(L.Callback):
    """Records the constant behind each step, and the gradient norm in the weights of one layer."""

    def __init__(self, lipschitz, layer):
        self.lipschitz, self.layer = lipschitz, layer
        self.constants, self.gradients = [], []

    def on_fit_start(self, trainer, pl_module):
        trainer.optimizers[0].register_step_post_hook(self._record)

    def _record(self, *_):
        squares = [p.grad.square().sum() for p in self.layer.parameters() if p.grad is not None]
        self.gradients.append(float(sum(squares)) ** 0.5)
        self.constants.append(self.lipschitz.constant)


class Confident(Classifier):
    """A network that is sure of class 0 and wrong, so that gradients are as large as they can be."""

    def __init__(self, loss=None, width=CLASSES, optimizer=None):
        super().__init__(optimizer, nn.Sequential(nn.Linear(WIDTH, 8), nn.Linear(8, width)))
        self.loss = loss
        with torch.no_grad():
            self.net[1].weight.zero_()
            self.net[1].bias.zero_()
            self.net[1].bias[0] = 200.0

    def training_step(self, batch, batch_idx):
        return self.loss(self, batch[0], batch[1], batch_idx)


def wrong(rows=16):
    """Examples of class 1 alone."""
    return DataLoader(TensorDataset(torch.randn(rows, WIDTH), torch.ones(rows, dtype=torch.long)), batch_size=8)


def fit(module, data=None, settings=None, layer=None, trainer_callbacks=(), **trainer_settings):
    """Trains; returns the callback, and the constants and gradient norms of the steps."""
    lipschitz = LipschitzLR(schedule="none", **(settings or {}))
    constants = Constants(lipschitz, layer or module.net[-1])
    trainer(lipschitz, constants, *trainer_callbacks, **{"max_epochs": 1, **trainer_settings}).fit(
        module, data or wrong()
    )
    return lipschitz, constants


def is_measured(lipschitz):
    return lipschitz.controllers[0].metrics()["measured"] == 1


def focal(m, x, y, _):
    entropy = F.cross_entropy(m.net(x), y, reduction="none")
    return ((1 - torch.exp(-entropy)) ** 2 * entropy).mean()


def two_calls(m, x, y, _):
    return F.cross_entropy(m.net(x), y) + F.cross_entropy(m.net(x.flip(0)), y)


def transposed(m, x, y, _):
    weight = m.net[1].weight.reshape(CLASSES, 4, 2)
    return F.cross_entropy(torch.einsum("nij,cij->nc", m.net[0](x).reshape(-1, 4, 2), weight), y)


LOSSES = {
    "focal": focal,
    "temperature": lambda m, x, y, _: F.cross_entropy(m.net(x) / 0.05, y),
    "masked": lambda m, x, y, _: F.cross_entropy(m.net(x)[x[:, 0] > 0] * 3, y[x[:, 0] > 0]),
    "penalty": lambda m, x, y, _: F.cross_entropy(m.net(x), y) + 1e-3 * sum(p.abs().sum() for p in m.parameters()),
    "two terms": two_calls,
    "einsum": transposed,
    "margin": lambda m, x, y, _: F.multi_margin_loss(m.net(x), y),
    "weighted examples": lambda m, x, y, _: (F.cross_entropy(m.net(x), y, reduction="none") * (1 + y)).mean(),
    "root": lambda m, x, y, _: F.mse_loss(m.net(x), F.one_hot(y, CLASSES).float()).sqrt(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_is_not_recognised_is_measured_and_no_gradient_exceeds_its_constant(name):
    torch.manual_seed(0)
    lipschitz, steps = fit(Confident(LOSSES[name]))
    assert is_measured(lipschitz)
    assert lipschitz.head_name == "net.1"
    # The penalty's own gradient in the weights does not come through the outputs.
    tolerance = 1e-3 * math.sqrt(9 * CLASSES) if name == "penalty" else 1e-4 * steps.constants[0]
    assert 0 < steps.gradients[0] <= steps.constants[0] + tolerance


# Losses that look like a recognised one and have another constant.
LOOKS = {
    "factor of a sum": lambda m, x, y, _: F.cross_entropy(torch.add(torch.zeros(CLASSES), m.net(x), alpha=50.0), y),
    "broadcast": lambda m, x, y, _: F.cross_entropy(
        (m.net(x)[:, None] + torch.zeros(1, 16, CLASSES)).transpose(1, 2), y[:, None].expand(-1, 16)
    ),
    "sum over probabilities": lambda m, x, y, _: F.cross_entropy(
        m.net(x), F.one_hot(y, CLASSES).float(), reduction="sum"
    ),
    "difference that is broadcast": lambda m, x, y, _: (m.net(x)[:, :1] - 1000.0 * torch.ones(8)).abs().mean(),
}


@pytest.mark.parametrize("name", LOOKS)
def test_a_gradient_above_the_bound_shows_that_it_is_none(name, caplog):
    torch.manual_seed(0)
    with caplog.at_level(logging.INFO):
        lipschitz, steps = fit(Confident(LOOKS[name]), wrong(24), {"max_lr": 1e-9})
    assert is_measured(lipschitz)
    assert all(
        gradient <= 1.0001 * constant for gradient, constant in zip(steps.gradients, steps.constants, strict=True)
    )
    assert steps.gradients[0] > 0
    (said,) = [record.getMessage() for record in caplog.records if "exceeds" in record.getMessage()]
    assert "from step 1 on its constant is measured" in said


@pytest.mark.parametrize("named", [{"head": "net.1"}, {"loss": "cross_entropy"}])
def test_what_the_user_names_is_checked_too(named):
    module = Confident(lambda m, x, y, _: F.cross_entropy(m.net(x) * m.scale.exp(), y))
    module.scale = nn.Parameter(torch.tensor(3.0))
    lipschitz, steps = fit(module, settings={"max_lr": 1e-9, **named})
    assert is_measured(lipschitz)
    assert 0 < steps.gradients[0] <= 1.0001 * steps.constants[0]


def test_losses_that_are_accumulated_manually_count_together():
    class Manual(Confident):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
            if batch_idx % 3 == 2:
                self.optimizers().step()
                self.optimizers().zero_grad(set_to_none=False)

    lipschitz, module = LipschitzLR(schedule="none", optimizers=0, max_lr=1e-9), Manual()
    norms = []

    class Norms(L.Callback):
        def on_before_optimizer_step(self, *_):
            norms.append(float(sum(p.grad.square().sum() for p in module.net[1].parameters())) ** 0.5)

    trainer(lipschitz, Norms(), max_epochs=1).fit(module, wrong(24))
    assert 0 < norms[0] <= 1.0001 * lipschitz.constant


def turns(later):
    """The cross-entropy for two batches, then another loss."""

    def loss(m, x, y, batch_idx):
        return F.cross_entropy(m.net(x), y) if batch_idx < 2 else later(m, x, y, batch_idx)

    return loss


LATER = {
    "another loss": focal,
    "a factor of the logits": lambda m, x, y, _: F.cross_entropy(m.net(x) * 30, y),
    "another layer": lambda m, x, y, _: F.cross_entropy(m.other(10 * m.net[0](x)), y),
    "class weights": lambda m, x, y, _: F.cross_entropy(m.net(x), y, weight=torch.tensor([0.01, 9.0, 0.01])),
    "label smoothing": lambda m, x, y, _: F.cross_entropy(m.net(x), y, label_smoothing=0.5),
    "two terms": two_calls,
}


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("name", LATER)
def test_a_batch_with_another_loss_is_measured_at_its_own_step(name, optimizer, caplog):
    module = Confident(turns(LATER[name]), optimizer=lambda p: getattr(torch.optim, optimizer)(p, lr=0.1))
    module.other = nn.Linear(8, CLASSES)
    layer = module.other if name == "another layer" else module.net[1]
    with caplog.at_level(logging.INFO):
        lipschitz, steps = fit(module, wrong(32), {"max_lr": 1e-9, "measure_every": 1}, layer)
    assert is_measured(lipschitz)
    assert 0 < steps.gradients[2] <= 1.0001 * steps.constants[2]
    said = [record.getMessage() for record in caplog.records if "on its constant is measured" in record.getMessage()]
    assert len(said) == 1
    assert "from step 3 on" in said[0]


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("name", LATER)
def test_a_batch_with_another_loss_is_measured_in_the_next_step_that_is_due(name, optimizer):
    module = Confident(turns(LATER[name]), optimizer=lambda p: getattr(torch.optim, optimizer)(p, lr=0.1))
    module.other = nn.Linear(8, CLASSES)
    layer = module.other if name == "another layer" else module.net[1]
    lipschitz, steps = fit(module, wrong(32), {"max_lr": 1e-9}, layer)
    assert is_measured(lipschitz)
    assert 0 < steps.gradients[3] <= 1.0001 * steps.constants[3]  # step 4


def test_the_same_arguments_that_are_made_again_in_each_batch_stay_recognised():
    weights = [1.0, 2.0, 0.5]
    module = Confident(lambda m, x, y, _: F.cross_entropy(m.net(x), y, weight=torch.tensor(weights)))
    lipschitz, _ = fit(module, wrong(32))
    assert lipschitz.controllers[0].metrics()["measured"] == 0


class OnRanks(Classifier):
    """One rank has another loss from a batch on."""

    def __init__(self, rank, first, optimizer=None):
        super().__init__(optimizer)
        self.rank, self.first = rank, first

    def training_step(self, batch, batch_idx):
        if self.global_rank == self.rank and self.global_step >= self.first:
            return focal(self, batch[0], batch[1], batch_idx)
        return F.cross_entropy(self.net(batch[0]), batch[1])


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize(("rank", "first"), [(0, 0), (1, 0), (0, 2), (1, 7)])
def test_ranks_measure_together(rank, first, optimizer):
    torch.manual_seed(1)
    module = OnRanks(rank, first, lambda p: getattr(torch.optim, optimizer)(p, lr=0.1))
    one, other = ranks(2, LipschitzLR(), module, 8, max_epochs=4)
    assert len(one["rates"]) == 24
    assert one["rates"] == other["rates"]
    assert all(math.isfinite(rate) for (rate,) in one["rates"])
    assert all(torch.equal(a, b) for a, b in zip(one["weights"], other["weights"], strict=True))


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("first", [0, 5, 11])
def test_a_run_that_began_to_measure_resumes_with_the_same_rates(first, optimizer):
    def make():
        torch.manual_seed(1)
        return OnRanks(0, first, lambda p: getattr(torch.optim, optimizer)(p, lr=0.1))

    trainer(LipschitzLR(schedule="none"), Keep(), max_epochs=4).fit(make(), loader())
    whole = torch.load("rank0.pt")
    part = trainer(LipschitzLR(schedule="none"), max_epochs=2)
    part.fit(make(), loader())
    part.save_checkpoint("part.ckpt")
    trainer(LipschitzLR(schedule="none"), Keep(), max_epochs=4).fit(make(), loader(), ckpt_path="part.ckpt")
    rest = torch.load("rank0.pt")
    assert rest["rates"] == whole["rates"][12:]
    assert all(torch.equal(a, b) for a, b in zip(rest["weights"], whole["weights"], strict=True))


@pytest.mark.parametrize("settings", [{"norm": "sample"}, {"bound": "smooth"}, {"bound": "paper"}])
def test_where_measuring_has_no_meaning_the_loss_is_refused(settings):
    with pytest.raises(ConfigurationError, match="LipschitzLR looked for a loss that it has a constant for"):
        fit(Confident(focal), settings=settings)


def test_one_line_says_what_the_rate_is_computed_from(caplog):
    for loss, words in ((turns(focal), "cross_entropy, a proven bound"), (focal, "loss not recognised: measured")):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            fit(Confident(loss), wrong(8))
        (said,) = [line for line in (record.getMessage() for record in caplog.records) if "first rate" in line]
        assert "output layers net.1" in said
        assert words in said
        assert ", m = 8; first rate " in said


class OneRefused(Classifier):
    """A generator and a critic; one rank weights the critic's loss, which under manual optimization has no bound."""

    def __init__(self, refused):
        super().__init__(net=nn.Linear(WIDTH, 1))
        self.automatic_optimization, self.refused = False, refused
        self.generator = nn.Linear(WIDTH, WIDTH)

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.generator, self.net)]

    def step(self, position, rows, target, factor=1.0):
        self.optimizers()[position].zero_grad()
        targets = torch.full((len(rows), 1), target)
        self.manual_backward(factor * F.binary_cross_entropy_with_logits(self.net(rows), targets))
        self.optimizers()[position].step()

    def training_step(self, batch, batch_idx):
        self.step(0, self.generator(batch[0]), 1.0)
        self.step(1, batch[0], 0.0, 0.25 if self.global_rank in self.refused else 1.0)


@pytest.mark.parametrize("refused", [(0,), (1,), (0, 1)])
def test_ranks_measure_together_if_one_refuses_a_loss(refused):
    torch.manual_seed(1)
    settings = {"max_epochs": 2, "ddp": {"find_unused_parameters": True}}
    one, other = ranks(2, LipschitzLR(optimizers=1, schedule="none"), OneRefused(refused), 8, **settings)
    assert all(torch.equal(a, b) for a, b in zip(one["weights"], other["weights"], strict=True))


def test_the_rate_of_a_measured_loss_does_not_grow_as_the_loss_vanishes():
    torch.manual_seed(0)
    inputs = torch.randn(128, WIDTH)
    data = DataLoader(TensorDataset(inputs, inputs @ torch.randn(WIDTH, CLASSES)), batch_size=32, shuffle=True)
    losses = []

    class Squares(Classifier):
        def training_step(self, batch, batch_idx):
            loss = (self.net(batch[0]) - batch[1]).square().sum(dim=1).mean()
            losses.append(loss.item())
            return loss

        def validation_step(self, batch, batch_idx):
            pass

    callback = LipschitzLR(schedule="none")
    trainer(callback, steps := Steps(), max_epochs=60).fit(Squares(net=nn.Linear(WIDTH, CLASSES)), data)
    assert callback.controllers[0].metrics()["measured"] == 1
    assert losses[-1] < 1e-3 * losses[0]
    assert max(rate for (rate,) in steps.rates) < 3 * steps.rates[0][0]


def test_losses_in_turns_are_all_measured():
    def loss(m, x, y, batch_idx):
        return (100.0 if batch_idx % 2 == 0 else 1.0) * focal(m, x, y, batch_idx)

    torch.manual_seed(0)
    module = Classifier()
    module.training_step = lambda batch, batch_idx: loss(module, batch[0], batch[1], batch_idx)
    callback = LipschitzLR(schedule="none")
    trainer(callback, steps := Steps(), max_epochs=8).fit(module, loader())
    assert max(rate for (rate,) in steps.rates) < 3 * steps.rates[0][0]


def test_a_run_that_is_resumed_with_another_loss_is_measured_again():
    run = trainer(LipschitzLR(schedule="none"), max_epochs=1)
    run.fit(Classifier(), loader())
    run.save_checkpoint("other.ckpt")

    def fit_on(ckpt_path):
        module = Classifier()
        module.load_state_dict(run.lightning_module.state_dict())
        module.training_step = lambda batch, batch_idx: 100 * focal(module, *batch, batch_idx)
        trainer(LipschitzLR(schedule="none"), steps := Steps(), max_epochs=2).fit(module, loader(), ckpt_path=ckpt_path)
        return steps.rates[0][0]

    assert fit_on("other.ckpt") == pytest.approx(fit_on(None), rel=1e-3)


def test_a_parameter_behind_a_frozen_convolution_trains():
    class Image(Classifier):
        def __init__(self):
            super().__init__(net=nn.Conv2d(3, 4, 3).requires_grad_(False))
            self.image = nn.Parameter(torch.randn(1, 3, 8, 8))

        def training_step(self, batch, batch_idx):
            return self.net(self.image).square().mean()

        def validation_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return torch.optim.Adam([self.image], lr=0.1)

    callback = LipschitzLR(schedule="none")
    trainer(callback, max_epochs=1).fit(Image(), loader())
    assert callback.head_name == "image"
    assert callback.constant > 0


@pytest.mark.filterwarnings("ignore:LipschitzLR. (no constant can be computed|all gradients or updates so far)")
@pytest.mark.parametrize("empty", [0, 1])
def test_an_empty_batch_in_a_step_that_is_measured_is_passed_over(empty):
    class Empty(Classifier):
        def training_step(self, batch, batch_idx):
            rows = slice(0, 0) if batch_idx == empty else slice(None)
            return F.cross_entropy(self.net(batch[0][rows]), batch[1][rows], reduction="sum") / 8

    callback = LipschitzLR(schedule="none")
    trainer(callback, steps := Steps(), max_epochs=1).fit(Empty(), loader())
    assert all(math.isfinite(rate) for (rate,) in steps.rates)
    assert steps.rates[-1][0] > 0


def rates_of(module, rows=32, **settings):
    """The callback, the constants and gradient norms, and the rates of a fit."""
    data, layer, seen = DataLoader(examples(count=rows), batch_size=8), module.layers[1], Steps()
    lipschitz, steps = fit(module, data, settings, layer, trainer_callbacks=[seen])
    return lipschitz, steps, [rate for (rate,) in seen.rates]


class Parts(Classifier):
    """A network with any loss, of which parts are compiled or checkpointed."""

    def __init__(self, loss, optimizer="SGD", *head):
        torch.manual_seed(0)
        torch.compiler.reset()
        body = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU())
        layers = (body, *(head or (nn.Linear(8, CLASSES),)))
        super().__init__(lambda p: getattr(torch.optim, optimizer)(p, lr=0.1), nn.Sequential(*layers))
        self.loss, self.layers = loss, layers

    def training_step(self, batch, batch_idx):
        return self.loss(self, batch[0], batch[1], batch_idx)


def compile_parts(module, part):
    """Compiles a part of the module in place."""
    if part == "network":
        module.net = torch.compile(module.net, backend="aot_eager", fullgraph=True)
    elif part == "loss":
        module.loss = torch.compile(module.loss, backend="aot_eager")
    elif part == "in place":
        module.net.compile(backend="aot_eager")
    else:
        for position in part:
            module.net[position] = torch.compile(module.net[position], backend="aot_eager")


def recognised(m, x, y, _):
    return F.cross_entropy(m.net(x), y)


@pytest.mark.parametrize(
    ("name", "part", "optimizer"),
    [
        ("focal", "network", "SGD"),
        ("focal", "network", "AdamW"),
        ("masked", "in place", "AdamW"),
        ("penalty", (0, 1), "SGD"),
        ("margin", (0,), "SGD"),
        ("temperature", (1,), "AdamW"),
    ],
)
def test_a_compiled_network_with_any_loss_has_the_rates_of_an_eager_one(name, part, optimizer):
    _, steps, expected = rates_of(Parts(LOSSES[name], optimizer))
    compile_parts(module := Parts(LOSSES[name], optimizer), part)
    lipschitz, compiled, rates = rates_of(module)
    assert is_measured(lipschitz)
    assert lipschitz.head_name == "net.1"
    assert rates == pytest.approx(expected, rel=1e-4)
    assert compiled.constants == pytest.approx(steps.constants, rel=1e-4)


@pytest.mark.parametrize("name", ["focal", "recognised"])
@pytest.mark.parametrize("has_run", [True, False])
def test_a_network_that_has_run_compiled_before_says_so(name, has_run, caplog):
    """Its compiled code has no hooks, so that the gradient in the outputs is not seen."""
    compile_parts(module := Parts({**LOSSES, "recognised": recognised}[name]), "network")
    if has_run:
        inputs, targets = examples(count=8).tensors
        module.training_step((inputs, targets), 0).backward()
        module.zero_grad()
    with caplog.at_level(logging.INFO):
        lipschitz, _, _ = rates_of(module)
    assert is_measured(lipschitz) == (has_run or name == "focal")
    assert caplog.text.count("one of its class, has already been run") == has_run


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, inputs):
        return self.factor * inputs


HEADS = {
    "no bias": lambda: [nn.Linear(8, CLASSES, bias=False)],
    "weight norm": lambda: [nn.utils.parametrizations.weight_norm(nn.Linear(8, CLASSES))],
    "convolution": lambda: [nn.Conv2d(2, CLASSES, (1, 3), stride=(1, 2), padding=(0, 1)), nn.Flatten()],
    "transposed convolution": lambda: [nn.ConvTranspose2d(2, CLASSES, (1, 2)), nn.Flatten()],
    "factor": lambda: [nn.Linear(8, CLASSES), Times(20.0)],
    "log-softmax": lambda: [nn.Linear(8, CLASSES), nn.LogSoftmax(1)],
}


@pytest.mark.parametrize("loss", ["focal", "recognised"])
@pytest.mark.parametrize("name", HEADS)
def test_the_constant_of_a_compiled_network_is_that_of_an_eager_one(name, loss):
    def make(compiles):
        torch.manual_seed(0)
        head = HEADS[name]()
        body = [nn.Unflatten(1, (2, 1, 4))] if "convolution" in name else []
        module = Parts({"focal": focal, "recognised": recognised}[loss], "SGD", *head)
        module.layers[0].extend(body)
        if compiles:
            compile_parts(module, "network")
        return module

    _, steps, _ = rates_of(make(False), max_lr=1e-9)
    lipschitz, compiled, _ = rates_of(make(True), max_lr=1e-9)
    assert compiled.gradients == pytest.approx(steps.gradients, rel=1e-4)
    if name == "log-softmax" and loss == "recognised":
        assert not is_measured(lipschitz)  # a second log-softmax changes nothing, and hides it
    else:
        assert compiled.constants == pytest.approx(steps.constants, rel=1e-3)
    assert all(g <= 1.0001 * c for g, c in zip(compiled.gradients, compiled.constants, strict=True))


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize(
    ("part", "head"),
    [("loss", []), ("network", [nn.Conv2d(2, CLASSES, (1, 3)), nn.AdaptiveAvgPool2d(1), nn.Flatten()])],
    ids=["loss", "pooled"],
)
def test_of_compiled_code_with_other_outputs_the_gradient_in_the_last_layer_is_measured(part, head, optimizer):
    def make():
        module = Parts(focal, optimizer, *copy.deepcopy(head))
        module.layers[0].extend([nn.Unflatten(1, (2, 1, 4))] if head else [])
        return module

    before = focal(make(), *examples(count=32).tensors, 0)
    compile_parts(module := make(), part)
    lipschitz, steps, rates = rates_of(module)
    assert is_measured(lipschitz)
    assert lipschitz.head_name == "net.1"
    assert steps.constants[0] == pytest.approx(steps.gradients[0], rel=1e-4)
    assert all(rate > 0 for rate in rates)
    assert focal(module, *examples(count=32).tensors, 0) < before


def test_a_network_that_has_run_compiled_before_is_measured_by_the_gradients_in_its_weights():
    compile_parts(module := Parts(focal), "network")
    module.net(torch.zeros(8, WIDTH))
    lipschitz, steps, _ = rates_of(module)
    assert is_measured(lipschitz)
    assert 0 < steps.gradients[0] <= 1.0001 * steps.constants[0]


def test_compiled_code_neither_keeps_its_inputs_nor_is_compiled_for_each_measurement():
    compiled = CompileCounterWithBackend("aot_eager")
    module = Parts(focal)
    module.net = torch.compile(module.net, backend=compiled)
    lipschitz = LipschitzLR(schedule="none")
    kept = []

    class Look(L.Callback):
        def on_after_backward(self, trainer, pl_module):
            hooks = [hook.__self__ for hook in pl_module.layers[1]._forward_pre_hooks.values()]
            kept.extend(hook._inputs for hook in hooks)

    trainer(lipschitz, Look(), max_epochs=2).fit(module, DataLoader(examples(count=32), batch_size=8))
    assert compiled.frame_count <= 2  # once more when hooks on other layers are removed, as with any loss
    assert kept == [None] * 8
    assert not any(layer._forward_pre_hooks for layer in module.modules())


def checkpointed(network, parts):
    """The outputs of a network whose parts run again in the backward."""

    def forward(x):
        x = x.requires_grad_()
        if parts == "network":
            return checkpoint(network, x, use_reentrant=True)
        for position, layer in enumerate(network):
            x = checkpoint(layer, x, use_reentrant=True) if position in parts else layer(x)
        return x

    return forward


@pytest.mark.parametrize("parts", ["network", (0,), (1,), (0, 1), (2,), (1, 2)], ids=str)
@pytest.mark.parametrize(("name", "optimizer"), [("focal", "AdamW"), ("masked", "SGD"), ("recognised", "SGD")])
def test_a_network_with_reentrant_checkpointing_has_the_rates_of_one_without(name, parts, optimizer):
    def make(wrap):
        torch.manual_seed(0)
        loss = LOSSES.get(name, recognised)
        module, part = Parts(None, optimizer, nn.Linear(8, CLASSES), nn.Softplus()), nn.Module()
        part.net = wrap(module.net)
        module.loss = lambda m, *batch: loss(part, *batch)
        return module

    settings = {"loss": "measured"} if name == "recognised" else {}
    _, steps, expected = rates_of(make(lambda net: net.forward), **settings)
    lipschitz, hidden, rates = rates_of(make(lambda net: checkpointed(net, parts)), **settings)
    assert is_measured(lipschitz)
    assert lipschitz.head_name == "net.1"
    assert rates == pytest.approx(expected, rel=1e-4)
    assert hidden.constants == pytest.approx(steps.constants, rel=1e-4)


def test_a_name_is_not_believed_if_the_graph_shows_another_loss():
    module = Confident(lambda m, x, y, _: F.mse_loss(m.net(x), F.one_hot(y, CLASSES).float()))
    lipschitz, steps = fit(module, settings={"loss": "cross_entropy", "max_lr": 1e-9})
    assert is_measured(lipschitz)
    assert 0 < steps.gradients[0] <= 1.0001 * steps.constants[0]
    with pytest.raises(
        ConfigurationError, match="found a mean_squared_error; pass loss='mean_squared_error', or leave"
    ):
        fit(module, settings={"loss": "cross_entropy", "norm": "sample"})


@pytest.mark.parametrize("name", ["another loss", "class weights", "another layer"])
def test_batches_of_a_named_loss_are_compared_too(name):
    module = Confident(turns(LATER[name]))
    module.other = nn.Linear(8, CLASSES)
    layer = module.other if name == "another layer" else module.net[1]
    settings = {"max_lr": 1e-9, "loss": "cross_entropy", "measure_every": 1}
    lipschitz, steps = fit(module, wrong(32), settings, layer)
    assert is_measured(lipschitz)
    assert 0 < steps.gradients[2] <= 1.0001 * steps.constants[2]


@pytest.mark.parametrize(
    "zero",
    [
        lambda m: torch.zeros((), requires_grad=True),
        lambda m: 2 * torch.zeros(3, requires_grad=True).sum(),
        lambda m: m.frozen(torch.ones(1, WIDTH, requires_grad=True)).sum(),
    ],
    ids=["leaf", "function of a leaf", "frozen layer"],
)
@pytest.mark.parametrize("settings", [{}, {"loss": "cross_entropy"}], ids=str)
def test_a_loss_that_reaches_no_parameter_is_passed_over(zero, settings):
    module = Confident(turns(lambda m, *_: zero(m)))
    module.frozen = nn.Linear(WIDTH, 1).requires_grad_(False)
    lipschitz, _ = fit(module, wrong(32), settings)
    assert not is_measured(lipschitz)


class Optimizers(Confident):
    """The cross-entropy for two batches, then another loss, with a second network and an optimizer of its own."""

    def __init__(self, later, order, optimizer=None):
        super().__init__(turns(later), optimizer=optimizer)
        self.automatic_optimization, self.order = False, order
        self.other = nn.Linear(WIDTH, CLASSES)

    def step(self, optimizer, loss):
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def training_step(self, batch, batch_idx):
        one, other = self.optimizers()
        steps = {
            "own": lambda: self.step(one, self.loss(self, *batch, batch_idx)),
            # Goes through the network of the first optimizer, as the loss of a generator through its critic.
            "other": lambda: self.step(other, 5.0 * focal(self, self.other(batch[0]).repeat(1, 2), batch[1], 0)),
            "elsewhere": lambda: self.step(other, focal(nn.ModuleDict({"net": self.other}), *batch, 0)),
        }
        for name in self.order:
            steps[name]()

    def configure_optimizers(self):
        return [self.make(part.parameters()) for part in (self.net, self.other)]


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("order", [("own", "other"), ("other", "own"), ("own", "elsewhere"), ("elsewhere", "own")])
@pytest.mark.parametrize("name", ["another loss", "a factor of the logits", "class weights", "same"])
def test_batches_of_one_of_several_optimizers_are_compared(name, order, optimizer):
    later = LATER.get(name, lambda m, x, y, _: F.cross_entropy(m.net(x), y))
    module = Optimizers(later, order, lambda p: getattr(torch.optim, optimizer)(p, lr=0.1))
    lipschitz, steps = fit(module, wrong(64), {"max_lr": 1e-9, "optimizers": 0})
    assert is_measured(lipschitz) == (name != "same")
    assert all(
        0 < gradient <= 1.0001 * constant for gradient, constant in zip(steps.gradients, steps.constants, strict=True)
    )
