"""Tables for parametrised tests: optimizers and learning-rate schedulers, by name."""

import re
from functools import partial
from typing import Any

import torch
from schedulefree import AdamWScheduleFree
from torch.optim import lr_scheduler as schedulers


def without_address(value: Any) -> str:
    """The text of a parameter as the name of a test, the same in each process."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def _momentum(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def _adamw(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=0.1)


def _schedule_free(parameters: Any) -> Any:
    optimizer = AdamWScheduleFree(parameters)
    optimizer.train()
    return optimizer


# Adam-type optimizers with torch's default moments, and variants of them; all without weight decay unless named.
ADAPTIVE_DEFAULTS = {
    "Adam": partial(torch.optim.Adam, lr=1.0),
    "AdamW": partial(torch.optim.AdamW, lr=1.0, weight_decay=0.0),
    "NAdam": partial(torch.optim.NAdam, lr=1.0),
    "RAdam": partial(torch.optim.RAdam, lr=1.0),
    "Adamax": partial(torch.optim.Adamax, lr=1.0),
    "RMSprop": partial(torch.optim.RMSprop, lr=1.0),
}
ADAPTIVE_OPTIMIZERS = {
    **ADAPTIVE_DEFAULTS,
    "Adam, weight decay": partial(torch.optim.Adam, lr=1.0, weight_decay=0.1),
    "Adam, amsgrad": partial(torch.optim.Adam, lr=1.0, amsgrad=True, betas=(0.8, 0.9)),
    "Adam, maximize": partial(torch.optim.Adam, lr=1.0, maximize=True),
    "AdamW, eps": partial(torch.optim.AdamW, lr=1.0, weight_decay=0.0, eps=1e-3),
    "NAdam, betas": partial(torch.optim.NAdam, lr=1.0, betas=(0.7, 0.95)),
    "RAdam, betas": partial(torch.optim.RAdam, lr=1.0, betas=(0.9, 0.95)),
    "Adamax, weight decay": partial(torch.optim.Adamax, lr=1.0, weight_decay=0.1),
    "RMSprop, centered": partial(torch.optim.RMSprop, lr=1.0, centered=True, weight_decay=0.01),
}
# Optimizers of runs on several ranks, one for each kind of rule.
OPTIMIZERS = {"momentum": _momentum, "adamw": _adamw, "schedule_free": _schedule_free}
# Each scheduler with the configured rate that its factor is relative to.
SCHEDULER_STEPS = 12
SCHEDULERS = {
    "LambdaLR": (lambda o: schedulers.LambdaLR(o, lambda t: 1 / (1 + t)), 0.1),
    "MultiplicativeLR": (lambda o: schedulers.MultiplicativeLR(o, lambda t: 0.9), 0.1),
    "StepLR": (lambda o: schedulers.StepLR(o, 3), 0.1),
    "MultiStepLR": (lambda o: schedulers.MultiStepLR(o, [2, 5]), 0.1),
    "ConstantLR": (lambda o: schedulers.ConstantLR(o, 0.3, 4), 0.1),
    "LinearLR": (lambda o: schedulers.LinearLR(o, 0.1, total_iters=6), 0.1),
    "ExponentialLR": (lambda o: schedulers.ExponentialLR(o, 0.8), 0.1),
    "PolynomialLR": (lambda o: schedulers.PolynomialLR(o, 8), 0.1),
    "CosineAnnealingLR": (lambda o: schedulers.CosineAnnealingLR(o, 10, 0.01), 0.1),
    "CosineAnnealingWarmRestarts": (lambda o: schedulers.CosineAnnealingWarmRestarts(o, 4), 0.1),
    "CyclicLR": (lambda o: schedulers.CyclicLR(o, 0.01, 0.4, step_size_up=3, cycle_momentum=False), 0.4),
    "OneCycleLR": (lambda o: schedulers.OneCycleLR(o, 0.5, total_steps=SCHEDULER_STEPS + 1, cycle_momentum=False), 0.5),
    "SequentialLR": (
        lambda o: schedulers.SequentialLR(
            o, [schedulers.LinearLR(o, 0.1, total_iters=4), schedulers.ExponentialLR(o, 0.9)], [4]
        ),
        0.1,
    ),
    "ChainedScheduler of OneCycleLR": (
        lambda o: schedulers.ChainedScheduler(
            [schedulers.OneCycleLR(o, 0.5, total_steps=SCHEDULER_STEPS + 1, cycle_momentum=False)]
        ),
        0.5,
    ),
    "ChainedScheduler": (
        lambda o: schedulers.ChainedScheduler([schedulers.ConstantLR(o, 0.5, 3), schedulers.ExponentialLR(o, 0.9)]),
        0.1,
    ),
}
