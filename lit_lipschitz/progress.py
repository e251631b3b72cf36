"""How much of a squared error's targets is explained, epoch by epoch, and whether there is more to come."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ENOUGH = 3.0
"""Explained over unexplained variance from which on no rate is restrained, where three quarters are explained."""
LEAST = 0.1
"""What a rate is at least multiplied by."""


@dataclass(frozen=True)
class Residuals:
    """What a squared error has left of its targets.

    Attributes:
        count: Numbers that it was taken of.
        spread: Sum of the targets' squared deviations from their mean, that of each output by itself.
        left: Sum of the squared differences of outputs and targets.
    """

    count: float = 0.0
    spread: float = 0.0
    left: float = 0.0

    @property
    def root_mean_square(self) -> float:
        """Root mean square of the differences; 0 where there are none."""
        return math.sqrt(self.left / self.count) if self.count else 0.0

    @property
    def unexplained(self) -> float | None:
        """The share of the targets' variance that is not explained, 1 - R^2; None where they do not vary."""
        return self.left / self.spread if self.spread > 0 else None


class RunningResiduals:
    """Residuals of the batches since :meth:`reset`, on the device; nothing is read to the host.

    Args:
        width: Outputs of an example; 0 takes nothing in, where the loss is another one.
        device: Where the sums live.

    Attributes:
        values: The numbers of :class:`Residuals`; shape (3,), float32.
        mean: The targets' mean, of each output; shape (width,), float32.
    """

    def __init__(self, width: int = 0, device: torch.device | None = None) -> None:
        self.values = torch.zeros(3, dtype=torch.float32, device=device)
        self.mean = torch.zeros(width, dtype=torch.float32, device=device)

    @torch.no_grad()
    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Takes in a batch, by the formula of Chan, Golub and LeVeque (1979); one that is not finite is left out.

        Args:
            outputs: Shape (rows, width); what has another width is left out.
            targets: Of the same shape.
        """
        rows, width = targets.shape
        # Of what is sharded, no rank has all.
        if width != len(self.mean) or hasattr(outputs, "full_tensor") or hasattr(targets, "full_tensor"):
            return
        targets = targets.to(self.mean.device)
        variance, mean = torch.var_mean(targets.float(), dim=0, correction=0)
        left = torch.linalg.vector_norm(outputs.to(self.mean.device) - targets, dtype=torch.float32).square()
        before = self.values[0] / width
        share = rows / (before + rows)
        # Below the precision of the targets there is no variance.
        variance = torch.where(variance > (1e-6 * mean).square(), variance, 0.0)
        apart = mean - self.mean
        spread = rows * variance.sum() + before * share * apart.square().sum()
        new = torch.stack([torch.full_like(left, rows * width), spread, left])
        usable = torch.isfinite(new).all()
        self.values.add_(torch.where(usable, new, 0.0))
        self.mean.add_(torch.where(usable, apart * share, 0.0))

    def reset(self) -> None:
        """Forgets the batches."""
        self.values.zero_()
        self.mean.zero_()

    def slots(self, rank: int, world_size: int) -> Tensor:
        """What :meth:`share` wants the MAX over all ranks of; float32.

        Returns:
            This rank's numbers beside zeros for the others, and the mean of rank 0, beside minus infinity; shape
            (3 * world_size + width,), and (0,) where nothing is taken in.
        """
        if not len(self.mean):
            return self.mean
        slots = self.values.new_zeros(world_size, 3)
        slots[rank] = self.values
        mean = torch.full_like(self.mean, -math.inf) if rank else self.mean
        return torch.cat([slots.flatten(), mean])

    def share(self, agreed: Tensor) -> Tensor:
        """Has all ranks hold the same, of which any rank's checkpoint has all: the ranks' average.

        How far apart their means are is left out: each has drawn its examples from the same ones.

        Args:
            agreed: The MAX over all ranks of :meth:`slots`.

        Returns:
            The numbers of :class:`Residuals` of all ranks together; shape (3,).
        """
        width = len(self.mean)
        if not width:
            return self.values
        slots = agreed[:-width].reshape(-1, 3)
        self.mean.copy_(agreed[-width:])
        self.values.copy_(slots.mean(dim=0))
        return slots.sum(dim=0)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors, on the CPU."""
        return {"values": self.values.cpu().clone(), "mean": self.mean.cpu().clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes the tensors of :meth:`state_dict`."""
        self.values.copy_(state["values"])
        self.mean = state["mean"].to(self.mean)


class Progress:
    r"""Whether a regression still learns, from the share of the targets' variance that is unexplained in each epoch.

    Where learning has slowed down and much is still unexplained, what is left is mostly noise, or beyond the network,
    and large steps do no more than to fit it. That is when a rate is restrained, by

    .. math:: \min\left(1, \max\left(\frac{v}{v_{max}}, \frac{1}{3} \frac{1 - u}{u}\right)\right)^3

    and at least by a tenth. u is the unexplained share of the last epoch, 1 - R^2, and v the speed of learning: by how
    much u has fallen since half as many steps were made, v_max being the largest of all epochs. So the rate is left
    alone while a network learns at its own pace, however little it has learned, as one does whose task is hard; and
    once three quarters of the variance are explained.

    References:
        Not in the papers; found by validation on the regressions of ``docs/evidence.md``. Why less is to be learned
        where there is more noise: A. Ali, J. Z. Kolter, R. J. Tibshirani: A Continuous-Time View of Early Stopping for
        Least Squares, arXiv 1810.10082, 2019.
    """

    def __init__(self) -> None:
        self._curve: list[tuple[float, float]] = []  # the middle of each epoch in steps, and u
        self._steps = 0
        self._speed = 0.0
        self._fastest = 0.0

    @property
    def unexplained(self) -> float | None:
        """The unexplained share of the last epoch, at most 1; None before there is one."""
        return self._curve[-1][1] if self._curve else None

    @property
    def factor(self) -> float:
        """What a rate is multiplied by, from 0.1 to 1; 1 before there is something to compare."""
        if not self._curve or not self._fastest > 0:
            return 1.0
        _, unexplained = self._curve[-1]
        explained = (1 - unexplained) / unexplained if unexplained > 0 else math.inf
        return max(LEAST, min(1.0, max(self._speed / self._fastest, explained / ENOUGH)) ** 3)

    def add(self, residuals: Residuals, steps: int) -> None:
        """Takes in an epoch.

        Args:
            residuals: Those of its batches, over all ranks.
            steps: Optimizer steps of the run up to here.
        """
        unexplained = residuals.unexplained
        middle, self._steps = (self._steps + steps) / 2, steps
        if unexplained is None or not math.isfinite(unexplained):
            return
        unexplained = min(unexplained, 1.0)
        self._curve.append((middle, unexplained))
        self._speed = self._at(middle / 2) - unexplained
        self._fastest = max(self._fastest, self._speed)

    def _at(self, steps: float) -> float:
        """The unexplained share after so many steps, between those of the epochs; all of it before the first step."""
        before, share = 0.0, 1.0
        for middle, later in self._curve:
            if middle >= steps:
                return share + (later - share) * (steps - before) / (middle - before)
            before, share = middle, later
        return share

    def state_dict(self) -> dict[str, Any]:
        """The state, as plain values."""
        return {
            "curve": [list(point) for point in self._curve],
            "steps": self._steps,
            "speed": self._speed,
            "fastest": self._fastest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the state of :meth:`state_dict`."""
        self._curve = [(middle, share) for middle, share in state["curve"]]
        self._steps, self._speed, self._fastest = state["steps"], state["speed"], state["fastest"]
