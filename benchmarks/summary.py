"""Summarises the runs of compare.py, a row a task and policy, and makes the tables of the docs from the summary."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from tasks import TASKS

Rows = list[dict[str, Any]]
TUNED = {"lipschitz": "sgd", "lipschitz-adamw": "adamw", "lipschitz-schedulefree": "schedulefree"}
"""For each default the policy with the same optimizer and a fixed learning rate, which is tuned on a grid."""
TITLES = {"sgd": "SGD", "adamw": "AdamW", "schedulefree": "Schedule-Free"}


def summarise(runs: Rows) -> Rows:
    """A row for each task and policy: means over the seeds, with their standard errors.

    The row of a default has, in addition, the best fixed learning rate of its optimizer (``tuned``) and the mean
    ``difference`` of the test metric from it, over the seeds that both have.
    """
    cells: dict[tuple[str, str], Rows] = {}
    for run in runs:
        cells.setdefault((run["task"], run["policy"]), []).append(run)
    order = list(TASKS)
    rows = [_row(cells[cell]) for cell in sorted(cells, key=lambda cell: (order.index(cell[0]), _by_lr(cell[1])))]
    complete = []
    for row in rows:
        own = cells[row["task"], row["policy"]]
        tuned = best(rows, row["task"], TUNED[row["policy"]]) if row["policy"] in TUNED else None
        other = cells[row["task"], tuned["policy"]] if tuned else []
        complete.append({**row, **_difference(own, other), **_versions(own)})
    return complete


def _row(runs: Rows) -> dict[str, Any]:
    test, test_error = mean_and_error([run["test"] for run in runs])
    val, val_error = mean_and_error([run["val"] for run in runs])
    return {
        "task": runs[0]["task"],
        "policy": runs[0]["policy"],
        "seeds": len(runs),
        "test": test,
        "test_error": test_error,
        "val": val,
        "val_error": val_error,
        "diverged": sum(run["diverged"] for run in runs),
        "lr": statistics.median(run["rate"] for run in runs),
        "seconds": statistics.median(run["seconds"] for run in runs),
    }


def _difference(own: Rows, other: Rows) -> dict[str, Any]:
    tests = [{run["seed"]: run["test"] for run in runs} for runs in (own, other)]
    shared = sorted(tests[0].keys() & tests[1].keys())
    mean, error = mean_and_error([tests[0][seed] - tests[1][seed] for seed in shared]) if shared else (None, None)
    tuned = other[0]["policy"] if shared else None
    return {"tuned": tuned, "difference": mean, "difference_error": error, "pairs": len(shared) or None}


def _versions(runs: Rows) -> dict[str, str]:
    return {name: " / ".join(sorted({run[name] for run in runs})) for name in ("torch", "lightning", "device")}


def _by_lr(policy: str) -> tuple[str, float]:
    name, _, lr = policy.partition(":")
    return name, float(lr or 0)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and its standard error, None for a single value or where one is not finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return statistics.mean(values), None
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def best(rows: Rows, task: str, kind: str, enough: int | None = None) -> dict[str, Any] | None:
    """The row of the best learning rate of a grid, by the validation metric, or None if there is no grid.

    Rates with a diverged run are left out, and so are rates with fewer seeds than others, or than ``enough``: these
    were not continued since they were behind by more than the noise of the seeds.
    """
    grid = [row for row in rows if row["task"] == task and row["policy"].partition(":")[0] == kind]
    grid = [row for row in grid if not row["diverged"]]
    enough = enough or max((row["seeds"] for row in grid), default=0)
    return min((row for row in grid if row["seeds"] >= enough), key=_cost, default=None)


def _cost(row: dict[str, Any]) -> float:
    if math.isnan(row["val"]):
        return math.inf
    return -row["val"] if _is_accuracy(row["task"]) else row["val"]


def _is_accuracy(task: str) -> bool:
    return TASKS[task].metric == "accuracy"


def defaults(rows: Rows) -> str:
    """A Markdown table: each default and the best fixed learning rate of its optimizer."""
    by_name = {(row["task"], row["policy"]): row for row in rows}
    lines = ["| task | default | test | best fixed | test | default - best fixed | seeds |", "|---" * 7 + "|"]
    for row in rows:
        if row["tuned"]:
            other = by_name[row["task"], row["tuned"]]
            lines.append(
                f"| {row['task']} | {row['policy']} | {_text(row, 'test')} | {row['tuned']} | {_text(other, 'test')} | "
                f"{_with_unit(row)} | {row['pairs']} |"
            )
    return "\n".join(lines)


def _text(row: dict[str, Any], name: str) -> str:
    error = row[f"{name}_error"]
    return f"{row[name]:.4g}" if error is None else f"{row[name]:.4g} ± {error:.2g}"


def _with_unit(row: dict[str, Any]) -> str:
    return f"{_text(row, 'difference')} ({'points' if _is_accuracy(row['task']) else 'loss'})"


def regrets(rows: Rows) -> str:
    """A Markdown table: how far each policy, taken for all tasks, is behind the best one of each task.

    In points of accuracy or per cent of the loss, on the test part; the best policy of a task is chosen by validation,
    among those with at least 3 seeds where there are such.
    """
    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    gaps: dict[str, dict[str, float]] = {}
    for task in tasks:
        found = [row for row in rows if row["task"] == task]
        enough = min(3, max(row["seeds"] for row in found))
        target = min((row for row in found if row["seeds"] >= enough), key=_cost)
        for row in found:
            gaps.setdefault(row["policy"], {})[task] = _gap(row, target)
    complete = {policy: [found[task] for task in tasks] for policy, found in gaps.items() if len(found) == len(tasks)}
    lines = [f"| policy | {' | '.join(tasks)} | worst |", "|---" * (len(tasks) + 2) + "|"]
    for policy, found in sorted(complete.items(), key=lambda item: (max(item[1]), item[0])):
        cells = ["diverged" if gap == math.inf else f"{gap:.1f}" for gap in [*found, max(found)]]
        lines.append(f"| {policy} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _gap(row: dict[str, Any], target: dict[str, Any]) -> float:
    if row["diverged"]:
        return math.inf
    if _is_accuracy(row["task"]):
        return target["test"] - row["test"]
    return 100 * (row["test"] / target["test"] - 1)
