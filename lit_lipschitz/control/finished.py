"""What is left of a controller after the fit: plain values and tensors, and nothing of the run itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lit_lipschitz.control.controller import Controller
from lit_lipschitz.control.policy import Decision, Measurement


@dataclass(frozen=True)
class FinishedController:
    """The results of a :class:`~lit_lipschitz.control.controller.Controller`, whose properties these are."""

    decision: Decision | None
    rates: list[float]
    measurement: Measurement | None
    batches: int
    num_scale_invariant: int | None
    schedule: str | None
    fraction_unexplained: float | None
    damping: float
    factor: float
    head_name: str | None
    _metrics: Mapping[str, float]
    _state: Mapping[str, Any]

    @classmethod
    def of(cls, controller: Controller) -> "FinishedController":
        """The results of a controller."""
        names = [name for name in cls.__dataclass_fields__ if not name.startswith("_")]
        values = {name: getattr(controller, name) for name in names}
        return cls(**values, _metrics=controller.metrics(), _state=controller.state_dict())

    def metrics(self) -> dict[str, float]:
        """Metrics of the last step, for loggers; empty without one."""
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        """The state at the end of the fit."""
        return dict(self._state)
