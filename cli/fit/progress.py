"""What fit shows while it runs and when it ends: a bar, a line an epoch, a table; or nothing; or JSON."""

import json
import math
import sys
import time
from typing import IO, Any, Literal

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme

from lit_lipschitz.callbacks.lipschitz_lr import LipschitzLR

Mode = Literal["lines", "quiet", "json"]
_METRICS = ("train_loss", "train_acc", "val_loss", "val_acc")
_SHORT = {"constant": "L", "activation_norm": "K_z", "weight_norm": "W", "seconds": "s"}


class RateBar(RichProgressBar):
    """A progress bar on stderr with the rate, the loss of the last step, and the metrics of the last epoch."""

    def __init__(self) -> None:
        super().__init__(
            theme=RichProgressBarTheme(metrics_text_delimiter="  "),
            console_kwargs={"stderr": True},
        )
        self._loss: Any = None
        self._shown: dict[str, Any] = {}
        self._when = -math.inf

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the loss, on the device."""
        self._loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _get_train_description(self, current_epoch: int) -> str:
        """Epochs count from 1, as in the lines."""
        epochs = self.trainer.max_epochs
        return f"epoch {current_epoch + 1}{f'/{epochs}' if (epochs or -1) > 0 else ''} "

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The values as text; read from the device five times a second at most."""
        now = time.monotonic()
        if now - self._when < 0.2 and trainer.training and not trainer.is_last_batch:
            return self._shown
        self._when = now
        found = super().get_metrics(trainer, pl_module)
        found.pop("v_num", None)
        ours = _callback(trainer)
        if ours is not None:
            found = {name: value for name, value in found.items() if not name.startswith("lipschitz/")}
        rates = {} if ours is None else {"rate": ours.rate, "lr": ours.lr}
        values = {**rates, "loss": self._loss, **found}
        self._shown = {name: _text(name, float(value)) for name, value in values.items() if _is_number(value)}
        return self._shown


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError, RuntimeError):
        return False
    return True


def _text(name: str, value: float) -> str:
    """A value in few characters: accuracies and losses with 4 decimals, what spans decades with 4 digits."""
    kind = name.rpartition("_")[2]
    return f"{value:.4f}" if kind in ("loss", "acc", "accuracy") and abs(value) < 1e4 else f"{value:.4g}"


