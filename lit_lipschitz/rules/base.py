"""Input, state and result of a learning-rate rule, and the record that describes a rule."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from lit_lipschitz.bounds.families import Bound, check_positive
from lit_lipschitz.bounds.penalties import SecondMoment

Settings = Mapping[str, Any]
"""A parameter group of an optimizer, with its settings under torch's names."""
StepScaleKind = Literal["total", "mean", "floored"]
"""How the step scale is estimated; see :mod:`lit_lipschitz.measurement.step_scale`."""


@dataclass(frozen=True)
class RuleInput:
    """What a rule computes a learning rate from.

    O is the constant with the measured gradient norm in the logits instead of the largest possible one, at most L. For
    a squared error it has the measured residuals, and may exceed L.

    Raises:
        ValueError: A number that has to be positive and finite is not.
    """

    constant: float  #: L, the Lipschitz constant of the loss, positive
    second_moment: float  #: estimate of L^2, positive
    activation_norm: float = 1.0  #: K_z, norm of the head's inputs, positive
    step_scale: float = 1.0  #: gradient norm over update norm at lr = 1, positive
    batch_size: float = 1.0  #: m, examples that the loss of one optimizer step averages over, positive
    observed_constant: float = 0.0  #: O; 0 if not measured
    effective_sample_size: float = 0.0  #: n, Kish's effective number of examples in the step, at most m; 0 without O
    curvature: float = 0.0  #: bound of the Hessian's largest eigenvalue, of a squared error; 0 if not needed

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
        step_scale: The estimate of :attr:`RuleInput.step_scale` that it needs; None without one.
        needs_logit_grads: Whether it uses gradient norms in the logits (``bound="strict"`` only).
        needs_residuals: Whether it uses residuals and curvature of a squared error.
        second_moment: The estimate of :attr:`RuleInput.second_moment` that it uses by default.
        uses_settings: Whether it uses settings of the optimizer, which all parameter groups must then share.
    """

    name: str
    function: Rule
    description: str
    state_type: Any
    initial: Callable[[float], Any] | None = None
    bounds: tuple[Bound, ...] = ("strict", "smooth", "paper")
    step_scale: StepScaleKind | None = None
    needs_logit_grads: bool = False
    needs_residuals: bool = False
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


def momentum_of(settings: Settings) -> tuple[Term, float]:
    """The momentum b of torch's SGD as a term, and the average gradient over torch's velocity, (1 - b) / (1 - d).

    ``momentum`` b is in [0, 1) and ``dampening`` d below 1 (0 if absent); a ValueError says which is not.
    """
    momentum, dampening = decay_rate("momentum", settings["momentum"]), float(settings.get("dampening", 0.0))
    if not dampening < 1:
        raise ValueError(f"dampening={dampening}: expected less than 1, since gradients enter with 1 - dampening")
    return Term("b", momentum, "the optimizer's momentum"), (1 - momentum) / (1 - dampening)
