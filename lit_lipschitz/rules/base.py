"""Input, state and result of a learning-rate rule, and the record that describes a rule."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lit_lipschitz.bounds.families import Bound, check_positive
from lit_lipschitz.bounds.penalties import SecondMoment

Settings = Mapping[str, Any]
"""A parameter group of an optimizer, with its settings under torch's names."""


@dataclass(frozen=True)
class RuleInput:
    """What a rule computes a learning rate from.

    The observed constant is L with the measured gradient norms in the logits instead of the largest possible one, at
    most L: their root mean square in the step or, for linear updates, the largest typical one since the last interval
    began, with a margin. For a squared error and linear updates it has the measured residuals, and may exceed L.

    Raises:
        ValueError: A number that has to be positive and finite is not.
    """

    constant: float  #: L, the Lipschitz constant of the loss, positive
    second_moment: float  #: estimate of L^2, positive
    activation_norm: float = 1.0  #: K_z, norm of the head's inputs, positive
    step_scale: float = 1.0  #: s, gradient norm over the norm of the long-run displacement at lr = 1, positive
    batch_size: float = 1.0  #: m, examples that the loss of one optimizer step averages over, positive
    observed_constant: float = 0.0  #: L with measured gradient norms; 0 if not measured
    effective_sample_size: float = 0.0  #: n that belongs to it, at most m; 0 without it
    descent: float = 0.0  #: decrease of the loss per unit of the learning rate, over the loss; 0 if not measured
    decays: bool = True  #: whether a schedule lowers the rate later, or the weights are averaged
    step: int = 0  #: number of the optimizer step that is about to be made, from 1
    is_linear: bool = False  #: whether the optimizer's updates are linear in the gradients
    is_curvature: bool = False  #: whether L bounds the curvature (``bound="smooth"``) and not the gradient

    def __post_init__(self) -> None:
        for name in ("constant", "second_moment", "activation_norm", "step_scale", "batch_size"):
            check_positive(name, getattr(self, name))
        observed, effective = self.observed_constant, self.effective_sample_size
        if observed and not (0 < observed < math.inf and 0 < effective < math.inf):
            raise ValueError(
                f"observed_constant={observed!r}, effective_sample_size={effective!r}: expected positive finite "
                "numbers, or observed_constant=0 if not measured"
            )


@dataclass(frozen=True)
class Term:
    """A number of a formula: its symbol there, its value, and its meaning in a few words."""

    symbol: str
    value: float
    meaning: str


class RuleResult(NamedTuple):
    """The learning rate before limits and a schedule, the rule's next state, and the rate's terms except those of L."""

    rate: float
    state: Any
    terms: tuple[Term, ...] = ()


class Stateless(NamedTuple):
    """State of a rule that remembers nothing."""


Rule = Callable[[RuleInput, Any, Settings], RuleResult]
"""From the input, the rule's state and the optimizer's settings to the rate, the new state and the terms.

It raises a ``KeyError`` for a setting that the optimizer lacks, and a ``ValueError`` for one that is out of range.
"""


@dataclass(frozen=True)
class RuleInfo:
    """A rule and what it needs.

    Attributes:
        name: Its name, as in ``LipschitzLR(rule=...)``.
        function: The rule.
        description: One line with its formula, which ``lit-lipschitz explain`` prints.
        state_type: A NamedTuple of plain numbers with defaults.
        initial: From a fixed learning rate that was used before the first update to the state; None where that rate
            does not matter.
        bounds: The families of constants that the rule is defined for.
        needs_steps: Whether it uses what is measured of the optimizer's steps, and O and n (``bound="strict"`` only).
        second_moment: The estimate of :attr:`RuleInput.second_moment` that it uses by default.
        uses_settings: Whether it uses settings of the optimizer, which all parameter groups must then share.
    """

    name: str
    function: Rule
    description: str
    state_type: Any
    initial: Callable[[float], Any] | None = None
    bounds: tuple[Bound, ...] = ("strict", "smooth", "paper")
    needs_steps: bool = False
    second_moment: SecondMoment = "constant"
    uses_settings: bool = True

    def initial_state(self, first_lr: float | None = None) -> Any:
        """The state before the first update; ``first_lr`` is a fixed learning rate that is used until then."""
        return self.state_type() if self.initial is None or first_lr is None else self.initial(first_lr)

    def restored_state(self, values: Mapping[str, float]) -> Any:
        """The state from its ``_asdict()``; fields of the state of another rule are ignored."""
        return self.state_type(**{name: values[name] for name in self.state_type._fields if name in values})


def decay_rate(name: str, value: Any) -> float:
    """A decay rate of a moving average; ValueError if it is not in [0, 1)."""
    if not 0 <= float(value) < 1:
        raise ValueError(f"{name}={float(value)}: expected 0 <= {name} < 1")
    return float(value)
