r"""Lipschitz constants of a loss with respect to the weights of the last affine map.

Pure functions of Python numbers. The size of the head's inputs comes in, the constant
comes out; its inverse is a learning rate (:mod:`lit_lipschitz.rules.registry`).

What a loss contributes are three numbers of one example (or token, or pixel), suprema over everything that the head
can put out: an estimate of the loss's slope in the outputs, a bound of it, and a bound of its curvature. What the batch
contributes is the size K of the head's inputs and the number m of examples that the loss averages over. With these,
each family of constants is the same for all losses:

========== ============ ============================== =========================================================
``bound``  ``norm``     constant                       what it bounds
========== ============ ============================== =========================================================
paper      any          estimate * K / m               the papers' estimate of the gradient's norm; not a bound
strict     frobenius    slope * K / sqrt(m)            the gradient's norm, always
strict     sample       slope * K                      the gradient's norm, always
smooth     spectral,    curvature * K**2 / m           the largest eigenvalue of the Hessian
           frobenius
smooth     sample       curvature * K**2               the largest eigenvalue of the Hessian
========== ============ ============================== =========================================================

The strict and the smooth family hold for inputs that carry a 1 for the bias where the head has one. K is, for
``frobenius`` and ``spectral``, a norm of the whole matrix of inputs, shape (m, width); for ``sample`` the largest
Euclidean norm of a row, for ``unit`` the largest entry. The constants are in units of loss per unit of weight, the
smooth ones per squared unit. Terms of the loss that depend on the weights alone (:func:`l2`, :func:`tikhonov`) are
added.

References:
    R. Yedida, S. Saha: A novel adaptive learning rate scheduler for deep neural networks, arXiv 1902.07399, 2019, for
    the papers' estimates of cross-entropy, binary cross-entropy and least squares; S. Saha et al.: LALR, arXiv
    2006.13307, 2020, for mean absolute error and the quantile loss. The strict and the smooth constants follow from
    the inequality that each function names.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Bound = Literal["paper", "strict", "smooth"]
Norm = Literal["frobenius", "sample", "unit", "spectral"]
NormOrAuto = Norm | Literal["auto"]
Reduction = Literal["mean", "sum"]

NORMS_OF_BOUND: dict[str, tuple[Norm, ...]] = {
    "paper": ("frobenius", "sample", "unit"),
    "strict": ("frobenius", "sample"),
    "smooth": ("spectral", "frobenius", "sample"),
}
"""The norms that each family is defined for; the first one is its default."""


def resolve_norm(bound: Bound, norm: NormOrAuto = "auto") -> Norm:
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


# -- losses, by what they average over the batch -----------------------------------------------------------------------


def cross_entropy(
    activation_norm: float,
    *,
    num_classes: int,
    batch_size: int,
    bound: Bound = "strict",
    norm: NormOrAuto = "auto",
    label_smoothing: float = 0.0,
    class_weights: Sequence[float] | None = None,
    reduction: Reduction = "mean",
) -> float:
    r"""Constant of the softmax cross-entropy over k classes, for targets that are classes, as torch defines it.

    With the probabilities p, the target q = (1-s) e_y + s/k for label smoothing s, and no class weights:

    - estimate (1-s)(k-1)/k: the largest entry of abs(p - q) at uniform outputs, which is where the papers evaluate it;
    - slope sqrt(1 + (1-s)^2 - s^2/k), the largest norm of p - q, at p = e_j with j != y; sqrt(2) without smoothing;
    - curvature 1/2, the largest eigenvalue of diag(p) - pp'.

    Class weights w make the loss a weighted mean. An example of class y then has the slope of w_y, and a batch in which
    the weights lie between ``lo`` and ``hi`` is at most (hi + lo) / (2 sqrt(hi lo)) times as steep as an unweighted one
    (the converse of the Cauchy-Schwarz inequality) where K is a norm of the whole batch, and no steeper for ``sample``;
    the paper family has the same factor. Without weights everything holds for probabilities as targets too; with them
    torch divides by m there, not by the weights, and this function is not for it.

    Args:
        activation_norm: K, not negative.
        num_classes: k, outputs of the head, at least 2.
        batch_size: m, examples in the loss, at least 1.
        bound: Family of the constant.
        norm: What K measures; ``"auto"`` is the family's own norm.
        label_smoothing: s, in [0, 1].
        class_weights: One positive weight a class, or None. A weight may be 0 without label smoothing.
        reduction: ``"mean"``, or ``"sum"``, which is not divided by m.

    Returns:
        The constant.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> round(cross_entropy(206.7, num_classes=10, batch_size=128, bound="paper"), 4)
        1.4534

    References:
        See the module. Class weights and label smoothing are not in the papers: derived the same way.
    """
    _check_count("num_classes", num_classes, 2)
    _check_share("label_smoothing", label_smoothing)
    weights = [1.0] * num_classes if class_weights is None else _checked_weights(class_weights, num_classes)
    if label_smoothing > 0 and min(weights) == 0:
        raise ValueError("class_weights: expected positive ones with label_smoothing, found a weight of 0")
    estimate = slope = curvature = 0.0
    share = label_smoothing / num_classes
    for y in {weights.index(weight) for weight in weights}:
        # The loss of an example of class y is total * logsumexp(z) - target'z.
        target = [share * weight for weight in weights]
        target[y] += (1 - label_smoothing) * weights[y]
        total = sum(target)
        square = sum(entry**2 for entry in target)
        # Its slope, total * p - target, is longest where p is the class of the smallest target; the mean's denominator
        # is weighted, so it counts in units of the example's weight.
        unit = weights[y] if reduction == "mean" else 1.0
        if unit == 0:
            continue
        slope = max(slope, math.sqrt(max(0.0, total**2 - 2 * total * min(target) + square)) / unit)
        estimate = max(estimate, max(abs(total / num_classes - entry) for entry in target) / unit)
        curvature = max(curvature, total / 2 / unit)
    spread = _Spread(min(weights), max(weights)) if reduction == "mean" else _Spread(1.0, 1.0)
    return _constant(activation_norm, batch_size, bound, norm, reduction, (estimate, slope, curvature), spread)


def binary_cross_entropy(
    activation_norm: float,
    *,
    batch_size: int,
    num_outputs: int = 1,
    bound: Bound = "strict",
    norm: NormOrAuto = "auto",
    label_smoothing: float = 0.0,
    pos_weight: float = 1.0,
    reduction: Reduction = "mean",
) -> float:
    r"""Constant of the binary cross-entropy with logits, averaged over examples and outputs.

    For one logit z, the probability s(z) of the sigmoid, a target t between ``label_smoothing`` / 2 and 1 minus that,
    and the weight P = ``pos_weight`` of positive examples, the slope is (1 - t) s - P t (1 - s):

    - estimate: its largest size at z = 0, where the papers evaluate it; 1/2 without smoothing and weight;
    - slope: its supremum, max(P, 1)(1 - label_smoothing / 2); 1 without;
    - curvature: max(P t + 1 - t) / 4; 1/4 without.

    Args:
        activation_norm: K, not negative.
        batch_size: m, examples in the loss, at least 1.
        num_outputs: n, logits of one example, over which the loss averages too: the slope of one is divided by sqrt(n),
            estimate and curvature by n.
        bound: Family of the constant.
        norm: What K measures; ``"auto"`` is the family's own norm.
        label_smoothing: How far targets are kept from 0 and 1, in [0, 1]; 0 admits soft targets of any kind.
        pos_weight: P, positive.
        reduction: ``"mean"``, or ``"sum"``, which is divided by neither m nor n.

    Returns:
        The constant.

    Raises:
        ValueError: An argument is out of its range.

    References:
        See the module: K / (2 m) is the papers'.
    """
    _check_share("label_smoothing", label_smoothing)
    _check_positive("pos_weight", pos_weight)
    targets = (label_smoothing / 2, 1 - label_smoothing / 2)
    estimate = max(abs((1 - t) - pos_weight * t) / 2 for t in targets)
    slope = max(pos_weight, 1.0) * targets[1]
    curvature = max(pos_weight * t + 1 - t for t in targets) / 4
    return _outputwise(activation_norm, batch_size, bound, norm, reduction, num_outputs, (estimate, slope, curvature))


def mean_squared_error(
    activation_norm: float,
    *,
    batch_size: int,
    output_norm: float | None = None,
    target_norm: float | None = None,
    num_outputs: int = 1,
    half: bool = False,
    bound: Bound = "strict",
    norm: NormOrAuto = "auto",
    reduction: Reduction = "mean",
) -> float:
    r"""Constant of least squares: torch's mean of squares, or the papers' half of the mean over the examples.

    The loss has no bounded slope, so that of bounded outputs is taken: with Z and Y the (m, n) matrices of outputs and
    targets and R their difference, the gradient is 2/(mn) R'A, no longer than 2/(mn) (norm(Z) + norm(Y)) norm(A). This
    is the papers' formula, and with ``frobenius`` and a head without a bias it is the strict one too. The Hessian is
    2/(mn) A'A whatever the outputs: curvature 2/n. Half of both with ``half``, and no n.

    Args:
        activation_norm: K, not negative.
        batch_size: m, examples in the loss, at least 1.
        output_norm: A bound of the outputs' size, in the same norm as K: for ``frobenius`` that of the matrix (m, n),
            for ``sample`` the largest norm of a row, for ``unit`` the largest entry. Not used by the smooth family.
            Where a bound of the difference is known, pass it here and a ``target_norm`` of 0.
        target_norm: The targets' size, likewise.
        num_outputs: n, outputs of one example.
        half: The papers' loss, sum of squares over 2m, in place of torch's ``mse_loss``, sum of squares over mn.
        bound: Family of the constant.
        norm: What K measures; ``"auto"`` is the family's own norm.
        reduction: ``"mean"``, or ``"sum"``, the sum of squares (half of it with ``half``).

    Returns:
        The constant.

    Raises:
        ValueError: An argument is out of its range, or a norm is missing that the family needs.

    References:
        See the module: (K_a + norm(y)) K / m is the papers', for ``half``.
    """
    _check_count("batch_size", batch_size, 1)
    _check_count("num_outputs", num_outputs, 1)
    factor = 1.0 if half else 2.0 if reduction == "sum" else 2.0 / num_outputs
    if bound == "smooth":
        return _constant(activation_norm, batch_size, bound, norm, reduction, (0.0, 0.0, factor))
    if output_norm is None or target_norm is None:
        raise ValueError(
            f"bound={bound!r} of a squared error needs bounded outputs: expected output_norm and target_norm, found "
            f"{output_norm} and {target_norm}"
        )
    _check_range("output_norm", output_norm, 0.0)
    _check_range("target_norm", target_norm, 0.0)
    residual = output_norm + target_norm
    # A norm of the whole batch of residuals already holds the sqrt(m) by which the families divide K once more.
    per_example = residual if resolve_norm(bound, norm) == "sample" or bound == "paper" else residual / batch_size**0.5
    slope = factor * per_example
    return _constant(activation_norm, batch_size, bound, norm, reduction, (slope, slope, 0.0))


def mean_absolute_error(
    activation_norm: float,
    *,
    batch_size: int,
    num_outputs: int = 1,
    bound: Bound = "strict",
    norm: NormOrAuto = "auto",
    reduction: Reduction = "mean",
) -> float:
    """Constant of the mean absolute error (torch's ``l1_loss``), whose slope is a sign: estimate and slope 1.

    Args:
        activation_norm: K, not negative.
        batch_size: m, examples in the loss, at least 1.
        num_outputs: n, outputs of one example, over which the loss averages too.
        bound: Family of the constant; not ``"smooth"``, since the slope jumps.
        norm: What K measures; ``"auto"`` is the family's own norm.
        reduction: ``"mean"``, or ``"sum"``, which is divided by neither m nor n.

    Returns:
        The constant.

    Raises:
        ValueError: An argument is out of its range.

    References:
        See the module: K / m is the papers'.
    """
    _check_not_smooth("the mean absolute error", bound)
    return _outputwise(activation_norm, batch_size, bound, norm, reduction, num_outputs, (1.0, 1.0, 0.0))


def quantile(
    activation_norm: float,
    *,
    level: float,
    batch_size: int,
    num_outputs: int = 1,
    bound: Bound = "strict",
    norm: NormOrAuto = "auto",
    reduction: Reduction = "mean",
) -> float:
    """Constant of the quantile (pinball) loss, max(level r, (level - 1) r) of r = target - output.

    Args:
        activation_norm: K, not negative.
        level: The quantile, in (0, 1): estimate and slope are max(level, 1 - level).
        batch_size: m, examples in the loss, at least 1.
        num_outputs: n, outputs of one example, over which the loss averages too.
        bound: Family of the constant; not ``"smooth"``, since the slope jumps.
        norm: What K measures; ``"auto"`` is the family's own norm.
        reduction: ``"mean"``, or ``"sum"``, which is divided by neither m nor n.

    Returns:
        The constant.

    Raises:
        ValueError: An argument is out of its range.

    References:
        See the module. The papers print none: derived as for the mean absolute error, to which 0.5 is half.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level!r}: expected a quantile in (0, 1), without its ends")
    _check_not_smooth("the quantile loss", bound)
    slope = max(level, 1 - level)
    return _outputwise(activation_norm, batch_size, bound, norm, reduction, num_outputs, (slope, slope, 0.0))


