"""Steps of any kind have the computed rate: it is decided once the gradients are final, by the batches that are in."""

import contextlib
import logging
import math
import warnings
from dataclasses import replace

import lightning as L
import pytest
import torch
from helpers import CLASSES, EXAMPLES, OPTIMIZERS, WIDTH, Classifier, Steps, loader, trainer
from lightning.pytorch.plugins import MixedPrecision
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lit_lipschitz import ConfigurationError, LipschitzLR


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.1)


def fit(module, callback=None, *more, batch_size=16, data=None, **settings):
    """The rates that the steps used, and the callback."""
    callback = callback or LipschitzLR(schedule="none")
    run = trainer(callback, steps := Steps(), *more, **settings)
    run.fit(module, data or loader(batch_size))
    return [rates[0] for rates in steps.rates], callback


def seeded(make, *arguments, **attributes):
    torch.manual_seed(1)
    module = make(*arguments)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


# Clipping


class ClipsItself(Classifier):
    """Clips by the hook of Lightning that does it, or by another one before it."""

    hook = "configure_gradient_clipping"

    def clip(self, hook):
        if self.hook == hook:
            torch.nn.utils.clip_grad_norm_(self.parameters(), 1e-3)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip("configure_gradient_clipping")

    def on_before_optimizer_step(self, optimizer):
        self.clip("on_before_optimizer_step")

    def on_after_backward(self):
        self.clip("on_after_backward")


CLIPPING = {
    "norm": (Classifier, {"gradient_clip_val": 1e-3}),
    "value": (Classifier, {"gradient_clip_val": 1e-4, "gradient_clip_algorithm": "value"}),
    "now and then": (Classifier, {"gradient_clip_val": 0.3}),
    "accumulated": (Classifier, {"gradient_clip_val": 1e-3, "accumulate_grad_batches": 2}),
    "a hook": (ClipsItself, {}),
    "another hook": (lambda make: seeded(ClipsItself, make, hook="on_before_optimizer_step"), {}),
    "the backward's hook": (lambda make: seeded(ClipsItself, make, hook="on_after_backward"), {}),
}


@pytest.mark.parametrize("bound", ["strict", "smooth"])
@pytest.mark.parametrize("how", CLIPPING)
def test_clipping_leaves_the_rate_of_adam_as_it_is(how, bound):
    """Adam's update does not know the length of its gradients; the first step tells it exactly, all but eps."""
    make, settings = CLIPPING[how]
    plain = {name: value for name, value in settings.items() if name == "accumulate_grad_batches"}
    expected, _ = fit(seeded(Classifier, adamw), LipschitzLR(schedule="none", bound=bound), max_epochs=3, **plain)
    rates, _ = fit(seeded(make, adamw), LipschitzLR(schedule="none", bound=bound), max_epochs=3, **settings)
    assert rates[0] == pytest.approx(expected[0], rel=1e-2)
    # Clipping by value changes the weights' gradients by different factors.
    tolerance = 0.12 if how == "value" else 0.1
    assert rates[: len(rates) // 2] == pytest.approx(expected[: len(rates) // 2], rel=tolerance)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clipping_that_clips_nothing_changes_nothing(name):
    expected, _ = fit(seeded(Classifier, OPTIMIZERS[name]))
    rates, _ = fit(seeded(Classifier, OPTIMIZERS[name]), gradient_clip_val=1e6)
    assert rates == expected


def test_the_rate_is_decided_once_the_gradients_are_clipped():
    """At the moment of the decision the gradient is as long as the optimizer will see it."""
    norms = []

    class Looks(LipschitzLR):
        def before_step(self, position):
            norms.append(torch.cat([p.grad.flatten() for p in module.parameters()]).norm().item())
            super().before_step(position)

    module = seeded(Classifier, adamw)
    fit(module, Looks(), gradient_clip_val=1e-3)
    assert norms == pytest.approx([1e-3] * 12, rel=1e-3)


def test_scaled_gradients_give_the_rates_of_those_in_single_precision():
    expected, _ = fit(seeded(Classifier, adamw))
    for clipping in (None, 1e-3):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        rates, _ = fit(seeded(Classifier, adamw), plugins=plugin, gradient_clip_val=clipping)
        assert rates == pytest.approx(expected, rel=0.1)


# Steps that are made manually


class Sharpness(torch.optim.Optimizer):
    """Sharpness-aware minimization: an optimizer around another one, with two steps or a closure."""

    def __init__(self, parameters, inner, radius=0.0):
        super().__init__(parameters, {})
        self.inner, self.radius = inner(self.param_groups), radius
        self.param_groups = self.inner.param_groups

    @torch.no_grad()
    def first_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["moved"] = self.radius * p.grad
                p.add_(self.state[p]["moved"])
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self.state[p]["moved"])
        self.inner.step()
        self.zero_grad()

    def step(self, closure=None):
        if closure is None:
            return self.inner.step()
        loss = closure()
        self.first_step()
        closure()
        self.second_step()
        return loss


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def sharpness(parameters):
    return Sharpness(parameters, momentum)


