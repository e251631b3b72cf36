"""The table of `lit-lipschitz compare`, and its verdict: does the computed rate beat the best fixed one?"""

import math
import sys
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from lit_lipschitz.cli.compare.recorder import Metric
from lit_lipschitz.cli.compare.summaries import Estimate, Summary


def verdict(found: Sequence[Summary]) -> str:
    """Sentences with the numbers, one for each policy that computes its rate, and hints."""
    fixed = [one for one in found if one.policy.rate is not None]
    reference = next((one for one in fixed if one.reference), None)
    lines = [_sentence(one, reference, len(fixed)) for one in found if one.policy.rate is None]
    if reference is not None:
        lines += _hint_at_edge(reference, fixed)
    if found and max(one.runs for one in found) == 1:
        lines.append("With one seed there is no standard error, so nothing tells a difference from noise: --seeds 3.")
    return "\n".join(lines)


def _sentence(one: Summary, reference: Summary | None, fixed: int) -> str:
    unit = " %" if _in_percent(one.metric) else ""
    diverged = f" ({one.diverged} of {one.runs} runs diverged)" if one.diverged else ""
    stage = "test" if one.test else "validation"
    start = f"{one.policy.name}: {_text(one.final, one.metric)}{unit} on the {stage} set{diverged}"
    if reference is None or one.difference is None:
        return f"{start}; there is no fixed rate to compare it with."
    choice = f"the best of the {fixed} fixed rates by validation" if fixed > 1 else "the fixed rate"
    other = f"{choice}, {reference.policy.name}: {_text(reference.final, one.metric)}{unit}"
    difference = _text(one.difference, one.metric, sign=True)
    return f"{start}; {other}. The difference, {difference}, is {_judgement(one.difference, one.metric)}."


def _judgement(difference: Estimate, metric: str) -> str:
    if not math.isfinite(difference.mean):
        return "not a number"
    if difference.interval is None:
        return "that of one seed each"
    scale, digits = _scale(metric)
    interval = f"the 95 % confidence interval ({difference.count} seeds), +- {scale * difference.interval:.{digits}f}"
    if abs(difference.mean) <= difference.interval:
        return f"within the noise, {interval}"
    better = (difference.mean < 0) == Metric(metric).lower
    return f"{'an improvement' if better else 'a deterioration'} outside {interval}"


def _hint_at_edge(reference: Summary, fixed: Sequence[Summary]) -> list[str]:
    """A hint if the best rate is the largest or smallest of its kind, so that a better one may lie beyond."""
    rates = [one.policy.rate or 0.0 for one in fixed if one.policy.kind == reference.policy.kind]
    rate, name = reference.policy.rate, reference.policy.name
    if len(rates) > 1 and rate == max(rates):
        return [f"{name} is the largest of its rates that were tried; a larger one may be better still."]
    if len(rates) > 1 and rate == min(rates):
        return [f"{name} is the smallest of its rates that were tried; a smaller one may be better still."]
    return []


def _in_percent(metric: str) -> bool:
    return metric.endswith(("acc", "accuracy"))


def _scale(metric: str) -> tuple[float, int]:
    """The factor by which a metric is shown, and its decimals."""
    return (100.0, 2) if _in_percent(metric) else (1.0, 4)


def _text(value: Estimate | None, metric: str, sign: bool = False) -> str:
    if value is None:
        return ""
    scale, digits = _scale(metric)
    mean = f"{scale * value.mean:{'+' if sign else ''}.{digits}f}"
    return mean if value.error is None else f"{mean} +- {scale * value.error:.{digits}f}"


def print_summaries(found: Sequence[Summary], failures: Mapping[str, str], said: str) -> None:
    """Prints the table and the verdict: with colours and lines in a terminal, plainly elsewhere.

    Args:
        found: The summaries, at least one.
        failures: Reasons of the policies that failed.
        said: The verdict.
    """
    metric, tested = found[0].metric, any(one.test for one in found)
    unit = ", %" if _in_percent(metric) else ""
    columns = ["policy", f"val_{metric}{unit}", f"test_{metric}{unit}", "best epoch*", "to best fixed", "seconds", "n",
               "diverged"]  # fmt: skip
    terminal = sys.stdout.isatty()
    table = Table(box=box.SIMPLE_HEAD if terminal else None, pad_edge=False, header_style="bold")
    for name in columns:
        # A narrow terminal wraps a cell, and loses nothing.
        whole = name in ("policy", "n") or not terminal
        if tested or not name.startswith("test_"):
            table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=whole, overflow="fold")
    for one in found:
        difference = "it is" if one.reference else _text(one.difference, metric, sign=True)
        tests = [_text(one.test, metric)] if tested else []
        best = _text(Estimate(one.best.mean, None), metric)
        cells = [one.policy.name, _text(one.val, metric), *tests, best, difference]
        cells += [f"{one.seconds:.1f}", str(one.runs), str(one.diverged)]
        table.add_row(*cells, style="bold" if one.policy.rate is None else None)
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=not terminal)
    if not terminal:
        console.width = 200
    console.print(table)
    for name, reason in failures.items():
        print(f"{name}: failed: {reason}")
    print(
        "mean +- standard error over the seeds, with the weights after the last epoch; the best fixed rate is chosen "
        f"by val_{metric}, the difference is on the {'test' if tested else 'validation'} set\n"
        "* the best epoch of each run by the validation set, for information: nothing is chosen or reported by it\n"
    )
    print(said)