def huber(
    activation_norm: float,
    *,
    batch_size: int,
    delta: float = 1.0,
    num_outputs: int = 1,
    bound: Bound = "strict",
    norm: NormOrAuto = "auto",
    reduction: Reduction = "mean",
) -> float:
    """Constant of torch's ``huber_loss``: half of the square up to ``delta``, linear beyond; curvature 1.

    Args:
        activation_norm: K, not negative.
        batch_size: m, examples in the loss, at least 1.
        delta: Where the loss becomes linear, positive: estimate and slope.
        num_outputs: n, outputs of one example, over which the loss averages too.
        bound: Family of the constant.
        norm: What K measures; ``"auto"`` is the family's own norm.
        reduction: ``"mean"``, or ``"sum"``, which is divided by neither m nor n.

    Returns:
        The constant.

    Raises:
        ValueError: An argument is out of its range.

    References:
        See the module. The papers print none: derived as for the mean absolute error.
    """
    _check_positive("delta", delta)
    return _outputwise(activation_norm, batch_size, bound, norm, reduction, num_outputs, (delta, delta, 1.0))


def smooth_l1(
    activation_norm: float,
    *,
    batch_size: int,
    beta: float = 1.0,
    num_outputs: int = 1,
    bound: Bound = "strict",
    norm: NormOrAuto = "auto",
    reduction: Reduction = "mean",
) -> float:
    """Constant of torch's ``smooth_l1_loss``, the Huber loss of delta = ``beta`` over ``beta``.

    Estimate and slope are 1, the curvature is 1 / beta. Arguments other than ``beta``, result and errors are those of
    :func:`huber`; ``beta`` is positive.
    """
    _check_positive("beta", beta)
    return _outputwise(activation_norm, batch_size, bound, norm, reduction, num_outputs, (1.0, 1.0, 1.0 / beta))


