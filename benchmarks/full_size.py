"""Full-length runs on CIFAR-10: the default, and the papers' own runs compared with their authors' records.

    python benchmarks/full_size.py --minutes 9      # again and again, until it exits with 0

Trains one config after another through the command. With ``--minutes`` a call stops in time: the current run saves a
checkpoint (SIGTERM), and the next call resumes it, in mid-epoch. Checkpoints and logs are kept below ``--work``; a
finished run is a line of ``full_size.jsonl`` below ``--output``, is not repeated, and has its curve there in
``full_size/NAME.csv``, a line an epoch (git ignores both). The plan with an estimate is printed first, a table of the
results last.

    python benchmarks/full_size.py --dry-run                    # the plan alone
    python benchmarks/full_size.py --only 'default_*_30'        # some of the runs
    python benchmarks/full_size.py --only default_resnet20_30 -- --trainer.limit_train_batches 5   # any option of fit

Options after ``--`` are passed to the command; runs with them are kept apart.

Exit codes: 0 all runs are done; 75 runs are left; 1 a run has failed; 2 a mistake in the options; 130 Ctrl-C.
"""

import argparse
import csv
import fcntl
import fnmatch
import hashlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rows import add_row, read_rows

ROOT = Path(__file__).resolve().parent.parent
MORE = 75
"""The exit code if runs are left, EX_TEMPFAIL."""
START_UP = 30.0
"""Seconds that must be left for a run to be started or resumed: imports take a part of them."""
PATIENCE = 45.0
"""Seconds that a run has to save its checkpoint, before it is killed and resumes from that of its last epoch."""
GUESSED = {"resnet20": 5.0, "densenet": 15.0}
"""Seconds of an epoch on a GPU, until one has been measured."""


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        name: Its name.
        options: Options of fit.
        epochs: Its length.
        recorded: The authors' accuracies in per cent: of the last epoch, and of the best one by the test set.
    """

    name: str
    options: tuple[str, ...]
    epochs: int
    recorded: tuple[float, float] | None = None


_DENSENET = ("--model.network", "lit_lipschitz.DenseNet", "--model.network.depth", "40",
             "--model.network.growth_rate", "12")  # fmt: skip


def _default(network: str, epochs: int, *options: str) -> Run:
    length = ("--trainer.max_epochs", str(epochs))
    return Run(f"default_{network}_{epochs}", ("--config", "cifar10.yaml", *options, *length), epochs)


def _paper(name: str, recorded: tuple[float, float] | None = None) -> Run:
    return Run(f"paper_{name}", ("--config", f"paper_cifar10_{name}.yaml"), 300, recorded)


# Short ones first. The records are of the scripts published with arXiv 1902.07399.
RUNS = (
    *(_default("resnet20", epochs) for epochs in (30, 100, 300)),
    *(_default("densenet", epochs, *_DENSENET) for epochs in (30, 100, 300)),
    _paper("resnet20_sgd", (89.09, 89.37)),
    _paper("resnet20_sgd_fixed", (86.46, 87.02)),
    _paper("resnet20_sgd_baseline", (60.11, 60.33)),
    _paper("resnet20_momentum", (88.83, 89.27)),
    _paper("resnet20_momentum_baseline"),
    _paper("densenet_sgd", (90.62, 91.34)),
    _paper("densenet_sgd_baseline"),
    _paper("densenet_momentum", (92.15, 92.36)),
    _paper("densenet_momentum_baseline"),
)


class Place:
    """The folders of the runs.

    Args:
        work: The folder of checkpoints and logs.
        output: The folder of the results.
        extra: Options of the command that were added to all runs.
    """

    def __init__(self, work: Path, output: Path, extra: Sequence[str]) -> None:
        self.work, self.output, self.extra = work.resolve(), output.resolve(), tuple(extra)
        self.results = self.output / "full_size.jsonl"

    def label(self, run: Run) -> str:
        """The run's name, with a mark where options were added."""
        mark = hashlib.sha256(json.dumps(self.extra).encode()).hexdigest()[:6]
        return f"{run.name}-{mark}" if self.extra else run.name

    def epochs(self, run: Run) -> int:
        """The length of a run, as the options have it."""
        key = "--trainer.max_epochs"
        given = [value for name, value in zip(self.extra, self.extra[1:], strict=False) if name == key]
        given += [one.partition("=")[2] for one in self.extra if one.startswith(f"{key}=")]
        return int(given[-1]) if given else run.epochs

    def folder(self, run: Run) -> Path:
        """The run's folder."""
        return self.work / self.label(run)

    def has_checkpoint(self, run: Run) -> bool:
        """Whether there is a checkpoint to resume from."""
        return any(self.folder(run).glob("lightning_logs/*/checkpoints/last*.ckpt"))

    def curve_file(self, run: Run) -> Path:
        """The run's curve."""
        return self.output / "full_size" / f"{self.label(run)}.csv"

    def curve(self, run: Run) -> list[dict[str, float | None]]:
        """The run's epochs so far; the last line of an epoch counts, and a line that a kill has cut off does not."""
        path = self.curve_file(run)
        if not path.is_file():
            return []
        found: dict[int, dict[str, float | None]] = {}
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if None not in row.values():
                    found[int(row["epoch"])] = {key: float(value) if value else None for key, value in row.items()}
        return [found[epoch] for epoch in sorted(found)]

    def pieces(self, run: Run) -> list[dict[str, Any]]:
        """The starts of the run, the first one and each resume, with step and device."""
        return read_rows(self.curve_file(run).with_suffix(".jsonl"))

    def done(self) -> dict[str, dict[str, Any]]:
        """The finished runs, by label."""
        return {row["run"]: row for row in read_rows(self.results)}


