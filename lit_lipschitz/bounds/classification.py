"""Lipschitz constants of cross-entropy and binary cross-entropy.

The arguments that the losses share are in :mod:`lit_lipschitz.bounds.families`.

Class weights w make the cross-entropy a weighted mean. The bounds of an example of class y are then multiplied by w_y.
With weights between ``lo`` and ``hi`` the gradient norm of the batch is at most (hi + lo) / (2 sqrt(hi lo)) times that
of an unweighted mean (the converse of the Cauchy-Schwarz inequality) if K is a norm of the whole batch, and no larger
for ``norm="sample"``; the paper family has the same factor. For probabilities as targets torch divides by m instead of
the weights, and the constant does not apply.

References:
    R. Yedida, S. Saha, arXiv 1902.07399, 2019, for the paper family. Class weights and label smoothing are derived the
    same way.
"""

import math
from collections.abc import Sequence

from lit_lipschitz.bounds.families import (
    Bound,
    LossBounds,
    NormOrAuto,
    Reduction,
    WeightRange,
    batch_constant,
    check_count,
    check_fraction,
    check_not_negative,
    check_positive,
    outputwise_constant,
)


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
    """Constant of torch's softmax cross-entropy over k = ``num_classes`` classes, for targets that are classes.

    With the probabilities p and the target q = (1-s) e_y + s/k for label smoothing s in [0, 1]:

    - estimate (1-s)(k-1)/k: the largest entry of abs(p - q) at uniform outputs, where the papers evaluate it;
    - gradient norm sqrt(1 + (1-s)^2 - s^2/k), the largest norm of p - q, at p = e_j with j != y; sqrt(2) for s = 0;
    - curvature 1/2, the largest eigenvalue of diag(p) - pp'.

    Without class weights this holds for probabilities as targets too. ``class_weights`` are positive, one for each
    class; one may be 0 without label smoothing. :mod:`lit_lipschitz.bounds.classification` describes how they enter.

    Example:
        >>> round(cross_entropy(206.7, num_classes=10, batch_size=128, bound="paper"), 4)
        1.4534
    """
    check_count("num_classes", num_classes, 2)
    check_fraction("label_smoothing", label_smoothing)
    weights = _checked_weights(class_weights, num_classes, label_smoothing)
    per_example = _per_example(weights, label_smoothing, mean=reduction == "mean")
    spread = WeightRange(min(weights), max(weights)) if reduction == "mean" else None
    return batch_constant(
        per_example, activation_norm, batch_size=batch_size, bound=bound, norm=norm, reduction=reduction, weights=spread
    )


def _per_example(weights: list[float], label_smoothing: float, mean: bool) -> LossBounds:
    """Bounds of one example's cross-entropy, the largest over its class."""
    estimate = gradient_norm = curvature = 0.0
    smoothed = label_smoothing / len(weights)
    for y in {weights.index(weight) for weight in weights}:
        # The loss of an example of class y is total * logsumexp(z) - target'z.
        target = [smoothed * weight for weight in weights]
        target[y] += (1 - label_smoothing) * weights[y]
        total = sum(target)
        square = sum(entry**2 for entry in target)
        # The mean's denominator is weighted, so the bounds count in units of the example's weight.
        example_weight = weights[y] if mean else 1.0
        if example_weight == 0:
            continue
        # The gradient, total * p - target, is longest where p is the class of the smallest target.
        longest = math.sqrt(max(0.0, total**2 - 2 * total * min(target) + square))
        gradient_norm = max(gradient_norm, longest / example_weight)
        estimate = max(estimate, max(abs(total / len(weights) - entry) for entry in target) / example_weight)
        curvature = max(curvature, total / 2 / example_weight)
    return LossBounds(estimate, gradient_norm, curvature)


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
    """Constant of the binary cross-entropy with logits, averaged over examples and outputs.

    For one logit z, its sigmoid s(z), a target t between ``label_smoothing`` / 2 and 1 minus that, and the weight
    P = ``pos_weight`` of positive examples, the derivative in z is (1 - t) s - P t (1 - s):

    - estimate: its largest absolute value at z = 0, where the papers evaluate it; 1/2 without smoothing and weight, as
      in the papers' K / (2 m);
    - gradient norm: its supremum, max(P, 1)(1 - label_smoothing / 2); 1 without;
    - curvature: max(P t + 1 - t) / 4; 1/4 without.

    ``label_smoothing`` is in [0, 1]; 0 admits any targets in [0, 1]. P is positive, and the largest one if each output
    has its own.
    """
    check_fraction("label_smoothing", label_smoothing)
    check_positive("pos_weight", pos_weight)
    targets = (label_smoothing / 2, 1 - label_smoothing / 2)
    per_logit = LossBounds(
        estimate=max(abs((1 - t) - pos_weight * t) / 2 for t in targets),
        gradient_norm=max(pos_weight, 1.0) * targets[1],
        curvature=max(pos_weight * t + 1 - t for t in targets) / 4,
    )
    return outputwise_constant(
        per_logit, activation_norm, num_outputs, batch_size=batch_size, bound=bound, norm=norm, reduction=reduction
    )


def _checked_weights(weights: Sequence[float] | None, num_classes: int, label_smoothing: float) -> list[float]:
    if weights is None:
        return [1.0] * num_classes
    values = [float(weight) for weight in weights]
    if len(values) != num_classes:
        raise ValueError(f"class_weights: expected {num_classes} of them, one a class, found {len(values)}")
    for weight in values:
        check_not_negative("class_weights", weight)
    check_positive("class_weights, the largest", max(values))
    if label_smoothing > 0 and min(values) == 0:
        raise ValueError("class_weights: expected positive ones with label_smoothing, found a weight of 0")
    return values
