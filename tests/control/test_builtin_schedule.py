"""The warm-up and decay of runs that bring no scheduler."""

import lightning as L
import pytest
import torch
from helpers import EXAMPLES, Classifier, Steps, examples, loader, trainer
from torch.utils.data import DataLoader, IterableDataset

from lit_lipschitz import LinearWarmupDecay, LipschitzLR


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


def test_accumulation_that_changes_has_no_schedule():
    run = trainer(callback := LipschitzLR(), L.pytorch.callbacks.GradientAccumulationScheduler({0: 2, 1: 1}))
    run.fit(Classifier(), loader())
    assert callback.rate == callback.lr


def test_a_run_of_unknown_length_says_that_it_has_no_schedule(caplog):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = batch_idx == 3

    with caplog.at_level("INFO"):
        run = trainer(callback := LipschitzLR(), Stop(), max_epochs=-1)
        run.fit(Classifier(), DataLoader(Endless(), batch_size=16))
    assert callback.rate == callback.lr
    assert "length of the run is not known" in caplog.text
