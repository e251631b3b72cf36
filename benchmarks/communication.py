"""Communication of LipschitzLR between ranks: counted in runs of several processes, and projected to more.

Trains a tiny network under DistributedDataParallel with gloo on 2 and 4 processes of this machine, records every call
of torch.distributed that the callback makes, and prints their number, sizes and steps. Then projects the time
of these calls to more ranks by the usual model of latency and bandwidth; its assumptions are printed with it:

    python benchmarks/communication.py [--ranks 2 4] [--epochs 3]
"""

import argparse
import json
import logging
import math
import platform
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lit_lipschitz import LipschitzLR
from lit_lipschitz.control.due_steps import MEASURE_EVERY, DueSteps

COLLECTIVES = ("all_reduce", "reduce", "broadcast", "all_gather", "barrier")
HOOKS = ("on_fit_start", "on_train_batch_start", "on_before_backward", "before_step", "on_train_batch_end")
TIMES = ("strict_ms", "smooth_ms", "epoch_ms", "first_epoch_ms")
WIDTH, STEPS = 64, 40
RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "strict, SGD": ({}, "SGD"),
    "smooth, SGD": ({"bound": "smooth"}, "SGD"),
    "strict, AdamW": ({}, "AdamW"),
}


@dataclass(frozen=True)
class Call:
    """A call of torch.distributed: in which optimizer step (from 1 on), its name, and its tensor's bytes."""

    step: int
    name: str
    size: int


class Small(L.LightningModule):
    """A network with a head of some width."""

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))
        self.optimizer = optimizer

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD or another one."""
        return getattr(torch.optim, self.optimizer)(self.parameters(), lr=0.1)


class Listener(L.Callback):
    """Leaves in a file what a LipschitzLR calls in this process."""

    def __init__(self, callback: LipschitzLR, folder: Path) -> None:
        self.callback, self.folder = callback, folder
        self.calls: list[Call] = []
        self.inside = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Listens from here on, in the process that trains."""
        for name in (*HOOKS, "on_train_epoch_end"):
            setattr(self.callback, name, self._marked(getattr(self.callback, name)))
        for name in COLLECTIVES:
            setattr(torch.distributed, name, self._noted(name, getattr(torch.distributed, name), trainer))

    def _marked(self, hook: Callable[..., None]) -> Callable[..., None]:
        @wraps(hook)
        def call(*arguments: Any, **settings: Any) -> None:
            self.inside = True
            hook(*arguments, **settings)
            self.inside = False

        return call

    def _noted(self, name: str, function: Callable[..., Any], trainer: L.Trainer) -> Callable[..., Any]:
        @wraps(function)
        def call(*arguments: Any, **settings: Any) -> Any:
            if self.inside:
                size = sum(one.numel() * one.element_size() for one in arguments if isinstance(one, Tensor))
                self.calls.append(Call(trainer.global_step, name, size))
            return function(*arguments, **settings)

        return call

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the file."""
        calls = [asdict(call) for call in self.calls]
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(calls))


def listen(ranks: int, settings: dict[str, Any], optimizer: str, epochs: int) -> list[list[Call]]:
    """The calls of each rank in a run of 40 steps an epoch."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(STEPS * ranks * 4, 8), torch.randint(4, (STEPS * ranks * 4,)))
    callback = LipschitzLR(**settings)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            devices=ranks,
            strategy=DDPStrategy(start_method="fork", process_group_backend="gloo"),
            callbacks=[Listener(callback, Path(folder)), callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Small(optimizer), DataLoader(data, batch_size=4))
        files = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    return [[Call(**call) for call in calls] for calls in files]


def summary(calls: Sequence[Call]) -> dict[str, Any]:
    """How many calls of which name and size, and after which steps those that carry something were made."""
    counted = Counter((call.name, call.size) for call in calls)
    steps: dict[str, list[int]] = {}
    for call in calls:
        if call.size:
            steps.setdefault(f"{call.name} of {call.size} bytes", []).append(call.step)
    return {
        "calls": [{"name": name, "bytes": size, "count": count} for (name, size), count in counted.items()],
        "steps_before": steps,
    }


BYTES_OF_AGREEMENT = 4 * 4
"""Bytes of the reduction before the first step by which the ranks know whether they have found the same loss."""


def bytes_of_update(ranks: int, spectral_width: int = 0) -> int:
    """Bytes of an update: nine numbers, one a rank, and for ``smooth`` the direction of the power iteration."""
    return 4 * (9 + ranks + spectral_width)


