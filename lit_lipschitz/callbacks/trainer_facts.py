"""What the controllers need to know of Lightning's Trainer; all private attributes that are read stand here."""

import math
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging, Timer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lit_lipschitz.control.loop_facts import LoopFacts, Target


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The trainer's callbacks."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def loop_facts(trainer: Trainer, module: LightningModule) -> LoopFacts:
    """The state of a trainer that is fitting a module."""
    lr_writer = any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks_of(trainer))
    return LoopFacts(
        device=trainer.strategy.root_device,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
        automatic=module.automatic_optimization,
        accumulated=trainer.accumulate_grad_batches,
        step=trainer.global_step,
        epoch=trainer.current_epoch,
        is_last_batch=trainer.is_last_batch,
        may_overflow=_scaler_of(trainer) is not None,
        lr_writer="StochasticWeightAveraging" if lr_writer else "",
        loss_scale=lambda: _loss_scale(trainer),
        grad_scale=lambda optimizer: _grad_scale(trainer, optimizer),
        total_steps=lambda: _total_steps(trainer, module),
        reduce=lambda tensor: _reduce_max(trainer, tensor),
        notify=rank_zero_info,
    )


def target_of(trainer: Trainer, module: LightningModule, position: int, label: str = "") -> Target:
    """The optimizer at a position, with its schedulers."""
    optimizer = trainer.optimizers[position]
    schedulers = [c.scheduler for c in trainer.lr_scheduler_configs if c.scheduler.optimizer is optimizer]
    return Target(module, optimizer, schedulers, position, len(trainer.optimizers), label)


def logging_interval(trainer: Trainer) -> int:
    """Optimizer steps between points of the loggers."""
    return max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]


def may_save_checkpoint(trainer: Trainer, batch_idx: int) -> bool:
    """Whether a checkpoint may be saved after this batch, as far as all ranks know alike.

    That is every so many steps, with a validation that follows, and at the end of the epoch.
    """
    step = trainer.global_step
    intervals: Sequence[int] = [getattr(c, "_every_n_train_steps", 0) or 0 for c in trainer.checkpoint_callbacks]
    due = trainer.is_last_batch or any(every > 0 and step % every == 0 for every in intervals)
    validation = getattr(trainer, "val_check_batch", math.inf)
    return due or (validation != math.inf and validation > 0 and (batch_idx + 1) % validation == 0)


def _reduce_max(trainer: Trainer, tensor: Tensor) -> Tensor:
    reduced = trainer.strategy.reduce(tensor, reduce_op="max")
    assert isinstance(reduced, Tensor)
    return reduced


def _scaler_of(trainer: Trainer) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)


def _loss_scale(trainer: Trainer) -> float | Tensor:
    """Lightning divides by the number of accumulated batches, then a GradScaler multiplies, on the device."""
    scaler = _scaler_of(trainer)
    if scaler is None:
        return 1.0 / trainer.accumulate_grad_batches
    scale = getattr(scaler, "_scale", None)
    return (scaler.get_scale() if scale is None else scale) / trainer.accumulate_grad_batches


def _grad_scale(trainer: Trainer, optimizer: Optimizer) -> float | Tensor:
    """A fused optimizer divides by the GradScaler's scale within its step; other gradients are unscaled before."""
    scaler = _scaler_of(trainer)
    fused = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
    return scaler.get_scale() if fused else 1.0


def _total_steps(trainer: Trainer, module: LightningModule) -> float:
    """Optimizer steps of the run; infinity if time limits it, or if the number of accumulated batches changes."""
    callbacks = callbacks_of(trainer)
    changing = any(isinstance(one, GradientAccumulationScheduler) and len(one.scheduling) > 1 for one in callbacks)
    timed = any(isinstance(one, Timer) and one.time_remaining() is not None for one in callbacks)
    if not module.automatic_optimization or changing or timed:
        return math.inf
    return float(trainer.estimated_stepping_batches)
