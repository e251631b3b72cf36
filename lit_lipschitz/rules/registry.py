"""The learning-rate rules by name: ``bounded``, the default of all optimizers, ``inverse``, and those of the paper.

:mod:`lit_lipschitz.rules.bounded` has the first two, :mod:`lit_lipschitz.rules.papers` those of ``bound="paper"``. The
rule of each optimizer stands in :mod:`lit_lipschitz.measurement.optimizer_updates`.

Example:
    >>> from lit_lipschitz.rules.base import RuleInfo, RuleInput, RuleResult, Stateless
    >>> def half(inputs, state, settings):
    ...     return RuleResult(0.5 / inputs.constant, state)
    >>> register_rule(RuleInfo("half", half, "Half of the inverse: rate = 1 / (2 L).", Stateless))
    >>> RULES.pop("half").function(RuleInput(2.0, 4.0), (), {}).rate
    0.25
"""

from lit_lipschitz.rules import bounded, papers
from lit_lipschitz.rules.base import RuleInfo

RULES: dict[str, RuleInfo] = {info.name: info for info in (*bounded.RULES, *papers.RULES)}
"""The rules, by their names."""


def register_rule(info: RuleInfo) -> None:
    """Adds a rule, whose name ``LipschitzLR(rule=...)`` and the rules of an ``OptimizerInfo`` then may be.

    Raises:
        ValueError: There is another rule of that name.
    """
    if info.name in RULES:
        raise ValueError(f"a rule {info.name!r} is registered already; choose another name")
    RULES[info.name] = info
