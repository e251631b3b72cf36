"""A callback that records the results of a run of `lit-lipschitz compare`: its metric, rates and time."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lit_lipschitz.callbacks.lipschitz_lr import LipschitzLR
from lit_lipschitz.cli.fit.callbacks import find_callback
from lit_lipschitz.errors import ConfigurationError

_LOWER = ("loss", "err", "mse", "mae", "perplexity", "nll")


@dataclass(frozen=True)
class Metric:
    """The metric by which policies are compared."""

    name: str  # without the stage: acc for val_acc
    separator: str = "_"  # between the stage and the name

    @property
    def lower(self) -> bool:
        """Whether lower values are better, judged by the name."""
        return any(part in self.name.lower() for part in _LOWER)

    def of(self, stage: Literal["val", "test"], values: Mapping[str, Any]) -> float | None:
        """The value of a stage among those that were logged, or None."""
        value = values.get(f"{stage}{self.separator}{self.name}")
        return None if value is None else float(value)

    def better(self, one: float, other: float) -> bool:
        """Whether a value is better than another; a finite value is better than one that is not."""
        if not (math.isfinite(one) and math.isfinite(other)):
            return math.isfinite(one) and not math.isfinite(other)
        return one < other if self.lower else one > other


def find_metric(wanted: str | None, values: Mapping[str, Any]) -> Metric:
    """The wanted metric among the values that a validation has logged, or else the accuracy or the loss.

    Raises:
        ConfigurationError: It was not logged.
    """
    names = [name for name in values if name.startswith(("val_", "val/"))]
    for name in ("acc", "loss") if wanted is None else (wanted.removeprefix("val_").removeprefix("val/"),):
        for separator in "_/":
            if f"val{separator}{name}" in names:
                return Metric(name, separator)
    raise ConfigurationError(
        f"compare --metric: the validation logs {', '.join(names) or 'nothing that begins with val_'}, and "
        f"{f'no val_{wanted}' if wanted else 'neither val_acc nor val_loss'}; pass --metric with one of them, or log it"
    )


class Recorder(L.Callback):
    """Records the results of a run, and ends one whose weights are no longer finite.

    Args:
        wanted: The metric's name; None is the accuracy, or else the loss.
        rate: The learning rate if it is fixed; None asks LipschitzLR.
    """

    def __init__(self, wanted: str | None, rate: float | None) -> None:
        self.metric: Metric | None = None
        self.best, self.best_epoch, self.epochs = math.nan, 0, 0
        self.rates: tuple[float, float] | None = None  # of the first and the last step
        self.seconds, self.diverged = 0.0, False
        self._wanted, self._rate, self._start = wanted, rate, 0.0
        self._nonfinite: Tensor | None = None  # whether any loss was not finite, on the device

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self._start = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Checks the loss, without waiting for the device, and notes the rate."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            nonfinite = ~torch.isfinite(loss.detach()).all()
            self._nonfinite = nonfinite if self._nonfinite is None else self._nonfinite | nonfinite
        ours = find_callback(trainer, LipschitzLR)
        rate = ours.rate if ours is not None else self._rate
        if rate is not None:
            self.rates = (self.rates[0] if self.rates else rate, rate)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes the best epoch."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self.metric = self.metric or find_metric(self._wanted, trainer.callback_metrics)
        value = self.metric.of("val", trainer.callback_metrics)
        if value is not None and self.metric.better(value, self.best):
            self.best, self.best_epoch = value, trainer.current_epoch + 1

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends a run that has diverged.

        Raises:
            ConfigurationError: The first epoch has ended without a validation.
        """
        if self.metric is None and trainer.check_val_every_n_epoch == 1:
            raise no_validation(pl_module)
        self.epochs = trainer.current_epoch + 1
        self.diverged = self.diverged or (self._nonfinite is not None and bool(self._nonfinite))
        # With a GradScaler training can go on after a loss that is not finite, so the weights decide.
        if self.diverged and not all(bool(p.isfinite().all()) for p in pl_module.parameters()):
            trainer.should_stop = True

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops the clock."""
        self.seconds = time.monotonic() - self._start


def no_validation(model: L.LightningModule) -> ConfigurationError:
    """The error about a run without a validation set, by which compare chooses."""
    return ConfigurationError(
        f"compare chooses by the validation set, and {type(model).__name__} and its data have none; "
        "add one, for example by --data.val_split 0.1"
    )
