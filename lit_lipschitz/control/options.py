"""Options of a controller: the loss, the head, when to update, and what is measured; the policy has the others."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lit_lipschitz.bounds.loss_spec import ALIASES, LOSSES
from lit_lipschitz.control.argument_types import check_types
from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.measurement.norms import Weights


@dataclass(frozen=True)
class Options:
    """Arguments of ``LipschitzLR`` that are not part of the :class:`~lit_lipschitz.control.policy.Policy`."""

    loss: str = "auto"
    head: str = "auto"
    update: Literal["epoch"] | int = "epoch"
    measure: Literal["running", "pass"] = "running"
    weights: Weights = "decayed"
    initial_lr: float | None = None
    on_nonfinite: Literal["keep", "raise"] = "keep"
    dry_run: bool = False
    schedule: Literal["auto", "none"] = "auto"
    measure_every: Literal["auto"] | int = "auto"

    def __post_init__(self) -> None:
        check_types(self)
        object.__setattr__(self, "loss", ALIASES.get(self.loss, self.loss))
        for name, choices in (
            ("loss", ("auto", "measured", *LOSSES, *ALIASES)),
            ("on_nonfinite", ("keep", "raise")),
            ("schedule", ("auto", "none")),
            ("measure", ("running", "pass")),
            ("weights", get_args(Weights)),
        ):
            if getattr(self, name) not in choices:
                expected = ", ".join(map(repr, choices))
                raise ConfigurationError(f"LipschitzLR({name}={getattr(self, name)!r}): expected one of {expected}")
        if self.measure == "pass" and self.update != "epoch":
            raise ConfigurationError(
                f"LipschitzLR(measure='pass', update={self.update!r}): a pass is made once an epoch; use update='epoch'"
            )
        if self.update != "epoch" and not (type(self.update) is int and self.update >= 1):
            raise ConfigurationError(f"LipschitzLR(update={self.update!r}): expected 'epoch' or a number of steps >= 1")
        if self.measure_every != "auto" and not (type(self.measure_every) is int and self.measure_every >= 1):
            raise ConfigurationError(
                f"LipschitzLR(measure_every={self.measure_every!r}): expected 'auto' or a number of steps >= 1"
            )
        if self.initial_lr is not None and not 0 < self.initial_lr < math.inf:
            raise ConfigurationError(f"LipschitzLR(initial_lr={self.initial_lr}): expected a positive number")

    @property
    def running(self) -> bool:
        """Whether the training batches themselves are measured."""
        return self.measure == "running"

    @property
    def loss_name(self) -> str | None:
        """The name of the loss that the user named, or None."""
        return None if self.loss in ("auto", "measured") else self.loss

    @property
    def measured(self) -> bool:
        """Whether the constant of the loss is measured instead of derived."""
        return self.loss == "measured"