# -- terms of the weights alone ----------------------------------------------------------------------------------------


def l2(weight_decay: float, weight_norm: float, *, bound: Bound = "strict") -> float:
    """What a term ``weight_decay / 2 * norm(w)^2`` of the loss adds to its constant.

    Args:
        weight_decay: The coefficient, as in torch's optimizers where they add it to the gradient; not negative.
        weight_norm: Bound of norm(w), not negative; the papers take the largest norm of a weight tensor.
        bound: Family of the constant that it is added to.

    Returns:
        weight_decay * weight_norm; for ``"smooth"`` weight_decay.

    Raises:
        ValueError: An argument is negative or not finite.

    References:
        R. Yedida, S. Saha, arXiv 1902.07399, section on regularization.
    """
    resolve_norm(bound)
    _check_range("weight_decay", weight_decay, 0.0)
    _check_range("weight_norm", weight_norm, 0.0)
    return weight_decay if bound == "smooth" else weight_decay * weight_norm


def tikhonov(gamma_norm: float, weight_norm: float, *, bound: Bound = "strict") -> float:
    """What a term ``norm(Gamma w)^2`` of the loss adds to its constant.

    Args:
        gamma_norm: Norm of Gamma'Gamma (of Gamma squared, where Gamma is symmetric), not negative: the spectral norm,
            or any larger one.
        weight_norm: Bound of norm(w), not negative.
        bound: Family of the constant that it is added to.

    Returns:
        2 * gamma_norm * weight_norm; for ``"smooth"`` 2 * gamma_norm.

    Raises:
        ValueError: An argument is negative or not finite.

    References:
        R. Yedida, S. Saha, arXiv 1902.07399, section on regularization.
    """
    resolve_norm(bound)
    _check_range("gamma_norm", gamma_norm, 0.0)
    _check_range("weight_norm", weight_norm, 0.0)
    return 2 * gamma_norm if bound == "smooth" else 2 * gamma_norm * weight_norm


