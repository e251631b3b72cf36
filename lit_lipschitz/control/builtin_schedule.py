"""The schedule that is used if the optimizer has none: linear warm-up and decay."""

import math
from collections.abc import Callable

from lit_lipschitz.control.loop_facts import LoopFacts
from lit_lipschitz.optim.schedules import linear_warmup, linear_warmup_decay


class BuiltinSchedule:
    """Linear warm-up over the first tenth of the run and linear decay to 0; no decay if the weights are averaged.

    Args:
        enabled: Whether the schedule is used.
        averages_weights: Whether the optimizer averages the weights, which replaces the decay.
        has_warmup: Whether the optimizer has a warm-up of its own.
        notify: Prints a message once for all ranks.
    """

    def __init__(
        self, *, enabled: bool, averages_weights: bool, has_warmup: bool, notify: Callable[[str], None]
    ) -> None:
        self._averages_weights, self._notify = averages_weights, notify
        # Optimizer steps of the run; inf without a schedule, None before the first step.
        self._total_steps: float | None = None if enabled and not (averages_weights and has_warmup) else math.inf

    @property
    def description(self) -> str | None:
        """``"warm-up and decay"`` or ``"warm-up"``; None without a schedule and before the first step."""
        if self._total_steps is None or self._total_steps == math.inf:
            return None
        return "warm-up" if self._averages_weights else "warm-up and decay"

    def factor(self, loop: LoopFacts) -> float:
        """Factor of the learning rate in the next optimizer step."""
        if self._total_steps is None:
            self._total_steps = self._measure(loop)
        if self._total_steps == math.inf:
            return 1.0
        shape = linear_warmup if self._averages_weights else linear_warmup_decay
        return shape(min(loop.step, int(self._total_steps) - 1), int(self._total_steps))

    def _measure(self, loop: LoopFacts) -> float:
        """Optimizer steps of the run; infinity if unknown, which is reported."""
        total_steps = loop.total_steps()
        if not 1 <= total_steps < math.inf:
            self._notify(
                "LipschitzLR: the length of the run is not known, so the built-in warm-up and decay are off; set "
                "max_epochs or max_steps, add a scheduler, or pass schedule='none' to hide this message"
            )
            return math.inf
        what = "warm-up over a tenth of" if self._averages_weights else "warm-up and decay over"
        self._notify(f"LipschitzLR: {what} {int(total_steps)} optimizer steps (off with schedule='none')")
        return total_steps
