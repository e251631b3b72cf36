"""Ranks never part: equal rates and weights at each step whatever their batches are, or an error on all in time."""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import CLASSES, OPTIMIZERS, WIDTH, Classifier, Slices, Steps, examples, trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.strategies import DDPStrategy
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.nn import functional as F

from lit_lipschitz import LipschitzLR
from lit_lipschitz.data import DeviceLoader

STEPS_OF_AN_EPOCH, EPOCHS = 6, 2


def strategy(seconds=60):
    return DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=seconds))


def chance(*numbers):
    seed = 0
    for number in numbers:
        seed = seed * 1009 + number + 1
    return torch.Generator().manual_seed(seed)


def class_weights(logits, targets, generator):
    return F.cross_entropy(logits, targets, weight=torch.rand(CLASSES, generator=generator) + 0.1)


def weights_of_the_batch(logits, targets, generator):
    return F.cross_entropy(logits, targets, weight=1.0 / (1.0 + torch.bincount(targets, minlength=CLASSES)))


def ignored(logits, targets, generator):
    hidden = torch.rand(len(targets), generator=generator) < 0.6
    return F.cross_entropy(logits, targets.masked_fill(hidden, -100), reduction="sum") / 8


def smoothed(logits, targets, generator):
    return F.cross_entropy(logits, targets, label_smoothing=0.5 * float(torch.rand((), generator=generator)))


def unreduced(logits, targets, generator):
    return F.cross_entropy(logits, targets, reduction="none").sum() / 4


def positives(logits, targets, generator):
    wanted = F.one_hot(targets, CLASSES).float()
    return F.binary_cross_entropy_with_logits(logits, wanted, pos_weight=3 * torch.rand(CLASSES, generator=generator))


def hubers(logits, targets, generator):
    delta = 0.1 + float(torch.rand((), generator=generator))
    return F.huber_loss(logits, F.one_hot(targets, CLASSES).float(), delta=delta, reduction="sum") / 8


def squares(logits, targets, generator):
    return F.mse_loss(logits, F.one_hot(targets, CLASSES).float(), reduction="sum") / 8


def focal(logits, targets, generator):
    logs = F.log_softmax(logits, dim=1).gather(1, targets[:, None])
    return -((1 - logs.exp()) ** 2 * logs).sum() / 8


LOSSES = (
    class_weights, weights_of_the_batch, ignored, smoothed, unreduced, positives, hubers, squares, focal,
)  # fmt: skip
SPECIAL = ("", "", "", "nan", "zero")


class Random(Classifier):
    """Each batch of each rank has its own loss, its own number of rows, and now and then something else."""

    def __init__(self, plan: Any, optimizer: str) -> None:
        super().__init__(OPTIMIZERS[optimizer])
        self.plan = plan

    def training_step(self, batch, batch_idx):
        step = self.current_epoch * STEPS_OF_AN_EPOCH + batch_idx
        kind, rows, special = self.plan[(step * self.trainer.world_size + self.global_rank) % len(self.plan)]
        generator = chance(step, self.global_rank, rows)
        inputs = torch.randn(rows, WIDTH, generator=generator)
        targets = torch.randint(CLASSES, (rows,), generator=generator)
        loss = LOSSES[kind](self.net(inputs), targets, generator)
        return loss * {"nan": float("nan"), "zero": 0.0}.get(special, 1.0)


class Trace(Steps):
    """Leaves each rank's rates and a number of its weights' bits after each step in a file."""

    def __init__(self) -> None:
        super().__init__()
        self.bits: list[bytes] = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.bits.append(b"".join(p.detach().numpy().tobytes() for p in pl_module.parameters()))

    def on_train_end(self, trainer, pl_module):
        # NaN is not equal to itself; its text is.
        torch.save((repr(self.rates), self.bits), f"trace{trainer.global_rank}.pt")


