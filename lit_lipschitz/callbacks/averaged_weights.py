"""``AveragedWeights``: evaluates and saves the averaged weights of Schedule-Free optimizers.

In training mode the parameters are y = (1 - beta) z + beta x, z being the sequence that the gradients move and x its
average, with beta the first of Adam's betas or SGD's momentum. In evaluation mode they are x.

References:
    A. Defazio et al.: The Road Less Scheduled, arXiv 2405.15682, 2024.
"""

import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from lit_lipschitz.callbacks.trainer_facts import callbacks_of
from lit_lipschitz.lightning_api import Callback, LightningModule, Trainer
from lit_lipschitz.measurement.trial_step import is_schedule_free
from lit_lipschitz.training_pass import reestimate_batch_norm

FITTING = "fit"
"""The state of a Trainer that fits."""
KEY = "schedule_free"
"""Key in a checkpoint that was saved between two evaluations: the training weights, and the optimizers' positions."""


class AveragedWeights(Callback):
    """Evaluates and saves the averaged weights of Schedule-Free optimizers, for any LightningModule.

    An optimizer counts as Schedule-Free if it has methods ``train`` and ``eval`` and a ``train_mode`` in its parameter
    groups, as those of the package schedulefree. It is in evaluation mode from the start of a validation or the end of
    an epoch until the next training batch. Other optimizers are not changed, and the module may switch modes itself.
    The statistics of BatchNorm layers that train are re-estimated for the averaged weights
    (:func:`~lit_lipschitz.training_pass.reestimate_batch_norm`).

    The ``state_dict`` of every checkpoint contains the averaged weights. A checkpoint that is saved between two
    evaluations also contains the training weights, so that a resumed run continues bit for bit. The BatchNorm
    statistics of such a checkpoint belong to the training weights, and a warning says so when it is evaluated.

    :class:`~lit_lipschitz.LipschitzLR` and :class:`~lit_lipschitz.ImageClassifier` add this callback automatically. It
    runs before the other callbacks.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[AveragedWeights()], logger=False, enable_checkpointing=False)
    """

    def __init__(self) -> None:
        self._outdated: list[_BatchNorm] | None = None  # layers to measure again; None before the next training batch
        self._automatic = False  # whether somebody else than the user has added it

    @staticmethod
    def ensure(trainer: Trainer) -> None:
        """Makes sure, in ``setup``, that a trainer has exactly one such callback, the first of its callbacks.

        One that is added here removes itself from a fit without a Schedule-Free optimizer. Lightning looks up
        ``trainer.callbacks`` at each hook, so changes take effect from the next hook on.
        """
        callbacks = callbacks_of(trainer)
        mine = next((one for one in callbacks if isinstance(one, AveragedWeights)), None)
        if mine is None:
            mine = AveragedWeights()
            mine._automatic = True
        trainer.callbacks = [mine, *_without_averaged_weights(callbacks)]  # type: ignore[attr-defined]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Becomes the first callback; a checkpoint is loaded after this."""
        self.ensure(trainer)
        self._outdated = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts in training mode, as the trial runs of Lightning's tuners need, which run without this callback."""
        if optimizers := schedule_free(trainer.optimizers):
            set_mode(optimizers, "train")
            _SaveHook.install(pl_module)
        elif self._automatic:
            # Lightning takes 10 microseconds a step for the hooks of a callback.
            trainer.callbacks = _without_averaged_weights(trainer.callbacks)  # type: ignore[attr-defined]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Switches to the training weights; ``on_validation_end`` would come before a checkpoint is saved."""
        if optimizers := schedule_free(trainer.optimizers):
            set_mode(optimizers, "train")
            if self._outdated is None:
                self._outdated = _training_batch_norms(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switches to the averaged weights and to the BatchNorm statistics that belong to them."""
        if trainer.state.fn != FITTING:
            return
        set_mode(schedule_free(trainer.optimizers), "eval")
        if self._outdated:
            reestimate_batch_norm(trainer, pl_module, self._outdated)
        self._outdated = None

    # The checkpoints of an epoch and of a run's end hold them too.
    on_train_epoch_end = on_train_end = on_validation_start

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Resumes with the training weights of a checkpoint that was saved between two evaluations."""
        if trainer.state.fn != FITTING:
            warn_of_batch_norm(checkpoint, pl_module)
        elif saved := checkpoint.get(KEY):
            trainer.strategy.load_model_state_dict({"state_dict": saved["training_weights"]}, strict=False)
            _mark(checkpoint, saved["optimizers"], training=True)
            self._outdated = _training_batch_norms(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restores the module's ``on_save_checkpoint``."""
        # Not in on_exception, after which other callbacks save checkpoints.
        _SaveHook.remove(pl_module)
        self._outdated = None


def _without_averaged_weights(callbacks: Iterable[Callback]) -> list[Callback]:
    return [one for one in callbacks if not isinstance(one, AveragedWeights)]


def schedule_free(optimizers: Iterable[Any]) -> list[Any]:
    """Those of some optimizers that average the weights and have a training and an evaluation mode."""
    return [one for one in optimizers if is_schedule_free(one)]


def set_mode(optimizers: Iterable[Any], mode: Literal["train", "eval"]) -> None:
    """Switches Schedule-Free optimizers to the training weights ("train") or to their average ("eval")."""
    for optimizer in optimizers:
        getattr(optimizer, mode)()


def warn_of_batch_norm(checkpoint: dict[str, Any], module: LightningModule) -> None:
    """Warns where a checkpoint has BatchNorm statistics of other weights than those that are evaluated."""
    if KEY in checkpoint and any(isinstance(part, _BatchNorm) for part in module.modules()):
        warnings.warn(
            "the checkpoint was saved between two evaluations: it holds the averaged weights and BatchNorm's "
            "statistics of the training weights; evaluate one that was saved at the end of an epoch",
            stacklevel=2,
        )


def _training_batch_norms(module: LightningModule) -> list[_BatchNorm]:
    """The BatchNorm layers whose statistics move with the training batches."""
    layers = (part for part in module.modules() if isinstance(part, _BatchNorm))
    return [layer for layer in layers if layer.training and layer.track_running_stats]


class _SaveHook:
    """A module's ``on_save_checkpoint`` during a fit, which saves the averaged weights.

    Lightning leaves out the callbacks' hook where it saves the weights alone. A copy of the module has a copy of this.
    """

    def __init__(self, module: LightningModule) -> None:
        self.module, self.replaced = module, vars(module).get("on_save_checkpoint")

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        _save_averages(self.module, checkpoint)
        replaced = self.replaced or partial(type(self.module).on_save_checkpoint, self.module)
        replaced(checkpoint)

    @classmethod
    def install(cls, module: LightningModule) -> None:
        """Sets the attribute of the instance, unless a fit that failed has left it there."""
        if not isinstance(vars(module).get("on_save_checkpoint"), cls):
            vars(module)["on_save_checkpoint"] = cls(module)

    @classmethod
    def remove(cls, module: LightningModule) -> None:
        """Restores what was there before."""
        if isinstance(hook := vars(module).get("on_save_checkpoint"), cls):
            del vars(module)["on_save_checkpoint"]
            if hook.replaced is not None:
                vars(module)["on_save_checkpoint"] = hook.replaced


@torch.no_grad()
def _save_averages(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Puts the averaged weights into a checkpoint that is saved in training mode, and keeps the training weights in it.

    The optimizers' states are marked as those of the evaluation mode, for a run that resumes without this callback.
    """
    trainer = module.trainer
    averaging = schedule_free(trainer.optimizers)
    training = [one for one in averaging if any(group["train_mode"] for group in one.param_groups)]
    if not training:
        return
    parameters = [p for one in training for group in one.param_groups for p in group["params"]]
    weights, known = checkpoint["state_dict"], set(parameters)
    shared = module.named_parameters(remove_duplicate=False)
    training_weights = {name: weights[name] for name, p in shared if p in known and name in weights}
    if any(hasattr(value, "full_tensor") for value in training_weights.values()):
        # Lightning saves what is sharded under its own keys only.
        warnings.warn(
            "a checkpoint of a sharded network that is saved between two evaluations holds the training weights, not "
            "their average: resume from it, and evaluate one that was saved at the end of an epoch",
            stacklevel=2,
        )
        return
    # Switching there and back rounds; training has to continue with the same bits.
    before = [p.detach().clone() for p in parameters]
    set_mode(training, "eval")
    averaged = trainer.strategy.lightning_module_state_dict()
    weights.update({name: averaged[name].clone() for name in training_weights})
    set_mode(training, "train")
    for p, value in zip(parameters, before, strict=True):
        p.copy_(value)
    if "optimizer_states" in checkpoint:
        positions = [i for i, one in enumerate(trainer.optimizers) if one in training]
        checkpoint[KEY] = {"optimizers": positions, "training_weights": training_weights}
        _mark(checkpoint, positions, training=False)


def _mark(checkpoint: dict[str, Any], positions: Iterable[int], training: bool) -> None:
    """Sets the mode of optimizers' states in a checkpoint."""
    for position in positions:
        for group in checkpoint["optimizer_states"][position]["param_groups"]:
            group["train_mode"] = training
