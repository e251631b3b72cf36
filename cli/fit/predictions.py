"""Writes the predictions of `lit-lipschitz predict` to predictions.csv."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from lit_lipschitz.cli.output import free_path, locked, write_whole


class PredictionFile(BasePredictionWriter):
    """Writes predictions.csv: row of the test set, predicted class, its probability; on several ranks a file each.

    An earlier file is kept, and the new one is called predictions-v1.csv, predictions-v2.csv, ...
    """

    def __init__(self, write_interval: Literal["epoch"] = "epoch") -> None:
        super().__init__(write_interval)

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
        writer.writerow(["row", "class", "probability"])
        row = trainer.global_rank
        for batch in predictions:
            assert isinstance(batch, Tensor)
            probabilities, classes = batch.max(dim=1)
            for label, probability in zip(classes.tolist(), probabilities.tolist(), strict=True):
                writer.writerow([row, label, f"{probability:.6f}"])
                row += trainer.world_size
        with locked(path):
            path = free_path(path)
            write_whole(path, text.getvalue().encode())
        print(f"predictions: {path}", flush=True)
