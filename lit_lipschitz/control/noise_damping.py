"""How much of a squared error's targets is explained, epoch by epoch, and whether there is more to come."""

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ENOUGH = 3.0
"""Explained over unexplained variance from which on no rate is restrained, where three quarters are explained."""
LITTLE = 0.1
"""The explained share below which next to nothing has been learned yet."""
POWER = 4
"""How fast a rate falls as there is less to learn."""
PLENTY = 20
"""Numbers in an epoch, for each parameter, from which on there is no fitting their noise."""
LEAST = 0.1
"""What a rate is at least multiplied by."""
FEW = 32
"""Numbers below which an interval does not tell how large residuals are, and the epoch so far does."""


@dataclass(frozen=True)
class Residuals:
    """What a squared error has left of its targets.

    Attributes:
        count: Numbers that it was taken of since the epoch began.
        spread: Sum of the targets' squared deviations from their mean, that of each output by itself, since then.
        left: Sum of the squared differences of outputs and targets since then.
        recent: Numbers that it was taken of since the interval began.
        recent_left: Sum of the squared differences since then.
        recent_factor: Sum, over these numbers, of the factor in front of the mean.
    """

    count: float = 0.0
    spread: float = 0.0
    left: float = 0.0
    recent: float = 0.0
    recent_left: float = 0.0
    recent_factor: float = 0.0

    @property
    def root_mean_square(self) -> float:
        """Root mean square of the interval's differences, or of the epoch's where an interval has few.

        0 where there are none, or they are not finite.
        """
        left, count = (self.left, self.count) if self.recent < FEW else (self.recent_left, self.recent)
        mean = left / count if count else 0.0
        return math.sqrt(mean) if math.isfinite(mean) else 0.0

    @property
    def factor(self) -> float:
        """The mean factor in front of the squared error in the interval; 1 where there is none."""
        return self.recent_factor / self.recent if self.recent else 1.0

    @property
    def unexplained(self) -> float | None:
        """The share of the targets' variance that is not explained, 1 - R^2; None where they do not vary."""
        share = self.left / self.spread if self.spread > 0 else math.inf
        return share if math.isfinite(share) else None


