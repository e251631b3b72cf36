"""`lit-lipschitz report`: the curves of runs as a page, as pictures, in the terminal and as JSON. Imports no torch."""

import sys
from pathlib import Path
from typing import Any

from lit_lipschitz.cli.help import OptionParser
from lit_lipschitz.cli.output import locked, printable, to_json, write_whole
from lit_lipschitz.cli.report.page import page
from lit_lipschitz.cli.report.panels import Panel, panels
from lit_lipschitz.cli.report.png import pngs
from lit_lipschitz.cli.report.runs import Run, find_runs
from lit_lipschitz.cli.report.terminal import Terminal, picture
from lit_lipschitz.errors import LitLipschitzError

_METRICS = ("train_loss", "train_acc", "val_loss", "val_acc", "test_loss", "test_acc")
_OURS = ("rate", "lr", "constant", "activation_norm", "weight_norm")
_TAGS = {**{name: name for name in _METRICS}, **{name: f"lipschitz/{name}" for name in _OURS}}
"""Columns of the table, and the tags of their curves."""


def report(arguments: list[str]) -> int:
    """Runs `lit-lipschitz report` with the arguments after its name; returns 0.

    Raises:
        ConfigurationError: A folder has no run.
        LitLipschitzError: A run can't be read, or the folder can't be written.
    """
    parser = OptionParser("report")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--output", default="report", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-png", action="store_true")
    options = parser.parse_args(arguments)
    try:
        runs = find_runs(options.runs)
    except OSError as error:
        raise LitLipschitzError(f"report: {error.filename}: can't be read: {error.strerror}") from None
    for run in runs:
        for note in run.notes:
            print(printable(f"lit-lipschitz: warning: {run.folder}: {note}"), file=sys.stderr)
    runs = [run for run in runs if run.curves]
    drawn, rows = panels(runs), table(runs)
    content = {"report.html": page(runs, drawn, rows).encode()}
    files, replaced = _write(options.output, content)
    if not options.json:
        # Before the pictures: matplotlib takes more time than all the rest.
        print(picture(runs, drawn, rows, Terminal()), flush=True)
    if not options.no_png:
        # The page once more: page and pictures are of the same runs, whoever else writes there.
        files, older = _write(options.output, {**content, **_pictures(runs, drawn)})
        replaced += [file for file in older if file not in (str(options.output / name) for name in content)]
    if options.json:
        print(to_json({"runs": [_plain(run) for run in runs], "files": files, "replaced": replaced}))
    else:
        for file in files:
            print(printable(file) + (" (replaces an earlier file)" if file in replaced else ""))
    return 0


def _pictures(runs: list[Run], drawn: list[Panel]) -> dict[str, bytes]:
    try:
        return pngs(drawn, runs)
    except ImportError as error:
        print(
            f"lit-lipschitz: warning: no PNG files, since matplotlib is missing ({error}): pip install "
            "'lit-lipschitz[plots]', or pass --no-png",
            file=sys.stderr,
        )
        return {}


def _write(folder: Path, files: dict[str, bytes]) -> tuple[list[str], list[str]]:
    """Writes files into a folder, all of them before another report writes there.

    Returns:
        Their paths, and those of them where there was a file before.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "report"):
            replaced = [str(folder / name) for name in files if (folder / name).exists()]
            for name, content in files.items():
                write_whole(folder / name, content)
    except OSError as error:
        raise LitLipschitzError(
            f"report --output {folder}: can't be written: {error.strerror}; pass another folder"
        ) from None
    return [str(folder / name) for name in files], replaced


def _plain(run: Run) -> dict[str, Any]:
    """A run for JSON."""
    series = {tag: {"epoch": list(curve), "value": list(curve.values())} for tag, curve in run.curves.items()}
    final = {tag: run.last(tag) for tag in run.curves}
    return {"name": run.name, "folder": str(run.folder), "epochs": run.epochs, "series": series, "final": final}


def table(runs: list[Run]) -> list[list[str]]:
    """The final values: a header, then one row a run; without empty columns."""
    columns = [name for name, tag in _TAGS.items() if any(run.last(tag) is not None for run in runs)]
    best = ["best val_acc"] if any("val_acc" in run.curves for run in runs) else []
    return [["run", "epochs", *columns, *best], *(_row(run, columns, bool(best)) for run in runs)]


def _row(run: Run, columns: list[str], best: bool) -> list[str]:
    cells = [run.name, str(run.epochs)]
    for name in columns:
        value = run.last(_TAGS[name])
        cells.append(
            ""
            if value is None
            else f"{value:.4f}"
            if name.endswith(("loss", "acc")) and abs(value) < 1e9
            else f"{value:.4g}"
        )
    if best:
        curve = run.curves.get("val_acc", {})
        epoch = max(curve, key=lambda epoch: curve[epoch], default=0)
        cells.append(f"{curve[epoch]:.4f} (epoch {epoch})" if curve else "")
    return cells
