"""``LipschitzLR()`` without an argument on tasks with published figures, and other methods beside it.

    python benchmarks/public.py [--tasks mnist_mlp,...] [--policies lipschitz,lipschitz-adamw] [--seeds 0,1,2]
    python benchmarks/public.py --summary

The first command trains; without ``--policies`` with all: the two defaults, the peers as their documentation says, the
published settings and the grids. A run is a line of ``--runs`` (results/public.jsonl, which git ignores), written as
soon as it ends; runs that the file has are skipped, so that the command can be stopped and given again. A run uses one
thread. The second command summarises the file in results/public.csv, a line a task and policy, from which
write_tables.py fills docs/guide/evidence.md. ``--steps 3`` tries each task for a few steps and writes nothing.

The peers' packages are not installed by the project: momo-opt, prodigyopt, schedulefree, dadaptation, dog-optimizer.
A policy whose package is missing is skipped, and so is a task whose data is missing.
"""

import argparse
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
import policies
import torch
from compare import TRAINER
from figures import processor
from lightning.pytorch.callbacks import EarlyStopping
from policies import Recipe
from public_tasks import TASKS, PublicTask
from rows import add_row, read_rows, read_summary, write_summary
from summary import mean_and_error
from tasks import Part
from torch import Tensor, nn

from lit_lipschitz.errors import DataError

Rows = list[dict[str, Any]]
RESULTS = Path(__file__).parent / "results"
RUNS, SUMMARY = RESULTS / "public.jsonl", RESULTS / "public.csv"
TARGET = 97.0
"""Validation accuracy in per cent that the metric "steps" counts to."""
EVERY = 50
"""Steps between two evaluations for the metric "steps"."""


def _constant(make: Callable[..., Any], **options: Any) -> Recipe:
    return Recipe(lambda parameters, steps, task: (make(parameters, **options), None))


def _adadelta(parameters: Iterable[nn.Parameter], steps: int, task: Any) -> tuple[Any, Any]:
    optimizer = torch.optim.Adadelta(parameters, lr=1.0)
    epoch = math.ceil(steps / task.epochs)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=epoch, gamma=0.7)


def _momo(lr: float | None) -> Recipe:
    from momo import Momo

    return Recipe(partial(_without_floor, Momo, 1.0))


def _momo_adam(lr: float | None) -> Recipe:
    from momo import MomoAdam

    return Recipe(partial(_without_floor, MomoAdam, 1e-2))


def _without_floor(make: Any, lr: float, parameters: Any, steps: int, task: PublicTask) -> tuple[Any, Any]:
    # The README's constant rates; it asks for use_fstar where the loss ends far above 0 and the floor is not known.
    return make(parameters, lr=lr, use_fstar=task.metric == "loss"), None


def _dog(lr: float | None) -> Recipe:
    from dog import DoG

    return replace(_constant(DoG), callbacks=(PolynomialAverage(),))


def _schedule_free(lr: float | None) -> Recipe:
    from schedulefree import AdamWScheduleFree

    return _constant(AdamWScheduleFree, lr=0.0025)


POLICIES: dict[str, Callable[[float | None], Recipe]] = {
    **policies.POLICIES,
    "momo": _momo,
    "momo-adam": _momo_adam,
    "dog": _dog,
    "schedulefree-default": _schedule_free,
    "adadelta": lambda lr: Recipe(_adadelta),
    "adam-constant": lambda lr: _constant(torch.optim.Adam, lr=lr),
    "sgd-dampened": lambda lr: _constant(torch.optim.SGD, lr=lr, momentum=0.9, dampening=0.9),
    "sgd-constant": lambda lr: _constant(torch.optim.SGD, lr=lr, momentum=0.9),
}
PACKAGES = {"momo": "momo-opt", "momo-adam": "momo-opt", "prodigy": "prodigyopt", "schedulefree": "schedulefree",
            "schedulefree-default": "schedulefree", "dadapt": "dadaptation", "dog": "dog-optimizer"}  # fmt: skip
"""The package of a policy."""
DEFAULTS = ("lipschitz", "lipschitz-adamw")
PEERS = ("momo", "momo-adam", "prodigy", "schedulefree", "dadapt", "dog")


def recipe(policy: str) -> Recipe:
    """The recipe of a policy: a name of :data:`POLICIES`, with a learning rate after a colon where it takes one."""
    name, _, number = policy.partition(":")
    if name not in POLICIES:
        raise SystemExit(f"expected a policy of {', '.join(POLICIES)}, found {policy!r}")
    return POLICIES[name](float(number) if number else None)


