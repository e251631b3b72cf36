"""Runs that are resumed from every way to save a checkpoint have the rates and weights of a run that never saved."""

import logging
import math
import os
import signal
import time
from datetime import timedelta
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from helpers import CLASSES, OPTIMIZERS, Classifier, Keep, Slices, examples, ranks, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops import evaluation_loop, fit_loop, training_epoch_loop
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.nn import functional as F

from lit_lipschitz import LipschitzLR
from lit_lipschitz.cli.fit.signals import CheckpointOnSignal
from lit_lipschitz.data import DeviceLoader

EPOCHS, BATCHES = 3, 12  # batches of 4 examples on two ranks, of 8 on one


class Uneven(Classifier):
    """Ranks that measure different things: the largest batch, a loss of another kind, one that is not finite."""

    def training_step(self, batch, batch_idx):
        time.sleep(0.004)
        rank = self.global_rank
        loss = F.cross_entropy(self.net(batch[0] * (5.0 if rank == 1 and batch_idx == 1 else 1.0)), batch[1])
        if rank == 1 and batch_idx in (4, 5):
            loss = 2 * loss
        if self.current_epoch == 1 and rank == self.trainer.world_size - 1 and batch_idx == 4:
            loss = loss + math.nan  # whose gradients are finite
        return loss

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])


class UnevenSquares(Uneven):
    """A squared error, whose residuals add up on each rank; with noise, so that the rate is damped."""

    def training_step(self, batch, batch_idx):
        time.sleep(0.004)
        targets = F.one_hot(batch[1], CLASSES) + batch[0].sum(dim=1, keepdim=True).mul(1e4).sin()
        return F.mse_loss(self.net(batch[0]), targets * (3.0 if self.global_rank == 1 else 1.0))


class Clock(L.Callback):
    """The clock of Lightning's validations, which goes on by a second with each batch."""

    def __init__(self, monkeypatch):
        self.now = 0
        for loop in (fit_loop, training_epoch_loop, evaluation_loop):
            monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: self.now))

    def on_train_batch_start(self, *_):
        self.now += 1


class Validated(Slices):
    """With a short validation."""

    def val_dataloader(self):
        return DeviceLoader(*examples(count=8).tensors, 4, lambda batch, _: batch)


KINDS = {"classes": (Uneven, "momentum"), "squares": (UnevenSquares, "adamw")}


