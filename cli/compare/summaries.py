"""Means, standard errors and differences of the policies over the seeds."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lit_lipschitz.cli.compare.policies import ComparedPolicy
from lit_lipschitz.cli.compare.recorder import Metric
from lit_lipschitz.cli.compare.results_file import Row

_STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; for more it is about 2."""


@dataclass(frozen=True)
class Estimate:
    """A mean of independent values."""

    mean: float
    standard_error: float | None  # None for a single value
    count: int = 1

    @staticmethod
    def of(values: Sequence[float]) -> "Estimate":
        """The mean of some values."""
        several = len(values) > 1 and all(map(math.isfinite, values))
        error = statistics.stdev(values) / math.sqrt(len(values)) if several else None
        return Estimate(sum(values) / len(values), error, len(values))

    @property
    def interval(self) -> float | None:
        """Half the width of the 95 % confidence interval by Student's t with count - 1 degrees of freedom."""
        if self.standard_error is None:
            return None
        return self.standard_error * (_STUDENT_T[self.count - 2] if self.count - 2 < len(_STUDENT_T) else 2.0)


@dataclass(frozen=True)
class Summary:
    """The results of a policy over all seeds."""

    policy: ComparedPolicy
    metric: str  # such as acc
    val: Estimate  # on the validation set, with the final weights
    test: Estimate | None  # on the test set; None if a run has none
    best_epoch_val: Estimate  # of the best epochs on the validation set
    seconds: float  # mean time of a run
    n: int  # number of runs
    diverged: int  # number of runs that diverged
    best_fixed_rate_by_validation: bool = False
    difference: Estimate | None = None  # to the best fixed rate, paired by seed, on the test set if there is one

    @property
    def final(self) -> Estimate:
        """The value that is reported: the test set's if there is one."""
        return self.test or self.val

    @property
    def plain(self) -> dict[str, Any]:
        """The values for JSON."""
        return {**asdict(self), "policy": self.policy.name}


def summarize(rows: Sequence[Row], policies: Sequence[ComparedPolicy]) -> list[Summary]:
    """One summary for each policy that has runs, in the order of the policies."""
    grouped = {policy: [row for row in rows if row.policy == policy.name] for policy in policies}
    found = [_summary(policy, own) for policy, own in grouped.items() if own]
    reference = _best_fixed_rate(found)
    if reference is None:
        return found
    return [
        replace(one, best_fixed_rate_by_validation=True)
        if one is reference
        else replace(one, difference=paired_difference(grouped[one.policy], grouped[reference.policy]))
        for one in found
    ]


def paired_difference(rows: Sequence[Row], others: Sequence[Row]) -> Estimate | None:
    """The mean of the differences between two policies' runs with the same seed, and its standard error.

    Runs with the same seed share their initial weights and the order of their data, so their noise is not independent.

    Returns:
        The estimate, with one difference a seed that both have; None if they share no seed.
    """
    tested = all(row.test is not None for row in (*rows, *others))
    pairs = {row.seed: [row.test if tested and row.test is not None else row.val] for row in rows}
    for row in others:
        if row.seed in pairs:
            pairs[row.seed].append(row.test if tested and row.test is not None else row.val)
    differences = [pair[0] - pair[1] for pair in pairs.values() if len(pair) == 2]
    return Estimate.of(differences) if differences else None


def _summary(policy: ComparedPolicy, rows: Sequence[Row]) -> Summary:
    tests = [row.test for row in rows if row.test is not None]
    return Summary(
        policy,
        rows[0].metric,
        val=Estimate.of([row.val for row in rows]),
        test=Estimate.of(tests) if len(tests) == len(rows) else None,
        best_epoch_val=Estimate.of([row.best_val for row in rows]),
        seconds=sum(row.seconds for row in rows) / len(rows),
        n=len(rows),
        diverged=sum(row.diverged for row in rows),
    )


def _best_fixed_rate(found: Sequence[Summary]) -> Summary | None:
    """The best fixed rate by validation, the first of equals; rates for which a seed failed do not count."""
    best: Summary | None = None
    most = max((one.n for one in found), default=0)
    for one in [one for one in found if one.policy.rate is not None and one.n == most]:
        if Metric(one.metric).better(one.val.mean, best.val.mean if best else math.nan):
            best = one
    return best