Estimate = Literal["constant", "text", "scripts"]


def squared(
    data: float, l2: float = 0.0, *, estimate: Estimate = "constant", activation_norm: float = 1.0, squares: float = 0.0
) -> float:
    """An estimate of the squared constant, for the rules of RMSprop and Adam.

    With D the constant of the data, R that of the L2 term, L = D + R, and D = c K:

    - ``constant``: L^2;
    - ``text``: c^2 K^2 + R^2, as the paper writes it;
    - ``scripts``: c^2 S + 2 R c K, as the authors' scripts compute it, S being the Frobenius norm of the matrix of
      squared activations, the largest over the batches. S is far below K^2, the sum of its entries.

    Args:
        data: D, not negative.
        l2: R, not negative.
        estimate: Which one.
        activation_norm: K, positive; for ``scripts``.
        squares: S, not negative; for ``scripts``.

    Returns:
        The estimate.

    Raises:
        ValueError: An argument is out of its range.

    References:
        R. Yedida, S. Saha, arXiv 1902.07399, section on RMSprop, and the scripts published with it.
    """
    for name, value in (("data", data), ("l2", l2), ("squares", squares)):
        _check_range(name, value, 0.0)
    _check_positive("activation_norm", activation_norm)
    if estimate == "constant":
        return (data + l2) ** 2
    if estimate == "text":
        return data**2 + l2**2
    if estimate == "scripts":
        return (data / activation_norm) ** 2 * squares + 2 * l2 * data
    raise ValueError(f"estimate={estimate!r}: expected one of constant, text, scripts")