def launch(arguments: list[str], log: Path, seconds: float) -> int:
    """Runs the command, with SIGTERM, so that it saves a checkpoint, when its time is up; returns its exit code."""
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")]))
    with log.open("a") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "lit_lipschitz.cli.main", *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": path},
        )
        # SIGTERM to this process is passed on, so that the run saves a checkpoint.
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            return _wait(process, seconds)
        except KeyboardInterrupt:  # which the run has received as well
            _wait(process, PATIENCE)
            raise
        finally:
            signal.signal(signal.SIGTERM, before)


def _wait(process: "subprocess.Popen[bytes]", seconds: float) -> int:
    for wait, end in ((seconds, process.terminate), (PATIENCE, process.kill)):
        try:
            return process.wait(None if wait == float("inf") else wait)
        except subprocess.TimeoutExpired:
            end()
    return process.wait()


def piece(place: Place, run: Run, seconds: float, steps: int = 0) -> int:
    """Starts or resumes a run; returns the command's exit code."""
    folder = place.folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [
        "fit", *run.options, "--data.verify", "false", "--test_after_fit", "false",
        "--trainer.default_root_dir", str(folder), "--trainer.enable_progress_bar", "false",
        "--trainer.callbacks+", "recorders.Curve", "--trainer.callbacks.path", str(place.curve_file(run)),
        "--trainer.callbacks.stop_after", str(steps), *place.extra,
    ]  # fmt: skip
    arguments += ["--ckpt_path", "last"] if place.has_checkpoint(run) else []
    return launch(arguments, folder / "log.txt", seconds)


def outcome(place: Place, run: Run) -> dict[str, Any]:
    """The row of a finished run.

    Raises:
        SystemExit: Its curve lacks the last epoch.
    """
    curve, epochs, pieces = place.curve(run), place.epochs(run), place.pieces(run)
    if not curve or curve[-1]["epoch"] != epochs:
        raise SystemExit(f"{run.name}: it has ended, and {place.curve_file(run)} lacks epoch {epochs}; remove both")
    best = max(curve, key=lambda row: row["test_acc"] or 0.0)
    return {
        "run": place.label(run),
        "options": [*run.options, *place.extra],
        "epochs": epochs,
        "final_test_acc": curve[-1]["test_acc"],
        "best_test_acc": best["test_acc"],
        "best_epoch": int(best["epoch"] or 0),
        "recorded": run.recorded if not place.extra else None,
        "lr_first": curve[0]["lr"],
        "rate_last": curve[-1]["rate"],
        "seconds": round(sum(row["seconds"] or 0.0 for row in curve), 1),
        "pieces": len(pieces),
        "devices": sorted({part["device"] for part in pieces}),
        **{name: importlib.metadata.version(name) for name in ("torch", "lightning", "lit-lipschitz")},
        "python": platform.python_version(),
    }


