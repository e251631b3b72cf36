"""Replaces the optimizer that a module's code makes by a policy's, and rebinds its schedulers."""

from typing import Any

import lightning as L
import torch
from torch.optim import Optimizer

from lit_lipschitz.callbacks.averaged_weights import AveragedWeights
from lit_lipschitz.cli.compare.policies import ComparedPolicy
from lit_lipschitz.cli.fit.callbacks import find_callback
from lit_lipschitz.errors import ConfigurationError


class SwapOptimizer(L.Callback):
    """Replaces the optimizer by a policy's at the start of fit, before other callbacks see it."""

    def __init__(self, policy: ComparedPolicy) -> None:
        self._policy = policy

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Replaces it.

        Raises:
            ConfigurationError: The module has several optimizers, or steps its optimizer itself.
        """
        if len(trainer.optimizers) != 1 or not pl_module.automatic_optimization:
            manual = "" if pl_module.automatic_optimization else " under manual optimization"
            raise ConfigurationError(
                f"compare: {self._policy.name} replaces one optimizer, and {type(pl_module).__name__} has "
                f"{len(trainer.optimizers)}{manual}; compare lipschitz and config:RATE, which keep the optimizers"
            )
        new = swapped(trainer.optimizers[0], self._policy)
        trainer.optimizers = [new]
        if self._policy.unscheduled:
            trainer.lr_scheduler_configs.clear()
        for config in trainer.lr_scheduler_configs:
            _rebind(config.scheduler, new)
        averaged = find_callback(trainer, AveragedWeights)
        if averaged is not None:
            averaged.on_fit_start(trainer, pl_module)  # it has seen the module's own optimizer


def swapped(old: Optimizer, policy: ComparedPolicy) -> Optimizer:
    """A policy's optimizer for the parameter groups of another, with their lr and what schedulers keep in them."""
    groups = [{key: value for key, value in group.items() if key not in old.defaults} for group in old.param_groups]
    decays = any(group.get("weight_decay") for group in old.param_groups)
    same = isinstance(old, torch.optim.AdamW) == policy.adam
    for group, own in zip(groups, old.param_groups, strict=True):
        group["lr"] = float(own["lr"])
        # Groups that are exempt from weight decay, such as those of norms, stay so.
        if "weight_decay" in own and (same or (decays and not own["weight_decay"])):
            group["weight_decay"] = own["weight_decay"]
    if policy.averages:
        return _schedule_free(groups)
    if policy.adam:
        return torch.optim.AdamW(groups)
    return torch.optim.SGD(groups, momentum=0.0 if policy.kind == "paper" else 0.9)


def _schedule_free(groups: list[dict[str, Any]]) -> Optimizer:
    """Schedule-Free AdamW, with AdamW's weight decay in groups that have none of their own."""
    from schedulefree import AdamWScheduleFree

    return AdamWScheduleFree(groups, weight_decay=0.01)


def _rebind(scheduler: Any, new: Optimizer) -> None:
    scheduler.optimizer = new
    if hasattr(scheduler, "use_beta1"):  # the momentum that OneCycleLR and CyclicLR cycle
        scheduler.use_beta1 = "betas" in new.defaults
    for inner in getattr(scheduler, "_schedulers", ()):
        _rebind(inner, new)
