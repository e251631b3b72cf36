r"""The three families of Lipschitz constants, and how the bounds of one example become the constant of a batch.

A constant bounds a derivative of the loss with respect to the weights of the output layer (head), and its inverse is a
learning rate (``lit_lipschitz.rules``).

A loss contributes three numbers of one example, token or pixel (:class:`LossBounds`): an estimate of the gradient norm
in the outputs, a bound of it, and a bound of the curvature. The batch contributes the norm K of the head's inputs and
the number m of examples that the loss averages over. Each family then has the same formula for all losses:

========== ============ ============================== =========================================================
``bound``  ``norm``     constant                       what it bounds
========== ============ ============================== =========================================================
paper      any          estimate * K / m               the papers' estimate of the gradient norm; not a bound
strict     frobenius    gradient_norm * K / sqrt(m)    the gradient norm, always
strict     sample       gradient_norm * K              the gradient norm, always
smooth     spectral,    curvature * K**2 / m           the largest eigenvalue of the Hessian
           frobenius
smooth     sample       curvature * K**2               the largest eigenvalue of the Hessian
========== ============ ============================== =========================================================

K is a norm of the matrix of inputs, shape (m, width), for ``frobenius`` and ``spectral``, and the largest Euclidean
norm of a row for ``sample``. If the head has a bias, ``strict`` and ``smooth`` hold for inputs with a column of ones
appended. Constants are in units of loss per unit of weight, those of ``smooth`` per squared unit. A penalty on the
weights adds its own constant (:func:`lit_lipschitz.bounds.l2`).

The losses share these arguments, return the constant, and raise ValueError if an argument is out of its range:

- ``activation_norm``: K, not negative;
- ``batch_size``: m, examples in the loss, at least 1;
- ``num_outputs``: n, outputs of one example, at least 1, if a mean is over the outputs too;
- ``bound``: family of the constant;
- ``norm``: what K measures; ``"auto"`` is the default of the family;
- ``reduction``: ``"mean"``, or ``"sum"``, which is divided by neither m nor n.

References:
    R. Yedida, S. Saha: A novel adaptive learning rate scheduler for deep neural networks, arXiv 1902.07399, 2019, for
    the papers' estimates of cross-entropy, binary cross-entropy and least squares; S. Saha et al.: LALR, arXiv
    2006.13307, 2020, for mean absolute error. The other constants follow from the inequality that each function names.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

Bound = Literal["paper", "strict", "smooth"]
Norm = Literal["frobenius", "sample", "spectral"]
NormOrAuto = Literal["auto", Norm]
Reduction = Literal["mean", "sum"]

NORMS_OF_BOUND: dict[Bound, tuple[Norm, ...]] = {
    "paper": ("frobenius", "sample"),
    "strict": ("frobenius", "sample"),
    "smooth": ("spectral", "frobenius", "sample"),
}
"""The norms that each family is defined for; the first one is its default."""


class LossBounds(NamedTuple):
    """What a loss contributes to a constant, for one example or one output.

    ``estimate`` is the papers' estimate of the gradient norm in the outputs, ``gradient_norm`` the norm's supremum over
    all outputs, and ``curvature`` that of the Hessian's largest eigenvalue, not used without a smooth constant.
    """

    estimate: float
    gradient_norm: float
    curvature: float


@dataclass(frozen=True)
class WeightRange:
    """Range of the examples' weights in a weighted mean, which may be steeper than an unweighted one."""

    lowest: float
    highest: float

    def gradient_factor(self, batch_size: int) -> float:
        """Largest sqrt(m) norm(w) / sum(w)."""
        most = math.sqrt(batch_size)
        if self.lowest == 0:
            return most
        return min(most, (self.highest + self.lowest) / (2 * math.sqrt(self.highest * self.lowest)))

    def curvature_factor(self, batch_size: int) -> float:
        """Largest m max(w) / sum(w)."""
        return batch_size * self.highest / (self.highest + (batch_size - 1) * self.lowest)


