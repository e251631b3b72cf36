"""Callbacks that fast.py and full_size.py add to the command: times of a run, and its curve on the test set."""

import csv
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from figures import device_name
from rows import add_row
from torch.nn import functional as F

from lit_lipschitz import LipschitzLR

COLUMNS = ("epoch", "step", "rate", "lr", "train_loss", "test_loss", "test_acc", "seconds")


def _finish(device: torch.device) -> float:
    """The time after a synchronisation of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Stopwatch(L.Callback):
    """Writes the times of a run as JSON: first step, training, and training with the test.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.begin: float | None = None
        self.first: float | None = None
        self.trained = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock, before the first batch is made."""
        if self.begin is None:
            self.begin = _finish(pl_module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Records the time of the first step."""
        if self.first is None:
            self.first = _finish(pl_module.device)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Records the time of the training."""
        self.trained = _finish(pl_module.device)
        self._write(pl_module.device, self.trained)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Records the time of training and test."""
        self._write(pl_module.device, _finish(pl_module.device))

    def _write(self, device: torch.device, end: float) -> None:
        assert self.begin is not None
        assert self.first is not None
        found = {
            "seconds": end - self.begin,
            "train_seconds": self.trained - self.begin,
            "first_step_seconds": self.first - self.begin,
            "device": device_name(device),
        }
        self.path.write_text(json.dumps(found))


class Curve(L.Callback):
    """Writes a line an epoch into a CSV file, the loss and the accuracy on the test set among them.

    A run that resumes in mid-epoch has the training loss and the seconds of the whole epoch. An epoch that a kill
    has undone is written again; the last line of an epoch counts. A second file, ending in ``.jsonl``, has a line for
    each start and resume of the run, with the device.

    Args:
        path: The CSV file.
        stop_after: Send SIGTERM to this process after so many training batches; 0 is never.
    """

    def __init__(self, path: str, stop_after: int = 0) -> None:
        self.path, self.stop_after = Path(path), stop_after
        self._loss: Any = 0.0  # of the epoch so far, on the device
        self._count, self._seconds, self._batches = 0, 0.0, 0
        self._mark = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Records the step and the device at which the run starts or resumes."""
        self._mark = time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        start = {"step": trainer.global_step, "device": device_name(pl_module.device)}
        add_row(self.path.with_suffix(".jsonl"), start)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds up the loss."""
        self._loss = self._loss + (outputs["loss"] if isinstance(outputs, dict) else outputs).detach()
        self._count += 1
        self._batches += 1
        if self._batches == self.stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluates on the test set, and writes the line."""
        if not self._count:  # the run resumed after the last step of an epoch that was written
            return
        loss, accuracy = _test(trainer, pl_module)
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        ours = next((one for one in callbacks if isinstance(one, LipschitzLR)), None)
        rate = ours.rate if ours else None
        applied = ours.lr if ours else trainer.optimizers[0].param_groups[0]["lr"]
        values = (trainer.current_epoch + 1, trainer.global_step, rate, applied, float(self._loss) / self._count,
                  loss, accuracy, round(self._elapsed(), 2))  # fmt: skip
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(COLUMNS)
            writer.writerow([_cell(value) for value in values])
            file.flush()
            os.fsync(file.fileno())
        self._loss, self._count, self._seconds = 0.0, 0, 0.0

    def _elapsed(self) -> float:
        """Seconds of this epoch, earlier pieces of it included."""
        now = time.monotonic()
        self._seconds, self._mark = self._seconds + now - self._mark, now
        return self._seconds

    def state_dict(self) -> dict[str, float]:
        """The epoch so far."""
        return {"loss": float(self._loss), "count": self._count, "seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores it."""
        self._loss, self._count, self._seconds = (state_dict[key] for key in ("loss", "count", "seconds"))


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.7g}"


def _test(trainer: L.Trainer, pl_module: L.LightningModule) -> tuple[float, float]:
    """Loss and accuracy on the test set; the state of the training is not changed."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    data.setup("test")
    modes = [(module, module.training) for module in pl_module.modules()]
    pl_module.eval()
    loss = hits = torch.zeros((), device=pl_module.device, dtype=torch.float64)
    count = 0
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        limit = trainer.limit_test_batches
        for position, (images, labels) in enumerate(data.test_dataloader()):
            if isinstance(limit, int) and position == limit:
                break
            logits = pl_module(images)
            loss = loss + F.cross_entropy(logits.float(), labels, reduction="sum")
            hits = hits + (logits.argmax(dim=1) == labels).sum()
            count += len(labels)
    for module, training in modes:
        module.training = training
    return float(loss) / count, float(hits) / count
