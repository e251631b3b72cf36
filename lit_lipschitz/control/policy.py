"""From a measurement to a learning rate: a pure function, so that ranks with equal measurements decide alike."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lit_lipschitz import bounds
from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.measurement import optimizer_updates
from lit_lipschitz.measurement.optimizer_updates import OptimizerInfo
from lit_lipschitz.rules.base import RuleInfo, RuleInput, Term
from lit_lipschitz.rules.registry import RULES

MIN_GRAD_NORM_RATIO = 0.01
"""Lower bound on the measured over the largest possible gradient norm; keeps the rate finite as the loss goes to 0."""
NUM_DEVIATIONS = 3.0
"""Standard deviations of a squared error's residuals that count as the largest; 99.7 % of normal ones are less."""
MIN_RESIDUAL_RATIO = 0.1
"""Lower bound on the residuals over the norms of outputs and targets, for the same reason."""

_NORMS = {
    "frobenius": "Frobenius norm of a batch of the head's inputs",
    "spectral": "spectral norm of a batch of the head's inputs",
    "sample": "largest norm of an example of the head's inputs",
}
_COEFFICIENTS = {
    "paper": ("estimate", "the paper's estimate of the gradient norm of an example's loss in the head's outputs"),
    "strict": ("G_max", "largest gradient norm that an example's loss can have in the head's outputs"),
    "smooth": ("curvature", "largest curvature that an example's loss can have in the head's outputs"),
}
_CONSTANTS = {
    "paper": "the paper's estimate of the Lipschitz constant of the loss",
    "strict": "Lipschitz constant of the loss in the head's weights",
    "smooth": "Lipschitz constant of the loss's gradient in the head's weights",
}


@dataclass(frozen=True)
class Measurement:
    """What all ranks agree on after the reduction.

    Attributes:
        activation_norm: K_z, norm of the head's inputs in the global batch of one optimizer step, times the loss's
            factor, and for a sum times the number of its terms (for the smooth family the root of that).
        weight_norm: W, largest norm of a parameter tensor.
        batch_size: m, examples (tokens, pixels) in the global batch.
        dropped: Batches with non-finite activations on the rank that had most.
        fourth_moment_norm: Frobenius norm of the matrix of squared activations, for the authors' second moment.
        output_norm: Norm of the head's outputs plus that of the targets, for losses whose constant depends on it.
        step_scale: Gradient norm over update norm at lr = 1; 0 if no usable gradient was measured.
        logit_grad_norm: Root mean square over the examples of the gradient norm of an example's loss in the logits; 0
            if not measured.
        mean_logit_grad_norm: Mean of that gradient norm.
        residual_rms: Root mean square of a squared error's residuals, over all numbers; 0 if not measured.
        loss_factor: The factor of a squared error's mean when these were measured, which ``activation_norm`` contains.
    """

    activation_norm: float
    weight_norm: float
    batch_size: int
    dropped: int
    fourth_moment_norm: float = 0.0
    output_norm: float = 0.0
    step_scale: float = 1.0
    logit_grad_norm: float = 0.0
    mean_logit_grad_norm: float = 0.0
    residual_rms: float = 0.0
    loss_factor: float = 1.0

    @property
    def is_usable(self) -> bool:
        """Whether all norms are finite, and there are examples with inputs other than 0."""
        norms = (self.activation_norm, self.weight_norm, self.fourth_moment_norm, self.output_norm)
        return all(map(math.isfinite, norms)) and self.activation_norm != 0 and self.batch_size >= 1


