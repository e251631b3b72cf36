"""The state of a controller: what a checkpoint holds."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any, get_args, get_origin, get_type_hints

from torch import Tensor

from lit_lipschitz.control.noise_damping import NoiseDamping
from lit_lipschitz.control.policy import Decision, Measurement
from lit_lipschitz.errors import LitLipschitzError
from lit_lipschitz.rules.base import Term

OTHER_VERSION = (
    "LipschitzLR's state in the checkpoint is of another version of lit-lipschitz; resume with the version that it was "
    "saved with, pass restore=False to measure again, or start without the checkpoint"
)

_AT_LEAST = {"last_pass_epoch": -1, "accumulated": 1, "batches": 1, "ranks": 1}
"""Smallest values of the fields that may not be, or not only be, 0 or more."""
_FINITE = ("lr", "references", "written")
MAX_KINDS = 64
"""Most kinds of losses that are told apart; a loss of another kind is measured in each step."""


@contextmanager
def refuse_other_versions() -> Iterator[None]:
    """Turns what is raised while a state of another form is loaded into the error that says so."""
    try:
        yield
    except LitLipschitzError:
        raise
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError):
        raise LitLipschitzError(OTHER_VERSION) from None


def check_fields(kind: Any, values: Mapping[str, Any], least: float = 0.0) -> None:
    """Checks that a dict has the fields of a dataclass or a NamedTuple, with values of their types.

    Args:
        kind: The class.
        values: The dict.
        least: The smallest number that is admitted; NaN never is.

    Raises:
        LitLipschitzError: It has others.
    """
    kinds = get_type_hints(kind)
    if not isinstance(values, Mapping) or set(values) != set(kinds):
        raise LitLipschitzError(OTHER_VERSION)
    for name, value in values.items():
        if not _is_of(kinds[name], value, _AT_LEAST.get(name, least), math.inf if name in _FINITE else None):
            raise LitLipschitzError(OTHER_VERSION)


def _is_of(kind: Any, value: Any, least: float, below: float | None) -> bool:
    """Whether a value is of a type; of types other than numbers, strings, lists of them and tuples all values are."""
    if kind in (int, float):
        is_number = type(value) is int or (kind is float and type(value) is float)
        return is_number and value >= least and (below is None or value < below)
    if kind in (str, bool):
        return type(value) is kind
    if get_origin(kind) is list:
        return type(value) is list and all(_is_of(get_args(kind)[0], one, least, below) for one in value)
    if kind == dict[str, str]:
        return type(value) is dict and all(type(text) is str for pair in value.items() for text in pair)
    return get_origin(kind) is not tuple or type(value) is tuple


def check_like(saved: Any, own: Any) -> None:
    """Checks that a part of a state is built like that of this run: the same keys and types, tensors without NaN.

    Raises:
        LitLipschitzError: It is not.
    """
    if isinstance(own, Mapping):
        fits = isinstance(saved, Mapping) and set(saved) == set(own)
    elif isinstance(own, Tensor):
        fits = (
            isinstance(saved, Tensor)
            and (saved.dtype, saved.ndim) == (own.dtype, own.ndim)
            and not bool(saved.isnan().any())
        )
    else:
        fits = type(saved) is type(own)
    if not fits:
        raise LitLipschitzError(OTHER_VERSION)
    for name in own if isinstance(own, Mapping) else ():
        check_like(saved[name], own[name])


@dataclass
class ControllerState:
    """All that a run needs to continue where it stopped; what comes after ``damping`` is filled in for a checkpoint."""

    rule: str  # its name
    rule_state: Any  # a NamedTuple of plain numbers; in a checkpoint a dict
    optimizer: str = ""  # the name of its class
    decision: Decision | None = None  # the last one
    measurement: Measurement | None = None  # behind the decision; None if it is not based on one
    steps: int = 0  # optimizer steps since the interval began
    intervals: int = 0  # intervals completed
    epoch: int = 0  # epoch in which the interval began
    last_pass_epoch: int = -1  # last epoch whose pass over the training set, or whose fixed rate, a step has used
    accumulated: int = 1  # largest number of batches that made one step in this interval
    damped_epochs: int = 0  # epochs in the noise damping
    losses: list[str] = field(default_factory=list)  # what the graphs of losses that were measured begin with
    warned: bool = False  # whether non-finite activations or gradients were reported
    damping: NoiseDamping = field(default_factory=NoiseDamping)
    references: list[float] = field(default_factory=list)  # configured learning rates of the parameter groups
    written: list[float] = field(default_factory=list)  # their learning rates in the last step, without a scheduler
    step_scale: dict[str, Any] | None = None  # of the estimator; None if the rule needs none
    due: dict[str, Any] = field(default_factory=dict)  # of the steps that are measured
    nonfinite: dict[str, Any] = field(default_factory=dict)
    residuals: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Any] | None = None  # its name, its statistic and that of the gradients; None before the first step
    run: dict[str, str] = field(default_factory=dict)  # facts that a resumed run may have otherwise
    # What differs in other ranks, one entry a rank, None for one that is not known; the first rank's is empty.
    ranks: list[dict[str, Any] | None] = field(default_factory=lambda: [{}])

    def is_new_loss(self, kind: str) -> bool:
        """Whether no loss was measured yet whose graph begins with these nodes; from now on one is."""
        is_new = kind not in self.losses
        if is_new and len(self.losses) < MAX_KINDS:
            self.losses.append(kind)
        return is_new

    def to_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values, which ``torch.load(weights_only=True)`` admits."""
        return {**asdict(self), "rule_state": self.rule_state._asdict()}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "ControllerState":
        """The state from :meth:`to_dict`, with ``rule_state`` as a dict; that of another version is refused."""
        with refuse_other_versions():
            check_fields(cls, state)
            decision = measurement = None
            if state["decision"] is not None:
                check_fields(Decision, state["decision"])
                for term in state["decision"]["terms"]:
                    check_fields(Term, term, -math.inf)
                decision = Decision.from_dict(state["decision"])
            if state["measurement"] is not None:
                check_fields(Measurement, state["measurement"])
                measurement = Measurement(**state["measurement"])
            check_fields(NoiseDamping, state["damping"], -math.inf)
            damping = NoiseDamping(**deepcopy(state["damping"]))
            if len(damping.steps) != len(damping.fractions):
                raise ValueError("steps and fractions of the noise damping")
            if (head := state["head"]) is not None:
                gradients = head["gradients"] and dict(head["gradients"])
                check_like(head, {"head": "", "statistic": dict(head["statistic"]), "gradients": gradients})
                values = [*head["statistic"].values(), *(gradients or {}).values()]
                if not all(isinstance(value, (Tensor, bool, int)) for value in values):
                    raise TypeError("statistic of the head")
        return cls(**{**state, "decision": decision, "measurement": measurement, "damping": damping})
