"""A head and a loss that were found, and the methods that the ways of finding and measuring them share."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from lit_lipschitz.bounds.loss_spec import Loss
from lit_lipschitz.control.loop_facts import LoopFacts
from lit_lipschitz.measurement.head_hooks import Mode
from lit_lipschitz.measurement.measured_outputs import MeasuredOutputs
from lit_lipschitz.recognition.loss_graph import FoundLoss, LossGraph


class Statistic(Protocol):
    """What is measured of a head, kept on the device and reduced over the ranks by MAX."""

    mean: bool  # whether its norm is divided by the square root of the number of examples

    def finish(self) -> None:
        """Ends a batch without a loss."""

    def reset(self) -> None:
        """Ends an interval."""

    def pack(self, scale: float, rank: int) -> Tensor:
        """This rank's numbers for a MAX all-reduce; shape (n,)."""

    def unpack(self, reduced: Tensor) -> Tensor:
        """Gives all ranks the same numbers, and returns those to read to the host."""


class Hook(Protocol):
    """What measures the head, or the output layers."""

    @property
    def name(self) -> str:
        """Name of the module, or of several."""

    @property
    def weight(self) -> Tensor | None:
        """The weight of the head; None for output layers."""

    @property
    def statistic(self) -> Statistic:
        """What is measured."""


class Hooks(Protocol):
    """The hooks of one optimizer, before and after its head is found."""

    def owns(self, weight: Tensor) -> bool:
        """Whether a weight can be that of the head."""

    def set_mode(self, mode: Mode) -> None:
        """Sets what forwards measure."""

    def discard(self) -> None:
        """Discards the batch so far."""

    def reset(self) -> None:
        """Forgets all measurements."""

    def remove(self) -> None:
        """Removes the hooks."""

    def state_dict(self) -> dict[str, Any] | None:
        """The state for a checkpoint."""

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Loads the state of :meth:`state_dict`."""


@dataclass(frozen=True)
class FoundHeads:
    """The head and the loss of one optimizer, and how rows of the head make examples."""

    hook: Hook  # measures the head's inputs
    loss: Loss
    num_outputs: int  # of the head that enter the loss, or classes
    recognised: FoundLoss  # what the graph of the first loss showed, without its inputs; defaults if that is nothing
    gradients: MeasuredOutputs | None = None  # in the outputs, measured in the backward; None if they are not
    measured: bool = False  # whether the loss was not recognised, and its constant is that of these gradients


class Meter(Protocol):
    """Measures by a head and a loss that were found."""

    def measure(self, graph: LossGraph, loop: LoopFacts) -> bool:
        """Measures a batch by its loss, whose backward is about to begin; False if the loss is not understood."""
