"""Residual and total sums of squares, compared with scikit-learn."""

import math

import pytest
import torch
from helpers import explained

from lit_lipschitz.measurement.residuals import Residuals, RunningResiduals

COUNT, BATCH = 96, 16


def running(outputs, targets, sizes):
    residuals = RunningResiduals(targets.shape[1])
    for output, target in zip(outputs.split(sizes), targets.split(sizes), strict=True):
        residuals.add(output, target)
    return residuals


@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4])
@pytest.mark.parametrize("width", [1, 3])
def test_the_unexplained_fraction_is_scikit_learns_over_batches_of_any_size(offset, width):
    targets = torch.randn(COUNT, width) * torch.arange(1, width + 1) + offset * torch.arange(1, width + 1)
    outputs = targets + 0.5 * torch.randn(COUNT, width)
    residuals = running(outputs, targets, [1, 50, 5, COUNT - 56])
    seen = Residuals(*residuals.values.tolist())
    assert seen.fraction_unexplained == pytest.approx(
        1 - explained(outputs, targets), rel=1e-2 if offset == 1e4 else 1e-4
    )
    assert seen.count == COUNT * width
    assert seen.root_mean_square == pytest.approx((outputs - targets).square().mean().sqrt().item(), rel=1e-3)


def test_the_ranks_numbers_are_put_together():
    targets = torch.randn(3000, 2)
    outputs = targets + torch.randn(3000, 2)
    ranks = [running(outputs[rank::3], targets[rank::3], 100) for rank in range(3)]
    agreed = torch.stack([one.pack(rank, 3) for rank, one in enumerate(ranks)]).amax(dim=0)
    for one in ranks:
        seen = Residuals(*one.unpack(agreed).tolist())
        assert seen.count == 6000
        assert seen.fraction_unexplained == pytest.approx(1 - explained(outputs, targets), rel=1e-2)
        assert torch.equal(one.pack(1, 3)[6:12], ranks[0].pack(1, 3)[6:12])
        assert torch.equal(one.mean, ranks[0].mean)
    again = torch.stack([one.pack(rank, 3) for rank, one in enumerate(ranks)]).amax(dim=0)
    assert Residuals(*ranks[0].unpack(again).tolist()) == seen


def test_one_rank_changes_nothing_by_sharing():
    residuals = running(torch.randn(COUNT, 2), torch.randn(COUNT, 2), BATCH)
    before = residuals.state_dict()
    assert torch.equal(residuals.unpack(residuals.pack(0, 1)), before["values"])
    assert all(torch.equal(before[name], after) for name, after in residuals.state_dict().items())


def test_where_there_is_no_squared_error_nothing_is_sent():
    assert len(RunningResiduals().pack(1, 4)) == 0
    assert RunningResiduals().unpack(torch.zeros(0)).tolist() == [0] * 11


def test_outputs_of_another_width_are_left_out():
    residuals = running(torch.randn(COUNT, 2), torch.randn(COUNT, 2), BATCH)
    residuals.add(torch.randn(COUNT, 1), torch.randn(COUNT, 1))
    assert residuals.values[0] == COUNT * 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_is_left_out(bad):
    targets, outputs = torch.randn(COUNT, 1), torch.randn(COUNT, 1)
    residuals = running(outputs, targets, BATCH)
    before = residuals.values.tolist()
    residuals.add(torch.full((4, 1), bad), torch.zeros(4, 1))
    residuals.add(torch.zeros(4, 1), torch.full((4, 1), bad))
    assert residuals.values.tolist() == before
    residuals.add(torch.zeros(4, 1), torch.zeros(4, 1))
    assert residuals.values[0] == COUNT + 4


@pytest.mark.parametrize("value", [0.0, 1.0, 1234.5])
def test_targets_that_do_not_vary_have_no_share(value):
    targets = torch.full((COUNT, 1), value)
    assert Residuals(*running(targets + 1, targets, 7).values.tolist()).fraction_unexplained is None
    assert Residuals().fraction_unexplained is None


def test_the_state_goes_on_where_it_was():
    targets, outputs = torch.randn(COUNT, 2) + 3, torch.randn(COUNT, 2)
    whole = running(outputs, targets, BATCH)
    resumed = RunningResiduals()
    resumed.load_state_dict(running(outputs[:32], targets[:32], BATCH).state_dict())
    for output, target in zip(outputs[32:].split(BATCH), targets[32:].split(BATCH), strict=True):
        resumed.add(output, target)
    assert torch.equal(resumed.values, whole.values)
    assert torch.equal(resumed.mean, whole.mean)


def test_sums_that_overflow_are_no_residual():
    residuals = RunningResiduals(1)
    for _ in range(3):
        residuals.add(torch.full((1, 1), 1.2e19), torch.zeros(1, 1))
    assert torch.isfinite(residuals.values).all()
    over = Residuals(3.0, 1.0, 3.0, math.inf, 3.0, math.inf, 3.0)
    assert (over.root_mean_square, over.fraction_unexplained) == (0.0, None)


def test_an_interval_ends_before_its_epoch_does():
    targets, outputs = torch.randn(COUNT, 1), torch.randn(COUNT, 1)
    residuals = running(outputs, targets, BATCH)
    residuals.end_interval()
    residuals.add(torch.full((8, 1), 3.0), torch.zeros(8, 1), factor=0.5)
    seen = Residuals(*residuals.values.tolist())
    assert (seen.count, seen.interval_count, seen.factor) == (COUNT + 8, 8, 0.5)
    squares = (outputs - targets).square().sum().item() + 72
    assert seen.root_mean_square == pytest.approx(math.sqrt(squares / (COUNT + 8)))  # eight are few
    residuals.add(torch.full((24, 1), 3.0), torch.zeros(24, 1), factor=0.5)
    assert Residuals(*residuals.values.tolist()).root_mean_square == pytest.approx(3)
    residuals.end_epoch()
    everything = torch.cat([targets, torch.zeros(32, 1)])
    total = float((everything - everything.mean()).square().sum())
    assert residuals.values.tolist() == pytest.approx([COUNT + 32, total, 0, 0, 32, 288, 16, 0, 0, 0, 0], rel=1e-4)
