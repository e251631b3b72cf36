"""Controls by any loss: measures its constant in the outputs of its output layers instead of recognising it."""

from typing import Any

import torch

from lit_lipschitz.bounds.loss_spec import Loss
from lit_lipschitz.control.head_finder import FoundHeads
from lit_lipschitz.control.loop_facts import LoopFacts, Target
from lit_lipschitz.control.measured_hook import MeasuredHook
from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.measurement.step_scale import StepScaleEstimator
from lit_lipschitz.recognition.loss_graph import FoundLoss, LossGraph


class MeasuredFinder:
    """Finds the output layers of each loss; has the methods of a head finder."""

    def __init__(self, target: Target, device: torch.device, stored: dict[str, Any] | None) -> None:
        self.hooks = MeasuredHook(target, device, stored)
        self._target = target

    def find(self, graph: LossGraph, loop: LoopFacts) -> FoundHeads | None:
        """The output layers of a loss; None if another optimizer trains them.

        Raises:
            ConfigurationError: The graph shows none.
        """
        layers = graph.output_layers()
        own = self.hooks.own(layers)
        if not own:
            if not self._target.is_only or not loop.automatic:
                return None
            raise ConfigurationError(
                "LipschitzLR(loss='measured') looked for the output layers in the autograd graph of the loss and found "
                f"{'none that the optimizer trains' if layers else 'none'}; return a loss that depends on a Linear, a "
                "convolution, an embedding or a product with a parameter, and compile the network rather than the loss"
            )
        self.hooks.name_layers(own)
        loss = Loss("measured")
        return FoundHeads(self.hooks, loss, 1, FoundLoss(loss))

    def find_named(self) -> FoundHeads:
        """Manual optimization has made a step without a loss.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(
            "LipschitzLR(loss='measured') looked for a loss in manual_backward before the optimizer's step and found "
            "none of its own; call self.manual_backward(loss), or pass optimizers= with another position"
        )

    def begin_step(self, first_step: bool) -> None:
        """Ends the measurement of the step that is about to be made."""
        self.hooks.statistic.end_step()

    def on_other_optimizer_step(self) -> None:
        """Another optimizer is about to step."""
        self.hooks.statistic.on_other_optimizer_step()


class MeasuredMeter:
    """Measures the backwards of the steps that are due; has the methods of a batch meter."""

    def __init__(self, hook: MeasuredHook, estimator: StepScaleEstimator | None) -> None:
        self._hook, self._estimator = hook, estimator
        if estimator is not None:
            estimator.logit_grads = hook.statistic.gradients

    def read(self, graph: LossGraph) -> LossGraph:
        """The graph, whose output layers :meth:`finish` looks for."""
        return graph

    def watch_gradients(self, graph: LossGraph, batch: Any, estimator: StepScaleEstimator) -> None:
        """The gradients are watched by :meth:`finish`."""

    def finish(self, batch: LossGraph, loop: LoopFacts) -> None:
        """Has the backward that is about to begin measured, if the step is due."""
        if self._hook.statistic.due or (self._estimator is not None and self._estimator.due):
            # The loop's division by the accumulated batches is part of the step's loss; a GradScaler's factor is not.
            scale = loop.loss_scale() * loop.accumulated
            self._hook.statistic.watch(self._hook.own(batch.output_layers()), scale)
