"""LipschitzLR in a Trainer: its rates against independent computations, resuming, logging, and its errors."""

import copy
import csv
import itertools
import math
import sys
import warnings

import lightning as L
import pytest
import torch
from helpers import CLASSES, WIDTH, Classifier, Lion, Steps, due_steps, examples, loader, trainer
from lightning.pytorch.callbacks import BaseFinetuning, LearningRateMonitor, ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F

from lit_lipschitz import ConfigurationError, LipschitzLR, LitLipschitzError, attach, bounds
from lit_lipschitz.measurement import nonfinite


def fit(callback, module=None, batch_size=16, **settings):
    """Trains a module, or what makes one from a fixed seed; returns it and the rates of every step."""
    torch.manual_seed(1)
    module = module if isinstance(module, L.LightningModule) else (module or Classifier)()
    steps = Steps()
    trainer(callback, steps, *settings.pop("more", []), **settings).fit(module, loader(batch_size), loader(batch_size))
    return module, steps.rates


def head_inputs(module, batch):
    with torch.no_grad():
        return module.net[:-1](batch)


def strict_rate(activations):
    """1 / (sqrt(2) times the root mean square norm of a row with a 1 for the bias), computed manually."""
    return 1 / (math.sqrt(2) * math.sqrt((activations.square().sum(dim=1) + 1).mean().item()))


def test_the_first_rate_comes_from_the_first_batch_and_moves_the_weights_by_it():
    torch.manual_seed(1)
    module = Classifier()
    batch, targets = (part[:16] for part in examples().tensors)
    expected = strict_rate(head_inputs(module, batch))
    before = [p.detach().clone() for p in module.parameters()]
    F.cross_entropy(module.net(batch), targets).backward()
    gradients = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()

    module, rates = fit(LipschitzLR(schedule="none"), module, max_steps=1)
    assert rates == [[pytest.approx(expected, rel=1e-6)]]
    for old, gradient, new in zip(before, gradients, module.parameters(), strict=True):
        torch.testing.assert_close(new, old - expected * gradient)


class Inputs(L.Callback):
    """Records the head's inputs of every training batch, apart from the callback's own hook."""

    def __init__(self):
        self.seen = []

    def on_fit_start(self, trainer, pl_module):
        def record(module, args):
            if pl_module.training:
                self.seen.append(args[0].detach().clone())

        pl_module.net[-1].register_forward_pre_hook(record)


def test_an_epochs_rate_comes_from_the_epoch_before():
    inputs = Inputs()
    _, rates = fit(LipschitzLR(schedule="none", rule="inverse", measure_every=1), more=[inputs], max_epochs=3)
    rates = [rate for (rate,) in rates]
    by_batch = [strict_rate(batch) for batch in inputs.seen]
    for epoch in (1, 2):
        expected = min(by_batch[6 * (epoch - 1) : 6 * epoch])
        assert rates[6 * epoch : 6 * (epoch + 1)] == pytest.approx([expected] * 6, rel=1e-5)
    # In the first epoch the maximum so far, looked at after 1, 2 and 4 steps.
    so_far = [min(by_batch[: i + 1]) for i in range(6)]
    expected = [so_far[0], so_far[1], so_far[1], so_far[3], so_far[3], so_far[3]]
    assert rates[:6] == pytest.approx(expected, rel=1e-5)


def test_every_n_steps():
    inputs = Inputs()
    _, rates = fit(LipschitzLR(schedule="none", update=4), more=[inputs], max_epochs=2)
    by_batch = [strict_rate(batch) for batch in inputs.seen]
    for start in (4, 8):
        expected = [min(by_batch[start - 4 : start])] * 4
        assert [rate for (rate,) in rates[start : start + 4]] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("bound", "norm"),
    [
        ("paper", "frobenius"),
        ("paper", "sample"),
        ("strict", "frobenius"),
        ("strict", "sample"),
        ("smooth", "spectral"),
        ("smooth", "frobenius"),
        ("smooth", "sample"),
    ],
)
def test_every_family_and_norm_against_numpy(bound, norm):
    inputs = Inputs()
    module = Classifier(lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01))
    weights = max(p.norm().item() for p in module.parameters())
    _, rates = fit(LipschitzLR(schedule="none", bound=bound, norm=norm), module, more=[inputs], max_steps=1)
    matrix = inputs.seen[0].double()
    if bound != "paper":
        matrix = torch.cat([matrix, torch.ones(16, 1)], dim=1)
    size = {
        "frobenius": matrix.norm(),
        "sample": matrix.norm(dim=1).max(),
        "spectral": torch.linalg.matrix_norm(matrix, 2),
    }[norm].item()
    constant = bounds.cross_entropy(size, num_classes=CLASSES, batch_size=16, bound=bound, norm=norm) + bounds.l2(
        0.01, weights, bound=bound
    )
    assert 1 / rates[0][0] == pytest.approx(constant, rel=1e-2 if norm == "spectral" else 1e-5)


