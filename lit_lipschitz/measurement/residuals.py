"""Residual and total sums of squares of a squared error, batch by batch, kept on the device."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_COUNT = 32
"""Fewest numbers in an interval whose residuals are representative; with fewer, those of the epoch so far are used."""


@dataclass(frozen=True)
class Residuals:
    """Sums of squares of a squared error's residuals and targets, over the batches that were measured.

    Those of the targets are of the run, others since the epoch or the interval began. The losses of all batches of the
    epoch correct the residuals of the few that were measured.
    """

    total_count: float = 0.0  # numbers, examples times outputs, of the run
    total_ss: float = 0.0  # of squared deviations of the targets from the mean of their output
    measured_count: float = 0.0  # numbers of the epoch
    measured_ss: float = 0.0  # of squared differences of outputs and targets
    interval_count: float = 0.0
    interval_residual_ss: float = 0.0
    interval_factor: float = 0.0  # sum over the numbers of the factor in front of the mean
    losses: float = 0.0  # sum over all batches of the epoch
    num_losses: float = 0.0
    measured_losses: float = 0.0  # sum over the batches that were measured
    num_measured_losses: float = 0.0

    @property
    def root_mean_square(self) -> float:
        """Root mean square residual of the interval, or with few numbers of the epoch; 0 if there is no finite one."""
        total, count = self.interval_residual_ss, self.interval_count
        if count < MIN_COUNT:
            total, count = self.measured_ss, self.measured_count
        mean = total / count if count else 0.0
        return math.sqrt(mean) if math.isfinite(mean) else 0.0

    @property
    def factor(self) -> float:
        """Mean factor in front of the squared error in the interval; 1 if the interval is empty."""
        return self.interval_factor / self.interval_count if self.interval_count else 1.0

    @property
    def count(self) -> float:
        """Numbers in all batches of the epoch, if they are as large as those that were measured."""
        return self.measured_count * max(1.0, self.num_losses / max(1.0, self.num_measured_losses))

    @property
    def fraction_unexplained(self) -> float | None:
        """Fraction of variance unexplained, 1 - R^2; None if the targets do not vary."""
        if not (self.total_ss > 0 and self.measured_count > 0):
            return None
        share = self.measured_ss / self.measured_count * self.total_count / self.total_ss
        if self.measured_losses > 0:
            share *= self.losses / self.num_losses * self.num_measured_losses / self.measured_losses
        return share if math.isfinite(share) else None


class RunningResiduals:
    """Accumulates the sums of :class:`Residuals` on the device; a width of 0 ignores all batches, for other losses."""

    def __init__(self, width: int = 0, device: torch.device | None = None) -> None:
        self.width = width  # outputs of an example; 0 if batches are ignored
        self.values = torch.zeros(11, dtype=torch.float32, device=device)  # the fields of Residuals
        self._losses = self.values[7:].unbind()
        self.mean = torch.zeros(width, dtype=torch.float32, device=device)  # of the epoch's targets, one an output

    @torch.no_grad()
    def add(self, outputs: Tensor, targets: Tensor, factor: float | Tensor = 1.0) -> None:
        """Adds a batch of shape (rows, width), with the factor in front of its mean.

        A batch of another width, or with values that are not finite, is ignored. The sums are updated pairwise, by
        T. F. Chan, G. H. Golub, R. J. LeVeque: Updating Formulae and a Pairwise Algorithm for Computing Sample
        Variances, 1979.
        """
        rows, width = targets.shape
        # No rank has all of a sharded tensor.
        if width != self.width or not rows or hasattr(outputs, "full_tensor") or hasattr(targets, "full_tensor"):
            return
        targets = targets.to(self.mean.device)
        variance, mean = torch.var_mean(targets.float(), dim=0, correction=0)
        residual_ss = torch.linalg.vector_norm((outputs.to(self.mean.device) - targets).float()).square()
        rows_before = self.values[0] / width
        share = rows / (rows_before + rows)
        # A variance below the precision of the targets is rounding.
        variance = torch.where(variance > (1e-6 * mean).square(), variance, 0.0)
        shift = mean - self.mean
        total_ss = rows * variance.sum() + rows_before * share * shift.square().sum()
        count = torch.full_like(residual_ss, rows * width)
        batch = torch.stack([count, total_ss, count, residual_ss, count, residual_ss, count * factor])
        batch = torch.cat([batch, batch.new_zeros(4)])
        values = self.values + batch
        usable = torch.isfinite(values).all()
        self.values.copy_(torch.where(usable, values, self.values))
        self.mean.add_(torch.where(usable, shift * share, 0.0))

    @torch.no_grad()
    def add_loss(self, loss: Tensor, measured: bool) -> None:
        """Adds the loss of a batch, whose residuals are ``measured`` or not; one that is not finite spoils the epoch.

        Host numbers and one or two operations on the device.
        """
        value = loss.detach().to(self.values.device)
        for total, count in (self._losses[:2], self._losses[2:])[: 1 + measured]:
            total.add_(value)
            count.add_(1.0)

    def end_interval(self) -> None:
        """Resets the sums of the interval."""
        self.values[4:7].zero_()

    def end_epoch(self) -> None:
        """Resets the sums of the epoch; those of the targets and their mean are of the run."""
        self.values[2:4].zero_()
        self.values[7:].zero_()

    def pack(self, rank: int, world_size: int) -> Tensor:
        """The sums beside zeros for other ranks, then rank 0's mean (-inf elsewhere); for a MAX all-reduce."""
        if not self.width:
            return self.mean
        slots = self.values.new_zeros(world_size, len(self.values))
        slots[rank] = self.values
        mean = torch.full_like(self.mean, -math.inf) if rank else self.mean
        return torch.cat([slots.flatten(), mean])

    def unpack(self, reduced: Tensor) -> Tensor:
        """The sums over the ranks; gives all ranks their mean, so that any rank's checkpoint has them."""
        if not self.width:
            return self.values
        # The distance between the ranks' means is ignored: all draw their examples from the same distribution.
        slots = reduced[: -self.width].reshape(-1, len(self.values))
        self.mean.copy_(reduced[-self.width :])
        self.values.copy_(slots.mean(dim=0))
        return slots.sum(dim=0)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors, on the CPU."""
        return {"values": self.values.cpu().clone(), "mean": self.mean.cpu().clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads the tensors of :meth:`state_dict`; sums of another shape are a ValueError."""
        if state["values"].shape != self.values.shape:
            raise ValueError(f"expected {len(self.values)} sums, found the shape {tuple(state['values'].shape)}")
        self.values.copy_(state["values"])
        self.mean = state["mean"].to(self.mean)
        self.width = self.mean.numel()
