r"""The learning rate of every optimizer: the inverse of the largest of three constants, in units of its own steps.

An optimizer enters by two numbers. b is its momentum, or the first of its ``betas``: it remembers 1 / (1 - b)
gradients. D is what one of many independent gradients g moves the weights by in the long run, at a learning rate of 1:
(1 - d) / (1 - b) g for SGD with dampening d, and :math:`\sqrt{(1 + b) / (1 - b)}` times the update for other optimizers
(:meth:`lit_lipschitz.measurement.optimizer_updates.OptimizerInfo.displacement_gain`).

The rate is 1 / max(K, its past, P), with K = C / (c s) and c = min(sqrt(n / 2), 1 / (1 - b)).

s = \|g\| / \|D\|, the mean over the weights, each of which counts the same: with the rate s a gradient moves them
as far as gradient descent with a rate of 1 does. Three bounds follow:

1. **Noise.** C bounds the root mean square over a batch of the examples' gradient norms. If n examples are
   independent, the gradients of two batches differ by at most sqrt(2 / n) C in the root mean square: the square is
   2 / n times the trace of the covariance of one example's gradient. D may be as long as with a rate of the inverse
   of that, the Lipschitz constant of the noise.
2. **Gradient.** A single step, 1 - b of D, may be as long as with a rate of 1 / C. This binds for large batches.
3. **Descent.** No step lowers a loss f that is not negative below 0. With the update u at lr = 1, a step lowers its
   linear model by the rate times g'u: Polyak's step length f / g'u is the inverse of P. For Schedule-Free u is
   1 - b (1 - c) of the update of z, by which a step moves the weights that gradients are taken at; the average has z
   with the weight c. P contains the curvature of all layers, since \|g\|^2 <= 2 f B if B is the Lipschitz constant of
   the gradient. K vanishes with the residuals of a regression, and P does not. Without a positive loss P is 0.

Updates that are linear in the gradients grow with them. There C is L, or less if the gradients in the outputs that were
measured since the last interval began are much smaller than L assumes (with a margin of three standard deviations), and
n is m.
Other optimizers normalise the gradients: C is O, the constant with the root mean square of the gradients in the
outputs, measured in the same step as s, and n is Kish's effective number of examples.

K is not let below its past, since a rate that followed a constant that vanishes would grow without bound. Where the
rate decays later or the weights are averaged, the past is the root mean square of K over all steps, of which a measured
one stands for those since the one before. Where not, it is the maximum of K, since the rate must suit the end of the
run. From one measured step to the next the rate grows by a quarter at most (:data:`MAX_GROWTH`): steps between them are
not measured, and a rate that is too large is noticed before it does harm. For the same reason a step is measured as
soon as its number is a quarter larger than that of the last measured one, since a linear warm-up raises the rate by as
much.

With ``bound="smooth"`` C bounds the curvature in the output layer, which has no noise: c = 1 / (1 - b).

References:
    B. Polyak: Minimization of unsmooth functionals, USSR Computational Mathematics 9, 1969, for the third bound; N.
    Srebro, K. Sridharan, A. Tewari: Smoothness, Low Noise and Fast Rates, NIPS 2010, lemma 2.1, for its curvature.
    L. Kish: Survey Sampling, 1965, for n. N. Agarwal et al., arXiv 2002.11803, 2020, for steps with the length of
    one optimizer and the direction of another. The rate is not in them.
"""

import math
from typing import NamedTuple

from lit_lipschitz.rules.base import RuleInfo, RuleInput, RuleResult, Settings, Stateless, Term, decay_rate

MAX_GROWTH = 1.25
"""Largest factor by which a rate grows from one measured step to the next, so that what it does is measured in time."""


