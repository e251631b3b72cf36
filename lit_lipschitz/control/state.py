"""The state of a controller: what a checkpoint holds."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lit_lipschitz.control.noise_damping import NoiseDamping
from lit_lipschitz.control.policy import Decision, Measurement
from lit_lipschitz.errors import LitLipschitzError

OTHER_VERSION = (
    "LipschitzLR's state in the checkpoint is of another version of lit-lipschitz; resume with the version that it was "
    "saved with, pass restore=False to measure again, or start without the checkpoint"
)


@dataclass
class ControllerState:
    """All that a run needs to continue where it stopped; what comes after ``damping`` is filled in for a checkpoint."""

    rule: str  # its name
    rule_state: Any  # a NamedTuple of plain numbers; in a checkpoint a dict
    decision: Decision | None = None  # the last one
    measurement: Measurement | None = None  # behind the decision; None if it is not based on one
    steps: int = 0  # optimizer steps since the interval began
    intervals: int = 0  # intervals completed
    epoch: int = 0  # epoch in which the interval began
    last_pass_epoch: int = -1  # last epoch whose pass over the training set, or whose fixed rate, a step has used
    accumulated: int = 1  # largest number of batches that made one step in this interval
    damped_epochs: int = 0  # epochs in the noise damping
    warned: bool = False  # whether non-finite activations or gradients were reported
    damping: NoiseDamping = field(default_factory=NoiseDamping)
    references: list[float] = field(default_factory=list)  # configured learning rates of the parameter groups
    written: list[float] = field(default_factory=list)  # their learning rates in the last step, without a scheduler
    step_scale: dict[str, Any] | None = None  # of the estimator; None if the rule needs none
    due: dict[str, Any] = field(default_factory=dict)  # of the steps that are measured
    nonfinite: dict[str, Any] = field(default_factory=dict)
    residuals: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Any] | None = None  # its name and statistic; None before the first step

    def to_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values, which ``torch.load(weights_only=True)`` admits."""
        return {**asdict(self), "rule_state": self.rule_state._asdict()}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "ControllerState":
        """The state from :meth:`to_dict`, with ``rule_state`` as a dict; that of another version is refused."""
        if set(state) != {entry.name for entry in fields(cls)}:
            raise LitLipschitzError(OTHER_VERSION)
        try:
            decision = Decision.from_dict(state["decision"]) if state["decision"] else None
            measurement = Measurement(**state["measurement"]) if state["measurement"] else None
            damping = NoiseDamping(**deepcopy(state["damping"]))
        except (TypeError, KeyError):
            raise LitLipschitzError(OTHER_VERSION) from None
        return cls(**{**state, "decision": decision, "measurement": measurement, "damping": damping})
