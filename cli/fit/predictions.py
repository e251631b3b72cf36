"""Writes the predictions of `lit-lipschitz predict` to predictions.csv."""

import csv
import io
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from lit_lipschitz.cli.output import free_path, locked, write_whole


class PredictionFile(BasePredictionWriter):
    """Writes predictions.csv: row of the test set, predicted class, its probability, and the true class if known.

    On several ranks each writes a file. An earlier file is kept, and the new one is called predictions-v1.csv,
    predictions-v2.csv, ...
    """

    def __init__(self, write_interval: Literal["epoch"] = "epoch") -> None:
        super().__init__(write_interval)
        self._labels: list[int] = []

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *arguments: Any
    ) -> None:
        """Keeps the labels of a batch that has some."""
        labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
        if isinstance(labels, Tensor) and labels.shape == (len(outputs),) and not labels.is_floating_point():
            self._labels += labels.tolist()
        super().on_predict_batch_end(trainer, pl_module, outputs, batch, *arguments)

    def write_on_epoch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Writes the file, beside an earlier one of that name, and prints where it is."""
        suffix = f"-{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = Path(trainer.default_root_dir) / f"predictions{suffix}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        writer = csv.writer(text)
        labels = self._labels if len(self._labels) == sum(map(len, predictions)) else []
        writer.writerow(["row", "class", "probability", *(["true_class"] if labels else [])])
        row, remaining = trainer.global_rank, iter(labels)
        for batch in predictions:
            assert isinstance(batch, Tensor)
            probabilities, classes = batch.max(dim=1)
            for label, probability in zip(classes.tolist(), probabilities.tolist(), strict=True):
                writer.writerow([row, label, f"{probability:.6f}", *islice(remaining, 1)])
                row += trainer.world_size
        with locked(path):
            target = free_path(path)
            write_whole(target, text.getvalue().encode())
        self._labels = []
        kept = f" ({path.name} exists and is kept)" if target != path else ""
        print(f"predictions: {target}{kept}", flush=True)
