"""Periodic estimates of an adaptive optimizer's step scale and of the gradient norm in the logits."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_lipschitz.bounds.families import Reduction
from lit_lipschitz.measurement.optimizer_updates import mean_grad_to_update_ratio, update_norms, weight_filter
from lit_lipschitz.measurement.output_gradients import LogitGradientNorms, ToRows, grad_norms_of_ranks
from lit_lipschitz.measurement.scale_invariance import ScaleInvariance, he_init_norms
from lit_lipschitz.recognition.loss_graph import BatchLoss, LogitEdge
from lit_lipschitz.rules.base import StepScaleKind

MEASURE_EVERY = 16
"""Optimizer steps between measurements, after the first 16."""


@dataclass(frozen=True)
class StepScale:
    """Running estimate of one optimizer's step scale, gradient norm over update norm at lr = 1.

    Attributes:
        value: Geometric moving average of the measured ratios with weight 1/2 on the newest; 0 before the first.
        logit_grad_norm: The same average of the root mean square over the examples of the gradient norm of an example's
            loss in the logits; 0 before the first.
        mean_logit_grad_norm: The same average of the mean gradient norm.
    """

    value: float = 0.0
    logit_grad_norm: float = 0.0
    mean_logit_grad_norm: float = 0.0

    def update(self, ratio: float, logit_grad_norm: float = 0.0, mean_logit_grad_norm: float = 0.0) -> "StepScale":
        """The estimate after a measurement; numbers that are not positive and finite are left out.

        Args:
            ratio: Gradient norm over update norm at lr = 1.
            logit_grad_norm: Root mean square over the examples of the gradient norm in the logits; 0 if not measured.
            mean_logit_grad_norm: Its mean.
        """
        if not _is_positive(ratio):
            return self
        fields = self._updated_fields(ratio)
        if _is_positive(logit_grad_norm) and _is_positive(mean_logit_grad_norm):
            fields["logit_grad_norm"] = _averaged(self.logit_grad_norm, logit_grad_norm)
            fields["mean_logit_grad_norm"] = _averaged(self.mean_logit_grad_norm, mean_logit_grad_norm)
        return replace(self, **fields)

    def _updated_fields(self, ratio: float) -> dict[str, Any]:
        return {"value": _averaged(self.value, ratio)}


@dataclass(frozen=True)
class FlooredScale(StepScale):
    """A step scale bounded below by the mean of its first five measurements, those of the first 16 steps.

    Attributes:
        value: The larger one of the two means; 0 before the first measurement.
        first_mean: Mean of the first five measured ratios.
        mean: Mean of all.
        count: Number of them.
    """

    first_mean: float = 0.0
    mean: float = 0.0
    count: int = 0

    def _updated_fields(self, ratio: float) -> dict[str, Any]:
        count = self.count + 1
        mean = self.mean + (ratio - self.mean) / count
        first_mean = mean if count <= 5 else self.first_mean
        return {"value": max(first_mean, mean), "first_mean": first_mean, "mean": mean, "count": count}


def _is_positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _averaged(average: float, value: float) -> float:
    return math.sqrt(average * value) if average else value


class StepScaleEstimator:
    """Measures one optimizer's step scale every few steps; ranks agree by one MAX all-reduce.

    Args:
        optimizer: One with a registered update.
        module: The network that it trains.
        kind: ``"total"`` has the norms over all parameters, ``"mean"`` the mean ratio over the weights, ``"floored"``
            the same as a :class:`FlooredScale`.
        needs_logit_grads: Whether to measure the gradient norm in the logits too, and to correct the scale for the
            growth of scale-invariant weights.

    Attributes:
        scale: The estimate.
        restarted: Whether the last step has begun a new estimate, since other parameters train than before.
    """

    def __init__(
        self, optimizer: Optimizer, module: nn.Module, kind: StepScaleKind, needs_logit_grads: bool = False
    ) -> None:
        self.scale = FlooredScale() if kind == "floored" else StepScale()
        self.restarted = False
        self._optimizer = optimizer
        self._is_weight = None if kind == "total" else weight_filter(module)
        self._logit_grads = LogitGradientNorms() if needs_logit_grads else None
        self._invariance = ScaleInvariance(he_init_norms(module)) if needs_logit_grads else None
        self._num_trained = 0  # parameters that the estimate belongs to
        self._steps = 0  # of the run
        self._repeat = False

    @property
    def needs_logit_grads(self) -> bool:
        """Whether the gradient norm in the logits is measured."""
        return self._logit_grads is not None

    @property
    def num_scale_invariant(self) -> int:
        """Number of weights detected as scale-invariant; this waits for the device."""
        return self._invariance.num_scale_invariant if self._invariance is not None else 0

    @property
    def due(self) -> bool:
        """Whether to measure the coming optimizer step, before :meth:`begin_step`; the same on all ranks.

        Steps 1, 2, 4, 8 and 16 are due and then every 16th, all until there is an estimate, and the one after other
        parameters have begun to train. The step with which they do is measured as well.
        """
        step = self._steps + 1
        return step % MEASURE_EVERY == 0 or step & (step - 1) == 0 or not self.scale.value or self._repeat

    def watch(self, batch: BatchLoss, edges: Sequence[LogitEdge], reduction: Reduction, to_rows: ToRows) -> None:
        """Captures the gradient norms in the coming backward."""
        if self._logit_grads is not None:
            self._logit_grads.watch(batch, edges, reduction, to_rows)

    def on_other_optimizer_step(self) -> None:
        """Another optimizer steps: losses so far may be its own."""
        if self._logit_grads is not None:
            self._logit_grads.on_other_optimizer_step()

    def begin_step(self) -> bool:
        """Counts a step that is about to be made, and discards the estimate of other parameters than train now.

        Returns:
            Whether to measure the step.
        """
        due, self._repeat = self.due, False
        self._steps += 1
        # Now, since for other optimizers' losses parameters may be frozen for a while.
        num_trained = sum(p.requires_grad for group in self._optimizer.param_groups for p in group["params"])
        self.restarted = num_trained != self._num_trained
        if self.restarted:
            self._num_trained, self.scale = num_trained, type(self.scale)()
            self._repeat = self.needs_logit_grads and not due  # the backward of this step was not watched
        return due or self.restarted

    def pack(self, grad_scale: float | Tensor, ratios: Sequence[float], rank: int, world_size: int) -> Tensor:
        """This rank's numbers of the step that has begun, for a MAX all-reduce; gradients are not clipped yet.

        Args:
            grad_scale: Factor of the gradients by which the optimizer will divide.
            ratios: Learning rate of each parameter group over that of the first one.
            rank: This rank.
            world_size: Number of ranks.

        Returns:
            A tensor on the gradients' device, shape (2,), or with gradient norms in the logits (2 + 2 * world_size,).
        """
        if self._is_weight is None:
            packed = update_norms(self._optimizer, grad_scale, ratios)
        else:
            packed = mean_grad_to_update_ratio(self._optimizer, grad_scale, ratios, self._invariance, self._is_weight)
        if self._logit_grads is not None:
            packed = torch.cat([packed, self._logit_grads.pack(rank, world_size, packed.device).flatten()])
        # Whether a NaN survives a MAX depends on the order of the ranks; infinity is ignored by `update`.
        return torch.where(torch.isfinite(packed), packed, math.inf)

    def update(self, reduced: Sequence[float]) -> None:
        """Updates the estimate with the MAX over all ranks of :meth:`pack`, read to the host."""
        grad_norm, update_norm, *logit_grads = reduced
        ratio = grad_norm / update_norm if update_norm > 0 else 0.0
        self.scale = self.scale.update(ratio, *grad_norms_of_ranks(logit_grads))

    def state_dict(self) -> dict[str, Any]:
        """The state, as plain values."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        return {
            "scale": asdict(self.scale),
            "num_trained": self._num_trained,
            "steps": self._steps,
            "repeat": self._repeat,
            "scale_invariance": self._invariance.state_dict(parameters) if self._invariance is not None else [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state of :meth:`state_dict`."""
        self.scale = type(self.scale)(**state["scale"])
        self._num_trained, self._steps, self._repeat = state["num_trained"], state["steps"], state["repeat"]
        if self._invariance is not None:
            self._invariance.load_state_dict(state["scale_invariance"])