def test_the_paper_family_with_momentum_follows_adamo():
    module = Classifier(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    inputs = Inputs()
    _, rates = fit(LipschitzLR(schedule="none", bound="paper"), module, more=[inputs], max_epochs=3)
    largest = [max(batch.norm().item() for batch in inputs.seen[6 * e : 6 * e + 6]) for e in range(2)]
    first, second = (2 / (3 * 16) * size for size in largest)
    assert rates[6][0] == pytest.approx(0.1 / first, rel=1e-5)
    average = (0.9 * 0.1 * first + 0.1 * second) / (1 - 0.9**2)
    assert rates[12][0] == pytest.approx(0.1 / average, rel=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"bound": "smooth"}, {"bound": "paper"}, {"bound": "paper", "measure": "pass"}]
)
def test_a_summed_loss_has_the_rate_of_the_mean_over_the_examples(settings):
    class Summed(Classifier):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1], reduction="sum")

    mean, summed = (
        fit(LipschitzLR(schedule="none", **settings), kind, max_steps=1)[1][0][0] for kind in (Classifier, Summed)
    )
    assert summed == pytest.approx(mean / 16, rel=1e-6)
    accumulated = fit(
        LipschitzLR(schedule="none", **settings), Summed, batch_size=4, max_steps=1, accumulate_grad_batches=4
    )[1][0][0]
    # The mean of four sums over 4 examples is 4 times the mean over the 16.
    assert accumulated <= mean / 4 * (1 + 1e-6)
    assert accumulated >= mean / 4 / 2


def test_rule_inverse_forces_one_over_l():
    forced, automatic = (
        fit(
            LipschitzLR(schedule="none", bound="paper", rule=rule),
            lambda: Classifier(lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9)),
            max_steps=1,
        )[1][0][0]
        for rule in ("inverse", "auto")
    )
    assert forced == pytest.approx(10 * automatic)


def test_groups_keep_their_ratios():
    def make(parameters):
        weights = list(parameters)
        return torch.optim.SGD([{"params": weights[:2], "lr": 0.5}, {"params": weights[2:], "lr": 0.05}], lr=1.0)

    _, rates = fit(LipschitzLR(schedule="none"), Classifier(make))
    assert all(second == pytest.approx(first / 10, rel=1e-12) for first, second in rates)


def test_a_scheduler_is_a_factor():
    class Scheduled(Classifier):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.3)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    torch.manual_seed(1)
    callback = LipschitzLR(schedule="none", initial_lr=2.0)
    module, rates = fit(callback, Scheduled(), max_epochs=1)
    assert [rate for (rate,) in rates] == pytest.approx([2 / (1 + t) for t in range(6)], rel=1e-12)
    assert module.optimizers().param_groups[0]["lr"] == pytest.approx(0.3 / 7)
    assert (callback.rate, callback.lr) == (2.0, pytest.approx(2 / 6))


@pytest.mark.parametrize(
    ("settings", "rate", "capped"),
    [({"max_lr": 0.01}, 0.01, 1.0), ({"min_lr": 5.0}, 5.0, 1.0), ({"initial_lr": 0.125, "max_lr": 9.0}, 0.125, 0.0)],
)
def test_a_cap_that_binds_is_in_the_rate_and_in_the_log(settings, rate, capped):
    run = trainer(LipschitzLR(schedule="none", **settings), steps := Steps(), max_epochs=1)
    run.fit(Classifier(), loader())
    assert steps.rates == [[rate]] * 6
    assert run.callback_metrics["lipschitz/capped"].item() == capped


def test_growth_is_capped_from_one_update_to_the_next():
    class Shrinking(Classifier):
        """Inputs of the head that are ten times smaller after every epoch."""

        def training_step(self, batch, batch_idx):
            features = self.net[:-1](batch[0]) * 10.0**-self.current_epoch
            return F.cross_entropy(self.net[-1](features), batch[1])

    def rates_of(**settings):
        return [
            rate
            for (rate,) in fit(LipschitzLR(schedule="none", bound="paper", **settings), Shrinking(), max_epochs=4)[1][
                6::6
            ]
        ]

    free, capped = rates_of(), rates_of(max_growth=2.0)
    assert free[2] > 5 * free[1]
    assert [b / a for a, b in itertools.pairwise(capped)] == pytest.approx([2.0, 2.0])


class Poisoned(Classifier):
    """One batch of not-a-number in every epoch, in the inputs but not in the loss's mean of the others."""

    def training_step(self, batch, batch_idx):
        inputs = batch[0].clone()
        if batch_idx == self.poisoned:
            inputs[0, 0] = math.nan
            with torch.no_grad():
                clean = batch[0]
            self.net[-1](self.net[:-1](inputs)).detach()
            return F.cross_entropy(self.net(clean), batch[1]) * 1.0
        return F.cross_entropy(self.net(inputs), batch[1])


