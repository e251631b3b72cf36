"""Every scheduler keeps its own curve, and its factor is in each step; compared with the scheduler run by itself."""

import pytest
import torch
from helpers import SCHEDULER_STEPS, SCHEDULERS
from torch.optim import lr_scheduler as schedulers

from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.optim.lr_writer import LRWriter


def optimizer(lrs=(0.1, 0.02)):
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in lrs]
    return torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in zip(parameters, lrs, strict=True)], lr=0.1)


def rates(optim):
    return [group["lr"] for group in optim.param_groups]


@pytest.mark.parametrize("inside", [True, False], ids=["written inside the step", "before a scaler's step"])
@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_the_rate_is_ours_times_the_schedulers_factor(name, inside):
    make, reference = SCHEDULERS[name]
    alone = optimizer()
    scheduler_alone = make(alone)
    ours = optimizer()
    scheduler = make(ours)
    writer = LRWriter(ours, [scheduler])
    used = []
    probe = ours.register_step_post_hook(lambda o, *_: used.append(rates(o)))
    ours._optimizer_step_post_hooks.move_to_end(probe.id, last=False)

    for t in range(SCHEDULER_STEPS):
        rate = 3.0 / (1 + t)
        expected = [rate * lr / reference for lr in rates(alone)]
        if inside:
            ours.step(lambda rate=rate: writer.write(rate) and None)
        else:
            written = writer.write(rate)
            assert written == pytest.approx(expected, rel=1e-12)
            ours.step()
        assert used[-1] == pytest.approx(expected, rel=1e-12)
        assert rates(ours) == rates(alone)
        alone.step()
        scheduler.step()
        scheduler_alone.step()


def test_plateaus_are_measured_from_the_configured_rate():
    ours = optimizer()
    scheduler = schedulers.ReduceLROnPlateau(ours, factor=0.5, patience=0)
    writer = LRWriter(ours, [scheduler])
    for loss in (1.0, 2.0):
        ours.step(lambda: writer.write(3.0) and None)
        scheduler.step(loss)
    assert rates(ours) == pytest.approx([0.05, 0.01])
    assert writer.write(3.0) == pytest.approx([1.5, 0.3])


def test_without_a_scheduler_the_rate_stays_to_be_seen():
    ours = optimizer()
    writer = LRWriter(ours)
    assert writer.write(2.0) == pytest.approx([2.0, 0.4])
    ours.step()
    assert rates(ours) == pytest.approx([2.0, 0.4])
    assert writer.write(1.0) == pytest.approx([1.0, 0.2])


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # as after a scaler's first, skipped step
def test_a_step_that_a_scaler_skips_leaves_the_schedulers_value():
    ours = optimizer()
    scheduler = schedulers.ExponentialLR(ours, 0.5)
    writer = LRWriter(ours, [scheduler])
    writer.write(3.0)
    assert rates(ours) == [0.1, 0.02]
    scheduler.step()
    assert rates(ours) == [0.05, 0.01]


def add_group(optim, lr):
    optim.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr})


def test_a_group_added_later_counts_relative_to_the_first_ones_rate():
    ours = optimizer()
    writer = LRWriter(ours)
    writer.write(4.0)
    add_group(ours, rates(ours)[0] / 10)  # as Lightning's BackboneFinetuning does
    assert writer.write(2.0) == pytest.approx([2.0, 0.4, 0.2])

    # A run that is resumed has the group before it has written a rate.
    again = optimizer()
    resumed = LRWriter(again, stored=writer.references)
    add_group(again, 0.2)
    assert resumed.write(2.0) == pytest.approx([2.0, 0.4, 0.2])


def test_a_rate_that_is_changed_before_the_first_step_of_a_resumed_run_counts():
    ours = optimizer()
    writer = LRWriter(ours)
    written = writer.write(4.0)
    again = optimizer()
    resumed = LRWriter(again, stored=writer.references, written=writer.written)
    for group, lr in zip(again.param_groups, written, strict=True):
        group["lr"] = lr  # of the checkpoint
    again.param_groups[1]["lr"] *= 3
    assert resumed.write(2.0) == pytest.approx([2.0, 1.2])
    for group, lr in zip(ours.param_groups, written, strict=True):
        group["lr"] = lr
    ours.param_groups[1]["lr"] *= 3
    assert writer.write(2.0) == pytest.approx([2.0, 1.2])


def test_with_a_scheduler_a_group_added_later_brings_its_configured_rate():
    ours = optimizer()
    writer = LRWriter(ours, [schedulers.ExponentialLR(ours, 0.5)])
    writer.write(4.0)
    add_group(ours, 0.05)
    assert writer.write(2.0) == pytest.approx([2.0, 0.4, 1.0])


def test_a_tensor_rate_is_written_in_place():
    parameter = torch.nn.Parameter(torch.ones(1))
    ours = torch.optim.SGD([parameter], lr=torch.tensor(0.1))
    lr = ours.param_groups[0]["lr"]
    LRWriter(ours).write(2.0)
    assert ours.param_groups[0]["lr"] is lr
    assert lr.item() == 2.0


def test_no_rate_leaves_the_groups_alone():
    ours = optimizer()
    assert LRWriter(ours).write(None) == [0.1, 0.02]
    assert rates(ours) == [0.1, 0.02]


def test_closing_takes_the_hooks_off():
    ours = optimizer()
    scheduler = schedulers.ExponentialLR(ours, 0.5)
    writer = LRWriter(ours, [scheduler])
    writer.write(3.0)
    writer.close()
    parameter = ours.param_groups[0]["params"][0]
    parameter.grad = torch.ones(2)
    ours.step()
    assert parameter.tolist() == pytest.approx([0.9, 0.9])


def test_a_reference_of_zero_is_refused():
    with pytest.raises(ConfigurationError, match=r"first parameter group's is 0\.0"):
        LRWriter(optimizer((0.0, 0.1)))
