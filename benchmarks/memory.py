"""Whether memory stays flat: many fits in one process, and many steps of one fit.

The resident memory of the process, and the Python objects that the garbage collector tracks, after each part. The first
parts warm up caches of torch and Lightning; from then on growth is a leak. Each fit is of another network with the
callback that is kept, as in a loop over folds, and every other one ends in an error. The run of many steps has losses
of two kinds in turns, a squared error in every third batch, and a checkpoint's state is taken now and then.

    python benchmarks/memory.py [--fits 50] [--steps 20000] [--limit 8]

``--limit`` is the growth in MB over the second half of the parts from which on the script exits with 1.
"""

import argparse
import contextlib
import gc
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lit_lipschitz import LipschitzLR

PARTS = 10
OPTIMIZERS = (
    lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    torch.optim.AdamW,
    torch.optim.Adagrad,  # whose update is measured by steps of a copy
)


class Module(L.LightningModule):
    """A small network whose loss is another one every third batch."""

    def __init__(self, number: int, fails: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
        self.number, self.fails = number, fails

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        if self.fails and self.global_step == 20:
            raise RuntimeError("stopped")
        outputs = self.net(batch[0])
        if batch_idx % 3 == 2:
            return F.mse_loss(outputs, F.one_hot(batch[1], 4).float())
        return F.cross_entropy(outputs, batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One of several optimizers."""
        return OPTIMIZERS[self.number % len(OPTIMIZERS)](self.parameters())


class Parts(L.Callback):
    """Measures the memory after each part of a fit."""

    def __init__(self, steps: int) -> None:
        self.every, self.points = max(1, steps // PARTS), [resources()]

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Takes a state as a checkpoint does, and measures."""
        if trainer.global_step % 500 == 0:
            trainer.callbacks[0].state_dict()  # type: ignore[attr-defined]
        if trainer.global_step % self.every == 0:
            self.points.append(resources())


def resources() -> tuple[float, int, int]:
    """Resident memory in MB, tracked objects, and open files."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(gc.get_objects()), len(os.listdir("/proc/self/fd"))


def data() -> DataLoader[Any]:
    """Examples without anything to learn."""
    return DataLoader(TensorDataset(torch.randn(640, 8), torch.randint(4, (640,))), batch_size=16)


def trainer(*callbacks: L.Callback, **settings: Any) -> L.Trainer:
    """A trainer that prints and writes nothing."""
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(accelerator="cpu", callbacks=list(callbacks), enable_model_summary=False, **quiet, **settings)


def many_fits(count: int) -> list[tuple[float, int, int]]:
    """The resources after each part of so many fits."""
    callback, points = LipschitzLR(), [resources()]
    for number in range(count):
        with contextlib.suppress(RuntimeError):
            trainer(callback, max_epochs=1).fit(Module(number, fails=number % 2 == 1), data())
        if (number + 1) % max(1, count // PARTS) == 0:
            points.append(resources())
    return points


def many_steps(count: int) -> list[tuple[float, int, int]]:
    """The resources after each part of a fit of so many steps."""
    parts = Parts(count)
    trainer(LipschitzLR(), parts, max_steps=count, max_epochs=-1).fit(Module(1), data())
    return parts.points


def report(name: str, points: list[tuple[float, int, int]], limit: float) -> bool:
    """Prints what a part has cost; returns whether the second half has grown by less than the limit."""
    middle, last = points[len(points) // 2], points[-1]
    grown, objects, files = (after - before for before, after in zip(middle, last, strict=True))
    print(f"{name}: {' '.join(f'{point[0]:.1f}' for point in points)} MB")
    print(
        f"{name}, second half: {grown:+.1f} MB, {objects:+d} objects of {last[1]}, {files:+d} open files: "
        f"{'flat' if (flat := grown < limit and files == 0) else 'GROWS'}",
        flush=True,
    )
    return flat


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fits", type=int, default=50)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--limit", type=float, default=8.0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    right = report(f"{options.fits} fits", many_fits(options.fits), options.limit)
    right = report(f"{options.steps} steps", many_steps(options.steps), options.limit) and right
    sys.exit(not right)