@pytest.mark.parametrize("poisoned", [0, 3])
def test_non_finite_batches_are_left_out_and_reported_once(poisoned):
    module = Poisoned()
    module.poisoned = poisoned
    with pytest.warns(UserWarning, match="had non-finite activations") as caught:
        _, rates = fit(LipschitzLR(schedule="none"), module, max_epochs=3)
    assert all(math.isfinite(rate) and rate < 1 for (rate,) in rates)
    assert sum("non-finite" in str(warning.message) for warning in caught) == 1


def test_non_finite_batches_can_end_the_run():
    module = Poisoned()
    module.poisoned = 3
    with pytest.raises(LitLipschitzError, match="non-finite"):
        fit(LipschitzLR(schedule="none", on_nonfinite="raise"), module)


def test_a_dead_head_makes_no_step():
    class Dead(Classifier):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net[-1](self.net[:-1](batch[0]) * 0), batch[1])

    with pytest.warns(UserWarning, match="the norm of the head's inputs is 0, .*; the rate is 0 until a step"):
        _, rates = fit(LipschitzLR(schedule="none", bound="paper"), Dead(), max_epochs=1)
    assert rates == [[0.0]] * 6


class Order(Classifier):
    """Modules whose order of definition is not that of execution, with an affine map after the head's own."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(16, CLASSES)
        self.auxiliary = nn.Linear(CLASSES, 2)
        self.body = nn.Linear(WIDTH, 16)

    def training_step(self, batch, batch_idx):
        logits = self.classifier(self.body(batch[0]).relu())
        self.auxiliary(logits)
        return F.cross_entropy(logits, batch[1])


def test_the_head_is_what_the_loss_is_made_from():
    callback = LipschitzLR(schedule="none")
    fit(callback, Order(), max_steps=1)
    assert callback.head_name == "classifier"


def test_the_head_can_be_named():
    callback = LipschitzLR(schedule="none", head="classifier", loss="cross_entropy")
    fit(callback, Order(), max_steps=1)
    assert callback.head_name == "classifier"


def test_a_named_layer_that_does_not_compute_the_outputs_is_refused():
    with pytest.raises(ConfigurationError, match="found 'classifier'; pass that name, or leave head= out"):
        fit(LipschitzLR(schedule="none", head="body", loss="cross_entropy"), Order(), max_steps=1)


def test_only_the_heads_hook_stays_during_training_and_none_after_it():
    module = Order()

    class Count(L.Callback):
        def on_train_batch_end(self, *_):
            self.during = sum(len(part._forward_pre_hooks) for part in module.modules())

    fit(LipschitzLR(schedule="none"), module, more=[count := Count()], max_steps=1)
    assert count.during == 1
    assert sum(len(part._forward_pre_hooks) for part in module.modules()) == 0


def test_validation_and_forwards_without_gradients_are_not_measured():
    class Peeking(Classifier):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                self.net(batch[0] * 1e6)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self.net(batch[0] * 1e6)

    plain, peeking = (
        fit(LipschitzLR(schedule="none"), kind, num_sanity_val_steps=1)[1] for kind in (Classifier, Peeking)
    )
    assert peeking == plain


def test_the_same_global_batch_gives_the_same_rate_when_accumulated(figure):
    """Four micro-batches of 4 for one of 16; the first step's rate, before the weights differ."""
    for settings in ({"norm": "sample"}, {"norm": "frobenius"}, {"bound": "smooth"}, {"bound": "paper"}):
        whole = fit(LipschitzLR(schedule="none", update=1, **settings), batch_size=16, max_steps=1)[1][0][0]
        parts = fit(
            LipschitzLR(schedule="none", update=1, **settings), batch_size=4, max_steps=1, accumulate_grad_batches=4
        )[1][0][0]
        tightness = whole / parts
        figure(f"{' '.join(settings.values())}: rate of 1 x 16 over 4 x 4 accumulated: {tightness:.4f}")
        if settings.get("norm") == "sample":
            assert parts == pytest.approx(whole, rel=1e-6)
        else:
            assert 1 - 1e-6 <= tightness <= 2.0


