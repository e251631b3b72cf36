"""Measures one batch: its number of examples, the factor of its norm, and the residuals of a squared error."""

from typing import Any

import torch
from torch import Tensor

from lit_lipschitz.control.found_heads import FoundHeads
from lit_lipschitz.control.loop_facts import LoopFacts, Target
from lit_lipschitz.control.options import Options
from lit_lipschitz.control.policy import Policy
from lit_lipschitz.control.rate_updater import RateUpdater
from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.measurement.head_hooks import HeadHook
from lit_lipschitz.measurement.step_scale import StepScaleEstimator
from lit_lipschitz.recognition.affine import same_weight
from lit_lipschitz.recognition.heads import output_rows
from lit_lipschitz.recognition.loss_graph import BatchLoss, LossGraph


class BatchMeter:
    """Measures each batch by the head and the loss that were found, and adds up residuals of a squared error."""

    def __init__(
        self,
        found: FoundHeads,
        hook: HeadHook,
        policy: Policy,
        options: Options,
        target: Target,
        updater: RateUpdater,
    ) -> None:
        self._found, self._hook, self._policy, self._running = found, hook, policy, options.running
        self._residuals, self._estimator = updater.statistics.residuals, updater.estimator
        self._only_optimizer, self._named_loss = target.is_only, options.loss_name is not None

    def measure(self, graph: LossGraph, loop: LoopFacts) -> bool:
        """Measures a batch by its loss, whose backward is about to begin; False if that is another loss than before.

        Of a loss that the user named the graph need not show anything.
        """
        estimator = self._estimator
        watches = estimator is not None and estimator.needs_logit_grads
        batch = self._read(graph) if self._running or watches else None
        if estimator is not None and watches and batch is not None:
            self._watch_gradients(graph, batch, estimator)
        if self._running:
            self._finish(batch, loop)
        recognised = self._found.recognised
        if not recognised.saved:  # the graph did not show the loss that the user named
            return True
        return batch is not None and graph.agrees(recognised, self._hook.weight if self._named_loss else None)

    def _read(self, graph: LossGraph) -> BatchLoss | None:
        """The loss of a batch; None if the graph shows another one."""
        found = self._found
        head = self._hook.weight if self._named_loss else None
        trace = found.recognised.concatenated or bool(found.recognised.unrecognised)
        return graph.batch(found.loss.name, found.num_outputs, head=head, trace=trace)

    def _watch_gradients(self, graph: LossGraph, batch: BatchLoss, estimator: StepScaleEstimator) -> None:
        """Has the backward that is about to begin capture the gradient norms with respect to the logits."""
        found = self._found
        edges = graph.edges(found.loss.name)
        if not hasattr(self._hook.weight, "full_tensor"):  # the graph has another tensor of a sharded head each time
            edges = [edge for edge in edges if same_weight(edge.head_weight, found.recognised.head_weight)]
        if edges:
            estimator.logit_grads.watch(batch, edges, found.loss.reduction, self._to_rows)

    def _finish(self, batch: BatchLoss | None, loop: LoopFacts) -> None:
        """Ends the measurement of a batch; without a loss, every row counts as an example."""
        found, statistic = self._found, self._hook.statistic
        if batch is None:
            statistic.finish()
            return
        self._add_residuals(batch, loop)
        outputs: tuple[Tensor, ...] = ()
        if found.loss.needs_output_norm(self._policy.bound):
            outputs = tuple(output_rows(self._hook.head, part, found.num_outputs) for part in batch.outputs)
        count, weight = self._count_and_weight(batch, statistic.rows, self._norm_factor(batch, loop))
        statistic.finish(count, outputs, batch.calls, weight)

    def _count_and_weight(self, batch: BatchLoss, rows: Tensor, weight: Any) -> tuple[Any, Any]:
        """Examples in the batch, and the factor of its norm, from how rows of the head make examples."""
        recognised, whole_batch = self._found.recognised, self._policy.norm_grows_with_batch
        count: Any = batch.count
        if recognised.pooled:
            # Each position is a row; all positions of an ignored example are ignored.
            positions = rows.clamp(min=1) * (batch.count / batch.rows)
            count = positions if self._policy.bound == "paper" else positions.clamp(max=batch.count)
            if whole_batch:
                # The mean over an example's positions is at most their root mean square.
                weight = weight * (count / positions).sqrt()
        if recognised.rows_per_target > 1 and not whole_batch:
            weight = weight * recognised.rows_per_target**0.5
        if recognised.unrecognised and whole_batch and not recognised.pooled:
            # More rows in the loss than in the largest call: several calls, or one that is used several times.
            weight = weight * torch.clamp(batch.rows / rows.clamp(min=1), min=1.0).ceil().sqrt()
        if recognised.unrecognised:
            weight = weight * batch.logit_scale
        return count, weight

    def _add_residuals(self, batch: BatchLoss, loop: LoopFacts) -> None:
        """Adds the residuals of a squared error that is the only term of the only optimizer's loss."""
        if not (batch.outputs and self._only_optimizer and batch.terms == 1):
            return
        outputs, targets = batch.outputs
        if outputs.ndim > 1 or self._found.num_outputs == 1:  # a flat selection does not show which output is which
            rows = self._to_rows(outputs, None), self._to_rows(targets, None)
            self._residuals.add(*rows, self._loss_factor(batch, loop))

    def _norm_factor(self, batch: BatchLoss, loop: LoopFacts) -> Any:
        """Factor of the batch's norm that accounts for the factor of its loss; a float or a tensor."""
        factor = self._loss_factor(batch, loop)
        return factor**0.5 if self._policy.bound == "smooth" else factor  # the smooth bound squares the norm

    def _loss_factor(self, batch: BatchLoss, loop: LoopFacts) -> Any:
        """Factor of a batch's loss beyond a mean."""
        scale: Any = batch.scale
        factor = abs(scale) / loop.loss_scale() if loop.automatic else 1.0
        return factor * batch.elements if self._found.loss.reduction == "sum" else factor

    def pass_factor(self, graph: LossGraph, loop: LoopFacts) -> float:
        """The norm factor of a pass over the training set, which sees no loss: that of the first training batch."""
        batch, rows = self._read(graph), self._found.recognised.rows
        if batch is None:
            return 1.0
        if int(batch.count) < rows:
            raise ConfigurationError(
                f"LipschitzLR(measure='pass') found that the loss ignores {rows - int(batch.count)} of "
                f"{rows} targets (ignore_index), which a pass over the inputs does not take into account; use "
                "measure='running'"
            )
        return float(self._norm_factor(batch, loop))

    def _to_rows(self, values: Tensor, dim: int | None) -> Tensor:
        """Outputs in the shape (examples, outputs), by the dimension of the classes if there is one."""
        num_outputs = self._found.num_outputs
        # If channels were moved, the only dimension of their size is theirs.
        fitting = [i for i, size in enumerate(values.shape) if size == num_outputs] if dim is None else [dim]
        if len(fitting) != 1:
            return output_rows(self._hook.head, values, num_outputs)
        return values.movedim(fitting[0], -1).reshape(-1, values.shape[fitting[0]])
