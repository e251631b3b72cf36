"""What fit prints about its epochs: a row of a table each, or JSON, or only the final result."""

import shutil
import sys
import time
from pathlib import Path
from typing import Any, Literal

import lightning as L

from lit_lipschitz.callbacks.lipschitz_lr import LipschitzLR
from lit_lipschitz.cli.fit.callbacks import find_callback
from lit_lipschitz.cli.output import relative, to_json

Mode = Literal["lines", "quiet", "json"]
METRICS = ("train_loss", "train_acc", "val_loss", "val_acc")
_HIDDEN = ("epoch", "step", "caps", "seconds", "constant", "activation_norm", "weight_norm")
"""Values of an epoch that have no column of their name; the last three are curves."""
_WIDTH = 80


class EpochLines(L.Callback):
    """Collects the results of each epoch and prints them.

    Args:
        mode: ``"lines"``, a row of a table an epoch; ``"json"``, one object an epoch and one at the end; ``"quiet"``,
            only the final result.
    """

    def __init__(self, mode: Mode = "lines") -> None:
        self.mode: Mode = mode
        self.rows: list[dict[str, Any]] = []
        self._run_start: float | None = None
        self._epoch_start: float | None = None  # None in an epoch that is resumed
        self._batches = 0
        self._caps: list[str] = []
        self._table = Table()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self.rows, self._epoch_start, self._batches, self._caps = [], None, 0, []
        self._run_start, self._table = time.monotonic(), Table()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the epoch's clock."""
        self._epoch_start = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes which limits of the rate were active."""
        self._batches += 1
        ours = find_callback(trainer, LipschitzLR)
        for controller in ours.controllers.values() if ours else ():
            cap = controller.decision.cap if controller.decision else ""
            if cap and cap not in self._caps:
                self._caps.append(cap)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prints the epoch, on rank 0."""
        start, batches, caps = self._epoch_start, self._batches, self._caps
        self._epoch_start, self._batches, self._caps = None, 0, []
        metrics = dict(trainer.callback_metrics)  # read on every rank, since Lightning reduces them then
        # A run that is resumed after the last step of an epoch has no results of that epoch.
        if not trainer.is_global_zero or not batches:
            return
        row: dict[str, Any] = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step, **_rates(trainer)}
        row["caps"] = caps
        for name, value in metrics.items():
            # In a resumed epoch the training metrics are means over only a part of it.
            if not name.startswith(("lipschitz/", "audit/")) and (start is not None or not name.startswith("train")):
                row[name] = float(value)
        row["seconds"] = _seconds_since(start or self._run_start)
        self.rows.append(row)
        if self.mode == "json":
            print_stdout(to_json({"event": "epoch", "epochs": trainer.max_epochs, **row}))
        elif self.mode == "lines":
            print_stdout("\n".join(self._table.lines(row, trainer.max_epochs)))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Prints the closing JSON object of a run that is interrupted or fails."""
        if self.mode == "json" and trainer.is_global_zero and self._run_start is not None:
            interrupted = isinstance(exception, (KeyboardInterrupt, SystemExit))
            self._print_end(trainer, "interrupted" if interrupted else "failed", {})

    def print_start(self, trainer: L.Trainer) -> None:
        """Prints where the run writes, before it starts."""
        if self.mode == "lines":
            print_stdout(f"run: {_place(trainer)}; checkpoints: {_checkpoint_folder(trainer) or 'none'}")

    def print_result(self, trainer: L.Trainer, results: dict[str, float]) -> None:
        """Prints the result of a run that has finished, and where its checkpoint and its curves are.

        Args:
            trainer: The trainer.
            results: The metrics of the test, if there was one.
        """
        if self.mode == "json":
            self._print_end(trainer, "finished", results)
        elif results:
            print_stdout("  ".join(f"{name} {value:.4f}" for name, value in results.items()))
        elif self.mode == "quiet" and self.rows:
            print_stdout("\n".join(Table().lines(self.rows[-1], trainer.max_epochs)))
        if self.mode == "lines" and trainer.state.fn in ("fit", "test") and self._run_start is not None:
            checkpoint = getattr(trainer.checkpoint_callback, "last_model_path", "")
            print_stdout(f"checkpoint: {relative(checkpoint) if checkpoint else 'none'}")
            print_stdout(f"curves: {'lit-lipschitz report ' if run_folder(trainer) else ''}{_place(trainer)}")

    def _print_end(self, trainer: L.Trainer, status: str, results: dict[str, float]) -> None:
        checkpoint = getattr(trainer.checkpoint_callback, "last_model_path", "") or None
        end = {"event": "end", "status": status, "epochs": len(self.rows), "step": trainer.global_step, **results}
        places = {"run": run_folder(trainer), "checkpoint": checkpoint}
        print_stdout(to_json({**end, **places, "seconds": _seconds_since(self._run_start)}))


def _seconds_since(start: float | None) -> float:
    return time.monotonic() - start if start else 0.0


def _rates(trainer: L.Trainer) -> dict[str, float]:
    """The rate, the learning rate after the schedule, and what the rate was computed from."""
    ours = find_callback(trainer, LipschitzLR)
    if ours is None:
        return {"lr": float(trainer.optimizers[0].param_groups[0]["lr"])} if trainer.optimizers else {}
    decision = next((one.decision for one in ours.controllers.values()), None)
    if decision is None or ours.lr is None:
        return {}
    sizes = {name: getattr(decision, name) for name in ("constant", "activation_norm", "weight_norm")}
    return {"rate": decision.lr, "lr": ours.lr, **{name: size for name, size in sizes.items() if size}}


def run_folder(trainer: L.Trainer) -> str | None:
    """The folder of a run's curves and configuration, or None if its logger has none, or there is no logger."""
    return relative(trainer.logger.log_dir) if trainer.logger and trainer.logger.log_dir else None


