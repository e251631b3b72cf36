"""Learning rates of Adam-type optimizers: their own update direction, with the step length of SGD."""

import math
from typing import NamedTuple

from lit_lipschitz.rules.base import RuleInfo, RuleInput, RuleResult, Settings, Term, decay_rate


class MeanState(NamedTuple):
    """Mean over all updates."""

    mean: float = 0.0
    updates: int = 0

    def updated(self, value: float) -> "MeanState":
        """The state after one more value."""
        updates = self.updates + 1
        return MeanState(self.mean + (value - self.mean) / updates, updates)


class MeanByGradNormState(NamedTuple):
    """Means over the updates with a measured gradient norm in the logits, and over those without one."""

    mean: float = 0.0
    updates: int = 0
    mean_without: float = 0.0
    updates_without: int = 0

    def updated(self, value: float, measured: bool) -> "MeanByGradNormState":
        """The state after one more value, computed with a measured gradient norm or without."""
        with_norm, without = MeanState(*self[:2]), MeanState(*self[2:])
        if measured:
            return MeanByGradNormState(*with_norm.updated(value), *without)
        return MeanByGradNormState(*with_norm, *without.updated(value))

    @property
    def limit(self) -> float:
        """The mean that limits the rate, which is the one with measured gradient norms as soon as there is one."""
        return self.mean if self.updates else self.mean_without


def grafted(inputs: RuleInput, state: MeanState, settings: Settings) -> RuleResult:
    r"""Adam's direction with the step length of SGD with momentum: rate = min(scale, mean of scale) c / L.

    scale = \|g\| / \|u\|, where g is the gradient, u the optimizer's update at lr = 1, both over all parameters, and c
    the gain by momentum (:func:`momentum_gain`). The mean is over all updates, and a limit: a rate that followed
    growing gradients would amplify those that it causes itself.

    References:
        Length and direction from two optimizers: N. Agarwal et al., Disentangling Adaptive Gradient Methods from
        Learning Rates, arXiv 2002.11803, 2020. The rate is not in it.
    """
    state, gain = state.updated(inputs.step_scale), momentum_gain(settings)
    terms = (
        Term("scale", inputs.step_scale, "gradient norm over update norm at lr = 1"),
        Term("c", gain, "gain in step length by momentum"),
        Term("mean", state.mean, "limit of scale: its mean over all updates"),
    )
    return RuleResult(min(inputs.step_scale, state.mean) * gain / inputs.constant, state, terms)


def momentum_gain(settings: Settings) -> float:
    """The c of :func:`grafted`: how much longer momentum makes the steps of SGD.

    With the momentum b, Adam's first beta, that is 1 / (1 - b) for equal gradients and 1 / sqrt(1 - b^2) for
    independent ones. c = ((1 - b^2) (1 - b))^(-1/4), 2.7 at b = 0.9, is the geometric mean of the latter and of
    1 / sqrt(1 - b), which by validation is slightly too long. RMSprop's momentum makes steps longer as SGD's does, so
    b is 0 there.
    """
    momentum = first_beta(settings)
    return float(((1 - momentum**2) * (1 - momentum)) ** -0.25)


def observed(inputs: RuleInput, state: MeanByGradNormState, settings: Settings) -> RuleResult:
    r"""Adam's direction, steps by the measured constant and gradient noise: rate = min(c scale / O, its mean).

    A strict L contains the largest norm that the gradient of an example's loss in the logits can have, sqrt(2) for the
    cross-entropy. With the measured one, the norm of the loss's gradient G in the logits, it is
    O = \|G\|_F \|A\|_F, A being the head's inputs: by the Cauchy-Schwarz inequality still a bound of the gradient G'A
    in the head's weights, at the current weights. scale / O contains \|g\| / (\|G\|_F \|A\|_F): how much of the
    examples' gradients does not cancel, and the share of the other layers. So the rate does not fall with the loss, as
    that of :func:`grafted` does, and falls less with growing activations.

    The scale is the mean over the weights, each of which counts the same; over all parameters together the largest
    one dominates. The head of a network wants a larger rate than a wide layer, and Adam's steps in both are as long as
    the root of their sizes.

    c is :func:`noise_limited_gain`. The mean is over all updates, and a limit as in :func:`grafted`. Where no gradient
    norm was measured, L replaces O and m replaces n; these updates have a mean of their own.
    """
    constant, examples = observed_noise(inputs)
    gain = noise_limited_gain(settings, examples.value, inputs.batch_size)
    rate = gain * inputs.step_scale / constant.value
    state = state.updated(rate, bool(inputs.observed_constant))
    terms = (
        Term("scale", inputs.step_scale, "gradient norm over update norm at lr = 1, mean over the weights"),
        constant,
        examples,
        Term("c", gain, "gain in step length by momentum, gradient noise and n / m"),
        Term("mean", state.limit, "limit of the rate: the mean of c scale / O over all updates"),
    )
    return RuleResult(min(rate, state.limit), state, terms)


def observed_noise(inputs: RuleInput) -> tuple[Term, Term]:
    """O and n; L and m where no gradient norm in the logits was measured."""
    if not inputs.observed_constant:
        constant = Term("O", inputs.constant, "L: no gradient norm in the logits was measured")
        return constant, Term("n", inputs.batch_size, "m, likewise")
    constant = Term("O", inputs.observed_constant, "L with the measured gradient norm in the logits")
    return constant, Term("n", inputs.effective_sample_size, "effective number of examples in a step (Kish)")


def noise_limited_gain(settings: Settings, examples: float, batch_size: float) -> float:
    """The c of :func:`observed`: min((1 - b) sqrt(n / 2), 1) (n / m)^(1/4) times :func:`momentum_gain`.

    The first factor is, up to its limit, that of :func:`lit_lipschitz.rules.sgd.noise`. n, the effective number of
    ``examples``, is m while all have the same gradient norm, and falls to the number of those that are not learned yet.
    So a few examples that the network has left, whose gradients agree, do not raise the rate; with the second factor,
    the root of their mean gradient norm over its root mean square, they lower it: what is learned last is often noise.
    """
    noise = min((1 - first_beta(settings)) * math.sqrt(examples / 2), 1.0)
    return noise * min(examples / batch_size, 1.0) ** 0.25 * momentum_gain(settings)


def first_beta(settings: Settings) -> float:
    """The decay rate of the first moment in an update; 0 for optimizers without ``betas``, such as RMSprop."""
    return decay_rate("betas", settings["betas"][0]) if "betas" in settings else 0.0


RULES = (
    RuleInfo(
        "observed",
        observed,
        "Adam's direction, as long as SGD's steps at the measured noise: rate = min(c scale / O, its mean).",
        MeanByGradNormState,
        bounds=("strict",),
        step_scale="mean",
        needs_logit_grads=True,
    ),
    RuleInfo(
        "grafted",
        grafted,
        "Adam's direction with the step length of SGD with momentum: rate = min(scale, mean of scale) c / L.",
        MeanState,
        step_scale="total",
    ),
)
