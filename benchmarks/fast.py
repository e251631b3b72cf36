"""CIFAR-10 in 20 epochs: the computed learning rate compared with a tuned one-cycle schedule.

    python benchmarks/fast.py [--seeds 5] [--peaks 0.1 0.2 0.4 0.8 1.6]

Trains `cifar10_fast.yaml` and `cifar10_fast_onecycle.yaml`, a process a run, with bf16-mixed on a GPU. The peak of the
one-cycle is chosen first: one run each on nine tenths of the training images, by the accuracy on the rest. Then each
config is trained with the same seeds on all of them, and tested once, at the end of each run.

A time is from the start of the first step to the end of the test, warm-up of data and kernels included; most of that is
in the first step, which is given separately. No checkpoints and no curves are written. Each run is a line of
`results/fast.jsonl`, which git ignores, as soon as it has ended, and is not repeated on the same device; `--table`
prints the table without training. Options after ``--`` are passed to the command, and runs with them are kept apart.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rows import add_row, read_rows

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "fast.jsonl"
OURS, ONE_CYCLE = "cifar10_fast.yaml", "cifar10_fast_onecycle.yaml"
PEAKS = (0.1, 0.2, 0.4, 0.8, 1.6)
TUNING_SEED = 1000
"""Seed of the runs that choose the peak; not one of the seeds that are compared."""


def command(arguments: list[str]) -> tuple[int, str, str]:
    """Runs the command; returns its exit code, stdout and stderr."""
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")]))
    process = subprocess.run(
        [sys.executable, "-m", "lit_lipschitz.cli.main", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    return process.returncode, process.stdout, process.stderr


def fit(arguments: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Trains; returns the JSON objects that the command printed, and the times from the stopwatch.

    Raises:
        SystemExit: The command failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        watch = Path(folder) / "watch.json"
        options = [
            *("--json_lines", "--trainer.default_root_dir", folder, "--trainer.logger", "false"),
            *("--checkpoint.save_top_k", "0", "--checkpoint.save_last", "false"),
            *("--trainer.callbacks+", "recorders.Stopwatch", "--trainer.callbacks.path", str(watch)),
        ]
        code, out, err = command(["fit", *arguments, *options])
        if code:
            raise SystemExit(f"fast.py: lit-lipschitz ended with code {code}: {' '.join(err.splitlines()[-1:])}")
        return [json.loads(line) for line in out.splitlines()], json.loads(watch.read_text())


class Benchmark:
    """The runs of one device.

    Args:
        results: The file.
        device: Its name.
        precision: Precision of the trainer.
        extra: Options of the command that were added to all runs.
    """

    def __init__(self, results: Path, device: str, precision: str, extra: Sequence[str]) -> None:
        self.results, self.device, self.precision, self.extra = results, device, precision, list(extra)

    def rows(self, **wanted: Any) -> list[dict[str, Any]]:
        """The rows of this device with these options."""
        wanted.update(device=self.device, precision=self.precision, arguments=self.extra)
        return [row for row in read_rows(self.results) if all(row.get(key) == wanted[key] for key in wanted)]

    def run(self, config: str, seed: int, peak: float | None, tuning: bool = False) -> dict[str, Any]:
        """The row of a run, trained if the file does not have it."""
        key = {"config": config, "seed": seed, "peak": peak, "stage": "tuning" if tuning else "test"}
        if found := self.rows(**key):
            return found[-1]
        arguments = ["--config", config, "--seed_everything", str(seed), "--data.seed", str(seed)]
        arguments += ["--data.verify", "false", "--trainer.precision", self.precision]
        arguments += ["--model.optimizer.lr", str(peak)] if peak is not None else []
        arguments += ["--data.val_split", "0.1", "--test_after_fit", "false"] if tuning else []
        lines, watch = fit([*arguments, *self.extra])
        epochs = [line for line in lines if line["event"] == "epoch"]
        row = {
            **key,
            "val_acc": epochs[-1].get("val_acc"),
            "test_acc": lines[-1].get("test_acc"),
            "train_loss": epochs[-1].get("train_loss"),
            "rates": [round(epoch["rate"], 5) for epoch in epochs if "rate" in epoch],
            "epochs": len(epochs),
            "steps": lines[-1]["step"],
            **watch,
            "precision": self.precision,
            "device": self.device,
            "arguments": self.extra,
            **{name: importlib.metadata.version(name) for name in ("torch", "lightning", "lit-lipschitz")},
            "python": platform.python_version(),
        }
        add_row(self.results, row)
        figures = " ".join(f"{name} {100 * row[name]:.2f}" for name in ("val_acc", "test_acc") if row[name] is not None)
        print(f"{config}, seed {seed}{f', peak {peak}' if peak else ''}: {figures}, {row['seconds']:.1f} s", flush=True)
        return row

    def best_peak(self, peaks: Sequence[float]) -> float:
        """The peak with the best validation accuracy."""
        runs = [self.run(ONE_CYCLE, TUNING_SEED, peak, tuning=True) for peak in peaks]
        return float(max(runs, key=lambda row: row["val_acc"] if row["val_acc"] is not None else -math.inf)["peak"])

    def table(self) -> str:
        """Mean and standard error of each config's accuracy and times, as Markdown."""
        lines = [
            f"{self.device}, {self.precision}{' ' + ' '.join(self.extra) if self.extra else ''}",
            "| config | peak | test accuracy | seconds | of which the first step | runs |",
            "|---|---|---|---|---|---|",
        ]
        rows = self.rows(stage="test")
        for config, peak in dict.fromkeys((row["config"], row["peak"]) for row in rows):
            own = [row for row in rows if (row["config"], row["peak"]) == (config, peak)]
            accuracy = mean([100 * row["test_acc"] for row in own], 2)
            seconds, first = (mean([row[name] for row in own], 1) for name in ("seconds", "first_step_seconds"))
            lines.append(f"| {config} | {peak or '-'} | {accuracy} | {seconds} | {first} | {len(own)} |")
        return "\n".join(lines)


def mean(values: Sequence[float], digits: int) -> str:
    """Mean and its standard error."""
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}" if len(values) > 1 else text


def main(arguments: list[str] | None = None) -> int:
    """Parses the options, trains what is missing, and prints the table."""
    arguments = sys.argv[1:] if arguments is None else arguments
    at = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--peaks", type=float, nargs="+", default=PEAKS, help="candidates for the one-cycle's peak")
    parser.add_argument("--precision", help="default: bf16-mixed on a GPU that has it, else 32-true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the table without training")
    options = parser.parse_args(arguments[:at])

    import torch
    from recorders import device_name

    gpu = torch.cuda.is_available()
    precision = options.precision or ("bf16-mixed" if gpu and torch.cuda.is_bf16_supported() else "32-true")
    device = device_name(torch.device("cuda", 0) if gpu else torch.device("cpu"))
    benchmark = Benchmark(options.output, device, precision, arguments[at + 1 :])
    if not options.table:
        # A single peak needs no choice.
        peak = benchmark.best_peak(options.peaks) if len(options.peaks) > 1 else options.peaks[0]
        for seed in range(options.seeds):
            for config in (OURS, ONE_CYCLE):
                benchmark.run(config, seed, peak if config == ONE_CYCLE else None)
    print(benchmark.table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
