"""Learning-rate schedules: linear warm-up and decay, and decay with time."""

import pytest
import torch

from lit_lipschitz import LinearWarmupDecay, TimeDecay


def rates(total_steps, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=2.0)
    scheduler = LinearWarmupDecay(optimizer, total_steps, warmup)
    seen = []
    for _ in range(total_steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen, optimizer.param_groups[0]["lr"]


def test_a_rise_a_peak_and_a_fall_to_zero():
    seen, after = rates(20, 0.25)
    assert seen[:6] == pytest.approx([2 * i / 6 for i in range(1, 7)])
    assert seen[5:] == pytest.approx([2 * (20 - t) / 15 for t in range(5, 20)])
    assert after == 0


@pytest.mark.parametrize(("total_steps", "warmup"), [(20_000, 0.1), (30_000, 0.1), (5_000, 0.8)])
def test_a_warm_up_has_at_most_2000_steps(total_steps, warmup):
    factor = LinearWarmupDecay(
        torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0), total_steps, warmup
    ).lr_lambdas[0]
    rise = [factor(step) for step in range(2001)]
    assert rise == pytest.approx([step / 2001 for step in range(1, 2002)])
    fall = [factor(step) for step in (2001, total_steps // 2 + 1000, total_steps - 1)]
    assert fall == pytest.approx([1 - 1 / (total_steps - 2000), 0.5, 1 / (total_steps - 2000)])


def test_without_a_warm_up_it_starts_at_the_peak():
    seen, _ = rates(4, 0.0)
    assert seen == pytest.approx([2.0, 1.5, 1.0, 0.5])


def test_a_run_of_one_step_has_a_rate():
    assert rates(1, 0.1)[0][0] > 0


@pytest.mark.parametrize(
    ("total_steps", "warmup", "named"),
    [(None, 0.1, "total_steps=None"), (0, 0.1, "total_steps=0"), (9, 1.0, "warmup=1")],
)
def test_a_value_out_of_its_range_is_named(total_steps, warmup, named):
    with pytest.raises(ValueError, match=named):
        LinearWarmupDecay(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0), total_steps, warmup)


def test_time_decay_divides_by_one_plus_decay_times_step():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    scheduler = TimeDecay(optimizer, 0.1)
    for step in range(5):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 / (1 + 0.1 * step))
        optimizer.step()
        scheduler.step()


def test_time_decay_as_recorded_on_cifar10():
    """A scheduled 1.35 after 300 epochs of 391 steps at 1e-3 is an applied 0.011."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.35)
    factor = TimeDecay(optimizer, 1e-3).lr_lambdas[0]
    assert 1.35 * factor(300 * 391) == pytest.approx(0.011, abs=5e-4)


@pytest.mark.parametrize("decay", [-0.1, float("nan"), float("inf")])
def test_a_decay_out_of_its_range_is_named(decay):
    with pytest.raises(ValueError, match=f"decay={decay}: expected a finite number of at least 0"):
        TimeDecay(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0), decay)
