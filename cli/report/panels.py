"""The figures of a report before they are drawn: which curves, on which axes, with which ticks."""

import math
import re
from dataclasses import dataclass

from lit_lipschitz.cli.report.runs import Run

# Okabe and Ito's colours, distinguishable with any kind of colour vision: on white, and lighter ones on black.
LIGHT = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B58900", "#2A9FD6", "#555555")
DARK = ("#4DA6E0", "#FF8A3D", "#2FC79B", "#E5A0C6", "#F0C643", "#9BD8F7", "#BBBBBB")
MARKERS = "osD^"
"""Circle, square, diamond, triangle at a line's end: together with the colours, 28 runs look different."""

_LARGEST, _SMALLEST = 1e150, 1e-150
"""Sizes of what is drawn: larger values are left out, as infinite ones are, and smaller ones are 0."""

_OURS = {
    "rate": "learning rate computed from L, before the schedule",
    "lr": "learning rate that the optimizer used",
    "constant": "L, the Lipschitz constant",
    "activation_norm": "K_z, the size of the head's inputs",
    "weight_norm": "W, the largest norm of a weight",
}
"""The curves of LipschitzLR under the names that they have everywhere; with several optimizers each has its own."""
_CONTENT = (
    ("accuracy", "Accuracy", "%", "val_acc", "train_acc"),
    ("loss", "Loss", "", "val_loss", "train_loss"),
    *(
        (name, f"{name}: {meaning}", "", rf"lipschitz/(\d+/)?{name}{'|lr-.+' if name == 'lr' else ''}", "")
        for name, meaning in _OURS.items()
    ),
)


@dataclass(frozen=True)
class Line:
    """A curve of a run: epochs and values."""

    run: int
    tag: str
    dashed: bool
    points: list[tuple[int, float]]


@dataclass(frozen=True)
class Axis:
    """An axis: its ends, its ticks, and whether it is logarithmic."""

    low: float
    high: float
    ticks: list[float]
    log: bool = False

    def share(self, value: float) -> float:
        """The position of a value between the ends, from 0 to 1."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return (value - low) / (high - low)

    def label(self, tick: float) -> str:
        """A tick's label, with enough digits to differ from the next one."""
        if self.log or len(self.ticks) < 2 or not 1e-4 <= (step := self.ticks[1] - self.ticks[0]) < 1e4:
            return number(tick)
        return f"{tick:.{max(0, -math.floor(math.log10(step * 1.001)))}f}"


@dataclass(frozen=True)
class Panel:
    """A diagram over the epochs."""

    key: str
    title: str
    unit: str
    lines: list[Line]
    x: Axis
    y: Axis


def panels(runs: list[Run]) -> list[Panel]:
    """The diagrams that have curves."""
    drawn = []
    for key, title, unit, solid, dashed in _CONTENT:
        lines = []
        for pattern, is_dashed in ((dashed, True), (solid, False)):
            lines += [line for i, run in enumerate(runs) for line in _lines(i, run, pattern, is_dashed, unit)]
        values = [value for line in lines for _, value in line.points]
        if values:
            last = max(epoch for line in lines for epoch, _ in line.points)
            drawn.append(Panel(key, title, unit, lines, epoch_axis(last), value_axis(values, log=unit != "%")))
    return drawn


def _lines(index: int, run: Run, pattern: str, dashed: bool, unit: str) -> list[Line]:
    lines: list[Line] = []
    for tag, curve in run.curves.items():
        if re.fullmatch(pattern, tag):
            points = [
                (epoch, curve[epoch] if abs(curve[epoch]) >= _SMALLEST else 0.0)
                for epoch in sorted(curve)
                if abs(curve[epoch]) <= _LARGEST
            ]
            if unit == "%" and max((value for _, value in points), default=0) <= 1:
                points = [(epoch, 100 * value) for epoch, value in points]
            # LearningRateMonitor's curve is for runs without LipschitzLR; a second optimizer's curve is dashed.
            if points and not (tag.startswith("lr-") and lines):
                lines.append(Line(index, tag, dashed or bool(lines), points))
    return lines


def has_training(drawn: list[Panel]) -> bool:
    """Whether there are training curves, which are dashed beside those of the validation."""
    return any(line.dashed and line.tag.startswith("train") for panel in drawn for line in panel.lines)


def epoch_axis(last: int) -> Axis:
    """The axis of the epochs, from 1 on."""
    step = max(1, round(_nice(last / 6)))
    ticks = [float(epoch) for epoch in range(0, last + 1, step) if epoch >= 1]
    # The first epoch is labelled too; every epoch is if there are few.
    return Axis(1.0, float(max(last, 2)), ticks if step == 1 else [1.0, *ticks])


def value_axis(values: list[float], log: bool = True) -> Axis:
    """An axis for some values, logarithmic if it may be, and they are positive and span more than a decade."""
    low, high = min(values), max(values)
    if log and low > 0 and high / low > 10:
        return Axis(low / (high / low) ** 0.04, high * (high / low) ** 0.04, _log_ticks(low, high), log=True)
    # Values that differ by float32's rounding are one value.
    same = high - low <= 1e-6 * max(abs(low), abs(high))
    margin = (0.1 * abs(high) or 1.0) if same else 0.05 * (high - low)
    # The axis of values that are never negative does not go below 0.
    bottom = max(low - margin, 0.0) if low >= 0 else low - margin
    top = high + margin
    step = _nice((top - bottom) / 6)
    ticks = [i * step for i in range(math.ceil(bottom / step - 1e-9), math.floor(top / step + 1e-9) + 1)]
    return Axis(bottom, top, ticks)


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    span = math.log10(high / low)
    factors = (1, 2, 5) if span < 2 else (1, 3) if span < 3 else (1,)
    every = max(1, round(span / 5))
    ticks = [factor * 10.0**decade for decade in decades if decade % every == 0 for factor in factors]
    return [tick for tick in ticks if low * 0.95 <= tick <= high * 1.05]


def _nice(step: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below the step."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * 0.999)


def number(value: float) -> str:
    """A number in few characters."""
    return f"{value:.4g}" if value == 0 or 1e-4 <= abs(value) < 1e5 else f"{value:.0e}".replace("e-0", "e-")
