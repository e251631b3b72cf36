"""Every loss on somebody's own module: the constant behind the first step, manually and by autograd."""

import math

import lightning as L
import pytest
import torch
from helpers import CLASSES, LOSSES, ROWS, WIDTH, AnyLoss, first_constant, trainer
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lit_lipschitz import ConfigurationError, LipschitzLR

LABELS = torch.arange(ROWS) % CLASSES
REAL = torch.linspace(-3, 3, ROWS * CLASSES).reshape(ROWS, CLASSES)
BINARY = (REAL > 0).float()


@pytest.mark.parametrize("case", LOSSES.values(), ids=LOSSES)
def test_a_loss_has_its_constant_and_the_gradient_is_below_it(case):
    targets = case.targets(LABELS)
    for scale in (1.0, 30.0):
        module = AnyLoss(case.function, scale=scale)
        constant = first_constant(module, targets)
        size = (module.inputs.detach().square().sum(dim=1) + 1).mean().sqrt().item()
        gradient_norm = case.gradient_norm
        if gradient_norm is None:
            # 2 / (m n) (norm(Z) + norm(Y)) norm(A~), and of a mean over m; norm(A~) is sqrt(m) times the size.
            matrices = (module.outputs.norm() + targets.norm()).item()
            gradient_norm = case.curvature * matrices / math.sqrt(ROWS)
        assert constant == pytest.approx(gradient_norm * size, rel=1e-5)
        assert 0 < module.gradient <= constant


@pytest.mark.parametrize("name", [name for name, case in LOSSES.items() if case.curvature])
def test_the_smooth_family_has_the_curvature_of_each_loss(name):
    case = LOSSES[name]
    module = AnyLoss(case.function)
    constant = first_constant(module, case.targets(LABELS), bound="smooth", norm="frobenius")
    size = (module.inputs.detach().square().sum(dim=1) + 1).mean().item()
    assert constant == pytest.approx(case.curvature * size, rel=1e-5)


def test_a_squared_error_of_single_outputs_in_each_norm():
    inputs, targets = torch.randn(ROWS, WIDTH), torch.linspace(-3, 3, ROWS)
    for settings in ({}, {"norm": "sample"}, {"bound": "paper"}, {"bound": "paper", "norm": "sample"}):
        module = AnyLoss(lambda z, y: F.mse_loss(z[:, 0], y), outputs=1)
        constant = first_constant(module, targets, inputs, **settings)
        rows, outputs = module.inputs, module.outputs[:, 0]
        with_ones = (rows.square().sum(dim=1) + 1).sqrt()
        expected = {
            "{}": 2 / ROWS * (outputs.norm() + targets.norm()) * with_ones.norm(),
            "{'norm': 'sample'}": 2 * (outputs.abs().max() + 3) * with_ones.max(),
            "{'bound': 'paper'}": 2 / ROWS * (outputs.norm() + targets.norm()) * rows.norm(),
            "{'bound': 'paper', 'norm': 'sample'}": 2 / ROWS * (outputs.abs().max() + 3) * rows.norm(dim=1).max(),
        }[str(settings)]
        assert constant == pytest.approx(expected.item(), rel=1e-5)


def test_the_mean_is_over_what_the_loss_counts():
    """Tokens that are ignored count neither in a batch of many nor where they are all but one."""
    for ignored in (0, 5, ROWS - 1):
        targets = LABELS.clone()
        targets[:ignored] = -100
        module = AnyLoss(F.cross_entropy)
        constant = first_constant(module, targets)
        total = (module.inputs.detach().square().sum(dim=1) + 1).sum()
        assert constant == pytest.approx(math.sqrt(2 * total / (ROWS - ignored)), rel=1e-5)
        assert module.gradient <= constant


def test_a_batch_whose_targets_are_all_ignored_is_left_out():
    module, callback = AnyLoss(F.cross_entropy), LipschitzLR()
    data = DataLoader(TensorDataset(torch.randn(ROWS, WIDTH), torch.full((ROWS,), -100)), batch_size=ROWS)
    with (
        pytest.warns(UserWarning, match="the rate is 0 until a step"),
        pytest.warns(UserWarning, match="a non-finite loss in step 0"),
    ):
        trainer(callback, max_steps=1).fit(module, data)
    assert callback.constant is None