def plan(place: Place, runs: Sequence[Run]) -> str:
    """The finished runs, the next one, and an estimate of the time left."""
    done = place.done()
    lines, total, first, guessed = (
        [f"{'run':34} {'epochs':>7}  {'seconds an epoch':>16}  {'left':>8}"],
        0.0,
        True,
        False,
    )
    measured = {run.name: [row["seconds"] or 0.0 for row in place.curve(run)] for run in RUNS}
    for run in runs:
        network = next(name for name in GUESSED if name in run.name)
        own = measured[run.name] or [one for name, found in measured.items() if network in name for one in found]
        each = sorted(own)[len(own) // 2] if own else GUESSED[network]
        trained, epochs = len(place.curve(run)), place.epochs(run)
        over = place.label(run) in done
        left = 0.0 if over else each * (epochs - trained)
        total += left
        state = "done" if over else "next" if first else ""
        guessed = guessed or not (own or over)
        first = first and over
        mark = "" if own else " (guess)"
        lines.append(
            f"{run.name:34} {f'{trained}/{epochs}':>7}  {f'{each:.1f}{mark}':>16}  {_time(left):>8}  {state}".rstrip()
        )
    note = "; the guesses are for a GPU, nothing has been measured" if guessed else ""
    lines.append(
        f"{sum(place.label(run) in done for run in runs)} of {len(runs)} done, about {_time(total)} left{note}"
    )
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The results, as Markdown: accuracies in per cent on the test set."""
    lines = ["| run | epochs | final | best epoch by the test set | recorded final | recorded best | hours | device |"]
    lines.append("|" + "---|" * 8)
    for row in rows:
        recorded = [f"{value:.2f}" for value in row["recorded"] or ()] or ["-", "-"]
        cells = [row["run"], row["epochs"], f"{100 * row['final_test_acc']:.2f}",
                 f"{100 * row['best_test_acc']:.2f} (epoch {row['best_epoch']})", *recorded,
                 f"{row['seconds'] / 3600:.2f}", "; ".join(row["devices"])]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def work(place: Place, runs: Sequence[Run], minutes: float, steps: int) -> int:
    """Trains as far as the time allows; returns the exit code."""
    end = time.monotonic() + 60 * minutes
    for run in runs:
        if place.label(run) in place.done():
            continue
        left = end - time.monotonic()
        if left < START_UP:
            return MORE
        trained = sum(1 for _ in place.curve(run))
        print(f"{run.name}: {'resumes' if place.has_checkpoint(run) else 'starts'} after {trained} epochs", flush=True)
        code = piece(place, run, left, steps)
        if code == 0:
            add_row(place.results, outcome(place, run))
            continue
        if code in (143, -signal.SIGTERM, -signal.SIGKILL):
            print(f"{run.name}: stopped in or before epoch {len(place.curve(run)) + 1}", flush=True)
            return MORE
        print(f"{run.name}: the command ended with code {code}; see {place.folder(run) / 'log.txt'}", file=sys.stderr)
        return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Parses the options, trains and prints; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    at = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop in so many minutes (default: never)")
    parser.add_argument("--steps", type=int, default=0, help="stop after so many batches of one run, for tests")
    parser.add_argument("--only", nargs="+", default=["*"], help="runs, by shell patterns of their names")
    parser.add_argument("--dry-run", action="store_true", help="print the plan alone")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "full_size", help="checkpoints and logs")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="results and curves")
    options = parser.parse_args(arguments[:at])
    runs = [run for run in RUNS if any(fnmatch.fnmatch(run.name, pattern) for pattern in options.only)]
    if not runs:
        parser.error(f"--only {' '.join(options.only)}: expected some of {', '.join(run.name for run in RUNS)}")
    place = Place(options.work, options.output, arguments[at + 1 :])
    print(plan(place, runs), flush=True)
    if options.dry_run:
        return 0 if all(place.label(run) in place.done() for run in runs) else MORE
    place.work.mkdir(parents=True, exist_ok=True)
    place.curve_file(runs[0]).parent.mkdir(parents=True, exist_ok=True)
    with (place.work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            parser.error(f"--work {place.work}: another call is using it; let it end, or pass another folder")
        try:
            code = work(place, runs, options.minutes, options.steps)
        except KeyboardInterrupt:
            code = 130
    done = place.done()
    finished = [done[place.label(run)] for run in runs if place.label(run) in done]
    print(table(finished) if finished else "no run has ended yet", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
