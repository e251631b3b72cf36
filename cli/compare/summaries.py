"""Means, standard errors and differences of the policies over the seeds."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lit_lipschitz.cli.compare.policies import Policy
from lit_lipschitz.cli.compare.recorder import Metric
from lit_lipschitz.cli.compare.results_file import Row

_STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; for more it is about 2."""


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error (None for a single value), and the number of values."""

    mean: float
    error: float | None
    count: int = 1

    @staticmethod
    def of(values: Sequence[float]) -> "Estimate":
        """The mean of some values."""
        several = len(values) > 1 and all(map(math.isfinite, values))
        error = statistics.stdev(values) / math.sqrt(len(values)) if several else None
        return Estimate(sum(values) / len(values), error, len(values))

    def minus(self, other: "Estimate") -> "Estimate":
        """The difference of two independent means."""
        both = self.error is not None and other.error is not None
        error = math.hypot(self.error or 0.0, other.error or 0.0) if both else None
        return Estimate(self.mean - other.mean, error, min(self.count, other.count))

    @property
    def interval(self) -> float | None:
        """Half the width of the 95 % confidence interval, with the degrees of freedom of the smaller sample."""
        if self.error is None:
            return None
        return self.error * (_STUDENT_T[self.count - 2] if self.count - 2 < len(_STUDENT_T) else 2.0)

    @property
    def plain(self) -> dict[str, float | None]:
        """The values for JSON."""
        return {"mean": self.mean, "standard_error": self.error}


@dataclass(frozen=True)
class Summary:
    """The results of a policy over all seeds.

    Attributes:
        policy: The policy.
        metric: Name of the metric, such as ``acc``.
        val: The metric on the validation set, with the final weights.
        test: The metric on the test set; None if a run has none.
        best: The best epochs' values on the validation set.
        seconds: Mean time of a run.
        runs: Number of runs.
        diverged: Number of runs that diverged.
        reference: Whether this is the best fixed rate by validation.
        difference: To the best fixed rate, on the test set if there is one, else on the validation set.
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
        """The value that is reported: the test set's if there is one."""
        return self.test or self.val

    @property
    def plain(self) -> dict[str, Any]:
        """The values for JSON."""
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


def summarize(rows: Sequence[Row], policies: Sequence[Policy]) -> list[Summary]:
    """One summary for each policy that has runs, in the order of the policies."""
    grouped = [(policy, [row for row in rows if row.policy == policy.name]) for policy in policies]
    found = [_summary(policy, own) for policy, own in grouped if own]
    reference = _best_fixed_rate(found)
    if reference is None:
        return found
    return [
        replace(one, reference=True) if one is reference else replace(one, difference=one.final.minus(reference.final))
        for one in found
    ]


def _summary(policy: Policy, rows: Sequence[Row]) -> Summary:
    tests = [row.test for row in rows if row.test is not None]
    return Summary(
        policy,
        rows[0].metric,
        val=Estimate.of([row.val for row in rows]),
        test=Estimate.of(tests) if len(tests) == len(rows) else None,
        best=Estimate.of([row.best_val for row in rows]),
        seconds=sum(row.seconds for row in rows) / len(rows),
        runs=len(rows),
        diverged=sum(row.diverged for row in rows),
    )


def _best_fixed_rate(found: Sequence[Summary]) -> Summary | None:
    """The best fixed rate by validation, the first of equals; rates for which a seed failed do not count."""
    best: Summary | None = None
    most = max((one.runs for one in found), default=0)
    for one in [one for one in found if one.policy.rate is not None and one.runs == most]:
        if Metric(one.metric).better(one.val.mean, best.val.mean if best else math.nan):
            best = one
    return best