def traces(count, module, *callbacks, seconds=60, **more):
    run = trainer(
        LipschitzLR(), Trace(), *callbacks, devices=count, max_epochs=EPOCHS, strategy=strategy(seconds), **more
    )
    run.fit(module, datamodule=Slices(16 // count))
    return [torch.load(f"trace{rank}.pt") for rank in range(count)]


entries = st.tuples(st.integers(0, len(LOSSES) - 1), st.integers(0, 9), st.sampled_from(SPECIAL))
plans = st.lists(entries, min_size=1, max_size=4 * STEPS_OF_AN_EPOCH * EPOCHS)
GIVEN = {"plan": plans, "count": st.integers(2, 4), "optimizer": st.sampled_from(["momentum", "adamw"])}


def check(plan, count, optimizer):
    torch.manual_seed(0)
    first, *others = traces(count, Random(plan, optimizer))  # a rank that waits in vain ends it with an error
    assert all(other == first for other in others)
    assert len(first[1]) == STEPS_OF_AN_EPOCH * EPOCHS


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(**GIVEN)
def test_ranks_agree_bit_for_bit_on_random_losses(plan, count, optimizer):
    check(plan, count, optimizer)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(**GIVEN)
def test_ranks_agree_bit_for_bit_on_many_random_losses(plan, count, optimizer):
    check(plan, count, optimizer)


class SkippedOnOne(Classifier):
    """The second rank skips a batch."""

    def training_step(self, batch, batch_idx):
        skips = self.global_rank == 1 and self.global_step == self.skipped
        return None if skips else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*returned `None`")
@pytest.mark.parametrize("skipped", [0, 3, 5])
def test_a_loss_that_one_rank_alone_skips_ends_all_ranks_with_one_line(skipped):
    module = SkippedOnOne()
    module.skipped = skipped
    began = time.monotonic()
    with pytest.raises(
        ProcessRaisedException, match="returning .?None.? in distributed training is not supported|closed"
    ):
        traces(2, module, seconds=10)
    assert time.monotonic() - began < 120  # PyTorch waits for half an hour
    assert not list(Path().glob("trace*"))


class Pauses(L.Callback):
    """Stops the second rank as a debugger does, for some seconds."""

    def __init__(self, seconds):
        self.seconds = seconds

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 4 and trainer.global_rank == 1:
            pid = os.getpid()
            if os.fork() == 0:
                time.sleep(self.seconds)
                os.kill(pid, signal.SIGCONT)
                os._exit(0)
            os.kill(pid, signal.SIGSTOP)


@pytest.mark.parametrize("seconds", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_rank_that_is_stopped_for_a_while_goes_on_as_if_it_had_not(seconds):
    plan = [(i % len(LOSSES), 4, "") for i in range(24)]
    torch.manual_seed(0)
    expected = traces(2, Random(plan, "adamw"))
    torch.manual_seed(0)
    began = time.monotonic()
    assert traces(2, Random(plan, "adamw"), Pauses(seconds)) == expected
    assert time.monotonic() - began > seconds
    assert expected[0] == expected[1]


class Dies(L.Callback):
    """Kills the second rank in a step."""

    def on_before_optimizer_step(self, trainer, *_):
        if trainer.global_step == 5 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_that_is_killed_ends_the_others_with_a_message():
    began = time.monotonic()
    with pytest.raises(Exception, match="SIGKILL|Connection closed|Timed out"):
        traces(2, Classifier(), Dies(), seconds=10)
    assert time.monotonic() - began < 120  # PyTorch waits for half an hour


class Validated(Slices):
    """With a short validation."""

    def val_dataloader(self):
        return DeviceLoader(*examples(count=8).tensors, 4, lambda batch, _: batch)


class Slow(Classifier):
    """Takes a while, and counts its validations."""

    validations = 0

    def training_step(self, batch, batch_idx):
        time.sleep(0.05)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.validations += 1

    def on_train_end(self):
        Path(f"validations{self.global_rank}").write_text(str(self.validations))


@pytest.mark.parametrize("interval", [timedelta(seconds=0.2), "00:00:00:01"])
def test_ranks_agree_with_validations_by_the_clock(interval):
    clock = {"val_check_interval": interval, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    run = trainer(LipschitzLR(), Trace(), devices=2, max_epochs=6, strategy=strategy(), **clock)
    torch.manual_seed(0)
    run.fit(Slow(), datamodule=Validated(8))
    first, second = (torch.load(f"trace{rank}.pt") for rank in range(2))
    assert first == second
    assert len(first[1]) == 6 * STEPS_OF_AN_EPOCH
    assert all(int(Path(f"validations{rank}").read_text()) >= 1 for rank in range(2))
