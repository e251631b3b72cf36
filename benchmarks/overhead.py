"""What LipschitzLR costs in a training step.

Trains the MLP, the MNIST CNN and ResNet-20 on random data, in turns with and without the callback, and prints for each
the median step with the quartiles, the ratio of the medians, and the median time spent inside the callback's functions:

    python benchmarks/overhead.py [--rounds 9] [--steps 20] [--epoch 600] [--device cpu]

Its steps are among the first of a run, of which many are measured. So the first lines are for the first and the second
epoch of two MLPs, with SGD and with AdamW, all that comes once included.

The ratio holds everything, Lightning's calls of the hooks included, and as much noise as the machine has; the time
inside is a lower bound of the cost that noise does not reach. Then come the parts of the time inside, for the MLP, and
what Lightning takes for a callback that does nothing. With OMP_NUM_THREADS=1 times on the CPU are the process's own,
which others on the machine add less to.
"""

import argparse
import itertools
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import lightning as L
import torch
from torch import nn

from lit_lipschitz import MLP, MNISTCNN, ImageClassifier, LipschitzLR, ResNetV1
from lit_lipschitz.data import DeviceLoader
from lit_lipschitz.measurement.running_maximum import RunningMaximum

TASKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "MLP, batch 32": (MLP, (1, 8, 8), 32),
    "MNIST CNN, batch 256": (MNISTCNN, (1, 28, 28), 256),
    "ResNet-20, batch 128": (ResNetV1, (3, 32, 32), 128),
}
WIDE = "MLP 784-100-100-10, batch 64"
EPOCHS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "MLP, batch 32": TASKS["MLP, batch 32"],
    WIDE: (lambda: MLP((1, 28, 28), (100, 100)), (1, 28, 28), 64),
}
WARM_UP = 3
"""Steps of a round that are not counted; the first ones allocate, and the callback updates its rate after 1 and 2."""


def clock(device: torch.device) -> Callable[[], float]:
    """The time, or the process's time on the CPU where it has one thread."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


class Clock(L.Callback):
    """Seconds from the start of one batch to the start of the next."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.starts = device, list[float]()

    def on_train_batch_start(self, *_: object) -> None:
        """Notes the time, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.starts.append(clock(self.device)())

    def steps(self) -> list[float]:
        """The steps after the warm-up."""
        return [b - a for a, b in zip(self.starts[WARM_UP:], self.starts[WARM_UP + 1 :], strict=False)]


class Inside:
    """Seconds spent in the callback's functions in each step, as they return to the host."""

    def __init__(self, callback: LipschitzLR, device: torch.device) -> None:
        self.seconds: list[float] = []
        self.parts: dict[str, list[float]] = {}
        self.now = clock(device)
        for name in (
            "on_train_batch_start",
            "on_before_backward",
            "on_after_backward",
            "on_before_optimizer_step",
            "before_step",
            "on_train_batch_end",
        ):
            setattr(callback, name, self.timed(getattr(callback, name)))

    def timed(self, function: Callable[..., None]) -> Callable[..., None]:
        """The function, with its time added up."""

        @wraps(function)
        def call(*args: object, **kwargs: object) -> None:
            if function.__name__ == "on_train_batch_start":
                self.seconds.append(0.0)
            start = self.now()
            function(*args, **kwargs)
            took = self.now() - start
            self.seconds[-1] += took
            self.parts.setdefault(function.__name__, []).append(took)

        return call


def one_round(task: str, callbacks: list[L.Callback], steps: int, device: torch.device) -> list[float]:
    """Trains a fresh network for some steps; returns the seconds of each."""
    clock = Clock(device)
    train(task, [clock, *callbacks], device, 4, max_steps=steps + WARM_UP + 1, max_epochs=-1)
    return clock.steps()


