"""What the controllers need to know of Lightning's Trainer; all private attributes that are read stand here."""

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, Literal

from torch import Tensor

from lit_lipschitz.control.loop_facts import LoopFacts, Target
from lit_lipschitz.control.loss_scale import grad_scale, loss_scale
from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.lightning_api import Callback, LightningModule, Trainer, class_in, rank_zero_info

_DEFAULT_EPOCHS = 1000
"""The ``max_epochs`` that Lightning sets where the user gives no limit."""


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The trainer's list of callbacks, to read and to change; Lightning does not declare its type."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def is_lightnings(callback: Any, name: str) -> bool:
    """Whether a callback is of a class of Lightning, as ``lightning`` or ``pytorch_lightning`` has it."""
    return class_in(callback, name) is not None


class TrainerFacts:
    """The state of a trainer that is fitting a module; what stays the same during a fit is read once."""

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer, self._module = trainer, module
        writes_lr = any(is_lightnings(callback, "StochasticWeightAveraging") for callback in callbacks_of(trainer))
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._constants: tuple[Any, ...] = (
            trainer.strategy.root_device,
            trainer.global_rank,
            trainer.world_size,
            scaler is not None,
            "StochasticWeightAveraging" if writes_lr else "",
            partial(_loss_scale, trainer, scaler),
            partial(grad_scale, scaler),
            partial(_total_steps, trainer, module),
            partial(_epoch_steps, trainer, module),
            partial(trainer.strategy.reduce, reduce_op="max"),
            rank_zero_info,
        )

    def now(self) -> LoopFacts:
        """The state at this event: every hook asks for it, so what it costs counts."""
        trainer = self._trainer
        return LoopFacts(
            self._module.automatic_optimization,
            trainer.accumulate_grad_batches,
            trainer.global_step,
            trainer.current_epoch,
            trainer.is_last_batch,
            *self._constants,
        )


def targets_of(trainer: Trainer, module: LightningModule, optimizers: Literal["auto"] | list[int]) -> list[Target]:
    """The optimizers at some positions, or the only one, with their schedulers."""
    count, name = len(trainer.optimizers), type(module).__name__
    if not any(optimizer.param_groups for optimizer in trainer.optimizers):  # Lightning has one without, for None
        raise ConfigurationError(
            f"LipschitzLR sets the learning rate of an optimizer, and configure_optimizers of {name} returned none; "
            "end it with: return torch.optim.AdamW(self.parameters(), lr=1e-3)"
        )
    if optimizers == "auto":
        if not module.automatic_optimization or count != 1:
            how = "" if module.automatic_optimization else " under manual optimization"
            raise ConfigurationError(
                f"LipschitzLR: expected one optimizer and automatic optimization; configure_optimizers of {name} "
                f"returned {count}{how}: pass optimizers= with the positions of those to control, counted from 0, or "
                "remove the callback"
            )
        optimizers = [0]
    if max(optimizers) >= count:
        raise ConfigurationError(
            f"LipschitzLR(optimizers={optimizers}): expected positions from 0 to {count - 1}, since "
            f"configure_optimizers of {name} returned {count}"
        )
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    targets = []
    for position in dict.fromkeys(optimizers):
        optimizer = trainer.optimizers[position]
        own = [scheduler for scheduler in schedulers if scheduler.optimizer is optimizer]
        label = f" of optimizer {position}" if len(set(optimizers)) > 1 else ""
        targets.append(Target(module, optimizer, own, position, count, label))
    return targets


def training_batches(trainer: Trainer) -> Iterator[Any]:
    """The batches of an epoch of a fit that has begun, on the host."""
    count, loader = trainer.num_training_batches, iter(trainer.fit_loop._combined_loader)  # type: ignore[arg-type]
    return (batch for batch, _, _ in islice(loader, None if math.isinf(count) else int(count)))


