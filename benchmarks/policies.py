"""Learning-rate policies that compare.py trains with: optimizer, schedule and callbacks, from a name as ``sgd:0.1``."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from tasks import Task
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from lit_lipschitz import LinearWarmupDecay, LipschitzLR

Optimizers = Callable[[Iterable[nn.Parameter], int, Task], tuple[Any, Any]]
"""Maps the parameters, the number of optimizer steps and the task to an optimizer and its scheduler, or None."""
ANY_LR = 1.0
"""The configured learning rate where the callback replaces it."""


@dataclass
class Recipe:
    """How a policy trains.

    Attributes:
        optimizers: Makes the optimizer and the scheduler.
        callbacks: Callbacks of the trainer.
        search: Whether Lightning's LearningRateFinder sets the learning rate first.
    """

    optimizers: Optimizers
    callbacks: tuple[L.Callback, ...] = ()
    search: bool = False


def recipe(policy: str) -> Recipe:
    """The recipe of a policy: a name of :data:`POLICIES`, with a learning rate after a colon where it takes one."""
    name, _, number = policy.partition(":")
    if name not in POLICIES:
        raise SystemExit(f"expected a policy of {', '.join(POLICIES)}, found {policy!r}")
    return POLICIES[name](float(number) if number else None)


def _sgd(schedule: str, lr: float) -> Optimizers:
    def make(parameters: Iterable[nn.Parameter], steps: int, task: Task) -> tuple[Any, Any]:
        # The transformer's decay is meant for AdamW; in SGD, coupled, 0.05 would be a hundred times the usual one.
        decay = min(task.weight_decay, 5e-4)
        optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=decay)
        return optimizer, _scheduler(schedule, optimizer, lr, steps)

    return make


def _adamw(schedule: str, lr: float) -> Optimizers:
    def make(parameters: Iterable[nn.Parameter], steps: int, task: Task) -> tuple[Any, Any]:
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=task.weight_decay)
        return optimizer, _scheduler(schedule, optimizer, lr, steps)

    return make


def _scheduler(name: str, optimizer: Any, lr: float, steps: int) -> Any:
    if name == "linear":
        return LinearWarmupDecay(optimizer, total_steps=steps)
    if name == "onecycle":
        return OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    return None


def _prodigy(parameters: Iterable[nn.Parameter], steps: int, task: Task) -> tuple[Any, Any]:
    from prodigyopt import Prodigy

    # As its README recommends for short runs: lr 1 and a cosine; its safeguard is for a warm-up, which is not used.
    optimizer = Prodigy(parameters, lr=1.0, weight_decay=task.weight_decay)
    return optimizer, CosineAnnealingLR(optimizer, T_max=steps)


def _dadapt(parameters: Iterable[nn.Parameter], steps: int, task: Task) -> tuple[Any, Any]:
    from dadaptation import DAdaptAdam

    optimizer = DAdaptAdam(parameters, lr=1.0, decouple=True, weight_decay=task.weight_decay, log_every=0)
    return optimizer, LinearWarmupDecay(optimizer, total_steps=steps)


def _schedule_free(lr: float, warmup: float) -> Optimizers:
    def make(parameters: Iterable[nn.Parameter], steps: int, task: Task) -> tuple[Any, Any]:
        from schedulefree import AdamWScheduleFree

        steps = int(warmup * steps)
        return AdamWScheduleFree(parameters, lr=lr, warmup_steps=steps, weight_decay=task.weight_decay), None

    return make


def _paper(parameters: Iterable[nn.Parameter], steps: int, task: Task) -> tuple[Any, Any]:
    return torch.optim.SGD(parameters, lr=ANY_LR, weight_decay=min(task.weight_decay, 5e-4)), None


POLICIES: dict[str, Callable[[float | None], Recipe]] = {
    "lipschitz": lambda _: Recipe(_sgd("constant", ANY_LR), (LipschitzLR(),)),
    "lipschitz-adamw": lambda _: Recipe(_adamw("constant", ANY_LR), (LipschitzLR(),)),
    "lipschitz-schedulefree": lambda _: Recipe(_schedule_free(0.0025, 0.0), (LipschitzLR(),)),
    "lipschitz-inverse": lambda _: Recipe(_sgd("constant", ANY_LR), (LipschitzLR(rule="inverse"),)),
    "paper": lambda _: Recipe(_paper, (LipschitzLR(bound="paper"),)),
    "sgd": lambda lr: Recipe(_sgd("linear", lr or 1.0)),
    "adamw": lambda lr: Recipe(_adamw("linear", lr or 1.0)),
    "schedulefree": lambda lr: Recipe(_schedule_free(lr or 0.0025, 0.05)),
    "sgd-onecycle": lambda lr: Recipe(_sgd("onecycle", lr or 1.0)),
    "adamw-onecycle": lambda lr: Recipe(_adamw("onecycle", lr or 1.0)),
    "sgd-default": lambda _: Recipe(_sgd("constant", 0.1)),
    "adamw-default": lambda _: Recipe(_adamw("constant", 1e-3)),
    "lrfinder": lambda _: Recipe(_sgd("linear", ANY_LR), search=True),
    "prodigy": lambda _: Recipe(_prodigy),
    "dadapt": lambda _: Recipe(_dadapt),
}
"""Maps a policy's learning rate, or None, to its recipe; those that set the learning rate themselves ignore it."""
