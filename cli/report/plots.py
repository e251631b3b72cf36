"""Draws a report's figures: as SVG with nothing but Python, as PNG with matplotlib."""

import io
import math
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_lipschitz.cli.report.events import Run
from lit_lipschitz.cli.report.panels import LIGHT, MARKERS, Line, Panel, has_training, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

WIDTH, HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 10, 34
_DASHES = (0, (4, 2))
PNGS = {
    "accuracy.png": ("accuracy",),
    "loss.png": ("loss",),
    "rate.png": ("rate",),
    "constant.png": ("constant", "activation_norm", "weight_norm"),
}
"""The pictures, and the diagrams in each."""


# -- SVG ---------------------------------------------------------------------------------------------------------------


def svg(panel: Panel, runs: list[Run]) -> str:
    """A diagram as an SVG element, whose colours are the page's variables."""
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(panel.title)} per epoch">',
        *_grid(panel),
        *(_curve(panel, line, runs[line.run].name) for line in panel.lines),
        "</svg>",
    ]
    return "\n".join(parts)


def _place(panel: Panel, epoch: float, value: float) -> tuple[float, float]:
    x = _LEFT + panel.x.share(epoch) * (WIDTH - _LEFT - _RIGHT)
    y = HEIGHT - _BOTTOM - panel.y.share(value) * (HEIGHT - _TOP - _BOTTOM)
    return round(x, 1), round(y, 1)


def _grid(panel: Panel) -> list[str]:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    parts = []
    for tick in panel.y.ticks:
        _, y = _place(panel, panel.x.low, tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {y}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y + 4}" text-anchor="end">{panel.y.label(tick)}</text>')
    for tick in panel.x.ticks:
        x, _ = _place(panel, tick, panel.y.low)
        parts.append(f'<path class="axis" d="M{x} {bottom}v4"/>')
        parts.append(f'<text x="{x}" y="{bottom + 17}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>')
    parts.append(f'<text class="name" x="{(_LEFT + right) / 2}" y="{HEIGHT - 3}" text-anchor="middle">epoch</text>')
    return parts


def _curve(panel: Panel, line: Line, name: str) -> str:
    places = [_place(panel, epoch, value) for epoch, value in line.points]
    path = " ".join(f"{x},{y}" for x, y in places)
    kind = f"c{line.run % len(LIGHT)}" + (" dashed" if line.dashed else "")
    last_epoch, last = line.points[-1]
    title = f"<title>{escape(name)}, {escape(line.tag)}: {last:.4g}{panel.unit} in epoch {last_epoch}</title>"
    end = "" if line.dashed and len(places) > 1 else marker(line.run, *places[-1])
    return f'<g class="{kind}">{title}<polyline points="{path}"/>{end}</g>'


def marker(run: int, x: float, y: float) -> str:
    """The shape that a run has at its lines' ends and in the legend."""
    shape = MARKERS[run % len(MARKERS)]
    if shape == "o":
        return f'<circle cx="{x}" cy="{y}" r="3.5"/>'
    paths = {"s": "m-3.2-3.2h6.4v6.4h-6.4z", "D": "m0-4.4l4.4 4.4-4.4 4.4-4.4-4.4z", "^": "m0-4.4l4.2 7.4h-8.4z"}
    return f'<path class="mark" d="M{x} {y}{paths[shape]}"/>'


# -- PNG ---------------------------------------------------------------------------------------------------------------


def pngs(drawn: list[Panel], runs: list[Run]) -> dict[str, bytes]:
    """The pictures by file name; those for which there are no curves are left out.

    Raises:
        ImportError: There is no matplotlib.
    """
    # Without pyplot, which looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pictures = {}
    for name, keys in PNGS.items():
        shown = [panel for panel in drawn if panel.key in keys]
        if not shown:
            continue
        entries, columns = _legend(shown, runs)
        # Margins in inches: a layout that matplotlib works out draws everything twice.
        foot, area, gap = 0.65 + 0.2 * math.ceil(len(entries) / columns), 2.3, 0.8
        height = foot + len(shown) * (area + gap) - gap + 0.4
        figure = Figure(figsize=(7.2, height), dpi=120)
        FigureCanvasAgg(figure)
        for i, panel in enumerate(shown):
            bottom = foot + (len(shown) - 1 - i) * (area + gap)
            _draw(panel, figure.add_axes((0.1, bottom / height, 0.87, area / height)))
        figure.legend(handles=entries, loc="lower left", bbox_to_anchor=(0.08, 0), ncols=columns, frameon=False,
                      fontsize=9)  # fmt: skip
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", pil_kwargs={"compress_level": 1})
        pictures[name] = buffer.getvalue()
    return pictures


def _draw(panel: Panel, area: "Axes") -> None:
    for line in panel.lines:
        epochs, values = zip(*line.points, strict=True)
        style: dict[str, Any] = {"color": LIGHT[line.run % len(LIGHT)], "linewidth": 1.0 if line.dashed else 1.8}
        if not line.dashed or len(line.points) == 1:
            style.update(marker=MARKERS[line.run % len(MARKERS)], markevery=[-1], markersize=6)
        area.plot(epochs, values, linestyle=_DASHES if line.dashed else "-", **style)
    if panel.y.log:
        area.set_yscale("log")
    area.set_xlim(panel.x.low - 0.01 * (panel.x.high - 1), panel.x.high + 0.015 * (panel.x.high - 1))
    area.set_ylim(panel.y.low, panel.y.high)
    area.set_yticks(panel.y.ticks, [panel.y.label(tick) for tick in panel.y.ticks])
    area.set_yticks([], minor=True)
    area.set_xticks(panel.x.ticks)
    area.set_xlabel("epoch")
    area.set_title(panel.title + (f" ({panel.unit})" if panel.unit else ""), loc="left", fontsize=11)
    area.grid(axis="y", color="#dddddd", linewidth=0.7)
    area.spines[["top", "right"]].set_visible(False)


def _legend(shown: list[Panel], runs: list[Run]) -> tuple[list["Line2D"], int]:
    """The entries of a legend, and in how many columns they fit."""
    from matplotlib.lines import Line2D

    entries = [
        Line2D([], [], color=LIGHT[i % len(LIGHT)], marker=MARKERS[i % len(MARKERS)], label=runs[i].name)
        for i in sorted({line.run for panel in shown for line in panel.lines})
    ]
    if has_training(shown):
        entries.append(Line2D([], [], color="#555555", label="validation"))
        entries.append(Line2D([], [], color="#555555", linestyle=_DASHES, linewidth=1.0, label="training"))
    longest = max(len(str(entry.get_label())) for entry in entries)
    return entries, max(1, min(len(entries), 95 // (8 + longest)))


# -- files -------------------------------------------------------------------------------------------------------------


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is either as it was or whole, whatever happens."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
