"""What the ranks measure of one optimizer's steps, reduced to a measurement that is the same on all of them."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lit_lipschitz.control.found_heads import FoundHeads
from lit_lipschitz.control.loop_facts import LoopFacts, Target
from lit_lipschitz.control.options import Options
from lit_lipschitz.control.policy import Measurement, Policy
from lit_lipschitz.control.reduction import MaxReduction
from lit_lipschitz.measurement.nonfinite import NonfiniteLosses
from lit_lipschitz.measurement.norms import weight_norm
from lit_lipschitz.measurement.residuals import Residuals, RunningResiduals
from lit_lipschitz.measurement.step_scale import StepScaleEstimator

_UPDATE = ("weight_norm", "accumulated", "activations", "gradients", "residuals", "nonfinite")


class RankStatistics:
    """The statistics of one optimizer on this rank, and their all-reduce."""

    def __init__(
        self, policy: Policy, options: Options, target: Target, estimator: StepScaleEstimator | None, loop: LoopFacts
    ) -> None:
        self._policy, self._options, self._target, self._estimator = policy, options, target, estimator
        self._rank, self._world_size = loop.rank, loop.world_size
        self.residuals = RunningResiduals(device=loop.device)  # of a squared error
        self.all_residuals = Residuals()  # of all ranks at the last update
        self.nonfinite = NonfiniteLosses(loop.rank, loop.world_size, loop.step, loop.device)
        self.decays = True  # whether a schedule lowers the rate later, or the weights are averaged
        self.pass_factor = 1.0  # factor of the loss, which a pass over the training set does not see
        self._reduced = False  # whether the ranks have reduced the statistics of a head
        self._accumulated = 1  # largest number of batches in a step on this rank; another may have skipped some
        self._pass_weight_norm: Tensor | None = None  # W at the last pass, if no step has used it yet
        self._reduction = MaxReduction(loop.reduce, loop.device)
        self._reduction.register("weight_norm", self._pack_weight_norm)
        self._reduction.register("accumulated", lambda: torch.tensor([float(self._accumulated)]))
        self._reduction.register("gradients", lambda: torch.zeros(2, device=loop.device))
        self._reduction.register("nonfinite", self.nonfinite.pack, self.nonfinite.unpack)

    def measure_head(self, found: FoundHeads, device: torch.device) -> None:
        """Measures the inputs of a head, and the residuals if its loss is a squared error, from now on."""
        width = found.num_outputs if found.loss.name == "mean_squared_error" else 0
        # A checkpoint may have restored them; ranks whose loss is still recognised reduce as many numbers as before.
        if width != self.residuals.width and not (found.measured and self._reduced):
            self.residuals = RunningResiduals(width, device)
        inputs, residuals, rank = found.hook.statistic, self.residuals, self._rank
        if (gradients := found.gradients) is not None:
            self._reduction.register(
                "gradients", lambda: gradients.pack_grad_norms(found.measured), gradients.unpack_grad_norms
            )
        self._reduction.register("activations", lambda: inputs.pack(self.pass_factor, rank), inputs.unpack)
        self._reduction.register("residuals", lambda: residuals.pack(rank, self._world_size), residuals.unpack)

    def end_pass(self) -> None:
        """Keeps the weight norm that belongs to a pass over the training set."""
        self._pass_weight_norm = self._weight_norm()

    def reduce(
        self, loop: LoopFacts, lr_ratios: Sequence[float] | None, names: Sequence[str] = ()
    ) -> dict[str, list[float]]:
        """Measures the step scale, and reads what all ranks agree on of other statistics by the same all-reduce.

        ``lr_ratios``: learning rate of each parameter group over that of the first one; None to leave the step scale.
        """
        estimator = self._estimator
        if estimator is None or lr_ratios is None:
            return self._reduction.reduce(names)
        grad_scale = loop.grad_scale(self._target.optimizer)
        self._reduction.register(
            "step_scale", lambda: estimator.pack(grad_scale, lr_ratios, self._rank, self._world_size)
        )
        values = self._reduction.reduce(("step_scale", *names))
        estimator.update(values["step_scale"])
        return values

    def measurement(
        self,
        found: FoundHeads,
        loop: LoopFacts,
        accumulated: int,
        *,
        interval_over: bool,
        lr_ratios: Sequence[float] | None = None,
    ) -> Measurement:
        """The measurement of an update that all ranks agree on, by one :meth:`reduce`.

        ``accumulated``: largest number of batches in an optimizer step on this rank. ``interval_over``: whether an
        interval has ended; residuals fall fast in the first one and are used only then.
        """
        self._accumulated = accumulated
        values, self._reduced = self.reduce(loop, lr_ratios, _UPDATE), True
        (largest_weight,), accumulated = values["weight_norm"], int(values["accumulated"][0])
        size, count, dropped, fourth_moment_norm, output_norm = values["activations"]
        largest_grad_norm, gradient_bound = values["gradients"]
        self.all_residuals, self._pass_weight_norm = Residuals(*values["residuals"]), None
        batches = self._world_size * accumulated
        batch_size = round(count * batches)
        growth = 1.0
        if self._policy.norm_grows_with_batch:
            growth = math.sqrt(batch_size if found.hook.statistic.mean else batches)
        measurement = Measurement(
            activation_norm=size * growth,
            weight_norm=largest_weight if largest_weight >= 0 else math.nan,
            batch_size=batch_size,
            dropped=int(dropped),
            fourth_moment_norm=fourth_moment_norm * math.sqrt(batches),
            output_norm=output_norm * growth,
            residual_rms=self.all_residuals.root_mean_square if interval_over else 0.0,
            loss_factor=self.all_residuals.factor,
            largest_grad_norm=largest_grad_norm,
            gradient_bound=gradient_bound,
            decays=self.decays,
            batches=accumulated,
            ranks=self._world_size,
        )
        return self.with_step_scale(measurement)

    def with_step_scale(self, measurement: Measurement) -> Measurement:
        """A measurement with the current estimate of the step scale."""
        if self._estimator is None:
            return measurement
        scale = self._estimator.scale
        return replace(
            measurement,
            step_scale=scale.value,
            descent=scale.descent,
            logit_grad_norm=scale.logit_grad_norm,
            mean_logit_grad_norm=scale.mean_logit_grad_norm,
            largest_logit_grad_norm=scale.largest_mean,
        )

    def share(self, names: Sequence[str] = _UPDATE) -> None:
        """Gives all ranks the same statistics, between two updates; all ranks must call it."""
        if self._world_size > 1:
            self._reduction.share(names)

    def _weight_norm(self) -> Tensor:
        return weight_norm(self._target.optimizer, self._target.model, self._options.weights)

    def _pack_weight_norm(self) -> Tensor:
        norm = self._weight_norm() if self._pass_weight_norm is None else self._pass_weight_norm
        # The MAX of a NaN depends on the order of the ranks; -1 stands for it.
        return torch.where(torch.isfinite(norm), norm, -1.0).reshape(1)
