"""Estimates the gradient noise scale, the batch size beyond which a larger one no longer pays, from a few gradients."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, stdev

import torch
from torch import Tensor

CONFIDENCE = 0.95
"""Probability that the interval of a :class:`NoiseScale` is for."""


@dataclass(frozen=True)
class NoiseScale:
    r"""The gradient noise scale :math:`tr(\Sigma) / |G|^2` in examples, and what it is estimated from.

    Attributes:
        value: The estimate; None where ``grad_square`` is not positive, so that the batches only give a lower limit.
        low: Lower end of a confidence interval (:data:`CONFIDENCE`).
        high: Upper end; infinity where the batches are too few to separate G from noise.
        grad_square: Unbiased estimate of :math:`|G|^2`, the squared norm of the expected gradient; may be negative.
        covariance_trace: Unbiased estimate of :math:`tr(\Sigma)`, with the covariance of one example's gradient.
    """

    value: float | None
    low: float
    high: float
    grad_square: float
    covariance_trace: float


def gram_matrix(gradients: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """The inner products of gradients, each given by its real parts on the CPU, where None is zero; shape (k, k)."""
    gram = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for parts in zip(*gradients, strict=True):
        like = next((part for part in parts if part is not None), None)
        if like is not None:
            rows = torch.stack([torch.zeros_like(like) if part is None else part for part in parts]).flatten(1)
            gram += (rows @ rows.mT).double()
    return gram


def noise_scale(gram: Tensor, sizes: Sequence[int]) -> NoiseScale:
    r"""The noise scale from the gradients of k independent batches of a mean loss.

    The gradient of a batch of b examples has the expected square :math:`|G|^2 + tr(\Sigma) / b`. The squares of single
    batches and of the mean over all of them are two such equations. The interval is that of the jackknife, which leaves
    one batch out at a time, for :math:`|G|^2 / tr(\Sigma)`, with Student's t; with fewer than 3 batches it is
    everything.

    Args:
        gram: Inner products of the batches' gradients; shape (k, k).
        sizes: Number of examples of each batch.

    Raises:
        ValueError: There are fewer than 2 batches.

    References:
        S. McCandlish, J. Kaplan, D. Amodei and others: An Empirical Model of Large-Batch Training, arXiv 1812.06162,
        2018, appendix A.1. B. Efron, C. Stein: The Jackknife Estimate of Variance, Annals of Statistics 9, 1981.
    """
    count = len(sizes)
    if count < 2:
        raise ValueError(f"expected at least 2 batches, found {count}")
    grad_square, trace = _moments(gram, sizes)
    value = max(trace, 0.0) / grad_square if grad_square > 0 else None
    if trace <= 0:  # the batches are equal
        return NoiseScale(value, 0.0, 0.0 if value is not None else math.inf, grad_square, trace)
    inverse = grad_square / trace
    error = math.inf
    if count > 2:
        others = [[j for j in range(count) if j != i] for i in range(count)]
        parts = [_moments(gram[kept][:, kept], [sizes[j] for j in kept]) for kept in others]
        left = [square / max(noise, sys.float_info.min) for square, noise in parts]
        error = _student_t(count - 1) * (count - 1) / math.sqrt(count) * stdev(left)
    high, low = (1 / end if end > 0 else math.inf for end in (inverse - error, inverse + error))
    return NoiseScale(value, low, high, grad_square, trace)


def _moments(gram: Tensor, sizes: Sequence[int]) -> tuple[float, float]:
    """Unbiased estimates of |G|^2 and tr(Sigma); batches may differ in size."""
    counts = torch.tensor(sizes, dtype=torch.float64)
    weights = counts / counts.sum()
    of_mean = (weights @ gram @ weights).item()
    of_batches = gram.diagonal().mean().item()
    trace = (of_batches - of_mean) / ((1 / counts).mean() - 1 / counts.sum()).item()
    return of_mean - trace / counts.sum().item(), trace


def _student_t(freedom: int) -> float:
    """Two-sided quantile of Student's t, by the Cornish-Fisher expansion (Abramowitz and Stegun, 26.7.5)."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms))