@dataclass(frozen=True)
class Decision:
    """A learning rate and what it was computed from; 0 stands for a number that was not measured.

    Attributes:
        lr: Learning rate at a schedule factor of 1.
        constant: Lipschitz constant L of the loss.
        activation_norm: See :class:`Measurement`.
        weight_norm: See :class:`Measurement`.
        cap: The limit that changed the rate, or "".
        observed_constant: See :class:`lit_lipschitz.rules.base.RuleInput`.
        effective_sample_size: Likewise; 0 where ``observed_constant`` is.
        curvature: Likewise.
        rule: The name of the rule, or "" for a fixed rate.
        formula: L in symbols, or "".
        terms: All numbers of the constant, with L last, then those of the rule, then the limit that changed the rate.
    """

    lr: float
    constant: float = 0.0
    activation_norm: float = 0.0
    weight_norm: float = 0.0
    cap: str = ""
    observed_constant: float = 0.0
    effective_sample_size: float = 0.0
    curvature: float = 0.0
    rule: str = ""
    formula: str = ""
    terms: tuple[Term, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        """The decision as plain values."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "Decision":
        """The decision from its :meth:`state_dict`."""
        return cls(**{**state, "terms": tuple(Term(**term) for term in state["terms"])})


@dataclass(frozen=True)
class _Constant:
    """A Lipschitz constant: the data term, the L2 term, and how they come about."""

    data: float
    l2: float
    l2_coefficient: float
    formula: str
    terms: tuple[Term, ...]

    @property
    def value(self) -> float:
        return self.data + self.l2


@dataclass(frozen=True)
class Policy:
    """How a learning rate follows from a measurement; the attributes are arguments of ``LipschitzLR``.

    Raises:
        ConfigurationError: A value is out of its range.
    """

    bound: bounds.Bound = "strict"
    norm: bounds.Norm = "frobenius"
    rule: str = "auto"
    second_moment: Literal["auto"] | bounds.SecondMoment = "auto"
    weight_decay: float | None = None
    min_lr: float = 0.0
    max_lr: float | None = None
    max_growth: float | None = None

    def __post_init__(self) -> None:
        if self.rule not in ("auto", *RULES):
            raise ConfigurationError(f"LipschitzLR(rule={self.rule!r}): expected one of 'auto', {_quoted(RULES)}")
        if self.rule != "auto" and self.bound not in (admitted := RULES[self.rule].bounds):
            raise ConfigurationError(
                f"LipschitzLR(rule={self.rule!r}) is defined for bound={_quoted(admitted)}, found {self.bound!r}: "
                "change one of them, or pass rule='auto'"
            )
        if self.second_moment not in ("auto", "constant", "scripts"):
            raise ConfigurationError(
                f"LipschitzLR(second_moment={self.second_moment!r}): expected one of 'auto', 'constant', 'scripts'"
            )
        if self.second_moment_estimate == "scripts" and (self.bound, self.norm) != ("paper", "frobenius"):
            raise ConfigurationError(
                f"LipschitzLR(second_moment='scripts') is the estimate of the authors' scripts, for bound='paper' and "
                f"norm='frobenius'; found {self.bound!r} and {self.norm!r}: change them, or pass "
                "second_moment='constant'"
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
    def second_moment_estimate(self) -> bounds.SecondMoment:
        """The estimate of the squared constant; the rules of the authors' scripts have their own."""
        if self.second_moment != "auto":
            return self.second_moment
        return RULES[self.rule].second_moment if self.rule != "auto" else "constant"

    @property
    def norm_grows_with_batch(self) -> bool:
        """Whether the norm is one of the matrix of all rows of a batch."""
        return self.norm in ("frobenius", "spectral")

    @property
    def has_limits(self) -> bool:
        """Whether there is a limit that could change a rate."""
        return self.min_lr > 0 or self.max_lr is not None or self.max_growth is not None

    def l2_coefficient(self, optimizer: OptimizerInfo, groups: Sequence[Mapping[str, Any]]) -> float:
        """The coefficient of the L2 term in the loss: a weight decay that the optimizer adds to the gradient."""
        if self.weight_decay is not None:
            return self.weight_decay
        coupled = [group for group in groups if optimizer.couples_weight_decay(group)]
        return max((float(group.get("weight_decay", 0.0)) for group in coupled), default=0.0)

    def rule_for(self, optimizer: OptimizerInfo, groups: Sequence[Mapping[str, Any]]) -> RuleInfo:
        """The rule for an optimizer and its parameter groups.

        Raises:
            ConfigurationError: None is known and none is forced, or it does not fit the optimizer or its settings.
        """
        rule = RULES[self.rule if self.rule != "auto" else self._default_rule(optimizer, groups)]
        try:
            rule.function(RuleInput(1.0, 1.0), rule.initial_state(), groups[0])
        except KeyError as missing:
            raise ConfigurationError(
                f"LipschitzLR(rule={self.rule!r}): expected an optimizer with the setting {missing}, found "
                f"{optimizer.name}; pass rule='inverse', which needs no setting"
            ) from None
        except ValueError as error:
            raise ConfigurationError(f"LipschitzLR: {error}") from None
        settings = [key for key in ("momentum", "dampening", "alpha", "betas", "eps") if key in groups[0]]
        for key in settings if rule.uses_settings else ():
            if len({str(group[key]) for group in groups}) > 1:
                raise ConfigurationError(
                    f"LipschitzLR: the rule {rule.name!r} needs the same {key} in all parameter groups; found "
                    f"{', '.join(str(group[key]) for group in groups)}: make them equal, or pass rule='inverse'"
                )
        if rule.step_scale is not None and optimizer.update is None:
            known = ", ".join(info.name for info in optimizer_updates.OPTIMIZERS if info.update is not None)
            raise ConfigurationError(
                f"LipschitzLR(rule={rule.name!r}) needs an optimizer whose update is known ({known}), and found "
                f"{optimizer.name}; use one of them, or pass another rule="
            )
        return rule

    def _default_rule(self, optimizer: OptimizerInfo, groups: Sequence[Mapping[str, Any]]) -> str:
        """The name of the rule that an optimizer has without ``rule=``."""
        settings = max(groups, key=lambda group: group.get("momentum", 0.0))
        forced = f"or force a rule by rule= with one of {_quoted(RULES)}"
        name = optimizer.rule_name(self.bound, settings)
        if name is None:
            known = [info.name for info in optimizer_updates.OPTIMIZERS if self.bound in info.rules]
            found = f"{optimizer.name} with bound={self.bound!r}" if optimizer.rules else optimizer.name
            if found in known:  # another class of the same name
                found = f"{optimizer.resolve().__module__}.{found}"
            raise ConfigurationError(
                f"LipschitzLR: no learning-rate rule is known for the optimizer {found}; known: {', '.join(known)}; "
                f"use one of them, {forced}"
            )
        setting = optimizer.unsupported.get(self.bound)
        if setting is not None and settings.get(setting, False):
            raise ConfigurationError(
                f"LipschitzLR: no learning-rate rule is known for {optimizer.name} with {setting}=True; use "
                f"{setting}=False, {forced}"
            )
        return name

    def decide(
        self,
        measured: Measurement,
        *,
        loss: bounds.Loss,
        num_outputs: int,
        optimizer: OptimizerInfo,
        groups: Sequence[Mapping[str, Any]],
        state: Any,
        last: Decision | None,
    ) -> tuple[Decision, Any] | None:
        """The next learning rate.

        Args:
            measured: What the ranks agree on.
            loss: The loss.
            num_outputs: Outputs of the head.
            optimizer: The optimizer.
            groups: Its parameter groups.
            state: The state of the rule; that of another rule begins again.
            last: The decision before this one.

        Returns:
            The decision and the rule's new state, or None where the measurement gives no rate.
        """
        if not measured.is_usable:
            return None
        rule = self.rule_for(optimizer, groups)
        constant = self._constant(measured, loss, num_outputs, self.l2_coefficient(optimizer, groups))
        inputs = self._rule_input(rule, measured, loss, num_outputs, constant)
        if inputs is None:
            return None
        state = state if isinstance(state, rule.state_type) else rule.initial_state()
        rate, state, terms = rule.function(inputs, state, groups[0])
        lr, cap = self.apply_limits(rate, last)
        limit = (Term(cap, lr, f"the limit that changed the rate of {rate:.6g}"),) if cap else ()
        decision = Decision(
            lr,
            constant.value,
            measured.activation_norm,
            measured.weight_norm,
            cap,
            observed_constant=inputs.observed_constant,
            effective_sample_size=inputs.effective_sample_size if inputs.observed_constant else 0.0,
            curvature=inputs.curvature,
            rule=rule.name,
            formula=constant.formula,
            terms=(*constant.terms, *terms, *limit),
        )
        return decision, state

    def _rule_input(
        self, rule: RuleInfo, measured: Measurement, loss: bounds.Loss, num_outputs: int, constant: _Constant
    ) -> RuleInput | None:
        """What a rule computes the rate from; None where the constant or the step scale is not positive and finite."""
        second_moment = bounds.second_moment(
            constant.data,
            constant.l2,
            estimate=self.second_moment_estimate,
            activation_norm=measured.activation_norm,
            fourth_moment_norm=measured.fourth_moment_norm,
        )
        if not (0 < constant.value < math.inf and 0 < second_moment < math.inf and measured.step_scale > 0):
            return None
        if rule.needs_residuals:
            observed, effective = self._observed_by_residuals(measured, num_outputs, constant)
            curvature = self._curvature(measured, loss, num_outputs, constant)
        else:
            observed, effective = self._observed_by_gradients(measured, constant)
            curvature = 0.0
        return RuleInput(
            constant.value,
            second_moment,
            activation_norm=measured.activation_norm,
            step_scale=measured.step_scale,
            batch_size=measured.batch_size,
            observed_constant=observed,
            effective_sample_size=effective,
            curvature=curvature,
        )

    def _constant(self, measured: Measurement, loss: bounds.Loss, num_outputs: int, decay: float) -> _Constant:
        """The Lipschitz constant of a loss with its terms; ``decay`` is the coefficient of the L2 term."""
        m, size = measured.batch_size, measured.activation_norm
        data = loss.constant(
            size,
            batch_size=m,
            num_outputs=num_outputs,
            bound=self.bound,
            norm=self.norm,
            output_norm=measured.output_norm,
        )
        l2 = bounds.l2(decay, measured.weight_norm, bound=self.bound)
        size_formula, size_value = self._size_of_batch(size, m)
        name, meaning = _COEFFICIENTS[self.bound]
        terms = [
            Term("k", num_outputs, "the head's outputs"),
            Term("m", m, "examples that an optimizer step averages over"),
            Term("K_z", size, _NORMS[self.norm]),
            Term("W", measured.weight_norm, "largest norm of a weight"),
            Term("lambda", decay, "the weight decay that is an L2 term of the loss"),
        ]
        if loss.needs_output_norm(self.bound):
            terms.append(Term("outputs", measured.output_norm, f"norm of outputs and targets, which is in {name}"))
        terms += [
            Term(name, data / size_value, meaning),
            Term("data", data, f"data term, {name} * {size_formula}"),
            Term("l2", l2, "L2 term"),
            Term("L", data + l2, _CONSTANTS[self.bound]),
        ]
        formula = f"{name} * {size_formula} + {'lambda' if self.bound == 'smooth' else 'lambda * W'}"
        return _Constant(data, l2, decay, formula, tuple(terms))

    def _size_of_batch(self, size: float, batch_size: int) -> tuple[str, float]:
        """The factor of a family's constant that the inputs contribute: in symbols, and its value."""
        whole = self.norm_grows_with_batch
        if self.bound == "strict":
            return ("K_z / sqrt(m)", size / math.sqrt(batch_size)) if whole else ("K_z", size)
        if self.bound == "smooth":
            return ("K_z^2 / m", size**2 / batch_size) if whole else ("K_z^2", size**2)
        return "K_z / m", size / batch_size

    def _observed_by_gradients(self, measured: Measurement, constant: _Constant) -> tuple[float, float]:
        """The constant with the measured gradient norm in the logits and the effective sample size; 0 without one."""
        if not measured.logit_grad_norm:
            return 0.0, 0.0
        rows = measured.batch_size if self.norm == "frobenius" else 1
        largest = constant.data / measured.activation_norm * math.sqrt(rows)
        ratio = min(max(measured.logit_grad_norm / largest, MIN_GRAD_NORM_RATIO), 1.0)
        evenness = min(measured.mean_logit_grad_norm / measured.logit_grad_norm, 1.0)
        return constant.data * ratio + constant.l2, measured.batch_size * evenness**2

    def _observed_by_residuals(
        self, measured: Measurement, num_outputs: int, constant: _Constant
    ) -> tuple[float, float]:
        """The constant of a squared error with its measured residuals, 0 if not measured, and the batch size.

        Three times the residuals' root mean square replaces the norms of outputs and targets.
        """
        effective = float(measured.batch_size)
        if not (measured.residual_rms and measured.output_norm) or self.norm != "frobenius":
            return 0.0, effective
        residual = NUM_DEVIATIONS * measured.residual_rms * math.sqrt(measured.batch_size * num_outputs)
        ratio = max(residual / measured.output_norm, MIN_RESIDUAL_RATIO)
        return constant.data * ratio + constant.l2, effective

    def _curvature(self, measured: Measurement, loss: bounds.Loss, num_outputs: int, constant: _Constant) -> float:
        """The smooth constant of a squared error, with the Frobenius instead of the spectral norm; 0 of others."""
        if loss.name != "mean_squared_error" or self.norm != "frobenius":
            return 0.0
        smooth = loss.constant(
            measured.activation_norm,
            batch_size=measured.batch_size,
            num_outputs=num_outputs,
            bound="smooth",
            norm="frobenius",
        )
        return smooth / measured.loss_factor + constant.l2_coefficient  # the factor was squared

    def apply_limits(self, rate: float, last: Decision | None) -> tuple[float, str]:
        """The rate within its limits, and the name of the limit that changed it, or ""."""
        limits = [("max_lr", self.max_lr)]
        if self.max_growth is not None and last is not None:
            limits.append(("max_growth", self.max_growth * last.lr))
        cap = ""
        for name, limit in limits:
            if limit is not None and rate > limit:
                rate, cap = limit, name
        return (self.min_lr, "min_lr") if rate < self.min_lr else (rate, cap)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
