"""Linear warm-up and decay, and Keras' time-based decay, as schedules of the learning rate."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

MAX_WARMUP = 2000
"""Most steps of a warm-up: 2 / (1 - beta2) for the usual beta2 = 0.999 of Adam, by J. Ma, D. Yarats: On the adequacy of
untuned warmup for adaptive optimization, arXiv 1910.04209, 2019."""


def linear_warmup_decay(step: int, total_steps: int, warmup: float = 0.1) -> float:
    """The factor of :class:`LinearWarmupDecay` at a step; 0 after the last step."""
    rise = min(warmup * total_steps, MAX_WARMUP)
    return max(0.0, min((step + 1) / (rise + 1), (total_steps - step) / (total_steps - rise)))


def linear_warmup(step: int, rise: float) -> float:
    """A warm-up over ``rise`` steps, and at most :data:`MAX_WARMUP`, without a decay."""
    return min((step + 1) / (min(rise, MAX_WARMUP) + 1), 1.0)


class TimeDecay(LambdaLR):
    r"""Divides the learning rate by 1 + decay t at optimizer step t, counted from 0.

    This is the argument ``decay`` of Keras' optimizers, which the papers' experiments use and their tables call weight
    decay. The learning rate applied at step t is :math:`\frac{1}{L (1 + decay\, t)}`.

    Args:
        optimizer: The optimizer.
        decay: Per optimizer step, not negative.

    Raises:
        ValueError: The decay is negative or not finite.

    References:
        The scripts published with R. Yedida, S. Saha, arXiv 1902.07399.
    """

    def __init__(self, optimizer: Optimizer, decay: float) -> None:
        if not 0 <= decay < math.inf:
            raise ValueError(f"decay={decay}: expected a finite number of at least 0")
        super().__init__(optimizer, lambda step: 1 / (1 + decay * step))


class LinearWarmupDecay(LambdaLR):
    r"""Linear warm-up to the optimizer's learning rate, then linear decay to 0; stepped every optimizer step.

    At step t of T, with w = warmup T and at most 2,000 (``MAX_WARMUP``), the factor is
    :math:`\min(\frac{t+1}{w+1}, \frac{T-t}{T-w})`. It is positive at every step, including the first and the last.

    Args:
        optimizer: The optimizer.
        total_steps: Optimizer steps of the run, T. ``ImageClassifier`` fills it in.
        warmup: Fraction of the run used for warm-up, in [0, 1).

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int | None = None, warmup: float = 0.1) -> None:
        if total_steps is None or total_steps < 1:
            raise ValueError(f"total_steps={total_steps}: expected the number of optimizer steps of the run")
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup={warmup}: expected a fraction of at least 0 and below 1")
        super().__init__(optimizer, lambda step: linear_warmup_decay(step, total_steps, warmup))
