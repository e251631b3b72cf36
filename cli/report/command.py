"""`lit-lipschitz report`: the curves of runs as a page, as pictures, in the terminal and as JSON. Imports no torch."""

import argparse
import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NoReturn

from lit_lipschitz.cli.report.events import Run, find_runs
from lit_lipschitz.cli.report.page import page
from lit_lipschitz.cli.report.panels import Axis, Line, Panel, number, panels
from lit_lipschitz.cli.report.plots import pngs, write_whole
from lit_lipschitz.errors import ConfigurationError, LitLipschitzError

_DESCRIPTION = """\
Shows the curves of one or several runs: accuracy and loss, the learning rate, L and its parts, one value an epoch.
Writes a self-contained page, report.html, and, with matplotlib, PNG files; prints the same as text.
"""
_EXAMPLES = """\
examples:
  lit-lipschitz report lightning_logs/version_3               # one run
  lit-lipschitz report lightning_logs --output figures        # all runs below a folder, overlaid
  lit-lipschitz report lightning_logs/version_3 --json | jq '.runs[0].final.val_acc'

NO_COLOR=1 leaves out the colours of a terminal, which files and pipes never have.
"""
_FIGURES = (
    # column, tag; what is printed is the last value
    ("train_loss", "train_loss"),
    ("train_acc", "train_acc"),
    ("val_loss", "val_loss"),
    ("val_acc", "val_acc"),
    ("test_loss", "test_loss"),
    ("test_acc", "test_acc"),
    ("lr", "lipschitz/lr"),
    ("L", "lipschitz/constant"),
    ("K_z", "lipschitz/activation_norm"),
    ("W", "lipschitz/weight_norm"),
)
_COLOURS = (39, 208, 43, 176, 178, 117, 248)  # of the 256 that terminals have, the page's in the dark
_BLOCKS, _ASCII = "▁▂▃▄▅▆▇█", "_.:-=+*#"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"report: {message}; lit-lipschitz report --help tells more")