def resolve_norm(bound: Bound, norm: NormOrAuto = "auto") -> Norm:
    """The norm of the head's inputs that a family uses, its default for ``"auto"``.

    Raises:
        ValueError: The family or the norm is unknown, or the family is not defined for the norm.
    """
    if bound not in NORMS_OF_BOUND:
        raise ValueError(f"bound={bound!r}: expected one of {', '.join(NORMS_OF_BOUND)}")
    allowed = NORMS_OF_BOUND[bound]
    if norm == "auto":
        return allowed[0]
    if norm not in allowed:
        raise ValueError(f"norm={norm!r}: expected {' or '.join(allowed)} with bound={bound!r}")
    return norm


def batch_constant(
    per_example: LossBounds,
    activation_norm: float,
    *,
    batch_size: int,
    bound: Bound,
    norm: NormOrAuto,
    reduction: Reduction,
    weights: WeightRange | None = None,
) -> float:
    """Constant of a loss that is a mean or a sum over the examples, by the table of this module.

    ``per_example`` are the bounds of one example's loss, ``weights`` is the range of the weights in a weighted mean.
    """
    norm = resolve_norm(bound, norm)
    check_not_negative("activation_norm", activation_norm)
    check_count("batch_size", batch_size, 1)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: expected 'mean' or 'sum', one number for the batch")
    estimate, gradient_norm, curvature = per_example
    whole_batch = norm != "sample"
    if weights is not None and whole_batch:
        estimate *= weights.gradient_factor(batch_size)
        gradient_norm *= weights.gradient_factor(batch_size)
        curvature *= weights.curvature_factor(batch_size)
    if bound == "paper":
        constant = estimate * activation_norm / batch_size
    else:
        # Both rigorous families see the batch as the mean over its examples.
        size = activation_norm / math.sqrt(batch_size) if whole_batch else activation_norm
        constant = gradient_norm * size if bound == "strict" else curvature * size**2
    return constant * batch_size if reduction == "sum" else constant


def outputwise_constant(
    per_output: LossBounds,
    activation_norm: float,
    num_outputs: int,
    *,
    batch_size: int,
    bound: Bound,
    norm: NormOrAuto,
    reduction: Reduction,
) -> float:
    """Constant of a loss that is a mean or a sum over examples and outputs, each output having a loss of its own.

    ``per_output`` are the bounds of the loss of one output. In a mean the gradient norm is divided by sqrt(n), estimate
    and curvature by n.
    """
    check_count("num_outputs", num_outputs, 1)
    estimate, gradient_norm, curvature = per_output
    gradient_norm *= math.sqrt(num_outputs)  # of all outputs together
    if reduction == "mean":
        estimate, gradient_norm, curvature = (value / num_outputs for value in (estimate, gradient_norm, curvature))
    per_example = LossBounds(estimate, gradient_norm, curvature)
    return batch_constant(
        per_example, activation_norm, batch_size=batch_size, bound=bound, norm=norm, reduction=reduction
    )


def check_not_smooth(loss: str, bound: Bound) -> None:
    """Raises ValueError for the smooth constant of a loss whose gradient is discontinuous."""
    if bound == "smooth":
        raise ValueError(
            f"bound='smooth': the gradient of {loss} is discontinuous, so its Hessian has no bound; expected paper "
            "or strict"
        )


def check_not_negative(name: str, value: float) -> None:
    """Raises ValueError unless a number is finite and not negative."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}={value!r}: expected a finite number of at least 0")


def check_positive(name: str, value: float) -> None:
    """Raises ValueError unless a number is finite and positive."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r}: expected a positive finite number")


def check_fraction(name: str, value: float) -> None:
    """Raises ValueError unless a number is in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r}: expected a number from 0 to 1")


def check_count(name: str, value: int, least: int) -> None:
    """Raises ValueError unless a number is whole and not below ``least``."""
    if not (math.isfinite(value) and value == int(value) and value >= least):
        raise ValueError(f"{name}={value!r}: expected a whole number of at least {least}")
