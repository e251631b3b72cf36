"""What stands for the hooks on the head where the output layers are measured in the backward."""

from typing import Any

import torch
from torch import Tensor

from lit_lipschitz.control.loop_facts import Target
from lit_lipschitz.measurement.measured_outputs import MeasuredOutputs
from lit_lipschitz.recognition.output_layers import OutputLayer, parameters_of


class MeasuredHook:
    """The output layers of one optimizer; has the methods of hooks on a head.

    ``statistic`` measures them; ``stored`` is its state in the run that is resumed, or None.
    """

    def __init__(self, target: Target, device: torch.device, stored: dict[str, Any] | None) -> None:
        self._parameters, self._target = target.parameters, target
        self.statistic = MeasuredOutputs(device)
        self.name = "output layers"
        self.head = self.weight = None
        if stored is not None:
            self.load_state_dict(stored)

    def own(self, layers: list[OutputLayer]) -> list[OutputLayer]:
        """The calls of layers that the optimizer trains."""
        return [layer for layer in layers if any(p in self._parameters for p in parameters_of(layer.weight))]

    def name_layers(self, layers: list[OutputLayer]) -> None:
        """Names the output layers after their parameters."""
        names = {parameter: name for name, parameter in self._target.model.named_parameters()}
        weights = [p for layer in layers for p in parameters_of(layer.weight)]
        self.name = ", ".join(dict.fromkeys(names[p].rpartition(".")[0] or names[p] for p in weights if p in names))

    def owns(self, weight: Tensor) -> bool:
        """Whether the optimizer trains a weight."""
        return weight in self._parameters

    def discard(self) -> None:
        """A batch without a loss leaves nothing to discard."""

    def set_mode(self, mode: str) -> None:
        """Forwards are not measured."""

    def remove(self) -> None:
        """There are no hooks on modules."""

    def state_dict(self) -> dict[str, Any]:
        """The state of the statistic."""
        return self.statistic.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads the state of :meth:`state_dict`."""
        self.statistic.load_state_dict(state)