class Manual(Classifier):
    """Manual optimization by a function of the module, its optimizer and a function that makes the loss."""

    def __init__(self, step, make=momentum):
        super().__init__(make)
        self.automatic_optimization, self.step = False, step

    def training_step(self, batch, batch_idx):
        self.step(self, self.optimizers(), lambda: F.cross_entropy(self.net(batch[0]), batch[1]))


def two_steps(module, optimizer, loss):
    for move in (optimizer.first_step, optimizer.second_step):
        module.manual_backward(loss())
        move()


def by_closure(step):
    def make(module, optimizer, loss):
        def closure():
            optimizer.zero_grad()
            value = loss()
            module.manual_backward(value)
            return value

        step(module, optimizer, closure)

    return make


def after_backward(step):
    def make(module, optimizer, loss):
        optimizer.zero_grad()
        module.manual_backward(loss())
        step(module, optimizer)

    return make


MANUAL = {
    "Lightning's step": (after_backward(lambda module, optimizer: optimizer.step()), momentum),
    "the step inside": (after_backward(lambda module, optimizer: optimizer.optimizer.step()), momentum),
    "the trainer's": (after_backward(lambda module, _: module.trainer.optimizers[0].step()), momentum),
    "without Lightning": (
        after_backward(lambda module, _: module.optimizers(use_pl_optimizer=False).step()),
        momentum,
    ),
    "a closure": (by_closure(lambda module, optimizer, closure: optimizer.step(closure)), momentum),
    "a closure inside": (by_closure(lambda module, optimizer, closure: optimizer.optimizer.step(closure)), momentum),
    "a named closure": (
        by_closure(lambda module, optimizer, closure: optimizer.optimizer.step(closure=closure)),
        momentum,
    ),
    "two steps": (two_steps, sharpness),
    "a wrapper's inner step": (after_backward(lambda module, optimizer: optimizer.inner.step()), sharpness),
    "a wrapper's closure": (by_closure(lambda module, optimizer, closure: optimizer.step(closure)), sharpness),
}


@pytest.mark.parametrize("how", MANUAL)
def test_a_manual_step_has_the_rate_of_an_automatic_one(how):
    expected, _ = fit(seeded(Classifier, momentum), LipschitzLR(schedule="none", rule="inverse"))
    step, make = MANUAL[how]
    rates = []
    inner = lambda parameters: make(parameters)  # noqa: E731
    module = seeded(Manual, step, inner)

    class Look(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            optimizer = getattr(trainer.optimizers[0], "inner", trainer.optimizers[0])
            handle = optimizer.register_step_post_hook(lambda one, *_: rates.append(one.param_groups[0]["lr"]))
            optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)

    _, callback = fit(module, LipschitzLR(schedule="none", rule="inverse", optimizers=0), Look())
    assert rates == pytest.approx(expected, rel=1e-6)
    assert callback.rate == rates[-1]


class SharpnessOfLightning(Classifier):
    """The same in automatic optimization, whose closure runs the training step, twice a step."""

    def configure_optimizers(self):
        return sharpness(self.parameters())


