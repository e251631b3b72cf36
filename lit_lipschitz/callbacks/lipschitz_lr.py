"""``LipschitzLR``: the callback that sets the learning rate to the inverse of the loss's Lipschitz constant."""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer

from lit_lipschitz.bounds import families as constants
from lit_lipschitz.bounds.loss_spec import LOSSES
from lit_lipschitz.callbacks.averaged_weights import AveragedWeights
from lit_lipschitz.control.controller import Controller
from lit_lipschitz.control.options import Options
from lit_lipschitz.control.policy import Policy
from lit_lipschitz.errors import ConfigurationError, LitLipschitzError
from lit_lipschitz.measurement import norms
from lit_lipschitz.recognition import loss_graph as graph
from lit_lipschitz.training_pass import inference_pass


class LipschitzLR(Callback):
    r"""Sets the learning rate from 1/L, L being the Lipschitz constant of the loss in the weights of the last layer.

    The inputs of the last affine map (the head) are measured by a hook while the model trains; their size gives L
    (:mod:`lit_lipschitz.bounds`), and the optimizer's rule turns L into a rate (:mod:`lit_lipschitz.rules`), again
    every epoch or every N optimizer steps. All ranks agree on the measured values by one MAX all-reduce an update, so
    they use the same rate; the values are read to the host only then.

    The first rate comes from the first batch and applies to the step made with it. While the first interval lasts, the
    running maximum is looked at again after 1, 2, 4, 8, ... steps; each later interval uses the maximum of the one
    before. With Adam and its like the length of the optimizer's own step is read every 16 steps as well. Every
    parameter group gets the rate times its configured rate over the first group's, so the size of the
    configured rates does not matter and their ratios do. A scheduler's value over its configured one is a factor.

    Args:
        loss: ``"auto"`` finds the loss in the autograd graph of the first step. A name of
            :mod:`lit_lipschitz.bounds` looks for that loss among the terms of a sum and disregards the others;
            where there is none, it takes your word that the loss is a mean of that one, with torch's defaults.
        head: ``"auto"``, or the name of the last affine map as in ``named_modules()``.
        bound: Family of the constant. ``"strict"`` bounds the gradient, ``"smooth"`` the Hessian, ``"paper"`` is the
            estimate of arXiv 1902.07399.
        norm: How the head's inputs are measured: ``"frobenius"`` (of the batch), ``"sample"`` (largest row),
            ``"unit"`` (largest entry), ``"spectral"``; ``"auto"`` is the family's own.
        update: ``"epoch"``, or the number of optimizer steps between updates.
        measure: ``"running"`` measures the training batches themselves; ``"pass"`` makes a pass in inference mode over
            the training set at the start of every epoch, the paper's way (:mod:`lit_lipschitz.training_pass`).
        rule: ``"auto"`` follows the optimizer; a name of :mod:`lit_lipschitz.rules` forces a rule: ``"inverse"``
            is 1/L, ``"noise"`` grows with the square root of the batch, for SGD with momentum, ``"grafted"`` makes
            Adam's steps as long as those of SGD at 1/L, ``"observed"`` the same in the mean over the weights and
            with the slope that the loss is seen to have, ``"schedule_free"`` those of Schedule-Free AdamW, ``"adamo"``
            is the paper's for momentum, ``"adamo_authors"`` that of its authors' scripts.
        squared: The estimate of L squared that the rules of RMSprop and Adam use
            (:func:`lit_lipschitz.bounds.families.squared`); ``"auto"`` is ``"scripts"`` for the authors' rules and
            ``"constant"`` for others.
        weight_decay: Coefficient of the L2 term in L; None is the optimizer's, where it adds it to the gradient.
        weights: Whose largest norm is W in the L2 term: ``"decayed"`` and all ``"parameters"`` of the optimizer, or
            ``"all"`` tensors of the network, moving statistics included, as in the authors' scripts.
        initial_lr: Rate to use until the first interval is over, in place of a measured one. The authors' rule for
            momentum starts its average from the same number.
        min_lr: No rate below this one, before a schedule's factor.
        max_lr: No rate above this one.
        max_growth: No rate above this many times the one before.
        optimizers: Position in what configure_optimizers returns of the optimizer to control, or a list of positions,
            each with a head and a loss of its own; the others are left alone. ``"auto"`` is the only one there is.
            Manual optimization needs it.
        dry_run: Measure, compute and log, but write nothing: training is what it is without the callback.
        restore: Go on from a checkpoint's state; False measures anew.
        on_nonfinite: What to do when the loss, activations or the constant are not finite or the constant is 0:
            ``"keep"`` the last rate and warn once, or ``"raise"``. A step is not held up for it: all ranks notice
            together at the next update, at the latest at the end of the epoch, when the parameters have moved since;
            one process on the CPU notices a loss before the parameters move. The message names the step, the ranks and
            the last rate. Of several optimizers those keep theirs whose heads the loss is taken of, or all where its
            graph does not tell; a checkpoint in between has what was not told of yet.
        schedule: ``"auto"``: where the optimizer has no scheduler and the run's length is known, the rate rises
            linearly over the first tenth of the run and falls linearly to 0
            (:class:`~lit_lipschitz.optim.schedules.LinearWarmupDecay`), except with ``bound="paper"``. A run that is
            limited by time, and one whose accumulated batches change, count as of unknown length. Schedule-Free AdamW
            has the rise alone, and not that where it has ``warmup_steps`` of its own. On a squared error the rate is
            held back where learning has slowed down and much is unexplained
            (:class:`~lit_lipschitz.control.noise_damping.Progress`).
            ``"none"``: neither.

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
        loss: Literal[
            "auto",
            "cross_entropy",
            "binary_cross_entropy",
            "mean_squared_error",
            "mean_absolute_error",
            "huber",
            "smooth_l1",
        ] = "auto",
        head: str = "auto",
        bound: constants.Bound = "strict",
        norm: Literal["auto", "frobenius", "sample", "unit", "spectral"] = "auto",
        update: Literal["epoch"] | int = "epoch",
        measure: Literal["running", "pass"] = "running",
        rule: Literal[
            "auto",
            "inverse",
            "noise",
            "adamo",
            "rmsprop",
            "adam",
            "adamax",
            "adamo_authors",
            "rmsprop_authors",
            "adam_authors",
            "observed",
            "grafted",
            "schedule_free",
        ] = "auto",
        squared: Literal["auto", "constant", "text", "scripts"] = "auto",
        weight_decay: float | None = None,
        weights: norms.Weights = "decayed",
        initial_lr: float | None = None,
        min_lr: float = 0.0,
        max_lr: float | None = None,
        max_growth: float | None = None,
        optimizers: Literal["auto"] | int | list[int] = "auto",
        dry_run: bool = False,
        restore: bool = True,
        on_nonfinite: Literal["keep", "raise"] = "keep",
        schedule: Literal["auto", "none"] = "auto",
    ) -> None:
        super().__init__()
        _check_choice("loss", loss, ("auto", *LOSSES))
        _check_choice("on_nonfinite", on_nonfinite, ("keep", "raise"))
        _check_choice("schedule", schedule, ("auto", "none"))
        _check_choice("measure", measure, ("running", "pass"))
        _check_choice("weights", weights, get_args(norms.Weights))
        if measure == "pass" and update != "epoch":
            raise ConfigurationError(f"LipschitzLR(measure='pass', update={update!r}): a pass is made every epoch")
        if update != "epoch" and not (type(update) is int and update >= 1):
            raise ConfigurationError(f"LipschitzLR(update={update!r}): expected 'epoch' or a number of steps >= 1")
        if initial_lr is not None and not 0 < initial_lr < math.inf:
            raise ConfigurationError(f"LipschitzLR(initial_lr={initial_lr}): expected a positive number")
        if initial_lr is not None and not min_lr <= initial_lr <= (max_lr or math.inf):
            raise ConfigurationError(
                f"LipschitzLR(initial_lr={initial_lr}): expected a rate from min_lr={min_lr} to max_lr={max_lr}"
            )
        try:
            resolved = constants.resolve_norm(bound, norm)
        except ValueError as error:
            raise ConfigurationError(f"LipschitzLR: {error}") from None
        positions = [optimizers] if isinstance(optimizers, int) else optimizers
        if positions != "auto" and not (positions and all(type(i) is int and i >= 0 for i in positions)):
            raise ConfigurationError(
                f"LipschitzLR(optimizers={optimizers!r}): expected 'auto', a position from 0, or a list of positions"
            )
        if positions != "auto" and len(positions) > 1 and head != "auto":
            raise ConfigurationError(
                f"LipschitzLR(head={head!r}, optimizers={optimizers!r}): each optimizer has a head of its own; pass "
                "head='auto', or one optimizer"
            )
        self.policy = Policy(bound, resolved, rule, squared, weight_decay, min_lr, max_lr, max_growth)
        self.options = Options(loss, head, update, measure, weights, initial_lr, on_nonfinite, dry_run, schedule)
        self.optimizers, self.restore = positions, restore
        self._controllers: dict[int, Controller] = {}  # by the optimizer's position
        self._attached = False  # to a trainer
        self._stored: dict[int, Any] = {}  # what a checkpoint brings for them, until they are there

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint."""
        # Lightning refuses equal keys before setup can, and speaks of saving; until then each one has its own.
        name = type(self).__qualname__
        return name if self._attached else f"{name}{id(self)}"

    @property
    def _first(self) -> Controller | None:
        return next(iter(self._controllers.values()), None)

    @property
    def rate(self) -> float | None:
        """The rate behind the last optimizer step at a schedule factor of 1; None before the first one."""
        return self._first.decision.lr if self._first and self._first.decision else None

    @property
    def lr(self) -> float | None:
        """The first parameter group's learning rate in the last optimizer step; None before the first one."""
        return self._first.rates[0] if self._first and self._first.rates else None

    @property
    def constant(self) -> float | None:
        """The Lipschitz constant behind the last optimizer step; None where there is none, as with a fixed rate."""
        return (self._first.decision.constant or None) if self._first and self._first.decision else None

    @property
    def controllers(self) -> dict[int, Controller]:
        """What controls each optimizer, by the optimizer's position; empty before the fit has begun."""
        return dict(self._controllers)

    def controls(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer is the one that the properties here tell of: the first of those it controls."""
        return self._first is not None and self._first.optimizer is optimizer

    @property
    def head_name(self) -> str | None:
        """The name of the head, once the first step has told which module it is."""
        return self._first.head_name if self._first else None

    # -- attach ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a second LipschitzLR and starts afresh; a checkpoint's state is loaded after this."""
        self._attached = True
        AveragedWeights.ensure(trainer)  # for Schedule-Free optimizers; it leaves others alone
        if stage != "fit":
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        same = [callback for callback in callbacks if isinstance(callback, LipschitzLR)]
        if len(same) > 1:
            raise ConfigurationError(
                f"LipschitzLR must be the only one in charge of the rate; found {len(same)} of them in "
                "trainer.callbacks: pass one"
            )
        if any(isinstance(callback, LearningRateFinder) for callback in callbacks):
            raise ConfigurationError(
                "LipschitzLR computes the rate that a LearningRateFinder (or Tuner.lr_find) looks for, and found one "
                "beside it in trainer.callbacks: remove one of the two"
            )
        self._detach()
        self._controllers, self._stored = {}, {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches to the head (before its first forward, as torch.compile needs) and to the optimizer."""
        if not self.options.running and not is_overridden("forward", pl_module):
            raise ConfigurationError(
                f"LipschitzLR(measure='pass') calls the module, and {type(pl_module).__name__} has no forward; define "
                "one, or use measure='running'"
            )
        self._detach()
        positions = self._positions(trainer, pl_module)
        self._controllers = {
            i: Controller(
                self.policy, self.options, trainer, pl_module, i, self._stored.get(i, {}), several=len(positions) > 1
            )
            for i in positions
        }

    def _positions(self, trainer: Trainer, module: LightningModule) -> list[int]:
        count = len(trainer.optimizers)
        if self.optimizers != "auto":
            assert not isinstance(self.optimizers, str)
            if max(self.optimizers) >= count:
                raise ConfigurationError(
                    f"LipschitzLR(optimizers={self.optimizers}): configure_optimizers of {type(module).__name__} "
                    f"returned {count}; pass positions from 0 to {count - 1}"
                )
            return list(dict.fromkeys(self.optimizers))
        if not module.automatic_optimization or count != 1:
            how = "" if module.automatic_optimization else " under manual optimization"
            raise ConfigurationError(
                f"LipschitzLR sets the rate of one optimizer unless it is told which; configure_optimizers of "
                f"{type(module).__name__} returned {count}{how}: pass optimizers= with the positions of those to "
                "control, from 0 on, or remove the callback"
            )
        return [0]

    def _detach(self) -> None:
        for controller in self._controllers.values():
            controller.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the hooks off."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Takes the hooks off a run that was interrupted, which Lightning does not tear down."""
        self._detach()

    # -- measure and decide ------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets batches that an epoch left without a step."""
        for controller in self._controllers.values():
            controller.begin_epoch()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Measures from here to the batch's end."""
        if not self.options.running:
            # Not in on_train_epoch_start, which Lightning leaves out where it resumes at the end of an epoch.
            self._measure_by_pass(trainer, pl_module)
        for controller in self._controllers.values():
            controller.begin_batch(pl_module)
            controller.probes.arm("training" if self.options.running else "watching")

    def _measure_by_pass(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The pass of an epoch, for the controllers that need one."""
        epoch = trainer.current_epoch
        measuring = [controller for controller in self._controllers.values() if controller.needs_pass(epoch)]
        if not measuring:
            return
        for controller in measuring:
            controller.probes.reset()
            controller.probes.arm("inference")
        try:
            inference_pass(trainer, pl_module)
        finally:
            for controller in measuring:
                controller.probes.arm("off")
        for controller in measuring:
            controller.end_pass(epoch, pl_module)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """On the first step, finds out what the loss is and takes the head from its graph; ends a measurement."""
        for controller in self._watching(loss):
            controller.watch.see(loss, trainer.global_step)
        for controller in self._controllers.values():
            controller.take_loss(trainer, loss)
            # What a backward runs again (activation checkpointing) has been measured; by hand, more may come after it.
            if pl_module.automatic_optimization:
                controller.probes.arm("off")

    def _watching(self, loss: Tensor) -> list[Controller]:
        """Those whose heads a loss is taken of; all, where its graph tells of none."""
        controllers = list(self._controllers.values())
        if len(controllers) == 1:
            return controllers
        heads = graph.first_heads(loss)
        return [one for one in controllers if any(one.probes.owns(head) for head in heads)] or controllers

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Decides where an update is due, and writes the rate before the parameters move."""
        # One process on the CPU has nothing to wait for.
        soon = self.options.on_nonfinite == "raise" and trainer.world_size == 1
        for position, controller in self._controllers.items():
            if controller.optimizer is optimizer:
                if soon and trainer.strategy.root_device.type == "cpu":
                    controller.check_losses(trainer)
                changed = controller.step(trainer, pl_module)
                if changed or (trainer.global_step + 1) % _logging_interval(trainer) == 0:
                    self._log(pl_module, position)
            else:
                controller.pass_turn()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends the interval with its last step, so that an epoch's checkpoint holds values that all ranks share."""
        for controller in self._controllers.values():
            controller.probes.arm("off")
            controller.end_batch(trainer, pl_module, batch_idx)

    def share(self, trainer: Trainer) -> None:
        """Has all ranks hold the same values, for a checkpoint after a step; all of them must call it then."""
        for controller in self._controllers.values():
            controller.share(trainer)

    # -- log and checkpoint ------------------------------------------------------------------------------------------

    def _log(self, pl_module: LightningModule, position: int) -> None:
        # As tensors of the host: Lightning would copy numbers to the device, and wait.
        metrics = {
            name: torch.tensor(value, dtype=torch.float64)
            for name, value in self._named(position, self._controllers[position].metrics()).items()
        }
        for name, value in metrics.items():
            pl_module.log(name, value, prog_bar=name.endswith("/lr"), batch_size=1)

    def _named(self, position: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Names for loggers; with several optimizers, each has its position in them."""
        prefix = "lipschitz" if len(self._controllers) == 1 else f"lipschitz/{position}"
        return {f"{prefix}/{name}": value for name, value in metrics.items()}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives every logger a point for the epoch's last step, however short the epoch; looks at its last losses."""
        for controller in self._controllers.values():
            if controller.watch.first != trainer.global_step:
                agreed: Any = trainer.strategy.reduce(controller.watch.slots(), reduce_op="max")
                controller.watch.take(agreed)
                controller.check_losses(trainer)
        if trainer.global_step % _logging_interval(trainer) == 0:
            return
        for position, controller in self._controllers.items():
            metrics = self._named(position, controller.metrics())
            for logger in trainer.loggers if metrics else ():
                logger.log_metrics(metrics, step=trainer.global_step - 1)

    def _settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that was saved."""
        policy = self.policy
        return {
            "bound": policy.bound,
            "norm": policy.norm,
            "rule": policy.rule,
            "squared": policy.squared,
            "weight_decay": policy.weight_decay,
            "measure": self.options.measure,
            "weights": self.options.weights,
        }

    def state_dict(self) -> dict[str, Any]:
        """The state, as tensors and plain values that torch.load(weights_only=True) admits."""
        states = {i: controller.state_dict() for i, controller in self._controllers.items()}
        return {"settings": self._settings(), "optimizers": states or dict(self._stored)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes the state of :meth:`state_dict`.

        Raises:
            LitLipschitzError: It was saved with other settings of what is measured and computed.
        """
        if not self.restore:
            return
        settings = self._settings()
        states = state_dict.get("optimizers")
        whole = states is not None and all("readings" in state for state in states.values())
        if set(state_dict.get("settings", ())) != set(settings) or not whole:
            raise LitLipschitzError(
                "LipschitzLR's state in the checkpoint is of another version of lit-lipschitz; resume with the version "
                "that it was saved with, pass restore=False to measure anew, or start anew without the checkpoint"
            )
        for name, value in state_dict["settings"].items():
            if value != settings[name]:
                raise LitLipschitzError(
                    f"LipschitzLR's state in the checkpoint was saved with {name}={value!r}, and this run has "
                    f"{name}={settings[name]!r}; resume with the settings that it was saved with, pass restore=False "
                    "to measure anew, or start anew without the checkpoint"
                )
        self._stored = dict(state_dict["optimizers"])
        # Some strategies load after on_fit_start, when the controllers are there.
        for position, state in self._stored.items():
            if position in self._controllers:
                self._controllers[position].load_state_dict(state)


def _logging_interval(trainer: Trainer) -> int:
    return max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigurationError(f"LipschitzLR({name}={value!r}): expected one of {', '.join(map(repr, choices))}")
