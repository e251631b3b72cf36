r"""From a Lipschitz constant to a learning rate, for one optimizer each: state in, (rate, state) out.

A rule treats the constant as the optimizer treats the gradient, so that the step is one gradient over one constant:
momentum averages both, RMSprop and Adam divide both by the root of an average square. With L the constant of an update,
:math:`\bar L` and :math:`\overline{L^2}` its averages, and the optimizer's settings under torch's names:

============= =============================================== ================================================
rule          rate                                            averages
============= =============================================== ================================================
inverse       1 / L
noise         (1 - momentum) sqrt(m / 2) / L, limited         none
adamo         (1 - momentum) / ((1 - dampening) Lbar)         momentum
rmsprop       (1 - momentum)(sqrt(L2bar) + eps) / L           alpha
adam          (sqrt(L2bar) + eps) / Lbar                      betas
adamax        (max + eps) / Lbar, max a decaying maximum      betas
observed      min(c scale / O, its mean)                      the mean over all updates so far
grafted       min(scale, its mean) c / L                      the mean over all updates so far
schedule_free scale min(c / O, its mean)                      the mean over all updates so far
============= =============================================== ================================================

The averages start at 0 and are corrected for it as Adam's are. The variants that end in ``_authors`` are what the
scripts of the papers' authors compute: no correction, an average that may start from a value set by hand, and RMSprop's
root divided by K_z, the size of the activations, in place of L.

By construction the rates of ``rmsprop`` and ``adam`` are near 1 for a constant L, since these optimizers have
normalised the gradient already: far above what networks bear. They are the papers' rules, not a recommendation.

References:
    R. Yedida, S. Saha: A novel adaptive learning rate scheduler for deep neural networks, arXiv 1902.07399, 2019,
    sections on momentum, RMSprop and Adam, and the scripts published with it. ``adamax``, the momentum of ``rmsprop``
    and AMSGrad are not in the paper: derived in the same way.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Observation:
    """What a rule sees at an update.

    Attributes:
        constant: Lipschitz constant L, positive.
        squared: An estimate of its square, positive (:func:`lit_lipschitz.bounds.second_moment`).
        activation_norm: Size of the head's inputs, K_z, positive.
        scale: Length of the gradient over that of the optimizer's step at a rate of 1, positive; for the rules of
            :data:`SLOPED` the mean over the weights, for ``grafted`` of all parameters together.
        batch_size: Examples that the loss of an optimizer step averages over, m, positive.
        observed: The constant with the slope that the loss was seen to have in the head's outputs in place of the
            steepest one, O, at most L; for ``noise`` a squared error's with its residuals in place of outputs and
            targets, which may be more than L; 0 where neither was seen.
        effective: How many examples count in the noise, at most m: the square of the sum of their slopes over the sum
            of the squares; 0 where no slope was seen.
        curvature: For ``noise`` with a squared error, a bound of the Hessian in the head's weights; 0 for none.
    """

    constant: float
    squared: float
    activation_norm: float = 1.0
    scale: float = 1.0
    batch_size: float = 1.0
    observed: float = 0.0
    effective: float = 0.0
    curvature: float = 0.0


@dataclass(frozen=True)
class RuleState:
    """What a rule remembers between updates.

    Attributes:
        updates: Updates so far.
        average: Moving average of the constant, not corrected for its start (for ``grafted`` the mean of the scale, for
            ``observed`` that of the rate, for ``schedule_free`` that of c / O).
        weight: The same average of 1, from 0: what corrects for it (for these two how many are in the mean).
        square: Moving average of the squared constant (for ``adamax`` the decaying maximum of the constant, for
            ``observed`` and ``schedule_free`` the mean of what no slope was seen of).
        square_weight: The same average of 1, from 0.
        largest: Largest :attr:`square` so far, for AMSGrad.
    """

    updates: int = 0
    average: float = 0.0
    weight: float = 0.0
    square: float = 0.0
    square_weight: float = 0.0
    largest: float = 0.0

    def averaged(self, decay: float, constant: float) -> "RuleState":
        """The state with a constant taken into the average."""
        average = decay * self.average + (1 - decay) * constant
        return replace(self, average=average, weight=decay * self.weight + (1 - decay))

    def squared(self, decay: float, square: float) -> "RuleState":
        """The state with a squared constant taken into its average."""
        square = decay * self.square + (1 - decay) * square
        weight = decay * self.square_weight + (1 - decay)
        return replace(self, square=square, square_weight=weight, largest=max(self.largest, square))


@dataclass(frozen=True)
class StepScale:
    """Length of the gradient over that of the optimizer's step at a rate of 1, from readings now and then.

    Attributes:
        value: Geometric moving average of the readings, in which each counts as much as all before it; 0 without one.
        slope: The same average of the root mean square slopes that the examples' losses had in the head's outputs; 0
            without one.
        mean_slope: The same average of their mean slopes.
    """

    value: float = 0.0
    slope: float = 0.0
    mean_slope: float = 0.0

    def seen(self, reading: float, slope: float = 0.0, mean_slope: float = 0.0) -> "StepScale":
        """The state with a reading taken in; what is not a positive finite number is left out.

        Args:
            reading: Length of the gradient over that of the step at a rate of 1.
            slope: Root mean square slope of the examples' losses in the head's outputs; 0 where it was not seen.
            mean_slope: Their mean slope.
        """
        if not _usable(reading):
            return self
        if not (_usable(slope) and _usable(mean_slope)):
            return replace(self, **self._with(reading))
        slopes = {"slope": _averaged(self.slope, slope), "mean_slope": _averaged(self.mean_slope, mean_slope)}
        return replace(self, **slopes, **self._with(reading))

    def _with(self, reading: float) -> dict[str, Any]:
        """The attributes that a reading changes."""
        return {"value": _averaged(self.value, reading)}


@dataclass(frozen=True)
class LastingScale(StepScale):
    """The same, which does not fall below what the first five readings, those of the first 16 steps, have had.

    Attributes:
        value: The larger one of the two means; 0 without a reading.
        first: Mean of the first five readings.
        mean: Mean of all readings.
        readings: How many there were.
    """

    first: float = 0.0
    mean: float = 0.0
    readings: int = 0

    def _with(self, reading: float) -> dict[str, Any]:
        readings = self.readings + 1
        mean = self.mean + (reading - self.mean) / readings
        first = mean if readings <= 5 else self.first
        return {"value": max(first, mean), "first": first, "mean": mean, "readings": readings}


def _usable(reading: float) -> bool:
    return math.isfinite(reading) and reading > 0


def _averaged(average: float, reading: float) -> float:
    return math.sqrt(average * reading) if average else reading


Settings = Mapping[str, Any]
Rule = Callable[[Observation, RuleState, Settings], tuple[float, RuleState]]
RuleName = Literal[
    "inverse",
    "noise",
    "adamo",
    "rmsprop",
    "adam",
    "adamax",
    "adamo_authors",
    "rmsprop_authors",
    "adam_authors",
    "observed",
    "grafted",
    "schedule_free",
]


def inverse(seen: Observation, state: RuleState, settings: Settings) -> tuple[float, RuleState]:
    """Gradient descent: rate = 1 / L.

    Args:
        seen: The constant.
        state: State of the rule; not used.
        settings: The optimizer's settings; not used.

    Returns:
        The rate and the new state.

    Raises:
        ValueError: The constant is not a positive finite number.
    """
    state = _next(seen, state)
    return 1.0 / seen.constant, state


def noise(seen: Observation, state: RuleState, settings: Settings) -> tuple[float, RuleState]:
    r"""SGD with momentum b: rate = (1 - b) sqrt(m / 2) / L, and at most 1 / (sqrt(1 - b) L).

    The inverse of a constant of the noise. A strict L is a bound of the root mean square over a batch's examples of
    their gradients' norms. If the m examples are independent, the gradients g and g' of two batches are apart by
    sqrt(E norm(g - g')^2) <= sqrt(2 / m) L, whatever the part is that they share: the square is 2 / m times the trace
    of the covariance of one example's gradient. So the noise, other than L, falls as the batch grows, and the rate may
    grow with sqrt(m), as it does with the papers' K / m. Momentum makes steps 1 / (1 - b) times as long in the long
    run, which the rate takes back, as :func:`adamo` does; dampening d makes them 1 - d times as long.

    The limit is for large batches, where the shared part is most of a gradient and m says nothing: it is the plain 1/L
    without momentum, and with 0.9 it binds from m = 2,000 on. Examples that resemble each other, as the tokens of a
    text do, count in full.

    A squared error's L is of outputs and targets as large as those that were seen. Where its residuals were seen as
    well, O stands for L, with three times their root mean square in it. Both vanish with what they are made of, and the
    curvature does not: the rate is at most 1 / ((1 - d) smooth constant).

    Args:
        seen: The constant, the one that was seen, and the examples in a step.
        state: State of the rule.
        settings: The optimizer's ``momentum`` b in [0, 1) and ``dampening`` d below 1 (0 if absent).

    Returns:
        The rate and the new state.

    Raises:
        ValueError: A setting is outside its range, or the constant or the batch is not a positive finite number.

    References:
        Not in the papers; chosen by validation among the variants of ``docs/evidence.md``.
    """
    momentum, length = _momentum(settings)
    state = _next(seen, state)
    most = length / (1 - momentum) ** 1.5
    rate = min(length * math.sqrt(seen.batch_size / 2), most) / (seen.observed or seen.constant)
    # 1 - momentum over the length is what dampening d makes of a step, 1 - d.
    return min(rate, length / (1 - momentum) / seen.curvature) if seen.curvature else rate, state


def adamo(seen: Observation, state: RuleState, settings: Settings) -> tuple[float, RuleState]:
    """Momentum with a moving average of the constant ("AdaMo").

    The paper steps by v / K with v = b v + (1 - b) g and K = b K + (1 - b) L. torch accumulates v = b v + (1 - d) g,
    which is (1 - d) / (1 - b) times as long, so rate = (1 - b) / ((1 - d) K). Nesterov's step g + b v is as long as v
    while the gradient stays the same, so it has the same rate.

    Args:
        seen: The constant.
        state: State of the rule.
        settings: The optimizer's ``momentum`` b in [0, 1) and ``dampening`` d below 1 (0 if absent).

    Returns:
        The rate and the new state.

    Raises:
        ValueError: A setting is outside its range, or the constant is not a positive finite number.
    """
    momentum, length = _momentum(settings)
    state = _next(seen, state).averaged(momentum, seen.constant)
    return length / (state.average / state.weight), state


def adamo_authors(seen: Observation, state: RuleState, settings: Settings) -> tuple[float, RuleState]:
    """:func:`adamo` without a correction for the average's start; arguments, result and errors are the same.

    From 0 the first rate is 1 / (1 - momentum) times too large; the authors set the first average, and the first
    rate, to a number by hand (:func:`initial_state`).
    """
    momentum, length = _momentum(settings)
    state = _next(seen, state).averaged(momentum, seen.constant)
    return length / state.average, state


def rmsprop(seen: Observation, state: RuleState, settings: Settings) -> tuple[float, RuleState]:
    """RMSprop: rate = (sqrt(K2) + eps) / L with K2 the moving average of the squared constant.

    torch's momentum m makes the step 1 / (1 - m) times as long, which the rate takes back. torch does not correct its
    average square for its start, so the first steps are up to 1 / sqrt(1 - alpha) times longer, as with any rate.

    Args:
        seen: The constant and its square.
        state: State of the rule.
        settings: The optimizer's ``alpha`` in [0, 1), ``eps``, and ``momentum`` in [0, 1) (0 if absent).

    Returns:
        The rate and the new state.

    Raises:
        ValueError: A setting is outside its range, or the constant is not a positive finite number.
    """
    state = _next(seen, state).squared(_decay("alpha", settings["alpha"]), seen.squared)
    root = math.sqrt(state.square / state.square_weight) + float(settings["eps"])
    return (1 - _decay("momentum", settings.get("momentum", 0.0))) * root / seen.constant, state


def rmsprop_authors(seen: Observation, state: RuleState, settings: Settings) -> tuple[float, RuleState]:
    """:func:`rmsprop` without correction, divided by K_z; arguments, result and errors are the same.

    K_z is L k m / (k - 1) where there is no L2 term, so the rate is smaller by that factor.
    """
    state = _next(seen, state).squared(_decay("alpha", settings["alpha"]), seen.squared)
    root = math.sqrt(state.square) + float(settings["eps"])
    return (1 - _decay("momentum", settings.get("momentum", 0.0))) * root / seen.activation_norm, state


def adam(seen: Observation, state: RuleState, settings: Settings) -> tuple[float, RuleState]:
    """Adam, AdamW and NAdam ("auto-Adam"): rate = (sqrt(K2) + eps) / K1 with the averages of L^2 and L.

    NAdam's look ahead leaves a steady step as it is.

    Args:
        seen: The constant and its square.
        state: State of the rule.
        settings: The optimizer's ``betas``, both in [0, 1), ``eps``, and ``amsgrad`` (false if absent), with which the
            largest K2 counts as torch's largest average square does.

    Returns:
        The rate and the new state.

    Raises:
        ValueError: A setting is outside its range, or the constant is not a positive finite number.
    """
    state = _adam_averages(seen, state, settings)
    square = state.largest if settings.get("amsgrad", False) else state.square
    root = math.sqrt(square / state.square_weight) + float(settings["eps"])
    return root / (state.average / state.weight), state


def adam_authors(seen: Observation, state: RuleState, settings: Settings) -> tuple[float, RuleState]:
    """:func:`adam` without correction; arguments, result and errors are the same.

    With an update an epoch and torch's betas, the root creeps towards its value for thousands of epochs.
    """
    state = _adam_averages(seen, state, settings)
    square = state.largest if settings.get("amsgrad", False) else state.square
    return (math.sqrt(square) + float(settings["eps"])) / state.average, state


def adamax(seen: Observation, state: RuleState, settings: Settings) -> tuple[float, RuleState]:
    """Adamax: as :func:`adam`, with the decaying maximum of L in place of the root of an average square."""
    first, second = (_decay("betas", beta) for beta in settings["betas"])
    state = _next(seen, state).averaged(first, seen.constant)
    state = replace(state, square=max(second * state.square, seen.constant))
    return (state.square + float(settings["eps"])) / (state.average / state.weight), state


def grafted(seen: Observation, state: RuleState, settings: Settings) -> tuple[float, RuleState]:
    r"""Adam's direction in steps as long as SGD's with momentum: rate = min(scale, mean of scale) c / L.

    For optimizers that rescale the gradient. scale = \|g\| / \|u\|, where g is the gradient, u the optimizer's update
    at a rate of 1 and c what momentum does to the length of SGD's steps. With b the momentum in u, Adam's first beta,
    that is 1 / (1 - b) where gradients agree and 1 / sqrt(1 - b^2) where they are independent. c is
    ((1 - b^2) (1 - b))^(-1/4), 2.7 at b = 0.9, the geometric mean of the latter and of 1 / sqrt(1 - b), which by
    validation is a little too long. RMSprop's momentum makes steps longer as SGD's does, so b is 0 there.

    The mean is over all updates so far, and a limit: a rate that followed gradients as they grow would feed on those
    that it causes.

    Args:
        seen: The constant and the scale.
        state: State of the rule.
        settings: The optimizer's ``betas``, where it has them.

    Returns:
        The rate and the new state.

    Raises:
        ValueError: A setting is outside its range, or the constant or the scale is not a positive finite number.
    """
    state = _next(seen, state)
    state = replace(state, average=state.average + (seen.scale - state.average) / state.updates)
    return min(seen.scale, state.average) * lengthening(settings) / seen.constant, state


def lengthening(settings: Settings) -> float:
    """What :func:`grafted` takes momentum to do to the length of SGD's steps: its c."""
    momentum = _first_moment(settings)
    return float(((1 - momentum**2) * (1 - momentum)) ** -0.25)


def observed(seen: Observation, state: RuleState, settings: Settings) -> tuple[float, RuleState]:
    r"""Adam's direction, in steps by the constant and the noise that are seen: rate = min(c scale / O, its mean).

    A strict L has the steepest slope that the loss can have in the head's outputs, sqrt(2) for the cross-entropy. With
    the slope that it is seen to have, the norm of the loss's gradient G in the outputs, it is
    O = \|G\|_F \|A\|_F, A being the head's inputs: by the inequality of Cauchy and Schwarz still a bound of the
    gradient G'A in the head's weights, at the weights that there are. scale / O has \|g\| / (\|G\|_F \|A\|_F) in it:
    how much of the examples' gradients does not cancel, and how much the other layers have. So the rate does not fall
    with the loss, as that of :func:`grafted` does, and falls less with activations that grow.

    The scale is the mean over the weights, of which each has a say, and not that of all parameters together, in which
    the largest one has: for its head a network wants a larger rate than for a wide layer, and Adam's steps in both are
    as long as the root of their sizes.

    c = min((1 - b) sqrt(n / 2), 1) (n / m)^(1/4) ((1 - b^2) (1 - b))^(-1/4), b being the momentum, Adam's first beta.
    The last factor is what momentum does to the length of SGD's steps, the c of :func:`grafted`. The first one is, but
    for its limit, that of :func:`noise`: what momentum does in the long run, and the noise of n examples. n is the
    number of examples that count, which is m while all slopes are alike, and falls to the number of those that are not
    learned yet. So a few examples that the network has left, whose gradients agree, do not raise the rate; with the
    second factor, the root of their mean slope over its root mean square, they lower it: what is left last is often
    noise.

    The mean is over all updates so far, and a limit as with :func:`grafted`. Where no slope was seen, the steepest
    stands for it, L for O, and all examples count, m for n; these have a mean of their own.

    Args:
        seen: The constant that was seen, the scale, and the examples that count.
        state: State of the rule.
        settings: The optimizer's ``betas``, where it has them.

    Returns:
        The rate and the new state.

    Raises:
        ValueError: A setting is outside its range, or a number that is needed is not positive and finite.

    References:
        Not in the papers; chosen by validation among the variants of ``docs/evidence.md``.
    """
    state = _next(seen, state)
    constant, examples = _noise_of(seen)
    rate = noise_lengthening(settings, examples, seen.batch_size) * seen.scale / constant
    state = _with_mean(state, rate, bool(seen.observed))
    return min(rate, mean_of(state)), state


def _noise_of(seen: Observation) -> tuple[float, float]:
    """The constant that was seen and the examples that count; the steepest slope and all of them where none was."""
    return (seen.observed, seen.effective) if seen.observed else (seen.constant, seen.batch_size)


def noise_lengthening(settings: Settings, examples: float, batch_size: float) -> float:
    """What :func:`observed` makes of momentum, of the noise of the examples that count and of their share: its c."""
    noise = min((1 - _first_moment(settings)) * math.sqrt(examples / 2), 1.0)
    return noise * min(examples / batch_size, 1.0) ** 0.25 * lengthening(settings)


def _first_moment(settings: Settings) -> float:
    """The momentum in an update: Adam's first beta; RMSprop's makes steps longer as SGD's does, and is not in it."""
    return _decay("betas", settings["betas"][0]) if "betas" in settings else 0.0


def schedule_free(seen: Observation, state: RuleState, settings: Settings) -> tuple[float, RuleState]:
    r"""Schedule-Free AdamW, beta the first of its betas: rate = lasting scale * min(c / O, its mean).

    Schedule-Free moves a sequence z by Adam's direction without a first moment, and takes gradients at
    y = (1 - beta) z + beta x, with x the average of z. So a gradient moves y, the weights that are trained, by 1 - beta
    of z's step at once, and by the rest as the average takes it in. The step of y is what is made as long as SGD's:
    scale = \|g\| / \|u\|, with g the gradient and u the update of z at a rate of 1, the mean over the weights, and
    c = min((1 - beta) n, sqrt(1/2) / (1 - beta)); O and n are those of :func:`observed`, without a slope too.

    The average stands for a decay. So the scale is at least that of the first steps (:class:`LastingScale`): a rate
    that fell with the gradients, as that of :func:`grafted` does, would decay once more. What may fall is c / O, with
    the root of the share of the examples that are not learned: n has that share for a factor, and O its root. That c
    is in step with n, and its limit, have no other reason than that they did well.

    Args:
        seen: The constant that was seen, the scale, and the examples that count.
        state: State of the rule.
        settings: The optimizer's ``betas``.

    Returns:
        The rate and the new state.

    Raises:
        ValueError: A setting is outside its range, or a number that is needed is not positive and finite.

    References:
        A. Defazio et al.: The Road Less Scheduled, arXiv 2405.15682, 2024, for the optimizer. The rate is not in it,
        and was chosen by validation among the variants of ``docs/evidence.md``.
    """
    state = _next(seen, state)
    constant, examples = _noise_of(seen)
    ratio = schedule_free_lengthening(settings, examples) / constant
    state = _with_mean(state, ratio, bool(seen.observed))
    return seen.scale * min(ratio, mean_of(state)), state


def schedule_free_lengthening(settings: Settings, examples: float) -> float:
    """What :func:`schedule_free` makes of so many examples and of beta: its c."""
    share = 1 - _first_moment(settings)
    return min(share * examples, math.sqrt(0.5) / share)


RULES: dict[str, Rule] = {
    "inverse": inverse,
    "noise": noise,
    "adamo": adamo,
    "rmsprop": rmsprop,
    "adam": adam,
    "adamax": adamax,
    "adamo_authors": adamo_authors,
    "rmsprop_authors": rmsprop_authors,
    "adam_authors": adam_authors,
    "observed": observed,
    "grafted": grafted,
    "schedule_free": schedule_free,
}
"""The rules, by their names."""
RULE_OF_OPTIMIZER: dict[str, RuleName] = {
    "SGD": "inverse",
    "ZeroStartSGD": "inverse",
    "RMSprop": "rmsprop",
    "Adam": "adam",
    "AdamW": "adam",
    "NAdam": "adam",
    "Adamax": "adamax",
}
"""The paper's rule of each optimizer that is known, by its class; SGD's depends on its momentum too."""
GRAFTED = ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop")
"""Optimizers that rescale the gradient."""
SCHEDULE_FREE = ("AdamWScheduleFree",)
"""Optimizers that average the weights in place of a decay of the rate; schedulefree's, which is not imported."""
RULE_OF_A_BOUND: dict[str, RuleName] = {
    "SGD": "inverse",
    "ZeroStartSGD": "inverse",
    **dict.fromkeys(GRAFTED, "grafted"),  # type: ignore[dict-item]
    **dict.fromkeys(SCHEDULE_FREE, "schedule_free"),  # type: ignore[dict-item]
}
"""The rule of each optimizer where the constant is a bound, strict or smooth."""
SCALED: dict[str, type[StepScale]] = {"observed": StepScale, "grafted": StepScale, "schedule_free": LastingScale}
"""Rules that need the scale, and what is made of readings."""
SLOPED = ("observed", "schedule_free")
"""Rules that take the slopes of the loss, where the constant has the steepest slope in it."""


def initial_state(rule: str, first: float | None) -> RuleState:
    """The state before the first update.

    Args:
        rule: A key of :data:`RULES`.
        first: The rate that is set by hand for the time before the first update, or None. The authors' AdaMo takes the
            same number for the average's start.

    Returns:
        The state.
    """
    return RuleState(average=first) if rule == "adamo_authors" and first is not None else RuleState()


def rule_for(optimizer: str, settings: Settings, bound: str) -> RuleName:
    """Name of the rule for an optimizer's class and settings.

    SGD steps by 1/L. With momentum the paper family takes the paper's own rule, ``adamo``, the strict one ``noise``;
    heavy-ball momentum b is stable on a quadratic of smoothness L for rates below 2 (1 + b) / L, so with the smooth
    family the rate stays 1/L. The papers' rules for optimizers that rescale the gradient are taken for the paper family
    alone, since they ask for rates near 1; with the strict one such an optimizer has the rule ``observed``, and with
    the smooth one, which has no slope, ``grafted``.

    Args:
        optimizer: Class name of the optimizer.
        settings: Settings of its first parameter group.
        bound: Family of the constant.

    Returns:
        A key of :data:`RULES`.

    Raises:
        ValueError: No rule is known for the optimizer and the family.
    """
    forced = f"rule= with one of {', '.join(map(repr, RULES))} would force one"
    known = RULE_OF_OPTIMIZER if bound == "paper" else RULE_OF_A_BOUND
    if optimizer not in known:
        beside = f" with bound={bound!r}" if optimizer in RULE_OF_A_BOUND else ""
        raise ValueError(
            f"no learning-rate rule is known for the optimizer {optimizer}{beside}; known: {', '.join(known)}; {forced}"
        )
    name = known[optimizer]
    if name == "inverse":
        of_momentum: dict[str, RuleName] = {"paper": "adamo", "strict": "noise"}
        return of_momentum.get(bound, "inverse") if settings.get("momentum", 0) else "inverse"
    if name == "grafted":
        return "observed" if bound == "strict" else "grafted"
    if settings.get("centered", False):
        raise ValueError(f"no learning-rate rule is known for RMSprop with centered=True; use centered=False; {forced}")
    return name


def _next(seen: Observation, state: RuleState) -> RuleState:
    for name in ("constant", "squared", "activation_norm", "scale", "batch_size"):
        value = getattr(seen, name)
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value!r}: expected a positive finite number")
    if seen.observed and not (0 < seen.observed < math.inf and 0 < seen.effective < math.inf):
        raise ValueError(
            f"observed={seen.observed!r}, effective={seen.effective!r}: expected positive finite numbers, or 0 for none"
        )
    return replace(state, updates=state.updates + 1)


def _with_mean(state: RuleState, value: float, sloped: bool) -> RuleState:
    """The state with a value taken into the mean of those that there were, with or without a slope."""
    average, count = (state.average, state.weight) if sloped else (state.square, state.square_weight)
    mean, count = average + (value - average) / (count + 1), count + 1
    return replace(state, average=mean, weight=count) if sloped else replace(state, square=mean, square_weight=count)


def mean_of(state: RuleState) -> float:
    """The mean that limits a rate of ``observed`` and ``schedule_free``: of values with a slope, once there are any."""
    return state.average if state.weight else state.square


def _momentum(settings: Settings) -> tuple[float, float]:
    """The momentum, and the length of an averaged gradient over that of torch's velocity."""
    momentum, dampening = _decay("momentum", settings["momentum"]), float(settings.get("dampening", 0.0))
    if not dampening < 1:
        raise ValueError(f"dampening={dampening}: expected less than 1, since gradients enter with 1 - dampening")
    return momentum, (1 - momentum) / (1 - dampening)


def _adam_averages(seen: Observation, state: RuleState, settings: Settings) -> RuleState:
    first, second = (_decay("betas", beta) for beta in settings["betas"])
    return _next(seen, state).averaged(first, seen.constant).squared(second, seen.squared)


def _decay(name: str, value: Any) -> float:
    if not 0 <= float(value) < 1:
        raise ValueError(f"{name}={float(value)}: expected 0 <= {name} < 1")
    return float(value)
