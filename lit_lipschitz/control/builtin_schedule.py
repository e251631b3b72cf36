"""The built-in schedule for optimizers without a scheduler: linear warm-up and decay."""

import math

from lit_lipschitz.control.loop_facts import LoopFacts, Target
from lit_lipschitz.optim.schedules import MAX_WARMUP, linear_warmup, linear_warmup_decay


class BuiltinSchedule:
    """Linear warm-up over the first tenth of the run, at most 2,000 steps, and linear decay to 0.

    Without the decay if the weights are averaged. In a run of unknown length the warm-up is over the first epoch, at
    whose end the constant is known on all of the training data, and there is no decay.
    """

    def __init__(self, *, enabled: bool, averages_weights: bool) -> None:
        self._averages_weights = averages_weights
        # Optimizer steps of the run and of the warm-up; inf if unknown or without a schedule, None before the first.
        self._total_steps: float | None = None if enabled else math.inf
        self._warmup = 0.0
        self._told = False  # of an epoch that was shortened

    @classmethod
    def of(
        cls, target: Target, loop: LoopFacts, *, wanted: bool, scheduled: bool, averages_weights: bool
    ) -> "BuiltinSchedule":
        """The schedule of an optimizer, unless it is not ``wanted`` or something else changes the learning rate."""
        if wanted and loop.lr_writer and not target.schedulers:
            loop.notify(
                f"LipschitzLR: {loop.lr_writer} changes the learning rate itself, so the built-in warm-up and decay "
                "are off; add a scheduler for the epochs before it, or pass schedule='none' to hide this message"
            )
        has_warmup = averages_weights and any(group.get("warmup_steps") for group in target.optimizer.param_groups)
        return cls(enabled=wanted and not scheduled and not has_warmup, averages_weights=averages_weights)

    @property
    def description(self) -> str | None:
        """``"warm-up and decay"`` or ``"warm-up"``; None without a schedule and before the first step."""
        if self._total_steps is None or not self._warmup:
            return None
        return "warm-up" if self._averages_weights or self._total_steps == math.inf else "warm-up and decay"

    def decays(self, loop: LoopFacts) -> bool:
        """Whether it lowers the learning rate until the end of the run."""
        if self._total_steps is None:
            self._begin(loop)
        return self.description == "warm-up and decay"

    def on_short_epoch(self, loop: LoopFacts) -> None:
        """Reports once that the run will be shorter than its length, if the schedule is used."""
        if self.description == "warm-up and decay" and not self._told:
            self._told = True
            loop.notify(
                f"LipschitzLR: the {self.description} is over {int(self._total_steps or 0)} optimizer steps, and this "
                "epoch was shortened (on_train_batch_start has returned -1); pass the number of steps as max_steps to "
                "the Trainer, or add a scheduler"
            )

    def factor(self, loop: LoopFacts) -> float:
        """Factor of the learning rate in the next optimizer step; the first call reports the length of the run."""
        if self._total_steps is None:
            self._begin(loop)
        if not self._warmup:
            return 1.0
        assert self._total_steps is not None
        if self._averages_weights or self._total_steps == math.inf:
            return linear_warmup(loop.step, self._warmup)
        return linear_warmup_decay(min(loop.step, int(self._total_steps) - 1), int(self._total_steps))

    def _begin(self, loop: LoopFacts) -> None:
        """Finds the length of the run and of the warm-up, and reports them."""
        steps, epoch = loop.total_steps(), loop.epoch_steps()
        if 1 <= steps < math.inf:
            self._total_steps, self._warmup = steps, min(steps / 10, MAX_WARMUP)
            decay = "" if self._averages_weights else f" and decay over {steps:.0f}"
            message = f"warm-up over {self._warmup:.0f}{decay} optimizer steps (off with schedule='none')"
        elif 1 <= epoch < math.inf:
            self._total_steps, self._warmup = math.inf, min(epoch, MAX_WARMUP)
            message = (
                f"warm-up over {self._warmup:.0f} optimizer steps and no decay, as the length of the run is not known "
                "(EarlyStopping, a limit of time, or no max_epochs, max_steps or total_steps); a scheduler can decay it"
            )
        else:
            self._total_steps = math.inf
            message = (
                "the length of the run is not known, so the built-in warm-up and decay are off; set max_epochs, "
                "max_steps or, in attach, total_steps, add a scheduler, or pass schedule='none' to hide this message"
            )
        loop.notify(f"LipschitzLR: {message}")