@pytest.mark.parametrize(
    "name",
    ["cross_entropy", "binary_cross_entropy", "mean_absolute_error", "huber", "smooth_l1", "mean_squared_error"],
)
def test_a_loss_can_be_named(name):
    """In other words than torch's: the same constant as the function of torch."""
    functions = {
        "cross_entropy": (F.cross_entropy, lambda z, y: (torch.logsumexp(z, 1) - z.gather(1, y[:, None])[:, 0]).mean()),
        "binary_cross_entropy": (F.binary_cross_entropy_with_logits, lambda z, y: (F.softplus(z) - y * z).mean()),
        "mean_absolute_error": (F.l1_loss, lambda z, y: torch.maximum(z - y, y - z).mean()),
        "huber": (F.huber_loss, lambda z, y: F.huber_loss(z, y) * 1.0 + 0.0 * z.sum()),
        "smooth_l1": (F.smooth_l1_loss, lambda z, y: F.smooth_l1_loss(z, y) + 0.0 * z.sum()),
        "mean_squared_error": (F.mse_loss, lambda z, y: (z - y).square().mean()),
    }
    known, other = functions[name]
    targets = LABELS if name == "cross_entropy" else BINARY
    settings = {"bound": "smooth"} if name == "mean_squared_error" else {}
    inputs = torch.randn(ROWS, WIDTH)
    found = []
    for loss, named in ((known, {}), (other, {"loss": name})):
        torch.manual_seed(3)
        found.append(first_constant(AnyLoss(loss), targets, inputs, **settings, **named))
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    with pytest.raises(ConfigurationError, match="pass its name as loss="):
        first_constant(AnyLoss(other), targets, inputs, norm="sample")


