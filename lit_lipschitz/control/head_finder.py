"""Finds the output layer (the head) and the loss whose constant controls an optimizer's learning rate."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_lipschitz.bounds.loss_spec import Loss
from lit_lipschitz.control.batch_meter import BatchMeter
from lit_lipschitz.control.found_heads import FoundHeads
from lit_lipschitz.control.loop_facts import LoopFacts, Target
from lit_lipschitz.control.options import Options
from lit_lipschitz.control.policy import Policy
from lit_lipschitz.control.rate_updater import RateUpdater
from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.measurement.head_hooks import HeadHook, HeadHooks
from lit_lipschitz.measurement.running_maximum import RunningMaximum
from lit_lipschitz.recognition.heads import HEADS, head_rows, head_size
from lit_lipschitz.recognition.loss_graph import FoundLoss, LossGraph, other_ways


class HeadFinder:
    """Finds the head and the loss in the graph of the first loss that belongs to the optimizer.

    ``hooks`` are on every module that can be the head, until it is known which one is; ``stored`` is their state in the
    run that is resumed, or None.
    """

    def __init__(
        self, policy: Policy, options: Options, target: Target, device: torch.device, stored: dict[str, Any] | None
    ) -> None:
        self._policy, self._options, self._target = policy, options, target
        self._deferred_error: ConfigurationError | None = None  # why the last loss was refused
        self._refused_own = False  # whether it belonged to the head, after a step of another optimizer
        self._other_stepped = False
        self._hook: HeadHook | None = None  # of the head that was found last
        owned = None if target.is_only else target.parameters
        statistic = partial(self._statistic, device=device)
        self.hooks = HeadHooks(target.model, options.head, statistic, device, stored, owned)

    def _statistic(self, head: nn.Module, device: torch.device) -> RunningMaximum:
        width, _ = head_size(head)
        if self._policy.norm == "spectral" and not width:
            raise ConfigurationError(
                "LipschitzLR(norm='spectral') needs the number of inputs of every layer that can be the head, and a "
                "lazy layer does not know it yet; run a batch through the network before fit, or pass head="
            )
        rigorous = self._policy.bound != "paper"
        return RunningMaximum(
            self._policy.norm,
            width,
            bias=rigorous and getattr(head, "bias", None) is not None,
            mean=rigorous and self._policy.norm_grows_with_batch,
            fourth_moment=self._policy.second_moment_estimate == "scripts",
            device=device,
        )

    def on_other_optimizer_step(self) -> None:
        """Notes that another optimizer is about to step."""
        self._other_stepped = True

    @property
    def head(self) -> Tensor | None:
        """The weight of the head that was found; None before."""
        return None if self._hook is None else self._hook.weight

    @property
    def refused_own(self) -> bool:
        """Whether a loss was refused that belonged to the head, and the previous one to another optimizer."""
        return self._refused_own

    def begin_step(self, first_step: bool) -> None:
        """Raises why a loss was refused, if it belonged to the head and the previous one to another optimizer."""
        if self._refused_own and first_step and self._deferred_error is not None:
            raise self._deferred_error

    def find(self, graph: LossGraph, loop: LoopFacts) -> FoundHeads | None:
        """The head and the loss of a graph whose backward is about to begin; None if it belongs to another optimizer.

        In manual optimization also None if it is refused: the next one may belong to the optimizer, so the error is
        raised at the optimizer's step.
        """
        own = False
        try:
            loss = graph.found(self.hooks.named_weight)
            weight = loss.head_weight if loss is not None else None
            if loss is None and self._policy.bound != "paper":
                self._check_function(graph)
            if self._options.loss_name is not None and weight is None and self._options.head == "auto":
                weight = self._only_affine_map(graph)
            own = weight is not None and self.hooks.owns(weight)
            if not self._target.is_only and weight is not None and not own:
                return None
            if loss is not None:
                self._check_understood(loop, loss)
            if not self._target.is_only and weight is None and self._options.head == "auto":
                position, count = self._target.position, self._target.num_optimizers
                raise ConfigurationError(
                    f"LipschitzLR looked for the head of optimizer {position} (of {count}) in the graph of a "
                    f"{loss.loss.name if loss else self._options.loss} and found none; it may be frozen or compiled: "
                    "pass optimizers= with the position of the optimizer that trains it, or head= with its name"
                )
            found = self._select(loss, weight)
        except ConfigurationError as error:
            if loop.automatic:
                raise
            self._deferred_error = error.with_traceback(None)  # the frames would keep the batch
            self._refused_own = own and self._other_stepped
            return None
        self._refused_own = False
        return found

    def find_named(self) -> FoundHeads:
        """The loss and the head that the user named, for manual optimization that steps without a backward hook."""
        if self._options.loss_name is None:
            raise self._deferred_error or ConfigurationError(
                "LipschitzLR reads the loss in manual_backward, which was not called with a loss of the optimizer's "
                "head before its step; call self.manual_backward(loss), pass optimizers= with the position of the "
                "optimizer that trains the head, or pass loss= with the name of the loss"
            )
        return self._select(None, None)

    def meter(self, found: FoundHeads, updater: RateUpdater, graph: LossGraph | None, loop: LoopFacts) -> BatchMeter:
        """Measures by the head that was found last, whose loss has the graph."""
        assert self._hook is not None
        meter = BatchMeter(found, self._hook, self._policy, self._options, self._target, updater)
        if graph is not None and not self._options.running:
            updater.statistics.pass_factor = meter.pass_factor(graph, loop)
        return meter

    def check_named_head(self, graph: LossGraph) -> None:
        """Refuses the name of a layer that does not compute the outputs, if the graph shows which ones do."""
        layers = graph.output_layers() if self._options.head != "auto" else []
        head = dict(self._target.model.named_modules()).get(self._options.head)
        own = set() if head is None else set(head.parameters())
        if not layers or not own or any(p in own for layer in layers for p in layer.parameters):
            return
        names: dict[Tensor, str] = {p: name.rpartition(".")[0] for name, p in self._target.model.named_parameters()}
        found = dict.fromkeys(names[p] for layer in layers for p in layer.parameters if p in names)
        raise ConfigurationError(
            f"LipschitzLR(head={self._options.head!r}) expected the layer whose outputs the loss is computed from, and "
            f"found {', '.join(map(repr, found))}; pass that name, or leave head= out"
        )

    def _check_function(self, graph: LossGraph) -> None:
        """Refuses another loss than the named one, and a function of it, such as its root."""
        if (other := graph.other_loss()) is not None:
            raise ConfigurationError(
                f"LipschitzLR(loss={self._options.loss!r}) expected that loss and found a {other}; pass "
                f"loss={other!r}, or leave loss= out"
            )
        if (function := graph.function_of_loss()) is not None:
            raise ConfigurationError(
                f"LipschitzLR(loss={self._options.loss!r}) expected a mean or a sum of that loss and found its "
                f"{function}, whose constant is different; return the loss itself, or leave loss=, bound= and norm= out"
            )

    def _only_affine_map(self, graph: LossGraph) -> Tensor | None:
        """The only candidate that the graph meets first, if the loss itself is not recognised."""
        weights = [weight for weight in graph.first_affine_maps if self.hooks.owns(weight)]
        if len(weights) > 1:
            raise ConfigurationError(
                f"LipschitzLR(loss={self._options.loss!r}) looked for the affine layer that computes the outputs and "
                f"found {len(weights)} of them behind the loss; pass head= with the name of the one to measure"
            )
        return weights[0] if weights else None

    def _check_understood(self, loop: LoopFacts, loss: FoundLoss) -> None:
        """Refuses factors of the loss, and nodes between it and the head, that the constant would depend on."""
        factor = float(abs(loss.scale) / loop.loss_scale())
        if not loop.automatic and self._options.loss_name is None and not math.isclose(factor, 1.0, rel_tol=1e-5):
            raise ConfigurationError(
                f"LipschitzLR found a {loss.loss.name} weighted by {factor:g} under manual optimization and can't tell "
                "whether that is 1 over the number of accumulated batches; pass the loss without the weight to "
                f"manual_backward, or pass loss={loss.loss.name!r} to ignore the weight"
            )
        nodes = loss.unrecognised or (loss.behind_activation if self._policy.bound == "smooth" else ())
        if nodes and self._options.head == "auto" and self._options.loss_name is None:
            same_shape, directly = (
                "give outputs and targets the same shape",
                "compute the loss directly from the layer's outputs",
            )
            raise ConfigurationError(
                "LipschitzLR expected a loss of the outputs of an affine layer (torch.nn.Linear or a 1x1 convolution) "
                f"and found {' > '.join(nodes)}; {same_shape if 'Expand' in nodes else directly}, or pass head= with "
                "the layer's name to ignore the operations after it, if they increase no gradient; "
                f"{other_ways(nodes)}"
            )

    def _select(self, found: FoundLoss | None, weight: Tensor | None) -> FoundHeads:
        """Selects the head, and checks that there is a constant for the loss of its outputs."""
        recognised = found or FoundLoss(Loss(self._options.loss))
        loss, hook = recognised.loss, self.hooks.select(weight, recognised.num_outputs)
        self._hook = hook
        num_outputs = recognised.num_outputs or head_size(hook.head)[1]
        self._check_constant(loss, hook.name, num_outputs, sizes_known=found is not None)
        self._check_inputs(hook, recognised.inputs)
        rows = int(hook.statistic.rows) if self._options.running else 0
        if found and self._options.head == "auto" and not found.pooled and rows >= 2 * found.head_rows:
            raise ConfigurationError(
                f"LipschitzLR measured {rows} rows at the head {hook.name!r} in a batch and found {found.rows} "
                f"targets in the {loss.name}; pass only the rows that the loss uses through the head, or pass "
                f"head={hook.name!r} to measure the other rows as well"
            )
        return FoundHeads(hook, loss, num_outputs, replace(recognised, inputs=None))

    def _check_constant(self, loss: Loss, head: str, num_outputs: int, sizes_known: bool) -> None:
        """Checks that there is a constant for a loss of so many outputs of a head."""
        bound, norm = self._policy.bound, self._policy.norm
        if not loss.spec.per_output and num_outputs < 2:
            raise ConfigurationError(
                f"LipschitzLR: the head {head!r} has 1 output, and the {loss.name} needs at least 2 classes; "
                "pass head= with the name of the layer that computes the logits"
            )
        if loss.needs_output_norm(bound) and not sizes_known:
            raise ConfigurationError(
                f"LipschitzLR(loss={loss.name!r}, bound={bound!r}) needs the norms of outputs and targets, "
                "which the graph of the loss does not show; use torch.nn.functional.mse_loss, or bound='smooth'"
            )
        try:
            loss.constant(1.0, batch_size=2, num_outputs=num_outputs, bound=bound, norm=norm, output_norm=1.0)
        except ValueError as error:
            raise ConfigurationError(
                f"LipschitzLR: no constant for the {loss.name} of the head {head!r}: {error}"
            ) from None

    def _check_inputs(self, hook: HeadHook, inputs: Tensor | None) -> None:
        """Checks that a head whose forward is overridden multiplies its weight by the input that was measured."""
        plain = any(type(hook.head).forward is kind.forward for kind in HEADS)
        measured = self._options.head == "auto" and self._options.running and self._policy.norm != "spectral"
        if plain or not measured or inputs is None:
            return
        own = self._statistic(hook.head, inputs.device)
        own.add(head_rows(hook.head, inputs))
        same_rows = int(own.rows) == int(hook.statistic.rows)
        if same_rows and not torch.allclose(own.size, hook.statistic.size, rtol=0.02):
            raise ConfigurationError(
                f"LipschitzLR measured the inputs of the head {hook.name!r} and found that its forward "
                f"method ({type(hook.head).__name__}) changes them; move the change into a module before the head, or "
                f"pass head={hook.name!r} if the change increases no input"
            )
