"""Lipschitz constants of a loss with respect to the weights of the last affine map.

Pure functions of Python floats. The size of the head's inputs (:mod:`lit_lipschitz.statistics`) comes in, the constant
comes out; its inverse is a learning rate (:mod:`lit_lipschitz.rules`).
"""

import math
from typing import Literal

Bound = Literal["paper", "strict", "smooth"]
Norm = Literal["frobenius", "sample", "unit", "spectral"]

NORMS_OF_BOUND: dict[str, tuple[Norm, ...]] = {
    "paper": ("frobenius", "sample", "unit"),
    "strict": ("frobenius", "sample"),
    "smooth": ("spectral", "frobenius", "sample"),
}
"""The norms that each family is defined for; the first one is its default."""


def resolve_norm(bound: Bound, norm: Norm | Literal["auto"] = "auto") -> Norm:
    """The norm of the head's inputs that a family of constants uses.

    Args:
        bound: Family of the constant.
        norm: A norm, or ``"auto"`` for the family's own.

    Returns:
        The norm's name.

    Raises:
        ValueError: The family or the norm is unknown, or the family gives no constant for that norm.
    """
    if bound not in NORMS_OF_BOUND:
        raise ValueError(f"bound={bound!r}: expected one of {', '.join(NORMS_OF_BOUND)}")
    allowed = NORMS_OF_BOUND[bound]
    if norm == "auto":
        return allowed[0]
    if norm not in allowed:
        raise ValueError(f"norm={norm!r}: bound={bound!r} is defined for {', '.join(allowed)}")
    return norm


def cross_entropy(
    activation_norm: float,
    *,
    num_classes: int,
    batch_size: int,
    bound: Bound = "strict",
    norm: Norm | Literal["auto"] = "auto",
    weight_decay: float = 0.0,
    weight_norm: float = 0.0,
) -> float:
    r"""Lipschitz constant of the mean softmax cross-entropy in the head's weights.

    With :math:`K` = ``activation_norm``, :math:`k` = ``num_classes``, :math:`m` = ``batch_size``, :math:`\lambda` =
    ``weight_decay`` and :math:`W` = ``weight_norm``:

    ========= =========== ============================================ =====================================
    ``bound`` ``norm``    constant                                     what it bounds
    ========= =========== ============================================ =====================================
    paper     any         :math:`\frac{k-1}{km} K + \lambda W`         the papers' estimate of the gradient's
                                                                       norm, exact at uniform outputs; not a
                                                                       bound
    strict    frobenius   :math:`\sqrt{2/m}\,K + \lambda W`            the gradient's norm, always
    strict    sample      :math:`\sqrt{2}\,K + \lambda W`              the gradient's norm, always
    smooth    spectral,   :math:`\frac{K^2}{2m} + \lambda`             the Hessian's largest eigenvalue
              frobenius
    smooth    sample      :math:`\frac{K^2}{2} + \lambda`              the Hessian's largest eigenvalue
    ========= =========== ============================================ =====================================

    The strict and the smooth family hold for inputs that carry a 1 for the bias where the head has one. The strict
    constant rests on :math:`\|p - y\| \le \sqrt 2`, the smooth one on :math:`\lambda_{max}(diag(p) - pp') \le 1/2`.

    Args:
        activation_norm: Size of the head's inputs in one optimizer step, in the units of one activation. For
            ``frobenius`` and ``spectral`` of the whole matrix of shape (batch_size, width), for ``sample`` the largest
            Euclidean norm of a row, for ``unit`` the largest entry.
        num_classes: Outputs of the head, at least 2.
        batch_size: Examples that the loss averages over in one optimizer step: micro-batch x accumulation x ranks.
        bound: Family of the constant.
        norm: What ``activation_norm`` measures; ``"auto"`` is the family's own norm.
        weight_decay: Coefficient of ``0.5 * norm(w)^2`` in the loss (coupled weight decay).
        weight_norm: Largest Euclidean norm of a decayed parameter tensor.

    Returns:
        The constant, in units of loss per unit of weight (per squared unit for ``smooth``).

    Raises:
        ValueError: An argument is out of its range, or the family is not defined for the norm.

    Example:
        >>> round(cross_entropy(206.7, num_classes=10, batch_size=128, bound="paper"), 4)
        1.4534

    References:
        R. Yedida, S. Saha: A novel adaptive learning rate scheduler for deep neural networks, arXiv 1902.07399, 2019
        (the paper family); the strict and the smooth constants follow from the two inequalities above.
    """
    norm = resolve_norm(bound, norm)
    _check_range("activation_norm", activation_norm, 0.0)
    _check_range("num_classes", num_classes, 2)
    _check_range("batch_size", batch_size, 1)
    _check_range("weight_decay", weight_decay, 0.0)
    _check_range("weight_norm", weight_norm, 0.0)
    if bound == "paper":
        scale = (num_classes - 1) / (num_classes * batch_size)
        return scale * activation_norm + weight_decay * weight_norm
    # Both rigorous families see the batch as the mean over its examples.
    size = activation_norm if norm == "sample" else activation_norm / math.sqrt(batch_size)
    if bound == "strict":
        return math.sqrt(2.0) * size + weight_decay * weight_norm
    return size**2 / 2 + weight_decay


def _check_range(name: str, value: float, least: float) -> None:
    if not (math.isfinite(value) and value >= least):
        raise ValueError(f"{name}={value!r}: expected a finite number of at least {least}")
