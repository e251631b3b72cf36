"""Periodic measurements of an optimizer's steps, of the loss, and of the gradient norm in the outputs."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_lipschitz.measurement.norms import grad_norm, whole
from lit_lipschitz.measurement.optimizer_updates import OptimizerInfo, optimizer_info
from lit_lipschitz.measurement.output_gradients import LogitGradientNorms, grad_norms_of_ranks
from lit_lipschitz.measurement.scale_invariance import ScaleInvariance, he_init_norms
from lit_lipschitz.measurement.step_lengths import step_lengths, weight_filter
from lit_lipschitz.measurement.trial_step import AppliedStep, TrialError, UpdateOf


@dataclass(frozen=True)
class StepScale:
    """What was measured of an optimizer step; 0 stands for a number that was not."""

    value: float = 0.0  # s, gradient norm over the norm of the displacement by a gradient at lr = 1
    descent: float = 0.0  # decrease of the loss per unit of the learning rate, over the loss
    logit_grad_norm: float = 0.0  # root mean square over the examples of the gradient norm in the logits
    mean_logit_grad_norm: float = 0.0  # mean over the examples
    largest_now: float = 0.0  # largest contraharmonic mean of a measured step of this interval
    largest_before: float = 0.0  # the same of the interval before; 0 in the first one

    @property
    def largest_mean(self) -> float:
        """Largest contraharmonic mean of the gradient norms in the logits, of the last interval and this one."""
        return max(self.largest_before, self.largest_now)


class StepScaleEstimator:
    """Measures those steps of one optimizer that are due; ranks agree by one MAX all-reduce.

    With ``needs_logit_grads``, the gradient norm in the logits is measured too. The update of a linear optimizer is
    known, and of others the gradient norm is corrected for the growth of scale-invariant weights. ``info`` is what is
    known of the optimizer. If its update is measured and no copy of it can step, ``notify`` says so, and a due step
    uses what the last one was.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        module: nn.Module,
        needs_logit_grads: bool = False,
        info: OptimizerInfo | None = None,
        notify: Callable[[str], None] = print,
    ) -> None:
        self.scale = StepScale()
        self.restarted = False  # whether the last step began a new estimate, since other parameters train than before
        self.needs_logit_grads, self.logit_grads = needs_logit_grads, LogitGradientNorms()
        self.pack_logit_grads = self.logit_grads.pack  # another way to measure them may replace it
        self._optimizer, self._info, self._notify = optimizer, info or optimizer_info(optimizer), notify
        self._gain = self._info.displacement_gain(optimizer.param_groups[0])
        self.copies_fail = False  # whether an update was to be measured, and no copy of the optimizer could step
        self._applied: AppliedStep | None = None
        if self._info.update is None and not self._info.is_linear:
            self._applied = AppliedStep(optimizer, self._info.decoupled_weight_decay)
        self._is_weight = weight_filter(module)
        self.invariance = ScaleInvariance(he_init_norms(module))
        self._num_trained = 0  # parameters that the estimate belongs to
        self._grad_norm: Tensor | None = None  # of the coming step, as the backward has left its gradients
        self._loss: Tensor | None = None  # sum of the losses of the coming step

    @property
    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def add_loss(self, loss: Tensor, loss_scale: float | Tensor) -> None:
        """Adds a loss of the coming step, divided by a factor; shape ()."""
        value = whole(loss.detach()).float().sum() / loss_scale
        if any(group.get("maximize", False) for group in self._optimizer.param_groups):
            value = -value
        self._loss = value if self._loss is None else self._loss + value.to(self._loss.device)

    def discard(self) -> None:
        """Forgets the losses since the last step."""
        self._loss = None
        self.logit_grads.discard()

    @torch.no_grad()
    def _current_grad_norm(self) -> Tensor:
        return grad_norm([one.grad for one in self._parameters if one.grad is not None])

    def after_backward(self, loss_scale: float | Tensor) -> None:
        """Keeps the norm of the gradients, divided by a factor of the loss.

        They may be clipped before the step. The length of Adam-type updates does not depend on that of the gradients,
        so the rate must not either.
        """
        self._grad_norm = self._current_grad_norm() / loss_scale

    def forget_grad_norm(self) -> None:
        """Forgets the norm: the gradients of several batches may be divided by their number before the step."""
        self._grad_norm = None

    def begin_step(self) -> None:
        """A step is about to be made and measured; the estimate begins again if other parameters train than before."""
        # For other optimizers' losses some may be frozen for a while.
        num_trained = sum(parameter.requires_grad for parameter in self._parameters)
        # What is known of a linear optimizer does not depend on which parameters train.
        self.restarted = num_trained != self._num_trained and not self._info.is_linear
        if self.restarted:
            self._num_trained, self.scale = num_trained, StepScale()

    def pack(self, grad_scale: float | Tensor, ratios: Sequence[float], rank: int, world_size: int) -> Tensor:
        """This rank's numbers of the step that has begun, for a MAX all-reduce; the gradient norm before clipping.

        Shape (4,), or with gradient norms in the logits (4 + 2 * world_size,), on the gradients' device.
        """
        packed = self._pack_norms(grad_scale, ratios)
        if self._grad_norm is not None:
            clipping = self._grad_norm / (self._current_grad_norm() / grad_scale)
            clipping = torch.where(torch.isfinite(clipping), clipping, 1.0)
            # The update of a linear optimizer is as much longer without clipping as the gradient is.
            descent = clipping**2 if self._info.is_linear else clipping
            packed = packed * torch.stack([clipping, torch.ones_like(clipping), descent])
            self._grad_norm = None
        loss = packed.new_zeros(1) if self._loss is None else self._loss.to(packed).reshape(1)
        packed, self._loss = torch.cat([packed, loss]), None
        if self.needs_logit_grads:
            packed = torch.cat([packed, self.pack_logit_grads(rank, world_size, packed.device).flatten()])
        # Whether a NaN survives a MAX depends on the order of the ranks; infinity is ignored by `update`.
        return torch.where(torch.isfinite(packed), packed, math.inf)

    def _norms(self, grad_scale: float | Tensor, ratios: Sequence[float], update_of: UpdateOf | None = None) -> Tensor:
        """The :func:`step_lengths` of the step that has begun; shape (3,)."""
        invariance = None if self._info.is_linear else self.invariance
        return step_lengths(self._optimizer, grad_scale, ratios, invariance, self._is_weight, self._info, update_of)

    def _pack_norms(self, grad_scale: float | Tensor, ratios: Sequence[float]) -> Tensor:
        """The norms of the coming step, or of one before it if no copy can step; zeros before the first one."""
        if not self.copies_fail:
            try:
                return self._norms(grad_scale, ratios)
            except TrialError as error:
                self.copies_fail = True
                self._notify(
                    f"LipschitzLR: no copy of the optimizer {self._info.name} can step ({error}); its updates are "
                    "measured after its own steps, and the learning rate stays as it is until the first one"
                )
        assert self._applied is not None
        measured, self._applied.measured = self._applied.measured, None
        self._applied.watch(partial(self._norms, grad_scale, ratios))
        device = self._parameters[0].device
        return torch.zeros(3, device=device) if measured is None else measured

    def close(self) -> None:
        """Removes the hook."""
        if self._applied is not None:
            self._applied.close()

    def update(self, reduced: Sequence[float]) -> None:
        """Takes over the MAX over all ranks of :meth:`pack`, read to the host; without a usable gradient nothing."""
        grad_norm, update_norm, descent, loss, *logit_grads = reduced
        # The update of a linear optimizer is the gradient, clipped or not, and 0 with it.
        ratio = 1.0 if self._info.is_linear else grad_norm / update_norm if update_norm > 0 else 0.0
        if not _is_positive(ratio):
            return
        relative = descent / loss if loss > 0 else 0.0
        norms = grad_norms_of_ranks(logit_grads)
        largest = self.scale.largest_now
        if all(map(_is_positive, norms)):
            largest = max(largest, norms[0] ** 2 / norms[1])
        else:
            norms = self.scale.logit_grad_norm, self.scale.mean_logit_grad_norm
        relative = relative if math.isfinite(relative) else 0.0
        self.scale = StepScale(ratio / self._gain, relative, *norms, largest, self.scale.largest_before)

    def end_interval(self) -> None:
        """Another interval begins; the largest mean of the one that ends still counts in it."""
        self.scale = replace(
            self.scale, largest_now=0.0, largest_before=self.scale.largest_now or self.scale.largest_before
        )

    def state_dict(self) -> dict[str, Any]:
        """The state, as plain values."""
        return {
            "scale": asdict(self.scale),
            "num_trained": self._num_trained,
            "scale_invariance": [] if self._info.is_linear else self.invariance.state_dict(len(self._parameters)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state of :meth:`state_dict`."""
        self.scale = StepScale(**state["scale"])
        self._num_trained = state["num_trained"]
        self.invariance.load_state_dict(state["scale_invariance"])


def _is_positive(value: float) -> bool:
    return math.isfinite(value) and value > 0
