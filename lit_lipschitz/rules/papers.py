"""Learning-rate rules of the LipschitzLR paper and of its authors' scripts.

A rule treats the constant as the optimizer treats the gradient, so that the step is one gradient over one constant:
momentum averages both, RMSprop and Adam divide both by the root of an average square. K1 is the moving average of L,
with the optimizer's decay rate for the gradient (``momentum``, the first of ``betas``), and K2 that of the estimate of
L^2, with its decay rate for the square (``alpha``, the second of ``betas``). They start at 0 and are bias-corrected as
Adam's are. The variants that end in ``_authors`` are what the authors' scripts compute: no bias correction, an average
that may start from a fixed value, and RMSprop's root divided by K_z, the norm of the activations, instead of L.

By construction the rates of ``rmsprop`` and ``adam`` are near 1 for a constant L, since these optimizers have
normalised the gradient already: far above what networks tolerate. They are the paper's rules, not a recommendation.

References:
    R. Yedida, S. Saha: A novel adaptive learning rate scheduler for deep neural networks, arXiv 1902.07399, 2019,
    sections on momentum, RMSprop and Adam, and the scripts published with it. The momentum of ``rmsprop`` and AMSGrad
    are not in the paper: derived in the same way.
"""

import math
from functools import partial
from typing import NamedTuple

from lit_lipschitz.rules.base import RuleInfo, RuleInput, RuleResult, Settings, Term, decay_rate

_K1 = partial(Term, "K1", meaning="moving average of L")
_K2 = partial(Term, "K2", meaning="moving average of the estimate of L^2")


def momentum_of(settings: Settings) -> tuple[Term, float]:
    """The momentum b of torch's SGD as a term, and the average gradient over torch's velocity, (1 - b) / (1 - d).

    ``momentum`` b is in [0, 1) and ``dampening`` d below 1 (0 if absent); a ValueError says which is not.
    """
    momentum, dampening = decay_rate("momentum", settings["momentum"]), float(settings.get("dampening", 0.0))
    if not dampening < 1:
        raise ValueError(f"dampening={dampening}: expected less than 1, since gradients enter with 1 - dampening")
    return Term("b", momentum, "the optimizer's momentum"), (1 - momentum) / (1 - dampening)


class AverageState(NamedTuple):
    """Moving average of the constant or of its square."""

    average: float = 0.0  # from 0, not corrected for its start
    weight: float = 0.0  # the same average of 1

    def updated(self, decay: float, value: float) -> "AverageState":
        """The state after one more value."""
        return AverageState(decay * self.average + (1 - decay) * value, decay * self.weight + (1 - decay))

    @property
    def corrected(self) -> float:
        """The bias-corrected average."""
        return self.average / self.weight


class AdamState(NamedTuple):
    """Moving averages of the constant and of its square, each as in :class:`AverageState`."""

    average: float = 0.0
    weight: float = 0.0
    square: float = 0.0
    square_weight: float = 0.0
    largest: float = 0.0  # largest ``square`` so far, for AMSGrad


def adamo(inputs: RuleInput, state: AverageState, settings: Settings) -> RuleResult:
    """Momentum with a moving average of the constant ("AdaMo"): rate = (1 - b) / ((1 - d) K1).

    The paper steps by v / K1 with v = b v + (1 - b) g and K1 = b K1 + (1 - b) L. torch accumulates v = b v + (1 - d) g
    with the momentum b and the dampening d, which is (1 - d) / (1 - b) times as long. Nesterov's step g + b v is as
    long as v while the gradient does not change, so it has the same rate.
    """
    momentum, averaging = momentum_of(settings)
    state = state.updated(momentum.value, inputs.constant)
    return RuleResult(averaging / state.corrected, state, (momentum, _K1(state.corrected)))


def adamo_authors(inputs: RuleInput, state: AverageState, settings: Settings) -> RuleResult:
    """:func:`adamo` without bias correction.

    From 0 the first rate is 1 / (1 - momentum) times too large; the authors set the first average, and the first rate,
    to a fixed number.
    """
    momentum, averaging = momentum_of(settings)
    state = state.updated(momentum.value, inputs.constant)
    return RuleResult(averaging / state.average, state, (momentum, _K1(state.average)))


