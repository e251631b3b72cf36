"""Whether what compare.py finds holds on other test rows and tasks, and in runs 5 to 19 times as long.

    python benchmarks/more_tasks.py [--seeds 0,1,2,3,4] [--tasks "Friedman 1;Friedman 3"]  # measures what is not there
    python benchmarks/more_tasks.py --print                                                # the table

Each default beside the best of a grid of fixed rates with the same schedule, chosen by validation, as in compare.py.
Two tables of compare.py have their test rows drawn by the seed here, so that the errors know of the test part's noise.
The regressions are scikit-learn's: Friedman's functions and a linear one with noise, and the Digits, as one-hot
targets, as a number, and as their own targets. The longer runs are those of compare.py: two with five times the epochs,
without SGD, and two with ten epochs of all the images, less 5,000 to validate.
"""

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from compare import _cost, _mean_and_error, _quiet, comparable, run
from rows import add_row, read_rows, results_parser
from tasks import TASKS as SHORT
from tasks import Data, Task, _keep, _shift_and_flip, images, split
from tasks import table as real_table
from torch import Tensor, nn
from torch.nn import functional as F

from lit_lipschitz import MLP

RESULTS = Path(__file__).parent / "results" / "more_tasks.jsonl"
GRIDS = {
    "lipschitz": [f"sgd:{rate}" for rate in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)],
    "lipschitz-adamw": [f"adamw:{rate}" for rate in (0.0003, 0.001, 0.003, 0.01, 0.03)],
    "lipschitz-schedulefree": [f"schedulefree:{rate}" for rate in (0.0025, 0.005, 0.01, 0.03)],
}
Rows = list[dict[str, Any]]
Arrays = tuple[Any, Any]


def _synthetic(name: str, noise: float) -> Arrays:
    from sklearn import datasets

    settings = {"n_features": 10, "n_informative": 5} if name == "make_regression" else {}
    inputs, targets = getattr(datasets, name)(n_samples=800, noise=noise, random_state=0, **settings)
    return (inputs - inputs.mean(axis=0)) / inputs.std(axis=0), (targets - targets.mean()) / targets.std()


def _digits(kind: str) -> Arrays:
    from sklearn import datasets

    inputs, numbers = datasets.load_digits(return_X_y=True)
    inputs = inputs / 16
    if kind == "themselves":
        return inputs, inputs
    if kind == "one-hot":
        return inputs, F.one_hot(torch.tensor(numbers)).double().numpy()
    return inputs, (numbers - numbers.mean()) / numbers.std()


@cache
def _cut(make: Callable[[], Arrays]) -> tuple[Tensor, ...]:
    from sklearn.model_selection import train_test_split

    train_x, test_x, train_y, test_y = train_test_split(*make(), test_size=0.3, random_state=0)
    return tuple(torch.tensor(part).float().reshape(len(part), -1) for part in (train_x, train_y, test_x, test_y))


def data(make: Callable[[], Arrays], scale: float, offset: float, seed: int) -> Data:
    """30 % of the rows for test and 20 % of the rest to validate; targets times a number plus a number."""
    train_x, train_y, test_x, test_y = _cut(make)
    held_out = len(train_x) // 5
    parts = split(train_x, train_y * scale + offset, (len(train_x) - held_out, held_out), seed)
    return Data(*parts, (test_x, test_y * scale + offset), _keep)


class Numbers(nn.Module):
    """A small convolutional network without normalisation, with one output."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        )
        self.head = nn.Linear(256, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, 64) to (batch, 1)."""
        return self.head(self.body(x))


def _task(
    network: Callable[[], nn.Module], make: Callable[[], Arrays], scale: float = 1.0, offset: float = 0.0
) -> Task:
    return Task(network, partial(data, make, scale, offset), F.mse_loss, metric="loss", epochs=15, batch_size=32)