def fit(kind, count, *more, path=None, **settings):
    """The rates and weights of each rank."""
    torch.manual_seed(1)
    module, optimizer = KINDS[kind]
    settings = {"max_epochs": EPOCHS, "num_sanity_val_steps": 0, "enable_checkpointing": True, **settings}
    if not any(isinstance(one, ModelCheckpoint) for one in more):
        settings["enable_checkpointing"] = False
    if count == 1:
        settings["strategy"] = "auto"
    settings["data"] = Validated(8 // count)
    return ranks(count, LipschitzLR(), module(OPTIMIZERS[optimizer]), 8 // count, *more, ckpt_path=path, **settings)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The rates and weights of a run that is not saved, by its kind and the number of ranks."""
    found = {}

    def run(kind, count):
        if (kind, count) not in found:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(tmp_path_factory.mktemp("whole"))
                found[kind, count] = fit(kind, count)
        return found[kind, count]

    return run


class ByHand(L.Callback):
    """Saves at some steps in one hook, as all ranks do together."""

    def __init__(self, hook, *steps):
        self.steps = list(steps)
        setattr(self, hook, self.save)

    def save(self, trainer, *_):
        if self.steps and trainer.global_step >= self.steps[0]:
            self.steps.pop(0)
            trainer.save_checkpoint(f"kept/step={trainer.global_step}.ckpt")


class Stops(L.Callback):
    """Ends the run after a step, by an error or a signal to all ranks."""

    def __init__(self, step, number=0):
        self.step, self.number = step, number

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step and self.number:
            os.kill(os.getpid(), self.number)
        elif trainer.global_step == self.step:
            raise RuntimeError("stopped")


def by_clock(seconds):
    return {"val_check_interval": timedelta(seconds=seconds), "check_val_every_n_epoch": None}


def kept(**settings):
    return ModelCheckpoint("kept", filename="{step}", save_top_k=-1, **settings)


WAYS = {
    "steps": (lambda: kept(every_n_train_steps=5), {}),
    "epochs": (lambda: kept(every_n_epochs=1), {}),
    "ends of training epochs": (lambda: kept(save_on_train_epoch_end=True), {}),
    "time": (lambda: kept(train_time_interval=timedelta(seconds=0.05)), {}),
    "validations": (lambda: kept(), {"val_check_interval": 5}),
    "validations across epochs": (lambda: kept(), {"val_check_interval": 7, "check_val_every_n_epoch": None}),
    "validations by the clock": (lambda: kept(), by_clock(5)),
    "by hand after a step": (lambda: ByHand("on_train_batch_end", 6, 17), {}),
    "by hand in a validation": (lambda: ByHand("on_validation_batch_end", 6, 17), {"val_check_interval": 5}),
    "by hand at the end": (lambda: ByHand("on_train_epoch_end", 6, 17), {}),
}  # fmt: skip


def steps_kept():
    return sorted((int(path.stem.split("=")[1]), str(path)) for path in Path("kept").glob("*.ckpt"))


def assert_same(found, whole, step):
    for after, before in zip(found, whole, strict=True):
        assert after["rates"] == before["rates"][step:]
        assert all(torch.equal(a, b) for a, b in zip(after["weights"], before["weights"], strict=True))


NONFINITE = "ignore:LipschitzLR. a non-finite loss in step"
FAST = {("squares", way) for way in ("time", "validations across epochs")} | {("classes", way) for way in WAYS}


def cases():
    """Both kinds of losses, each way to save, one and two ranks."""
    for kind, way, count in product(KINDS, WAYS, (1, 2)):
        if (way, count) != ("validations by the clock", 2):  # Lightning has each rank go by its own clock
            marks = [] if count == 1 or (kind, way) in FAST else [pytest.mark.slow]
            yield pytest.param(kind, way, count, marks=marks, id=f"{kind}, {way}, {count} ranks")


@pytest.mark.filterwarnings(NONFINITE)
@pytest.mark.parametrize(("kind", "way", "count"), list(cases()))
def test_a_resumed_run_is_the_run_that_never_saved(kind, way, count, undisturbed, monkeypatch):
    make, settings = WAYS[way]
    whole = undisturbed(kind, count)
    assert len(whole[0]["rates"]) == EPOCHS * BATCHES
    clock = Clock(monkeypatch)
    assert_same(fit(kind, count, make(), clock, **settings), whole, 0)
    saved = [one for one in steps_kept() if one[0] < EPOCHS * BATCHES]
    for step, path in {saved[0], saved[-1]}:
        assert_same(fit(kind, count, clock, path=path, **settings), whole, step)


@pytest.mark.filterwarnings(NONFINITE)
@pytest.mark.parametrize("more", [[CheckpointOnSignal], []], ids=["the command's", "Lightning's"])
def test_a_run_that_a_signal_has_ended_is_resumed_exactly(more, undisturbed):
    """On several ranks the command is tested: Lightning waits for ever for a forked rank that SIGTERM ends."""
    saving = kept(every_n_train_steps=100, save_last=True, save_on_exception=True)
    with pytest.raises(SystemExit):
        fit("classes", 1, *(make() for make in more), Stops(17, signal.SIGTERM), saving)
    step = torch.load("kept/last.ckpt", weights_only=True)["global_step"]
    assert 17 <= step < 20
    assert_same(fit("classes", 1, path="kept/last.ckpt"), undisturbed("classes", 1), step)


@pytest.mark.filterwarnings(NONFINITE)
def test_a_run_that_an_error_has_ended_after_a_step_is_resumed_exactly(undisturbed):
    with pytest.raises(RuntimeError, match="stopped"):
        fit("classes", 1, Stops(17), kept(save_on_exception=True))
    assert_same(fit("classes", 1, path="kept/step=17.ckpt"), undisturbed("classes", 1), 17)


@pytest.fixture
def said():
    """Counts what all ranks of the runs in a test have said."""
    handler, root = logging.FileHandler("said.txt"), logging.getLogger("lightning.pytorch")
    root.addHandler(handler)
    level = root.level
    root.setLevel(logging.INFO)
    yield lambda words: Path("said.txt").read_text().count(words)
    root.removeHandler(handler)
    root.setLevel(level)
    handler.close()


class SavesAfterAnError(L.Callback):
    """What Lightning does where an error ends a rank that torchrun or a command has started."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 17:
            trainer.callbacks[0].on_exception(trainer, pl_module, RuntimeError())
            trainer.save_checkpoint("kept/step=17.ckpt")
            raise RuntimeError("stopped")


@pytest.mark.filterwarnings(NONFINITE)
def test_a_rank_that_saves_after_an_error_asks_nothing_of_the_others_and_the_resumed_run_says_so(said):
    with pytest.raises(ProcessRaisedException, match="stopped"):
        fit("classes", 2, SavesAfterAnError())
    found = fit("classes", 2, path="kept/step=17.ckpt")
    assert said("was saved by one of 2 ranks alone") == 1
    assert_same(found[1:], found[:1], 0)


@pytest.mark.filterwarnings(NONFINITE)
@pytest.mark.parametrize(
    ("hook", "accumulated", "times"),
    [
        ("on_train_epoch_start", 1, 1),
        ("on_train_batch_start", 1, 1),
        ("on_before_backward", 1, 1),
        ("on_before_optimizer_step", 1, 1),
        ("on_train_batch_end", 5, 1),  # after every batch, gradients of four are in no checkpoint
        ("on_train_batch_end", 1, 0),
        ("on_validation_end", 1, 0),
        ("on_train_epoch_end", 1, 0),
        ("on_train_end", 1, 0),
    ],
)
def test_a_checkpoint_within_a_step_which_lightning_does_not_resume_exactly_says_so(hook, accumulated, times, said):
    fit("classes", 1, ByHand(hook, 0, 0, 0, 0), accumulate_grad_batches=accumulated)
    assert len(steps_kept()) >= 1
    assert said("is saved within an optimizer step") == times


@pytest.mark.filterwarnings(NONFINITE)
@pytest.mark.parametrize(("seconds", "times"), [(5, 0), (6, 1)])  # the epochs end after 12 and 24
def test_a_checkpoint_of_a_validation_by_the_clock_at_the_end_of_an_epoch_says_so(seconds, times, said, monkeypatch):
    settings = by_clock(seconds)
    fit("classes", 1, kept(), Clock(monkeypatch), **settings)
    assert said("in a validation by the clock after the last batch of an epoch") == times
    for step, path in steps_kept()[:-1]:
        resumed = fit("classes", 1, Clock(monkeypatch), path=path, **settings)
        assert len(resumed[0]["rates"]) == EPOCHS * BATCHES - step + (step % BATCHES == 0)  # Lightning adds a batch


@pytest.mark.filterwarnings(NONFINITE)
@pytest.mark.parametrize("step", [3, 12, 17])
@pytest.mark.parametrize("update", ["epoch", 3])
def test_a_callback_that_is_told_of_the_end_of_a_batch_first_saves_what_comes_of_it(step, update):
    def rates(*before, path=None):
        torch.manual_seed(1)
        module = Uneven(OPTIMIZERS["momentum"])
        recorder = Keep()
        run = trainer(*before, LipschitzLR(update=update), recorder, max_epochs=EPOCHS)
        run.fit(module, datamodule=Slices(8), ckpt_path=path)
        return recorder.rates

    whole = rates(ByHand("on_train_batch_end", step))
    assert rates(path=f"kept/step={step}.ckpt") == whole[step:]
