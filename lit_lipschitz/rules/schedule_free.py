"""Learning rate of Schedule-Free AdamW, which averages the weights instead of decaying the learning rate."""

import math

from lit_lipschitz.rules.adaptive import MeanByGradNormState, first_beta, observed_noise
from lit_lipschitz.rules.base import RuleInfo, RuleInput, RuleResult, Settings, Term


def schedule_free(inputs: RuleInput, state: MeanByGradNormState, settings: Settings) -> RuleResult:
    r"""Schedule-Free AdamW, beta its first one: rate = scale min(c / O, its mean), with a scale that does not decay.

    Schedule-Free moves a sequence z in Adam's direction without a first moment, and takes gradients at
    y = (1 - beta) z + beta x, with x the average of z. So a gradient moves y, the weights that are trained, by 1 - beta
    of z's step at once, and by the rest as it enters the average. The step of y gets the length of SGD's:
    scale = \|g\| / \|u\|, with g the gradient and u the update of z at lr = 1, the mean over the weights, and
    c = :func:`schedule_free_gain`; O and n are those of :func:`lit_lipschitz.rules.adaptive.observed`.

    The average replaces a decay. So the scale is at least that of the first steps
    (:class:`lit_lipschitz.measurement.step_scale.FlooredScale`): a rate that fell with the gradients, as that of
    :func:`lit_lipschitz.rules.adaptive.grafted` does, would decay once more. What may fall is c / O, with the root of
    the share of examples that are not learned: n is proportional to that share, O to its root.

    References:
        A. Defazio et al.: The Road Less Scheduled, arXiv 2405.15682, 2024, for the optimizer. The rate is not in it.
    """
    constant, examples = observed_noise(inputs)
    gain = schedule_free_gain(settings, examples.value)
    ratio = gain / constant.value
    state = state.updated(ratio, bool(inputs.observed_constant))
    terms = (
        Term("scale", inputs.step_scale, "gradient norm over update norm at lr = 1, mean over the weights, floored"),
        Term("beta", first_beta(settings), "the optimizer's first; a gradient moves the weights by 1 - beta at once"),
        constant,
        examples,
        Term("c", gain, "gain in step length by n and beta"),
        Term("mean", state.limit, "limit of c / O: its mean over all updates"),
    )
    return RuleResult(inputs.step_scale * min(ratio, state.limit), state, terms)


def schedule_free_gain(settings: Settings, examples: float) -> float:
    """The c of :func:`schedule_free`, found by validation: min((1 - beta) n, sqrt(1/2) / (1 - beta)), n examples."""
    share = 1 - first_beta(settings)
    return min(share * examples, math.sqrt(0.5) / share)


RULES = (
    RuleInfo(
        "schedule_free",
        schedule_free,
        "Schedule-Free AdamW: rate = scale min(c / O, its mean), with a scale that does not decay.",
        MeanByGradNormState,
        step_scale="floored",
        needs_logit_grads=True,
    ),
)
