"""From a measurement to a learning rate: a pure function, so that ranks with equal measurements decide alike."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from lit_lipschitz import bounds
from lit_lipschitz.control.argument_types import check_types
from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.measurement import optimizer_updates
from lit_lipschitz.measurement.optimizer_updates import OptimizerInfo
from lit_lipschitz.rules.base import RuleInfo, RuleInput, Term
from lit_lipschitz.rules.registry import RULES

ROUNDING = 0.02  #: Relative error of norms in bfloat16, by which a gradient may exceed a bound.
NUM_DEVIATIONS = 3.0  #: Margin above the gradient norm of a typical example, in standard deviations.

_NORMS = {
    "frobenius": "Frobenius norm of a batch of the head's inputs",
    "spectral": "spectral norm of a batch of the head's inputs",
    "sample": "largest norm of an example of the head's inputs",
}
_COEFFICIENTS = {
    "paper": ("estimate", "the paper's estimate of the gradient norm of an example's loss w.r.t. the head's outputs"),
    "strict": ("G_max", "largest possible gradient norm of an example's loss w.r.t. the head's outputs"),
    "smooth": ("curvature", "largest possible curvature of an example's loss w.r.t. the head's outputs"),
}
_MEASURED = {
    "K_z": "norm of the output layers' inputs in these rows",
    "G_max": "largest gradient norm w.r.t. a row of the outputs, times m; measured, not a bound",
    "L": "measured constant of the loss with respect to the output layers' weights, an estimate",
}
_CONSTANTS = {
    "paper": "the paper's estimate of the Lipschitz constant of the loss",
    "strict": "Lipschitz constant of the loss with respect to the head's weights",
    "smooth": "Lipschitz constant of the loss's gradient with respect to the head's weights",
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
        step_scale: Gradient norm over the displacement by a gradient at lr = 1; 0 if no usable gradient was measured.
        descent: Decrease of the loss per unit of the learning rate, over the loss; 0 if either is not positive.
        logit_grad_norm: Root mean square over the examples of the gradient norm of an example's loss in the logits; 0
            if not measured.
        mean_logit_grad_norm: Mean of that gradient norm.
        largest_logit_grad_norm: Largest contraharmonic mean of that gradient norm (sum of squares over sum) in a
            measured step of the last interval and of this one so far.
        residual_rms: Root mean square of a squared error's residuals, over all numbers; 0 if not measured.
        loss_factor: The factor of a squared error's mean when these were measured, which ``activation_norm`` contains.
        largest_grad_norm: Where the constant is measured, m times the largest gradient norm of a row of the outputs in
            the interval; else 0.
        gradient_bound: Largest product, in an optimizer step of a rank, of the norm of the gradient in the outputs of
            the output layers and the norm of their inputs, a bound of the gradient in their weights; 0 if not measured.
        decays: Whether a schedule lowers the rate later, or the weights are averaged.
        batches: Batches in an optimizer step on each rank.
        ranks: Number of ranks.
    """

    activation_norm: float
    weight_norm: float
    batch_size: int
    dropped: int
    fourth_moment_norm: float = 0.0
    output_norm: float = 0.0
    step_scale: float = 1.0
    descent: float = 0.0
    logit_grad_norm: float = 0.0
    mean_logit_grad_norm: float = 0.0
    largest_logit_grad_norm: float = 0.0
    residual_rms: float = 0.0
    loss_factor: float = 1.0
    largest_grad_norm: float = 0.0
    gradient_bound: float = 0.0
    decays: bool = True
    batches: int = 1
    ranks: int = 1

    @property
    def parts(self) -> str:
        """What m is the product of, with the batches of an optimizer step and the ranks."""
        batch = self.batch_size / (self.batches * self.ranks)
        batches = f"{self.batches} accumulated batch{'es' * (self.batches > 1)}"
        return f"{batch:g} in a batch x {batches} x {self.ranks} rank{'s' * (self.ranks > 1)}"


