"""The results of a controller: plain values and tensors that outlive the fit, and the metrics of a step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_lipschitz.control.policy import Decision, Measurement

if TYPE_CHECKING:
    from lit_lipschitz.control.controller import Controller


@dataclass(frozen=True)
class Results:
    """What a :class:`~lit_lipschitz.control.controller.Controller` has come to; nothing of the run itself."""

    decision: Decision | None  # behind the last optimizer step; None before the first one
    rates: list[float]  # learning rates of the parameter groups in it
    measurement: Measurement | None  # behind the last decision; None if it is not based on one
    head_name: str | None  # name of the head or of the output layers; None before the first loss
    batches: int  # in an optimizer step, on each rank
    num_scale_invariant: int | None  # scale-invariant weights; None if the rule does not look for them
    schedule: str | None  # description of the built-in schedule, if it is used; known from the first step on
    fraction_unexplained: float | None  # of variance, by a squared error in the last epoch; None for other losses
    damping: float  # factor of the noise damping, which is part of the built-in schedule; 1 without one
    factor: float  # of schedulers, schedule and damping between the last decision and the first group's lr
    _metrics: Mapping[str, float]
    _state: Mapping[str, Any]

    @classmethod
    def of(cls, controller: "Controller") -> "Results":
        """The results of a controller by now."""
        decision, rates, updater = controller.decision, list(controller.rates), controller.updater
        return cls(
            decision,
            rates,
            controller.measurement,
            controller.head_name,
            batches=updater.state.accumulated,
            num_scale_invariant=updater.estimator.invariance.num_scale_invariant if updater.estimator else None,
            schedule=controller.schedule.description,
            fraction_unexplained=updater.state.damping.fraction_unexplained,
            damping=controller.damping,
            factor=rates[0] / decision.lr if decision and decision.lr else 1.0,
            _metrics=controller.metrics(),
            _state=controller.state_dict(),
        )

    def metrics(self) -> dict[str, float]:
        """Metrics of the last step, for loggers; empty without one."""
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        """The state at the end of the fit."""
        return dict(self._state)


class RateProperties:
    """The numbers that a user reads of what computes the learning rate."""

    @property
    def _source(self) -> "Controller | Results | None":
        raise NotImplementedError

    @property
    def rate(self) -> float | None:
        """Learning rate of the last optimizer step at a schedule factor of 1; None before the first step."""
        return self._source.decision.lr if self._source and self._source.decision else None

    @property
    def lr(self) -> float | None:
        """Learning rate of the first parameter group in the last optimizer step; None before the first step."""
        return self._source.rates[0] if self._source and self._source.rates else None

    @property
    def constant(self) -> float | None:
        """Lipschitz constant behind the last optimizer step; None if there is none, as with a fixed rate."""
        return (self._source.decision.constant or None) if self._source and self._source.decision else None

    @property
    def head_name(self) -> str | None:
        """Name of the head or of the output layers, once the first step has shown which they are."""
        return self._source.head_name if self._source else None


def metrics_of(controller: "Controller") -> dict[str, float]:
    """Metrics of a controller's last step, for loggers; empty before the first one."""
    decision, updater = controller.decision, controller.updater
    if decision is None:
        return {}
    estimator = updater.estimator
    observes = decision.observed_constant or (estimator and estimator.needs_logit_grads)
    computed = bool(decision.rule)  # not a fixed rate
    metrics = {
        "rate": decision.lr,
        "lr": controller.rates[0],
        "constant": decision.constant if computed else None,
        "measured": float(decision.is_measured) if computed else None,
        "activation_norm": decision.activation_norm if computed else None,
        "weight_norm": decision.weight_norm if computed else None,
        "step_scale": estimator.scale.value if estimator else None,
        "observed_constant": decision.observed_constant if observes else None,
        "damping": controller.damping if updater.statistics.residuals.width else None,
        "capped": float(bool(decision.cap)) if controller.policy.has_limits else None,
    }
    return {name: value for name, value in metrics.items() if value is not None}