_FRIEDMAN = partial(_synthetic, "make_friedman1", 1.0)
ENDS = ("sgd:0.003", "sgd:0.01", "sgd:1.0", "adamw:0.0003", "adamw:0.03", "schedulefree:0.03")
REGRESSIONS: dict[str, Task] = {
    "Friedman 1": _task(partial(MLP, (10,), (32,), 1), _FRIEDMAN),
    "Friedman 1, targets x 3 + 10": _task(partial(MLP, (10,), (32,), 1), _FRIEDMAN, 3.0, 10.0),
    "Friedman 3": _task(partial(MLP, (4,), (32,), 1), partial(_synthetic, "make_friedman3", 0.1)),
    "linear, mostly noise": _task(partial(MLP, (10,), (32,), 1), partial(_synthetic, "make_regression", 100.0)),
    "Digits, one-hot": _task(partial(MLP, (64,), (128, 64), 10), partial(_digits, "one-hot")),
    "Digits, the number, by a CNN": _task(Numbers, partial(_digits, "number")),
    "Digits, themselves": _task(partial(MLP, (64,), (64, 16, 64), 64), partial(_digits, "themselves")),
}
LONGER: dict[str, Task] = {
    "cifar10_vit, 20 epochs": replace(SHORT["cifar10_vit"], epochs=20),
    "text_transformer, 10 epochs": replace(SHORT["text_transformer"], epochs=10),
}
ALL_IMAGES: dict[str, Task] = {
    f"{name}, 45,000 images, 10 epochs": replace(
        SHORT[name], epochs=10, data=partial(images, "CIFAR10", True, (45000, 5000), 10000, _shift_and_flip)
    )
    for name in ("cifar10_resnet20", "cifar10_vit")
}
DRAWN: dict[str, Task] = {
    f"{name}_mlp, test rows drawn": replace(SHORT[f"{name}_mlp"], data=partial(real_table, name, True, drawn=True))
    for name in ("breast_cancer", "diabetes")
}
TASKS = {**DRAWN, **REGRESSIONS, **LONGER, **ALL_IMAGES}


def policies(task: str) -> list[str]:
    """The defaults and their grids; the longer runs are not made at the ends of these, which lost in short ones."""
    named = [name for ours, grid in GRIDS.items() for name in (ours, *grid)]
    left_out = [] if task in REGRESSIONS or task in DRAWN else [*ENDS]
    if task in LONGER:
        left_out += ["lipschitz", *GRIDS["lipschitz"]]
    return [name for name in named if name not in left_out]


def table(rows: Rows) -> str:
    """Each default's test metric beside the tuned one's, and how they differ over the seeds, in Markdown."""
    lines = ["| task | default | rate | test | tuned | test | default beside tuned, same seeds |", "|---" * 7 + "|"]
    for task in TASKS:
        runs: dict[str, Rows] = {}
        for row in rows:
            if row["task"] == task:
                runs.setdefault(row["policy"], []).append(row)
        for ours, rates in GRIDS.items():
            grid = comparable({rate: runs[rate] for rate in rates if rate in runs})
            if ours not in runs or not grid:
                continue
            tuned = min(grid, key=lambda policy: _cost(TASKS[task], [row["val"] for row in runs[policy]]))
            own, other = ({row["seed"]: row["test"] for row in runs[name]} for name in (ours, tuned))
            seeds = sorted(own.keys() & other.keys())
            if not seeds:
                continue
            if TASKS[task].metric == "accuracy":
                beside = f"{_mean_and_error([own[seed] - other[seed] for seed in seeds])} (points)"
            else:
                beside = f"{_mean_and_error([100 * (own[seed] / other[seed] - 1) for seed in seeds])} % (loss)"
            rate = statistics.median(row["rate"] for row in runs[ours])
            lines.append(
                f"| {task} | {ours} | {rate:.2g} | {_mean_and_error(list(own.values()))} | {tuned} | "
                f"{_mean_and_error(list(other.values()))} | {beside} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measures what is not there yet, and prints the table."""
    parser = results_parser(RESULTS, "0,1,2,3,4")
    parser.add_argument("--tasks", default=";".join(TASKS))
    parser.add_argument("--print", action="store_true")
    arguments = parser.parse_args()
    if not arguments.print:
        _quiet()
        torch.set_num_threads(1)
        for task in arguments.tasks.split(";"):
            for seed in arguments.seeds:
                for policy in policies(task):
                    done = {(row["task"], row["policy"], row["seed"]) for row in read_rows(arguments.results)}
                    if (task, policy, seed) not in done:
                        add_row(arguments.results, run(task, policy, seed, task=TASKS[task]))
    print(table(read_rows(arguments.results)))


if __name__ == "__main__":
    main()
