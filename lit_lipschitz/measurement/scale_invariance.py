r"""Weights whose length the loss does not know, as in front of a normalisation, and how long they are.

Where a loss is the same for w and for s w, the gradient is orthogonal to w (Euler's theorem on homogeneous functions)
and falls as 1 / \|w\|. Such weights grow as they are trained, since every step is orthogonal to them.

References:
    S. Arora, Z. Li, K. Lyu: Theoretical Analysis of Auto Rate-Tuning by Batch Normalization, arXiv 1812.03981, 2018,
    section 2, for the gradient and the growth. What is made of them here is not in it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

ALMOST_ORTHOGONAL = 0.3
"""The largest cosine of weight and gradient that counts as 0, over that of two random directions, 1 / sqrt(size).

One of four random directions is as orthogonal, one of 1,300 in five readings. On ResNet-20 rounding left 1e-4 at most
in single precision and 0.01 with bf16-mixed and bf16-true; its head, and all weights of two transformers, had 2 and
more in one of their readings.
"""


class ScaleInvariance:
    """Tells weights of which only the direction matters by their gradients, from one reading to the next.

    A matrix or a kernel is one of them if it has been orthogonal to its gradient in all readings, up to what rounding
    makes of it. That of a layer with a ReLU between itself and the normalisation is one as long as its bias is small.

    Args:
        usual: Norms that weights usually start with, for those of which that is known.
    """

    def __init__(self, usual: Mapping[Tensor, float] | None = None) -> None:
        self._usual = usual or {}
        # Parameters that were never read are in none of these; all values stay on the parameters' devices.
        self._largest: dict[Tensor, Tensor] = {}  # cosine so far, over that of random directions; -1 before the first
        self._first: dict[Tensor, Tensor] = {}  # norm in the first reading
        self._stored: Sequence[Sequence[float]] = ()

    @property
    def count(self) -> int:
        """How many weights are such by a tenth of the limit, which chance seldom meets; this waits for the device."""
        return sum(0 <= float(largest) <= ALMOST_ORTHOGONAL / 10 for largest in self._largest.values())

    @torch.no_grad()
    def growth(self, weight: Tensor, grad: Tensor, place: int) -> Tensor | float:
        """Takes a reading in.

        Args:
            weight: The parameter.
            grad: Its gradient, times any number, without weight decay.
            place: The parameter's place among all of its optimizer, for what was restored.

        Returns:
            Where only the direction matters, the weight's norm over the one that it usually starts with, or over that
            in the first reading, where the former is not known or the cosine is above a tenth of the limit (in a first
            reading a hundredth), as chance may have it. 1 elsewhere. A scalar, on the gradient's device.
        """
        if weight.dim() < 2:
            return 1.0
        values, slopes = (_real(part.detach()) for part in (weight, grad))
        length = norm(values)
        new = weight not in self._largest
        if new:
            largest, first = self._stored[place] if place < len(self._stored) else (-1.0, -1.0)
            self._largest[weight] = torch.full_like(length, largest)
            self._first[weight] = length if first < 0 else torch.full_like(length, first)
        # Rows that had no gradient, as an embedding's, are not orthogonal to it.
        touched, steep = norm(values * (slopes != 0)), norm(slopes)
        cosine = _whole((values * slopes).sum()).abs() / touched / steep * values.numel() ** 0.5
        tells = (touched > 0) & (steep > 0) & torch.isfinite(steep)  # no underflow and no overflow
        cosine = torch.where(tells, cosine, math.nan)
        most = self._largest[weight] = torch.fmax(self._largest[weight], cosine)
        start = self._first[weight]
        if weight in self._usual:
            # Chance has one of 400 in the first reading, and one of 1,700 in two.
            certain = most <= ALMOST_ORTHOGONAL / (100 if new else 10)
            start = torch.where(certain, self._usual[weight], start)
        free = (most >= 0) & (most <= ALMOST_ORTHOGONAL) & (length > 0) & (start > 0)
        return torch.where(free, length / start, 1.0)

    def state_dict(self, parameters: Iterable[Tensor]) -> list[list[float]]:
        """Largest cosine and first norm of an optimizer's parameters in their order, -1 for none.

        This waits for the device.
        """
        state = []
        for place, parameter in enumerate(parameters):
            if parameter in self._largest:
                state.append([float(self._largest[parameter]), float(self._first[parameter])])
            else:
                state.append(list(self._stored[place]) if place < len(self._stored) else [-1.0, -1.0])
        return state

    def load_state_dict(self, state: Sequence[Sequence[float]]) -> None:
        """Takes the state of :meth:`state_dict`."""
        self._largest, self._first, self._stored = {}, {}, state


def norm(values: Tensor) -> Tensor:
    """The Euclidean norm of a real tensor, whole or sharded, in single precision or its own, if that is higher."""
    return _whole(torch.linalg.vector_norm(_wide(values)))


def _real(values: Tensor) -> Tensor:
    return _wide(torch.view_as_real(values) if values.is_complex() else values)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _whole(value: Any) -> Tensor:
    """A scalar of a sharded tensor, put together by all ranks."""
    whole: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole


def usual_lengths(module: nn.Module) -> dict[Tensor, float]:
    """The Euclidean norm that He's initialisation gives the weights of linear maps and convolutions.

    An entry's variance is 2 over the inputs of an output, so a weight of k outputs has the norm sqrt(2 k), whatever its
    inputs.

    References:
        K. He, X. Zhang, S. Ren, J. Sun: Delving Deep into Rectifiers, arXiv 1502.01852, 2015, section 2.2.
    """
    lengths: dict[Tensor, float] = {}
    for part in module.modules():
        if isinstance(part, nn.Linear):
            lengths[part.weight] = math.sqrt(2 * part.out_features)
        elif isinstance(part, nn.modules.conv._ConvNd):
            lengths[part.weight] = math.sqrt(2 * part.out_channels)
    return lengths
