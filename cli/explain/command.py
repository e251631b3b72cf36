"""`lit-lipschitz explain`: makes one optimizer step of fit in memory, and prints how its rate comes about."""

import contextlib
import sys
import warnings
from dataclasses import asdict
from typing import Any

import lightning as L

from lit_lipschitz.callbacks.lipschitz_lr import LipschitzLR
from lit_lipschitz.callbacks.trainer_facts import callbacks_of
from lit_lipschitz.cli.explain.text import text
from lit_lipschitz.cli.fit.callbacks import find_callback
from lit_lipschitz.cli.fit.command import run
from lit_lipschitz.cli.fit.quiet_fit import DryRun
from lit_lipschitz.cli.output import fail, to_json
from lit_lipschitz.control.controller import Controller
from lit_lipschitz.control.results import Results
from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.measurement.head_hooks import HeadHook
from lit_lipschitz.recognition.heads import head_size
from lit_lipschitz.rules.registry import RULES


class _OneStep(L.Callback):
    """Makes a fit end with the first step in which each optimizer that is controlled has its rate, and explains it.

    The step is made, in memory; the ends of epoch and training, where modules and callbacks look for metrics of a
    whole epoch and write what they have, are not reached.
    """

    def __init__(self) -> None:
        self.account: dict[str, Any] | None = None  # of that step; None before it

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Comes before LipschitzLR's own, which may end the interval."""
        ours = find_callback(trainer, LipschitzLR)
        assert ours is not None
        controllers = {i: one for i, one in ours.controllers.items() if isinstance(one, Controller)}
        if self.account is not None or not all(controller.decision for controller in controllers.values()):
            return
        self.account = {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch + 1,
            "optimizers": [explanation(trainer, position, one) for position, one in controllers.items()],
        }
        end_with_this_batch(trainer)


def end_with_this_batch(trainer: L.Trainer) -> None:
    """Makes a fit end with the batch that has made its step, without the ends of batch loop, epoch and training."""
    loop = trainer.fit_loop
    loop.epoch_loop.max_steps = trainer.global_step
    for owner, name in ((loop.epoch_loop, "on_advance_end"), (loop, "on_advance_end"), (loop, "on_run_end")):
        setattr(owner, name, lambda *_: None)


class _Explain(DryRun):
    """A fit that writes nothing and ends with its first step."""

    name = "explain"
    account: dict[str, Any] | None = None  # on rank 0, after the fit

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Builds a trainer with the callback that explains."""
        trainer = super().instantiate_trainer(**kwargs)
        self.step = _OneStep()
        callbacks_of(trainer).insert(0, self.step)
        return trainer

    def after_fit(self) -> None:
        """Keeps the explanation, on rank 0.

        Raises:
            ConfigurationError: The fit has ended without a step.
        """
        trainer = self.trainer
        if self.step.account is not None:
            self.account = self.step.account if trainer.is_global_zero else None
            return
        raise ConfigurationError(
            f"explain found no optimizer step to make: the run is in epoch {trainer.current_epoch} of "
            f"{trainer.max_epochs} and has made {trainer.global_step} steps; raise --trainer.max_epochs, or pass an "
            "earlier checkpoint"
        )


def explain(arguments: list[str]) -> int:
    """Runs the command.

    Args:
        arguments: What comes after its name.

    Returns:
        The exit code.
    """
    as_json = "--json" in arguments
    rest = ["fit", *(argument for argument in arguments if argument != "--json")]
    warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint need to be provided.*")
    command = _Explain()
    try:
        # What data and modules print is not part of the answer.
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            code = run(lambda: command, rest)
    except ConfigurationError as error:
        return fail(error, 2)
    if code == 0 and command.account is not None:
        print(to_json(command.account, indent=1) if as_json else text(command.account))
    return code


def explanation(trainer: L.Trainer, position: int, controller: Controller) -> dict[str, Any]:
    """How the learning rate of an optimizer comes about, as plain values.

    Args:
        trainer: The trainer, at the end of a batch that made an optimizer step.
        position: The optimizer's position among the trainer's.
        controller: What controls its learning rate.
    """
    policy, options, decision = controller.policy, controller.options, controller.decision
    assert decision is not None
    optimizer, rates, results = controller.optimizer, controller.rates, Results.of(controller)
    own = [f"LipschitzLR's own {results.schedule}"] if results.schedule is not None else []
    return {
        "optimizer": type(optimizer).__name__,
        "position": position,
        "head": _head(controller),
        "loss": _loss(controller),
        "bound": policy.bound,
        "norm": policy.norm,
        "measure": options.measure,
        "weights": options.weights,
        "accumulation": results.batches,
        "ranks": trainer.world_size,
        "rule": decision.rule or None,
        "rule_description": RULES[decision.rule].description if decision.rule else None,
        "formula": decision.formula or None,
        "terms": [asdict(term) for term in decision.terms],
        "L": decision.constant or None,
        "rate": decision.lr,
        "limit": decision.cap or None,
        "initial_lr": options.initial_lr if not decision.rule else None,
        "num_scale_invariant": results.num_scale_invariant,
        "fraction_unexplained": results.fraction_unexplained,
        "damping": results.damping,
        "factor": results.factor,
        "schedulers": [type(scheduler).__name__ for scheduler in controller.schedulers] + own,
        "lr": rates[0],
        "lr_of_groups": rates,
        "dry_run": options.dry_run,
    }


def _head(controller: Controller) -> dict[str, Any] | None:
    if controller.found is None:
        return None
    hook = controller.found.hook
    if not isinstance(hook, HeadHook):
        return {"name": hook.name, "class": None, "inputs": None, "bias": None, "outputs": None,
                "how": "found in the autograd graph"}  # fmt: skip
    head = hook.head
    width, outputs = head_size(head)
    bias = getattr(head, "bias", None) is not None
    how = "found in the autograd graph" if controller.options.head == "auto" else "named by head="
    return {"name": hook.name, "class": type(head).__name__, "inputs": width, "bias": bias,
            "outputs": outputs, "how": how}  # fmt: skip


def _loss(controller: Controller) -> dict[str, Any] | None:
    if controller.found is None:
        return None
    loss = controller.found.loss
    how = "found in the autograd graph" if controller.options.loss_name is None else "named by loss="
    how = "not recognised: measured" if controller.found.measured else how
    name = "measured" if controller.found.measured else loss.name
    return {"name": name, "reduction": loss.reduction, "arguments": dict(loss.arguments), "how": how}
