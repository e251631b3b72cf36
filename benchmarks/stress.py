"""Trains 200 and more small networks by ``LipschitzLR()`` and looks for runs that lose what they had learned.

    python benchmarks/stress.py [--runs 200] [--seed 0] [--longest 20000]

Each run draws a loss, an optimizer, a network, the scales of inputs and targets (0.001 to 1,000), the noise of the
targets, a batch size from 1 to all examples, a length, and whether the built-in schedule is on. Three things count as
failures: a loss or a rate that is not finite; a loss at the end that has lost more than a tenth of what the run had
gained at its best, and more than noise, the standard deviation of a batch's loss when it was at its best; a rate that
rises more than tenfold above its maximum in the first 16 steps while the loss has not fallen. The failures are printed
with the command that repeats each of them.
"""

import argparse
import itertools
import logging
import math
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_lipschitz import LipschitzLR
from lit_lipschitz.data import DeviceLoader

NUM_EXAMPLES, WIDTH, CLASSES = 256, 8, 4
GAINED = 0.1
"""Largest part of the best decrease of the loss that a run may lose again: more than noise takes."""
GROWTH = 10.0


class SignMomentum(torch.optim.Optimizer):
    """The update of Lion, as an optimizer that is not registered: its step is measured."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (first, second), lr = group["betas"], group["lr"]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                    parameter.sub_(lr * (first * average + (1 - first) * parameter.grad).sign())
                    average.lerp_(parameter.grad, 1 - second)
        return loss


def _schedule_free(parameters: Any) -> Any:
    from schedulefree import AdamWScheduleFree

    return AdamWScheduleFree(parameters)


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "SGD momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "AdamW": torch.optim.AdamW,
    "RMSprop": torch.optim.RMSprop,
    "Schedule-Free": _schedule_free,
    "Lion": SignMomentum,
}
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "huber": F.huber_loss,
    "cross_entropy": F.cross_entropy,
    "binary_cross_entropy": F.binary_cross_entropy_with_logits,
    "focal": lambda outputs, targets: _focal(outputs, targets),
    "rmse": lambda outputs, targets: (F.mse_loss(outputs, targets) + 1e-12).sqrt(),
}
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "linear": lambda outputs: nn.Linear(WIDTH, outputs),
    "mlp": lambda outputs: nn.Sequential(
        nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, outputs)
    ),
    "mlp with LayerNorm": lambda outputs: nn.Sequential(
        nn.Linear(WIDTH, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, outputs)
    ),
    "mlp with BatchNorm": lambda outputs: nn.Sequential(
        nn.Linear(WIDTH, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, outputs)
    ),
    "conv": lambda outputs: nn.Sequential(
        nn.Unflatten(1, (1, WIDTH)), nn.Conv1d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * (WIDTH - 2), outputs)
    ),
}


def _keep(inputs: Tensor, generator: torch.Generator) -> Tensor:
    return inputs


def _focal(outputs: Tensor, targets: Tensor) -> Tensor:
    each = F.cross_entropy(outputs, targets, reduction="none")
    return ((1 - torch.exp(-each)) ** 2 * each).mean()


@dataclass(frozen=True)
class Run:
    """What a run trains, and how."""

    number: int
    loss: str
    optimizer: str
    network: str
    input_scale: float
    target_scale: float
    noise: float  # standard deviation of the targets' noise over that of the targets, or share of random classes
    batch_size: int
    steps: int
    schedule: str

    @classmethod
    def draw(cls, number: int, seed: int, longest: int) -> "Run":
        """The run of a number."""
        rng = random.Random(f"{seed} {number}")
        network, batch_size = rng.choice(list(NETWORKS)), rng.choice((1, 8, 32, NUM_EXAMPLES))
        return cls(
            number,
            list(LOSSES)[number % len(LOSSES)],
            list(OPTIMIZERS)[number // len(LOSSES) % len(OPTIMIZERS)],
            network,
            10.0 ** rng.choice((-3, -1, 0, 0, 1, 3)),
            10.0 ** rng.choice((-3, -1, 0, 0, 1, 3)),
            rng.choice((0.0, 0.0, 0.5)),
            8 if "BatchNorm" in network and batch_size == 1 else batch_size,  # it needs two examples
            min(rng.choice((300,) * 14 + (2000,) * 5 + (20000,)), longest),
            rng.choice(("auto", "none")),
        )


class Module(L.LightningModule):
    """Trains a run, and keeps its losses on all examples and its rates."""

    def __init__(self, run: Run, seed: int) -> None:
        super().__init__()
        self.run, self.seed = run, seed
        generator = torch.Generator().manual_seed(1000 * seed + run.number)
        inputs = torch.randn(NUM_EXAMPLES, WIDTH, generator=generator)
        teacher = torch.randn(WIDTH, CLASSES, generator=generator)
        scores = inputs @ teacher / WIDTH**0.5 + (inputs[:, :1] * inputs[:, 1:2]).abs()
        noise = run.noise * torch.randn(scores.shape, generator=generator)
        self.targets: Tensor = (scores + noise) * run.target_scale
        if run.loss in ("cross_entropy", "focal"):
            self.targets = (scores + noise).argmax(dim=1)
        elif run.loss == "binary_cross_entropy":
            self.targets = (scores + noise > 0.5).float()
        self.inputs = inputs * run.input_scale
        self.net = NETWORKS[run.network](CLASSES)
        self.marks = sorted({round(run.steps * i / 40) for i in range(41)} | {1, 2, 4, 8, 16})
        self.losses: dict[int, float] = {}
        self.noise: dict[int, float] = {}  # standard deviation of the loss of a batch
        self.rates: dict[int, float] = {}

    def train_dataloader(self) -> DeviceLoader:
        """Shuffled batches."""
        epoch: Callable[[], int] = lambda: self.trainer.current_epoch  # noqa: E731
        return DeviceLoader(
            self.inputs, self.targets, self.run.batch_size, _keep, shuffle=True, seed=self.seed, epoch=epoch
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        return LOSSES[self.run.loss](self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """The run's optimizer."""
        return OPTIMIZERS[self.run.optimizer](self.net.parameters())

    @torch.no_grad()
    def mark(self, step: int, rate: float | None) -> None:
        """Keeps the loss on all examples, with the weights as they are evaluated."""
        optimizer: Any = self.trainer.optimizers[0]
        if hasattr(optimizer, "eval"):
            optimizer.eval()
        outputs = self.net(self.inputs)
        self.losses[step] = float(LOSSES[self.run.loss](outputs, self.targets))
        batches = zip(outputs.split(self.run.batch_size), self.targets.split(self.run.batch_size), strict=True)
        each = torch.stack([LOSSES[self.run.loss](*batch) for batch in itertools.islice(batches, 32)])
        self.noise[step] = float(each.std()) if len(each) > 1 else 0.0
        if hasattr(optimizer, "train"):
            optimizer.train()
        if rate is not None:
            self.rates[step] = rate


