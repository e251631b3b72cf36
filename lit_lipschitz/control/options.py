"""What of ``LipschitzLR`` is said by its user and is not about how a rate follows from a measurement."""

from dataclasses import dataclass
from typing import Literal

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

    @property
    def running(self) -> bool:
        """Whether the training batches themselves are measured."""
        return self.measure == "running"
