"""Draws a report's figures as text: lines of block characters, and the table of final values."""

import os
import shutil
import sys

from lit_lipschitz.cli.output import align
from lit_lipschitz.cli.report.panels import Axis, Line, Panel, number
from lit_lipschitz.cli.report.runs import Run

_COLOURS = (39, 208, 43, 176, 178, 117, 248)  # of the 256 of a terminal; the page's in dark mode
_BLOCKS, _ASCII = "▁▂▃▄▅▆▇█", "_.:-=+*#"


class Terminal:
    """What stdout can show: its width, colours, and whether its encoding has block characters."""

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


def picture(runs: list[Run], drawn: list[Panel], rows: list[list[str]], terminal: Terminal) -> str:
    """The diagrams as lines of blocks, all lines of a diagram on one scale, and the table with its header."""
    width = max((len(_label(runs, line)) for panel in drawn for line in panel.lines), default=0)
    room = max(10, min(60, terminal.width - width - 25))
    lines = []
    for panel in drawn:
        values = [value for line in panel.lines for _, value in line.points]
        scale = f"{_short(min(values))} to {_short(max(values))}{panel.unit}{', logarithmic' if panel.y.log else ''}"
        lines.append(f"{panel.title}: {scale}")
        for line in sorted(panel.lines, key=lambda line: (line.dashed, line.run)):
            curve = terminal.paint(line.run, _curve(line, panel, room, terminal.blocks))
            first, last = (_short(value) for _, value in (line.points[0], line.points[-1]))
            lines.append(f"  {_label(runs, line):{width}}  {curve}  {first} -> {last}")
        lines.append("")
    return "\n".join([*lines, *align(rows, left=0), ""])


def _label(runs: list[Run], line: Line) -> str:
    several = line.tag.startswith("lipschitz/") and line.tag.count("/") == 2
    stage = line.tag.partition("_")[0] if line.tag.startswith(("train", "val")) else ""
    return " ".join(filter(None, (runs[line.run].name, stage or (line.tag if several else ""))))


def _short(value: float) -> str:
    return number(float(f"{value:.3g}"))


def _curve(line: Line, panel: Panel, room: int, blocks: str) -> str:
    """The curve in at most ``room`` characters, each for the mean of some epochs."""
    last = round(panel.x.high) if panel.x.high > 2 else max(epoch for one in panel.lines for epoch, _ in one.points)
    room = min(room, last)
    cells: list[list[float]] = [[] for _ in range(room)]
    for epoch, value in line.points:
        cells[min(room - 1, max(0, (epoch - 1) * room // last))].append(value)
    values = [value for one in panel.lines for _, value in one.points]
    axis = Axis(min(values), max(values), [], panel.y.log)

    def block(cell: list[float]) -> str:
        share = axis.share(sum(cell) / len(cell)) if axis.high > axis.low else 0.5
        return blocks[min(len(blocks) - 1, int(share * len(blocks)))]

    return "".join(block(cell) if cell else " " for cell in cells)
