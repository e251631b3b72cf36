r"""Learning-rate rules of the LipschitzLR paper and of its authors' scripts.

A rule treats the constant as the optimizer treats the gradient, so that the step is one gradient over one constant:
momentum averages both, RMSprop and Adam divide both by the root of an average square. With L the constant of an update,
:math:`\bar L` and :math:`\overline{L^2}` its moving averages, and the optimizer's settings under torch's names:

============= =============================================== ================================================
rule          rate                                            averages
============= =============================================== ================================================
adamo         (1 - momentum) / ((1 - dampening) Lbar)         momentum
rmsprop       (1 - momentum)(sqrt(L2bar) + eps) / L           alpha
adam          (sqrt(L2bar) + eps) / Lbar                      betas
============= =============================================== ================================================

The averages start at 0 and are bias-corrected as Adam's are. The variants that end in ``_authors`` are what the
authors' scripts compute: no bias correction, an average that may start from a fixed value, and RMSprop's root divided
by K_z, the norm of the activations, instead of L.

By construction the rates of ``rmsprop`` and ``adam`` are near 1 for a constant L, since these optimizers have
normalised the gradient already: far above what networks tolerate. They are the paper's rules, not a recommendation.

References:
    R. Yedida, S. Saha: A novel adaptive learning rate scheduler for deep neural networks, arXiv 1902.07399, 2019,
    sections on momentum, RMSprop and Adam, and the scripts published with it. The momentum of ``rmsprop`` and AMSGrad
    are not in the paper: derived in the same way.
"""

import math
from typing import NamedTuple

from lit_lipschitz.rules.base import RuleInfo, RuleInput, RuleResult, Settings, Term, decay_rate, momentum_of


class AverageState(NamedTuple):
    """Moving average of the constant.

    Attributes:
        average: The average, from 0, not corrected for its start.
        weight: The same average of 1; dividing by it corrects the bias.
    """

    average: float = 0.0
    weight: float = 0.0

    def updated(self, decay: float, value: float) -> "AverageState":
        """The state after one more value."""
        return AverageState(decay * self.average + (1 - decay) * value, decay * self.weight + (1 - decay))


class SecondMomentState(NamedTuple):
    """Moving average of the squared constant.

    Attributes:
        square: The average, from 0, not corrected for its start.
        square_weight: The same average of 1.
    """

    square: float = 0.0
    square_weight: float = 0.0


class AdamState(NamedTuple):
    """Moving averages of the constant and of its square.

    Attributes:
        average: See :class:`AverageState`.
        weight: Likewise.
        square: See :class:`SecondMomentState`.
        square_weight: Likewise.
        largest: Largest :attr:`square` so far, for AMSGrad.
    """

    average: float = 0.0
    weight: float = 0.0
    square: float = 0.0
    square_weight: float = 0.0
    largest: float = 0.0


def adamo(inputs: RuleInput, state: AverageState, settings: Settings) -> RuleResult:
    """Momentum with a moving average of the constant ("AdaMo"): rate = (1 - b) / ((1 - d) K1).

    The paper steps by v / K1 with v = b v + (1 - b) g and K1 = b K1 + (1 - b) L. torch accumulates v = b v + (1 - d) g,
    which is (1 - d) / (1 - b) times as long. Nesterov's step g + b v is as long as v while the gradient does not
    change, so it has the same rate.

    Args:
        inputs: L.
        state: State of the rule.
        settings: The optimizer's ``momentum`` b in [0, 1) and ``dampening`` d below 1 (0 if absent).

    Returns:
        The rate, the state and the terms.

    Raises:
        ValueError: A setting is out of range.
    """
    momentum, averaging = momentum_of(settings)
    state = state.updated(momentum, inputs.constant)
    average = state.average / state.weight
    return RuleResult(averaging / average, state, _momentum_terms(momentum, average))


def adamo_authors(inputs: RuleInput, state: AverageState, settings: Settings) -> RuleResult:
    """:func:`adamo` without bias correction; arguments, result and errors are the same.

    From 0 the first rate is 1 / (1 - momentum) times too large; the authors set the first average, and the first rate,
    to a fixed number.
    """
    momentum, averaging = momentum_of(settings)
    state = state.updated(momentum, inputs.constant)
    return RuleResult(averaging / state.average, state, _momentum_terms(momentum, state.average))