class PastState(NamedTuple):
    """Mean square over the optimizer steps and maximum of a constant, and the last rate."""

    mean_square: float = 0.0
    maximum: float = 0.0
    steps: int = 0  # that the mean is over
    last_step: int = 0  # the number of the last one
    rate: float = math.inf

    def updated(self, value: float, step: int) -> "PastState":
        """The state after one more value, which stands for all steps since the last one."""
        weight = max(step - self.last_step, 1) if self.steps else 1
        steps = self.steps + weight
        mean_square = self.mean_square + (value**2 - self.mean_square) * weight / steps
        return PastState(mean_square, max(self.maximum, value), steps, step, self.rate)


def bounded(inputs: RuleInput, state: PastState, settings: Settings) -> RuleResult:
    r"""Rate = 1 / max(K, its past, P), with K = C / (c s) and c = min(sqrt(n / 2), 1 / (1 - b)); see this module."""
    momentum = momentum_of_any(settings)
    constant, examples = _constant_and_examples(inputs)
    gain = 1 / (1 - momentum)
    if examples is not None:
        gain = min(math.sqrt(examples.value / 2), gain)
    now = constant.value / (gain * inputs.step_scale)
    state = state.updated(now, inputs.step)
    past = math.sqrt(state.mean_square) if inputs.decays else state.maximum
    mean = "root mean square" if inputs.decays else "maximum"
    terms = [
        Term("b", momentum, "the optimizer's momentum, or the first of its betas"),
        Term(
            "s",
            inputs.step_scale,
            "norm of one gradient, divided by that of the weight change that it causes now and later, at lr = 1",
        ),
        constant,
        *([examples] if examples else ()),
        Term(
            "c",
            gain,
            "min(sqrt(n / 2), 1 / (1 - b)), the largest factor that batch noise and the length of a step allow",
        ),
        Term("K", now, "C / (c s)"),
        Term("past", past, f"{mean} of K over all steps"),
        Term("P", inputs.descent, "relative decrease of the loss per unit of the learning rate"),
    ]
    rate = 1 / max(now, past, inputs.descent)
    if rate > (most := MAX_GROWTH * state.rate):
        rate = most
        terms.append(Term("most", most, "1.25 times the last rate, the largest growth at once"))
    return RuleResult(rate, state._replace(rate=rate), tuple(terms))


def momentum_of_any(settings: Settings) -> float:
    """The decay rate b of an optimizer's memory: ``momentum``, or the first of ``betas``; 0 without both.

    Raises:
        ValueError: It is not in [0, 1).
    """
    if "betas" in settings:
        return decay_rate("betas", settings["betas"][0])
    return decay_rate("momentum", settings.get("momentum", 0.0))


def _constant_and_examples(inputs: RuleInput) -> tuple[Term, Term | None]:
    """C and n; no n for a constant of the curvature."""
    if inputs.is_curvature:
        return Term("C", inputs.constant, "equal to L"), None
    if inputs.observed_constant and inputs.is_linear:
        meaning = "equal to L"
        if inputs.observed_constant != inputs.constant:
            meaning = "L with the largest gradients since the last interval began, and a margin, not the possible ones"
        return Term("C", inputs.observed_constant, meaning), Term("n", inputs.batch_size, "equal to m")
    if inputs.observed_constant:
        constant = Term(
            "C", inputs.observed_constant, "O: L with the measured gradient norms instead of the largest possible ones"
        )
        return constant, Term("n", inputs.effective_sample_size, "effective number of examples in a step (Kish)")
    return Term("C", inputs.constant, "equal to L"), Term("n", inputs.batch_size, "equal to m")


def inverse(inputs: RuleInput, state: Stateless, settings: Settings) -> RuleResult:
    """Gradient descent, whatever the optimizer: rate = 1 / L."""
    return RuleResult(1.0 / inputs.constant, state)


RULES = (
    RuleInfo(
        "bounded",
        bounded,
        "rate = 1 / max(K, past, P), the inverse of the largest of three constants.",
        PastState,
        bounds=("strict", "smooth"),
        needs_steps=True,
    ),
    RuleInfo("inverse", inverse, "Gradient descent: rate = 1 / L.", Stateless, uses_settings=False),
)