def policies_of(task: PublicTask) -> list[str]:
    """The policies that a task is run with: defaults, peers, published settings and grids."""
    grid = [f"{name}:{lr:g}" for name, rates in task.grids.items() for lr in rates]
    published = [one.policy for one in task.published if one.policy and one.policy not in task.grids]
    return list(dict.fromkeys([*DEFAULTS, *PEERS, *published, *grid]))


class PolynomialAverage(L.Callback):
    """The averaged weights that DoG's documentation asks for."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the average."""
        from dog import PolynomialDecayAverager

        self.averager = PolynomialDecayAverager(pl_module.net)

    def on_train_batch_end(self, *_: object) -> None:
        """Adds the weights after a step."""
        self.averager.step()


class WindowStopping(EarlyStopping):
    """Stops as Kipf and Welling's code: a validation loss above the mean of the 10 before it, after 11 epochs."""

    def __init__(self) -> None:
        super().__init__("val_loss")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks at the losses so far."""
        losses = pl_module.val_losses
        if len(losses) > 11 and losses[-1] > statistics.mean(losses[-11:-1]):
            trainer.should_stop = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The module validates itself."""


@dataclass
class Batches:
    """Shuffled batches, in another order in each epoch."""

    part: Part
    batch_size: int
    drop_last: bool
    seed: int

    def __post_init__(self) -> None:
        """Makes the generator of the orders."""
        self._generator = torch.Generator().manual_seed(self.seed)

    def __len__(self) -> int:
        """Batches in an epoch."""
        whole, rest = divmod(len(self.part[0]), self.batch_size)
        return whole + bool(rest and not self.drop_last)

    def __iter__(self) -> Iterator[Part]:
        """The batches of an epoch."""
        order = torch.randperm(len(self.part[0]), generator=self._generator)
        for index in order.split(self.batch_size)[: len(self)]:
            yield self.part[0][index], self.part[1][index]


