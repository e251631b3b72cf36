"""The warm-up and decay of runs that bring no scheduler."""

import math
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from helpers import EXAMPLES, Classifier, Steps, examples, loader, trainer
from torch.utils.data import DataLoader, IterableDataset

from lit_lipschitz import LinearWarmupDecay, LipschitzLR
from lit_lipschitz.control.builtin_schedule import BuiltinSchedule


def fit(callback, module, **settings):
    run = trainer(callback, steps := Steps(), **{"max_epochs": 2, **settings})
    run.fit(module, loader(16))
    return [rate for (rate,) in steps.rates]


def test_a_run_without_a_scheduler_warms_up_and_decays_as_with_one():
    def scheduled(parameters):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        scheduler = LinearWarmupDecay(optimizer, total_steps=3 * EXAMPLES // 16)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    class Scheduled(Classifier):
        def configure_optimizers(self):
            return scheduled(self.parameters())

    torch.manual_seed(0)
    expected = fit(LipschitzLR(), Scheduled(), max_epochs=3)
    torch.manual_seed(0)
    assert fit(LipschitzLR(), Classifier(), max_epochs=3) == pytest.approx(expected, rel=1e-12)
    assert expected[0] < expected[1]
    assert 0 < expected[-1] < 0.2 * max(expected)


def test_the_rate_that_is_logged_is_the_one_that_is_used():
    callback = LipschitzLR()
    rates = fit(callback, Classifier(), max_steps=6)
    assert callback.lr == pytest.approx(rates[-1])
    assert callback.lr == pytest.approx(callback.rate * LinearFactor.at(5, 6))


class LinearFactor:
    """The factor written out for whole numbers: w = T / 10."""

    @staticmethod
    def at(step, total):
        rise = total / 10
        return min((step + 1) / (rise + 1), (total - step) / (total - rise))


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield from (examples()[i] for i in range(EXAMPLES))


@pytest.mark.parametrize(
    ("callback", "data", "settings"),
    [
        (lambda: LipschitzLR(schedule="none"), lambda: loader(), {"max_epochs": 2}),
        (lambda: LipschitzLR(bound="paper"), lambda: loader(), {"max_epochs": 2}),
        (LipschitzLR, lambda: DataLoader(Endless(), batch_size=16), {"max_epochs": 1, "limit_train_batches": 4}),
    ],
    ids=["none", "paper", "known by the limit"],
)
def test_a_schedule_is_there_only_where_it_is_asked_for_and_the_length_is_known(callback, data, settings):
    run = trainer(ours := callback(), Steps(), **settings)
    run.fit(Classifier(), data())
    constant = ours.rate == ours.lr
    assert constant == (ours.options.schedule == "none" or ours.policy.bound == "paper")


def factors_of(data, *more, validation=None, **settings):
    """The learning rate of each step over that at a factor of 1, and the callback."""
    factors, callback = [], LipschitzLR()

    class Record(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == len(factors):
                return  # an accumulated batch
            factors.append(trainer.optimizers[0].param_groups[0]["lr"] / callback.controllers[0].decision.lr)

    trainer(callback, Record(), *more, **settings).fit(Classifier(), data, validation)
    return factors, callback


class StopAfter(L.Callback):
    """Ends a run without a limit that is reached."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == self.steps


UNKNOWN = {
    "early stopping": (
        [L.pytorch.callbacks.EarlyStopping("val_loss", check_on_train_epoch_end=False)],
        {"max_epochs": 3},
    ),
    "a timer": ([L.pytorch.callbacks.Timer(duration={"hours": 1})], {"max_epochs": 3}),
    "max_time": ([], {"max_time": {"hours": 1}, "max_epochs": 3}),
    "Lightning's default": ([StopAfter(18)], {"max_epochs": None}),
    "no limit": ([StopAfter(18)], {"max_epochs": -1}),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_run_of_unknown_length_warms_up_over_the_first_epoch_and_does_not_decay(name, caplog):
    callbacks, settings = UNKNOWN[name]
    with caplog.at_level("INFO"):
        factors, callback = factors_of(loader(), *callbacks, validation=loader(), **settings)
    assert factors == pytest.approx([step / 7 for step in range(1, 7)] + [1.0] * 12, rel=1e-6)
    assert "warm-up over 6 optimizer steps and no decay" in caplog.text
    assert not callback.controllers[0].measurement.decays


def test_a_run_of_known_length_decays_and_the_rule_is_told():
    factors, callback = factors_of(loader(), max_epochs=5)
    assert factors == pytest.approx([LinearFactor.at(step, 30) for step in range(30)], rel=1e-6)
    assert callback.controllers[0].measurement.decays


@pytest.mark.parametrize("schedule", ["auto", "none"])
def test_a_scheduler_of_ones_own_counts_as_a_decay_and_a_rate_without_any_does_not(schedule):
    class Scheduled(Classifier):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)]

    decays = []
    for module in (Scheduled(), Classifier()):
        trainer(callback := LipschitzLR(schedule=schedule)).fit(module, loader())
        decays.append(callback.controllers[0].measurement.decays)
    assert decays == [True, schedule == "auto"]


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_warm_up_has_at_most_2000_steps(scheduled):
    """Of a run of 50,000 steps, by the loop's facts alone."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    if scheduled:
        factor = LinearWarmupDecay(optimizer, 50_000).lr_lambdas[0]
    else:
        schedule = BuiltinSchedule(enabled=True, averages_weights=False)
        factor = lambda step: schedule.factor(facts(step, 50_000, 1000))  # noqa: E731
    assert [factor(step) for step in (0, 999, 2000)] == pytest.approx([1 / 2001, 1000 / 2001, 1.0])
    assert [factor(step) for step in (26_000, 49_999)] == pytest.approx([0.5, 1 / 48_000])


def test_a_warm_up_over_an_epoch_has_at_most_2000_steps():
    schedule = BuiltinSchedule(enabled=True, averages_weights=False)
    factors = [schedule.factor(facts(step, math.inf, 30_000)) for step in (0, 1999, 2000, 10**6)]
    assert factors == pytest.approx([1 / 2001, 2000 / 2001, 1.0, 1.0])


def facts(step, total, epoch):
    """A loop of which a schedule asks these alone."""
    return SimpleNamespace(
        step=step, total_steps=lambda: total, epoch_steps=lambda: epoch, notify=lambda message: None, lr_writer=""
    )


def test_accumulation_that_changes_has_no_decay():
    """Three steps in the first epoch, six in the second."""
    factors, _ = factors_of(loader(), L.pytorch.callbacks.GradientAccumulationScheduler({0: 2, 1: 1}))
    assert max(factors) == factors[-1] == pytest.approx(1.0)


def test_an_endless_run_without_epochs_says_that_it_has_no_schedule(caplog):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = batch_idx == 3

    with caplog.at_level("INFO"):
        run = trainer(callback := LipschitzLR(), Stop(), max_epochs=-1)
        run.fit(Classifier(), DataLoader(Endless(), batch_size=16))
    assert callback.rate == callback.lr
    assert "length of the run is not known" in caplog.text
