"""Which optimizer steps are measured, the same ones on all ranks."""

import math
from dataclasses import dataclass

from lit_lipschitz.rules.bounded import MAX_GROWTH

MEASURE_EVERY = 61
"""Largest number of steps from one measurement to the next; a prime, so that losses in turns are all measured."""


@dataclass
class DueSteps:
    """Counts optimizer steps, and tells which are measured: 1, 2, 3, 4, 5, 7, 9, 12, ..., and those asked for.

    Each is the first whose number is at least a quarter larger than that of the one before, so that a linear warm-up
    raises the learning rate by less than a quarter in the steps between them.
    """

    every: int  # largest number of steps from one to the next
    steps: int = 0  # of the run
    next: int = 1  # number of the next measured step

    def __post_init__(self) -> None:
        self.due = self.steps + 1 >= self.next  # whether to measure the coming step

    def end_step(self) -> None:
        """Counts a step."""
        self.steps += 1
        if self.due:
            self.next = min(max(self.steps + 1, math.ceil(MAX_GROWTH * self.steps)), self.steps + self.every)
        self.due = self.steps + 1 >= self.next

    def resume(self, steps: int, next_step: int) -> None:
        """Goes on after so many steps; ``next_step`` was to be measured next."""
        self.steps, self.next = steps, min(next_step, steps + self.every)
        self.due = self.steps + 1 >= self.next

    def request(self) -> None:
        """Has the coming step measured, whatever its number."""
        self.next, self.due = self.steps + 1, True
