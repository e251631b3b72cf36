"""The stress suite: what it takes for a failure, that a run is repeated by its number, and a handful of short runs."""

import math
import sys
import warnings

import pytest
from helpers import ROOT


@pytest.fixture
def stress(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import stress

    yield stress
    sys.modules.pop("stress", None)


STEPS = sorted({1, 2, 4, 8, 16, *range(0, 401, 10)})
FALLING = {step: 1 / (1 + step) for step in STEPS}
RATES = {step: 0.1 for step in STEPS if step}
QUIET = dict.fromkeys(STEPS, 0.0)


def test_a_run_that_learns_is_no_failure(stress):
    assert stress.failures(FALLING, RATES, QUIET) == []


def test_a_noisy_plateau_is_no_failure(stress):
    noisy = {step: max(loss, 0.2) + 0.05 * math.sin(7 * step) for step, loss in FALLING.items()}
    assert stress.failures(noisy, RATES, QUIET) == []


def test_a_loss_that_collapses_after_it_was_learned_is_one(stress):
    collapsed = {step: loss if step < 300 else 0.5 for step, loss in FALLING.items()}
    (found,) = stress.failures(collapsed, RATES, QUIET)
    assert found == f"loss 1, at best {1 / 291:.3g}, at the end 0.5"
    assert stress.failures({step: loss if step < 300 else 0.05 for step, loss in FALLING.items()}, RATES, QUIET) == []


def test_what_a_batchs_loss_varies_by_is_no_collapse(stress):
    """By its standard deviation where the loss was at its best; that of other steps does not count."""
    collapsed = {step: loss if step < 300 else 0.5 for step, loss in FALLING.items()}
    assert stress.failures(collapsed, RATES, {**QUIET, 290: 0.5}) == []
    assert len(stress.failures(collapsed, RATES, {**QUIET, 290: 0.4})) == 1
    assert len(stress.failures(collapsed, RATES, {**dict.fromkeys(STEPS, 9.0), 290: 0.0})) == 1


def test_a_rate_that_rises_while_the_loss_does_not_fall_is_one(stress):
    flat = dict.fromkeys(STEPS, 1.0)
    risen = {step: 0.1 if step < 200 else 1.5 for step in RATES}
    assert stress.failures(flat, risen, QUIET) == ["rate 0.1 in step 1, 1.5 in step 200"]
    assert stress.failures(FALLING, risen, QUIET) == []
    assert stress.failures(flat, {step: 0.1 if step < 200 else 0.9 for step in RATES}, QUIET) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "rate"])
def test_what_is_not_finite_is_one(stress, value, where):
    losses, rates = dict(FALLING), dict(RATES)
    (losses if where == "loss" else rates)[200] = value
    assert stress.failures(losses, rates, QUIET) == ["not finite"]


def test_the_number_of_a_run_is_all_that_repeats_it(stress):
    runs = [stress.Run.draw(number, 0, 20000) for number in range(210)]
    assert runs == [stress.Run.draw(number, 0, 20000) for number in range(210)]
    assert {run.loss for run in runs} == set(stress.LOSSES)
    assert {run.optimizer for run in runs} == set(stress.OPTIMIZERS)
    assert {run.network for run in runs} == set(stress.NETWORKS)
    assert {run.schedule for run in runs} == {"auto", "none"}
    assert max(run.steps for run in runs) == 20000
    assert len({(run.loss, run.optimizer) for run in runs}) == len(stress.LOSSES) * len(stress.OPTIMIZERS)
    assert stress.Run.draw(3, 1, 20000) != runs[3]
    assert stress.Run.draw(3, 0, 50).steps == 50


@pytest.mark.parametrize("number", [0, 8, 16, 24, 32, 40])
def test_short_runs_have_no_failure(stress, number):
    """One of each optimizer and of six losses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert stress.train(stress.Run.draw(number, 0, 60), 0) == []
