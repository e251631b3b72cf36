"""Policies for the learning rate, on the tasks of tasks.py, over seeds.

    python benchmarks/compare.py --policies lipschitz,sgd:0.1 [--tasks digits_mlp,...] [--seeds 0,1,2]
    python benchmarks/compare.py                                     # the tables

A run is one line of results/compare.jsonl, written as soon as it is measured, with the versions and the processor; runs
that stand there are not repeated. What is chosen (the rate of a tuned policy) is chosen by the validation part, by the
mean over the seeds; what is printed is of the test part, after the last epoch. Several processes may share the file,
each with seeds or tasks of its own; each run is on one thread. The peers (prodigyopt, schedulefree, dadaptation) are to
be installed by hand.
"""

import copy
import logging
import math
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from figures import processor
from lightning.pytorch.tuner import Tuner
from rows import add_row, read_rows, results_parser
from tasks import TASKS, Part, Task
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from lit_lipschitz import LinearWarmupDecay, LipschitzLR
from lit_lipschitz.data import DeviceLoader

RESULTS = Path(__file__).parent / "results" / "compare.jsonl"
TUNED = {
    "sgd": "SGD",
    "adamw": "AdamW",
    "schedulefree": "Schedule-Free",
    "sgd-onecycle": "SGD one-cycle",
    "adamw-onecycle": "AdamW one-cycle",
}
"""Policies that have a rate, of which the best by validation is what a user who tunes would take; Schedule-Free without
a number is at its own default."""


# -- policies ----------------------------------------------------------------------------------------------------------


@dataclass
class Recipe:
    """What a policy makes of a task: optimizer and scheduler from parameters and steps, callbacks, a search before."""

    optimizers: Callable[[Iterable[nn.Parameter], int, Task], tuple[Any, Any]]
    callbacks: tuple[L.Callback, ...] = ()
    search: bool = False


def _sgd(schedule: str, lr: float) -> Callable[..., tuple[Any, Any]]:
    def make(parameters: Iterable[nn.Parameter], steps: int, task: Task) -> tuple[Any, Any]:
        # The transformer's decay is meant for AdamW; in SGD, coupled, 0.05 would be a hundred times the usual one.
        decay = min(task.weight_decay, 5e-4)
        optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=decay)
        return optimizer, _schedule(schedule, optimizer, lr, steps)

    return make


def _adamw(schedule: str, lr: float) -> Callable[..., tuple[Any, Any]]:
    def make(parameters: Iterable[nn.Parameter], steps: int, task: Task) -> tuple[Any, Any]:
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=task.weight_decay)
        return optimizer, _schedule(schedule, optimizer, lr, steps)

    return make


def _schedule(name: str, optimizer: Any, lr: float, steps: int) -> Any:
    if name == "linear":
        return LinearWarmupDecay(optimizer, total_steps=steps)
    if name == "onecycle":
        return OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    return None


def _prodigy(parameters: Iterable[nn.Parameter], steps: int, task: Task) -> tuple[Any, Any]:
    from prodigyopt import Prodigy

    # As its README has it for short runs: lr 1, cosine, and the safeguard where there is a warm-up; it has none here.
    optimizer = Prodigy(parameters, lr=1.0, weight_decay=task.weight_decay)
    return optimizer, CosineAnnealingLR(optimizer, T_max=steps)


def _dadapt(parameters: Iterable[nn.Parameter], steps: int, task: Task) -> tuple[Any, Any]:
    from dadaptation import DAdaptAdam

    optimizer = DAdaptAdam(parameters, lr=1.0, decouple=True, weight_decay=task.weight_decay, log_every=0)
    return optimizer, LinearWarmupDecay(optimizer, total_steps=steps)


def _schedule_free(lr: float = 0.0025, warmup: float = 0.05) -> Callable[..., tuple[Any, Any]]:
    def make(parameters: Iterable[nn.Parameter], steps: int, task: Task) -> tuple[Any, Any]:
        from schedulefree import AdamWScheduleFree

        steps = int(warmup * steps)
        return AdamWScheduleFree(parameters, lr=lr, warmup_steps=steps, weight_decay=task.weight_decay), None

    return make


