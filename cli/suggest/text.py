"""The text of `lit-lipschitz suggest`, with the loss against the learning rate in characters."""

import math
import textwrap

from lit_lipschitz.measurement.gradient_noise import CONFIDENCE
from lit_lipschitz.suggestion import LossCurve, Suggestion

_ROWS, _STEP = 11, 3


def text(found: Suggestion) -> str:
    """The suggestion as text of at most 80 columns."""
    low, high = found.rate_range
    over = f"; {low:.4g} to {high:.4g} over {len(found.rates)} batches" if len(found.rates) > 1 else ""
    loss = "not recognised" if found.loss == "measured" else found.loss
    rows = [
        ("rate", f"{found.rate:.6g}, the learning rate of the first step, before the schedule's factor{over}"),
        ("L", f"{found.constant:.6g}, {found.meaning}{', a proven bound' if found.kind == 'bound' else ''}"),
        ("loss", f"{loss}, of the output of {found.output_layers}"),
        ("batch", f"{found.batch_size} examples in an optimizer step; {effective_batch(found)}"),
    ]
    lines = [textwrap.fill(f"{name:6} {words}", 80, subsequent_indent=" " * 7) for name, words in rows]
    return "\n".join([*lines, *(["", *plot(found.curve)] if found.curve is not None else [])])


def effective_batch(found: Suggestion) -> str:
    """The noise scale in words, with its confidence interval."""
    noise, count = found.noise, len(found.rates)
    if noise is None:
        return "the gradient noise scale needs at least 2 batches"
    low = _rounded(noise.low)
    if noise.value is None:
        return (
            f"the gradient noise scale is at least {low}: larger batches save steps up to there. {count} batches are "
            "too few to estimate it"
        )
    upper = f"to {_rounded(noise.high)}" if noise.high < math.inf else "or more; use more batches for a narrower one"
    return (
        f"the gradient noise scale is about {_rounded(noise.value)} ({100 * CONFIDENCE:.0f} % interval from {count} "
        f"batches: {low} {upper}) and grows during training; batch sizes above it save few steps"
    )


def _rounded(value: float) -> str:
    """A number of examples, with two digits that count."""
    return f"{float(f'{value:.2g}'):,.0f}" if value >= 1 else f"{value:.2g}"


def plot(curve: LossCurve) -> list[str]:
    """The curve as lines of characters, with a column of bars at the suggested rate."""
    low, high = loss_range(curve)
    middle = len(curve.rates) // 2
    width = _STEP * (len(curve.rates) - 1) + 1

    def row_of(loss: float) -> int:
        return round((high - loss) / (high - low) * (_ROWS - 1)) if loss <= high else 0

    cells = [["|" if column == _STEP * middle else " " for column in range(width)] for _ in range(_ROWS)]
    for i, loss in enumerate(curve.losses):
        cells[row_of(loss)][_STEP * i] = "O" if i == middle else "*" if loss <= high else "^"
    labels = {0: high, _ROWS - 1: low, row_of(curve.loss): curve.loss}
    lines = [f"{f'{labels[i]:.4g}' if i in labels else '':>10} {''.join(row)}".rstrip() for i, row in enumerate(cells)]
    first, rate, last = (f"{curve.rates[i]:.3g}" for i in (0, middle, -1))
    half = _STEP * middle - len(rate) // 2
    axis = f"{first:{half}}{rate:{width - half - len(last)}}{last}"
    return [
        f"loss of a held-out batch after one step at each learning rate; {curve.loss:.4g} before",
        *lines,
        f"{'':10} {'-' * width}",
        f"{'':10} {axis}",
        f"{'':10} O: the suggested rate" + (", ^: off scale" if any("^" in row for row in cells) else ""),
    ]


def loss_range(curve: LossCurve) -> tuple[float, float]:
    """The losses that a picture shows: from the lowest one to as far above the loss before the step, or a bit more."""
    finite = [loss for loss in (curve.loss, *curve.losses) if math.isfinite(loss)]
    low = min(finite)
    high = min(max(finite), curve.loss + max(curve.loss - low, 0.1 * abs(curve.loss)))
    return low, high if high > low else low + 1
