"""Learning-rate policies compared on the tasks of tasks.py, over seeds.

    python benchmarks/compare.py --policies lipschitz,sgd:0.1 [--tasks digits_mlp,...] [--seeds 0,1,2]
    python benchmarks/compare.py --summary

The first command trains. A run is a line of ``--runs`` (results/compare.jsonl, which git ignores), written as soon as
it ends, with versions and processor; runs that the file has are skipped. Several processes may share the file, each
with its own seeds or tasks; each run uses one thread. The second command summarises the file in results/compare.csv,
a line a task and policy, and prints the tables that write_tables.py fills docs/guide/evidence.md with from there.

prodigyopt, schedulefree and dadaptation, for the policies of these names, are not installed by the project.
"""

import argparse
import copy
import logging
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from figures import processor
from lightning.pytorch.tuner import Tuner
from policies import Recipe, recipe
from rows import add_row, read_rows, read_summary, write_summary
from summary import defaults, regrets, summarise
from tasks import TASKS, Part, Task
from torch import Tensor, nn

from lit_lipschitz import LinearWarmupDecay, LipschitzLR
from lit_lipschitz.data import DeviceLoader

RESULTS = Path(__file__).parent / "results"
RUNS = RESULTS / "compare.jsonl"
SUMMARY = RESULTS / "compare.csv"
TRAINER: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Module(L.LightningModule):
    """Trains a task by a recipe, and keeps losses, learning rates and the validation metric of each epoch."""

    def __init__(self, task: Task, recipe: Recipe, seed: int) -> None:
        super().__init__()
        self.task, self.recipe, self.seed = task, recipe, seed
        self.data = task.data(seed)
        self.net = task.network()
        self.lr = 0.1  # replaced by LearningRateFinder
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
        """Keeps the learning rate; a callback may replace it later in the step."""
        self.rates.append(float(optimizer.param_groups[0]["lr"]))

    def configure_optimizers(self) -> Any:
        """The recipe's optimizer and scheduler."""
        steps = self.task.epochs * (len(self.data.train[0]) // self.task.batch_size)
        optimizer, scheduler = self.recipe.optimizers(self.net.parameters(), steps, self.task)
        if self.recipe.search:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] = self.lr
            scheduler = LinearWarmupDecay(optimizer, total_steps=steps)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        """Sets Schedule-Free to training mode."""
        self._set_mode("train")

    def on_train_epoch_end(self) -> None:
        """Evaluates on the validation part."""
        self._set_mode("eval")
        self.val.append(evaluate(self._averaged(), self.task, self.data.val))

    def _set_mode(self, mode: str) -> None:
        optimizer = self.trainer.optimizers[0]
        if hasattr(optimizer, "eval"):
            getattr(optimizer, mode)()

    def _averaged(self) -> nn.Module:
        """The network; with Schedule-Free a copy whose BatchNorm statistics are those of the averaged weights."""
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

    def test(self) -> float:
        """The task's metric on the test part."""
        return evaluate(self._averaged(), self.task, self.data.test)


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


def run(task_name: str, policy: str, seed: int) -> dict[str, Any]:
    """Trains once and evaluates; the row of the run."""
    L.seed_everything(seed, verbose=False)
    task, chosen = TASKS[task_name], recipe(policy)
    module = Module(task, chosen, seed)
    start = time.perf_counter()
    found = None
    if chosen.search:
        tuner = Tuner(L.Trainer(max_epochs=task.epochs, **TRAINER))
        found = tuner.lr_find(module, update_attr=True).suggestion()  # type: ignore[union-attr]
        for figures in (module.losses, module.rates, module.val):
            figures.clear()
        L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(max_epochs=task.epochs, callbacks=list(chosen.callbacks), **TRAINER)
    trainer.fit(module)
    seconds = time.perf_counter() - start
    callback = next((one for one in chosen.callbacks if isinstance(one, LipschitzLR)), None)
    return {
        "task": task_name,
        "policy": policy,
        "seed": seed,
        "val": module.val[-1],
        "test": module.test(),
        "diverged": not all(map(math.isfinite, module.losses)) or module.losses[-1] > 2 * module.losses[0],
        "rate": callback.rate if callback else found if found is not None else max(module.rates, default=0.0),
        "seconds": round(seconds, 2),
        "torch": torch.__version__,
        "lightning": L.__version__,
        "device": f"{processor()}, 1 thread",
    }


def train(policies: list[str], tasks: list[str], seeds: list[int], path: Path) -> None:
    """Makes the runs that the file does not have yet."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for seed in seeds:
        for policy in policies:
            for task in tasks:
                if (task, policy, seed) in {(row["task"], row["policy"], row["seed"]) for row in read_rows(path)}:
                    continue
                row = run(task, policy, seed)
                add_row(path, row)
                print(
                    f"{task:18} {policy:16} {seed} val {row['val']:8.3f} test {row['test']:8.3f} "
                    f"rate {row['rate']:.4g} {row['seconds']:.1f} s",
                    flush=True,
                )


def would_lose(rows: list[dict[str, Any]], runs: Path, summary: Path) -> str:
    """Why a new summary would have nothing, or less than the file that it replaces; empty if it would not."""
    if not rows:
        return f"--summary: expected runs in {runs}, and found none; make them with --policies"
    old = read_summary(summary) if summary.is_file() else []
    missing = {(row["task"], row["policy"]) for row in old} - {(row["task"], row["policy"]) for row in rows}
    if missing:
        return (
            f"--summary {summary}: expected runs of all its {len(old)} rows in {runs}, and found none of "
            f"{len(missing)}, such as {' '.join(min(missing))}; pass another file, as in --summary new.csv"
        )
    return ""


def main() -> None:
    """Parses the arguments, and trains or summarises."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--policies", default="", help="policies to train with, separated by commas")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--runs", type=Path, default=RUNS, help="file of the runs, a JSON object a line")
    parser.add_argument(
        "--summary",
        type=Path,
        nargs="?",
        const=SUMMARY,
        help="summarise the runs in this CSV file, and print its tables",
    )
    options = parser.parse_args()
    if options.policies:
        train(
            options.policies.split(","), options.tasks.split(","), [*map(int, options.seeds.split(","))], options.runs
        )
    if options.summary:
        rows = summarise(read_rows(options.runs))
        if error := would_lose(rows, options.runs, options.summary):
            parser.error(error)
        write_summary(options.summary, rows)
        rows = read_summary(options.summary)
        print("\n\n".join(table(rows) for table in (defaults, regrets)))
    elif not options.policies:
        parser.error("expected --policies, --summary or both")


if __name__ == "__main__":
    main()
