"""What penalties on the weights add to a Lipschitz constant, and the second moment that the papers' rules use."""

from typing import Literal

from lit_lipschitz.bounds.families import Bound, check_not_negative, check_positive, resolve_norm

SecondMoment = Literal["constant", "scripts"]


def l2(weight_decay: float, weight_norm: float, *, bound: Bound = "strict") -> float:
    """What a penalty ``weight_decay / 2 * norm(w)^2`` adds to the constant of the loss: ``weight_decay * weight_norm``.

    ``weight_decay`` is the coefficient, as in torch's optimizers that add it to the gradient, and ``weight_norm`` a
    bound of norm(w), for which the papers take the largest norm of a weight tensor. A constant of ``bound="smooth"``
    is increased by ``weight_decay``.

    Raises:
        ValueError: An argument is negative or not finite.

    References:
        R. Yedida, S. Saha, arXiv 1902.07399, section on regularization.
    """
    resolve_norm(bound)
    check_not_negative("weight_decay", weight_decay)
    check_not_negative("weight_norm", weight_norm)
    return weight_decay if bound == "smooth" else weight_decay * weight_norm


def tikhonov(gamma_norm: float, weight_norm: float, *, bound: Bound = "strict") -> float:
    """What a penalty ``norm(Gamma w)^2`` adds to the constant of the loss, as :func:`l2` with twice ``gamma_norm``.

    ``gamma_norm`` is the spectral norm of Gamma'Gamma (of Gamma squared if Gamma is symmetric), or any larger norm of
    it. The other arguments, the errors and the source are those of :func:`l2`.
    """
    check_not_negative("gamma_norm", gamma_norm)
    return l2(2 * gamma_norm, weight_norm, bound=bound)


def second_moment(
    data: float,
    l2: float = 0.0,
    *,
    estimate: SecondMoment = "constant",
    activation_norm: float = 1.0,
    fourth_moment_norm: float = 0.0,
) -> float:
    """Estimate of the squared gradient norm that the papers' rules of RMSprop and Adam average.

    With D = ``data`` the constant of the data, R = ``l2`` that of the L2 penalty, and L = D + R, the estimate is

    - ``constant``: L^2;
    - ``scripts``: c^2 S + 2 R c K, as the authors' scripts compute it, where K = ``activation_norm``, D = c K, and
      S = ``fourth_moment_norm`` is the Frobenius norm of the matrix of squared activations, the largest over the
      batches. S is far below K^2, the sum of its entries.

    Raises:
        ValueError: An argument is negative or not finite, K is 0, or the estimate is unknown.

    References:
        R. Yedida, S. Saha, arXiv 1902.07399, section on RMSprop, and the scripts published with it.
    """
    for name, value in (("data", data), ("l2", l2), ("fourth_moment_norm", fourth_moment_norm)):
        check_not_negative(name, value)
    check_positive("activation_norm", activation_norm)
    if estimate == "constant":
        return (data + l2) ** 2
    if estimate == "scripts":
        return (data / activation_norm) ** 2 * fourth_moment_norm + 2 * l2 * data
    raise ValueError(f"estimate={estimate!r}: expected one of constant, scripts")