class RunningResiduals:
    """Residuals of the batches so far, on the device; nothing is read to the host.

    Args:
        width: Outputs of an example; 0 takes nothing in, where the loss is another one.
        device: Where the sums live.

    Attributes:
        values: The numbers of :class:`Residuals`; shape (6,), float32.
        mean: The mean of the epoch's targets, of each output; shape (width,), float32.
    """

    def __init__(self, width: int = 0, device: torch.device | None = None) -> None:
        self.values = torch.zeros(6, dtype=torch.float32, device=device)
        self.mean = torch.zeros(width, dtype=torch.float32, device=device)

    @property
    def width(self) -> int:
        """Outputs of an example; 0 where nothing is taken in."""
        return len(self.mean)

    @torch.no_grad()
    def add(self, outputs: Tensor, targets: Tensor, factor: float | Tensor = 1.0) -> None:
        """Takes in a batch, by the formula of Chan, Golub and LeVeque (1979); one that is not finite is left out.

        Args:
            outputs: Shape (rows, width); what has another width is left out.
            targets: Of the same shape.
            factor: What the mean over the batch is multiplied by.
        """
        rows, width = targets.shape
        # Of what is sharded, no rank has all.
        if width != self.width or not rows or hasattr(outputs, "full_tensor") or hasattr(targets, "full_tensor"):
            return
        targets = targets.to(self.mean.device)
        variance, mean = torch.var_mean(targets.float(), dim=0, correction=0)
        left = torch.linalg.vector_norm((outputs.to(self.mean.device) - targets).float()).square()
        before = self.values[0] / width
        share = rows / (before + rows)
        # Below the precision of the targets there is no variance.
        variance = torch.where(variance > (1e-6 * mean).square(), variance, 0.0)
        apart = mean - self.mean
        spread = rows * variance.sum() + before * share * apart.square().sum()
        count = torch.full_like(left, rows * width)
        values = self.values + torch.stack([count, spread, left, count, left, count * factor])
        usable = torch.isfinite(values).all()
        self.values.copy_(torch.where(usable, values, self.values))
        self.mean.add_(torch.where(usable, apart * share, 0.0))

    def end_interval(self) -> None:
        """Forgets the interval."""
        self.values[3:].zero_()

    def end_epoch(self) -> None:
        """Forgets the epoch."""
        self.values[:3].zero_()
        self.mean.zero_()

    def slots(self, rank: int, world_size: int) -> Tensor:
        """What :meth:`share` wants the MAX over all ranks of; float32.

        Returns:
            This rank's numbers beside zeros for the others, and the mean of rank 0, beside minus infinity; shape
            (6 * world_size + width,), and (0,) where nothing is taken in.
        """
        if not self.width:
            return self.mean
        slots = self.values.new_zeros(world_size, len(self.values))
        slots[rank] = self.values
        mean = torch.full_like(self.mean, -math.inf) if rank else self.mean
        return torch.cat([slots.flatten(), mean])

    def share(self, agreed: Tensor) -> Tensor:
        """Has all ranks hold the same, of which any rank's checkpoint has all: the ranks' average.

        How far apart their means are is left out: each has drawn its examples from the same ones.

        Args:
            agreed: The MAX over all ranks of :meth:`slots`.

        Returns:
            The numbers of :class:`Residuals` of all ranks together; shape (6,).
        """
        if not self.width:
            return self.values
        slots = agreed[: -self.width].reshape(-1, len(self.values))
        self.mean.copy_(agreed[-self.width :])
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

    .. math:: \min\left(1, \max\left(\frac{v}{v_{max}}, \frac{1}{3} \frac{1 - u}{u}, 1 - 10 l\right)\right)^4

    u is the unexplained share of the last epoch, 1 - R^2, and v the speed of learning: by how much u has fallen since
    half as many steps were made, v_max being the largest so far; l is by how much it has fallen in this run. So the
    rate is left alone while a network learns at its own pace, as one does whose task is hard, once three quarters of
    the variance are explained, and while next to nothing has been learned. It is not multiplied by less than a tenth,
    nor by less than n/(20 p), with n numbers that an epoch's squared errors are taken of and p parameters that are
    trained: the noise that can be fitted is about p/n of it.

    What was unexplained before the first step is told by the first batch, whose share counts as less by twice its
    relative error, sqrt(2/n).

    References:
        Not in the papers; found by validation on the regressions of ``docs/evidence.md``. Why less is to be learned
        where there is more noise: A. Ali, J. Z. Kolter, R. J. Tibshirani: A Continuous-Time View of Early Stopping for
        Least Squares, arXiv 1810.10082, 2019.
    """

    def __init__(self) -> None:
        self._steps: list[float] = []  # the step that the first batch is of, then the middle of each epoch
        self._shares: list[float] = []  # u in these
        self._end = 0  # of the last epoch, in steps
        self._plenty = 0.0  # n / (20 p)
        self._least = math.inf  # of the epochs' shares
        self._speed = 0.0
        self._fastest = 0.0

    @property
    def unexplained(self) -> float | None:
        """The unexplained share of the last epoch, at most 1; None before there is one."""
        return self._shares[-1] if len(self._shares) > 1 else None

    @property
    def factor(self) -> float:
        """What a rate is multiplied by, from 0.1 to 1; 1 before there is something to compare."""
        unexplained = self.unexplained
        if unexplained is None or not self._fastest > 0:
            return 1.0
        signal = (1 - unexplained) / unexplained / ENOUGH if unexplained > 0 else math.inf
        learned = max(self._shares[:2]) - self._least
        held = max(self._speed / self._fastest, signal, 1 - learned / LITTLE) ** POWER
        return min(1.0, max(held, LEAST, self._plenty))

    def begin(self, residuals: Residuals, steps: int) -> None:
        """Takes in the first batches, which tell what was unexplained before the first step; later ones are not.

        Args:
            residuals: Theirs, over all ranks.
            steps: Optimizer steps of the run before them.
        """
        if not self._shares and residuals.unexplained is not None:
            self._begin(steps, min(residuals.unexplained, 1.0) / (1 + 2 * math.sqrt(2 / residuals.count)))

    def _begin(self, steps: int, unexplained: float) -> None:
        self._steps, self._shares, self._end = [steps], [unexplained], steps

    def add(self, residuals: Residuals, steps: int, parameters: int, epochs: int = 1) -> None:
        """Takes in an epoch.

        Args:
            residuals: Those of its batches, over all ranks.
            steps: Optimizer steps of the run up to here.
            parameters: How many numbers are trained, p.
            epochs: How many epochs they are of, where it is more than one.
        """
        unexplained = residuals.unexplained
        middle, self._end = (self._end + steps) / 2, steps
        if unexplained is None:
            return
        if not self._shares:  # nobody knows what was before
            self._begin(steps, min(unexplained, 1.0))
            return
        self._steps.append(middle)
        self._shares.append(min(unexplained, 1.0))
        self._least = min(self._least, self._shares[-1])
        self._plenty = residuals.count / epochs / (PLENTY * max(parameters, 1))
        self._speed = self._at((self._steps[0] + middle) / 2) - self._shares[-1]
        self._fastest = max(self._fastest, self._speed)

    def _at(self, steps: float) -> float:
        """The unexplained share after so many steps, between those that are known."""
        after = bisect.bisect_left(self._steps, steps)
        if not after:
            return self._shares[0]
        (before, middle), (share, later) = self._steps[after - 1 : after + 1], self._shares[after - 1 : after + 1]
        return share + (later - share) * (steps - before) / (middle - before)

    def state_dict(self) -> dict[str, Any]:
        """The state, as plain values."""
        return {
            "steps": list(self._steps),
            "shares": list(self._shares),
            "end": self._end,
            "plenty": self._plenty,
            "least": self._least,
            "speed": self._speed,
            "fastest": self._fastest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the state of :meth:`state_dict`."""
        self._steps, self._shares = list(state["steps"]), list(state["shares"])
        self._end, self._plenty, self._least = state["end"], state["plenty"], state["least"]
        self._speed, self._fastest = state["speed"], state["fastest"]
