"""Learning rates of SGD, without and with momentum."""

import math

from lit_lipschitz.rules.base import RuleInfo, RuleInput, RuleResult, Settings, Stateless, Term, momentum_of


def inverse(inputs: RuleInput, state: Stateless, settings: Settings) -> RuleResult:
    """Gradient descent: rate = 1 / L.

    With the smooth family that is the rate of SGD with momentum b too: heavy-ball momentum is stable on a quadratic of
    smoothness L for rates below 2 (1 + b) / L.
    """
    return RuleResult(1.0 / inputs.constant, state)


def noise(inputs: RuleInput, state: Stateless, settings: Settings) -> RuleResult:
    r"""SGD with momentum b: rate = (1 - b) sqrt(m / 2) / L, and at most 1 / (sqrt(1 - b) L).

    The inverse of a Lipschitz constant of the gradient noise. A strict L is a bound of the root mean square over a
    batch of the single examples' gradient norms. If the m examples are independent, the gradients g and g' of two
    batches differ by sqrt(E norm(g - g')^2) <= sqrt(2 / m) L, whatever part they share: the square is 2 / m times the
    trace of the covariance of one example's gradient. So the noise, unlike L, falls as the batch grows, and the rate
    may grow with sqrt(m), as it does with the paper's K / m. Momentum makes steps 1 / (1 - b) times longer in the long
    run, dampening d 1 - d times; the rate compensates both, as :func:`lit_lipschitz.rules.papers.adamo` does.

    The limit is for large batches, where most of a gradient is the shared part and m says nothing: it is the plain 1/L
    without momentum, and with 0.9 it binds from m = 2,000 on. Correlated examples, such as the tokens of a text, count
    in full.

    The L of a squared error belongs to outputs and targets as large as those that were seen. Where its residuals were
    measured as well, O replaces L: it contains three times the residuals' root mean square. Both vanish as outputs,
    targets or residuals do and the curvature does not, so the rate is at most 1 / ((1 - d) curvature).
    """
    momentum, averaging = momentum_of(settings)
    largest = averaging / (1 - momentum.value) ** 1.5
    rate = min(averaging * math.sqrt(inputs.batch_size / 2), largest) / (inputs.observed_constant or inputs.constant)
    terms = [momentum]
    if inputs.observed_constant:
        instead = "three times the residuals' root mean square instead of outputs and targets"
        terms.append(Term("O", inputs.observed_constant, f"L with {instead}"))
    if inputs.curvature:
        # (1 - b) / averaging is 1 - d.
        limit = averaging / (1 - momentum.value) / inputs.curvature
        terms.append(Term("limit", limit, "largest rate, by the inverse of the smooth constant"))
        rate = min(rate, limit)
    return RuleResult(rate, state, tuple(terms))


RULES = (
    RuleInfo("inverse", inverse, "Gradient descent: rate = 1 / L.", Stateless, uses_settings=False),
    RuleInfo(
        "noise",
        noise,
        "SGD with momentum b: rate = (1 - b) sqrt(m / 2) / L, and at most 1 / (sqrt(1 - b) L).",
        Stateless,
        needs_residuals=True,
    ),
)