def test_a_closure_that_is_called_twice_decides_once():
    expected, _ = fit(seeded(Classifier, momentum), LipschitzLR(schedule="none", rule="inverse"))
    decided = []

    class Counts(LipschitzLR):
        def before_step(self, position):
            decided.append(position)
            super().before_step(position)

    rates, _ = fit(seeded(SharpnessOfLightning), Counts(schedule="none", rule="inverse"))
    assert rates == pytest.approx(expected, rel=1e-6)
    assert decided == [0] * 12


def test_an_optimizer_that_reads_its_rate_before_the_closure_has_it_in_the_first_step():
    """LBFGS: with one iteration and without a line search the first step is min(1, 1 / |g|_1) x rate x gradient."""
    module = seeded(Classifier, lambda parameters: torch.optim.LBFGS(parameters, lr=0.1, max_iter=1))
    before = [p.detach().clone() for p in module.parameters()]
    _, callback = fit(module, LipschitzLR(schedule="none", rule="inverse"), max_steps=1)
    moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(module.parameters(), before, strict=True)])
    gradient = torch.cat([p.grad.flatten() for p in module.parameters()])
    expected = min(1.0, 1 / gradient.abs().sum().item()) * callback.rate * gradient.norm().item()
    assert moved.norm().item() == pytest.approx(expected, rel=1e-4)


def test_weights_that_move_without_a_step_are_told_of():
    @torch.no_grad()
    def moves(module, optimizer, loss):
        with torch.enable_grad():
            module.manual_backward(loss())
        for p in module.parameters():
            p.sub_(0.1 * p.grad)

    with pytest.raises(ConfigurationError, match="found that the weights changed without this call"):
        fit(Manual(moves), LipschitzLR(optimizers=0))


def test_a_batch_that_accumulates_is_no_step():
    def accumulates(module, optimizer, loss):
        module.manual_backward(loss())
        module.batches = getattr(module, "batches", 0) + 1
        if module.batches % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()

    rates, callback = fit(seeded(Manual, accumulates), LipschitzLR(optimizers=0, schedule="none"), batch_size=8)
    assert len(rates) == 12
    assert counted(callback) == 2


@pytest.mark.parametrize("loss", ["auto", "measured"])
@pytest.mark.parametrize("how", ["the module's method", "torch's function"])
def test_a_step_that_is_clipped_manually_has_the_rate_of_one_that_is_not(how, loss):
    def clipped(module, optimizer, loss):
        optimizer.zero_grad()
        module.manual_backward(loss())
        if how == "torch's function":
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1e-3)
        else:
            module.clip_gradients(optimizer, gradient_clip_val=1e-3, gradient_clip_algorithm="norm")
        optimizer.step()

    expected, _ = fit(seeded(Classifier, adamw), LipschitzLR(loss, schedule="none"))
    rates, _ = fit(seeded(Manual, clipped, adamw), LipschitzLR(loss, optimizers=0, schedule="none"))
    assert rates == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("divided", ["each loss", "the gradients"])
def test_gradients_that_are_divided_by_their_number_are_not_taken_for_clipped_ones(divided):
    def accumulates(module, optimizer, loss):
        module.manual_backward(loss() / (2 if divided == "each loss" else 1))
        module.batches = getattr(module, "batches", 0) + 1
        if module.batches % 2 == 0:
            for p in module.parameters() if divided == "the gradients" else ():
                p.grad /= 2
            optimizer.step()
            optimizer.zero_grad()

    callback = LipschitzLR("cross_entropy", optimizers=0, schedule="none")
    rates, _ = fit(seeded(Manual, accumulates, adamw), callback, batch_size=8)
    expected, _ = fit(seeded(Classifier, adamw), batch_size=8, accumulate_grad_batches=2)
    if divided == "each loss":
        assert rates == pytest.approx(expected, rel=1e-4)
    assert all(rate <= 1.01 * limit for rate, limit in zip(rates, expected, strict=True))


