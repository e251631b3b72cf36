"""Puts a policy's optimizer in the place of one that a module's code makes, schedulers and all."""

from typing import Any

import lightning as L
import torch
from torch.optim import Optimizer

from lit_lipschitz.cli.compare.policies import Policy
from lit_lipschitz.errors import ConfigurationError


class ExchangeOptimizer(L.Callback):
    """Exchanges the optimizer once it is there, before other callbacks look at it.

    Args:
        policy: Whose optimizer is wanted.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exchanges it.

        Raises:
            ConfigurationError: There is not one optimizer, which Lightning steps.
        """
        if len(trainer.optimizers) != 1 or not pl_module.automatic_optimization:
            how = "" if pl_module.automatic_optimization else ", stepped by hand"
            raise ConfigurationError(
                f"compare: {self._policy.name} takes the place of one optimizer, and {type(pl_module).__name__} has "
                f"{len(trainer.optimizers)}{how}; compare lipschitz with config:RATE, which keep them"
            )
        new = exchanged(trainer.optimizers[0], self._policy)
        trainer.optimizers = [new]
        if self._policy.kind == "paper":
            trainer.lr_scheduler_configs.clear()
        for config in trainer.lr_scheduler_configs:
            _hand_over(config.scheduler, new)


def exchanged(old: Optimizer, policy: Policy) -> Optimizer:
    """A policy's optimizer for the parameter groups of another one, with the rates and what schedulers keep in them.

    Args:
        old: The optimizer, not stepped yet.
        policy: The policy.
    """
    groups = [{key: value for key, value in group.items() if key not in old.defaults} for group in old.param_groups]
    some = any(group.get("weight_decay") for group in old.param_groups)
    same = isinstance(old, torch.optim.AdamW) == policy.adam
    for group, own in zip(groups, old.param_groups, strict=True):
        group["lr"] = float(own["lr"])
        # Groups without weight decay, such as those of norms, stay so; for the rest, one for another optimizer is none.
        if "weight_decay" in own and (same or (some and not own["weight_decay"])):
            group["weight_decay"] = own["weight_decay"]
    if policy.adam:
        return torch.optim.AdamW(groups)
    return torch.optim.SGD(groups, momentum=0.0 if policy.kind == "paper" else 0.9)


def _hand_over(scheduler: Any, new: Optimizer) -> None:
    scheduler.optimizer = new
    if hasattr(scheduler, "use_beta1"):  # what cycles with the rate
        scheduler.use_beta1 = "betas" in new.defaults
    for inner in getattr(scheduler, "_schedulers", ()):
        _hand_over(inner, new)
