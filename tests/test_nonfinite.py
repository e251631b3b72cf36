"""A loss that is not finite: who is told, when, and what becomes of the rate and the parameters."""

import math
import warnings
from pathlib import Path

import pytest
import torch
from conftest import Classifier, Steps, loader, trainer
from test_distributed import two_ranks
from torch.nn import functional as F

from lit_lipschitz import LipschitzLR
from lit_lipschitz.errors import LitLipschitzError
from lit_lipschitz.spikes import KEPT, LossWatch


class Spiking(Classifier):
    """The loss of one step is not finite; the activations are."""

    def __init__(self, step, value=math.nan, rank=0):
        super().__init__()
        self.step, self.value, self.rank = step, value, rank
        self.before = None

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        if self.global_step == self.step and self.global_rank == self.rank:
            self.before = [p.detach().clone() for p in self.parameters()]
            return loss + (loss.detach() * 0 + 1) * self.value  # no part of the gradient
        return loss


def fit(callback, module, **settings):
    run = trainer(callback, steps := Steps(), max_epochs=3, **settings)
    run.fit(module, loader())
    return [rate for (rate,) in steps.rates]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("step", [0, 4, 7, 17])
def test_it_is_reported_once_with_step_rank_and_last_rate(step, value):
    with pytest.warns(UserWarning, match=rf"a non-finite loss in step {step} on rank 0; ") as caught:
        rates = fit(LipschitzLR(schedule="none"), Spiking(step, value))
    (message,) = [str(one.message) for one in caught if "non-finite" in str(one.message)]
    if step:
        assert message.endswith(f"the last rate was {rates[step]:.4g}, which is kept")
    else:
        assert message.endswith("no rate was computed yet")
    assert all(math.isfinite(rate) and rate < 1 for rate in rates)


def test_the_last_rate_is_kept_at_the_update_that_notices():
    free = fit(LipschitzLR(schedule="none"), Classifier())
    with pytest.warns(UserWarning, match="in step 8"):
        rates = fit(LipschitzLR(schedule="none"), Spiking(8))
    assert len({*free[0:6], *free[6:12], *free[12:18]}) > 2
    assert free[12] != free[11]
    assert rates[12] == rates[11]


def test_the_first_step_is_the_one_that_is_named():
    class Broken(Spiking):
        def training_step(self, batch, batch_idx):
            self.step = max(self.step, self.global_step)  # and all after it
            return super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="in step 9 on rank 0"):
        fit(LipschitzLR(schedule="none"), Broken(9))


@pytest.mark.parametrize("settings", [{}, {"update": 4}, {"measure": "pass"}, {"initial_lr": 0.01}])
@pytest.mark.parametrize("step", [0, 3, 9])
def test_on_one_cpu_raise_ends_the_run_before_the_parameters_move(settings, step):
    module = Spiking(step)
    with pytest.raises(LitLipschitzError, match=rf"a non-finite loss in step {step} on rank 0; .* would go on\)"):
        fit(LipschitzLR(schedule="none", on_nonfinite="raise", **settings), module)
    assert all(torch.equal(before, now) for before, now in zip(module.before, module.parameters(), strict=True))


@pytest.mark.parametrize("settings", [{"update": 4}, {"measure": "pass"}, {"initial_lr": 0.01, "update": 100}])
def test_the_end_of_an_epoch_looks_at_what_no_update_has(settings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(LipschitzLR(schedule="none", **settings), max_epochs=1).fit(Spiking(5), loader())
    seen = [str(one.message) for one in caught if "non-finite loss in step 5 on rank 0" in str(one.message)]
    assert len(seen) == 1


def test_accumulated_batches_count_as_their_step():
    with pytest.warns(UserWarning, match="in step 2 on rank 0"):
        fit(LipschitzLR(schedule="none"), Spiking(2), accumulate_grad_batches=2)


def test_it_costs_no_value_on_the_host(monkeypatch):
    watch = LossWatch(0, 1, 0)
    for name in ("item", "tolist", "__bool__", "__float__", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("read a tensor"))
    for step in range(5):
        watch.see(torch.full((), math.nan), step)
    watch.slots()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_large_losses_are_no_spikes_and_steps_are_exact(dtype):
    watch = LossWatch(1, 3, 10)
    for step in range(10, 2_000_000, 150_001):
        watch.see(torch.tensor(torch.finfo(dtype).max, dtype=dtype), step)
    assert watch.read() is None
    watch.see(torch.tensor(math.inf, dtype=dtype), 2_000_003)
    watch.see(torch.tensor(math.inf, dtype=dtype), 2_000_004)
    assert watch.read() == (2_000_003, [1])
    watch.reset(2_000_005)
    assert watch.read() is None


def test_the_ranks_agree_on_the_earliest_step_and_who_had_it():
    watches = [LossWatch(rank, 3, 5) for rank in range(3)]
    for watch, bad in zip(watches, (7, 6, 6), strict=True):
        for step in (5, 6, 7):
            watch.see(torch.tensor(math.nan if step == bad else 1.0), step)
    agreed = torch.stack([watch.slots() for watch in watches]).amax(dim=0)
    for watch in watches:
        watch.take(agreed)
        assert watch.read() == (6, [1, 2])


def test_two_ranks_keep_the_same_rate_after_a_loss_of_one_of_them(monkeypatch):
    def tell(message):
        with Path("warnings.txt").open("a") as file:
            file.write(f"{message}\n")

    monkeypatch.setattr("lit_lipschitz.controller.rank_zero_warn", tell)
    first, second = two_ranks(LipschitzLR(schedule="none"), Spiking(4, rank=1), 8, max_epochs=2)
    assert first["rates"] == second["rates"]
    assert all(math.isfinite(rate) and rate < 1 for (rate,) in first["rates"])
    told = Path("warnings.txt").read_text().splitlines()
    last = f"{first['rates'][4][0]:.4g}"
    assert set(told) == {f"LipschitzLR: a non-finite loss in step 4 on rank 1; the last rate was {last}, which is kept"}


def test_two_ranks_both_end_after_a_loss_of_one_of_them():
    with pytest.raises(Exception, match=r"a non-finite loss in step 4 on rank 1; .* would go on"):
        two_ranks(LipschitzLR(schedule="none", on_nonfinite="raise"), Spiking(4, rank=1), 8, max_epochs=2)


@pytest.mark.parametrize("step", [0, 5, KEPT - 1, KEPT, KEPT + 3, 5 * KEPT + 7])
def test_the_watch_knows_the_first_of_many_steps(step):
    watch = LossWatch(rank=1, world_size=3, step=2)
    for i in range(6 * KEPT):
        for bad in (False, i in (step, step + 1, step + KEPT)):
            watch.see(torch.tensor(-math.inf if bad else 1e38), 2 + i)
    assert watch.read() == (2 + step, [1])
    watch.reset(6 * KEPT)
    watch.see(torch.tensor(1.0), 6 * KEPT + 1000)
    assert watch.read() is None
    watch.see(torch.tensor(math.nan), 6 * KEPT + 1000)
    watch.see(torch.tensor(1.0), 6 * KEPT + 1001)
    assert watch.read() == (6 * KEPT + 1000, [1])