@pytest.mark.parametrize("loss", ["auto", "measured"])
def test_a_loss_whose_gradients_are_reset_is_not_in_the_step(loss):
    def resets(module, optimizer, loss):
        module.manual_backward(loss())
        optimizer.zero_grad()
        module.manual_backward(loss())
        optimizer.step()
        optimizer.zero_grad()

    expected, plain = fit(seeded(Classifier, momentum), LipschitzLR(loss, schedule="none"))
    rates, callback = fit(seeded(Manual, resets), LipschitzLR(loss, schedule="none", optimizers=0))
    assert rates == pytest.approx(expected, rel=1e-6)
    # A batch of manual optimization may make more steps, so the norm of the weights is that after its last one.
    measured, expected = (replace(one.controllers[0].measurement, weight_norm=0.0) for one in (callback, plain))
    assert measured == expected


# Batches in a step


def counted(callback):
    """Batches of the step, from the last measurement."""
    return callback.controllers[0].measurement.batches


@pytest.mark.parametrize("settings", [{"overfit_batches": 1}, {"limit_train_batches": 1}, {"limit_train_batches": 3}])
def test_an_epoch_shorter_than_the_accumulation_counts_what_it_has(settings):
    (batches,) = settings.values()
    rates, callback = fit(seeded(Classifier, momentum), accumulate_grad_batches=8, batch_size=4, **settings)
    expected, _ = fit(seeded(Classifier, momentum), accumulate_grad_batches=batches, batch_size=4, **settings)
    assert counted(callback) == batches
    assert rates[0] == expected[0]


class Skips(Classifier):
    """Skips some batches."""

    skipped = ()

    def training_step(self, batch, batch_idx):
        return None if batch_idx in self.skipped else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*returned `None`")
@pytest.mark.parametrize("skipped", [(0, 1), (1, 3), (2, 3), (0, 2)])
def test_a_batch_that_is_skipped_is_not_counted(skipped):
    module = seeded(Skips, momentum, skipped=skipped)
    _, callback = fit(module, batch_size=4, accumulate_grad_batches=4, max_steps=1)
    assert counted(callback) == 2


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_a_run_of_skipped_batches_changes_no_weight_and_raises_nothing():
    module = seeded(Skips, adamw, skipped=range(4))
    before = [p.detach().clone() for p in module.parameters()]
    _, callback = fit(module, max_steps=4)
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))
    assert callback.rate is None


class Ends(Classifier):
    """Ends each epoch after so many batches."""

    batches = 3

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == self.batches else None


def test_gradients_that_an_epoch_leaves_behind_are_not_in_the_next_step():
    _, callback = fit(seeded(Ends, momentum, batches=7), batch_size=8, accumulate_grad_batches=4, max_epochs=3)
    assert counted(callback) == 4


@pytest.mark.parametrize(("settings", "told"), [({}, 1), ({"max_steps": 9}, 0), ({"schedule": "none"}, 0)])
def test_a_shortened_epoch_is_told_of_once_if_the_schedule_counts_on_it(settings, told, caplog):
    callback = LipschitzLR(schedule=settings.pop("schedule", "auto"))
    with caplog.at_level(logging.INFO):
        fit(seeded(Ends, momentum), callback, max_epochs=3, **settings)
    assert caplog.text.count("over 18 optimizer steps, and this epoch was shortened") == told