@dataclass(frozen=True)
class Decision:
    """A learning rate and what it was computed from; 0 stands for a number that was not measured.

    Attributes:
        lr: Learning rate at a schedule factor of 1.
        constant: Lipschitz constant L of the loss.
        activation_norm: K_z, as in :class:`Measurement`.
        weight_norm: W, as in :class:`Measurement`.
        observed_constant: As in :class:`~lit_lipschitz.rules.base.RuleInput`.
        cap: The limit that changed the rate, or "".
        rule: The name of the rule, or "" for a fixed rate.
        formula: L in symbols, or "".
        terms: All numbers of the constant, with L last, then those of the rule, then the limit that changed the rate.
        is_measured: Whether L is measured, and not a bound.
        exceeded: Whether a gradient was larger than the bound of the recognised loss, so that this was none; L is the
            measured bound then.
    """

    lr: float
    constant: float = 0.0
    activation_norm: float = 0.0
    weight_norm: float = 0.0
    observed_constant: float = 0.0
    cap: str = ""
    rule: str = ""
    formula: str = ""
    terms: tuple[Term, ...] = ()
    is_measured: bool = False
    exceeded: bool = False

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "Decision":
        """The decision from its ``dataclasses.asdict``."""
        return cls(**{**state, "terms": tuple(Term(**term) for term in state["terms"])})


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
        check_types(self)
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
        """The rule for an optimizer and its parameter groups; an error if none is known, or if it does not fit."""
        rule = RULES[self.rule if self.rule != "auto" else self._default_rule(optimizer, groups)]
        try:
            rule.function(RuleInput(1.0, 1.0), rule.initial_state(), optimizer.settings(groups[0]))
            if rule.needs_steps:
                optimizer.displacement_gain(groups[0])
        except KeyError as missing:
            raise ConfigurationError(
                f"LipschitzLR(rule={self.rule!r}): expected an optimizer with the setting {missing}, found "
                f"{optimizer.name}; pass rule='inverse', which needs no setting"
            ) from None
        except ValueError as error:
            raise ConfigurationError(f"LipschitzLR: {error}") from None
        settings = [key for key in ("momentum", "dampening", "alpha", "betas", "eps") if key in groups[0]]
        for key in settings if rule.uses_settings and optimizer.behaviour is None else ():
            if len({str(group[key]) for group in groups}) > 1:
                raise ConfigurationError(
                    f"LipschitzLR: the rule {rule.name!r} needs the same {key} in all parameter groups; found "
                    f"{', '.join(str(group[key]) for group in groups)}: make them equal, or pass rule='inverse'"
                )
        return rule

    def _default_rule(self, optimizer: OptimizerInfo, groups: Sequence[Mapping[str, Any]]) -> str:
        """The name of the rule that an optimizer has without ``rule=``."""
        settings = max(map(optimizer.settings, groups), key=lambda group: group.get("momentum", 0.0))
        forced = f"or force a rule by rule= with one of {_quoted(RULES)}"
        name = optimizer.rule_name(self.bound, settings)
        if name is None:
            known = [info.name for info in optimizer_updates.OPTIMIZERS if self.bound in info.rules]
            package = f"{optimizer.resolve().__module__}." if optimizer.name in known else ""
            reason = f"{optimizer.name} sets the length of its steps itself; " if optimizer.sets_lengths else ""
            raise ConfigurationError(
                f"LipschitzLR: {reason}no learning-rate rule is known for the optimizer {package}{optimizer.name} with "
                f"bound={self.bound!r}; known: {', '.join(known)}; use one of them, {forced}"
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
        step: int = 0,
    ) -> tuple[Decision, Any] | None:
        """The learning rate of the optimizer ``step``, and the rule's new state; None where there is none.

        ``groups`` are the optimizer's parameter groups, ``state`` that of the rule (the state of another rule begins
        again), ``last`` the decision before this one.
        """
        norms = (measured.activation_norm, measured.weight_norm, measured.fourth_moment_norm, measured.output_norm)
        if not (all(map(math.isfinite, norms)) and measured.activation_norm and measured.batch_size >= 1):
            return None
        if not (measured.largest_grad_norm or loss.name in bounds.LOSSES):
            return None  # measured before the loss was no longer recognised
        rule = self.rule_for(optimizer, groups)
        constant = _Constant(self, measured, loss, num_outputs, self.l2_coefficient(optimizer, groups))
        inputs = constant.rule_input(rule, optimizer, step)
        if inputs is None:
            return None
        state = state if isinstance(state, rule.state_type) else rule.initial_state()
        rate, state, terms = rule.function(inputs, state, optimizer.settings(groups[0]))
        lr, cap = self.apply_limits(rate, last)
        limit = (Term(cap, lr, f"the limit that changed the rate of {rate:.6g}"),) if cap else ()
        formula, constant_terms = constant.formula()
        decision = Decision(
            lr,
            constant.value,
            measured.activation_norm,
            measured.weight_norm,
            inputs.observed_constant,
            cap,
            rule.name,
            formula,
            (*constant_terms, *terms, *limit),
            bool(measured.largest_grad_norm) or constant.exceeded,
            constant.exceeded,
        )
        return decision, state

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


