"""The table of `lit-lipschitz compare`, and its verdict: does the computed rate beat the best fixed one?"""

import math
from collections.abc import Mapping, Sequence

from lit_lipschitz.cli.compare.recorder import Metric
from lit_lipschitz.cli.compare.summaries import Estimate, Summary
from lit_lipschitz.cli.output import align

_NOISE = 1.96
"""Standard errors that a difference of nothing but noise exceeds in 5 % of comparisons with many seeds."""
_ROUNDING = 1e-9
"""Relative spread of equal differences that are rounded."""


def verdict(found: Sequence[Summary]) -> str:
    """Sentences with the numbers, one for each policy that computes its rate, and hints."""
    fixed = [one for one in found if one.policy.rate is not None]
    reference = next((one for one in fixed if one.best_fixed_rate_by_validation), None)
    lines = [_sentence(one, reference, len(fixed)) for one in found if one.policy.rate is None]
    if reference is not None:
        lines += _hint_at_edge(reference, fixed)
    if found and max(one.n for one in found) == 1:
        lines.append("One seed has no standard error, so the difference cannot be judged; pass --seeds 3.")
    return "\n".join(lines)


def _sentence(one: Summary, reference: Summary | None, fixed: int) -> str:
    unit = " %" if _in_percent(one.metric) else ""
    diverged = f" ({one.diverged} of {one.n} runs diverged)" if one.diverged else ""
    stage = "test" if one.test else "validation"
    start = f"{one.policy.name}: {_text(one.final, one.metric)}{unit} on the {stage} set{diverged}"
    if reference is None or one.difference is None:
        return f"{start}; there is no fixed rate to compare it with."
    choice = f"the best of the {fixed} fixed rates by validation is" if fixed > 1 else "the fixed rate is"
    other = f"{choice} {reference.policy.name} with {_text(reference.final, one.metric)}{unit}"
    difference = _text(one.difference, one.metric, sign=True)
    return f"{start}; {other}. The difference, {difference}, is {_judgement(one.difference, one.metric)}."


def _judgement(difference: Estimate, metric: str) -> str:
    if not math.isfinite(difference.mean):
        return "not a number"
    if difference.interval is None or difference.standard_error is None:
        return "from a single seed"
    size = abs(difference.mean)
    kind = "an improvement" if (difference.mean < 0) == Metric(metric).lower else "a deterioration"
    if size > 0 and difference.standard_error <= _ROUNDING * size:
        return f"the same with each of the {difference.count} seeds, so its noise is not known; pass more --seeds"
    scale, digits = _scale(metric)
    width = f"{scale * difference.interval:.{digits}f}"
    interval = f"the 95 % confidence interval of +- {width} ({difference.count} seeds, paired)"
    if size > difference.interval:
        return f"{kind} outside {interval}"
    if size <= _NOISE * difference.standard_error:
        return f"within the noise, inside {interval}"
    return (
        f"{kind} of {size / difference.standard_error:.1f} standard errors, but inside {interval}: too few seeds to "
        "tell; pass more --seeds"
    )


def _hint_at_edge(reference: Summary, fixed: Sequence[Summary]) -> list[str]:
    """A hint if the best rate is the largest or smallest of its kind, so that a better one may lie beyond."""
    kind = reference.policy.kind
    rates = [one.policy.rate or 0.0 for one in fixed if one.policy.kind == kind]
    rate, name = reference.policy.rate, reference.policy.name
    if len(rates) > 1 and rate == max(rates):
        return [f"{name} is the largest {kind} rate that was tried; a larger one may be better still."]
    if len(rates) > 1 and rate == min(rates):
        return [f"{name} is the smallest {kind} rate that was tried; a smaller one may be better still."]
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
    return mean if value.standard_error is None else f"{mean} +- {scale * value.standard_error:.{digits}f}"


def print_summaries(found: Sequence[Summary], failures: Mapping[str, str], said: str) -> None:
    """Prints the table of the summaries, the reasons of the policies that failed, and the verdict."""
    metric, tested = found[0].metric, any(one.test for one in found)
    unit = ", %" if _in_percent(metric) else ""
    tests = [f"test_{metric}{unit}"] if tested else []
    rows = [["policy", f"val_{metric}{unit}", *tests, "best epoch*", "to best fixed", "seconds", "n", "diverged"]]
    for one in found:
        tests = [_text(one.test, metric)] if tested else []
        best = _text(Estimate(one.best_epoch_val.mean, None), metric)
        difference = "best fixed" if one.best_fixed_rate_by_validation else _text(one.difference, metric, sign=True)
        counts = [f"{one.seconds:.1f}", str(one.n), str(one.diverged)]
        rows.append([one.policy.name, _text(one.val, metric), *tests, best, difference, *counts])
    print("\n".join(align(rows, left=0)))
    for name, reason in failures.items():
        print(f"{name}: failed: {reason}")
    print(
        "\nEntries are means +- standard errors over the seeds, with the weights of the last epoch.\n"
        f"The best fixed rate is the one with the best val_{metric}. Differences to it are on the "
        f"{'test' if tested else 'validation'} set,\npaired by seed.\n"
        f"* best val_{metric} of any epoch, for information only\n"
    )
    print(said)