def recipe(policy: str) -> Recipe:
    """The recipe of a policy's name, as in ``lipschitz`` or ``sgd:0.1``."""
    name, _, number = policy.partition(":")
    rate = float(number) if number else 1.0  # where the callback sets it, its size does not matter
    match name:
        case "lipschitz":
            return Recipe(_sgd("constant", rate), (LipschitzLR(),))
        case "lipschitz-inverse":
            return Recipe(_sgd("constant", rate), (LipschitzLR(rule="inverse"),))
        case "lipschitz-adamw":
            return Recipe(_adamw("constant", rate), (LipschitzLR(),))
        case "lipschitz-grafted":
            return Recipe(_adamw("constant", rate), (LipschitzLR(rule="grafted"),))
        case "paper":
            return Recipe(_paper, (LipschitzLR(bound="paper"),))
        case "sgd":
            return Recipe(_sgd("linear", rate))
        case "adamw":
            return Recipe(_adamw("linear", rate))
        case "sgd-onecycle":
            return Recipe(_sgd("onecycle", rate))
        case "adamw-onecycle":
            return Recipe(_adamw("onecycle", rate))
        case "sgd-default":
            return Recipe(_sgd("constant", 0.1))
        case "adamw-default":
            return Recipe(_adamw("constant", 1e-3))
        case "lrfinder":
            return Recipe(_sgd("linear", rate), search=True)
        case "prodigy":
            return Recipe(_prodigy)
        case "dadapt":
            return Recipe(_dadapt)
        case "schedulefree":
            return Recipe(_schedule_free(rate if number else 0.0025))
        case "lipschitz-schedulefree":
            return Recipe(_schedule_free(warmup=0.0), (LipschitzLR(),))
    raise SystemExit(f"{policy}: no such policy")


def _paper(parameters: Iterable[nn.Parameter], steps: int, task: Task) -> tuple[Any, Any]:
    return torch.optim.SGD(parameters, lr=1.0, weight_decay=min(task.weight_decay, 5e-4)), None


# -- a run -------------------------------------------------------------------------------------------------------------


