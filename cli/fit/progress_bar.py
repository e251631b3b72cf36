"""The progress bar of fit, with the learning rate and the losses."""

import math
import time
from contextlib import suppress
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import (
    BatchesProcessedColumn,
    MetricsTextColumn,
    RichProgressBarTheme,
)
from rich.progress import BarColumn, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from lit_lipschitz.callbacks.lipschitz_lr import LipschitzLR
from lit_lipschitz.cli.fit.callbacks import find_callback
from lit_lipschitz.cli.fit.epoch_lines import METRICS, format_value


class _OneLine(MetricsTextColumn):
    """Metrics that are cut where the terminal ends."""

    def render(self, task: Any) -> Text:
        """The metrics of a bar."""
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


class RateBar(RichProgressBar):
    """One line on stderr with the rate, the loss of the last step, and, where there is room, a module's own metrics.

    It is removed when it ends: the printed lines are what stays.
    """

    def __init__(self) -> None:
        super().__init__(theme=RichProgressBarTheme(metrics_text_delimiter="  "), console_kwargs={"stderr": True})
        self._loss: Any = None
        self._shown: dict[str, Any] = {}
        self._updated = -math.inf

    def configure_columns(self, trainer: L.Trainer) -> list[ProgressColumn]:
        """The columns before the metrics; a bar and the time only where the terminal has room for them."""
        width = self._console.width if self._console else 80
        columns: list[ProgressColumn] = [
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BatchesProcessedColumn(style=self.theme.batch_progress),
        ]
        columns[1]._table_column = Column(no_wrap=True)
        if width >= 80:
            columns.insert(1, BarColumn(bar_width=min(40, width // 2 - 30)))
        if width >= 100:
            columns.append(TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)))
        return columns

    def _init_progress(self, trainer: L.Trainer) -> None:
        super()._init_progress(trainer)
        if self.progress is not None:
            # rich removes as many lines as it has written, so what does not fit is cut.
            theme = self.theme
            self._metric_component = _OneLine(
                trainer, theme.metrics, theme.metrics_text_delimiter, theme.metrics_format
            )
            self.progress.columns = (*self.progress.columns[:-1], self._metric_component)
            self.progress.live.transient = True

    def on_validation_batch_start(self, trainer: L.Trainer, *arguments: Any) -> None:
        """Shows the validation's bar instead of the epoch's."""
        super().on_validation_batch_start(trainer, *arguments)
        self._show_epoch(False)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shows the epoch's bar again."""
        super().on_validation_end(trainer, pl_module)
        self._show_epoch(True)

    def _show_epoch(self, visible: bool) -> None:
        if self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, visible=visible)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the loss, on the device."""
        self._loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _get_train_description(self, current_epoch: int) -> str:
        """Counts epochs from 1, as the printed lines do."""
        epochs = self.trainer.max_epochs
        return f"epoch {current_epoch + 1}{f'/{epochs}' if (epochs or -1) > 0 else ''} "

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The values as text; read from the device five times a second at most."""
        now = time.monotonic()
        if now - self._updated < 0.2 and trainer.training and not trainer.is_last_batch:
            return self._shown
        self._updated = now
        values: dict[str, Any] = {"loss": self._loss, **super().get_metrics(trainer, pl_module)}
        values.pop("v_num", None)
        if ours := find_callback(trainer, LipschitzLR):
            values = {"rate": ours.rate, "lr": ours.lr, **values}
        self._shown = {}
        for name, value in values.items():
            if name.startswith("lipschitz/") or name in METRICS:  # the epoch's, in the table
                continue
            with suppress(TypeError, ValueError, RuntimeError):  # what is not a number is not shown
                self._shown[name] = format_value(name, float(value))
        return self._shown