def training_loss(trainer: Trainer, batch: Any, batch_idx: int) -> Tensor:
    """The loss of a batch, by the module's training_step, as a fit calls it."""
    loop, module, precision = trainer.fit_loop.epoch_loop, trainer.lightning_module, trainer.precision_plugin
    batch = module._on_before_batch_transfer(precision.convert_input(batch), dataloader_idx=0)
    batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    before, module._current_fx_name = module._current_fx_name, "training_step"  # what is logged there is allowed
    try:
        output = trainer.strategy.training_step(*loop._build_kwargs(OrderedDict(), batch, batch_idx).values())
    finally:
        module._current_fx_name = before
    return output["loss"] if isinstance(output, Mapping) else output  # type: ignore[return-value]


def logging_interval(trainer: Trainer) -> int:
    """Optimizer steps between points of the loggers."""
    return max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]


def logged_step(trainer: Trainer) -> int:
    """Batches before this one that ended with an optimizer step, which are the steps of Lightning's loggers."""
    steps: int = trainer.fit_loop.epoch_loop._batches_that_stepped
    return steps


def ends_batch(trainer: Trainer) -> bool:
    """Whether no batch is being processed: none has begun, or the callbacks learn of its end."""
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(batches.ready == batches.processed)


def why_inexact(trainer: Trainer) -> str:
    """Why Lightning does not resume exactly from a checkpoint that is saved now; "" if it does.

    It saves neither gradients nor a batch that has begun, nor an epoch that is about to begin.
    """
    loop, epochs = trainer.fit_loop, trainer.fit_loop.epoch_progress.current
    accumulates = trainer.lightning_module.automatic_optimization and loop.epoch_loop._should_accumulate()
    if not ends_batch(trainer) or accumulates or epochs.ready != epochs.started:  # type: ignore[attr-defined]
        return (
            "within an optimizer step, whose batches Lightning leaves out of the resumed run, so that it differs a "
            "little from this one; save in on_train_batch_end, after a step"
        )
    by_clock = getattr(trainer, "_val_check_time_interval", None) is not None
    if by_clock and trainer.validating and trainer.is_last_batch:
        return (
            "in a validation by the clock after the last batch of an epoch, to which Lightning adds a batch in the "
            "resumed run, so that it differs a little from this one; set val_check_interval as a number of batches, "
            "or save with ModelCheckpoint(every_n_epochs=1, save_on_train_epoch_end=True)"
        )
    return ""


def shortens_run(trainer: Trainer) -> bool:
    """Whether the epoch that ends has skipped batches by which the length of the run was computed."""
    started: int = trainer.fit_loop.epoch_loop.batch_progress.current.started  # type: ignore[attr-defined]
    return trainer.max_steps < 0 and not trainer.should_stop and started < trainer.num_training_batches


def _loss_scale(trainer: Trainer, scaler: Any) -> float | Tensor:
    """Lightning divides by the number of accumulated batches, then a GradScaler multiplies, on the device."""
    return loss_scale(scaler, trainer.accumulate_grad_batches)


def _total_steps(trainer: Trainer, module: LightningModule) -> float:
    """Optimizer steps of the run; infinity if nothing but a limit that is not expected to be reached tells.

    That is so if time or ``EarlyStopping`` end it, with the 1,000 epochs that are Lightning's default, and if the
    number of accumulated batches changes.
    """
    callbacks: Sequence[Any] = callbacks_of(trainer)
    changing = any(is_lightnings(one, "GradientAccumulationScheduler") and len(one.scheduling) > 1 for one in callbacks)
    timed = any(is_lightnings(one, "Timer") and one.time_remaining() is not None for one in callbacks)
    stops = any(is_lightnings(one, "EarlyStopping") for one in callbacks)
    default = trainer.max_epochs == _DEFAULT_EPOCHS and trainer.max_steps == -1
    if not module.automatic_optimization or changing or timed or stops or default:
        return math.inf
    return float(trainer.estimated_stepping_batches)


def _epoch_steps(trainer: Trainer, module: LightningModule) -> float:
    """Optimizer steps of an epoch; infinity if its length is unknown, and in manual optimization."""
    if not module.automatic_optimization:
        return math.inf
    return float(trainer.num_training_batches) / trainer.accumulate_grad_batches
