"""Draws a report's figures as PNG files, with matplotlib."""

import io
import math
import warnings
from typing import TYPE_CHECKING, Any

from lit_lipschitz.cli.report.panels import LIGHT, MARKERS, Panel, has_training
from lit_lipschitz.cli.report.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

_DASHES = (0, (4, 2))
_FILES = {
    "accuracy.png": ("accuracy",),
    "loss.png": ("loss",),
    "rate.png": ("rate", "lr"),
    "constant.png": ("constant", "activation_norm", "weight_norm"),
}
"""The files, and the diagrams in each."""


def pngs(drawn: list[Panel], runs: list[Run]) -> dict[str, bytes]:
    """The pictures by file name; those for which there are no curves are left out.

    Raises:
        ImportError: There is no matplotlib.
    """
    # Without pyplot, which looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pictures = {}
    for name, keys in _FILES.items():
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
        legend = figure.legend(entries, [""] * len(entries), loc="lower left", bbox_to_anchor=(0.08, 0), ncols=columns,
                               frameon=False, fontsize=9)  # fmt: skip
        for text, entry in zip(legend.get_texts(), entries, strict=True):
            # A name is no TeX, and one that begins with _ is shown.
            text.set_parse_math(False)
            text.set_text(str(entry.get_label()))
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # a name in a script that the font does not have
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
