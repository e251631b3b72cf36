"""What the command prints and writes while it runs."""

import csv
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from lit_lipschitz.callback import LipschitzLR


class EpochLines(L.Callback):
    """Prints a line an epoch: the rate, the rate times the schedule's factor, losses, accuracies, seconds."""

    _COLUMNS = ("train_loss", "train_acc", "val_loss", "val_acc")
    _start: float | None = None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self._start = time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the line, on rank 0."""
        # A run that is resumed between the last step of an epoch and its end has not seen it begin, nor its metrics.
        start, self._start = self._start, None
        if start is None or not trainer.is_global_zero:
            return
        epochs = trainer.max_epochs if (trainer.max_epochs or -1) > 0 else "?"
        parts = [f"epoch {trainer.current_epoch + 1:>{len(str(epochs))}}/{epochs}"]
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        ours = next((callback for callback in callbacks if isinstance(callback, LipschitzLR)), None)
        if ours is None and trainer.optimizers:
            parts.append(f"lr {trainer.optimizers[0].param_groups[0]['lr']:<9.4g}")
        elif ours is not None and ours.rate is not None and ours.lr is not None:
            parts.append(f"rate {ours.rate:<9.4g} lr {ours.lr:<9.4g}")
        metrics = trainer.callback_metrics
        parts += [f"{name} {float(metrics[name]):.4f}" for name in self._COLUMNS if name in metrics]
        parts.append(f"{time.monotonic() - start:.1f} s")
        print("  ".join(parts), flush=True)


class PredictionFile(BasePredictionWriter):
    """Writes predictions.csv: row of the test set, predicted class, its probability; a file a rank on several."""

    def __init__(self, write_interval: Literal["epoch"] = "epoch") -> None:
        super().__init__(write_interval)

    def write_on_epoch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Writes the file and says where it is."""
        suffix = f"-{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = Path(trainer.default_root_dir) / f"predictions{suffix}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["row", "class", "probability"])
            row = trainer.global_rank
            for batch in predictions:
                assert isinstance(batch, Tensor)
                probabilities, classes = batch.max(dim=1)
                for label, probability in zip(classes.tolist(), probabilities.tolist(), strict=True):
                    writer.writerow([row, label, f"{probability:.6f}"])
                    row += trainer.world_size
        part.replace(path)
        print(f"predictions: {path}", flush=True)
