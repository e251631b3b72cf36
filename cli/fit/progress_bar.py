"""The progress bar of fit, with the learning rate and the losses."""

import math
import time
from contextlib import suppress
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme

from lit_lipschitz.callbacks.lipschitz_lr import LipschitzLR
from lit_lipschitz.cli.fit.callbacks import find_callback
from lit_lipschitz.cli.fit.epoch_lines import format_value


class RateBar(RichProgressBar):
    """A progress bar on stderr with the rate, the loss of the last step, and the metrics of the last epoch."""

    def __init__(self) -> None:
        super().__init__(theme=RichProgressBarTheme(metrics_text_delimiter="  "), console_kwargs={"stderr": True})
        self._loss: Any = None
        self._shown: dict[str, Any] = {}
        self._updated = -math.inf

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
            logged = {name: value for name, value in values.items() if not name.startswith("lipschitz/")}
            values = {"rate": ours.rate, "lr": ours.lr, **logged}
        self._shown = {}
        for name, value in values.items():
            with suppress(TypeError, ValueError, RuntimeError):  # what is not a number is not shown
                self._shown[name] = format_value(name, float(value))
        return self._shown