def test_manual_optimization_with_one_optimizer():
    class Manual(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    assert fit(LipschitzLR(schedule="none", optimizers=0), Manual)[1] == fit(LipschitzLR(schedule="none"))[1]


class Unfreezing(BaseFinetuning):
    """The body of the network joins the optimizer after the first epoch, at a tenth of the head's rate."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)


@pytest.mark.parametrize("lr", [1e-3, 0.1])
def test_a_group_that_joins_later_keeps_its_ratio(lr):
    module = Classifier(lambda p: torch.optim.SGD([q for q in p if q.requires_grad], lr=lr))
    _, rates = fit(LipschitzLR(schedule="none"), module, more=[Unfreezing()], max_epochs=3)
    assert [len(groups) for groups in rates] == [1] * 6 + [2] * 12
    assert all(body == pytest.approx(head / 10) for head, body in rates[6:])


class Failing(Classifier):
    """Breaks in the third batch of its first run, and keeps its optimizer for the next."""

    def __init__(self):
        super().__init__()
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1000)
        self.fails = True

    def configure_optimizers(self):
        return [self.optimizer], [self.scheduler]

    def training_step(self, batch, batch_idx):
        if self.fails and batch_idx == 2:
            raise KeyError("broken")
        return super().training_step(batch, batch_idx)


def test_a_run_that_failed_leaves_no_hook_behind():
    module = Failing()
    with pytest.raises(KeyError):
        fit(LipschitzLR(schedule="none"), module)
    assert not any(part._forward_pre_hooks for part in module.modules())
    module.fails = False
    after = fit(LipschitzLR(schedule="none", initial_lr=0.5), module, max_epochs=1)[1]
    assert after == [[0.5]] * 6


def test_forwards_outside_the_training_batches_and_of_copies_are_not_measured():
    class Peeking(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.net(torch.full((16, WIDTH), 1e6))
            copy.deepcopy(pl_module.net)(torch.full((16, WIDTH), 1e6))

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            copy.deepcopy(pl_module.net)(torch.full((16, WIDTH), 1e6))

    assert fit(LipschitzLR(schedule="none"), more=[Peeking()])[1] == fit(LipschitzLR(schedule="none"))[1]


class Skipping(Classifier):
    """Gives up every epoch at its fourth batch."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 3 else None


def test_an_epoch_that_is_given_up_ends_its_interval_with_the_next_step():
    callback, whole = LipschitzLR(schedule="none", bound="paper"), LipschitzLR(schedule="none", bound="paper")
    _, rates = fit(callback, Skipping, max_epochs=4)
    assert len(rates) == 12
    assert callback.controllers[0].state_dict()["intervals"] == 3
    assert rates[:3] == fit(whole, max_epochs=1)[1][:3]
    assert rates[3] == rates[2]  # m is not doubled by the batch that was skipped


@pytest.mark.parametrize("skipped", [0, 2])
def test_a_batch_without_a_loss_is_passed_over(skipped):
    class Skips(Classifier):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == skipped else super().training_step(batch, batch_idx)

    callback = LipschitzLR(schedule="none")
    fit(callback, Skips, max_epochs=2)
    assert callback.rate is not None
    assert callback.controllers[0].state_dict()["intervals"] == 2


def test_bfloat16_training_measures_in_float32():
    inputs = Inputs()
    _, rates = fit(LipschitzLR(schedule="none"), more=[inputs], max_steps=1, precision="bf16-mixed")
    assert inputs.seen[0].dtype == torch.bfloat16
    assert rates[0][0] == pytest.approx(strict_rate(inputs.seen[0].float()), rel=1e-6)


class Reads:
    """Counts reads of tensors to the host from inside the library."""

    def __init__(self, monkeypatch):
        self.count = 0
        for name in ("item", "tolist", "__float__", "__int__", "__bool__", "cpu", "numpy"):
            monkeypatch.setattr(torch.Tensor, name, self._counting(getattr(torch.Tensor, name)))

    def _counting(self, method):
        def counted(tensor, *args, **kwargs):
            frame = sys._getframe(1)
            if frame.f_code.co_name == "product_of":  # of numbers of the host, as the loss's factors are
                return method(tensor, *args, **kwargs)
            while frame is not None:
                if "lit_lipschitz" in frame.f_code.co_filename and "test_" not in frame.f_code.co_filename:
                    self.count += 1
                    break
                frame = frame.f_back
            return method(tensor, *args, **kwargs)

        return counted


@pytest.mark.parametrize("rule", ["inverse", "auto"])
def test_nothing_is_read_to_the_host_between_updates(rule, monkeypatch):
    monkeypatch.setattr(nonfinite, "is_on_host", lambda _: False)
    reads = Reads(monkeypatch)
    per_step = []

    class Count(L.Callback):
        def on_train_batch_start(self, *_):
            self.before = reads.count

        def on_train_batch_end(self, *_):
            per_step.append(reads.count - self.before)

    run = trainer(LipschitzLR(schedule="none", rule=rule), Count(), max_epochs=3)
    run.fit(Classifier(), loader())
    measured = due_steps(18, 6) if rule == "auto" else [1, 2, 3, 4, 5]
    assert [step for step, count in enumerate(per_step, start=1) if count] == sorted({6, 12, 18, *measured})


def test_steps_that_are_not_due_measure_nothing():
    callback, counts = LipschitzLR(schedule="none"), []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            estimator = callback.controllers[0].updater.estimator
            counts.append(estimator.scale.value)

    trainer(callback, Watch(), max_epochs=1).fit(Adaptive(), loader(1))
    changed = [step for step in range(2, len(counts) + 1) if counts[step - 1] != counts[step - 2]]
    assert changed == [2, 3, 4, 5, 7, 9, 12, 15, 19, 24, 30, 38, 48, 60, 75, 94][: len(changed)]
    assert len(changed) > 12


@pytest.mark.parametrize("every", [1, 5])
def test_the_steps_between_measurements_are_an_argument(every):
    callback, seen = LipschitzLR(schedule="none", measure_every=every), []

    class Watch(L.Callback):
        def on_train_batch_start(self, *_):
            seen.append(callback.controllers[0].due)

    trainer(callback, Watch(), max_epochs=1).fit(Classifier(), loader(4))
    due = {1: range(1, 100), 5: [1, 2, 3, 4, 5, 7, 9, 12, 15, 19, *range(24, 100, 5)]}[every]
    assert [step for step, is_due in enumerate(seen, start=1) if is_due] == [step for step in due if step <= len(seen)]


@pytest.mark.parametrize(
    ("settings", "updated"),
    [
        ({}, due_steps(100, 1000)),
        ({"rule": "inverse"}, due_steps(100, 1000)),
        ({"rule": "inverse", "measure_every": 31}, due_steps(100, 1000, 31)),
        ({"rule": "inverse", "measure_every": 1}, [1, 2, 4, 8, 16, 32, 64]),
        ({"bound": "paper"}, [1, 2, 4, 8, 16, 32, 64]),
    ],
)
def test_the_constant_follows_inputs_that_grow_in_the_first_interval(settings, updated):
    torch.manual_seed(0)
    net = nn.Linear(WIDTH, CLASSES)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    control = attach(net, optimizer, schedule="none", notify=lambda message: None, **settings)
    inputs, targets = torch.randn(8, WIDTH), torch.arange(8) % CLASSES
    seen, changed = None, []
    for step in range(1, 101):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs * step), targets).backward()
        optimizer.step()
        if control.metrics()["lipschitz/constant"] != seen:
            changed.append(step)
        seen = control.metrics()["lipschitz/constant"]
    assert changed == updated


