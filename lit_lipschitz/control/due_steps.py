"""Which optimizer steps are measured, the same ones on all ranks."""

from dataclasses import dataclass

MEASURE_EVERY = 31
"""Optimizer steps between measurements after the first ones; a prime, so that losses in turns are all measured."""


@dataclass
class DueSteps:
    """Counts optimizer steps, and tells which are measured: 1, 2, 4, 8, ..., every so many, and those asked for."""

    every: int  # steps between measurements
    steps: int = 0  # of the run
    requested: bool = True  # whether the coming step is measured whatever its number

    @property
    def due(self) -> bool:
        """Whether to measure the coming step."""
        step = self.steps + 1
        return self.requested or step % self.every == 0 or step & self.steps == 0

    def end_step(self) -> None:
        """Counts a step."""
        self.steps, self.requested = self.steps + 1, False
