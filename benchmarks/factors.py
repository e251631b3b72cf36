"""By how much the default's rate would have to be multiplied to be the best one: by the loss, and by the accuracy.

    python benchmarks/factors.py [--seeds 0,1,2]    # measures what results/ lacks
    python benchmarks/factors.py --print            # the table

A rate that follows from the training batches alone cannot know what will be asked of the network. So this looks at how
far apart the rates are that suit the test part's cross-entropy and its accuracy, over the number of examples and of
epochs: an MLP on MNIST, and an MLP on generated tables of two classes, of which a share of the labels is drawn anew.
The policy is `lipschitz-adamw` of compare.py, with its rule's rate times a factor; the best factor is that by the test
part, which nobody can choose.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from compare import _quiet, run
from rows import add_row, read_rows, results_parser
from tasks import Data, Task, _images, _keep, split
from torch import Tensor

from lit_lipschitz import MLP
from lit_lipschitz.rules import registry as rules

RESULTS = Path(__file__).parent / "results" / "factors.jsonl"
FACTORS = (0.125, 0.25, 0.5, 0.71, 1.0, 1.41, 2.0, 4.0)
TABLES = {"table, 3 % noise": 0.03, "table, 20 % noise": 0.2}
"""Generated tables, with the share of labels that are drawn anew."""
CELLS = [
    *[("MNIST", examples, epochs) for examples, epochs in ((500, 5), (500, 15), (2000, 5), (2000, 15), (8000, 5))],
    *[("MNIST", examples, epochs) for examples, epochs in ((8000, 15), (32000, 2))],
    *[(name, examples, 15) for name in TABLES for examples in (320, 1280, 5120)],
    *[(name, 5120, 4) for name in TABLES],
]
"""Names of the data, with the examples and epochs of the runs."""


def mnist(examples: int, seed: int) -> Data:
    """So many images of MNIST, drawn by the seed; all its test images, which validate as well."""
    train, test = _images("MNIST", half=False)
    return Data(split(*train, (examples, 0), seed)[0], test, test, _keep)


@cache
def _generated(noise: float) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import make_classification

    shape = {"n_samples": 60000, "n_features": 30, "n_informative": 10, "n_redundant": 10, "n_clusters_per_class": 2}
    inputs, targets = make_classification(**shape, class_sep=1.5, flip_y=noise, random_state=1)
    inputs = (inputs - inputs.mean(axis=0)) / inputs.std(axis=0)
    return torch.tensor(inputs).float(), torch.tensor(targets)


def table(noise: float, examples: int, seed: int) -> Data:
    """So many rows of a table with 30 columns, drawn by the seed, and 20,000 others to test."""
    inputs, targets = _generated(noise)
    test = inputs[40000:], targets[40000:]
    return Data(split(inputs[:40000], targets[:40000], (examples, 0), seed)[0], test, test, _keep)


def task(name: str, examples: int, epochs: int) -> Task:
    """A cell's task."""
    if name == "MNIST":
        network, data = partial(MLP, (1, 28, 28), (128,)), partial(mnist, examples)
    else:
        network, data = partial(MLP, (30,), (16,), 2), partial(table, TABLES[name], examples)
    return Task(network, data, metric="loss", epochs=epochs, batch_size=32)


@contextmanager
def multiplied(factor: float) -> Iterator[None]:
    """Has the rule of AdamW give a rate that is so many times as large."""
    rule = rules.RULES["observed"]

    def times(*arguments: Any) -> tuple[float, rules.RuleState]:
        rate, state = rule(*arguments)
        return factor * rate, state

    rules.RULES["observed"] = times
    try:
        yield
    finally:
        rules.RULES["observed"] = rule


def measure(cell: tuple[str, int, int], factor: float, seed: int, path: Path) -> None:
    """Runs what is not there yet."""
    key = (", ".join(map(str, cell)), factor, seed)
    if key in {(row["task"], row["factor"], row["seed"]) for row in read_rows(path)}:
        return
    with multiplied(factor):
        row = {**run(key[0], "lipschitz-adamw", seed, task=task(*cell), metrics=("accuracy",)), "factor": factor}
    add_row(path, row)
    print(f"{key[0]:32} x {factor:<6g} {seed} {row['test']:.4f} {row['accuracy']:.2f} %", flush=True)


def chart(rows: list[dict[str, Any]]) -> str:
    """For each cell the best factors, and how far the default is behind them, in Markdown."""
    lines = [
        "| data, examples, epochs | best factor by loss | loss there | default's | behind | best factor by accuracy "
        "| accuracy there | default's | behind | seeds |",
        "|---" * 10 + "|",
    ]
    for cell in CELLS:
        name = ", ".join(map(str, cell))
        runs: dict[float, list[dict[str, Any]]] = defaultdict(list)
        for row in rows:
            if row["task"] == name:
                runs[row["factor"]].append(row)
        shared = set.intersection(*({row["seed"] for row in runs[factor]} for factor in FACTORS))
        if not shared:
            continue
        runs = {factor: [row for row in found if row["seed"] in shared] for factor, found in runs.items()}
        loss = {factor: statistics.mean(row["test"] for row in found) for factor, found in runs.items()}
        accuracy = {factor: statistics.mean(row["accuracy"] for row in found) for factor, found in runs.items()}
        least, most = min(loss, key=loss.__getitem__), max(accuracy, key=accuracy.__getitem__)
        lines.append(
            f"| {name} | {least:g} | {loss[least]:.4g} | {loss[1.0]:.4g} | {100 * (loss[1.0] / loss[least] - 1):.1f} % "
            f"| {most:g} | {accuracy[most]:.2f} | {accuracy[1.0]:.2f} | {accuracy[most] - accuracy[1.0]:.2f} "
            f"| {len(shared)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures what is not there yet, and prints the table."""
    parser = results_parser(RESULTS)
    parser.add_argument("--print", action="store_true")
    arguments = parser.parse_args()
    if not arguments.print:
        _quiet()
        torch.set_num_threads(1)
        for seed in arguments.seeds:
            for cell in CELLS:
                for factor in FACTORS:
                    measure(cell, factor, seed, arguments.results)
    print(chart(read_rows(arguments.results)))


if __name__ == "__main__":
    main()
