"""What the ranks measure of one optimizer's steps, reduced to a measurement that is the same on all of them."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lit_lipschitz.control.loop_facts import LoopFacts
from lit_lipschitz.control.options import Options, Target
from lit_lipschitz.control.policy import Measurement, Policy
from lit_lipschitz.control.reduction import MaxReduction, Reduce
from lit_lipschitz.measurement.nonfinite import NonfiniteLosses
from lit_lipschitz.measurement.norms import weight_norm as largest_weight_norm
from lit_lipschitz.measurement.residuals import Residuals, RunningResiduals
from lit_lipschitz.measurement.running_maximum import RunningMaximum
from lit_lipschitz.measurement.step_scale import StepScaleEstimator

_UPDATE = ("weight_norm", "activations", "residuals", "nonfinite")


class RankStatistics:
    """The statistics of one optimizer on this rank, and their all-reduce.

    Args:
        policy: How the measurement is used.
        options: Which weights count in W.
        target: The optimizer and its network.
        estimator: Estimates the step scale; None if the rule needs none.
        loop: State of the training loop when it starts.
        reduce: Element-wise MAX over the ranks.

    Attributes:
        activations: Norms of the head's inputs; None until the head is known.
        residuals: Residuals of a squared error.
        nonfinite: Losses that are not finite.
        all_residuals: Residuals of all ranks at the last update.
        pass_factor: Factor of the loss, which a pass over the training set does not see.
        pass_weight_norm: W at the last pass over the training set, if no step has used it yet.
    """

    def __init__(
        self,
        policy: Policy,
        options: Options,
        target: Target,
        estimator: StepScaleEstimator | None,
        loop: LoopFacts,
        reduce: Reduce,
    ) -> None:
        self._policy, self._options, self._target, self._estimator = policy, options, target, estimator
        self._rank, self._world_size = loop.rank, loop.world_size
        self.activations: RunningMaximum | None = None
        self.residuals = RunningResiduals(device=loop.device)
        self.nonfinite = NonfiniteLosses(loop.rank, loop.world_size, loop.step, loop.device)
        self.all_residuals = Residuals()
        self.pass_factor = 1.0
        self.pass_weight_norm: Tensor | None = None
        self._grad_scale: float | Tensor = 1.0
        self._lr_ratios: Sequence[float] = ()
        self._reduction = MaxReduction(reduce, loop.device)
        for name, pack, unpack in (
            ("step_scale", self._pack_step_scale, lambda reduced: reduced),
            ("weight_norm", self._pack_weight_norm, lambda reduced: reduced),
            ("activations", self._pack_activations, self._unpack_activations),
            ("residuals", self._pack_residuals, self._unpack_residuals),
            ("nonfinite", self.nonfinite.pack, self.nonfinite.unpack),
        ):
            self._reduction.register(name, pack, unpack)

    def measure_weight_norm(self) -> Tensor:
        """W now; shape (), float32."""
        return largest_weight_norm(self._target.optimizer, self._target.model, self._options.weights)

    def reduce(
        self, loop: LoopFacts, *, update: bool, lr_ratios: Sequence[float] | None = None
    ) -> dict[str, list[float]]:
        """Reduces what an update of the rate needs, the step scale, or both, in one all-reduce.

        Args:
            loop: The loop's state.
            update: Whether the rate is updated.
            lr_ratios: Learning rate of each parameter group over that of the first one, to measure the step scale; None
                to leave it out.

        Returns:
            The values that all ranks agree on, for :meth:`measurement`.
        """
        names: tuple[str, ...] = _UPDATE if update else ()
        if lr_ratios is not None:
            self._grad_scale, self._lr_ratios = loop.grad_scale(self._target.optimizer), lr_ratios
            names = ("step_scale", *names)
        values = self._reduction.reduce(names)
        if self._estimator is not None and lr_ratios is not None:
            self._estimator.update(values["step_scale"])
        return values

    def share(self) -> None:
        """Gives all ranks the same statistics, for a checkpoint between two updates; all ranks must call it."""
        if self._world_size > 1:
            self._reduction.share(_UPDATE)

    def share_nonfinite(self) -> None:
        """Gives all ranks the same non-finite losses; all ranks must call it."""
        self._reduction.share(["nonfinite"])

    def measurement(self, values: dict[str, list[float]], accumulated: int, interval_over: bool) -> Measurement:
        """The measurement of an update.

        Args:
            values: What :meth:`reduce` returned.
            accumulated: Batches in an optimizer step.
            interval_over: Whether an interval has ended; residuals fall fast in the first one and are used only then.
        """
        (weight_norm,) = values["weight_norm"]
        size, count, dropped, fourth_moment_norm, output_norm = values["activations"]
        self.all_residuals = Residuals(*values["residuals"])
        batches = self._world_size * accumulated
        batch_size = int(count) * batches
        assert self.activations is not None
        if self.activations.mean:
            size, output_norm = size * math.sqrt(batch_size), output_norm * math.sqrt(batch_size)
        elif self._policy.norm_grows_with_batch:
            size, output_norm = size * math.sqrt(batches), output_norm * math.sqrt(batches)
        measurement = Measurement(
            activation_norm=size,
            weight_norm=weight_norm if weight_norm >= 0 else math.nan,
            batch_size=batch_size,
            dropped=int(dropped),
            fourth_moment_norm=fourth_moment_norm * math.sqrt(batches),
            output_norm=output_norm,
            residual_rms=self.all_residuals.root_mean_square if interval_over else 0.0,
            loss_factor=self.all_residuals.factor,
        )
        return self.with_step_scale(measurement)

    def end_interval(self) -> None:
        """Forgets the batches of an interval."""
        assert self.activations is not None
        self.activations.reset()
        self.residuals.end_interval()

    def with_step_scale(self, measurement: Measurement) -> Measurement:
        """A measurement with the current estimate of the step scale."""
        if self._estimator is None:
            return measurement
        scale = self._estimator.scale
        return replace(
            measurement,
            step_scale=scale.value,
            logit_grad_norm=scale.logit_grad_norm,
            mean_logit_grad_norm=scale.mean_logit_grad_norm,
        )

    def _pack_step_scale(self) -> Tensor:
        assert self._estimator is not None
        return self._estimator.pack(self._grad_scale, self._lr_ratios, self._rank, self._world_size)

    def _pack_weight_norm(self) -> Tensor:
        norm = self.measure_weight_norm() if self.pass_weight_norm is None else self.pass_weight_norm
        # The MAX of a NaN depends on the order of the ranks; -1 stands for it.
        return torch.where(torch.isfinite(norm), norm, -1.0).reshape(1)

    def _pack_activations(self) -> Tensor:
        assert self.activations is not None
        return self.activations.pack(self.pass_factor, self._rank)

    def _unpack_activations(self, reduced: Tensor) -> Tensor:
        assert self.activations is not None
        return self.activations.unpack(reduced)

    def _pack_residuals(self) -> Tensor:
        return self.residuals.pack(self._rank, self._world_size)

    def _unpack_residuals(self, reduced: Tensor) -> Tensor:
        return self.residuals.unpack(reduced)
