"""What a controller knows of the training loop that drives it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True)
class LoopFacts:
    """The state of a training loop at one of its events.

    Attributes:
        device: Device of the loss and the activations.
        rank: Index of this process.
        world_size: Number of processes.
        automatic: Whether the loop itself calls backward and the optimizer, so that its factor of the loss is known.
        accumulated: Batches that the loop accumulates for one optimizer step.
        step: Optimizer steps made so far.
        epoch: Epochs completed so far.
        is_last_batch: Whether the batch is known to be the last one of its epoch.
        may_overflow: Whether gradients may overflow and their step be skipped, as with a GradScaler.
        lr_writer: Name of something else that sets learning rates during training, or "".
        loss_scale: Factor by which the loop multiplies the loss before its backward.
        grad_scale: Factor of the gradients that an optimizer divides by within its step.
        total_steps: Optimizer steps of the run; infinity if unknown.
    """

    device: torch.device
    rank: int
    world_size: int
    automatic: bool
    accumulated: int
    step: int
    epoch: int
    is_last_batch: bool
    may_overflow: bool
    lr_writer: str
    loss_scale: Callable[[], float | Tensor]
    grad_scale: Callable[[Optimizer], float | Tensor]
    total_steps: Callable[[], float]

    @property
    def epochs_completed(self) -> int:
        """Epochs completed with this batch."""
        return self.epoch + self.is_last_batch
