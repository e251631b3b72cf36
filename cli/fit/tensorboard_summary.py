"""Gives TensorBoard a layout of the curves, and the hyperparameters of a run with their results."""

from collections.abc import Iterator
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.tensorboard import summary

from lit_lipschitz.callbacks.lipschitz_lr import LipschitzLR
from lit_lipschitz.cli.fit.callbacks import find_callback

_TRAINER_SETTINGS = ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "precision", "strategy",
                     "devices", "num_nodes")  # fmt: skip


class TensorBoardSummary(L.Callback):
    """Shows rate, lr and constant side by side in TensorBoard, and the hyperparameters with the final metrics.

    Args:
        config: The parsed configuration of fit.
    """

    LAYOUT = {
        "lit-lipschitz": {
            # TensorBoard takes tags as regular expressions; those of several optimizers contain the position.
            name: ["Multiline", [rf"^lipschitz/(\d+/)?{name}$"]]
            for name in ("rate", "lr", "constant")
        }
    }

    def __init__(self, config: dict[str, Any]) -> None:
        self._hyperparameters = hyperparameters(config)
        self._written = False

    @staticmethod
    def _writers(trainer: L.Trainer) -> list[Any]:
        loggers = trainer.loggers if trainer.is_global_zero else []
        return [logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger)]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the layout of the tab of custom scalars."""
        if find_callback(trainer, LipschitzLR):
            for writer in self._writers(trainer):
                writer.add_custom_scalars(self.LAYOUT)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the hyperparameters and the names of the metrics, whose last values TensorBoard shows with them."""
        if self._written or not trainer.global_step:  # TensorBoard keeps the first ones of a run
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


def hyperparameters(config: dict[str, Any]) -> dict[str, bool | int | float | str]:
    """The settings that tell one run from another, under the names of the options; without those that are not set.

    Args:
        config: The parsed configuration of fit.
    """
    names = ["seed_everything", "fixed_rate", "data", "model", *([] if config["fixed_rate"] else ["lipschitz"])]
    chosen = {name: config.get(name) for name in names}
    chosen["trainer"] = {name: config["trainer"].get(name) for name in _TRAINER_SETTINGS}
    return {key: value for name in chosen for key, value in _leaves(name, chosen[name])}


def _leaves(name: str, value: Any) -> Iterator[tuple[str, bool | int | float | str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            # A class is named under its own option, as on the command line.
            yield from _leaves(name if key in ("class_path", "init_args") else f"{name}.{key}", inner)
    elif value is not None:
        yield name, value if isinstance(value, (bool, int, float, str)) else str(value)
