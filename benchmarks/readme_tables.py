"""The two tables of README.md: ``LipschitzLR()`` and tuned learning rates, on everyday tasks and on published ones.

The everyday tasks are those of compare.py. results/bounded.csv has the runs of ``LipschitzLR()`` with its present rule,
and fixed learning rates that were run again with more seeds; results/compare.csv has the grids of all other fixed
learning rates. The best one is chosen by the validation metric among those with three seeds or more. The runs have the
same data and schedule, but not always the same seeds, so a difference is one of means. To measure the former again:

    python benchmarks/compare.py --policies lipschitz --runs bounded.jsonl --summary benchmarks/results/bounded.csv
"""

import math
from pathlib import Path
from typing import Any

import compare
import public
import summary
from rows import read_summary
from tasks import TASKS

Rows = list[dict[str, Any]]
BOUNDED = Path(__file__).parent / "results" / "bounded.csv"
NO_BREAK = "\N{NO-BREAK SPACE}"
ENOUGH = 3
"""Seeds of a fixed learning rate that may be the best one."""
BETTER, WORSE, LEVEL, NOT_RUN = "▲", "▼", "=", "not run"
NAMES = {
    "digits_mlp": "Digits, MLP",
    "breast_cancer_mlp": "Breast cancer, MLP",
    "diabetes_mlp": "Diabetes, MLP",
    "mnist_cnn": "MNIST (6,000 images), CNN",
    "cifar10_resnet20": "CIFAR-10 (6,000 images), ResNet-20",
    "cifar10_densenet": "CIFAR-10 (1,500 images), DenseNet",
    "cifar10_vit": "CIFAR-10 (8,000 images), vision transformer",
    "text_transformer": "Text, transformer",
}
PUBLISHED_NAMES = {
    "mnist_mlp": "MNIST, MLP, 10 epochs",
    "mnist_example": "MNIST, CNN of pytorch/examples",
    "gcn_cora": "Cora, graph network",
    "gcn_citeseer": "Citeseer, graph network",
    "gcn_pubmed": "Pubmed, graph network",
    "quadratic_deep": "DeepOBS, noisy quadratic",
    "mnist_vae": "DeepOBS, autoencoder of MNIST",
}


def fixed_rates() -> Rows:
    """The summaries of the fixed learning rates."""
    again = read_summary(BOUNDED)
    names = {(row["task"], row["policy"]) for row in again}
    return [*(row for row in read_summary(compare.SUMMARY) if (row["task"], row["policy"]) not in names), *again]


def mark(gain: float, error: float) -> str:
    """Whether a gain exceeds its standard error: better, worse, or neither."""
    if abs(gain) <= error:
        return LEVEL
    return BETTER if gain > 0 else WORSE


def everyday(computed: Rows, grids: Rows) -> str:
    """A Markdown table: a row for each task and optimizer, with the mark of the difference.

    Args:
        computed: Summary of ``LipschitzLR()``.
        grids: Summary of the fixed learning rates.
    """
    lines = ["| task, metric | optimizer | tuned | `LipschitzLR()` | difference |", "|---" * 5 + "|"]
    for row in sorted(computed, key=lambda row: list(TASKS).index(row["task"])):
        kind = summary.TUNED.get(row["policy"])
        tuned = summary.best(grids, row["task"], kind, ENOUGH) if kind else None
        if kind is None or tuned is None:
            continue
        accuracy = TASKS[row["task"]].metric == "accuracy"
        gain = (row["test"] - tuned["test"]) * (1 if accuracy else -1)
        error = math.hypot(row["test_error"] or 0.0, tuned["test_error"] or 0.0)
        digits = 2 if accuracy else 3
        difference = f"{row['test'] - tuned['test']:+.{digits}f} ± {error:.{digits}f}".replace(" ", NO_BREAK)
        cells = [
            f"{NAMES[row['task']]}, {'accuracy' if accuracy else 'loss'}",
            summary.TITLES[kind],
            f"{tuned['test']:.{digits}f}",
            f"{row['test']:.{digits}f}{NO_BREAK}{mark(gain, error)}",
            difference,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def published(rows: Rows) -> str:
    """A Markdown table: published figures, the best of a grid here, and ``LipschitzLR()`` where it has been run."""
    lines = ["| task | published | tuned here | `LipschitzLR()`, SGD | `LipschitzLR()`, AdamW |", "|---" * 5 + "|"]
    by_name = {(row["task"], row["policy"]): row for row in rows}
    for name, task in public.TASKS.items():
        if not task.published or all(row["task"] != name for row in rows):
            continue
        sign = 1 if task.metric == "accuracy" else -1
        target = sign * max(sign * one.figure for one in task.published)
        tuned = [row for kind in task.grids if (row := public.best(rows, name, kind))]
        grid = f"{sign * max(sign * row['test'] for row in tuned):.2f}" if tuned else NOT_RUN
        cells = [_compared(by_name.get((name, policy)), target, sign) for policy in public.DEFAULTS]
        title = f"{PUBLISHED_NAMES[name]}, {task.metric}"
        lines.append(f"| {title} | {target:g} | {grid} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _compared(row: dict[str, Any] | None, target: float, sign: int) -> str:
    if row is None:
        return NOT_RUN
    if row["diverged"]:
        return f"diverged ({row['diverged']} of {row['seeds']})"
    error = row["test_error"] or 0.0
    cell = f"{row['test']:.2f} ± {error:.2f} {mark(sign * (row['test'] - target), error)}"
    return cell.replace(" ", NO_BREAK)
