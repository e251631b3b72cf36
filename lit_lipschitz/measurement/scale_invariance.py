r"""Detects scale-invariant weights (those followed by a normalisation layer) by their gradients.

Where a loss is the same for w and for s w, the gradient is orthogonal to w (Euler's theorem on homogeneous functions)
and falls as 1 / \|w\|. Such weights grow during training, since every step is orthogonal to them.

References:
    S. Arora, Z. Li, K. Lyu: Theoretical Analysis of Auto Rate-Tuning by Batch Normalization, arXiv 1812.03981, 2018,
    section 2, for the gradient and the growth. The detection is not in it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_lipschitz.measurement.norms import as_real, norm, whole, wide

MAX_COSINE = 0.3
"""Largest cosine of weight and gradient that counts as 0, over that of two random vectors, 1 / sqrt(size).

One of four random gradients is as orthogonal, one of 1,300 in five measurements. On ResNet-20 rounding left 1e-4 at
most in single precision and 0.01 with bf16-mixed and bf16-true; its head, and all weights of two transformers, had 2
and more in one of their measurements.
"""


class ScaleInvariance:
    """Detects scale-invariant weights over several measurements of their gradients.

    A matrix or a kernel is one if it has been orthogonal to its gradient in all measurements, up to rounding. That of a
    layer with a ReLU between itself and the normalisation is one as long as its bias is small.
    """

    def __init__(self, init_norms: Mapping[Tensor, float] | None = None) -> None:
        self._init_norms = init_norms or {}  # at a usual initialisation, where known
        # Parameters that were never measured are in neither; all values stay on the parameters' devices.
        self._max_cosine: dict[Tensor, Tensor] = {}  # over that of random vectors; -1 before the first measurement
        self._first_norm: dict[Tensor, Tensor] = {}
        self._restored: Sequence[Sequence[float]] = ()  # both, by the parameter's index in its optimizer

    @property
    def num_scale_invariant(self) -> int:
        """Number of weights within a tenth of the limit, seldom met by chance; this waits for the device."""
        return sum(0 <= float(cosine) <= MAX_COSINE / 10 for cosine in self._max_cosine.values())

    @torch.no_grad()
    def norm_growth(self, weight: Tensor, grad: Tensor, index: int) -> Tensor | float:
        """Adds a measurement of a weight's gradient without weight decay, up to a factor; its index is the optimizer's.

        The result is 1, or for a scale-invariant weight its norm over that at a usual initialisation, or over that in
        the first measurement, if the former is not known or the cosine is above a tenth of the limit (in a first
        measurement a hundredth), as may happen by chance.
        """
        if weight.dim() < 2:
            return 1.0
        values, grads = (wide(as_real(part.detach())) for part in (weight, grad))
        weight_norm = norm(values)
        if weight not in self._max_cosine:
            cosine, first = self._last(weight, index)
            self._max_cosine[weight] = torch.full_like(weight_norm, cosine)
            self._first_norm[weight] = weight_norm if first < 0 else torch.full_like(weight_norm, first)
        # Rows without a gradient, as an embedding's, are not orthogonal to it.
        touched, grad_norm = norm(values * (grads != 0)), norm(grads)
        cosine_now = whole((values * grads).sum()).abs() / touched / grad_norm * values.numel() ** 0.5
        usable = (touched > 0) & (grad_norm > 0) & torch.isfinite(grad_norm)  # no underflow and no overflow
        cosine_now = torch.where(usable, cosine_now, math.nan)
        is_first = self._max_cosine[weight] < 0
        max_cosine = self._max_cosine[weight] = torch.fmax(self._max_cosine[weight], cosine_now)
        start = self._first_norm[weight]
        if weight in self._init_norms:
            # One of 400 weights passes by chance in the first measurement, and one of 1,700 in two.
            certain = max_cosine <= torch.where(is_first, MAX_COSINE / 100, MAX_COSINE / 10)
            start = torch.where(certain, self._init_norms[weight], start)
        invariant = (max_cosine >= 0) & (max_cosine <= MAX_COSINE) & (weight_norm > 0) & (start > 0)
        return torch.where(invariant, weight_norm / start, 1.0)

    def state_dict(self, parameters: Iterable[Tensor]) -> list[list[float]]:
        """Largest cosine and first norm of each of an optimizer's parameters; waits for the device."""
        return [[float(value) for value in self._last(weight, index)] for index, weight in enumerate(parameters)]

    def _last(self, weight: Tensor, index: int) -> Sequence[Any]:
        """Largest cosine and first norm so far, -1 if not measured."""
        if weight in self._max_cosine:
            return self._max_cosine[weight], self._first_norm[weight]
        return self._restored[index] if index < len(self._restored) else (-1.0, -1.0)

    def load_state_dict(self, state: Sequence[Sequence[float]]) -> None:
        """Restores the state of :meth:`state_dict`; one that is not of pairs of numbers is a ValueError."""
        if not all(len(pair) == 2 and all(type(value) is float and value >= -1 for value in pair) for pair in state):
            raise ValueError(f"expected a largest cosine and a norm of each parameter, found {state!r:.80}")
        self._max_cosine, self._first_norm, self._restored = {}, {}, state


def he_init_norms(module: nn.Module) -> dict[Tensor, float]:
    """Euclidean norm of the weights of linear maps and convolutions at He initialisation.

    An entry's variance is 2 over the inputs of an output, so a weight of k outputs has the norm sqrt(2 k). From K. He,
    X. Zhang, S. Ren, J. Sun: Delving Deep into Rectifiers, arXiv 1502.01852, 2015, section 2.2.
    """
    norms: dict[Tensor, float] = {}
    for part in module.modules():
        if isinstance(part, nn.Linear):
            norms[part.weight] = math.sqrt(2 * part.out_features)
        elif isinstance(part, nn.modules.conv._ConvNd):
            norms[part.weight] = math.sqrt(2 * part.out_channels)
    return norms