def report(arguments: list[str]) -> int:
    """Runs the command.

    Args:
        arguments: What comes after its name.

    Returns:
        0.

    Raises:
        ConfigurationError: There is no run where one is looked for.
        LitLipschitzError: A run can't be read, or the folder not written.
    """
    parser = _Parser("lit-lipschitz report", None, _DESCRIPTION, _EXAMPLES, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or a folder above some")
    parser.add_argument("--output", default="report", metavar="FOLDER", help="where the files go (default: ./report)")
    parser.add_argument("--json", action="store_true", help="print curves, final figures and the files' names as JSON")
    parser.add_argument("--no-png", action="store_true", help="write the page alone, which needs no matplotlib")
    options = parser.parse_args(arguments)
    try:
        runs = find_runs(options.runs)
    except OSError as error:
        raise LitLipschitzError(f"report: {error.filename}: can't be read: {error.strerror}") from None
    for run in runs:
        for note in run.notes:
            print(f"lit-lipschitz: warning: {run.folder}: {note}", file=sys.stderr)
    runs = [run for run in runs if run.curves]
    drawn = panels(runs)
    folder, rows = Path(options.output), table(runs)
    files = _write(folder, {"report.html": page(runs, drawn, rows[0], rows[1:]).encode()})
    if not options.json:
        # Before the pictures: matplotlib takes more time than all the rest.
        print(picture(runs, drawn, _Terminal()), end="", flush=True)
    if not options.no_png:
        files += _write(folder, _pictures(runs, drawn))
    if options.json:
        print(json.dumps({"runs": [_plain(run) for run in runs], "files": [str(file) for file in files]}))
    else:
        print("\n".join(map(str, files)))
    return 0


def _pictures(runs: list[Run], drawn: list[Panel]) -> dict[str, bytes]:
    try:
        return pngs(drawn, runs)
    except ImportError as error:
        print(
            f"lit-lipschitz: warning: no PNG files, for which matplotlib is needed ({error}): pip install "
            "'lit-lipschitz[plots]', or pass --no-png",
            file=sys.stderr,
        )
        return {}


def _write(folder: Path, files: dict[str, bytes]) -> list[Path]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_whole(folder / name, content)
    except OSError as error:
        raise LitLipschitzError(
            f"report --output {folder}: can't be written: {error.strerror}; pass another folder"
        ) from None
    return [folder / name for name in files]


def _plain(run: Run) -> dict[str, Any]:
    """A run as JSON has it, where there are no infinities."""
    series = {
        tag: {"epoch": list(curve), "value": [_finite(value) for value in curve.values()]}
        for tag, curve in run.curves.items()
    }
    final = {tag: _finite(run.last(tag)) for tag in run.curves}
    return {"name": run.name, "folder": str(run.folder), "epochs": run.epochs, "series": series, "final": final}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def table(runs: list[Run]) -> list[list[str]]:
    """The final figures: a header, then a row a run; without columns that would be empty."""
    columns = [(name, tag) for name, tag in _FIGURES if any(run.last(tag) is not None for run in runs)]
    best = any("val_acc" in run.curves for run in runs)
    rows = [["run", "epochs", *(name for name, _ in columns), *(["best val_acc"] if best else [])]]
    for run in runs:
        cells = [run.name, str(run.epochs), *(_figure(name, run.last(tag)) for name, tag in columns)]
        if best:
            curve = run.curves.get("val_acc", {})
            epoch = max(curve, key=lambda epoch: curve[epoch], default=0)
            cells.append(f"{curve[epoch]:.4f} (epoch {epoch})" if curve else "")
        rows.append(cells)
    return rows


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if name.endswith(("loss", "acc")) else f"{value:.4g}"


# -- in a terminal -----------------------------------------------------------------------------------------------------


class _Terminal:
    """What stdout can show: how wide it is, whether in colour, and whether it knows blocks."""

    def __init__(self) -> None:
        self.width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 100
        dumb = os.environ.get("TERM") == "dumb"
        self.colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and not dumb
        try:
            _BLOCKS.encode(sys.stdout.encoding or "ascii")
            self.blocks = _BLOCKS
        except UnicodeEncodeError:
            self.blocks = _ASCII

    def paint(self, run: int, text: str) -> str:
        """A text in a run's colour."""
        return f"\x1b[38;5;{_COLOURS[run % len(_COLOURS)]}m{text}\x1b[0m" if self.colour else text


def picture(runs: list[Run], drawn: list[Panel], terminal: _Terminal) -> str:
    """The diagrams as lines of blocks, all of a diagram on one scale, and the table of final figures."""
    width = max(len(_label(runs, line)) for panel in drawn for line in panel.lines) if drawn else 0
    room = max(10, min(60, terminal.width - width - 24))
    lines = []
    for panel in drawn:
        values = [value for line in panel.lines for _, value in line.points]
        scale = f"{_short(min(values))} to {_short(max(values))}{panel.unit}{', logarithmic' if panel.y.log else ''}"
        lines.append(f"{panel.title}: {scale}")
        for line in sorted(panel.lines, key=lambda line: (line.dashed, line.run)):
            curve = terminal.paint(line.run, _curve(line, panel, room, terminal.blocks))
            first, last = (_short(value) for _, value in (line.points[0], line.points[-1]))
            lines.append(f"  {_label(runs, line):{width}}  {curve}  {first} > {last}")
        lines.append("")
    rows = table(runs)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(size) for cell, size in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines) + "\n\n"


def _label(runs: list[Run], line: Line) -> str:
    several = line.tag.startswith("lipschitz/") and line.tag.count("/") == 2
    what = line.tag.partition("_")[0] if line.tag.startswith(("train", "val")) else ""
    return " ".join(filter(None, (runs[line.run].name, what or (line.tag if several else ""))))


def _short(value: float) -> str:
    return number(float(f"{value:.3g}"))


def _curve(line: Line, panel: Panel, room: int, blocks: str) -> str:
    """The curve in so many characters at most, each the mean of the epochs that it stands for."""
    last = round(panel.x.high) if panel.x.high > 2 else max(epoch for one in panel.lines for epoch, _ in one.points)
    room = min(room, last)
    cells: list[list[float]] = [[] for _ in range(room)]
    for epoch, value in line.points:
        cells[min(room - 1, max(0, (epoch - 1) * room // last))].append(value)
    values = [value for one in panel.lines for _, value in one.points]
    axis = Axis(min(values), max(values), [], panel.y.log)
    text = ""
    for cell in cells:
        if not cell:
            text += " "
            continue
        share = axis.share(sum(cell) / len(cell)) if axis.high > axis.low else 0.5
        text += blocks[min(len(blocks) - 1, int(share * len(blocks)))]
    return text