def _place(trainer: L.Trainer) -> str:
    return run_folder(trainer) or (type(trainer.logger).__name__ if trainer.logger else "no logger")


def _checkpoint_folder(trainer: L.Trainer) -> str | None:
    """Where ModelCheckpoint is going to write, which it decides only when the run starts."""
    callback: Any = trainer.checkpoint_callback
    if callback is None:
        return None
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    named = str(trainer.logger.name) if trainer.logger and not trainer.logger.log_dir else "checkpoints"
    return relative(callback.dirpath or folder / named)


class Table:
    """The epochs as rows of one table, whose header is printed again where a column is new."""

    def __init__(self) -> None:
        self.columns: list[str] = []
        self._caps: list[str] = []
        self._limit = shutil.get_terminal_size().columns if sys.stdout.isatty() else _WIDTH

    def lines(self, row: dict[str, Any], epochs: int | None) -> list[str]:
        """The lines of an epoch: a header if needed, its values, and the limits of the rate if they have changed."""
        total = epochs if (epochs or -1) > 0 else "?"
        first = max(len("epoch"), 2 * len(str(total)) + 1)
        columns = self._fitting(row, first)
        lines = []
        if set(columns) - set(self.columns):
            self.columns = columns
            lines.append("  ".join([f"{'epoch':>{first}}", *(f"{name:>{_width(name)}}" for name in columns), "   s"]))
        cells = [format_value(name, row[name]) if name in row else "-" for name in self.columns]
        cells = [f"{cell:>{_width(name)}}" for name, cell in zip(self.columns, cells, strict=True)]
        seconds = f"{row['seconds']:.{1 if row['seconds'] < 99 else 0}f}"
        lines.append("  ".join([f"{row['epoch']}/{total}".rjust(first), *cells, f"{seconds:>4}"]))
        if row["caps"] != self._caps:
            self._caps = row["caps"]
            limit = f"limited by {' and '.join(self._caps)}" if self._caps else "no longer limited"
            lines.append(f"{'':{first}}  rate {limit}")
        return lines

    def _fitting(self, row: dict[str, Any], first: int) -> list[str]:
        """The columns so far and those of an epoch, as many as the terminal is wide."""
        usual = ["rate", "lr", *METRICS]
        others = [name for name in (*self.columns, *row) if name not in (*usual, *_HIDDEN)]
        wanted = [name for name in (*usual, *dict.fromkeys(others)) if name in row or name in self.columns]
        room = self._limit - first - len("  9999")
        columns = []
        # A training metric goes first where there is no room for all.
        for name in sorted(wanted, key=lambda name: (name in others, name.startswith("train"))):
            room -= 2 + _width(name)
            if room >= 0:
                columns.append(name)
        return [name for name in wanted if name in columns]


def _width(name: str) -> int:
    return max(len(name), 7 if name.endswith("acc") else 9)


def format_value(name: str, value: float) -> str:
    """A value in few characters: accuracies and losses with 4 decimals, everything else with 4 digits."""
    kind = name.rpartition("_")[2]
    return f"{value:.4f}" if kind in ("loss", "acc", "accuracy") and abs(value) < 1e4 else f"{value:.4g}"


def print_stdout(text: str) -> None:
    """Prints on stdout also while a progress bar is on stderr, when rich replaces both."""
    behind = getattr(sys.stdout, "rich_proxied_file", None)
    print(text, file=sys.stdout if behind is None or behind.isatty() else behind, flush=True)
