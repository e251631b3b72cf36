"""The schedule that ``LipschitzLR`` brings to a run that has none and whose length is known."""

import math
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, Timer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer

from lit_lipschitz.measurement.optimizer_updates import optimizer_info
from lit_lipschitz.optim.schedules import linear_warmup, linear_warmup_decay


class OwnSchedule:
    """A linear warm-up and decay, or for optimizers that average the weights the warm-up alone.

    Args:
        optimizer: Whose rate it is for.
        wanted: Whether there is to be one.
    """

    def __init__(self, optimizer: Optimizer, wanted: bool) -> None:
        self._optimizer = optimizer
        # Optimizer steps that the run will have; inf without a schedule, None before the first step.
        self._length: float | None = None if wanted else math.inf

    @property
    def parts(self) -> str | None:
        """What the schedule is made of, if there is one; known from the first step on."""
        if self._length is None or self._length == math.inf:
            return None
        return "warm-up" if self._averages else "warm-up and decay"

    def factor(self, trainer: Trainer, module: LightningModule) -> float:
        """What the rate of the step that comes is multiplied by."""
        if self._length is None:
            self._length = self._length_of_run(trainer, module)
        if self._length == math.inf:
            return 1.0
        shape = linear_warmup if self._averages else linear_warmup_decay
        return shape(min(trainer.global_step, int(self._length) - 1), int(self._length))

    @property
    def _averages(self) -> bool:
        """Whether the optimizer averages the weights, which is in place of a decay."""
        return optimizer_info(self._optimizer).averages_weights

    def _length_of_run(self, trainer: Trainer, module: LightningModule) -> float:
        """Optimizer steps of the run; infinity where there is no telling, or the optimizer has a warm-up."""
        if self._averages and any(group["warmup_steps"] for group in self._optimizer.param_groups):
            return math.inf
        length = math.inf
        callbacks: Sequence[Any] = trainer.callbacks  # type: ignore[attr-defined]
        changing = any(isinstance(one, GradientAccumulationScheduler) and len(one.scheduling) > 1 for one in callbacks)
        timed = any(isinstance(one, Timer) and one.time_remaining() is not None for one in callbacks)
        if module.automatic_optimization and not changing and not timed:
            length = float(trainer.estimated_stepping_batches)
        if not 1 <= length < math.inf:
            rank_zero_info(
                "LipschitzLR: the length of the run is not known, so the rate has no warm-up and no decay; set "
                "max_epochs or max_steps, or bring a scheduler (schedule='none' says that none is wanted)"
            )
            return math.inf
        what = "warm-up over a tenth of" if self._averages else "warm-up and decay over"
        rank_zero_info(f"LipschitzLR: {what} {int(length)} optimizer steps (schedule='none' has none)")
        return length
