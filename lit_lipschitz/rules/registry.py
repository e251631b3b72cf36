"""The learning-rate rules by name.

With L the Lipschitz constant, O the one with the measured gradient norm, m the examples in a step, n the effective
number of them, b the momentum, scale = gradient norm over update norm at lr = 1, and gains c that each rule defines:

============= ========================================= ============================================================
rule          rate                                      default for
============= ========================================= ============================================================
inverse       1 / L                                     SGD; with ``bound="smooth"`` SGD with momentum too
noise         (1 - b) sqrt(m / 2) / L, limited          SGD with momentum
observed      min(c scale / O, its mean)                Adam-type optimizers
grafted       min(scale, its mean) c / L                Adam-type optimizers with ``bound="smooth"``
schedule_free scale min(c / O, its mean)                Schedule-Free AdamW
============= ========================================= ============================================================

All but ``inverse`` were chosen by validation (``docs/guide/evidence.md``) and are not in the papers;
:mod:`lit_lipschitz.rules.papers` has those of ``bound="paper"``. The rules of each optimizer stand in
:mod:`lit_lipschitz.measurement.optimizer_updates`.

Example:
    >>> from lit_lipschitz.rules.base import RuleInfo, RuleInput, RuleResult, Stateless
    >>> def half(inputs, state, settings):
    ...     return RuleResult(0.5 / inputs.constant, state)
    >>> register_rule(RuleInfo("half", half, "Half of the inverse: rate = 1 / (2 L).", Stateless))
    >>> RULES.pop("half").function(RuleInput(2.0, 4.0), (), {}).rate
    0.25
"""

from lit_lipschitz.rules import adaptive, papers, schedule_free, sgd
from lit_lipschitz.rules.base import RuleInfo

RULES: dict[str, RuleInfo] = {
    info.name: info for info in (*sgd.RULES, *adaptive.RULES, *schedule_free.RULES, *papers.RULES)
}
"""The rules, by their names."""


def register_rule(info: RuleInfo) -> None:
    """Adds a rule, whose name ``LipschitzLR(rule=...)`` and the rules of an ``OptimizerInfo`` then may be.

    Raises:
        ValueError: There is another rule of that name.
    """
    if info.name in RULES:
        raise ValueError(f"a rule {info.name!r} is registered already; choose another name")
    RULES[info.name] = info