@pytest.mark.parametrize(
    ("loss", "targets", "settings", "message"),
    [
        (
            F.l1_loss,
            REAL,
            {"bound": "smooth"},
            "for the mean_absolute_error of the head 'head': .* is discontinuous",
        ),
        (
            lambda z, y: (z - y).square().mean(),
            REAL,
            {"loss": "mean_squared_error", "norm": "sample"},
            "use torch.nn.functional.mse_loss",
        ),
    ],
)
def test_a_loss_without_a_constant_is_refused(loss, targets, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        first_constant(AnyLoss(loss), targets, **settings)


def test_more_rows_at_the_head_than_targets_are_refused():
    class Tokens(AnyLoss):
        def training_step(self, batch, batch_idx):
            tokens = batch[0][:, None].expand(-1, 4, -1)
            return F.cross_entropy(self.head(self.body(tokens))[:, :1].flatten(0, 1), batch[1])

    with pytest.raises(ConfigurationError, match=f"measured {4 * ROWS} rows at the head 'head' .* {ROWS} targets"):
        first_constant(Tokens(F.cross_entropy), LABELS, norm="sample")
    assert first_constant(Tokens(F.cross_entropy), LABELS, head="head") > 0


def constants_of(module, batches, **settings):
    """The constant behind each step of an epoch, which is decided after each."""

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(callback.constant)

    seen = []
    callback = LipschitzLR(**settings)
    trainer(callback, Watch(), max_epochs=1, limit_val_batches=0).fit(module, batches)
    return seen


def test_a_pooled_squared_error_is_bounded_too():
    class Pooled(AnyLoss):
        def training_step(self, batch, batch_idx):
            self.inputs = self.body(batch[0][:, None] * torch.ones(1, 4, 1)).relu()
            self.outputs = self.head(self.inputs).mean(dim=1)[:, 0]
            return F.mse_loss(self.outputs, batch[1])

    for settings in ({}, {"norm": "sample"}, {"bound": "paper"}):
        module = Pooled(None, outputs=1)
        targets = torch.linspace(-3, 3, ROWS)
        constant = first_constant(module, targets, **settings)
        assert module.gradient <= constant
        if not settings:
            rows = (module.inputs.detach().square().sum(dim=2) + 1).mean().sqrt()
            expected = 2 * (module.outputs.square().mean().sqrt() + targets.square().mean().sqrt()) * rows
            assert constant == pytest.approx(expected.item(), rel=1e-5)


def test_a_batch_that_makes_no_loss_is_forgotten():
    class Skipping(AnyLoss):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else loss

    inputs = torch.randn(4, ROWS, WIDTH)
    inputs[1] *= 1000
    batches = DataLoader(TensorDataset(inputs.flatten(0, 1), LABELS.repeat(4)), batch_size=ROWS)
    assert max(constants_of(Skipping(F.cross_entropy), batches)) < 10


def test_a_frozen_head_is_measured_and_not_what_runs_after_it():
    class Frozen(AnyLoss):
        def __init__(self):
            super().__init__(F.cross_entropy)
            self.head.requires_grad_(False)
            self.after = nn.Linear(8, 3)

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.after(self.inputs * 100)
            return loss

        def on_after_backward(self):
            pass

    module = Frozen()
    constant = first_constant(module, LABELS)
    total = (module.inputs.detach().square().sum(dim=1) + 1).mean()
    assert constant == pytest.approx(math.sqrt(2 * total), rel=1e-5)


@pytest.mark.parametrize("bound", ["strict", "smooth", "paper"])
def test_a_sum_over_a_number_that_varies_is_a_mean(bound):
    """As people write it who count their tokens: the divisor is another in every batch, and a tensor."""

    def manual(z, y):
        return F.cross_entropy(z, y, reduction="sum", ignore_index=-100) / (y != -100).sum()

    def number(z, y):
        return F.cross_entropy(z, y, reduction="sum") / len(y[y != -100])

    targets = LABELS.repeat(4).reshape(4, ROWS).clone()
    for batch, ignored in enumerate((0, 15, 8, 3)):
        targets[batch, :ignored] = -100
    inputs = torch.randn(4 * ROWS, WIDTH)
    found = []
    for loss in (F.cross_entropy, manual, number):
        torch.manual_seed(3)
        batches = DataLoader(TensorDataset(inputs, targets.flatten()), batch_size=ROWS)
        settings = {"bound": bound, "norm": "frobenius", "update": 1}
        found.append(constants_of(AnyLoss(loss), batches, **settings))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


def test_a_weight_that_changes_is_noticed():
    class Warming(AnyLoss):
        def training_step(self, batch, batch_idx):
            return (batch_idx + 1) * super().training_step(batch, batch_idx)

    batches = DataLoader(TensorDataset(torch.randn(1, WIDTH).expand(ROWS * 3, -1), LABELS.repeat(3)), batch_size=ROWS)
    settings = {"update": 1, "max_lr": 1e-9}  # so that the network stays the same
    first, *others = constants_of(Warming(F.cross_entropy), batches, **settings)
    assert others == pytest.approx([1 * first, 2 * first], rel=1e-5)  # of the batch before


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (lambda z, y: 3 * F.cross_entropy(z, y, reduction="sum"), "cross_entropy"),
        (lambda z, y: 0.3 * F.cross_entropy(z, y) + 0.7 * F.cross_entropy(z, 2 - y), "cross_entropy"),
        (lambda z, y: 10 * F.smooth_l1_loss(z, REAL) + F.huber_loss(z, REAL), "smooth_l1"),
        (lambda z, y: F.mse_loss(z, REAL, reduction="sum"), "mean_squared_error"),
    ],
)
def test_what_is_added_to_a_named_loss_is_disregarded_and_nothing_else(loss, name):
    inputs, found = torch.randn(ROWS, WIDTH), []
    for extra in (False, True):
        torch.manual_seed(3)
        module = AnyLoss(lambda z, y, extra=extra: loss(z, y) + (1e-3 * z.exp().sum() if extra else 0.0))
        found.append(first_constant(module, LABELS, inputs, loss=name))
        assert 0 < module.gradient <= found[-1] * 1.01
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_named_loss_of_two_heads_asks_for_the_head():
    class Auxiliary(AnyLoss):
        def __init__(self):
            super().__init__(F.cross_entropy)
            self.aux = nn.Linear(WIDTH, CLASSES)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 0.4 * F.cross_entropy(self.aux(batch[0]), batch[1])

    with pytest.raises(ConfigurationError, match="found 2 of different heads or kinds; pass head="):
        first_constant(Auxiliary(), LABELS, loss="cross_entropy", norm="sample")
    module = Auxiliary()
    constant = first_constant(module, LABELS, loss="cross_entropy", head="head")
    total = (module.inputs.detach().square().sum(dim=1) + 1).mean()
    assert constant == pytest.approx(math.sqrt(2 * total), rel=1e-5)

    class Words(Auxiliary):
        def training_step(self, batch, batch_idx):
            hidden = self.body(batch[0]).relu()
            return self.head(hidden).exp().mean() + self.aux(batch[0]).exp().mean()

    with pytest.raises(ConfigurationError, match="found 2 of them behind the loss; pass head="):
        first_constant(Words(), LABELS, loss="cross_entropy", norm="sample")


def test_mixup_has_the_constant_of_the_cross_entropy():
    inputs, found = torch.randn(ROWS, WIDTH), []
    share = torch.tensor(0.3)
    for loss in (
        F.cross_entropy,
        lambda z, y: 0.3 * F.cross_entropy(z, y) + (1 - 0.3) * F.cross_entropy(z, y.flip(0)),
        lambda z, y: share * F.cross_entropy(z, y) + (1 - share) * F.cross_entropy(z, y.flip(0)),
        lambda z, y: (F.cross_entropy(z, y) + F.cross_entropy(z, y.flip(0))) / 2 + 1.0,
    ):
        torch.manual_seed(3)
        module = AnyLoss(loss)
        found.append(first_constant(module, LABELS, inputs))
        assert 0 < module.gradient <= found[-1]
    assert found[1:] == pytest.approx([found[0]] * 3, rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"norm": "sample"}])
