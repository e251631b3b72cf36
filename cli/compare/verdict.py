"""What the runs of `lit-lipschitz compare` say: means and their errors, a table, and a sentence with the numbers."""

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from lit_lipschitz.cli.compare.policies import Policy
from lit_lipschitz.cli.compare.recorders import Metric
from lit_lipschitz.cli.compare.results_file import Row, finite

_PERCENT = ("acc", "accuracy")
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""Half the width of a 95 % interval in standard errors, by degrees of freedom from 1 on; further on it is about 2."""


@dataclass(frozen=True)
class Estimate:
    """A mean of so many numbers and its standard error, which a single number has not."""

    mean: float
    error: float | None
    count: int = 1

    @staticmethod
    def of(values: Sequence[float]) -> "Estimate":
        """The mean of some values, the error from their spread around it."""
        mean = sum(values) / len(values)
        several = len(values) > 1 and all(map(math.isfinite, values))
        return Estimate(mean, statistics.stdev(values) / math.sqrt(len(values)) if several else None, len(values))

    def minus(self, other: "Estimate") -> "Estimate":
        """The difference of two means."""
        both = self.error is not None and other.error is not None
        error = math.hypot(self.error or 0.0, other.error or 0.0) if both else None
        return Estimate(self.mean - other.mean, error, min(self.count, other.count))

    @property
    def interval(self) -> float | None:
        """Half the width of a 95 % interval by Student's t, with the degrees of freedom of the smaller sample."""
        if self.error is None:
            return None
        return self.error * (_STUDENT[self.count - 2] if self.count - 2 < len(_STUDENT) else 2.0)

    @property
    def plain(self) -> dict[str, float | None]:
        """As JSON has it."""
        return {"mean": finite(self.mean), "standard_error": self.error}


@dataclass(frozen=True)
class Summary:
    """What all seeds of a policy have come to.

    Attributes:
        policy: The policy.
        metric: What the values are, as ``acc``.
        val: With the final weights, on the validation set.
        test: The same on the test set; None where a run has none.
        best: The best epochs' values on the validation set.
        seconds: Mean time of a run.
        runs: Their number.
        diverged: How many of them diverged.
        reference: Whether it is the best of the fixed rates by validation.
        difference: To that one, on the test set, or else on the validation set; None where there is none.
    """

    policy: Policy
    metric: str
    val: Estimate
    test: Estimate | None
    best: Estimate
    seconds: float
    runs: int
    diverged: int
    reference: bool = False
    difference: Estimate | None = None

    @property
    def final(self) -> Estimate:
        """What is reported: the test set's value if there is one."""
        return self.test or self.val

    @property
    def stage(self) -> str:
        """Where the final value is from."""
        return "test" if self.test else "validation"

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "policy": self.policy.name,
            "metric": self.metric,
            "val": self.val.plain,
            "test": self.test.plain if self.test else None,
            "best_epoch_val": self.best.plain,
            "difference": self.difference.plain if self.difference else None,
            "best_fixed_rate_by_validation": self.reference,
            "seconds": self.seconds,
            "n": self.runs,
            "diverged": self.diverged,
        }


def summaries(rows: Sequence[Row], policies: Sequence[Policy]) -> list[Summary]:
    """A summary a policy, of those that have runs, in the policies' order.

    Args:
        rows: The runs.
        policies: The policies.
    """
    found = []
    for policy in policies:
        own = [row for row in rows if row.policy == policy.name]
        if own:
            tests = [row.test for row in own if row.test is not None]
            found.append(
                Summary(
                    policy,
                    own[0].metric,
                    Estimate.of([row.val for row in own]),
                    Estimate.of(tests) if len(tests) == len(own) else None,
                    Estimate.of([row.best_val for row in own]),
                    sum(row.seconds for row in own) / len(own),
                    len(own),
                    sum(row.diverged for row in own),
                )
            )
    reference = _reference(found)
    if reference is None:
        return found
    return [
        replace(one, reference=True) if one is reference else replace(one, difference=one.final.minus(reference.final))
        for one in found
    ]


def _reference(found: Sequence[Summary]) -> Summary | None:
    """The best of the fixed rates by validation; of equals the first."""
    best: Summary | None = None
    most = max((one.runs for one in found), default=0)
    # A rate that has lost a seed to a failure has not shown what the others have.
    whole = [one for one in found if one.policy.rate is not None and one.runs == most]
    for one in whole:
        if Metric(one.metric).better(one.val.mean, best.val.mean if best else math.nan):
            best = one
    return best


# -- in words ----------------------------------------------------------------------------------------------------------


def answer(found: Sequence[Summary]) -> str:
    """Whether it helps, in words with the numbers; a line a policy that computes its rate."""
    fixed = [one for one in found if one.policy.rate is not None]
    reference = next((one for one in fixed if one.reference), None)
    lines = [_sentence(one, reference, len(fixed)) for one in found if one.policy.rate is None]
    if reference is not None:
        lines += [line for line in (_edge(reference, fixed),) if line]
    if found and max(one.runs for one in found) == 1:
        lines.append("With one seed there is no standard error, so nothing tells a difference from noise: --seeds 3.")
    return "\n".join(lines)


