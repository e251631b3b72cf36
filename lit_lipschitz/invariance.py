r"""Weights whose length the loss does not know, as in front of a normalisation, and how long they are all the same.

Where a loss is the same for w and for s w, the gradient is orthogonal to w (Euler's theorem on homogeneous functions)
and falls as 1 / \|w\|, and a step of a given length turns w by an angle that falls as 1 / \|w\|. Such weights grow as
they are trained, since every step is orthogonal to them. What a step does is then told by lengths over \|w\|.

References:
    S. Arora, Z. Li, K. Lyu: Theoretical Analysis of Auto Rate-Tuning by Batch Normalization, arXiv 1812.03981, 2018,
    section 2, for the gradient and the growth. What is made of them here is not in it.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

ALMOST_ORTHOGONAL = 0.1
"""The largest cosine of weight and gradient that counts as 0, over that of two random directions, 1 / sqrt(size).

One of 13 random directions is as orthogonal, and as few are in a second reading. In the first one, which has none
beside it, a tenth of that counts.
"""


class ScaleInvariance:
    """Tells weights of which only the direction matters by their gradients, from one reading to the next.

    A matrix or a kernel is one of them if it has been orthogonal to its gradient in all readings, up to what rounding
    makes of it. That of a layer with a ReLU between itself and the normalisation is one as long as its bias is small.
    """

    def __init__(self) -> None:
        # The largest cosine so far, over that of random directions; parameters that were never read are not there.
        self._largest: dict[Tensor, Tensor] = {}
        self._stored: list[float] = []
        self._free: dict[Tensor, Tensor] = {}  # whether they were taken for one in the last reading

    @property
    def count(self) -> int:
        """How many weights the last reading has taken for such; this waits for the device."""
        return sum(bool(free) for free in self._free.values())

    @torch.no_grad()
    def length(self, weight: Tensor, grad: Tensor, place: int) -> Tensor | float:
        """Takes a reading in.

        Args:
            weight: The parameter.
            grad: Its gradient, times any number, without weight decay.
            place: The parameter's place among all of its optimizer, for what was restored.

        Returns:
            Where only the direction matters, the weight's norm over that of He's initial weights,
            sqrt(2 * outputs), outputs being the first dimension; 1 elsewhere. A scalar, on the gradient's device.

        References:
            K. He, X. Zhang, S. Ren, J. Sun: Delving Deep into Rectifiers, arXiv 1502.01852, equation 10, for the norm:
            a variance of 2 / inputs.
        """
        if weight.dim() < 2:
            return 1.0
        values, slopes = (_real(part.detach()) for part in (weight, grad))
        norm, product = _norm(values), _whole((values * slopes).sum())
        cosine = product.abs() / (norm * _norm(slopes)) * values.numel() ** 0.5
        before = self._largest.get(weight)
        if before is None:
            before = torch.full_like(cosine, self._stored[place] if place < len(self._stored) else -1.0)
        # A NaN, as of a gradient that is 0 or has overflowed, tells nothing.
        largest = self._largest[weight] = torch.fmax(before, cosine)
        limit = torch.where(before < 0, ALMOST_ORTHOGONAL / 10, ALMOST_ORTHOGONAL)
        free = self._free[weight] = (largest >= 0) & (largest <= limit) & (norm > 0)
        return torch.where(free, norm / (2 * weight.shape[0]) ** 0.5, 1.0)

    def state_dict(self, parameters: Iterable[Tensor]) -> list[float]:
        """The largest cosines of an optimizer's parameters in their order, -1 for none; this waits for the device."""
        seen = [self._largest.get(parameter) for parameter in parameters]
        if not any(largest is not None for largest in seen):
            return list(self._stored)
        unseen = torch.tensor(-1.0)
        device = next(largest.device for largest in seen if largest is not None)
        read: list[float] = torch.stack([(unseen if one is None else one).to(device).double() for one in seen]).tolist()
        return read

    def load_state_dict(self, state: Sequence[float]) -> None:
        """Takes the state of :meth:`state_dict`."""
        self._largest, self._stored = {}, list(state)


def _real(values: Tensor) -> Tensor:
    parts = torch.view_as_real(values) if values.is_complex() else values
    return parts if parts.dtype == torch.float64 else parts.float()


def _norm(values: Tensor) -> Tensor:
    return _whole(torch.linalg.vector_norm(values))


def _whole(value: Any) -> Tensor:
    """A scalar of a sharded tensor, put together by all ranks."""
    whole: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole
