"""From what was measured to a rate: a pure function, so that every rank that has measured the same decides the same."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lit_lipschitz import bounds
from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.measurement.optimizer_updates import DECOUPLED
from lit_lipschitz.rules import registry as rules

LEAST_SLOPE = 0.01
"""What is taken to be there at least of the steepest slope, since a loss of 0 would have a rate without a limit."""
DEVIATIONS = 3.0
"""How many standard deviations of a squared error's residuals count as the largest; 99.7 % of normal ones are less."""
LEAST_RESIDUAL = 0.1
"""What is taken to be there at least of the norms of outputs and targets, for the same reason."""


@dataclass(frozen=True)
class Measurement:
    """What all ranks agree on after the reduction.

    Attributes:
        activation_norm: Size of the head's inputs in the global batch of one optimizer step, times the loss's factor,
            and for a sum times what it sums up (for the smooth family the root of that).
        weight_norm: Largest norm of a parameter tensor.
        batch_size: Examples (tokens, pixels) in the global batch.
        dropped: Batches with non-finite activations on the rank that had most.
        squares: Frobenius norm of the matrix of squared activations, for the estimate of the authors' scripts.
        output_norm: Norm of the head's outputs plus that of the targets, for losses that depend on it.
        scale: See :class:`lit_lipschitz.rules.registry.Observation`.
        slope: Root mean square slope of the examples' losses in the head's outputs; 0 where none was seen.
        mean_slope: Their mean slope.
        residual: Root mean square of what a squared error leaves of its targets, each number by itself; 0 where it was
            not seen.
        factor: What a squared error's mean was multiplied by when that was seen, which is in the size of the inputs.
    """

    activation_norm: float
    weight_norm: float
    batch_size: int
    dropped: int
    squares: float = 0.0
    output_norm: float = 0.0
    scale: float = 1.0
    slope: float = 0.0
    mean_slope: float = 0.0
    residual: float = 0.0
    factor: float = 1.0


@dataclass(frozen=True)
class Decision:
    """A rate and what it was computed from; 0 stands for a number that is not there.

    Attributes:
        lr: Learning rate at a schedule factor of 1.
        constant: Lipschitz constant of the loss.
        activation_norm: See :class:`Measurement`.
        weight_norm: See :class:`Measurement`.
        cap: The limit that changed the rate, or "".
        observed: See :class:`lit_lipschitz.rules.registry.Observation`.
        effective: Likewise; 0 where no slope was seen.
        curvature: Likewise; 0 where it was not needed.
    """

    lr: float
    constant: float = 0.0
    activation_norm: float = 0.0
    weight_norm: float = 0.0
    cap: str = ""
    observed: float = 0.0
    effective: float = 0.0
    curvature: float = 0.0


