"""The state of a controller: what a checkpoint holds."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lit_lipschitz.control.policy import Decision, Measurement
from lit_lipschitz.errors import LitLipschitzError

OTHER_VERSION = (
    "LipschitzLR's state in the checkpoint is of another version of lit-lipschitz; resume with the version that it was "
    "saved with, pass restore=False to measure again, or start without the checkpoint"
)


@dataclass
class ControllerState:
    """All that a run needs to continue where it stopped.

    Attributes:
        rule: Name of the rule.
        decision: The last decision.
        measurement: The measurement behind it; None if it is not based on one.
        rule_state: State of the rule, as plain values.
        steps: Optimizer steps since the interval began.
        intervals: Intervals completed.
        epoch: Epoch in which the interval began.
        last_pass_epoch: Last epoch whose pass over the training set, or whose fixed rate, a step has used; -1 for none.
        accumulated: Largest number of batches that made one step in this interval.
        damped_epochs: Epochs in the noise damping.
        warned: Whether non-finite activations were reported.
        references: Configured learning rates of the parameter groups.
        step_scale: State of the step-scale estimate; None if the rule needs none.
        nonfinite: State of the non-finite losses.
        damping: State of the noise damping.
        residuals: State of the residuals.
        head: Name of the head and its statistic; None before the first step.
    """

    rule: str
    decision: Decision | None = None
    measurement: Measurement | None = None
    rule_state: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    intervals: int = 0
    epoch: int = 0
    last_pass_epoch: int = -1
    accumulated: int = 1
    damped_epochs: int = 0
    warned: bool = False
    references: list[float] = field(default_factory=list)
    step_scale: dict[str, Any] | None = None
    nonfinite: dict[str, Any] = field(default_factory=dict)
    damping: dict[str, Any] = field(default_factory=dict)
    residuals: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values, which ``torch.load(weights_only=True)`` admits."""
        state = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        state["decision"] = self.decision.state_dict() if self.decision else None
        state["measurement"] = asdict(self.measurement) if self.measurement else None
        return state

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "ControllerState":
        """The state from :meth:`to_dict`.

        Raises:
            LitLipschitzError: It was saved by another version.
        """
        if set(state) != {entry.name for entry in fields(cls)}:
            raise LitLipschitzError(OTHER_VERSION)
        try:
            decision = Decision.from_state_dict(state["decision"]) if state["decision"] else None
            measurement = Measurement(**state["measurement"]) if state["measurement"] else None
        except (TypeError, KeyError):
            raise LitLipschitzError(OTHER_VERSION) from None
        return cls(**{**state, "decision": decision, "measurement": measurement})
