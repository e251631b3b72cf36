"""From a Lipschitz constant to a learning rate, for one optimizer each: state in, (rate, state) out."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class RuleState:
    """What a rule remembers between updates.

    Attributes:
        updates: Constants seen so far.
        average: Exponential moving average of the constant, started at 0, not corrected for that start.
        weight: The same average of 1, which corrects for it.
    """

    updates: int = 0
    average: float = 0.0
    weight: float = 0.0


Rule = Callable[[float, RuleState, Mapping[str, Any]], tuple[float, RuleState]]
RuleName = Literal["inverse", "adamo"]


def inverse(constant: float, state: RuleState, settings: Mapping[str, Any]) -> tuple[float, RuleState]:
    """Gradient descent: rate = 1 / L.

    Args:
        constant: Lipschitz constant L, positive.
        state: State of the rule.
        settings: The optimizer's settings; not used.

    Returns:
        The rate and the new state.

    References:
        R. Yedida, S. Saha, arXiv 1902.07399, section 3.
    """
    _check_constant(constant)
    return 1.0 / constant, RuleState(state.updates + 1, constant, 1.0)


def adamo(constant: float, state: RuleState, settings: Mapping[str, Any]) -> tuple[float, RuleState]:
    """Momentum with a moving average of the constant ("AdaMo").

    The paper steps by v / K with v = b v + (1 - b) g and K = b K + (1 - b) L. torch accumulates v = b v + (1 - d) g,
    which is (1 - d) / (1 - b) times as long, so rate = (1 - b) / ((1 - d) K). K is corrected for its start at 0 as in
    Adam, by 1 - b^t where b is constant, so the first K is the first L.

    Args:
        constant: Lipschitz constant L, positive.
        state: State of the rule: the uncorrected K and its weight.
        settings: The optimizer's ``momentum`` b in [0, 1) and ``dampening`` d below 1 (0 if absent).

    Returns:
        The rate and the new state.

    Raises:
        ValueError: A setting is outside its range.

    References:
        R. Yedida, S. Saha, arXiv 1902.07399, section on gradient descent with momentum.
    """
    _check_constant(constant)
    momentum, dampening = float(settings["momentum"]), float(settings.get("dampening", 0.0))
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum}: expected 0 <= momentum < 1")
    if not dampening < 1:
        raise ValueError(f"dampening={dampening}: expected less than 1, since gradients enter with 1 - dampening")
    average = momentum * state.average + (1 - momentum) * constant
    weight = momentum * state.weight + (1 - momentum)
    rate = (1 - momentum) / ((1 - dampening) * (average / weight))
    return rate, RuleState(state.updates + 1, average, weight)


def _check_constant(constant: float) -> None:
    if not (math.isfinite(constant) and constant > 0):
        raise ValueError(f"constant={constant!r}: expected a positive finite number")


RULES: dict[str, Rule] = {"inverse": inverse, "adamo": adamo}
KNOWN_OPTIMIZERS = ("SGD",)


def rule_for(optimizer: str, settings: Mapping[str, Any], bound: str) -> RuleName:
    """Name of the rule for an optimizer's class and settings.

    SGD steps by 1/L. With momentum the paper family takes the paper's own rule, ``adamo``; the strict and the smooth
    constant are bounds, and heavy-ball momentum b is stable on a quadratic of smoothness L for rates below
    2 (1 + b) / L, so there the rate stays 1/L.

    Args:
        optimizer: Class name of the optimizer.
        settings: Settings of its first parameter group.
        bound: Family of the constant.

    Returns:
        A key of :data:`RULES`.

    Raises:
        ValueError: No rule is known for the optimizer.
    """
    if optimizer not in KNOWN_OPTIMIZERS:
        known = ", ".join(KNOWN_OPTIMIZERS)
        forced = ", ".join(f"rule={name!r}" for name in RULES)
        raise ValueError(
            f"no learning-rate rule is known for the optimizer {optimizer}; known: {known}; {forced} would force one"
        )
    return "adamo" if bound == "paper" and settings.get("momentum", 0) else "inverse"
