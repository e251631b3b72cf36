"""``LipschitzLR``: the Lightning callback that sets the learning rate to the inverse of a Lipschitz constant."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_lipschitz import bounds
from lit_lipschitz.bounds.loss_spec import ALIASES
from lit_lipschitz.callbacks.averaged_weights import AveragedWeights
from lit_lipschitz.callbacks.trainer_facts import (
    TrainerFacts,
    callbacks_of,
    ends_batch,
    is_lightnings,
    logged_step,
    logging_interval,
    shortens_run,
    targets_of,
    why_inexact,
)
from lit_lipschitz.control.argument_types import check_type, describe_call
from lit_lipschitz.control.controller import Controller
from lit_lipschitz.control.controllers import Controllers
from lit_lipschitz.control.loop_facts import LoopFacts
from lit_lipschitz.control.rank_states import gather_states
from lit_lipschitz.control.results import RateProperties, Results
from lit_lipschitz.control.settings import check_saved, make_settings, saved_settings
from lit_lipschitz.control.state import refuse_other_versions
from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.lightning_api import Callback, LightningModule, Trainer, class_in, is_overridden, rank_zero_info
from lit_lipschitz.measurement.norms import Weights
from lit_lipschitz.rules.registry import RULES
from lit_lipschitz.training_pass import inference_pass

_LOSSES, _RULES = ("auto", "measured", *bounds.LOSSES, *ALIASES), ("auto", *RULES)
if TYPE_CHECKING:
    LossOrAuto = str
    RuleOrAuto = str
else:  # so that the command line offers the losses and rules that are registered by now
    LossOrAuto, RuleOrAuto = Literal[_LOSSES], Literal[_RULES]


class LipschitzLR(RateProperties, Callback):
    r"""Computes the learning rate from L, the Lipschitz constant of the loss in the weights of the output layer.

    L follows from the norm of the inputs of the output layer, also called the head (:mod:`lit_lipschitz.bounds`). A
    rule for the optimizer turns L into a learning rate (:mod:`lit_lipschitz.rules`), every epoch or every N optimizer
    steps. All ranks use the same learning rate.

    The rate is computed in the optimizer's step, when the gradients are final and no parameter has moved. So the first
    batch already determines the rate of its own step; the rate is 0 until there is a usable gradient. Other callbacks
    see the numbers of a step in ``on_train_batch_end``, not in ``on_before_optimizer_step``. In the first interval the
    constant is updated in each measured step (with ``bound="paper"``, which measures each step, in steps 1, 2, 4, 8,
    ...); each later interval uses the maximum of the previous one. The ratios between the configured learning rates of
    the parameter groups are kept. The rate is multiplied by the value of the scheduler divided by the configured
    learning rate.

    Args:
        loss: ``"auto"`` recognises the loss in the autograd graph and uses its proven bound, which is checked against
            measured gradients. If the loss is not recognised, or changes during training, L is measured: an estimate
            from the gradient norm in the outputs. With a ``bound`` or ``norm`` other than the default, this is an error
            instead. ``"measured"`` always measures. A name of ``lit_lipschitz.bounds.LOSSES`` (or ``"ce"``, ``"bce"``,
            ``"mse"``, ``"mae"``) uses only the terms of that loss in a sum; if there are none, the loss is assumed to
            be the mean of that loss with torch's defaults.
        head: ``"auto"``, or the name of the affine layer that computes the outputs, as in ``named_modules()``.
        bound: Family of constants: ``"strict"`` bounds the gradient, ``"smooth"`` the Hessian, ``"paper"`` estimates L.
        norm: Norm of the head's inputs: ``"frobenius"`` (of the batch), ``"sample"`` (largest row) or ``"spectral"``;
            ``"auto"`` is the default of ``bound``.
        update: ``"epoch"``, or the number of optimizer steps between updates.
        rule: ``"auto"`` is ``"bounded"``, or with ``bound="paper"`` the paper's rule for the optimizer. ``"bounded"``
            limits the steps of any optimizer by noise, gradient and descent (:mod:`lit_lipschitz.rules.bounded`);
            ``"inverse"`` is 1/L; the others are the paper's.
        weight_decay: Coefficient of the L2 term in L; None uses the optimizer's if it is added to the gradient.
        min_lr: Lower limit of the learning rate, before a schedule's factor.
        max_lr: Upper limit of the learning rate, before a schedule's factor.
        max_growth: Upper limit of the ratio of the learning rate to the previous one.
        optimizers: Position of the optimizer to control in the list that configure_optimizers returns, or several
            positions; each optimizer has its own head and loss. ``"auto"`` is for a single optimizer; manual
            optimization needs a position.
        dry_run: Measure, compute and log without changing the training.
        restore: Continue from the state in a checkpoint; False measures again.
        on_nonfinite: What to do if the loss, the activations or L are not finite, or L is 0: ``"keep"`` the last rate
            and warn once, or ``"raise"`` an error. All ranks notice it at the next update or at the end of the epoch. A
            single process on the CPU notices a non-finite loss before the parameters move.
        schedule: ``"auto"`` adds a schedule if there is no scheduler and ``bound`` is not ``"paper"``: linear warm-up
            over the first tenth of the run, at most 2,000 steps, then linear decay to 0
            (:class:`~lit_lipschitz.LinearWarmupDecay`). If the length of the run is unknown (``EarlyStopping``,
            ``max_time``, no ``max_epochs``), the warm-up takes the first epoch and there is no decay. Schedule-Free
            AdamW gets only the warm-up, and none if it has ``warmup_steps``. With a squared error the rate is also
            damped as soon as only noise is left to fit (:mod:`lit_lipschitz.control.noise_damping`). ``"none"`` adds
            nothing.
        measure_every: Largest number of optimizer steps from one measured step to the next. At first they are closer: a
            step is measured if its number is at least a quarter larger than that of the last measured one (1, 2, 3, 4,
            5, 7, 9, 12, ...), or if it is the first of an interval. ``"auto"`` is 61, or 1 with ``bound="paper"``. L is
            the largest value of the measured batches. The rate grows by at most a quarter from one measured step to the
            next.
        measure: For the paper's method. ``"running"`` measures the training batches; ``"pass"`` makes a pass in
            inference mode over the training set at the start of each epoch (:mod:`lit_lipschitz.training_pass`).
        weights: For the paper's method. The weights whose largest norm is W in the L2 term: ``"decayed"`` or all
            ``"parameters"`` of the optimizer, or ``"all"`` tensors including moving statistics, as in the authors'
            scripts.
        second_moment: For the paper's method. How L^2 is estimated (:func:`lit_lipschitz.bounds.second_moment`).
        initial_lr: For the paper's method. Fixed rate of the first interval; the authors' momentum rule starts from it.

    Raises:
        ConfigurationError: An argument is out of its range.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[LipschitzLR()], logger=False, enable_checkpointing=False)

    References:
        R. Yedida, S. Saha: A novel adaptive learning rate scheduler for deep neural networks, arXiv 1902.07399, 2019.
    """

    def __init__(
        self,
        loss: LossOrAuto = "auto",
        head: str = "auto",
        bound: bounds.Bound = "strict",
        norm: bounds.NormOrAuto = "auto",
        update: Literal["epoch"] | int = "epoch",
        rule: RuleOrAuto = "auto",
        weight_decay: float | None = None,
        min_lr: float = 0.0,
        max_lr: float | None = None,
        max_growth: float | None = None,
        optimizers: Literal["auto"] | int | list[int] = "auto",
        dry_run: bool = False,
        restore: bool = True,
        on_nonfinite: Literal["keep", "raise"] = "keep",
        schedule: Literal["auto", "none"] = "auto",
        measure_every: Literal["auto"] | int = "auto",
        measure: Literal["running", "pass"] = "running",
        weights: Weights = "decayed",
        second_moment: Literal["auto", bounds.SecondMoment] = "auto",
        initial_lr: float | None = None,
    ) -> None:
        self.policy, self.options = make_settings(locals())
        super().__init__()
        check_type("restore", restore, bool)
        self.optimizers, self.restore = _checked_positions(optimizers, head), restore
        self._facts: TrainerFacts  # of the fit
        self._loop: LoopFacts  # at the start of the batch
        self._logging_interval = 1
        self._stepped = self._changed = False  # in this batch: whether an optimizer has, and whether a rate has
        self._controllers = Controllers()  # by the optimizer's position
        self._finished: dict[int, Results] = {}  # likewise, after the fit
        self._attached = False  # to a trainer
        self._in_batch = False  # whether a batch has begun
        self._told = False  # that a checkpoint does not resume exactly
        self._stored: dict[int, Any] = {}  # states from a checkpoint, by the optimizer's position

    def __repr__(self) -> str:
        """The call with the arguments that differ from their defaults."""
        values = {**vars(self.policy), **vars(self.options), "optimizers": self.optimizers, "restore": self.restore}
        is_default = self.policy.norm == bounds.resolve_norm(self.policy.bound, "auto")
        return describe_call(self, {**values, "norm": "auto" if is_default else self.policy.norm})

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint."""
        # Lightning refuses equal keys with a message on saving; until setup refuses them, each instance has its own.
        return type(self).__qualname__ if self._attached else f"{type(self).__qualname__}{id(self)}"

    @property
    def _source(self) -> Controller | Results | None:
        return next(iter(self.controllers.values()), None)

    @property
    def controllers(self) -> dict[int, Controller | Results]:
        """The controllers by the position of their optimizer, or their results after the fit; empty before it."""
        return {**self._controllers, **self._finished}

    def controls(self, optimizer: Optimizer) -> bool:
        """Whether the properties of this callback are those of an optimizer: the first one that is controlled."""
        return isinstance(self._source, Controller) and self._source.optimizer is optimizer

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a second LipschitzLR and forgets an earlier fit; a checkpoint's state is loaded after this."""
        self._attached = True
        AveragedWeights.ensure(trainer)  # for Schedule-Free optimizers; it leaves others alone
        if stage != "fit":
            return
        _check_callbacks(callbacks_of(trainer))
        self._controllers.close()
        self._controllers, self._finished, self._stored = Controllers(), {}, {}
        self._in_batch = self._told = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches to the head (before its first forward, as torch.compile needs) and to the optimizer."""
        if not self.options.running and not is_overridden("forward", pl_module, class_in(pl_module, "LightningModule")):
            raise ConfigurationError(
                f"LipschitzLR(measure='pass') calls the module, and {type(pl_module).__name__} has no forward; define "
                "one, or use measure='running'"
            )
        self._facts = TrainerFacts(trainer, pl_module)
        self._loop, self._logging_interval = self._facts.now(), logging_interval(trainer)
        for target in targets_of(trainer, pl_module, self.optimizers):
            i = target.position
            before_step, stored = partial(self.before_step, i), self._stored.get(i)
            self._controllers[i] = Controller(self.policy, self.options, target, self._loop, stored, before_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Removes the hooks, and keeps the results and nothing of the run."""
        self._controllers.close()
        results = self.__getstate__()
        vars(self).clear()
        vars(self).update(results)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has, and what is left after a fit: the results so far, and nothing of the run."""
        results = {i: Results.of(one) for i, one in self._controllers.items()}
        of_the_fit = ("_facts", "_loop", "log", "log_dict")  # the last two are methods of the module, set by Lightning
        kept = {name: value for name, value in vars(self).items() if name not in of_the_fit}
        return {**kept, "_controllers": Controllers(), "_finished": {**self._finished, **results}}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Ends a fit that is interrupted, which Lightning does not tear down."""
        self.teardown(trainer, pl_module, "fit")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets batches of the last epoch that made no step."""
        self._controllers.begin_epoch()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Starts the measurement of a batch."""
        if not self.options.running:
            # Lightning skips on_train_epoch_start if it resumes at the end of an epoch.
            _measure_by_pass(trainer, pl_module, list(self._controllers.values()))
        self._loop, self._in_batch = self._facts.now(), True
        self._controllers.begin_batch(self._loop)

    def _loop_now(self) -> LoopFacts:
        """The state of the loop up to the optimizer step; in manual optimization, steps may have been made before."""
        return self._loop if self._loop.automatic else self._facts.now()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Ends the measurement of a batch by its loss; the first loss shows the head."""
        self._controllers.before_backward(loss, self._loop_now())

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes how long the gradients are, which may be clipped."""
        self._controllers.after_backward(self._loop)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Tells the other controllers; the rate is decided later, when the gradients are clipped."""
        self._controllers.before_step_of(optimizer)

    def before_step(self, position: int) -> None:
        """Updates the rate of an optimizer if an update is due, and writes it; its step calls this.

        The gradients are final by then: accumulated, reduced over the ranks, unscaled and clipped.
        """
        loop = self._loop_now()
        changed = self._controllers[position].on_step(loop)
        self._stepped, self._changed = True, self._changed or changed

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs, and ends the interval with its last step, so that an epoch's checkpoint has what all ranks share."""
        step = logged_step(trainer)
        is_point = self._stepped and (step + 1) % self._logging_interval == 0
        if is_point or self._changed:
            self._log(trainer, pl_module, step if is_point else None)
        self._stepped = self._changed = False
        self._end_batch(trainer)

    def _end_batch(self, trainer: Trainer) -> None:
        before, ended = self._loop, not self._in_batch
        self._in_batch = False
        if ended:  # for a checkpoint that another callback has saved before
            return
        if before.world_size > 1 or trainer.is_last_batch or self._controllers.measures_batch(before):
            self._controllers.end_batch(self._facts.now())

    def _log(self, trainer: Trainer, pl_module: LightningModule, step: int | None) -> None:
        """Logs as LearningRateMonitor does, since what log() was given costs time in every batch.

        The loggers get a point at ``step``, or none.
        """
        metrics = self._metrics()
        # As CPU tensors: Lightning would copy numbers to the device, and wait.
        tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}
        trainer.callback_metrics.update(tensors)
        if trainer.progress_bar_callback is not None:
            in_bar = {name: value for name, value in tensors.items() if name.endswith("/lr")}
            pl_module.log_dict(in_bar, prog_bar=True, logger=False, batch_size=1)
        for logger in trainer.loggers if step is not None else ():
            logger.log_metrics(metrics, step=step)

    def _metrics(self) -> dict[str, float]:
        """The metrics of all controllers."""
        return {name: one for i in self._controllers for name, one in self._controllers.metrics(i).items()}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks the epoch's last losses; gives every logger a point for its last step, however short the epoch."""
        loop = self._facts.now()
        for controller in self._controllers.values():
            controller.updater.check_remaining_losses(loop)
            if shortens_run(trainer):
                controller.on_short_epoch(loop)
        step, metrics = logged_step(trainer), self._metrics()
        if step % self._logging_interval:
            for logger in trainer.loggers if metrics else ():
                logger.log_metrics(metrics, step=step - 1)

    def state_dict(self) -> dict[str, Any]:
        """The state, as tensors and plain values that torch.load(weights_only=True) admits."""
        states = {i: controller.state_dict() for i, controller in self.controllers.items()}
        return {"settings": saved_settings(self.policy, self.options), "optimizers": states or dict(self._stored)}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Saves the states of all ranks, which save together, and says where a resumed run will not be the same."""
        # After an error another rank may wait for this one anywhere.
        if self._controllers:
            if self._in_batch and ends_batch(trainer):
                self._end_batch(trainer)
            state = self.state_dict()
            state["optimizers"] = gather_states(state["optimizers"], trainer.world_size)
            checkpoint["callbacks"][self.state_key] = state
        if self.controllers and not self._told and (why := why_inexact(trainer)):
            self._told = True
            rank_zero_info(f"LipschitzLR: this checkpoint is saved {why}")

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads the state of :meth:`state_dict`.

        Raises:
            LitLipschitzError: It was saved with other settings, or by another version.
        """
        if not self.restore:
            return
        with refuse_other_versions():
            check_saved(state_dict, self.policy, self.options)
            self._stored = dict(state_dict["optimizers"])
        # Some strategies load after on_fit_start.
        for position, state in self._stored.items():
            if position in self._controllers:
                self._controllers[position].load_state_dict(state)