def test_a_smaller_measure_every_holds_from_the_first_step_of_a_resumed_run():
    net = nn.Linear(WIDTH, CLASSES)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    control = attach(net, optimizer, schedule="none")
    inputs, targets = torch.randn(8, WIDTH), torch.arange(8) % CLASSES

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), targets).backward()
        optimizer.step()

    for _ in range(300):
        step()
    state = control.state_dict()
    control.detach()
    control = attach(net, optimizer, schedule="none", measure_every=7)
    control.load_state_dict(state)
    due = []
    for number in range(301, 330):
        if control.controller.updater.steps.due:
            due.append(number)
        step()
    assert due == [307, 314, 321, 328]


@pytest.mark.parametrize("value", [0, -3, 1.5, "each", True])
def test_a_wrong_number_of_steps_between_measurements_is_refused(value):
    with pytest.raises(ConfigurationError, match=r"measure_every=.*: expected 'auto' or a number of steps >= 1"):
        LipschitzLR(measure_every=value)


BY_PASS = {"bound": "paper", "measure": "pass", "rule": "adamo_authors", "initial_lr": 0.5}


class Scheduled(Classifier):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97), "interval": "step"}]


class Adaptive(Classifier):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.3)


class Measured(Classifier):
    def configure_optimizers(self):
        return Lion(self.parameters(), weight_decay=0.1)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *itertools.product(
            [Classifier, Scheduled], [{"bound": "strict"}, {"bound": "smooth"}, {"bound": "paper"}, BY_PASS]
        ),
        *itertools.product([Adaptive], [{"bound": "strict"}, {"bound": "paper"}]),
        *itertools.product([Measured], [{"bound": "strict"}, {"bound": "smooth"}]),
    ],
)
@pytest.mark.parametrize("stop", ["epoch's end", "mid-epoch"])
def test_a_resumed_run_is_the_run_that_was_not_stopped_bit_for_bit(kind, settings, stop):
    class Resumable:
        """Batches in order, and a place to go on from."""

        def __init__(self):
            self.position = 0

        def __len__(self):
            return 6

        def __iter__(self):
            inputs, targets = examples().tensors
            start, self.position = self.position, 0
            for i in range(start, 6):
                self.at = i + 1
                yield inputs[16 * i : 16 * i + 16], targets[16 * i : 16 * i + 16]

        def state_dict(self):
            return {"position": self.at % 6}

        def load_state_dict(self, state):
            self.position = state["position"]

    def run(max_steps, **rest):
        torch.manual_seed(1)
        module = kind()
        module.lipschitz_dataloader = loader
        save = ModelCheckpoint(".", filename=f"at{max_steps}", every_n_train_steps=max_steps, save_top_k=-1)
        callbacks = (LipschitzLR(schedule="none", **settings), steps := Steps(), save)
        run = trainer(*callbacks, enable_checkpointing=True, max_epochs=-1, max_steps=max_steps)
        run.fit(module, Resumable(), weights_only=True, **rest)
        return [p.detach().clone() for p in module.parameters()], steps.rates

    stopped = 12 if stop == "epoch's end" else 9
    expected, all_rates = run(21)
    run(stopped)
    weights, rates = run(21, ckpt_path=f"at{stopped}.ckpt")
    assert rates == all_rates[stopped:]
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def test_a_checkpoint_of_a_run_without_the_callback_loads_and_the_other_way_round():
    for before, after in ((None, LipschitzLR(schedule="none")), (LipschitzLR(schedule="none"), None)):
        run = trainer(*filter(None, [before]), max_epochs=1)
        run.fit(Classifier(), loader())
        run.save_checkpoint("some.ckpt")
        resumed = trainer(*filter(None, [after]), steps := Steps(), max_epochs=2)
        resumed.fit(Classifier(), loader(), ckpt_path="some.ckpt", weights_only=True)
        assert len(steps.rates) == 6


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({"bound": "smooth"}, {}, "saved with bound='smooth', and this run has bound='strict'"),
        ({"norm": "sample"}, {}, "saved with norm='sample'"),
        ({"rule": "inverse"}, {}, "saved with rule='inverse'"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(before, after, message):
    run = trainer(LipschitzLR(schedule="none", update=4, **before), max_epochs=1)
    run.fit(Classifier(), loader())
    run.save_checkpoint("some.ckpt")
    with pytest.raises(LitLipschitzError, match=message):
        trainer(LipschitzLR(schedule="none", update=4, **after), max_epochs=2).fit(
            Classifier(), loader(), ckpt_path="some.ckpt"
        )


def test_a_checkpoint_of_another_head_is_refused():
    run = trainer(LipschitzLR(schedule="none"), max_epochs=1)
    run.fit(Classifier(), loader())
    run.save_checkpoint("some.ckpt")
    saved = torch.load("some.ckpt", weights_only=False)
    saved["callbacks"]["LipschitzLR"]["optimizers"][0]["head"]["head"] = "net.0"
    torch.save(saved, "other.ckpt")
    with pytest.raises(LitLipschitzError, match="with the head 'net.0', and the head of this run is 'net.2'"):
        trainer(LipschitzLR(schedule="none"), max_epochs=2).fit(Classifier(), loader(), ckpt_path="other.ckpt")


def test_a_stored_rate_can_be_ignored():
    run = trainer(LipschitzLR(schedule="none", bound="smooth"), max_epochs=1)
    run.fit(module := Classifier(), loader())
    run.save_checkpoint("some.ckpt")
    expected = strict_rate(head_inputs(module, examples().tensors[0][:16]))
    steps = Steps()
    trainer(LipschitzLR(schedule="none", restore=False), steps, max_epochs=2).fit(
        Classifier(), loader(), ckpt_path="some.ckpt"
    )
    assert steps.rates[0] == [pytest.approx(expected, rel=1e-6)]
    assert len(steps.rates) == 6


def test_every_logger_and_the_progress_bar_get_the_values():
    logger = CSVLogger(".")
    callbacks = (LipschitzLR(schedule="none"), LearningRateMonitor("step"), steps := Steps(), ProgressBar())
    run = trainer(*callbacks, logger=logger, log_every_n_steps=4, max_epochs=2, enable_progress_bar=True)
    run.fit(Classifier(), loader())
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    by_step = {int(row["step"]): row for row in rows if "lipschitz/lr" in row}
    assert set(by_step) == {3, 5, 7, 11}  # every fourth step, and the last of each epoch
    for step, row in by_step.items():
        assert row["lipschitz/lr"] == pytest.approx(steps.rates[step][0])
        assert row["lipschitz/lr"] == pytest.approx(1 / row["lipschitz/constant"], rel=1e-6)
        assert row["lipschitz/activation_norm"] > 0
        assert row["lipschitz/weight_norm"] > 0
    assert run.progress_bar_metrics["lipschitz/lr"] == run.callback_metrics["lipschitz/lr"].item() == steps.rates[11][0]


def test_a_second_fit_starts_afresh():
    callback = LipschitzLR(schedule="none")
    first = fit(callback)[1]
    assert fit(callback)[1] == first


def test_a_compiled_network_is_measured_like_an_eager_one():
    compiled = Classifier()
    compiled.load_state_dict((eager := Classifier()).state_dict())
    compiled.net = torch.compile(compiled.net, backend="aot_eager", fullgraph=True)
    assert fit(LipschitzLR(schedule="none"), compiled)[1] == fit(LipschitzLR(schedule="none"), eager)[1]


def test_double_precision():
    double, single = (fit(LipschitzLR(schedule="none"), precision=precision)[1] for precision in ("64-true", "32-true"))
    assert [rate for (rate,) in double] == pytest.approx([rate for (rate,) in single], rel=1e-5)


def test_a_head_with_one_output_is_refused_in_so_many_words():
    class OneOutput(Classifier):
        def __init__(self):
            super().__init__(net=nn.Linear(WIDTH, 1))

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), 0 * batch[1])

        def validation_step(self, batch, batch_idx):
            pass

    with pytest.raises(ConfigurationError, match="the head 'net' has 1 output, .* needs at least 2 classes"):
        fit(LipschitzLR(schedule="none", loss="cross_entropy", norm="sample"), OneOutput)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"loss": "hinge"}, "loss='hinge'"),
        ({"rule": "lbfgs"}, "rule='lbfgs'"),
        ({"second_moment": "mean"}, "second_moment='mean'"),
        ({"second_moment": "text"}, "second_moment='text'"),
        ({"second_moment": "scripts"}, "for bound='paper' and norm='frobenius'; found 'strict'"),
        ({"rule": "adam_authors"}, "for bound='paper' and norm='frobenius'; found 'strict'"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"weights": "biases"}, "weights='biases'"),
        ({"measure": "peek"}, "measure='peek'"),
        ({"measure": "pass", "update": 5}, "measure='pass', update=5"),
        ({"bound": "loose"}, "bound='loose'"),
        ({"norm": "spectral"}, "norm='spectral'"),
        ({"update": 0}, "update=0"),
        ({"update": "step"}, "update='step'"),
        ({"initial_lr": 0.0}, "initial_lr=0.0"),
        ({"initial_lr": 2.0, "max_lr": 1.0}, r"initial_lr=2\.0"),
        ({"min_lr": 2.0, "max_lr": 1.0}, r"min_lr=2\.0"),
        ({"max_growth": 0.5}, "max_growth=0.5"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite='ignore'"),
    ],
)
def test_an_argument_out_of_its_range_is_named(settings, named):
    with pytest.raises(ConfigurationError, match=named):
        LipschitzLR(schedule="none", **settings)


