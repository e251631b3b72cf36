r"""Lipschitz constants of regression losses: squared and absolute error, quantile, Huber and smooth L1.

The squared error alone has no bounded gradient norm in the outputs. With Z and Y the (m, n) matrices of outputs and
targets, R their difference and A the inputs, the gradient of torch's ``mse_loss`` is 2/(mn) R'A, no longer than
2/(mn) (norm(Z) + norm(Y)) norm(A). This is the papers' formula, and with ``norm="frobenius"`` and a head without a bias
it is the strict constant too. The Hessian is 2/(mn) A'A whatever the outputs.

The other losses average over the outputs too, and the bounds given are those of one output. The quantile, Huber and
smooth L1 losses are not in the papers. The arguments that the losses share are in :mod:`lit_lipschitz.bounds.families`.

References:
    R. Yedida, S. Saha, arXiv 1902.07399, 2019, for the squared error: (K_a + norm(y)) K / m of half the mean over the
    examples. S. Saha et al., arXiv 2006.13307, 2020, for the mean absolute error: K / m.
"""

from lit_lipschitz.bounds.families import (
    Bound,
    LossBounds,
    NormOrAuto,
    Reduction,
    batch_constant,
    check_count,
    check_not_negative,
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
    :mod:`lit_lipschitz.bounds.regression` derives. The curvature is 2/n. With ``half`` the loss is that of the papers,
    the sum of squares over 2m instead of mn, and the curvature is 1.

    All but the smooth family need ``output_norm`` and ``target_norm``, bounds in the same norm as K: for ``frobenius``
    of the norm of the (m, n) matrix, for ``sample`` of the largest norm of a row. A known bound of the difference of
    outputs and targets can be passed as ``output_norm``, with a ``target_norm`` of 0.
    """
    check_count("batch_size", batch_size, 1)
    check_count("num_outputs", num_outputs, 1)
    curvature = 1.0 if half else 2.0 if reduction == "sum" else 2.0 / num_outputs
    gradient_norm = 0.0
    if bound != "smooth":
        if output_norm is None or target_norm is None:
            raise ValueError(
                f"bound={bound!r} of a squared error needs bounded outputs: expected output_norm and target_norm, "
                f"found {output_norm} and {target_norm}"
            )
        check_not_negative("output_norm", output_norm)
        check_not_negative("target_norm", target_norm)
        residual = output_norm + target_norm
        # A norm of the whole batch of residuals already holds the sqrt(m) by which the families divide K once more.
        of_example = resolve_norm(bound, norm) == "sample" or bound == "paper"
        gradient_norm = curvature * (residual if of_example else residual / batch_size**0.5)
    per_example = LossBounds(gradient_norm, gradient_norm, curvature)
    return batch_constant(
        per_example, activation_norm, batch_size=batch_size, bound=bound, norm=norm, reduction=reduction
    )


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

    Estimate and gradient norm are 1. The derivative is discontinuous, so ``bound="smooth"`` is not defined.
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

    Estimate and gradient norm are max(level, 1 - level) for a quantile ``level`` in (0, 1). At 0.5 the loss is half the
    absolute error. The derivative is discontinuous, so ``bound="smooth"`` is not defined.
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

    Estimate and gradient norm are ``delta``, positive and in the units of an output; the curvature is 1.
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

    Estimate and gradient norm are 1, the curvature is 1 / ``beta``; ``beta`` is positive, in the units of an output.
    """
    check_positive("beta", beta)
    per_output = LossBounds(estimate=1.0, gradient_norm=1.0, curvature=1.0 / beta)
    return outputwise_constant(
        per_output, activation_norm, num_outputs, batch_size=batch_size, bound=bound, norm=norm, reduction=reduction
    )