def bytes_of_norms(ranks: int) -> int:
    """Bytes of a step with ``strict``: two norms, a product of norms, the loss, two numbers per rank on the logits."""
    return 4 * (4 + 2 * ranks)


BYTES_OF_STEP = 16
"""Of a step with ``smooth``: the same without those per rank."""


def seconds(ranks: int, size: int, hop: float, bandwidth: float, ring: bool) -> float:
    """Time of a barrier and an all-reduce: Lightning's reduce makes both.

    A ring makes 2 (R - 1) hops and sends 2 (R - 1) / R of the bytes; a tree goes up and down, 2 ceil(log2 R) hops
    with all bytes in each. The barrier is such a tree that carries nothing.
    """
    if ranks == 1:
        return 0.0
    depth = 2 * math.ceil(math.log2(ranks))
    if ring:
        return (depth + 2 * (ranks - 1)) * hop + 2 * (ranks - 1) / ranks * size / bandwidth
    return 2 * depth * hop + depth * size / bandwidth


def measured_steps(steps: int) -> int:
    """The measured ones of the first steps of a run; each of them is an update in the first epoch."""
    count, due = 0, DueSteps(MEASURE_EVERY)
    for _ in range(steps):
        count += due.due
        due.end_step()
    return count


def project(ranks: Sequence[int], width: int, steps: int, bandwidth: float) -> list[dict[str, Any]]:
    """For each number of ranks: bytes, and milliseconds of an update and of an epoch, at 5 and at 20 us a hop."""
    rows = []
    for count in ranks:
        for ring in (False, True):
            for hop in (5e-6, 20e-6):
                row: dict[str, Any] = {"ranks": count, "algorithm": "ring" if ring else "tree", "hop_us": 1e6 * hop}
                for name, size in (("strict", bytes_of_update(count)), ("smooth", bytes_of_update(count, width + 1))):
                    row[f"{name}_bytes"] = size
                    row[f"{name}_ms"] = 1e3 * seconds(count, size, hop, bandwidth, ring)
                norms = 1e3 * seconds(count, bytes_of_norms(count), hop, bandwidth, ring)
                row["first_epoch_ms"] = (measured_steps(steps) + 1) * row["strict_ms"]
                row["epoch_ms"] = row["strict_ms"] + steps / MEASURE_EVERY * norms
                rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the arguments, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--width", type=int, default=4096, help="of the head in the projection, for smooth")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of an epoch in the projection")
    parser.add_argument("--bandwidth", type=float, default=10e9, help="bytes a second of a link in the projection")
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    versions = {"torch": torch.__version__, "lightning": L.__version__, "python": platform.python_version()}
    print("; ".join(f"{name} {value}" for name, value in versions.items()))
    print(f"a head of width {WIDTH}, {options.epochs} epochs of {STEPS} steps; what rank 0 calls\n")
    for name, (settings, optimizer) in RUNS.items():
        for ranks in options.ranks:
            calls = listen(ranks, settings, optimizer, options.epochs)
            found = summary(calls[0])
            alike = all(one == calls[0] for one in calls)
            made = ", ".join(f"{one['count']} {one['name']} of {one['bytes']} bytes" for one in found["calls"])
            print(f"{name}, {ranks} ranks: {made}{'' if alike else '; the ranks differ'}")
            for what, steps in found["steps_before"].items():
                print(f"    {what}: with {', '.join(map(str, steps))} steps done")
    projected = project((2, 8, 64, 1024), options.width, options.steps, options.bandwidth)
    print(
        f"\nprojected, not measured: a barrier and an all-reduce at 5 or 20 us a hop and {options.bandwidth / 1e9:g} "
        f"GB/s a link,\nranks that wait for each other not counted; smooth with a head of width {options.width}; "
        f"epochs of {options.steps} steps, milliseconds"
    )
    print("ranks   how   hop, us   bytes: strict   smooth   update: strict   smooth   epoch: later   the first")
    for row in projected:
        cells = (f"{row[f'{name}_bytes']:{width}}" for name, width in (("strict", 15), ("smooth", 8)))
        times = (f"{row[name]:{size}.3f}" for name, size in zip(TIMES, (15, 8, 14, 11), strict=True))
        print(f"{row['ranks']:5}  {row['algorithm']}  {row['hop_us']:7.0f}  {' '.join((*cells, *times))}")


if __name__ == "__main__":
    main()
