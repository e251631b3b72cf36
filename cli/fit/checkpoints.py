"""Checkpoints that are whole or not there, and one at the moment of a signal."""

import io
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_lipschitz.callbacks.lipschitz_lr import LipschitzLR
from lit_lipschitz.errors import LitLipschitzError

AGREE_EVERY = 16
"""Optimizer steps between the moments at which several ranks tell each other of signals."""


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place, has it on the disk, and moves it there; admits tensors and plain values.

    Lightning writes it to the system's folder for temporary files and moves it from there. Between two file systems
    that is a copy, which leaves a part of a checkpoint where a kill or a full disk interrupts it, in place of the one
    that was there; and an error of permissions is passed over in silence.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint.

        Raises:
            LitLipschitzError: It can't be written; what was there before is whole.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        target = Path(path)
        part = target.with_name(f".{target.name}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
            _sync_folder(target.parent)
        except OSError as error:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise LitLipschitzError(
                f"the checkpoint {target} can't be written: {error.strerror or error}; earlier ones are as they were: "
                "make room there or pass --checkpoint.dirpath, and go on with --ckpt_path last"
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint, without running code that is in it unless that is asked for."""
        return super().load_checkpoint(path, map_location, weights_only is not False)


def _sync_folder(folder: Path) -> None:
    """Has a file's new name on the disk, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class CheckpointOnSignal(L.Callback):
    """On SIGTERM or SIGINT, saves ``last.ckpt`` after the optimizer step that is under way, and ends the run.

    A validation that is under way, or that follows upon the step, is finished first, with the first step after it: a
    run that resumes goes on behind it. A second SIGINT ends the run at once. On several ranks it is enough that one of
    them has the signal; they tell each other every 16 steps, which costs one reduction.
    """

    def __init__(self) -> None:
        self._received = 0
        self._first = 0  # the step that the run began after
        self._asked = 0  # the step after which the ranks have last told each other
        self._pending = 0  # the signal that all ranks know of
        self._waited = 0  # steps since then
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes the signals from Lightning, which ends a run without a checkpoint."""
        self._received, self._asked = (signal.SIGTERM if trainer.received_sigterm else 0), trainer.global_step
        self._first = trainer.global_step
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            # A shell has what it runs in the background ignore SIGINT.
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self._received:
            raise KeyboardInterrupt
        self._received = number

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Counts an epoch that Lightning has not counted."""
        # After a checkpoint of an epoch's last batch it does not, and takes the next checkpoint in mid-epoch for one of
        # an epoch's end.
        progress = trainer.fit_loop.epoch_progress
        if progress.current.ready == progress.current.processed:  # type: ignore[attr-defined]
            progress.increment_ready()
            progress.increment_started()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends the run where it can go on from without a difference."""
        if not _steps_after(trainer, batch_idx):
            return
        if not self._pending and (trainer.world_size == 1 or trainer.global_step - self._asked >= AGREE_EVERY):
            self._pending = self._agreed(trainer)
        if self._pending:
            self._waited += 1
            # There may be no such step, as where each is followed by a validation.
            if _between_steps(trainer, batch_idx) or self._waited > 2:
                self._end(trainer, self._pending)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends a run whose last step is over, and saves it where ``last.ckpt`` is older; gives the signals back."""
        if number := self._agreed(trainer):
            self._end(trainer, number)
        callback = _checkpoints(trainer)
        saved = callback is None or not callback.save_last or callback._last_global_step_saved == trainer.global_step
        if not saved and trainer.global_step > self._first:
            save_last(trainer)
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Gives the signals back."""
        self._restore()

    def _agreed(self, trainer: L.Trainer) -> int:
        """The signal that this rank or another one has received, or 0."""
        if trainer.world_size == 1:
            return self._received
        self._asked = trainer.global_step
        number = torch.tensor(float(self._received), device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(number, reduce_op="max"))

    def _end(self, trainer: L.Trainer, number: int) -> None:
        path = save_last(trainer)
        name = signal.Signals(number).name
        if trainer.is_global_zero:
            where = (
                f"saved {path}, --ckpt_path last goes on from there" if path else "nothing is saved without checkpoints"
            )
            print(f"lit-lipschitz: {name} after step {trainer.global_step}: {where}", file=sys.stderr, flush=True)
        raise SIGTERMException if number == signal.SIGTERM else KeyboardInterrupt


def save_last(trainer: L.Trainer) -> str | None:
    """Saves the state between two steps as the run's last checkpoint, on all ranks together.

    Returns:
        Its path, or None for a run without checkpoints.
    """
    callback = _checkpoints(trainer)
    if callback is None or callback.dirpath is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for ours in callbacks:
        if isinstance(ours, LipschitzLR):
            ours.share()
    # As ModelCheckpoint does, another run's file of that name is left alone.
    path, version = callback.last_model_path, 0
    while not path or (Path(path).exists() and path != callback.last_model_path):
        name = callback.CHECKPOINT_NAME_LAST
        path = callback.format_checkpoint_name(trainer.callback_metrics, name, ver=version or None)
        version += 1
    # It is a part of the state that is saved.
    callback.last_model_path = path = trainer.strategy.broadcast(path)
    trainer.save_checkpoint(path)
    return path


def _checkpoints(trainer: L.Trainer) -> ModelCheckpoint | None:
    """The callback that makes the run's checkpoints."""
    return next((one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)), None)


def _steps_after(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether an optimizer step ends with a batch."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


def _between_steps(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether a run that is saved after this batch goes on as if it had not ended.

    It does not among batches that are accumulated, and Lightning leaves out a validation that was still to come.
    """
    interval: Any = getattr(trainer, "val_check_batch", None)
    last = trainer.is_last_batch and trainer.num_training_batches > 1
    count = trainer.fit_loop.total_batch_idx if trainer.check_val_every_n_epoch is None else batch_idx
    validated = bool(interval) and interval not in (1, float("inf")) and (count + 1) % interval == 0
    return _steps_after(trainer, batch_idx) and not last and not validated
