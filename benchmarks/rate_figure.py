"""Draws docs/rates.png: test accuracy over a fixed learning rate on three tasks, and ``LipschitzLR()`` beside it.

    python benchmarks/rate_figure.py

The grids are of SGD with momentum 0.9, a warm-up and a decay; the summaries are those of readme_tables.py. Bars are
standard errors over the seeds; a point without one is a single run.
"""

from pathlib import Path
from typing import Any

import matplotlib
from readme_tables import BOUNDED, NAMES, fixed_rates
from rows import read_summary

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PICTURE = Path(__file__).parent.parent / "docs" / "rates.png"
TASKS = ("digits_mlp", "mnist_cnn", "cifar10_resnet20")
ROOM = (9.0, 1.5)
"""Points of accuracy below and above the best one that a panel shows; a point below is drawn at the lower edge."""


def points(rows: list[dict[str, Any]], task: str) -> list[tuple[float, float, float]]:
    """Learning rate, accuracy and standard error of the fixed rates of a task."""
    grid = [row for row in rows if row["task"] == task and row["policy"].startswith("sgd:")]
    found = [(float(row["policy"].partition(":")[2]), row["test"], row["test_error"] or 0.0) for row in grid]
    return sorted(found)


def draw(axes: Any, task: str, grids: list[dict[str, Any]], computed: list[dict[str, Any]]) -> None:
    """Draws a panel."""
    grid = points(grids, task)
    (own,) = [row for row in computed if (row["task"], row["policy"]) == (task, "lipschitz")]
    top = max(own["test"], *(accuracy for _, accuracy, _ in grid))
    low = top - ROOM[0]
    rates, accuracies, errors = zip(*grid, strict=True)
    shown = [max(accuracy, low + 0.35) for accuracy in accuracies]
    hidden = [0.0 if accuracy < low else error for accuracy, error in zip(accuracies, errors, strict=True)]
    axes.errorbar(rates, shown, hidden, fmt="o-", color="#4c72b0", label="fixed learning rate")
    for rate, accuracy, height in zip(rates, accuracies, shown, strict=True):
        if accuracy < low:
            axes.annotate(f"{accuracy:.0f} %", (rate, height), (0, 6), textcoords="offset points", ha="center")
    axes.errorbar(
        own["lr"],
        own["test"],
        own["test_error"] or 0.0,
        fmt="*",
        markersize=17,
        color="#c44e52",
        zorder=3,
        label="LipschitzLR(), nothing tuned",
    )
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_ylim(low, top + ROOM[1])
    axes.set_title(NAMES[task], fontsize=11)
    axes.set_xlabel("learning rate")
    axes.grid(alpha=0.3)


def main() -> None:
    """Draws the picture."""
    grids, computed = fixed_rates(), read_summary(BOUNDED)
    figure, panels = plt.subplots(1, len(TASKS), figsize=(11, 3.3), layout="constrained")
    for axes, task in zip(panels, TASKS, strict=True):
        draw(axes, task, grids, computed)
    panels[0].set_ylabel("test accuracy, %")
    panels[-1].legend(loc="lower center", fontsize=9)
    figure.savefig(PICTURE, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
