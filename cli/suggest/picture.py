"""Draws the loss against the learning rate as a PNG file, with matplotlib."""

import io

from lit_lipschitz.cli.suggest.text import loss_range
from lit_lipschitz.suggestion import LossCurve


def png(curve: LossCurve) -> bytes:
    """The picture of a curve.

    Raises:
        ImportError: There is no matplotlib.
    """
    # Without pyplot, which looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rate = curve.rates[len(curve.rates) // 2]
    figure = Figure(figsize=(7.2, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    area = figure.add_subplot()
    area.plot(curve.rates, curve.losses, marker="o", markersize=3)
    area.axvline(rate, color="#555555", linestyle=(0, (4, 2)), linewidth=1.0, label=f"suggested rate {rate:.4g}")
    area.axhline(curve.loss, color="#999999", linewidth=0.7, label=f"before the step {curve.loss:.4g}")
    low, high = loss_range(curve)
    area.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    area.set_xscale("log")
    area.set_xlabel("learning rate")
    area.set_title("loss of a held-out batch after one step", loc="left", fontsize=11)
    area.legend(frameon=False, fontsize=9)
    area.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
