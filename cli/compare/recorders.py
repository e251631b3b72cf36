"""The callbacks of a run of `lit-lipschitz compare`: one fixes the rate, one records what the run comes to."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer

from lit_lipschitz.callbacks.lipschitz_lr import LipschitzLR
from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.optim.lr_writer import LRWriter

_LOWER = ("loss", "err", "mse", "mae", "perplexity", "nll")


@dataclass(frozen=True)
class Metric:
    """What policies are compared by.

    Attributes:
        name: What follows ``val_`` or ``test_``.
        separator: What stands between.
    """

    name: str
    separator: str = "_"

    @property
    def lower(self) -> bool:
        """Whether lower values are better, going by the name."""
        return any(part in self.name.lower() for part in _LOWER)

    def of(self, stage: Literal["val", "test"], values: Mapping[str, Any]) -> float | None:
        """The value of a stage among those that were logged; None if it is not among them."""
        value = values.get(f"{stage}{self.separator}{self.name}")
        return None if value is None else float(value)

    def better(self, one: float, other: float) -> bool:
        """Whether a value is better than another; one that is not finite is not, and any other is better than it."""
        if not (math.isfinite(one) and math.isfinite(other)):
            return math.isfinite(one) and not math.isfinite(other)
        return one < other if self.lower else one > other


def find_metric(wanted: str | None, values: Mapping[str, Any]) -> Metric:
    """The metric of a name, or else the accuracy or the loss.

    Args:
        wanted: The name, with or without the stage; None chooses.
        values: What a validation has logged.

    Raises:
        ConfigurationError: It is not there.
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


class FixedRate(L.Callback):
    """Has an optimizer make its steps at a fixed rate, times the factor of its scheduler, as LipschitzLR does at 1/L.

    Args:
        rate: The rate of the first parameter group at a factor of 1.
        positions: Of the optimizers; ``"auto"`` is the only one.
    """

    def __init__(self, rate: float, positions: Literal["auto"] | Sequence[int] = "auto") -> None:
        self._rate, self._positions = rate, positions
        self._writers: list[LRWriter] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Attaches to the optimizers."""
        count = len(trainer.optimizers)
        positions = [0] if self._positions == "auto" else self._positions
        if (self._positions == "auto" and count != 1) or max(map(int, positions)) >= count:
            raise ConfigurationError(
                f"compare: configure_optimizers of {type(pl_module).__name__} returned {count} optimizers; pass "
                "--lipschitz.optimizers with the positions of those to set the rates of, from 0 on"
            )
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        keep = any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks)
        for optimizer in (trainer.optimizers[int(position)] for position in positions):
            own = [one.scheduler for one in trainer.lr_scheduler_configs if one.scheduler.optimizer is optimizer]
            writer = LRWriter(optimizer, own, keep_scheduled=keep)
            if writer.reference == self._rate:
                writer.close()  # it is what the optimizer and its schedulers do by themselves, to the last bit
            else:
                self._writers.append(writer)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Writes the rate."""
        for writer in self._writers:
            if writer.optimizer is optimizer:
                writer.write(self._rate)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Takes the hooks off."""
        for writer in self._writers:
            writer.close()
        self._writers = []


class Recorder(L.Callback):
    """Records what a run comes to, and ends one that has no finite weights left.

    Args:
        wanted: The metric's name; None is the accuracy, or else the loss.
        rate: The rate where it is fixed; None asks LipschitzLR.
    """

    def __init__(self, wanted: str | None, rate: float | None) -> None:
        self.metric: Metric | None = None
        self.best, self.best_epoch, self.epochs = math.nan, 0, 0
        self.rates: tuple[float, float] | None = None
        self.seconds, self.diverged = 0.0, False
        self._wanted, self._rate, self._start = wanted, rate, 0.0
        self._odd: Tensor | None = None  # whether a loss of this epoch was not finite, on the device

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self._start = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks at the loss, without waiting for the device, and at the rate."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            odd = ~torch.isfinite(loss.detach()).all()
            self._odd = odd if self._odd is None else self._odd | odd
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        ours = next((callback for callback in callbacks if isinstance(callback, LipschitzLR)), None)
        rate = ours.rate if ours is not None else self._rate
        if rate is not None:
            self.rates = (self.rates[0] if self.rates else rate, rate)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes the epoch's value."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self.metric = self.metric or find_metric(self._wanted, trainer.callback_metrics)
        value = self.metric.of("val", trainer.callback_metrics)
        if value is not None and self.metric.better(value, self.best):
            self.best, self.best_epoch = value, trainer.current_epoch + 1

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks at the epoch's losses, and at the weights where one was not finite.

        Raises:
            ConfigurationError: The first epoch has ended without a validation.
        """
        if self.metric is None and trainer.check_val_every_n_epoch == 1:
            raise ConfigurationError(no_validation(pl_module))
        self.epochs = trainer.current_epoch + 1
        self.diverged = self.diverged or (self._odd is not None and bool(self._odd))
        # A GradScaler survives a loss that is not finite, so the loss alone ends nothing.
        if self.diverged and not all(bool(p.isfinite().all()) for p in pl_module.parameters()):
            trainer.should_stop = True

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops the clock."""
        self.seconds = time.monotonic() - self._start


def no_validation(model: L.LightningModule) -> str:
    """What to do where there is nothing to choose by."""
    return (
        f"compare chooses by the validation set, and {type(model).__name__} and its data have none; give them one, "
        "such as by --data.val_split 0.1"
    )
