r"""Lipschitz constants of regression losses: squared and absolute error, quantile, Huber and smooth L1.

The squared error alone has no bounded gradient norm in the outputs. With Z and Y the (m, n) matrices of outputs and
targets, R their difference and A the inputs, the gradient of torch's ``mse_loss`` is 2/(mn) R'A, no longer than
2/(mn) (norm(Z) + norm(Y)) norm(A). This is the papers' formula, and with ``norm="frobenius"`` and a head without a bias
it is the strict constant too. The Hessian is 2/(mn) A'A whatever the outputs.

References:
    R. Yedida, S. Saha, arXiv 1902.07399, 2019, for the squared error: (K_a + norm(y)) K / m of half the mean over the
    examples.
"""

from lit_lipschitz.bounds.families import (
    Bound,
    LossBounds,
    NormOrAuto,
    Reduction,
    batch_constant,
    check_at_least,
    check_count,
    check_not_smooth,
    check_positive,
    outputwise_constant,
    resolve_norm,
)


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
    """Constant of least squares: torch's ``mse_loss``, or the papers' half of the mean over the examples.

    The gradient norm is not bounded over all outputs, so the constant is that of bounded outputs, as
    :mod:`lit_lipschitz.bounds.regression` derives. The curvature is 2/n, with ``half`` 1.

    Args:
        activation_norm: K, not negative.
        batch_size: m, examples in the loss, at least 1.
        output_norm: A bound of the outputs' norm, in the same norm as K: for ``frobenius`` that of the matrix (m, n),
            for ``sample`` the largest norm of a row. Not used by the smooth family. A known bound of the difference can
            be passed here, with a ``target_norm`` of 0.
        target_norm: The targets' norm, likewise.
        num_outputs: n, outputs of one example.
        half: The papers' loss, sum of squares over 2m, instead of torch's, sum of squares over mn.
        bound: Family of the constant.
        norm: What K measures; ``"auto"`` is the default of the family.
        reduction: ``"mean"``, or ``"sum"``, the sum of squares (half of it with ``half``).

    Returns:
        The constant.

    Raises:
        ValueError: An argument is out of its range, or a norm is missing that the family needs.
    """
    check_count("batch_size", batch_size, 1)
    check_count("num_outputs", num_outputs, 1)
    curvature = 1.0 if half else 2.0 if reduction == "sum" else 2.0 / num_outputs
    gradient_norm = 0.0
    if bound != "smooth":
        residual = _residual_norm(bound, output_norm, target_norm)
        # A norm of the whole batch of residuals already holds the sqrt(m) by which the families divide K once more.
        of_example = resolve_norm(bound, norm) == "sample" or bound == "paper"
        gradient_norm = curvature * (residual if of_example else residual / batch_size**0.5)
    per_example = LossBounds(gradient_norm, gradient_norm, curvature)
    return batch_constant(
        per_example, activation_norm, batch_size=batch_size, bound=bound, norm=norm, reduction=reduction
    )


def _residual_norm(bound: Bound, output_norm: float | None, target_norm: float | None) -> float:
    if output_norm is None or target_norm is None:
        raise ValueError(
            f"bound={bound!r} of a squared error needs bounded outputs: expected output_norm and target_norm, found "
            f"{output_norm} and {target_norm}"
        )
    check_at_least("output_norm", output_norm, 0.0)
    check_at_least("target_norm", target_norm, 0.0)
    return output_norm + target_norm


def mean_absolute_error(
    activation_norm: float,
    *,
    batch_size: int,
    num_outputs: int = 1,
    bound: Bound = "strict",
    norm: NormOrAuto = "auto",
    reduction: Reduction = "mean",
) -> float:
    """Constant of the mean absolute error (torch's ``l1_loss``), whose derivative is a sign.

    Estimate and gradient norm are 1.

    Args:
        activation_norm: K, not negative.
        batch_size: m, examples in the loss, at least 1.
        num_outputs: n, outputs of one example, over which the loss averages too.
        bound: Family of the constant; not ``"smooth"``, since the derivative is discontinuous.
        norm: What K measures; ``"auto"`` is the default of the family.
        reduction: ``"mean"``, or ``"sum"``, which is divided by neither m nor n.

    Returns:
        The constant.

    Raises:
        ValueError: An argument is out of its range.

    References:
        S. Saha et al., arXiv 2006.13307 (paper): K / m.
    """
    check_not_smooth("the mean absolute error", bound)
    per_output = LossBounds(estimate=1.0, gradient_norm=1.0, curvature=0.0)
    return outputwise_constant(
        per_output, activation_norm, num_outputs, batch_size=batch_size, bound=bound, norm=norm, reduction=reduction
    )


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

    Estimate and gradient norm are max(level, 1 - level). At a level of 0.5 the loss is half the absolute error. Other
    arguments, result and errors are those of :func:`mean_absolute_error`. Not in the papers: derived the same way.

    Args:
        level: The quantile, in (0, 1).
        activation_norm: K.
        batch_size: m.
        num_outputs: n.
        bound: Family of the constant; not ``"smooth"``.
        norm: What K measures.
        reduction: ``"mean"`` or ``"sum"``.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level!r}: expected a quantile in (0, 1), without its ends")
    check_not_smooth("the quantile loss", bound)
    steepest = max(level, 1 - level)
    per_output = LossBounds(estimate=steepest, gradient_norm=steepest, curvature=0.0)
    return outputwise_constant(
        per_output, activation_norm, num_outputs, batch_size=batch_size, bound=bound, norm=norm, reduction=reduction
    )


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
    """Constant of torch's ``huber_loss``: half of the square up to ``delta``, linear beyond.

    Estimate and gradient norm are ``delta``, the curvature is 1. The other arguments, the result and the errors are
    those of :func:`mean_absolute_error`, except that all families are defined. Not in the papers: derived the same way.

    Args:
        delta: Where the loss becomes linear, positive, in the units of an output.
        activation_norm: K.
        batch_size: m.
        num_outputs: n.
        bound: Family of the constant.
        norm: What K measures.
        reduction: ``"mean"`` or ``"sum"``.
    """
    check_positive("delta", delta)
    per_output = LossBounds(estimate=delta, gradient_norm=delta, curvature=1.0)
    return outputwise_constant(
        per_output, activation_norm, num_outputs, batch_size=batch_size, bound=bound, norm=norm, reduction=reduction
    )


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

    Estimate and gradient norm are 1, the curvature is 1 / ``beta``. The other arguments, the result and the errors are
    those of :func:`huber`.

    Args:
        beta: Where the loss becomes linear, positive, in the units of an output.
        activation_norm: K.
        batch_size: m.
        num_outputs: n.
        bound: Family of the constant.
        norm: What K measures.
        reduction: ``"mean"`` or ``"sum"``.
    """
    check_positive("beta", beta)
    per_output = LossBounds(estimate=1.0, gradient_norm=1.0, curvature=1.0 / beta)
    return outputwise_constant(
        per_output, activation_norm, num_outputs, batch_size=batch_size, bound=bound, norm=norm, reduction=reduction
    )