def train(
    task: str,
    callbacks: list[L.Callback],
    device: torch.device,
    batches: int,
    optimizer: Any = None,
    **length: int,
) -> None:
    """Trains a fresh network on so many random batches."""
    make, shape, batch_size = {**TASKS, **EPOCHS}[task]
    torch.manual_seed(0)
    images = torch.randint(256, (batch_size * batches, *shape), dtype=torch.uint8, device=device)
    labels = torch.randint(10, (batch_size * batches,), device=device)
    loader = DeviceLoader(images, labels, batch_size, lambda batch, _: batch.float().div_(255), shuffle=True)
    trainer = L.Trainer(
        **length,
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(ImageClassifier(make(), **({"optimizer": optimizer} if optimizer else {})), loader)


def measure(task: str, rounds: int, steps: int, device: torch.device) -> dict[str, list[float]]:
    """Prints a row; returns the seconds of each function of the callback."""
    parts: dict[str, list[float]] = {}
    timed: dict[bool, list[float]] = {False: [], True: []}
    insides: list[float] = []
    add = RunningMaximum.add
    for number in range(rounds * 2):
        # Pairs in alternating order, so that a drift of the machine's speed is shared.
        with_callback = (number % 2 == 0) == (number // 2 % 2 == 0)
        callbacks: list[L.Callback] = []
        if with_callback:
            callback = LipschitzLR(update=10**9)
            watch = Inside(callback, device)
            RunningMaximum.add = watch.timed(add)  # type: ignore[assignment]
            callbacks = [callback]
        timed[with_callback] += one_round(task, callbacks, steps, device)
        RunningMaximum.add = add  # type: ignore[method-assign]
        if with_callback:
            insides += watch.seconds[WARM_UP:-1]
            for name, seconds in watch.parts.items():
                parts.setdefault(name, []).extend(seconds[WARM_UP:-1])
    inside = statistics.median(insides)
    without, with_ = ([1e3 * q for q in statistics.quantiles(timed[key], n=4)] for key in (False, True))
    share = 1e3 * inside / without[1]
    print(
        f"{task:22} {without[1]:9.3f} ({without[0]:.3f} .. {without[2]:.3f}) {with_[1]:9.3f} ({with_[0]:.3f} .. "
        f"{with_[2]:.3f})   {with_[1] / without[1]:.4f}   {1e6 * inside:7.1f}   {share:.3%}",
        flush=True,
    )
    return parts


class Epochs(L.Callback):
    """Seconds of each epoch."""

    def __init__(self, device: torch.device) -> None:
        self.now, self.seconds = clock(device), list[float]()

    def on_train_epoch_start(self, *_: object) -> None:
        """Notes the time."""
        self.seconds.append(-self.now())

    def on_train_epoch_end(self, *_: object) -> None:
        """Adds the time, once the device has done what it was given."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[-1] += self.now()


def epochs(task: str, optimizer: type[torch.optim.Optimizer], rounds: int, steps: int, device: torch.device) -> None:
    """Prints the ratios of two whole epochs with and without the callback: median, least and largest."""
    ratios: list[tuple[float, ...]] = []
    alone = 0.0
    for number in range(rounds + 1):
        seconds = []
        for callbacks in ([], [LipschitzLR()]):
            watch = Epochs(device)
            make = partial(optimizer, lr=0.01)
            train(task, [watch, *callbacks], device, steps, make, max_epochs=2)
            seconds.append(watch.seconds)
        if number:  # the first pair warms up
            ratios.append(tuple(with_ / without for without, with_ in zip(*seconds, strict=True)))
            alone = 1e3 * seconds[0][1] / steps
    cells = [f"{statistics.median(one):.3f} ({min(one):.3f} .. {max(one):.3f})" for one in zip(*ratios, strict=True)]
    name = f"{task}, {optimizer.__name__}: {steps} steps of {alone:.2f} ms"
    print(f"{name:56} with / without: first epoch {cells[0]}, second {cells[1]}", flush=True)


def idle(task: str, rounds: int, steps: int, device: torch.device, count: int = 50) -> float:
    """Seconds of a step that Lightning takes for a callback that does nothing."""
    medians: dict[bool, list[float]] = {False: [], True: []}
    for number in range(rounds * 2):
        some = (number % 2 == 0) == (number // 2 % 2 == 0)
        callbacks = [L.Callback() for _ in range(count if some else 0)]
        medians[some].append(statistics.median(one_round(task, callbacks, steps, device)))
    return (statistics.median(medians[True]) - statistics.median(medians[False])) / count


def main() -> None:
    """Parses the arguments and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9, help="rounds with and as many without the callback")
    parser.add_argument("--steps", type=int, default=20, help="counted steps in a round")
    parser.add_argument("--epoch", type=int, default=600, help="steps of the whole epochs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    name += ", CPU time" if clock(device) is time.process_time else ", wall clock"
    print(f"{name}; torch {torch.__version__}, lightning {L.__version__}, Python {platform.python_version()}")
    for task, optimizer in itertools.product(EPOCHS, (torch.optim.SGD, torch.optim.AdamW)):
        epochs(task, optimizer, arguments.rounds, arguments.epoch, device)
    print(f"{arguments.rounds} rounds of {arguments.steps} steps each way; milliseconds: median (quartiles)")
    print(f"{'':22} {'without the callback':>30} {'with it':>30}   ratio    inside, microseconds and share")
    parts = {task: measure(task, arguments.rounds, arguments.steps, device) for task in TASKS}
    first = next(iter(TASKS))
    print(f"\n{first}, microseconds a step: median (quartiles)")
    for name, seconds in parts[first].items():
        low, median, high = (1e6 * q for q in statistics.quantiles(seconds, n=4))
        print(f"{name:30} {median:7.1f} ({low:.1f} .. {high:.1f})")
    nothing = 1e6 * idle(first, arguments.rounds, arguments.steps, device)
    print(f"{'a callback that does nothing':30} {nothing:7.1f}")


if __name__ == "__main__":
    main()