@pytest.mark.parametrize("rows", [1, 7, 16])
def test_the_outputs_that_a_loss_leaves_out_do_not_count(settings, rows):
    """Slices, one action of several as in Q-learning: as if the head had no other outputs."""
    inputs, targets = torch.randn(rows, WIDTH), torch.linspace(-9, 9, rows * 2).reshape(rows, 2)
    for loss in (F.mse_loss, F.l1_loss, F.huber_loss, F.smooth_l1_loss):
        parts = (
            (2, lambda z, y, loss=loss: loss(z[:, :2], y)),
            (1, lambda z, y, loss=loss: loss(z[:, 0], y[:, 0])),
            (1, lambda z, y, loss=loss: loss(z.gather(1, torch.zeros(rows, 1, dtype=torch.long)), y[:, :1])),
        )
        for left, part in parts:
            module = AnyLoss(part, outputs=5)
            constant = first_constant(module, targets, inputs, **settings)
            alone = AnyLoss(lambda z, y, loss=loss, left=left: loss(z, y[:, :left]), outputs=left)
            with torch.no_grad():
                alone.head.weight.copy_(module.head.weight[:left])
            assert module.gradient <= constant * (1 + 1e-6)
            if loss is not F.mse_loss:  # whose constant depends on the outputs, which the step has changed
                alone.body.load_state_dict(module.body.state_dict())
                size = (module.inputs.detach().square().sum(dim=1) + 1).sqrt()
                size = size.max() if settings else size.square().mean().sqrt()
                assert constant == pytest.approx(size.item() / math.sqrt(left), rel=1e-5)


class Steps(AnyLoss):
    """The head is called once for each of several steps, whose outputs are written into one tensor, or left so."""

    def __init__(self, steps, bend=None):
        super().__init__(F.cross_entropy)
        self.steps, self.bend = steps, bend

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        outputs = torch.zeros(self.steps[batch_idx], len(inputs), CLASSES)
        for step in range(len(outputs)):
            outputs[step] = self.head(self.body(inputs))
        outputs = outputs if self.bend is None else self.bend(outputs)
        return F.cross_entropy(outputs.flatten(0, 1), targets.repeat(len(outputs)))


def test_calls_of_the_head_are_counted_in_every_batch():
    inputs = torch.randn(ROWS, WIDTH)
    batches = DataLoader(TensorDataset(inputs.repeat(3, 1), LABELS.repeat(3)), batch_size=ROWS)
    for settings, bend in (({}, None), ({"head": "head"}, torch.sin)):
        torch.manual_seed(3)
        module = Steps((2, 1, 6), bend)
        size = module.body(inputs).square().sum(dim=1).add(1).mean().sqrt().item()
        constants = constants_of(module, batches, update=1, max_lr=1e-9, **settings)
        assert constants == pytest.approx([math.sqrt(2) * size] * 3, rel=1e-5)
        assert module.gradient <= constants[0]


def test_a_named_loss_behind_something_unknown_keeps_its_factor_and_its_rows():
    targets = LABELS.clone()
    targets[:5] = -100
    module = AnyLoss(lambda z, y: 3 * F.cross_entropy(z.sin(), y) + 1e-3 * z.abs().sum())
    constant = first_constant(module, targets, loss="cross_entropy", head="head")
    total = (module.inputs.detach().square().sum(dim=1) + 1).sum()
    assert constant == pytest.approx(3 * math.sqrt(2 * total / (ROWS - 5)), rel=1e-5)


class Answers(AnyLoss):
    """Where an answer begins and ends, chosen among the places of a text, as in models of transformers."""

    def __init__(self):
        super().__init__(None, outputs=2, scale=30.0)

    def training_step(self, batch, batch_idx):
        self.inputs = self.body(batch[0][:, None] * torch.randn(1, 7, 1)).relu()
        begin, end = self.head(self.inputs).split(1, dim=-1)
        losses = [F.cross_entropy(part.squeeze(-1).contiguous(), batch[1]) for part in (begin, end)]
        return (losses[0] + losses[1]) / 2


