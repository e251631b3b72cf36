"""Readings, now and then, of how long an optimizer's step is that rescales the gradient, and how steep the loss is."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_lipschitz.bounds.families import Reduction
from lit_lipschitz.measurement import optimizer_updates as directions
from lit_lipschitz.measurement.output_gradients import Rows, Slopes, slopes_of_all
from lit_lipschitz.measurement.scale_invariance import ScaleInvariance
from lit_lipschitz.recognition.loss_graph import Edge, Reading
from lit_lipschitz.rules.registry import StepScale

READ_EVERY = 16
"""Optimizer steps between readings, once the first 16 are over."""


class StepReadings:
    """What the readings of one optimizer's steps come to.

    Args:
        optimizer: One of :data:`lit_lipschitz.measurement.optimizer_updates.DIRECTIONS`.
        scale: What is made of the lengths, before the first reading.
        sloped: Whether to look at the slopes of the loss too.
        is_weight: Tells a weight from other parameters, where each weight has a say in the scale; None where all
            parameters are taken together.
        usual: Norms that weights usually start with.

    Attributes:
        scale: What is made of the lengths and slopes so far.
        anew: Whether the readings began anew with the last step.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        scale: StepScale,
        sloped: bool,
        is_weight: Callable[[Tensor], bool] | None,
        usual: Mapping[Tensor, float] | None = None,
    ) -> None:
        self.scale = scale
        self._is_weight = is_weight
        self._optimizer = optimizer
        self._slopes = Slopes() if sloped else None
        self._invariance = ScaleInvariance(usual) if sloped else None
        self.anew = False
        self._trained = 0  # parameters that the readings are of
        self._steps = 0  # of the run
        self._again = False

    @property
    def sloped(self) -> bool:
        """Whether the slopes of the loss are looked at."""
        return self._slopes is not None

    @property
    def direction_only(self) -> int:
        """How many weights were taken for such of which only the direction matters; this waits for the device."""
        return self._invariance.count if self._invariance is not None else 0

    @property
    def due(self) -> bool:
        """Whether the optimizer step that comes, before :meth:`begin_step`, is to be read, as all ranks know alike.

        Steps 1, 2, 4, 8 and 16 are and then every 16th, all until there is a reading, and the one after other
        parameters have begun to train. The step with which they do is read as well.
        """
        step = self._steps + 1
        return step % READ_EVERY == 0 or step & (step - 1) == 0 or not self.scale.value or self._again

    def watch(self, reading: Reading, edges: Sequence[Edge], reduction: Reduction, rows: Rows) -> None:
        """Has the backward that is about to begin tell the slopes of a loss; see :meth:`Slopes.watch`."""
        if self._slopes is not None:
            self._slopes.watch(reading, edges, reduction, rows)

    def pass_turn(self) -> None:
        """Another optimizer steps; see :meth:`Slopes.pass_turn`."""
        if self._slopes is not None:
            self._slopes.pass_turn()

    def begin_step(self) -> bool:
        """Counts a step that is about to be made, and forgets readings of other parameters than those that train now.

        Returns:
            Whether the step is to be read.
        """
        due, self._again = self.due, False
        self._steps += 1
        # Now, since for other optimizers' losses parameters may be frozen for a while.
        trained = sum(p.requires_grad for group in self._optimizer.param_groups for p in group["params"])
        self.anew = trained != self._trained
        if self.anew:
            self._trained, self.scale = trained, type(self.scale)()
            self._again = self.sloped and not due  # without a look at the slopes
        return due or self.anew

    def measure(self, grad_scale: float | Tensor, ratios: Sequence[float], rank: int, world_size: int) -> Tensor:
        """What this rank knows of the step that has begun; gradients are as they are before they are clipped.

        Args:
            grad_scale: What the gradients have been multiplied by and the optimizer will divide by.
            ratios: Each parameter group's rate over the first one's.
            rank: This rank.
            world_size: How many there are.

        Returns:
            Numbers of which :meth:`take` wants the MAX over all ranks, on the gradients' device; shape (2,), and with
            slopes (2 + 2 * world_size,).
        """
        if self._is_weight is None:
            read = directions.lengths(self._optimizer, grad_scale, ratios)
        else:
            invariance, is_weight = self._invariance, self._is_weight
            read = directions.lengths_of_weights(self._optimizer, grad_scale, ratios, invariance, is_weight)
        if self._slopes is not None:
            read = torch.cat([read, self._slopes.slots(rank, world_size, read.device).flatten()])
        # A NaN's fate in a MAX depends on the order of the ranks, and infinity is no reading.
        return torch.where(torch.isfinite(read), read, math.inf)

    def take(self, agreed: Tensor) -> None:
        """Takes in what all ranks have measured; this waits for the device."""
        gradient, step, *slopes = agreed.tolist()
        self.scale = self.scale.seen(gradient / step if step > 0 else 0.0, *slopes_of_all(slopes))

    def state_dict(self) -> dict[str, Any]:
        """The state, as plain values."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        return {
            "scale": asdict(self.scale),
            "trained": self._trained,
            "steps": self._steps,
            "again": self._again,
            "each": self._is_weight is not None,
            "orthogonal": self._invariance.state_dict(parameters) if self._invariance is not None else [],
        }

    def knows(self, state: Mapping[str, Any]) -> bool:
        """Whether the scale of a state is of the same kind: that each weight has a say is later than the rest of it."""
        return bool(state.get("each", False)) == (self._is_weight is not None)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the state of :meth:`state_dict`."""
        self.scale = type(self.scale)(**state["scale"]) if self.knows(state) else type(self.scale)()
        self._trained, self._steps, self._again = state["trained"], state["steps"], state["again"]
        if self._invariance is not None:
            self._invariance.load_state_dict(state.get("orthogonal", ()))  # later than the rest of the state