# -- from one example to the batch -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Spread:
    """By how much a weighted mean over a batch can be steeper than a mean, for weights between two numbers."""

    lowest: float
    highest: float

    def of_slope(self, batch_size: int) -> float:
        """Largest sqrt(m) norm(w) / sum(w)."""
        most = math.sqrt(batch_size)
        if self.lowest == 0:
            return most
        return min(most, (self.highest + self.lowest) / (2 * math.sqrt(self.highest * self.lowest)))

    def of_curvature(self, batch_size: int) -> float:
        """Largest m max(w) / sum(w)."""
        return batch_size * self.highest / (self.highest + (batch_size - 1) * self.lowest)


def _constant(
    activation_norm: float,
    batch_size: int,
    bound: Bound,
    norm: NormOrAuto,
    reduction: Reduction,
    example: tuple[float, float, float],
    spread: _Spread | None = None,
) -> float:
    """The table of the module's docstring; ``example`` is (estimate, slope, curvature) in the outputs."""
    norm = resolve_norm(bound, norm)
    _check_range("activation_norm", activation_norm, 0.0)
    _check_count("batch_size", batch_size, 1)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: expected 'mean' or 'sum', one number for the batch")
    estimate, slope, curvature = example
    whole_batch = norm in ("frobenius", "spectral")
    if spread is not None and whole_batch:
        estimate *= spread.of_slope(batch_size)
        slope *= spread.of_slope(batch_size)
        curvature *= spread.of_curvature(batch_size)
    if bound == "paper":
        constant = estimate * activation_norm / batch_size
    else:
        # Both rigorous families see the batch as the mean over its examples.
        size = activation_norm / math.sqrt(batch_size) if whole_batch else activation_norm
        constant = slope * size if bound == "strict" else curvature * size**2
    return constant * batch_size if reduction == "sum" else constant


def _outputwise(
    activation_norm: float,
    batch_size: int,
    bound: Bound,
    norm: NormOrAuto,
    reduction: Reduction,
    num_outputs: int,
    output: tuple[float, float, float],
) -> float:
    """For losses that are a mean over the outputs of an example too; ``output`` is of one output."""
    _check_count("num_outputs", num_outputs, 1)
    estimate, slope, curvature = output
    slope *= math.sqrt(num_outputs)  # of all outputs together
    if reduction == "mean":
        estimate, slope, curvature = (value / num_outputs for value in (estimate, slope, curvature))
    return _constant(activation_norm, batch_size, bound, norm, reduction, (estimate, slope, curvature))


# -- checks ------------------------------------------------------------------------------------------------------------


def _checked_weights(weights: Sequence[float], num_classes: int) -> list[float]:
    values = [float(weight) for weight in weights]
    if len(values) != num_classes:
        raise ValueError(f"class_weights: expected {num_classes} of them, one a class, found {len(values)}")
    for weight in values:
        _check_range("class_weights", weight, 0.0)
    _check_positive("class_weights, the largest", max(values))
    return values


def _check_not_smooth(loss: str, bound: Bound) -> None:
    if bound == "smooth":
        raise ValueError(
            f"bound='smooth': {loss} has a gradient that jumps, so no such constant; expected paper, strict"
        )


def _check_range(name: str, value: float, least: float) -> None:
    if not (math.isfinite(value) and value >= least):
        raise ValueError(f"{name}={value!r}: expected a finite number of at least {least}")


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r}: expected a positive finite number")


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r}: expected a number from 0 to 1")


def _check_count(name: str, value: int, least: int) -> None:
    if not (math.isfinite(value) and value == int(value) and value >= least):
        raise ValueError(f"{name}={value!r}: expected a whole number of at least {least}")
