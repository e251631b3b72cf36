"""``suggest``: the first rate of LipschitzLR, the noise scale and the curve, and a training that stays as it was."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from helpers import CLASSES, LINEAR_OPTIMIZERS, MEASURED_OPTIMIZERS, WIDTH, Classifier, loader, trainer
from helpers.loops import BATCH, OPTIMIZERS, network
from lightning.fabric import Fabric
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from lit_lipschitz import LipschitzLR, LitLipschitzError, attach, suggest


def halving(optimizer):
    return LambdaLR(optimizer, lambda step: 0.5 ** (step + 1))


def squared(outputs, targets):
    return F.mse_loss(outputs, F.one_hot(targets, CLASSES).float())


def margin(outputs, targets):
    """Not recognised, so that its constant is measured."""
    return F.multi_margin_loss(outputs, targets)


def by_lightning(make, loss=F.cross_entropy, scheduler=None, settings=None, **trainer_settings):
    """The callback of a fit of one optimizer step."""

    class Module(Classifier):
        def training_step(self, batch, batch_idx):
            return loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            optimizer = make(self.parameters())
            schedulers = [{"scheduler": scheduler(optimizer), "interval": "step"}] if scheduler else []
            return [optimizer], schedulers

    callback = LipschitzLR(**settings or {})
    trainer(callback, max_steps=1, **trainer_settings).fit(Module(net=network()), loader(BATCH))
    return callback


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("loss", "own", "lightnings"),
    [
        (F.cross_entropy, {}, {}),
        (squared, {}, {}),
        (margin, {}, {}),
        (F.cross_entropy, {"accumulate_grad_batches": 3}, {"accumulate_grad_batches": 3}),
        (F.cross_entropy, {"max_lr": 1e-3}, {"settings": {"max_lr": 1e-3}}),
        (F.cross_entropy, {"bound": "smooth"}, {"settings": {"bound": "smooth"}}),
        (F.cross_entropy, {"schedule": "none"}, {"scheduler": halving}),
    ],
)
def test_the_rate_is_the_first_one_of_lipschitzlr(optimizer, loss, own, lightnings):
    expected = by_lightning(OPTIMIZERS[optimizer], loss, **lightnings)
    net = network()
    found = suggest(net, OPTIMIZERS[optimizer](net.parameters()), loader(BATCH), loss, **own)
    assert (found.rate, found.constant) == (expected.rate, expected.constant)
    assert found.output_layers == expected.head_name.removeprefix("net.")
    assert found.kind == ("measured" if loss is margin else "bound")
    assert found.loss == {F.cross_entropy: "cross_entropy", squared: "mean_squared_error", margin: "measured"}[loss]
    assert found.batch_size == BATCH * own.get("accumulate_grad_batches", 1)


@pytest.mark.parametrize("name", [*MEASURED_OPTIMIZERS, *LINEAR_OPTIMIZERS])
def test_the_rate_of_any_optimizer_is_the_first_one_of_lipschitzlr(name):
    make = {**MEASURED_OPTIMIZERS, **LINEAR_OPTIMIZERS}[name]
    expected = by_lightning(make)
    net = network()
    found = suggest(net, make(net.parameters()), loader(BATCH), F.cross_entropy, num_batches=2, curve=True)
    assert (found.rate, found.constant) == (expected.rate, expected.constant)


def test_fabric_gives_the_same():
    net, fabric = network(), Fabric(accelerator="cpu")
    optimizer = OPTIMIZERS["AdamW"](net.parameters())
    expected = suggest(net, optimizer, loader(BATCH), F.cross_entropy)
    assert suggest(*fabric.setup(net, optimizer), loader(BATCH), F.cross_entropy) == expected


def test_gradients_are_clipped_as_in_training():
    expected = by_lightning(OPTIMIZERS["AdamW"], gradient_clip_val=0.01)
    net = network()
    optimizer = OPTIMIZERS["AdamW"](net.parameters())
    clipped = suggest(
        net, optimizer, loader(BATCH), F.cross_entropy, clip=lambda: nn.utils.clip_grad_norm_(net.parameters(), 0.01)
    )
    assert clipped.rate == expected.rate
    assert clipped.noise == suggest(net, optimizer, loader(BATCH), F.cross_entropy).noise


def test_the_rates_of_gradient_descent_are_those_of_their_formula():
    """1 / max(L, |g|^2 / f), L = sqrt(2) |A|_F / sqrt(m), with autograd and plain arithmetic."""
    net, expected = network(), []
    found = suggest(net, torch.optim.SGD(net.parameters(), lr=0.3), loader(BATCH), F.cross_entropy, num_batches=5)
    for inputs, targets in list(loader(BATCH))[:5]:
        loss = F.cross_entropy(net(inputs), targets)
        square = sum(grad.square().sum() for grad in torch.autograd.grad(loss, list(net.parameters())))
        hidden = net[:-1](inputs).detach()
        constant = math.sqrt(2 * (hidden.square().sum() + len(hidden)) / len(hidden))
        expected.append(1 / max(constant, (square / loss).item()))
    assert found.rates == pytest.approx(expected, rel=1e-4)
    assert found.rate_range == (min(found.rates), max(found.rates))
    assert len(set(found.rates)) == 5


def test_the_noise_scale_of_a_linear_regression_is_that_of_its_closed_form():
    """With inputs N(0, H), noise of variance v and d = w - w*, the mean gradient is 2 H d and the trace of the
    covariance 4 (|H d|^2 + tr(H) (d'Hd + v)), by the fourth moments of a normal distribution."""
    width, variance, batch_size = 12, 0.5, 32
    scales = torch.linspace(0.2, 1.5, width)
    net = nn.Linear(width, 1, bias=False)
    truth = torch.randn(width)
    error, spectrum = net.weight.detach()[0] - truth, scales**2
    square = 4 * (spectrum * error).square().sum()
    trace = square + 4 * spectrum.sum() * ((spectrum * error**2).sum() + variance)

    def batch():
        inputs = torch.randn(batch_size, width) * scales
        return inputs, (inputs @ truth + variance**0.5 * torch.randn(batch_size))[:, None]

    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    noise = suggest(net, optimizer, [batch() for _ in range(200)], F.mse_loss, num_batches=200).noise
    assert noise.grad_square == pytest.approx(square.item(), rel=0.1)
    assert noise.covariance_trace == pytest.approx(trace.item(), rel=0.1)
    assert noise.low < trace / square < noise.high
    assert noise.high < 1.3 * noise.low


@pytest.mark.parametrize("scheduler", [None, halving])
@pytest.mark.parametrize(
    "make",
    [
        lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda net: torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1),
        lambda net: torch.optim.RMSprop([{"params": net[0].parameters(), "lr": 0.2}, {"params": net[2].parameters()}]),
    ],
)
def test_the_curve_is_that_of_real_steps(make, scheduler):
    net, batches = network(), list(loader(BATCH))[:3]
    optimizer = make(net)
    for inputs, targets in loader(BATCH):  # a state, of which a step depends
        optimizer.zero_grad()
        F.cross_entropy(net(inputs), targets).backward()
        optimizer.step()
    if scheduler is not None:
        scheduler(optimizer)
    found = suggest(net, optimizer, batches, F.cross_entropy, curve=True)
    curve = found.curve
    assert curve.rates[len(curve.rates) // 2] == found.rate
    assert [curve.rates[0], curve.rates[-1]] == pytest.approx([found.rate / 100, found.rate * 100])
    first = optimizer.param_groups[0].get("initial_lr", optimizer.param_groups[0]["lr"])
    for rate, loss in zip((0.0, *curve.rates[::4]), (curve.loss, *curve.losses[::4]), strict=True):
        copied, other = copy.deepcopy((net, optimizer))
        for group in other.param_groups:
            group["lr"] = rate * group.get("initial_lr", group["lr"]) / first
        other.zero_grad()
        F.cross_entropy(copied(batches[0][0]), batches[0][1]).backward()
        type(other).step(other)
        expected = F.cross_entropy(copied(batches[-1][0]), batches[-1][1]).item()
        assert loss == pytest.approx(expected, rel=1e-3)


class Noisy(nn.Module):
    """Everything that a forward changes or draws, frozen parts, and a parameter that is not used."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, CLASSES))
        self.frozen = nn.BatchNorm1d(WIDTH).eval()
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, inputs):
        self.count = self.count + random.random() + float(np.random.rand())
        return self.net(self.frozen(inputs) + torch.rand_like(inputs))


def everything(net, optimizer):
    """All state, as values that are compared bit for bit, and the identities of what must stay the same object."""
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    values = [
        *net.state_dict().values(),
        *(one.grad for one in net.parameters()),
        *(value for state in optimizer.state.values() for value in state.values()),
        *(value for group in groups for value in group.values()),
        [part.training for part in net.modules()],
        len(optimizer.state),
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.autograd.backward,
        len(optimizer._optimizer_step_pre_hooks),
        [len(part._forward_hooks) for part in net.modules()],
    ]
    tensors = [*net.buffers(), *net.parameters(), *(one.grad for one in net.parameters())]
    return copy.deepcopy(values), [id(one) for one in tensors]


def assert_same(one, other):
    assert one[1] == other[1]
    for i, (first, second) in enumerate(zip(one[0], other[0], strict=True)):
        same = torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
        assert same, (i, first, second)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(0.1)),
        lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
    ],
)
@pytest.mark.parametrize("steps", [0, 2])
def test_nothing_is_changed_also_after_an_error(make, mode, steps):
    net = Noisy()
    optimizer = make(net.parameters())
    scheduler = halving(optimizer)
    for (inputs, targets), _ in zip(loader(BATCH), range(steps + 1), strict=False):
        F.cross_entropy(net(inputs), targets).backward()
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
    net.train(mode)
    net.frozen.eval()
    batches = list(loader(BATCH))
    before = everything(net, optimizer)
    assert suggest(net, optimizer, batches, F.cross_entropy, curve=True).rate > 0
    assert_same(before, everything(net, optimizer))
    calls = []

    def failing(outputs, targets):
        calls.append(targets)
        if len(calls) == 3:
            raise RuntimeError("of the third batch")
        return F.cross_entropy(outputs, targets)

    with pytest.raises(RuntimeError, match="of the third batch"):
        suggest(net, optimizer, batches, failing)
    assert_same(before, everything(net, optimizer))

    def failing_in_the_curve(outputs, targets):
        if not torch.is_grad_enabled():
            calls.append(targets)
            if len(calls) == 7:
                raise RuntimeError("of the curve")
        return F.cross_entropy(outputs, targets)

    with pytest.raises(RuntimeError, match="of the curve"):
        suggest(net, optimizer, batches, failing_in_the_curve, num_batches=1, curve=True)
    assert_same(before, everything(net, optimizer))


def test_dropout_and_batch_norm_are_those_of_training():
    """The rate by a module in inference mode is the rate of the first training step, with the same random numbers."""
    net = Noisy()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    inputs, targets = next(iter(loader(BATCH)))
    found = suggest(net.eval(), optimizer, [(inputs, targets)], F.cross_entropy)
    net.train()
    control = attach(net, optimizer, notify=lambda message: None)
    F.cross_entropy(net(inputs), targets).backward()
    optimizer.step()
    assert control.rate == found.rate
    assert found.noise is None
    control.detach()


def test_a_batch_that_is_no_pair_goes_to_the_loss_function():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pairs = list(loader(BATCH))
    batches = ({"targets": targets, "inputs": inputs} for inputs, targets in pairs)
    found = suggest(
        net, optimizer, batches, lambda model, batch: F.cross_entropy(model(batch["inputs"]), batch["targets"])
    )
    assert found == suggest(net, optimizer, pairs, F.cross_entropy)


def test_a_compiled_network_has_the_same_rates_and_can_be_attached_to_afterwards():
    net = network()
    compiled = torch.compile(net, backend="aot_eager")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    found = suggest(compiled, optimizer, loader(BATCH), F.cross_entropy)
    assert found == suggest(net, optimizer, loader(BATCH), F.cross_entropy)
    with attach(compiled, optimizer, notify=lambda message: None) as control:
        inputs, targets = next(iter(loader(BATCH)))
        F.cross_entropy(compiled(inputs), targets).backward()
        optimizer.step()
    assert control.rate == pytest.approx(found.rate, rel=1e-5)


def mistakes():
    nan = [(torch.full((4, WIDTH), math.nan), torch.zeros(4, dtype=torch.long))]
    return {
        "expected at least 1 batches and found fewer": {"batches": []},
        "expected at least 13 batches and found fewer": {"accumulate_grad_batches": 13},
        r"found shape \(8,\); return the mean": {"loss_fn": lambda z, y: F.cross_entropy(z, y, reduction="none")},
        "found float; return the mean": {"loss_fn": lambda z, y: 1.0},
        "expected a finite loss and found nan for batch 1": {"batches": nan},
        "no constant can be computed": {"loss_fn": lambda z, y: 0 * z.sum()},
        r"initial_lr=\.\.\.\): it is the first learning rate": {"initial_lr": 0.1},
        r"attach\(accumulate_grad_batches=0\)|accumulate_grad_batches=0": {"accumulate_grad_batches": 0},
    }


@pytest.mark.parametrize("message", mistakes())
def test_mistakes(message):
    net = network()
    arguments = {"batches": loader(BATCH), "loss_fn": F.cross_entropy, **mistakes()[message]}
    with pytest.raises(LitLipschitzError, match=message):
        suggest(net, torch.optim.SGD(net.parameters(), lr=0.1), **arguments)
