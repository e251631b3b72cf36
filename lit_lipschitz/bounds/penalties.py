"""What penalties on the weights add to a Lipschitz constant, and the second moment that the papers' rules use."""

from typing import Literal

from lit_lipschitz.bounds.families import Bound, check_at_least, check_positive, resolve_norm

Estimate = Literal["constant", "scripts"]


def l2(weight_decay: float, weight_norm: float, *, bound: Bound = "strict") -> float:
    """What a penalty ``weight_decay / 2 * norm(w)^2`` adds to the constant of the loss.

    Args:
        weight_decay: The coefficient, as in torch's optimizers that add it to the gradient; not negative.
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
    check_at_least("weight_decay", weight_decay, 0.0)
    check_at_least("weight_norm", weight_norm, 0.0)
    return weight_decay if bound == "smooth" else weight_decay * weight_norm


def tikhonov(gamma_norm: float, weight_norm: float, *, bound: Bound = "strict") -> float:
    """What a penalty ``norm(Gamma w)^2`` adds to the constant of the loss.

    Args:
        gamma_norm: Norm of Gamma'Gamma (of Gamma squared if Gamma is symmetric), not negative: the spectral norm, or
            any larger one.
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
    check_at_least("gamma_norm", gamma_norm, 0.0)
    check_at_least("weight_norm", weight_norm, 0.0)
    return 2 * gamma_norm if bound == "smooth" else 2 * gamma_norm * weight_norm


def second_moment(
    data: float,
    l2: float = 0.0,
    *,
    estimate: Estimate = "constant",
    activation_norm: float = 1.0,
    fourth_moment_norm: float = 0.0,
) -> float:
    """Estimate of the squared gradient norm that the papers' rules of RMSprop and Adam average.

    With D the constant of the data, R that of the L2 penalty, L = D + R, and D = c K:

    - ``constant``: L^2;
    - ``scripts``: c^2 S + 2 R c K, as the authors' scripts compute it, S being the Frobenius norm of the matrix of
      squared activations, the largest over the batches. S is far below K^2, the sum of its entries.

    Args:
        data: D, not negative.
        l2: R, not negative.
        estimate: Which one.
        activation_norm: K, positive; for ``scripts``.
        fourth_moment_norm: S, not negative; for ``scripts``.

    Returns:
        The estimate.

    Raises:
        ValueError: An argument is out of its range.

    References:
        R. Yedida, S. Saha, arXiv 1902.07399, section on RMSprop, and the scripts published with it.
    """
    for name, value in (("data", data), ("l2", l2), ("fourth_moment_norm", fourth_moment_norm)):
        check_at_least(name, value, 0.0)
    check_positive("activation_norm", activation_norm)
    if estimate == "constant":
        return (data + l2) ** 2
    if estimate == "scripts":
        return (data / activation_norm) ** 2 * fourth_moment_norm + 2 * l2 * data
    raise ValueError(f"estimate={estimate!r}: expected one of constant, scripts")
