"""What a controller needs to know of a training loop that only its optimizer's steps and its backwards show."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from lit_lipschitz.control.loop_facts import LoopFacts
from lit_lipschitz.control.loss_scale import grad_scale, loss_scale
from lit_lipschitz.errors import ConfigurationError

_WRAPPERS = ("accelerate", "lightning", "lightning_fabric", "pytorch_lightning")
"""Packages whose wrappers of an optimizer step the one that they hold in ``optimizer``."""


class PlainLoop:
    """The state of a training loop, by the optimizer steps that it has made; what stays the same is read once.

    Args:
        device: Device of the loss and of the activations.
        automatic: Whether all losses of the loop are those of one optimizer, so that their factors are known.
        total_steps: Optimizer steps of the run; None if unknown.
        epoch_steps: Optimizer steps of an epoch; None if unknown: the run is one epoch then.
        accumulate_grad_batches: Backward passes that make one optimizer step.
        grad_scaler: The GradScaler that multiplies the loss; None without one.
        notify: Prints a message, on the first rank.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        automatic: bool,
        total_steps: int | None,
        epoch_steps: int | None,
        accumulate_grad_batches: int,
        grad_scaler: Any,
        notify: Callable[[str], None],
    ) -> None:
        self.step = 0  # optimizer steps made so far
        self.automatic, self.accumulated = automatic, _steps("accumulate_grad_batches", accumulate_grad_batches)
        self._epoch_steps = math.inf if epoch_steps is None else _steps("epoch_steps", epoch_steps)
        length = math.inf if total_steps is None else float(_steps("total_steps", total_steps))
        ranks = distributed.is_available() and distributed.is_initialized()
        rank, world_size = (distributed.get_rank(), distributed.get_world_size()) if ranks else (0, 1)
        scaler = grad_scaler if grad_scaler is not None and grad_scaler.is_enabled() else None
        self.scales_loss = scaler is not None
        self._constants: tuple[Any, ...] = (
            device,
            rank,
            world_size,
            scaler is not None,
            "",
            partial(loss_scale, scaler, self.accumulated),
            partial(grad_scale, scaler),
            lambda: length,
            lambda: float(self._epoch_steps),
            _largest_of_ranks if ranks else _itself,
            notify if rank == 0 else _silent,
        )

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has: the steps so far, and nothing of the run."""
        return {**vars(self), "_constants": ()}

    def now(self, ended: bool = False) -> LoopFacts:
        """The state before an optimizer step, or after one that has ``ended``."""
        current, length = self.step - ended, self._epoch_steps
        epoch = 0 if length == math.inf else int(current // length)
        is_last = length != math.inf and (current + 1) % length == 0
        return LoopFacts(self.automatic, self.accumulated, self.step, epoch, is_last, *self._constants)


def unwrapped_model(model: nn.Module) -> nn.Module:
    """The network in the wrapper of DistributedDataParallel, DataParallel or Fabric."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while isinstance(model, wrappers) or hasattr(model, "_forward_module"):
        model = model.module  # type: ignore[assignment]
    return model


def unwrapped_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer that makes the steps, in the wrapper of Fabric or Accelerate."""
    while type(optimizer).__module__.partition(".")[0] in _WRAPPERS and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def scaler_of(optimizer: Optimizer) -> Any:
    """The GradScaler of the wrapper of Fabric or Accelerate around an optimizer; None without one."""
    if type(optimizer).__module__.partition(".")[0] not in _WRAPPERS:
        return None
    precision = getattr(getattr(optimizer, "_strategy", None), "precision", optimizer)
    return getattr(precision, "scaler", None)


def _steps(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ConfigurationError(f"attach({name}={value!r}): expected a number of at least 1")
    return value


def _largest_of_ranks(values: Tensor) -> Tensor:
    values = values.clone()
    distributed.all_reduce(values, distributed.ReduceOp.MAX)
    return values


def _itself(values: Tensor) -> Tensor:
    return values


def _silent(message: str) -> None:
    pass