class Module(L.LightningModule):
    """Trains a task by a recipe, and keeps the figures of each epoch."""

    def __init__(self, task: Task, made: Recipe, seed: int) -> None:
        super().__init__()
        self.task, self.made, self.seed = task, made, seed
        self.data = task.data(seed)
        self.net = task.network()
        self.lr = 0.1  # what LearningRateFinder replaces
        self.val: list[float] = []
        self.losses: list[float] = []
        self.rates: list[float] = []

    def forward(self, inputs: Tensor) -> Tensor:
        """The network's outputs."""
        return self.net(inputs)

    def train_dataloader(self) -> DeviceLoader:
        """Shuffled, augmented batches."""
        inputs, targets = self.data.train
        epoch: Callable[[], int] = lambda: self.trainer.current_epoch  # noqa: E731
        return DeviceLoader(
            inputs, targets, self.task.batch_size, self.data.augment, shuffle=True, seed=self.seed, epoch=epoch
        )

    def training_step(self, batch: Part, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        loss = self.task.loss(self.net(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Keeps the rate, nominal where a callback swaps it in later."""
        self.rates.append(float(optimizer.param_groups[0]["lr"]))

    def configure_optimizers(self) -> Any:
        """What the recipe makes."""
        steps = self.task.epochs * (len(self.data.train[0]) // self.task.batch_size)
        optimizer, scheduler = self.made.optimizers(self.net.parameters(), steps, self.task)
        if self.made.search:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] = self.lr
            scheduler = LinearWarmupDecay(optimizer, total_steps=steps)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        """Tells Schedule-Free that training goes on."""
        self._turn("train")

    def on_train_epoch_end(self) -> None:
        """Measures on the validation part."""
        self._turn("eval")
        self.val.append(evaluate(self._averaged(), self.task, self.data.val))

    def _turn(self, way: str) -> None:
        optimizer = self.trainer.optimizers[0]
        if hasattr(optimizer, "eval"):
            getattr(optimizer, way)()

    def _averaged(self) -> nn.Module:
        """The network; with Schedule-Free a copy whose BatchNorm has seen the averaged weights."""
        norms = [part for part in self.net.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        if not hasattr(self.trainer.optimizers[0], "eval") or not norms:
            return self.net
        network = copy.deepcopy(self.net).train()
        with torch.no_grad():
            for batch, (inputs, _) in enumerate(self.train_dataloader()):
                if batch == 50:
                    break
                network(inputs)
        return network

    def test(self, metric: str | None = None) -> float:
        """The task's metric on the test part, or another one."""
        task = replace(self.task, metric=metric or self.task.metric)
        return evaluate(self._averaged(), task, self.data.test)


@torch.no_grad()
def evaluate(network: nn.Module, task: Task, part: Part) -> float:
    """The task's metric: accuracy in per cent, or mean loss."""
    training = network.training
    network.eval()
    total = 0.0
    for inputs, targets in zip(part[0].split(500), part[1].split(500), strict=True):
        outputs = network(inputs)
        if task.metric == "accuracy":
            total += float((outputs.argmax(dim=1) == targets).float().mean()) * 100 * len(inputs)
        else:
            total += float(task.loss(outputs, targets)) * len(inputs)
    network.train(training)
    return total / len(part[0])


def run(
    task_name: str,
    policy: str,
    seed: int,
    made: Recipe | None = None,
    task: Task | None = None,
    metrics: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Trains and measures; everything that is kept of it, with more metrics of the test part where they are named."""
    L.seed_everything(seed, verbose=False)
    task = task or TASKS[task_name]
    made = made or recipe(policy)
    module = Module(task, made, seed)
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    start = time.perf_counter()
    found = None
    if made.search:
        tuner = Tuner(L.Trainer(max_epochs=task.epochs, **settings))
        found = tuner.lr_find(module, update_attr=True).suggestion()  # type: ignore[union-attr]
        for figures in (module.losses, module.rates, module.val):
            figures.clear()
        L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(max_epochs=task.epochs, callbacks=list(made.callbacks), **settings)
    trainer.fit(module)
    seconds = time.perf_counter() - start
    ours = next((callback for callback in made.callbacks if isinstance(callback, LipschitzLR)), None)
    return {
        "task": task_name,
        "policy": policy,
        "seed": seed,
        "val": module.val[-1],
        "test": module.test(),
        **{metric: module.test(metric) for metric in metrics},
        "best_val": max(module.val) if task.metric == "accuracy" else min(module.val),
        "diverged": not all(map(math.isfinite, module.losses)) or module.losses[-1] > 2 * module.losses[0],
        "rate": ours.rate if ours else found if found is not None else max(module.rates, default=0.0),
        "steps": len(module.losses),
        "seconds": round(seconds, 2),
        **machine(),
    }


def machine() -> dict[str, str]:
    """Versions and hardware."""
    return {"torch": torch.__version__, "lightning": L.__version__, "device": f"{processor()}, 1 thread"}


# -- the table ---------------------------------------------------------------------------------------------------------


Rows = list[dict[str, Any]]


def comparable(grid: dict[str, Rows]) -> dict[str, Rows]:
    """The runs of those rates of a grid that never diverged, and were measured with as many seeds as any of them.

    A rate that was tried on fewer seeds had lost on those by more than the noise.
    """
    grid = {name: found for name, found in grid.items() if not any(row["diverged"] for row in found)}
    most = max((len(found) for found in grid.values()), default=0)
    return {name: found for name, found in grid.items() if len(found) == most}


def summary(rows: Rows) -> dict[str, dict[str, Rows]]:
    """The runs of each task and policy; of each tuned policy the ones at the best rate by validation.

    A tuned policy's rate is the best over the seeds that all its rates have; the untuned ones keep all of theirs.
    """
    runs: dict[str, dict[str, Rows]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        runs[row["task"]][row["policy"]].append(row)
    chosen: dict[str, dict[str, Rows]] = {}
    for task, policies in runs.items():
        chosen[task] = {name: found for name, found in policies.items() if ":" not in name}
        for kind, title in TUNED.items():
            grid = comparable({name: found for name, found in policies.items() if name.partition(":")[0] == kind})
            if grid:
                best = min(grid, key=lambda name: _cost(TASKS[task], [row["val"] for row in grid[name]]))
                chosen[task][f"{title}, best of grid"] = grid[best]
    return chosen


def _cost(task: Task, values: list[float]) -> float:
    mean = statistics.mean(values)
    return math.inf if math.isnan(mean) else -mean if task.metric == "accuracy" else mean


def _mean_and_error(values: list[float]) -> str:
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return f"{statistics.mean(values):.4g}"
    return f"{statistics.mean(values):.4g} ± {statistics.stdev(values) / math.sqrt(len(values)):.2g}"


PAIRS = (
    ("lipschitz", "SGD, best of grid"),
    ("lipschitz-adamw", "AdamW, best of grid"),
    ("lipschitz-schedulefree", "Schedule-Free, best of grid"),
)


def tables(rows: Rows) -> str:
    """A row for each task and policy, in Markdown."""
    chosen = summary(rows)
    order = [ours for ours, _ in PAIRS] + [f"{title}, best of grid" for title in TUNED]
    lines = ["| task | policy | test | validation | best epoch's validation | rate | diverged | seconds | seeds |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for task in [task for task in TASKS if task in chosen]:
        policies = chosen[task]
        for name in sorted(policies, key=lambda name: (order.index(name) if name in order else 9, name)):
            found = policies[name]
            columns = [_mean_and_error([row[key] for row in found]) for key in ("test", "val", "best_val")]
            label = found[0]["policy"] if "grid" in name else name
            rate = statistics.median(row["rate"] for row in found)
            lines.append(
                f"| {task} | {label if label == name else f'{name}: {label}'} | {' | '.join(columns)} | {rate:.3g} | "
                f"{sum(row['diverged'] for row in found)} | {statistics.median(row['seconds'] for row in found):.0f} | "
                f"{len(found)} |"
            )
    return "\n".join(lines)


def pairs(rows: Rows) -> str:
    """Each default beside the best fixed rate of its optimizer, by validation, on the same seeds, in Markdown."""
    chosen = summary(rows)
    lines = ["| task | default | test | tuned | test | default - tuned, same seeds |", "|---|---|---|---|---|---|"]
    for task in [task for task in TASKS if task in chosen]:
        for ours, tuned in PAIRS:
            if ours in chosen[task] and tuned in chosen[task]:
                found = chosen[task][tuned]
                own, other, difference = _beside(task, chosen[task][ours], found)
                lines.append(f"| {task} | {ours} | {own} | {found[0]['policy']} | {other} | {difference} |")
    return "\n".join(lines)


def short(rows: Rows) -> str:
    """Each default's distance to the best fixed rate of its optimizer, on the same seeds, in Markdown."""
    chosen = summary(rows)
    titles = [f"`{ours}` less {tuned.partition(',')[0]}, tuned" for ours, tuned in PAIRS]
    lines = [f"| task | {' | '.join(titles)} |", "|---" * (1 + len(titles)) + "|"]
    for task in [task for task in TASKS if task in chosen]:
        cells = [_beside(task, chosen[task][ours], chosen[task][tuned])[-1] for ours, tuned in PAIRS]
        lines.append(f"| `{task}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def regrets(rows: Rows) -> str:
    """How far each policy, a fixed rate for all tasks included, stays behind the best one of each task, in Markdown.

    In points of accuracy or per cent of the loss, on the test part, means over the seeds; the best one of a task is
    chosen by validation. A policy's worst task is what a user meets who takes it untuned.
    """
    runs: dict[str, dict[str, Rows]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        runs[row["policy"]][row["task"]].append(row)
    tasks = [task for task in TASKS if any(task in found for found in runs.values())]
    mean: dict[str, dict[str, float]] = {
        policy: {task: statistics.mean(row["test"] for row in part) for task, part in found.items()}
        for policy, found in runs.items()
    }
    most = {task: max(len(found.get(task, ())) for found in runs.values()) for task in tasks}
    lines = [f"| policy | {' | '.join(tasks)} | worst |", "|---" * (len(tasks) + 2) + "|"]
    bests = {}
    for task in tasks:
        full = [policy for policy, found in runs.items() if len(found.get(task, ())) >= min(3, most[task])]
        best = min(full, key=lambda policy: _cost(TASKS[task], [row["val"] for row in runs[policy][task]]))
        bests[task] = mean[best][task]
    table = []
    for policy, found in mean.items():
        gaps = []
        for task in tasks:
            points = TASKS[task].metric == "accuracy"
            value = found.get(task, math.nan)
            gap = bests[task] - value if points else 100 * (value / bests[task] - 1)
            lost = any(row["diverged"] for row in runs[policy][task])
            gaps.append(math.inf if lost else gap)
        if sum(task in found for task in tasks) == len(tasks):
            table.append((max(gaps), policy, gaps))
    for worst, policy, gaps in sorted(table):
        cells = ["diverged" if gap == math.inf else f"{gap:.1f}" for gap in [*gaps, worst]]
        lines.append(f"| {policy} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _beside(task: str, ours: Rows, tuned: Rows) -> tuple[str, str, str]:
    """The test metric of both, and the difference, on the seeds that both have."""
    by_seed = [{row["seed"]: row["test"] for row in found} for found in (ours, tuned)]
    seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
    first, second = ([found[seed] for seed in seeds] for found in by_seed)
    difference = _mean_and_error([a - b for a, b in zip(first, second, strict=True)])
    unit = "points" if TASKS[task].metric == "accuracy" else "loss"
    return _mean_and_error(first), _mean_and_error(second), f"{difference} ({unit})"


def _quiet() -> None:
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main() -> None:
    """Runs what is not there yet, or prints the tables."""
    parser = results_parser(RESULTS)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--policies", default="")
    arguments = parser.parse_args()
    if not arguments.policies:
        rows = read_rows(arguments.results)
        print(f"{tables(rows)}\n\n{pairs(rows)}\n\n{regrets(rows)}")
        return
    _quiet()
    torch.set_num_threads(1)
    for seed in arguments.seeds:
        for policy in arguments.policies.split(","):
            for task in arguments.tasks.split(","):
                done = {(row["task"], row["policy"], row["seed"]) for row in read_rows(arguments.results)}
                if (task, policy, seed) in done:
                    continue
                row = run(task, policy, seed)
                add_row(arguments.results, row)
                print(
                    f"{task:18} {policy:16} {seed} val {row['val']:8.3f} test {row['test']:8.3f} "
                    f"rate {row['rate']:.4g} {row['seconds']:.1f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
