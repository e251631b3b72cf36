"""What a controller knows of the training loop that drives it, and of the optimizer that it controls."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class LoopFacts(NamedTuple):
    """The state of a training loop at one of its events; the first five can change from one to the next."""

    automatic: bool  # whether the loop itself calls backward and the optimizer, so that its factor of the loss is known
    accumulated: int  # batches that the loop accumulates for one optimizer step
    step: int  # optimizer steps made so far
    epoch: int  # epochs completed so far
    is_last_batch: bool  # whether the batch is known to be the last one of its epoch
    device: torch.device  # of the loss and the activations
    rank: int  # of this process
    world_size: int
    may_overflow: bool  # whether gradients may overflow and their step be skipped, as with a GradScaler
    lr_writer: str  # name of something else that sets learning rates during training, or ""
    loss_scale: Callable[[], float | Tensor]  # factor by which the loop multiplies the loss before its backward
    grad_scale: Callable[[Optimizer], float | Tensor]  # factor of the gradients by which the optimizer's step divides
    total_steps: Callable[[], float]  # optimizer steps of the run; infinity if unknown
    epoch_steps: Callable[[], float]  # optimizer steps of an epoch; infinity if unknown
    reduce: Callable[[Tensor], Tensor]  # element-wise MAX over the ranks; the identity on one device
    notify: Callable[[str], None]  # prints a message once for all ranks


@dataclass(frozen=True)
class Target:
    """The optimizer whose learning rate is controlled."""

    model: nn.Module  # the network that it trains
    optimizer: Optimizer  # neither stepped nor restored from a checkpoint
    schedulers: Sequence[Any] = ()  # its learning-rate schedulers
    position: int = 0  # among the optimizers of the run
    num_optimizers: int = 1  # of the run
    label: str = ""  # names it in messages if several are controlled, such as " of optimizer 1"

    @property
    def is_only(self) -> bool:
        """Whether the run has no other optimizer."""
        return self.num_optimizers == 1

    @property
    def parameters(self) -> set[Tensor]:
        """The parameters of the optimizer."""
        return {parameter for group in self.optimizer.param_groups for parameter in group["params"]}