class _Constant:
    """Computes L = data term + L2 term from a measurement, and the inputs of a rule."""

    def __init__(
        self, policy: Policy, measured: Measurement, loss: bounds.Loss, num_outputs: int, l2_coefficient: float
    ) -> None:
        self._policy, self._measured, self._loss, self._num_outputs = policy, measured, loss, num_outputs
        self._l2_coefficient = l2_coefficient
        self._data_term = partial(
            loss.constant,
            measured.activation_norm,
            batch_size=measured.batch_size,
            num_outputs=num_outputs,
            output_norm=measured.output_norm,
        )
        if measured.largest_grad_norm:
            self._data = measured.largest_grad_norm * measured.activation_norm / math.sqrt(measured.batch_size)
        else:
            self._data = self._data_term(bound=policy.bound, norm=policy.norm)
        proven = bool(measured.largest_grad_norm) or measured.gradient_bound <= (1 + ROUNDING) * self._data
        self.exceeded = not proven and policy.bound == "strict"
        if self.exceeded:
            self._data = measured.gradient_bound
        self._l2 = bounds.l2(l2_coefficient, measured.weight_norm, bound=policy.bound)
        self.value = self._data + self._l2

    def formula(self) -> tuple[str, tuple[Term, ...]]:
        """The constant in symbols, and their values."""
        measured, bound = self._measured, self._policy.bound
        size_formula, size = self._size_of_batch()
        name, meaning = _COEFFICIENTS[bound]
        terms = [
            Term("k", self._num_outputs, "the head's outputs"),
            Term("m", measured.batch_size, f"examples that an optimizer step averages over: {measured.parts}"),
            Term("K_z", measured.activation_norm, _NORMS[self._policy.norm]),
            Term("W", measured.weight_norm, "largest norm of a weight"),
            Term("lambda", self._l2_coefficient, "coefficient of the weight decay"),
        ]
        if not measured.largest_grad_norm and self._loss.needs_output_norm(bound):
            terms.append(Term("outputs", measured.output_norm, f"norm of outputs and targets, which is in {name}"))
        terms += [
            Term(name, self._data / size, meaning),
            Term("data", self._data, f"data term, {name} * {size_formula}"),
            Term("l2", self._l2, "L2 term"),
            Term("L", self.value, _CONSTANTS[bound]),
        ]
        if measured.largest_grad_norm:
            meanings = {**_MEASURED, "m": f"rows of the outputs that have a gradient: {measured.parts}"}
            terms = [replace(term, meaning=meanings.get(term.symbol, term.meaning)) for term in terms[1:]]
        return f"{name} * {size_formula} + {'lambda' if bound == 'smooth' else 'lambda * W'}", tuple(terms)

    def _size_of_batch(self) -> tuple[str, float]:
        """The factor of a family's constant that the inputs contribute: in symbols, and its value."""
        size, batch_size = self._measured.activation_norm, self._measured.batch_size
        whole = self._policy.norm_grows_with_batch
        if self._policy.bound == "strict":
            return ("K_z / sqrt(m)", size / math.sqrt(batch_size)) if whole else ("K_z", size)
        if self._policy.bound == "smooth":
            return ("K_z^2 / m", size**2 / batch_size) if whole else ("K_z^2", size**2)
        return "K_z / m", size / batch_size

    def rule_input(self, rule: RuleInfo, optimizer: OptimizerInfo, step: int) -> RuleInput | None:
        """What a rule computes the rate from; None where the constant or the step scale is not positive and finite."""
        measured = self._measured
        second_moment = bounds.second_moment(
            self._data,
            self._l2,
            estimate=self._policy.second_moment_estimate,
            activation_norm=measured.activation_norm,
            fourth_moment_norm=measured.fourth_moment_norm,
        )
        if not (0 < self.value < math.inf and 0 < second_moment < math.inf and measured.step_scale > 0):
            return None
        observed, effective = self._observed(optimizer.is_linear) if rule.needs_steps else (0.0, 0.0)
        return RuleInput(
            self.value,
            second_moment,
            activation_norm=measured.activation_norm,
            step_scale=measured.step_scale,
            batch_size=measured.batch_size,
            observed_constant=observed,
            effective_sample_size=effective,
            descent=measured.descent,
            decays=self._measured.decays,
            step=step,
            is_linear=optimizer.is_linear,
            is_curvature=self._policy.bound == "smooth",
        )

    def _observed(self, is_linear: bool) -> tuple[float, float]:
        """The constant with measured gradient norms or residuals, and the effective sample size; 0 if not measured."""
        measured, batch_size = self._measured, self._measured.batch_size
        frobenius = self._policy.norm == "frobenius"
        if self._policy.bound != "strict":
            return 0.0, 0.0
        if is_linear and measured.largest_grad_norm:
            return 0.0, 0.0  # L has the largest measured gradient already
        if is_linear and self._loss.needs_output_norm("strict"):
            if not (measured.residual_rms and measured.output_norm and frobenius):
                return 0.0, 0.0
            # The residuals replace the norms of outputs and targets.
            residual = self._with_margin(measured.residual_rms) * math.sqrt(batch_size * self._num_outputs)
            return self._data * residual / measured.output_norm + self._l2, float(batch_size)
        if is_linear:
            norm, even = self._with_margin(measured.largest_logit_grad_norm), 1.0
        else:
            norm = measured.logit_grad_norm
            even = min(measured.mean_logit_grad_norm / norm, 1.0) if norm else 0.0
        if not norm:
            return 0.0, 0.0
        possible = self._data / measured.activation_norm * math.sqrt(batch_size if frobenius else 1)
        return self._data * min(norm / possible, 1.0) + self._l2, batch_size * even**2

    def _with_margin(self, norm: float) -> float:
        """The norm of a typical example's gradient in the k outputs, with a margin.

        The margin is three standard deviations if the outputs are independent and normal: the norm of k such numbers
        has a mean of about sqrt(k) times their standard deviation, and itself one of about 1 / sqrt(2) times theirs.
        """
        return norm * (1 + NUM_DEVIATIONS / math.sqrt(2 * self._num_outputs))


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
