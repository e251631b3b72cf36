"""Controls by any loss: measures its constant in the outputs of its output layers instead of recognising it."""

from typing import Any

import torch

from lit_lipschitz.bounds.loss_spec import Loss
from lit_lipschitz.control.found_heads import FoundHeads
from lit_lipschitz.control.loop_facts import LoopFacts, Target
from lit_lipschitz.control.measured_hook import MeasuredHook
from lit_lipschitz.control.options import Options
from lit_lipschitz.control.policy import Policy
from lit_lipschitz.control.rate_updater import RateUpdater
from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.recognition.loss_graph import FoundLoss, LossGraph
from lit_lipschitz.rules import papers


def check_measured(policy: Policy, options: Options) -> None:
    """Refuses arguments that have no meaning where the constant is measured.

    Raises:
        ConfigurationError: An argument has another value than its default, or the rule is one of the paper's.
    """
    expected: dict[str, tuple[Any, Any]] = {
        "bound": (policy.bound, "strict"),
        "norm": (policy.norm, "frobenius"),
        "second_moment": (policy.second_moment, "auto"),
        "measure": (options.measure, "running"),
        "weights": (options.weights, "decayed"),
    }
    if options.measured:
        expected["head"] = (options.head, "auto")
    for name, (found, value) in expected.items():
        if found != value:
            raise ConfigurationError(
                f"LipschitzLR(loss='measured', {name}={found!r}): expected {name}={value!r}, since a constant can only "
                f"be measured with the default settings; leave {name}= out"
            )
    if policy.rule in (names := [info.name for info in papers.RULES]):
        raise ConfigurationError(
            f"LipschitzLR(loss='measured', rule={policy.rule!r}): expected a rule that works with a measured constant, "
            f"and found one of the paper's ({', '.join(map(repr, names))}); leave rule= out"
        )


class MeasuredFinder:
    """Finds the output layers of each loss."""

    def __init__(self, target: Target, device: torch.device, stored: dict[str, Any] | None) -> None:
        self.hooks = MeasuredHook(target, device, stored)
        self._target = target

    def find(self, graph: LossGraph, loop: LoopFacts) -> FoundHeads | None:
        """The output layers of a loss; None if the loss may belong to another optimizer.

        Raises:
            ConfigurationError: The graph shows none.
        """
        layers = self.hooks.layers(graph)
        if not layers:
            if not self._target.is_only or not loop.automatic:
                return None
            raise ConfigurationError(
                "LipschitzLR looked for output layers in the autograd graph of the loss and found "
                "no trainable parameter; return a loss that depends on one"
            )
        self.hooks.name_layers(layers)
        return self.found()

    def found(self) -> FoundHeads:
        """The output layers, as what the controller measures by."""
        loss = Loss("measured")
        return FoundHeads(self.hooks, loss, 1, FoundLoss(loss), self.hooks.statistic, measured=True)

    def find_named(self) -> FoundHeads:
        """Manual optimization has made a step without a loss.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(
            "LipschitzLR looked for a loss in manual_backward before the optimizer's step and found "
            "none that depends on its parameters; call self.manual_backward(loss), or pass optimizers= with another "
            "position"
        )

    def meter(self, found: FoundHeads, updater: RateUpdater, graph: LossGraph | None, loop: LoopFacts) -> "_Meter":
        """Measures the output layers of each loss."""
        return _Meter(self.hooks, updater)

    def end_step(self, batches: int) -> None:
        """Ends the measurement of the step that is about to be made, of so many batches."""
        self.hooks.statistic.end_step(batches)

    def on_other_optimizer_step(self) -> None:
        """Another optimizer is about to step."""
        self.hooks.statistic.on_other_optimizer_step()


class _Meter:
    """Measures the output layers of a backward."""

    def __init__(self, hook: MeasuredHook, updater: RateUpdater) -> None:
        self._hook = hook
        if updater.estimator is not None:
            updater.estimator.pack_logit_grads = hook.statistic.pack_gradients

    def measure(self, graph: LossGraph, loop: LoopFacts) -> bool:
        """Has the backward that is about to begin measured; any loss is understood."""
        self._hook.watch(graph, loop)
        return True
