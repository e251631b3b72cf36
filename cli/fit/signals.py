"""Saves a checkpoint that a run can resume from bit for bit when SIGINT or SIGTERM ends it, and at its end."""

import signal
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_lipschitz.cli.fit.callbacks import find_callback
from lit_lipschitz.cli.output import relative

_SYNC_EVERY = 16
"""Optimizer steps between the reductions by which several ranks learn of each other's signals."""


class CheckpointOnSignal(L.Callback):
    """On SIGTERM or SIGINT, saves ``last.ckpt`` after the current optimizer step and ends the run.

    A validation that is running, or that follows this step, is finished first, together with the first step after it.
    A second SIGINT ends the run at once. On several ranks a signal to one of them is enough; they exchange signals by
    one reduction every 16 steps.
    """

    def __init__(self) -> None:
        self._received = 0  # the signal of this rank, or 0
        self._agreed = 0  # the signal that all ranks know of, or 0
        self._steps_since = 0  # optimizer steps since they have agreed on it
        self._first_step = self._last_sync = self._last_save = 0  # global steps
        self._handlers: dict[int, Any] = {}  # the handlers before this callback's

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Replaces Lightning's handlers, which end a run without a checkpoint."""
        self._received = signal.SIGTERM if trainer.received_sigterm else 0
        self._first_step = self._last_sync = trainer.global_step
        for number in (signal.SIGTERM, signal.SIGINT):
            # A shell makes its background processes ignore SIGINT.
            if signal.getsignal(number) != signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self._received:
            raise KeyboardInterrupt
        self._received = number

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Counts the epoch that Lightning misses when it resumes from a checkpoint of an epoch's last batch.

        Otherwise it takes the next checkpoint in the middle of an epoch for one of its end.
        """
        progress = trainer.fit_loop.epoch_progress
        if progress.current.ready == progress.current.processed:  # type: ignore[attr-defined]
            progress.increment_ready()
            progress.increment_started()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends the run at the first step from which it can resume bit for bit."""
        if not _ends_step(trainer, batch_idx):
            return
        if not self._agreed and (trainer.world_size == 1 or trainer.global_step - self._last_sync >= _SYNC_EVERY):
            self._agreed = self._sync(trainer)
        if self._agreed:
            self._steps_since += 1
            # Where each step is followed by a validation there is no better one.
            if _resumable_after(trainer, batch_idx) or self._steps_since > 2:
                self._end(trainer, self._agreed)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notes the step of the newest checkpoint."""
        self._last_save = trainer.global_step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends a run that got a signal in its last step; else makes sure that ``last.ckpt`` is of the last step."""
        if number := self._sync(trainer):
            self._end(trainer, number)
        checkpoints = find_callback(trainer, ModelCheckpoint)
        if checkpoints and checkpoints.save_last and trainer.global_step > max(self._first_step, self._last_save):
            save_last(trainer)
        self._restore_handlers()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restores the handlers."""
        self._restore_handlers()

    def _sync(self, trainer: L.Trainer) -> int:
        """The signal that any rank has received, or 0."""
        if trainer.world_size == 1:
            return self._received
        self._last_sync = trainer.global_step
        number = torch.tensor(float(self._received), device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(number, reduce_op="max"))

    def _end(self, trainer: L.Trainer, number: int) -> None:
        path = save_last(trainer)
        if trainer.is_global_zero:
            saved = (
                f"saved {relative(path)}, resume with --ckpt_path last"
                if path
                else "checkpoints are off, nothing is saved"
            )
            name = signal.Signals(number).name
            print(f"lit-lipschitz: {name} after step {trainer.global_step}: {saved}", file=sys.stderr, flush=True)
        raise SIGTERMException if number == signal.SIGTERM else KeyboardInterrupt


def save_last(trainer: L.Trainer) -> str | None:
    """Saves the state between two steps as the run's last checkpoint; all ranks call it.

    Returns:
        Its path, or None for a run without checkpoints.
    """
    checkpoints = find_callback(trainer, ModelCheckpoint)
    if checkpoints is None or checkpoints.dirpath is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    # Like ModelCheckpoint, this never overwrites another run's file.
    path, version = checkpoints.last_model_path, 0
    while not path or (Path(path).exists() and path != checkpoints.last_model_path):
        name = checkpoints.CHECKPOINT_NAME_LAST
        path = checkpoints.format_checkpoint_name(trainer.callback_metrics, name, ver=version or None)
        version += 1
    checkpoints.last_model_path = path = trainer.strategy.broadcast(path)  # part of the state that is saved
    trainer.save_checkpoint(path)
    return path


def _ends_step(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether a batch completes an optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


def _resumable_after(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether a run saved after this batch resumes bit for bit: Lightning skips a validation that is due then."""
    interval: Any = getattr(trainer, "val_check_batch", None)
    last = trainer.is_last_batch and trainer.num_training_batches > 1
    count = trainer.fit_loop.total_batch_idx if trainer.check_val_every_n_epoch is None else batch_idx
    validates = bool(interval) and interval not in (1, float("inf")) and (count + 1) % interval == 0
    return not last and not validates