def test_nothing_is_told_of_a_run_that_is_stopped(caplog):
    class Stops(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = batch_idx == 2

    with caplog.at_level(logging.INFO):
        fit(seeded(Classifier, momentum), LipschitzLR(), Stops(), max_epochs=3)
        fit(seeded(Classifier, momentum), LipschitzLR(), max_epochs=3, limit_train_batches=2)
    assert "shortened" not in caplog.text


class Every(Classifier):
    """Steps with every second batch, as Lightning's documentation does; the closure forgets earlier gradients."""

    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        if batch_idx % 2:
            optimizer.step(closure=closure)
        else:
            closure()


@pytest.mark.parametrize("loss", ["auto", "measured"])
def test_a_closure_without_a_step_leaves_nothing_in_the_next_one(loss):
    _, callback = fit(seeded(Every, momentum), LipschitzLR(loss, schedule="none"))
    measured = callback.controllers[0].measurement
    assert (measured.batches, measured.batch_size) == (1, 16)


# The first step


@pytest.mark.parametrize("lr", [1e-3, 1000.0])
@pytest.mark.parametrize(("loss", "name"), [("auto", "adamw"), ("measured", "adamw"), ("measured", "momentum")])
def test_steps_before_the_first_gradient_move_nothing(loss, name, lr):
    """The first two batches ignore all targets; the sum of their losses is 0, and so is its gradient."""
    make = {
        "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1),
        "momentum": lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=0.1),
    }[name]

    class Summed(Classifier):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1], reduction="sum") / 16

    labels = torch.randint(CLASSES, (EXAMPLES,), generator=torch.Generator().manual_seed(0))
    labels[:32] = -100
    data = DataLoader(TensorDataset(torch.randn(EXAMPLES, WIDTH), labels), batch_size=16)
    module, seen = seeded(Summed, make), []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            seen.append(pl_module.net[2].weight.detach().clone())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rates, _ = fit(module, LipschitzLR(loss, schedule="none"), Look(), data=data, max_epochs=1)
    assert rates[:2] == [0.0, 0.0]
    assert torch.equal(seen[0], seen[2])
    assert 0 < rates[2] < 100
    assert not torch.equal(seen[2], seen[3])


# Rates of other code


class Warm(Classifier):
    """A warm-up as in Lightning's documentation, before or after the step."""

    after = True

    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        if self.after:
            optimizer.step(closure=closure)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * min(1.0, (self.trainer.global_step + 1) / 6)
        if not self.after:
            optimizer.step(closure=closure)


@pytest.mark.parametrize("after", [True, False])
def test_a_manual_warm_up_is_told_of_once(after):
    expected, _ = fit(seeded(Classifier, momentum))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        rates, _ = fit(seeded(Warm, momentum, after=after))
    (message,) = [str(one.message) for one in told if "which has no effect" in str(one.message)]
    assert "return a scheduler from configure_optimizers" in message
    assert rates == expected


def test_nothing_is_told_of_rates_that_nobody_has_set():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*which has no effect")
        fit(seeded(Classifier, momentum), LipschitzLR())
        fit(seeded(Warm, momentum), LipschitzLR(dry_run=True))


def test_a_warm_up_beside_a_scheduler_is_a_factor():
    class Scheduled(Warm):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)]

    rates, callback = fit(seeded(Scheduled, momentum), max_epochs=1)
    plain, _ = fit(seeded(Classifier, momentum), max_epochs=1)
    assert rates[0] == plain[0]
    assert rates[1] < 0.5 * plain[1]
    assert math.isfinite(callback.rate)


class Twice(torch.optim.SGD):
    """A subclass whose step contains that of SGD, so that the hooks of a step run within it again."""

    def step(self, closure=None):
        return super().step(closure)


def test_a_step_within_a_step_decides_once():
    decided = []

    class Counts(LipschitzLR):
        def before_step(self, position):
            decided.append(position)
            super().before_step(position)

    def make(parameters):
        return Twice(parameters, lr=0.1, momentum=0.9)

    expected, _ = fit(seeded(Classifier, momentum), LipschitzLR(schedule="none", rule="inverse"))
    rates, _ = fit(seeded(Classifier, make), Counts(schedule="none", rule="inverse"))
    assert rates[::2] == pytest.approx(expected, rel=1e-6)  # the recorder's hook runs twice a step
    assert rates[1::2] == rates[::2]
    assert decided == [0] * 12


def test_a_step_that_fails_does_not_keep_the_next_one_from_its_rate():
    class Fails(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            if fails and fails.pop():
                raise RuntimeError("out of memory")

    def suppressed(module, optimizer, loss):
        optimizer.zero_grad()
        module.manual_backward(loss())
        with contextlib.suppress(RuntimeError):
            optimizer.step()

    def make(parameters):
        return Fails(parameters, lr=0.1)

    decided, fails = [], [True]

    class Counts(LipschitzLR):
        def before_step(self, position):
            decided.append(position)
            super().before_step(position)

    fit(seeded(Manual, suppressed, make), Counts(schedule="none", rule="inverse", optimizers=0))
    assert not fails
    assert decided == [0] * 12
