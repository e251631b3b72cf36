"""Measures the output layers of one optimizer in the backward, instead of the inputs of one head in the forward."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_lipschitz.control.loop_facts import LoopFacts, Target
from lit_lipschitz.control.state import check_like, refuse_other_versions
from lit_lipschitz.errors import LitLipschitzError
from lit_lipschitz.measurement.compiled_layers import CompiledLayers
from lit_lipschitz.measurement.head_hooks import Mode
from lit_lipschitz.measurement.measured_outputs import MeasuredOutputs
from lit_lipschitz.recognition.autograd_nodes import GraphReader
from lit_lipschitz.recognition.heads import name_without_compile
from lit_lipschitz.recognition.loss_graph import LossGraph
from lit_lipschitz.recognition.output_layers import HiddenLayers, OutputLayer, OutputLayerSearch

_HEAD = "output layers"


class MeasuredHook:
    """The output layers of one optimizer, which may change from batch to batch.

    ``statistic`` measures them; ``stored`` is the state in the run that is resumed, or None.
    """

    weight = None

    def __init__(self, target: Target, device: torch.device, stored: dict[str, Any] | None) -> None:
        self._target, self.name = target, _HEAD
        self._owned = None if target.is_only else target.parameters
        self._told = False  # that compiled code was made without the hooks
        self._names: dict[int, str] = {}  # of the network's parameters, by their id
        self.statistic = MeasuredOutputs(device)
        self._compiled = CompiledLayers(target.model, self._owned)
        self.load_state_dict(stored)

    def layers(self, graph: LossGraph) -> Sequence[OutputLayer | HiddenLayers]:
        """The calls of layers of the optimizer that the graph of a loss meets first."""
        return graph.output_layers(self._owned)

    def watch(self, graph: LossGraph, loop: LoopFacts, head: Tensor | None = None) -> None:
        """Has the backward that is about to begin measured; in compiled code only a layer with the weight ``head``."""
        layers = self.layers(graph)
        hidden = [layer for layer in layers if isinstance(layer, HiddenLayers)]
        if not hidden:
            self._compiled.remove()
        if not self._told and self._compiled.saw_none and any(layer.is_compiled for layer in hidden):
            self._told = True
            loop.notify(
                f"LipschitzLR{self._target.label}: the compiled network, or another one of its class, has already been "
                "run, so L is measured from the gradients with respect to the weights alone; call "
                "torch.compiler.reset() before the fit to measure the outputs"
            )
        if head is not None and any(layer.is_compiled and not self._has(layer, head) for layer in hidden):
            return
        # The loop's division by the accumulated batches is part of the step's loss; a GradScaler's factor is not.
        self._watch(layers, loop.loss_scale() * loop.accumulated)

    def contradicts(self, graph: LossGraph, head: Tensor | None) -> bool:
        """Whether compiled code has other outputs than its layer with the weight ``head``, or that is computed."""
        outputs = None if head is None else graph.compiled_outputs()
        if head is None or outputs is None:
            return False
        return not isinstance(head, nn.Parameter) or self._compiled.contradicts(head, *outputs)

    def _has(self, code: HiddenLayers, head: Tensor) -> bool:
        """Whether the layer with a weight was the last one in compiled code."""
        module = self._compiled.last_of(code)
        return module is not None and any(parameter is head for parameter in module.parameters())

    def _watch(self, layers: Sequence[OutputLayer | HiddenLayers], scale: float | Tensor) -> None:
        if not layers:
            return
        self.name_layers(layers)
        self.statistic.watch([layer for layer in layers if isinstance(layer, OutputLayer)], scale)
        for layer in layers:
            if isinstance(layer, OutputLayer):
                continue
            if layer.is_compiled:
                self._compiled.watch(layer, self.statistic, scale)
            else:
                self._watch_when_run_again(layer, scale)

    def _watch_when_run_again(self, code: HiddenLayers, scale: float | Tensor) -> None:
        """Has the layers of checkpointed code measured, which are known when the backward runs it again."""
        run, below, owned = code.node.run_function, code.below, self._owned  # the node would keep itself alive
        done = False

        def run_again(*inputs: Any) -> Any:
            nonlocal done
            outputs = run(*inputs)
            if done:  # a retained graph may have more backwards
                return outputs
            done = True
            tensors = outputs if isinstance(outputs, tuple) else (outputs,)
            roots = [tensor.grad_fn for tensor in tensors if isinstance(tensor, Tensor)]
            layers = OutputLayerSearch(GraphReader(), *roots).layers(owned)
            if all(isinstance(layer, OutputLayer) and layer.is_parameter for layer in layers):
                layers = OutputLayerSearch(GraphReader(), *below).layers(owned) or layers
            self._watch(layers, scale)
            return outputs

        code.node.run_function = run_again

    def forget_inputs(self) -> None:
        """Forgets the inputs of the last batch in compiled code."""
        self._compiled.forget()

    def name_layers(self, layers: Sequence[OutputLayer | HiddenLayers]) -> None:
        """Takes the names of the output layers' modules, or of their parameters."""
        last = [self._compiled.last_of(layer) if isinstance(layer, HiddenLayers) else None for layer in layers]
        parts = [
            module.parameters() if module else layer.parameters for module, layer in zip(last, layers, strict=True)
        ]
        parameters = [id(parameter) for part in parts for parameter in part]
        if not self._names.keys() >= set(parameters):
            self._names = {id(parameter): name for name, parameter in self._target.model.named_parameters()}
        names = self._names
        found = [name_without_compile(names[one]) for one in parameters if one in names]
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
        """Removes the hooks on modules; others are on the graph of a loss, and go with it."""
        self._compiled.remove()

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