def rmsprop(inputs: RuleInput, state: AverageState, settings: Settings) -> RuleResult:
    """RMSprop: rate = (1 - momentum) (sqrt(K2) + eps) / L.

    torch's momentum makes the step 1 / (1 - momentum) times as long, which the rate compensates. torch does not correct
    the bias of its average square, so the first steps are up to 1 / sqrt(1 - alpha) times longer, as with any rate.
    """
    state = _rmsprop_average(inputs, state, settings)
    rate = _rmsprop_step(state.corrected, settings) / inputs.constant
    return RuleResult(rate, state, (_K2(state.corrected),))


def rmsprop_authors(inputs: RuleInput, state: AverageState, settings: Settings) -> RuleResult:
    """:func:`rmsprop` without bias correction, divided by K_z: rate = (1 - momentum) (sqrt(K2) + eps) / K_z.

    K_z is L k m / (k - 1) without an L2 term, so the rate is smaller by that factor.
    """
    state = _rmsprop_average(inputs, state, settings)
    rate = _rmsprop_step(state.average, settings) / inputs.activation_norm
    return RuleResult(rate, state, (_K2(state.average),))


def adam(inputs: RuleInput, state: AdamState, settings: Settings) -> RuleResult:
    """Adam, AdamW and NAdam ("auto-Adam"): rate = (sqrt(K2) + eps) / K1.

    NAdam's look-ahead does not change a steady step. With ``amsgrad`` the largest K2 counts, as torch's largest average
    square does.
    """
    state, square = _adam_averages(inputs, state, settings)
    square, average = square / state.square_weight, state.average / state.weight
    rate = (math.sqrt(square) + float(settings["eps"])) / average
    return RuleResult(rate, state, (_K1(average), _K2(square)))


def adam_authors(inputs: RuleInput, state: AdamState, settings: Settings) -> RuleResult:
    """:func:`adam` without bias correction.

    With one update per epoch and torch's betas, the root approaches its value over thousands of epochs.
    """
    state, square = _adam_averages(inputs, state, settings)
    rate = (math.sqrt(square) + float(settings["eps"])) / state.average
    return RuleResult(rate, state, (_K1(state.average), _K2(square)))


def _rmsprop_average(inputs: RuleInput, state: AverageState, settings: Settings) -> AverageState:
    return state.updated(decay_rate("alpha", settings["alpha"]), inputs.second_moment)


def _rmsprop_step(square: float, settings: Settings) -> float:
    """(1 - momentum) (sqrt(K2) + eps)."""
    momentum = decay_rate("momentum", settings.get("momentum", 0.0))
    return (1 - momentum) * (math.sqrt(square) + float(settings["eps"]))


def _adam_averages(inputs: RuleInput, state: AdamState, settings: Settings) -> tuple[AdamState, float]:
    """The state after an update, and the average square that counts."""
    first, second = (decay_rate("betas", beta) for beta in settings["betas"])
    average = AverageState(state.average, state.weight).updated(first, inputs.constant)
    square = AverageState(state.square, state.square_weight).updated(second, inputs.second_moment)
    state = AdamState(*average, *square, max(state.largest, square.average))
    return state, state.largest if settings.get("amsgrad", False) else state.square


RULES = (
    RuleInfo(
        "adamo",
        adamo,
        "The paper's momentum with a moving average of L (AdaMo): rate = (1 - b) / ((1 - d) K1).",
        AverageState,
    ),
    RuleInfo("rmsprop", rmsprop, "The paper's RMSprop: rate = (1 - momentum) (sqrt(K2) + eps) / L.", AverageState),
    RuleInfo("adam", adam, "The paper's Adam (auto-Adam): rate = (sqrt(K2) + eps) / K1.", AdamState),
    RuleInfo(
        "adamo_authors",
        adamo_authors,
        "AdaMo as in the authors' scripts, without bias correction: rate = (1 - b) / ((1 - d) K1).",
        AverageState,
        initial=AverageState,
    ),
    RuleInfo(
        "rmsprop_authors",
        rmsprop_authors,
        "RMSprop as in the authors' scripts, without bias correction: rate = (1 - momentum) (sqrt(K2) + eps) / K_z.",
        AverageState,
        second_moment="scripts",
    ),
    RuleInfo(
        "adam_authors",
        adam_authors,
        "Adam as in the authors' scripts, without bias correction: rate = (sqrt(K2) + eps) / K1.",
        AdamState,
        second_moment="scripts",
    ),
)