class _Marks(L.Callback):
    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.mark(0, None)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step in pl_module.marks:
            callback = next(one for one in trainer.callbacks if isinstance(one, LipschitzLR))  # type: ignore[attr-defined]
            pl_module.mark(trainer.global_step, callback.rate)


def failures(losses: dict[int, float], rates: dict[int, float], noise: dict[int, float]) -> list[str]:
    """What is wrong with a run, from its losses, rates and noise by step; empty for a good one."""
    found = []
    steps = sorted(losses)
    values = [losses[step] for step in steps]
    if not all(map(math.isfinite, [*values, *rates.values()])):
        return ["not finite"]
    best = min(steps, key=lambda step: losses[step])
    first, least, last = values[0], losses[best], sum(values[-3:]) / 3
    if last - least > max(GAINED * (first - least), noise[best]) + 0.01 * abs(first):
        found.append(f"loss {first:.3g}, at best {least:.3g}, at the end {last:.3g}")
    early = [step for step in rates if step <= 16]
    start = max(early, key=lambda step: rates[step])
    risen = [step for step in rates if rates[step] > GROWTH * rates[start] and losses[step] > 0.9 * losses[start]]
    if risen:
        found.append(f"rate {rates[start]:.3g} in step {start}, {rates[risen[0]]:.3g} in step {risen[0]}")
    return found


def train(run: Run, seed: int) -> list[str]:
    """Trains a run; what is wrong with it."""
    L.seed_everything(1000 * seed + run.number, verbose=False)
    module = Module(run, seed)
    trainer = L.Trainer(
        max_steps=run.steps,
        max_epochs=-1,
        callbacks=[LipschitzLR(schedule=run.schedule), _Marks()],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    return failures(module.losses, module.rates, module.noise)


def main() -> None:
    """Parses the arguments, trains and prints the failures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=210)
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=int, default=20000, help="most steps of a run")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    failed, start = 0, time.perf_counter()
    for number in range(options.first, options.first + options.runs):
        run = Run.draw(number, options.seed, options.longest)
        found = train(run, options.seed)
        failed += bool(found)
        if found:
            print(f"--seed {options.seed} --first {number} --runs 1: {'; '.join(found)}\n    {run}", flush=True)
    seconds = time.perf_counter() - start
    print(f"{failed} of {options.runs} runs failed, in {seconds:.0f} s")


if __name__ == "__main__":
    main()
