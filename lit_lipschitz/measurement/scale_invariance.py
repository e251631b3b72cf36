r"""Detects scale-invariant weights (those followed by a normalisation layer) by their gradients.

Where a loss is the same for w and for s w, the gradient is orthogonal to w (Euler's theorem on homogeneous functions)
and falls as 1 / \|w\|. Such weights grow during training, since every step is orthogonal to them.

References:
    S. Arora, Z. Li, K. Lyu: Theoretical Analysis of Auto Rate-Tuning by Batch Normalization, arXiv 1812.03981, 2018,
    section 2, for the gradient and the growth. The detection is not in it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_lipschitz.measurement.norms import as_real, inner_product, norms, on_device

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
        # Largest cosine, over that of two random vectors, and first norm of each parameter of the optimizer; -1 for
        # what was never measured. Shape (parameters, 2), on the device of the first weight.
        self._measured = torch.zeros(0, 2)
        self._places: _Places | None = None  # of the weights that were measured last

    @property
    def num_scale_invariant(self) -> int:
        """Number of weights within a tenth of the limit, seldom met by chance; this waits for the device."""
        cosine = self._measured[:, 0]
        return int(((cosine >= 0) & (cosine <= MAX_COSINE / 10)).sum())

    @torch.no_grad()
    def norm_growth(self, weights: Sequence[Tensor], grads: Sequence[Tensor], indices: Sequence[int]) -> Tensor:
        """Adds a measurement of the gradients of weights with two dimensions or more; shape (len(weights),).

        The gradients are those without weight decay, up to a factor; an index is that among the optimizer's parameters.
        The result is 1, or for a scale-invariant weight its norm over that at a usual initialisation, or over that in
        the first measurement, if the former is not known or the cosine is above a tenth of the limit (in a first
        measurement a hundredth), as may happen by chance.
        """
        values, gradients = ([as_real(one.detach()) for one in tensors] for tensors in (weights, grads))
        weight_norm, grad_norm = norms(values), norms(gradients)
        pairs = list(zip(values, gradients, strict=True))
        # Rows without a gradient, as an embedding's, are not orthogonal to it.
        touched = norms([value * (gradient != 0) for value, gradient in pairs])
        product = torch.stack([inner_product(*pair).to(weight_norm) for pair in pairs])
        if self._places is None or self._places.indices != list(indices):
            self._places = _Places.of(weights, indices, self._init_norms, weight_norm.device)
        at, start = self._places, self._places.init_norms
        cosine = product.abs() / touched / grad_norm * at.sqrt_sizes
        usable = (touched > 0) & (grad_norm > 0) & torch.isfinite(grad_norm)  # no underflow and no overflow
        before, first = self._rows(max(indices) + 1, weight_norm.device)[at.rows].T
        largest = torch.fmax(before, torch.where(usable, cosine, math.nan))
        first = torch.where(first < 0, weight_norm, first)
        self._measured[at.rows] = torch.stack([largest, first], dim=1)
        # One of 400 weights passes by chance in the first measurement, and one of 1,700 in two.
        certain = largest <= torch.where(before < 0, MAX_COSINE / 100, MAX_COSINE / 10)
        start = torch.where(certain & (start > 0), start, first)
        invariant = (largest >= 0) & (largest <= MAX_COSINE) & (weight_norm > 0) & (start > 0)
        return torch.where(invariant, weight_norm / start, 1.0)

    def _rows(self, number: int, device: torch.device) -> Tensor:
        """What was measured of at least so many parameters."""
        self._measured = self._measured.to(device)
        if number > len(self._measured):
            more = torch.full((number - len(self._measured), 2), -1.0, device=device)
            self._measured = torch.cat([self._measured, more])
        return self._measured

    def state_dict(self, num_parameters: int) -> list[list[float]]:
        """Largest cosine and first norm of each of an optimizer's parameters; waits for the device."""
        measured: list[list[float]] = self._measured.tolist()
        return [*measured, *([-1.0, -1.0] for _ in range(num_parameters - len(measured)))]

    def load_state_dict(self, state: Sequence[Sequence[float]]) -> None:
        """Restores the state of :meth:`state_dict`; one that is not of pairs of numbers is a ValueError."""
        if not all(len(pair) == 2 and all(type(value) is float and value >= -1 for value in pair) for pair in state):
            raise ValueError(f"expected a largest cosine and a norm of each parameter, found {state!r:.80}")
        self._measured = torch.tensor(state).reshape(-1, 2)


@dataclass(frozen=True)
class _Places:
    """Where the weights of a measurement stand among all, and what is known of them; shapes (weights,)."""

    indices: list[int]
    rows: Tensor  # the same on the device
    sqrt_sizes: Tensor
    init_norms: Tensor  # 0 where unknown

    @classmethod
    def of(
        cls, weights: Sequence[Tensor], indices: Sequence[int], init_norms: Mapping[Tensor, float], device: torch.device
    ) -> "_Places":
        """Those of some weights."""
        sqrt_sizes = on_device([as_real(one).numel() ** 0.5 for one in weights], device)
        known = on_device([init_norms.get(one, 0.0) for one in weights], device)
        return cls(list(indices), on_device(indices, device).long(), sqrt_sizes, known)


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
