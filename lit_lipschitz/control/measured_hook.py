"""Measures the output layers of one optimizer in the backward, instead of the inputs of one head in the forward."""

from typing import Any

import torch
from torch import Tensor

from lit_lipschitz.control.loop_facts import LoopFacts, Target
from lit_lipschitz.control.state import check_like, refuse_other_versions
from lit_lipschitz.errors import LitLipschitzError
from lit_lipschitz.measurement.head_hooks import Mode
from lit_lipschitz.measurement.measured_outputs import MeasuredOutputs
from lit_lipschitz.recognition.loss_graph import LossGraph
from lit_lipschitz.recognition.output_layers import OutputLayer

_HEAD = "output layers"


class MeasuredHook:
    """The output layers of one optimizer, which may change from batch to batch.

    ``statistic`` measures them; ``stored`` is the state in the run that is resumed, or None.
    """

    weight = None

    def __init__(self, target: Target, device: torch.device, stored: dict[str, Any] | None) -> None:
        self._target, self.name = target, _HEAD
        self._owned = None if target.is_only else target.parameters
        self.statistic = MeasuredOutputs(device)
        self.load_state_dict(stored)

    def layers(self, graph: LossGraph) -> list[OutputLayer]:
        """The calls of layers of the optimizer that the graph of a loss meets first."""
        return graph.output_layers(self._owned)

    def watch(self, graph: LossGraph, loop: LoopFacts) -> None:
        """Has the backward that is about to begin measured."""
        layers = self.layers(graph)
        if layers:
            self.name_layers(layers)
            # The loop's division by the accumulated batches is part of the step's loss; a GradScaler's factor is not.
            self.statistic.watch(layers, loop.loss_scale() * loop.accumulated)

    def name_layers(self, layers: list[OutputLayer]) -> None:
        """Takes the names of the output layers' modules, or of their parameters."""
        names = {id(parameter): name for name, parameter in self._target.model.named_parameters()}
        found = [names[id(p)] for layer in layers for p in layer.parameters if id(p) in names]
        self.name = ", ".join(dict.fromkeys(map(_module_of, found))) or _HEAD

    def owns(self, weight: Tensor) -> bool:
        """Whether the optimizer trains a weight."""
        return weight in self._target.parameters

    def set_mode(self, mode: Mode) -> None:
        """Does nothing: forwards are not measured."""

    def discard(self) -> None:
        """Does nothing: a batch without a backward is not measured."""

    def reset(self) -> None:
        """Ends an interval."""
        self.statistic.reset()

    def remove(self) -> None:
        """Does nothing: hooks are on the graph of a loss, and go with it."""

    def state_dict(self) -> dict[str, Any]:
        """The state of the statistic, in plain values and tensors."""
        return {"head": _HEAD, "statistic": self.statistic.state_dict()}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Loads the state of :meth:`state_dict`.

        Raises:
            LitLipschitzError: It is that of a recognised loss.
        """
        if state is None:
            return
        if not is_measured_state(state):
            raise LitLipschitzError(
                f"LipschitzLR's state in the checkpoint was saved with the head {state['head']!r}, and this run has "
                "loss='measured'; resume with the loss= that it was saved with, or pass restore=False to measure again"
            )
        with refuse_other_versions():
            check_like(state["statistic"], self.statistic.state_dict())
            self.statistic.load_state_dict(state["statistic"])


def is_measured_state(state: dict[str, Any] | None) -> bool:
    """Whether a state of hooks is that of output layers whose constant is measured."""
    return state is not None and state["head"] == _HEAD


def _module_of(name: str) -> str:
    """The name of the module that a parameter belongs to, or that of a parameter of the network itself."""
    module, parametrised, _ = name.rpartition(".parametrizations.")
    return module if parametrised else name.rpartition(".")[0] or name
