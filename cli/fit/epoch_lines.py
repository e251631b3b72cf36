"""What fit prints about its epochs: a line each and a table at the end, or JSON, or only the final result."""

import sys
import time
from typing import Any, Literal

import lightning as L

from lit_lipschitz.callbacks.lipschitz_lr import LipschitzLR
from lit_lipschitz.cli.fit.callbacks import find_callback
from lit_lipschitz.cli.output import align, to_json

Mode = Literal["lines", "quiet", "json"]
_METRICS = ("train_loss", "train_acc", "val_loss", "val_acc")
_HEADINGS = {"constant": "L", "activation_norm": "K_z", "weight_norm": "W", "seconds": "s"}


class EpochLines(L.Callback):
    """Collects the results of each epoch and prints them.

    Args:
        mode: ``"lines"``, and a table at the end; ``"json"``, one object an epoch and one at the end; ``"quiet"``, only
            the final result.
    """

    def __init__(self, mode: Mode = "lines") -> None:
        self.mode: Mode = mode
        self.rows: list[dict[str, Any]] = []
        self._run_start: float | None = None
        self._epoch_start: float | None = None  # None in an epoch that is resumed
        self._batches = 0
        self._caps: list[str] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self.rows, self._epoch_start, self._batches, self._caps = [], None, 0, []
        self._run_start = time.monotonic()

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
            print_stdout(line(row, trainer.max_epochs))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Prints the closing JSON object of a run that is interrupted or fails."""
        if self.mode == "json" and trainer.is_global_zero and self._run_start is not None:
            interrupted = isinstance(exception, (KeyboardInterrupt, SystemExit))
            self._print_end(trainer, "interrupted" if interrupted else "failed", {})

    def print_table(self) -> None:
        """Prints the table of the epochs, in the mode ``"lines"``."""
        if self.mode == "lines" and self.rows:
            print_stdout("\n".join(["", *table(self.rows), ""]))

    def print_result(self, trainer: L.Trainer, results: dict[str, float]) -> None:
        """Prints the result of a run that has finished.

        Args:
            trainer: The trainer.
            results: The metrics of the test, if there was one.
        """
        if self.mode == "json":
            self._print_end(trainer, "finished", results)
        elif results:
            print_stdout("  ".join(f"{name} {value:.4f}" for name, value in results.items()))
        elif self.mode == "quiet" and self.rows:
            print_stdout(line(self.rows[-1], trainer.max_epochs))

    def _print_end(self, trainer: L.Trainer, status: str, results: dict[str, float]) -> None:
        checkpoint = getattr(trainer.checkpoint_callback, "last_model_path", "") or None
        end = {"event": "end", "status": status, "epochs": len(self.rows), "step": trainer.global_step, **results}
        print_stdout(to_json({**end, "checkpoint": checkpoint, "seconds": _seconds_since(self._run_start)}))


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


def line(row: dict[str, Any], epochs: int | None) -> str:
    """Human-readable summary of an epoch: rate, lr, losses, accuracies, active limits, seconds."""
    total = epochs if (epochs or -1) > 0 else "?"
    parts = [f"epoch {row['epoch']:>{len(str(total))}}/{total}"]
    rates = [f"{name} {row[name]:<9.4g}" for name in ("rate", "lr") if name in row]
    parts += [" ".join(rates)] if rates else []
    parts += [f"{name} {row[name]:.4f}" for name in _METRICS if name in row]
    parts += [f"limited by {cap}" for cap in row["caps"]]
    return "  ".join([*parts, f"{row['seconds']:.1f} s"])


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The epochs as the lines of a table, without empty columns."""
    names = ["epoch", "rate", "lr", "constant", "activation_norm", "weight_norm", *_METRICS]
    others = [name for row in rows for name in row if name not in (*names, "step", "caps", "seconds")]
    names = [name for name in (*names, *dict.fromkeys(others[:4]), "seconds") if any(name in row for row in rows)]
    cells = [["", *(_HEADINGS.get(name, name) for name in names)]]
    cells += [["", *(_cell(name, row.get(name)) for name in names)] for row in rows]
    if any(row["caps"] for row in rows):
        caps = ["cap", *(", ".join(row["caps"]) for row in rows)]
        cells = [[*line, cap] for line, cap in zip(cells, caps, strict=True)]
    return align(cells, left=len(names) + 1)


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if name == "epoch" else f"{value:.1f}" if name == "seconds" else format_value(name, value)


def format_value(name: str, value: float) -> str:
    """A value in few characters: accuracies and losses with 4 decimals, everything else with 4 digits."""
    kind = name.rpartition("_")[2]
    return f"{value:.4f}" if kind in ("loss", "acc", "accuracy") and abs(value) < 1e4 else f"{value:.4g}"


def print_stdout(text: str) -> None:
    """Prints on stdout also while a progress bar is on stderr, when rich replaces both."""
    behind = getattr(sys.stdout, "rich_proxied_file", None)
    print(text, file=sys.stdout if behind is None or behind.isatty() else behind, flush=True)