class EpochLines(L.Callback):
    """Keeps what an epoch came to, and prints it: as a line and at the end as a table, or as JSON, or not.

    Args:
        mode: ``"lines"``; ``"json"``, an object an epoch and one at the end; ``"quiet"``, the final result alone.
    """

    def __init__(self, mode: Mode = "lines") -> None:
        self.mode: Mode = mode
        self.rows: list[dict[str, Any]] = []
        self._began: float | None = None  # the run, here
        self._start: float | None = None  # the epoch
        self._steps = 0  # batches of the epoch, here
        self._caps: list[str] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self.rows, self._start, self._steps, self._caps = [], None, 0, []
        self._began = time.monotonic()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the epoch's clock."""
        self._start = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes which limit of the rate binds."""
        self._steps += 1
        ours = _callback(trainer)
        for controller in ours.controllers.values() if ours else ():
            cap = controller.decision.cap if controller.decision else ""
            if cap and cap not in self._caps:
                self._caps.append(cap)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the epoch, on rank 0."""
        start, steps, caps = self._start, self._steps, self._caps
        self._start, self._steps, self._caps = None, 0, []
        # Each rank reads them, since that makes the ranks' means one by a reduction.
        metrics = dict(trainer.callback_metrics)
        # A run that is resumed between the last step of an epoch and its end has nothing to tell of it.
        if not trainer.is_global_zero or not steps:
            return
        row: dict[str, Any] = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step, **_rates(trainer)}
        row["caps"] = caps
        for name, value in metrics.items():
            # The means over the rest of an epoch are not those of the epoch.
            if not name.startswith(("lipschitz/", "audit/")) and (start is not None or not name.startswith("train")):
                row[name] = float(value)
        row["seconds"] = time.monotonic() - (start or self._began or time.monotonic())
        self.rows.append(row)
        if self.mode == "json":
            _print_json({"event": "epoch", "epochs": trainer.max_epochs, **row})
        elif self.mode == "lines":
            _print(line(row, trainer.max_epochs))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Tells a reader of JSON that no more epochs come."""
        if self.mode == "json" and trainer.is_global_zero and self._began is not None:
            ended = isinstance(exception, (KeyboardInterrupt, SystemExit))
            self._end(trainer, "interrupted" if ended else "failed", {})

    def print_table(self) -> None:
        """Prints the table of the epochs, where there are lines."""
        if self.mode == "lines" and self.rows:
            _print("\n".join(["", *table(self.rows), ""]))

    def print_result(self, trainer: L.Trainer, results: dict[str, float]) -> None:
        """Prints the outcome of a run that has come to its end.

        Args:
            trainer: The trainer.
            results: The metrics of the test, if there was one.
        """
        if self.mode == "json":
            self._end(trainer, "finished", results)
        elif results:
            _print("  ".join(f"{name} {value:.4f}" for name, value in results.items()))
        elif self.mode == "quiet" and self.rows:
            _print(line(self.rows[-1], trainer.max_epochs))

    def _end(self, trainer: L.Trainer, status: str, results: dict[str, float]) -> None:
        checkpoint = getattr(trainer.checkpoint_callback, "last_model_path", "") or None
        seconds = time.monotonic() - (self._began or time.monotonic())
        end = {"event": "end", "status": status, "epochs": len(self.rows), "step": trainer.global_step, **results}
        _print_json({**end, "checkpoint": checkpoint, "seconds": seconds})


def _callback(trainer: L.Trainer) -> LipschitzLR | None:
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, LipschitzLR)), None)


def _rates(trainer: L.Trainer) -> dict[str, float]:
    """The rate, what the schedule made of it, and what it was computed from; what there is of it."""
    ours = _callback(trainer)
    if ours is None:
        return {"lr": float(trainer.optimizers[0].param_groups[0]["lr"])} if trainer.optimizers else {}
    decision = next((one.decision for one in ours.controllers.values()), None)
    if decision is None or ours.lr is None:
        return {}
    sizes = {name: getattr(decision, name) for name in ("constant", "activation_norm", "weight_norm")}
    return {"rate": decision.lr, "lr": ours.lr, **{name: size for name, size in sizes.items() if size}}


def line(row: dict[str, Any], epochs: int | None) -> str:
    """An epoch for people: the rate, the rate times the schedule's factor, losses, accuracies, seconds."""
    total = epochs if (epochs or -1) > 0 else "?"
    parts = [f"epoch {row['epoch']:>{len(str(total))}}/{total}"]
    rates = [f"{name} {row[name]:<9.4g}" for name in ("rate", "lr") if name in row]
    parts += [" ".join(rates)] if rates else []
    parts += [f"{name} {row[name]:.4f}" for name in _METRICS if name in row]
    parts += [f"{cap} binds" for cap in row["caps"]]
    return "  ".join([*parts, f"{row['seconds']:.1f} s"])


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The epochs as the lines of a table; columns that nothing is known of are left out."""
    names = ["epoch", "rate", "lr", "constant", "activation_norm", "weight_norm", *_METRICS]
    others = [name for row in rows for name in row if name not in (*names, "step", "caps", "seconds")]
    names = [name for name in (*names, *dict.fromkeys(others[:4]), "seconds") if any(name in row for row in rows)]
    cells = [[_SHORT.get(name, name) for name in names]]
    for row in rows:
        cells.append([_cell(name, row.get(name)) for name in names])
    capped = any(row["caps"] for row in rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(["", *(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))]) for line in cells]
    notes = ["cap", *(", ".join(row["caps"]) for row in rows)] if capped else [""] * len(lines)
    return [f"{one}  {note}".rstrip() for one, note in zip(lines, notes, strict=True)]


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if name == "epoch" else f"{value:.1f}" if name == "seconds" else _text(name, value)


def _print(text: str) -> None:
    """Prints on stdout, which rich takes for its own while a bar is shown on stderr."""
    stream: IO[str] = sys.stdout
    behind = getattr(stream, "rich_proxied_file", None)
    print(text, file=stream if behind is None or behind.isatty() else behind, flush=True)


def _print_json(content: dict[str, Any]) -> None:
    """An object in a line, in which numbers that are not finite are null, as JSON has none."""
    plain = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in content.items()
    }
    _print(json.dumps(plain))