class Weighted(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(0.5 * super().training_step(batch, batch_idx))
        self.optimizers().step()


class NoAffine(Classifier):
    def __init__(self):
        super().__init__(net=nn.Conv1d(WIDTH, CLASSES, 3))


class Unused(Classifier):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(2, 2)


class TwoOptimizers(Classifier):
    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(2)]


class OwnBackward(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx).backward()
        self.optimizers().step()


class Ignoring(Classifier):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1], ignore_index=0)


class Tempered(Classifier):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]) / 0.05, batch[1])


class Tied(Classifier):
    """The logits come from a weight that no affine module owns, and an affine module runs beside it."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, 16)

    def training_step(self, batch, batch_idx):
        self.net(batch[0])
        return F.cross_entropy(F.linear(self.net[:-1](batch[0]), self.embedding.weight), batch[1])


def two_momenta(parameters):
    groups = [{"params": [p], "momentum": 0.9 if i else 0.0} for i, p in enumerate(parameters)]
    return torch.optim.SGD(groups, lr=0.1)


@pytest.mark.parametrize(
    ("module", "callbacks", "message"),
    [
        (
            Weighted,
            [LipschitzLR(schedule="none", optimizers=0, norm="sample")],
            "weighted by 0.5 under manual optimization",
        ),
        (OwnBackward, [LipschitzLR(schedule="none")], "returned 1 under manual optimization: pass optimizers="),
        (
            OwnBackward,
            [LipschitzLR(schedule="none", optimizers=1)],
            "positions from 0 to 0, since .* returned 1",
        ),
        (NoAffine, [LipschitzLR(schedule="none", norm="sample")], "found none among"),
        (Unused, [LipschitzLR(schedule="none", head="spare")], "found 'net.2'; pass that name"),
        (Classifier, [LipschitzLR(schedule="none", head="ne.2")], "no module of that name; pass one of 'net.2'"),
        (Classifier, [LipschitzLR(schedule="none"), LipschitzLR(schedule="none")], "found 2"),
        (TwoOptimizers, [LipschitzLR(schedule="none")], "returned 2"),
        (OwnBackward, [LipschitzLR(schedule="none", optimizers=0)], "call self.manual_backward"),
        (Ignoring, [LipschitzLR(schedule="none", bound="paper", measure="pass")], "ignores . of 16 targets"),
        (Tempered, [LipschitzLR(schedule="none", norm="sample")], "found LogSoftmax > Div > Addmm"),
        (
            Tied,
            [LipschitzLR(schedule="none", norm="sample")],
            r"computed with the parameter 'embedding.weight' of shape \(3, 16\)",
        ),
        (
            lambda: Classifier(torch.optim.Adam),
            [LipschitzLR(schedule="none", rule="adamo")],
            "the setting 'momentum', found Adam",
        ),
        (
            lambda: Classifier(lambda p: torch.optim.SGD(p, momentum=0.9, dampening=1.0)),
            [LipschitzLR(schedule="none", bound="paper")],
            "dampening=1.0",
        ),
        (lambda: Classifier(two_momenta), [LipschitzLR(schedule="none", bound="paper")], "needs the same momentum"),
        (
            lambda: Classifier(net=nn.Sequential(nn.LazyLinear(CLASSES))),
            [LipschitzLR(schedule="none", bound="smooth")],
            "a lazy layer does not know it yet",
        ),
    ],
)
def test_what_can_not_be_found_out_is_asked_for(module, callbacks, message):
    if len(callbacks) == 2:
        callbacks[1].__class__ = type("Another", (LipschitzLR,), {})
    module = module()
    if isinstance(module, TwoOptimizers):
        module.automatic_optimization = False
    with pytest.raises(ConfigurationError, match=message):
        fit(callbacks[0], module, more=callbacks[1:])


@pytest.mark.parametrize("head_first", [False, True])
def test_a_head_that_steps_by_more_than_the_rate_is_told_of(head_first):
    net = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    groups = [{"params": net[0].parameters(), "lr": 1e-5}, {"params": net[2].parameters(), "lr": 1e-3}]
    module = Classifier(lambda _: torch.optim.SGD(groups[::-1] if head_first else groups, momentum=0.9), net)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer(LipschitzLR(), max_epochs=1).fit(module, loader(16))
    found = [str(one.message) for one in told if "make its group the first" in str(one.message)]
    if head_first:
        assert not found
    else:
        (message,) = found
        assert "'net.2' gets 100 times the computed learning rate" in message
        assert "in parameter group 1" in message


@pytest.mark.parametrize("settings", [{}, {"norm": "sample"}], ids=str)
@pytest.mark.parametrize(
    ("of_loss", "message"),
    [
        (torch.Tensor.detach, "found a tensor without a graph; return a loss from training_step that depends on"),
        (lambda loss: torch.tensor(1.0), "found a tensor without a graph; return a loss from training_step that"),
        (
            lambda loss: torch.tensor(1.0, requires_grad=True),
            "found a tensor that was not computed from anything; return a ",
        ),
    ],
)
def test_a_loss_that_does_not_depend_on_the_network_is_refused_with_what_was_found(settings, of_loss, message):
    class Constant(Classifier):
        def training_step(self, batch, batch_idx):
            return of_loss(super().training_step(batch, batch_idx))

    with pytest.raises(ConfigurationError, match=message):
        trainer(LipschitzLR(**settings)).fit(Constant(), loader())


@pytest.mark.parametrize(
    ("bound", "zero"),
    [
        ("strict", lambda outputs, targets: 0 * nn.functional.cross_entropy(outputs, targets)),
        ("strict", lambda outputs, targets: 0 * nn.functional.softplus(outputs).mean()),
        ("paper", lambda outputs, targets: 0 * nn.functional.cross_entropy(outputs, targets)),
    ],
)
def test_a_loss_times_0_moves_nothing_and_the_warning_is_about_its_gradients(bound, zero):
    class Nothing(Classifier):
        def training_step(self, batch, batch_idx):
            return zero(self(batch[0]), batch[1])

    module, callback = Nothing(), LipschitzLR(bound=bound)
    before = [p.detach().clone() for p in module.parameters()]
    expected = "no constant can be computed: all gradients of the loss are 0; the rate is 0 until a step"
    with pytest.warns(UserWarning, match=expected):
        trainer(callback, max_epochs=2).fit(module, loader())
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))


def test_a_head_without_inputs_is_told_by_their_norm():
    class Still(Classifier):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net[2](0 * self.net[:2](batch[0])) + self.bias, batch[1])

    module = Still(net=nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, CLASSES, bias=False)))
    module.bias = nn.Parameter(torch.zeros(CLASSES))
    with pytest.warns(UserWarning, match="the norm of the head's inputs is 0, that"):
        trainer(LipschitzLR(), max_epochs=1).fit(module, loader())


def test_a_parameter_as_the_loss_is_measured():
    class Bare(Classifier):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(2.0))

        def training_step(self, batch, batch_idx):
            return self.weight

    run, module = trainer(LipschitzLR(), max_epochs=1), Bare()
    run.fit(module, loader())
    assert run.callback_metrics["lipschitz/measured"] == 1
    assert module.weight < 2
