"""What the command prints and writes while it runs."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.tensorboard import summary

from lit_lipschitz.callbacks.lipschitz_lr import LipschitzLR


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


class TensorBoardSummary(L.Callback):
    """Has TensorBoard open with rate, L and K_z side by side, and gives it the hyperparameters with their outcome.

    Args:
        hyperparameters: Names and values.
    """

    LAYOUT = {
        "lit-lipschitz": {
            # TensorBoard takes tags as regular expressions; several optimizers have their positions in them.
            "rate": ["Multiline", [r"^lipschitz/(\d+/)?lr$"]],
            "L": ["Multiline", [r"^lipschitz/(\d+/)?constant$"]],
            "K_z": ["Multiline", [r"^lipschitz/(\d+/)?activation_norm$"]],
        }
    }

    def __init__(self, hyperparameters: dict[str, bool | int | float | str]) -> None:
        self._hyperparameters = hyperparameters
        self._written = False

    @staticmethod
    def _writers(trainer: L.Trainer) -> list[Any]:
        loggers = trainer.loggers if trainer.is_global_zero else []
        return [logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the layout of the tab of custom scalars."""
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, LipschitzLR) for callback in callbacks):
            for writer in self._writers(trainer):
                writer.add_custom_scalars(self.LAYOUT)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the hyperparameters, and which curves' last values are their outcome."""
        # TensorBoard keeps the first ones that it finds in a run.
        if self._written or not trainer.global_step:
            return
        self._written = True
        metrics = [name for name in trainer.callback_metrics if not name.startswith(("lipschitz/", "audit/"))]
        if is_overridden("test_step", pl_module):
            metrics += [f"test_{name[4:]}" for name in metrics if name.startswith("val_")]
        for writer in self._writers(trainer):
            for part in summary.hparams(self._hyperparameters, dict.fromkeys(metrics, 0.0)):  # type: ignore[no-untyped-call]
                writer.file_writer.add_summary(part)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Writes them for a run that was interrupted."""
        self.on_train_end(trainer, pl_module)


_TRAINING = ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "precision", "strategy",
             "devices", "num_nodes")  # fmt: skip


def hyperparameters(config: dict[str, Any]) -> dict[str, bool | int | float | str]:
    """What tells one run from another, under the options' names; without what is not set.

    Args:
        config: The parsed configuration of fit.
    """
    chosen = {key: config.get(key) for key in ("seed_everything", "fixed_rate", "data", "model", "lipschitz")}
    chosen["trainer"] = {key: config["trainer"].get(key) for key in _TRAINING}
    found: dict[str, bool | int | float | str] = {}

    def take(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                # A class's name stands under its own option, as on the command line.
                take(name if key in ("class_path", "init_args") else f"{name}.{key}", inner)
        elif isinstance(value, (bool, int, float, str)):
            found[name] = value
        elif value is not None:
            found[name] = str(value)

    for name, value in chosen.items():
        take(name, value)
    if config.get("fixed_rate"):
        return {name: value for name, value in found.items() if not name.startswith("lipschitz.")}
    return found
