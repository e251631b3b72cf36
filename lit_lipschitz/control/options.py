"""What a user configures apart from how a learning rate is computed: the loss, the head, when to update."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

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

    @property
    def named(self) -> bool:
        """Whether the user named the loss."""
        return self.loss != "auto"


@dataclass(frozen=True)
class Target:
    """The optimizer whose learning rate is controlled.

    Attributes:
        model: The network that it trains.
        optimizer: The optimizer, neither stepped nor restored from a checkpoint.
        schedulers: Its learning-rate schedulers.
        position: Its position among the optimizers of the run.
        num_optimizers: How many optimizers the run has.
        label: Names it in messages if several are controlled, such as ``" of optimizer 1"``.
    """

    model: nn.Module
    optimizer: Optimizer
    schedulers: Sequence[Any] = ()
    position: int = 0
    num_optimizers: int = 1
    label: str = ""

    @property
    def is_only(self) -> bool:
        """Whether the run has no other optimizer."""
        return self.num_optimizers == 1

    @property
    def parameters(self) -> set[Tensor]:
        """The parameters of the optimizer."""
        return {parameter for group in self.optimizer.param_groups for parameter in group["params"]}