def _measure_by_pass(trainer: Trainer, pl_module: LightningModule, controllers: list[Controller]) -> None:
    """Makes the epoch's pass over the training set, for the controllers that need one."""
    epoch = trainer.current_epoch
    measuring = [one for one in controllers if one.updater.needs_pass(epoch)]
    if not measuring:
        return
    for controller in measuring:
        controller.hooks.reset()
        controller.hooks.set_mode("inference")
    try:
        inference_pass(trainer, pl_module)
    finally:
        for controller in measuring:
            controller.hooks.set_mode("off")
    for controller in measuring:
        controller.updater.end_pass(epoch)


def _check_callbacks(callbacks: list[Callback]) -> None:
    same = [callback for callback in callbacks if isinstance(callback, LipschitzLR)]
    if len(same) > 1:
        raise ConfigurationError(
            f"LipschitzLR: expected one such callback, found {len(same)} in trainer.callbacks; pass one, with "
            "optimizers= if it is to control several optimizers"
        )
    if any(is_lightnings(callback, "LearningRateFinder") for callback in callbacks):
        raise ConfigurationError(
            "LipschitzLR computes the learning rate that LearningRateFinder (or Tuner.lr_find) searches for, and "
            "found both in trainer.callbacks; remove one of the two"
        )


def _checked_positions(optimizers: Literal["auto"] | int | list[int], head: str) -> Literal["auto"] | list[int]:
    """The positions of the optimizers as a list."""
    positions = [optimizers] if isinstance(optimizers, int) else optimizers
    if positions == "auto":
        return "auto"
    if not (isinstance(positions, list) and positions and all(type(i) is int and i >= 0 for i in positions)):
        raise ConfigurationError(
            f"LipschitzLR(optimizers={optimizers!r}): expected 'auto', a position from 0, or a list of positions"
        )
    if len(positions) > 1 and head != "auto":
        raise ConfigurationError(
            f"LipschitzLR(head={head!r}, optimizers={optimizers!r}): each optimizer has a head of its own; pass "
            "head='auto', or one optimizer"
        )
    return positions
