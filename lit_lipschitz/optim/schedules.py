"""Learning-rate schedules that the callback composes with as factors, like torch's own."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def linear_warmup_decay(step: int, total_steps: int, warmup: float = 0.1) -> float:
    """The factor of :class:`LinearWarmupDecay` at a step; 0 beyond the last one."""
    rise = warmup * total_steps
    return max(0.0, min((step + 1) / (rise + 1), (total_steps - step) / (total_steps - rise)))


def linear_warmup(step: int, total_steps: int, warmup: float = 0.1) -> float:
    """The rise of :func:`linear_warmup_decay` alone."""
    return min((step + 1) / (warmup * total_steps + 1), 1.0)


class TimeDecay(LambdaLR):
    r"""Divides the optimizer's rate by 1 + decay t at step t, the first one being 0; stepped every optimizer step.

    This is the argument ``decay`` of Keras' optimizers, with which the experiments of the papers were run: what their
    tables call weight decay. The rate that was applied at step t is :math:`\frac{1}{L (1 + decay\, t)}`.

    Args:
        optimizer: Whose rates to set.
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
    r"""A linear rise to the optimizer's rate, then a linear decay to 0, stepped every optimizer step.

    At step t of T, with w = warmup T steps of warm-up, the factor is :math:`\min(\frac{t+1}{w+1}, \frac{T-t}{T-w})`. It
    is above 0 at every step of the run, the first and the last included.

    Args:
        optimizer: Whose rates to set.
        total_steps: Optimizer steps of the run, T. ``ImageClassifier`` fills it in.
        warmup: Fraction of the run that the rise takes, in [0, 1).

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int | None = None, warmup: float = 0.1) -> None:
        if total_steps is None or total_steps < 1:
            raise ValueError(f"total_steps={total_steps}: expected the number of optimizer steps of the run")
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup={warmup}: expected a fraction of at least 0 and below 1")
        super().__init__(optimizer, lambda step: linear_warmup_decay(step, total_steps, warmup))