def _sentence(one: Summary, reference: Summary | None, fixed: int) -> str:
    unit = " %" if _percent(one.metric) else ""
    lost = f" ({one.diverged} of {one.runs} runs diverged)" if one.diverged else ""
    start = f"{one.policy.name}: {_text(one.final, one.metric)}{unit} on the {one.stage} set{lost}"
    if reference is None or one.difference is None:
        return f"{start}; there is no fixed rate to compare it with."
    choice = f"the best of the {fixed} fixed rates by validation" if fixed > 1 else "the fixed rate"
    other = f"{choice}, {reference.policy.name}: {_text(reference.final, one.metric)}{unit}"
    difference = _text(one.difference, one.metric, sign=True)
    return f"{start}; {other}. The difference, {difference}, is {_verdict(one.difference, one.metric)}."


def _verdict(difference: Estimate, metric: str) -> str:
    if finite(difference.mean) is None:
        return "no number"
    if difference.interval is None:
        return "that of one seed each"
    scale, digits = _scale(metric)
    width = f"the 95 % interval of {difference.count} seeds, +- {scale * difference.interval:.{digits}f}"
    if abs(difference.mean) <= difference.interval:
        return f"within the noise, {width}"
    better = (difference.mean < 0) == Metric(metric).lower
    return f"{'for the better' if better else 'for the worse'}, beyond {width}"


def _edge(reference: Summary, fixed: Sequence[Summary]) -> str:
    """A hint where the best rate is the last one that was tried, so that a better one may be beyond."""
    rates = [one.policy.rate or 0.0 for one in fixed if one.policy.kind == reference.policy.kind]
    rate = reference.policy.rate
    if len(rates) < 2 or rate not in (min(rates), max(rates)):
        return ""
    end = "largest" if rate == max(rates) else "smallest"
    beyond = "larger" if end == "largest" else "smaller"
    return f"{reference.policy.name} is the {end} of its rates that were tried; a {beyond} one may be better still."


def _percent(metric: str) -> bool:
    return metric.endswith(_PERCENT)


def _scale(metric: str) -> tuple[float, int]:
    """The factor with which a metric is shown, and its digits."""
    return (100.0, 2) if _percent(metric) else (1.0, 4)


def _text(value: Estimate, metric: str, sign: bool = False) -> str:
    scale, digits = _scale(metric)
    mean = f"{scale * value.mean:{'+' if sign else ''}.{digits}f}"
    return mean if value.error is None else f"{mean} +- {scale * value.error:.{digits}f}"


# -- in a terminal -----------------------------------------------------------------------------------------------------


def table(found: Sequence[Summary]) -> list[list[str]]:
    """The table: a header, then a row a policy."""
    metric = found[0].metric
    unit = ", %" if _percent(metric) else ""
    tested = any(one.test for one in found)
    rows = [["policy", f"val_{metric}{unit}", *([f"test_{metric}{unit}"] if tested else []), "best epoch*",
             "to best fixed", "seconds", "n", "diverged"]]  # fmt: skip
    for one in found:
        difference = _text(one.difference, metric, sign=True) if one.difference else "it is" if one.reference else ""
        rows.append([
            one.policy.name, _text(one.val, metric),
            *([_text(one.test, metric) if one.test else ""] if tested else []),
            _text(Estimate(one.best.mean, None), metric), difference,
            f"{one.seconds:.1f}", str(one.runs), str(one.diverged),
        ])  # fmt: skip
    return rows


def show(found: Sequence[Summary], failures: Mapping[str, str], said: str) -> None:
    """Prints the table and the sentences: with colours and lines in a terminal, plainly elsewhere."""
    terminal = sys.stdout.isatty()
    rows = table(found)
    drawn = Table(box=box.SIMPLE_HEAD if terminal else None, pad_edge=False, header_style="bold")
    for name in rows[0]:
        # A narrow terminal breaks a cell into lines, and loses nothing.
        whole = name in ("policy", "n") or not terminal
        drawn.add_column(name, justify="left" if name == "policy" else "right", no_wrap=whole, overflow="fold")
    for one, cells in zip(found, rows[1:], strict=True):
        drawn.add_row(*cells, style="bold" if one.policy.rate is None else None)
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=not terminal)
    if not terminal:
        console.width = 200
    console.print(drawn)
    for name, reason in failures.items():
        print(f"{name}: failed: {reason}")
    stage = "test" if any(one.test for one in found) else "validation"
    print(
        "mean +- standard error of the seeds, with the weights after the last epoch; the best fixed rate is chosen by "
        f"val_{found[0].metric}, the difference is on the {stage} set\n"
        "* the best epoch of each run by the validation set, to look at: nothing is chosen or reported by it\n"
    )
    print(said)