def rmsprop(inputs: RuleInput, state: SecondMomentState, settings: Settings) -> RuleResult:
    """RMSprop: rate = (1 - momentum) (sqrt(K2) + eps) / L with K2 the moving average of the squared constant.

    torch's momentum makes the step 1 / (1 - momentum) times as long, which the rate compensates. torch does not correct
    the bias of its average square, so the first steps are up to 1 / sqrt(1 - alpha) times longer, as with any rate.

    Args:
        inputs: L and the estimate of its square.
        state: State of the rule.
        settings: The optimizer's ``alpha`` in [0, 1), ``eps``, and ``momentum`` in [0, 1) (0 if absent).

    Returns:
        The rate, the state and the terms.

    Raises:
        ValueError: A setting is out of range.
    """
    state = _rmsprop_average(inputs, state, settings)
    square = state.square / state.square_weight
    rate = (1 - _rmsprop_momentum(settings)) * (math.sqrt(square) + float(settings["eps"])) / inputs.constant
    return RuleResult(rate, state, (_second_moment_term(square),))


def rmsprop_authors(inputs: RuleInput, state: SecondMomentState, settings: Settings) -> RuleResult:
    """:func:`rmsprop` without bias correction, divided by K_z; arguments, result and errors are the same.

    K_z is L k m / (k - 1) without an L2 term, so the rate is smaller by that factor.
    """
    state = _rmsprop_average(inputs, state, settings)
    root = math.sqrt(state.square) + float(settings["eps"])
    rate = (1 - _rmsprop_momentum(settings)) * root / inputs.activation_norm
    return RuleResult(rate, state, (_second_moment_term(state.square),))


def adam(inputs: RuleInput, state: AdamState, settings: Settings) -> RuleResult:
    """Adam, AdamW and NAdam ("auto-Adam"): rate = (sqrt(K2) + eps) / K1 with the averages of L^2 and L.

    NAdam's look-ahead does not change a steady step.

    Args:
        inputs: L and the estimate of its square.
        state: State of the rule.
        settings: The optimizer's ``betas``, both in [0, 1), ``eps``, and ``amsgrad`` (false if absent), with which the
            largest K2 counts as torch's largest average square does.

    Returns:
        The rate, the state and the terms.

    Raises:
        ValueError: A setting is out of range.
    """
    state, square = _adam_averages(inputs, state, settings)
    square, average = square / state.square_weight, state.average / state.weight
    rate = (math.sqrt(square) + float(settings["eps"])) / average
    return RuleResult(rate, state, (_average_term(average), _second_moment_term(square)))


def adam_authors(inputs: RuleInput, state: AdamState, settings: Settings) -> RuleResult:
    """:func:`adam` without bias correction; arguments, result and errors are the same.

    With one update per epoch and torch's betas, the root approaches its value over thousands of epochs.
    """
    state, square = _adam_averages(inputs, state, settings)
    rate = (math.sqrt(square) + float(settings["eps"])) / state.average
    return RuleResult(rate, state, (_average_term(state.average), _second_moment_term(square)))


def _rmsprop_average(inputs: RuleInput, state: SecondMomentState, settings: Settings) -> SecondMomentState:
    decay = decay_rate("alpha", settings["alpha"])
    return SecondMomentState(*AverageState(*state).updated(decay, inputs.second_moment))


def _rmsprop_momentum(settings: Settings) -> float:
    return decay_rate("momentum", settings.get("momentum", 0.0))


def _adam_averages(inputs: RuleInput, state: AdamState, settings: Settings) -> tuple[AdamState, float]:
    """The state after an update, and the average square that counts."""
    first, second = (decay_rate("betas", beta) for beta in settings["betas"])
    average = AverageState(state.average, state.weight).updated(first, inputs.constant)
    square = AverageState(state.square, state.square_weight).updated(second, inputs.second_moment)
    state = AdamState(*average, *square, max(state.largest, square.average))
    return state, state.largest if settings.get("amsgrad", False) else state.square


def _momentum_terms(momentum: float, average: float) -> tuple[Term, Term]:
    return Term("b", momentum, "the optimizer's momentum"), _average_term(average)


def _average_term(average: float) -> Term:
    return Term("K1", average, "moving average of L")


def _second_moment_term(square: float) -> Term:
    return Term("K2", square, "moving average of the estimate of L^2")


RULES = (
    RuleInfo(
        "adamo",
        adamo,
        "The paper's momentum with a moving average of L (AdaMo): rate = (1 - b) / ((1 - d) K1).",
        AverageState,
    ),
    RuleInfo("rmsprop", rmsprop, "The paper's RMSprop: rate = (1 - momentum) (sqrt(K2) + eps) / L.", SecondMomentState),
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
        SecondMomentState,
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