class Module(L.LightningModule):
    """Trains a task by a recipe, and keeps its losses and, where they decide on its end, its validation losses."""

    def __init__(self, task: PublicTask, chosen: Recipe, seed: int) -> None:
        super().__init__()
        self.task, self.recipe = task, chosen
        self.data = task.data()
        self.net = task.network()
        self.batches = Batches(self.data.train, task.batch_size, task.drop_last, seed)
        self.losses: list[float] = []
        self.val_losses: list[float] = []
        self.reached = math.inf

    def train_dataloader(self) -> Batches:
        """Shuffled batches."""
        return self.batches

    def training_step(self, batch: Part, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        loss = self.task.loss(self.net, *batch)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        """The recipe's optimizer and scheduler, the latter for each step."""
        steps = self.task.epochs * len(self.batches)
        optimizer, scheduler = self.recipe.optimizers(self.net.parameters(), steps, self.task)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_batch_end(self, *_: object) -> None:
        """Looks at the validation accuracy, where the steps to a target are counted."""
        if self.task.metric != "steps" or self.trainer.global_step % EVERY:
            return
        if self.evaluate(self.data.val, "accuracy") > TARGET:
            self.reached = self.trainer.global_step
            self.trainer.should_stop = True

    def on_train_epoch_end(self) -> None:
        """Looks at the validation loss, where it may end the run."""
        if self.task.stop_early:
            self.val_losses.append(self.evaluate(self.data.val, "loss"))

    @torch.no_grad()
    def evaluate(self, part: Part, metric: str) -> float:
        """Accuracy in per cent or mean loss of the weights that the optimizer means for evaluation."""
        optimizer: Any = self.trainer.optimizers[0]
        average = next((one for one in self.recipe.callbacks if isinstance(one, PolynomialAverage)), None)
        network = average.averager.averaged_model if average else self.net
        if hasattr(optimizer, "eval"):
            optimizer.eval()
        network.eval()
        total = 0.0
        for inputs, targets in zip(part[0].split(1000), part[1].split(1000), strict=True):
            if metric == "accuracy":
                total += 100 * float((network(inputs).argmax(dim=1) == targets).sum())
            else:
                total += float(self.task.loss(network, inputs, targets)) * len(inputs)
        self.net.train()
        if hasattr(optimizer, "eval"):
            optimizer.train()
        return total / len(part[0])

    def on_train_start(self) -> None:
        """Sets Schedule-Free to training mode."""
        optimizer: Any = self.trainer.optimizers[0]
        if hasattr(optimizer, "eval"):
            optimizer.train()


def run(name: str, policy: str, seed: int, max_steps: int = -1) -> dict[str, Any]:
    """Trains once and evaluates after the last epoch; the row of the run."""
    L.seed_everything(seed, verbose=False)
    task, chosen = TASKS[name], recipe(policy)
    module = Module(task, chosen, seed)
    callbacks = [*chosen.callbacks, *([WindowStopping()] if task.stop_early else [])]
    start = time.perf_counter()
    trainer = L.Trainer(max_epochs=task.epochs, max_steps=max_steps, callbacks=callbacks, **TRAINER)
    trainer.fit(module)
    seconds = time.perf_counter() - start
    if task.metric == "steps":
        test = val = module.reached
    else:
        test = module.evaluate(module.data.test, task.metric)
        val = test if module.data.val is module.data.test else module.evaluate(module.data.val, task.metric)
    package = PACKAGES.get(policy.partition(":")[0])
    return {
        "task": name,
        "policy": policy,
        "seed": seed,
        "test": test,
        "val": val,
        "steps": trainer.global_step,
        "diverged": not all(map(math.isfinite, module.losses)) or module.losses[-1] > 2 * module.losses[0],
        "seconds": round(seconds, 2),
        "torch": torch.__version__,
        "lightning": L.__version__,
        "package": f"{package} {version(package)}" if package else "",
        "device": f"{processor()}, 1 thread",
    }


def missing(policy: str) -> str:
    """The package of a policy if it is not installed, else nothing."""
    package = PACKAGES.get(policy.partition(":")[0], "")
    try:
        return "" if not package or version(package) else package
    except PackageNotFoundError:
        return package


def plan(tasks: list[str], chosen: list[str], seeds: list[int]) -> Iterator[tuple[str, str, int]]:
    """The runs asked for, seed by seed; those that lack a package or data are left out with a line."""
    pairs = []
    for name in tasks:
        try:
            TASKS[name].data()
        except DataError as error:
            print(f"{name}: skipped, {error}", flush=True)
            continue
        pairs += [(name, policy) for policy in chosen or policies_of(TASKS[name])]
    for package in sorted({missing(policy) for _, policy in pairs} - {""}):
        print(f"{package} is not installed; the policies that need it are skipped", flush=True)
    pairs = [(name, policy) for name, policy in pairs if not missing(policy)]
    for seed in seeds or range(max((TASKS[name].seeds for name, _ in pairs), default=0)):
        yield from ((name, policy, seed) for name, policy in pairs if seeds or seed < TASKS[name].seeds)


def train(tasks: list[str], chosen: list[str], seeds: list[int], path: Path, max_steps: int) -> None:
    """Makes the runs that the file does not have yet; with a limit on the steps all of them, without writing any."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for task, policy, seed in plan(tasks, chosen, seeds):
        done = {(row["task"], row["policy"], row["seed"]) for row in read_rows(path)}
        if max_steps < 0 and (task, policy, seed) in done:
            continue
        row = run(task, policy, seed, max_steps)
        if max_steps < 0:
            add_row(path, row)
        print(f"{task:15} {policy:20} {seed:3} {row['test']:9.3f} {row['steps']} steps {row['seconds']} s", flush=True)


def summarise(runs: Rows) -> Rows:
    """A row a task and policy: means over the seeds with standard errors, and the published figure it repeats.

    Of a grid only the best learning rate has a row.
    """
    cells: dict[tuple[str, str], Rows] = {}
    for one in runs:
        cells.setdefault((one["task"], one["policy"]), []).append(one)
    figures = {(name, one.policy): one.figure for name, task in TASKS.items() for one in task.published}
    rows = []
    for name, policy in sorted(cells, key=lambda cell: (list(TASKS).index(cell[0]), cell[1])):
        own = cells[name, policy]
        row: dict[str, Any] = {"task": name, "policy": policy, "seeds": len(own)}
        for metric in ("test", "val"):
            row[metric], row[f"{metric}_error"] = mean_and_error([one[metric] for one in own])
        row["published"] = figures.get((name, policy))
        row["diverged"] = sum(one["diverged"] for one in own)
        row["seconds"] = statistics.median(one["seconds"] for one in own)
        for key in ("torch", "lightning", "package", "device"):
            row[key] = " / ".join(sorted({one[key] for one in own}))
        rows.append(row)
    return [row for row in rows if _grid(row) is None or row is best(rows, row["task"], _grid(row))]


def _grid(row: dict[str, Any]) -> str | None:
    name = row["policy"].partition(":")[0]
    return name if name in TASKS[row["task"]].grids else None


def best(rows: Rows, task: str, policy: str | None) -> dict[str, Any] | None:
    """The row of the best learning rate of a grid, by the validation metric, among those with the most seeds."""
    grid = [row for row in rows if row["task"] == task and row["policy"].startswith(f"{policy}:")]
    grid = [row for row in grid if not row["diverged"] and math.isfinite(row["val"])]
    most = max((row["seeds"] for row in grid), default=0)
    sign = -1 if TASKS[task].metric == "accuracy" else 1
    return min((row for row in grid if row["seeds"] == most), key=lambda row: sign * row["val"], default=None)


def _cell(row: dict[str, Any] | None, task: str) -> str:
    if row is None:
        return ""
    if row["diverged"]:
        return f"diverged ({row['diverged']} of {row['seeds']})"
    if row["test"] == math.inf:
        return "not reached by all"
    digits = 0 if TASKS[task].metric == "steps" else 2
    error = "" if row["test_error"] is None else f" ± {row['test_error']:.{digits}f}"
    rate = f" ({row['policy'].partition(':')[2]})" if ":" in row["policy"] else ""
    seeds = "" if row["seeds"] == TASKS[task].seeds else f", {row['seeds']} seed{'s' if row['seeds'] > 1 else ''}"
    return f"{row['test']:.{digits}f}{error}{rate}{seeds}"


def table(rows: Rows) -> str:
    """A Markdown table: a policy a row, a task a column."""
    tasks = [name for name in TASKS if any(row["task"] == name for row in rows)]
    by_name = {(row["task"], row["policy"]): row for row in rows}
    lines = [f"| policy | {' | '.join(f'`{name}`' for name in tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    lines.append(f"| published | {' | '.join(_published_best(name) for name in tasks)} |")
    for policy in (*DEFAULTS, *PEERS):
        cells = [_cell(by_name.get((name, policy)), name) for name in tasks]
        lines.append(f"| `{policy}` | {' | '.join(cells)} |")
    for kind in ("sgd", "adamw"):
        cells = [_cell(best(rows, name, kind), name) for name in tasks]
        lines.append(f"| `{kind}`, best of a grid | {' | '.join(cells)} |")
    return "\n".join(lines)


def _published_best(name: str) -> str:
    choose = max if TASKS[name].metric == "accuracy" else min
    figures = [one.figure for one in TASKS[name].published]
    return f"{choose(figures):g}" if figures else "none"


def repeated(rows: Rows) -> str:
    """A Markdown table: each published figure with its source, and the same settings run here."""
    by_name = {(row["task"], row["policy"]): row for row in rows}
    lines = ["| task | optimizer | published | here | source |", "|---" * 5 + "|"]
    for name, task in TASKS.items():
        for one in task.published:
            here = _cell(by_name.get((name, one.policy)) or best(rows, name, one.policy), name)
            lines.append(f"| `{name}` | {one.title} | {one.figure:g} | {here or 'not run'} | [source]({one.source}) |")
    return "\n".join(lines)


def main() -> None:
    """Parses the arguments, and trains or summarises."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--policies", default="", help="separated by commas; all of a task without it")
    parser.add_argument("--seeds", default="", help="separated by commas; without it as many as the task has")
    parser.add_argument("--runs", type=Path, default=RUNS, help="file of the runs, a JSON object a line")
    parser.add_argument("--steps", type=int, default=-1, help="try this number of steps, and write nothing")
    parser.add_argument("--summary", type=Path, nargs="?", const=SUMMARY, help="only summarise the runs in this file")
    options = parser.parse_args()
    tasks, chosen, seeds = (
        part.split(",") if part else [] for part in (options.tasks, options.policies, options.seeds)
    )
    if unknown := [name for name in tasks if name not in TASKS]:
        parser.error(f"--tasks: expected {', '.join(TASKS)}, found {', '.join(unknown)}")
    if options.summary:
        rows = summarise(read_rows(options.runs))
        if not rows:
            parser.error(f"--summary: expected runs in {options.runs}, and found none; train first")
        write_summary(options.summary, rows)
        print(f"{table(read_summary(options.summary))}\n\n{repeated(read_summary(options.summary))}")
    else:
        train(tasks, chosen, [*map(int, seeds)], options.runs, options.steps)


if __name__ == "__main__":
    main()