@pytest.mark.parametrize("norm", ["frobenius", "sample"])
def test_an_answer_is_chosen_among_places(norm):
    module = Answers()
    constant = first_constant(module, LABELS, norm=norm)
    rows = module.inputs.detach().square().sum(dim=2) + 1
    size = (rows.sum() / ROWS) if norm == "frobenius" else 7 * rows.max()
    assert constant == pytest.approx(math.sqrt(2 * size), rel=1e-5)
    assert module.gradient <= constant


@pytest.mark.parametrize("bend", [torch.sigmoid, torch.tanh, torch.relu])
def test_outputs_between_bounds_have_a_bound_for_the_gradient_alone(bend):
    module = AnyLoss(lambda z, y: F.mse_loss(bend(z), y))
    constant = first_constant(module, REAL)
    norms = bend(module.outputs).norm() + REAL.norm()
    expected = 2 / (ROWS * CLASSES) * norms * (module.inputs.detach().square().sum(dim=1) + 1).sum().sqrt()
    assert constant == pytest.approx(expected.item(), rel=1e-5)
    assert module.gradient <= constant
    with pytest.raises(ConfigurationError, match=f"found MseLoss > {bend.__name__.capitalize()} > Addmm"):
        first_constant(AnyLoss(lambda z, y: F.mse_loss(bend(z), y)), REAL, bound="smooth")


class Map(LightningModule):
    """A small map of logits, enlarged to the size of the labels, or averaged over its places."""

    def __init__(self, change):
        super().__init__()
        self.head, self.change = torch.nn.Conv2d(3, 4, 1), change

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.change(self.head(batch[0])), batch[1])

    on_after_backward = AnyLoss.on_after_backward
    configure_optimizers = AnyLoss.configure_optimizers


@pytest.mark.parametrize("ignored", [0, 3])
@pytest.mark.parametrize(
    ("change", "shape"),
    [
        (lambda z: F.interpolate(z, scale_factor=2), (4, 6, 10)),
        (lambda z: F.interpolate(z, (12, 10), mode="bilinear"), (4, 12, 10)),
        (lambda z: z.mean((2, 3)), (4,)),
    ],
)
def test_places_that_are_enlarged_or_averaged_are_rows(change, shape, ignored):
    images, labels = torch.randn(4, 3, 3, 5), torch.zeros(shape, dtype=torch.long)
    images[-1] *= 100  # alone in the gradient where the others are ignored
    labels[:ignored] = -100
    module = Map(change)
    constant = first_constant(module, labels, images)
    rows = images.square().sum(dim=1) + 1
    assert constant == pytest.approx(math.sqrt(2 * rows.sum() / (15 * (4 - ignored))), rel=1e-5)
    assert module.gradient <= constant


@pytest.mark.parametrize("bound", ["strict", "smooth", "paper"])
def test_a_named_heads_outputs_may_be_multiplied_by_a_number(bound):
    """A temperature: the gradient is as many times larger, and the curvature the square of that."""
    inputs, found = torch.randn(ROWS, WIDTH), []
    cold = torch.tensor(0.05)
    for change in (lambda z: z, lambda z: z / 0.05, lambda z: (4 * z[:, :3]).clamp(-9e9, 9e9) / (4 * cold)):
        torch.manual_seed(3)
        module = AnyLoss(lambda z, y, change=change: F.cross_entropy(change(z), y))
        settings = {"bound": bound, "norm": "frobenius", "head": "head"}
        found.append(first_constant(module, LABELS, inputs, **settings))
        assert bound != "strict" or module.gradient <= found[-1]
    times = 400 if bound == "smooth" else 20
    assert found[1:] == pytest.approx([times * found[0]] * 2, rel=1e-5)


class Stretching(torch.nn.Linear):
    """An affine map that is none of its input."""

    def __init__(self, by, **settings):
        super().__init__(8, CLASSES, **settings)
        self.by = by

    def forward(self, inputs):
        return F.linear(inputs * self.by, self.weight, self.bias)


@pytest.mark.parametrize("settings", [{"norm": "sample"}, {"bound": "paper"}])
def test_a_head_that_changes_its_input_is_refused(settings):
    inputs = torch.randn(ROWS, WIDTH)
    for by, bias in ((10.0, True), (0.1, False), (1.0, True)):
        module = AnyLoss(F.cross_entropy)
        module.head = Stretching(by, bias=bias)
        if by == 1:
            assert first_constant(module, LABELS, inputs, **settings) > 0
            continue
        with pytest.raises(ConfigurationError, match=r"found that its forward method \(Stretching\) changes them"):
            first_constant(module, LABELS, inputs, **settings)
        assert first_constant(module, LABELS, inputs, head="head", **settings) > 0