@dataclass(frozen=True)
class Policy:
    """How a rate follows from a measurement; the attributes are arguments of ``LipschitzLR``.

    Raises:
        ConfigurationError: A value is out of its range.
    """

    bound: bounds.Bound = "strict"
    norm: bounds.Norm = "frobenius"
    rule: Literal["auto"] | rules.RuleName = "auto"
    squared: Literal["auto"] | bounds.Estimate = "auto"
    weight_decay: float | None = None
    min_lr: float = 0.0
    max_lr: float | None = None
    max_growth: float | None = None

    def __post_init__(self) -> None:
        if self.rule not in ("auto", *rules.RULES):
            raise ConfigurationError(f"LipschitzLR(rule={self.rule!r}): expected one of 'auto', {_quoted(rules.RULES)}")
        if self.squared not in ("auto", *get_args(bounds.Estimate)):
            raise ConfigurationError(
                f"LipschitzLR(squared={self.squared!r}): expected one of 'auto', 'constant', 'scripts'"
            )
        if self.estimate == "scripts" and (self.bound, self.norm) != ("paper", "frobenius"):
            raise ConfigurationError(
                f"LipschitzLR(squared='scripts') is the estimate of the authors' scripts, for bound='paper' and "
                f"norm='frobenius'; found {self.bound!r} and {self.norm!r}: change them, or pass squared='constant'"
            )
        if self.rule == "observed" and self.bound != "strict":
            raise ConfigurationError(
                f"LipschitzLR(rule='observed') takes the slope of the loss in the place of the steepest one, which the "
                f"constants of bound='strict' have in them, and found {self.bound!r}: change it, or pass rule='grafted'"
            )
        if self.weight_decay is not None and not 0 <= self.weight_decay < math.inf:
            raise ConfigurationError(f"LipschitzLR(weight_decay={self.weight_decay}): expected at least 0, or null")
        if self.max_lr is not None and not 0 < self.max_lr < math.inf:
            raise ConfigurationError(f"LipschitzLR(max_lr={self.max_lr}): expected a positive number")
        if not 0 <= self.min_lr <= (math.inf if self.max_lr is None else self.max_lr):
            raise ConfigurationError(f"LipschitzLR(min_lr={self.min_lr}): expected 0 <= min_lr <= max_lr")
        if self.max_growth is not None and not self.max_growth >= 1:
            raise ConfigurationError(f"LipschitzLR(max_growth={self.max_growth}): expected a factor of at least 1")

    @property
    def estimate(self) -> bounds.Estimate:
        """The estimate of the squared constant; the authors' rules bring the authors' own."""
        if self.squared != "auto":
            return self.squared
        return "scripts" if self.rule in ("rmsprop_authors", "adam_authors") else "constant"

    def decay_of(self, optimizer: str, groups: Sequence[Mapping[str, Any]]) -> float:
        """The coefficient of the L2 term in the loss: a weight decay that the optimizer adds to the gradient."""
        if self.weight_decay is not None:
            return self.weight_decay
        coupled = [g for g in groups if optimizer not in DECOUPLED and not g.get("decoupled_weight_decay", False)]
        return max((float(group.get("weight_decay", 0.0)) for group in coupled), default=0.0)

    @property
    def of_batch(self) -> bool:
        """Whether the norm is one of the whole batch matrix, which grows with the number of rows."""
        return self.norm in ("frobenius", "spectral")

    @property
    def limited(self) -> bool:
        """Whether there is a limit that could bind."""
        return self.min_lr > 0 or self.max_lr is not None or self.max_growth is not None

    def rule_for(self, optimizer: str, groups: Sequence[Mapping[str, Any]]) -> rules.RuleName:
        """The name of the rule for an optimizer's class and its parameter groups.

        Raises:
            ConfigurationError: None is known and none is forced, or it does not fit the groups' settings.
        """
        try:
            momentous = max(groups, key=lambda group: group.get("momentum", 0.0))
            name = self.rule if self.rule != "auto" else rules.rule_for(optimizer, momentous, self.bound)
            rules.RULES[name](rules.Observation(1.0, 1.0), rules.RuleState(), groups[0])
        except KeyError as missing:
            raise ConfigurationError(
                f"LipschitzLR(rule={self.rule!r}): expected an optimizer with the setting {missing}, found "
                f"{optimizer}; pass rule='inverse', which needs none"
            ) from None
        except ValueError as error:
            raise ConfigurationError(f"LipschitzLR: {error}") from None
        needed = [key for key in ("momentum", "dampening", "alpha", "betas", "eps") if key in groups[0]]
        for key in needed if name != "inverse" else ():
            if len({str(group[key]) for group in groups}) > 1:
                raise ConfigurationError(
                    f"LipschitzLR: the rule {name!r} needs the same {key} in all parameter groups; found "
                    f"{', '.join(str(group[key]) for group in groups)}: make them equal, or pass rule='inverse'"
                )
        return name

    def decide(
        self,
        measured: Measurement,
        *,
        loss: bounds.Loss,
        num_outputs: int,
        optimizer: str,
        groups: list[dict[str, Any]],
        state: rules.RuleState,
        last: Decision | None,
    ) -> tuple[Decision, rules.RuleState] | None:
        """The next rate.

        Args:
            measured: What the ranks agree on.
            loss: The loss.
            num_outputs: Outputs of the head.
            optimizer: Class name of the optimizer.
            groups: Its parameter groups.
            state: What the rule remembers.
            last: The decision before this one.

        Returns:
            The decision and the rule's new state, or None where the measurement gives no rate.
        """
        sizes = (measured.activation_norm, measured.weight_norm, measured.squares, measured.output_norm)
        finite = all(map(math.isfinite, sizes))
        if not finite or measured.activation_norm == 0 or measured.batch_size < 1:
            return None
        data = loss.constant(
            measured.activation_norm,
            batch_size=measured.batch_size,
            num_outputs=num_outputs,
            bound=self.bound,
            norm=self.norm,
            output_norm=measured.output_norm,
        )
        l2 = bounds.l2(self.decay_of(optimizer, groups), measured.weight_norm, bound=self.bound)
        constant = data + l2
        squared = bounds.second_moment(
            data,
            l2,
            estimate=self.estimate,
            activation_norm=measured.activation_norm,
            fourth_moment_norm=measured.squares,
        )
        if not (0 < constant < math.inf and 0 < squared < math.inf and measured.scale > 0):
            return None
        rule = self.rule_for(optimizer, groups)
        observed, effective, curvature = *self._observed(measured, data, l2), 0.0
        if rule == "noise":
            observed = self._of_residual(measured, num_outputs, data, l2)
            effective = float(measured.batch_size)
            curvature = self._curvature(measured, loss, num_outputs, self.decay_of(optimizer, groups))
        seen = rules.Observation(
            constant,
            squared,
            activation_norm=measured.activation_norm,
            scale=measured.scale,
            batch_size=measured.batch_size,
            observed=observed,
            effective=effective,
            curvature=curvature,
        )
        rate, state = rules.RULES[rule](seen, state, groups[0])
        lr, cap = self.limit(rate, last)
        decision = Decision(
            lr,
            constant,
            measured.activation_norm,
            measured.weight_norm,
            cap,
            observed=observed,
            effective=effective if observed else 0.0,
            curvature=curvature,
        )
        return decision, state

    def _observed(self, measured: Measurement, data: float, l2: float) -> tuple[float, float]:
        """The constant with the slope that was seen, and how many examples count; zeros where none was.

        Args:
            measured: What the ranks agree on.
            data: The constant without its L2 term, which has the steepest slope in it.
            l2: That term.
        """
        if not measured.slope:
            return 0.0, 0.0
        rows = measured.batch_size if self.norm == "frobenius" else 1
        steepest = data / measured.activation_norm * math.sqrt(rows)
        observed = data * min(max(measured.slope / steepest, LEAST_SLOPE), 1.0) + l2
        return observed, measured.batch_size * min(measured.mean_slope / measured.slope, 1.0) ** 2

    def _of_residual(self, measured: Measurement, num_outputs: int, data: float, l2: float) -> float:
        """The constant of a squared error whose residual was seen; 0 where none was.

        Three times the root mean square of the residuals stands in it for the norms of outputs and targets.
        """
        if not (measured.residual and measured.output_norm) or self.norm != "frobenius":
            return 0.0
        residual = DEVIATIONS * measured.residual * math.sqrt(measured.batch_size * num_outputs)
        return data * max(residual / measured.output_norm, LEAST_RESIDUAL) + l2

    def _curvature(self, measured: Measurement, loss: bounds.Loss, num_outputs: int, decay: float) -> float:
        """The smooth constant of a squared error, with the Frobenius norm in place of the spectral one; 0 of others."""
        if loss.name != "mean_squared_error" or self.norm != "frobenius":
            return 0.0
        smooth = loss.constant(
            measured.activation_norm,
            batch_size=measured.batch_size,
            num_outputs=num_outputs,
            bound="smooth",
            norm="frobenius",
        )
        return smooth / measured.factor + decay  # the factor was squared

    def limit(self, rate: float, last: Decision | None) -> tuple[float, str]:
        """The rate within its limits, and the name of the limit that changed it, or ""."""
        limits = [("max_lr", self.max_lr)]
        if self.max_growth is not None and last is not None:
            limits.append(("max_growth", self.max_growth * last.lr))
        cap = ""
        for name, most in limits:
            if most is not None and rate > most:
                rate, cap = most, name
        return (self.min_lr, "min_lr") if rate < self.min_lr else (rate, cap)


def _quoted(names: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, names))
