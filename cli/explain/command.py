"""`lit-lipschitz explain`: makes one optimizer step of fit in memory, and prints how its rate comes about."""

import contextlib
import math
import sys
import warnings
from typing import Any

import lightning as L
from torch.optim import Optimizer

from lit_lipschitz.bounds.families import Bound
from lit_lipschitz.callbacks.lipschitz_audit import LipschitzAudit
from lit_lipschitz.callbacks.lipschitz_lr import LipschitzLR
from lit_lipschitz.cli.explain.text import text
from lit_lipschitz.cli.fit.callbacks import callbacks_of, find_callback, remove_callbacks
from lit_lipschitz.cli.fit.command import run
from lit_lipschitz.cli.fit.quiet_fit import QuietFit
from lit_lipschitz.cli.output import fail, to_json
from lit_lipschitz.control.controller import Controller
from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.recognition import heads as inspection
from lit_lipschitz.rules import registry as rules

# By family, and by whether the norm is one of the whole batch: the loss's number, and what L is made of it.
_FORMULAS = {
    ("paper", True): ("estimate", "estimate * K_z / m"),
    ("paper", False): ("estimate", "estimate * K_z / m"),
    ("strict", True): ("slope", "slope * K_z / sqrt(m)"),
    ("strict", False): ("slope", "slope * K_z"),
    ("smooth", True): ("curvature", "curvature * K_z^2 / m"),
    ("smooth", False): ("curvature", "curvature * K_z^2"),
}


class _Explained(Exception):
    """Ends the fit before its first step changes anything, with what there is to say of it."""

    def __init__(self, account: dict[str, Any], chief: bool) -> None:
        super().__init__("explained")
        self.account, self.chief = account, chief


class _OneStep(L.Callback):
    """Ends the fit once every optimizer that is controlled has its rate."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Comes after the callback's own, which has decided on the rate."""
        ours = find_callback(trainer, LipschitzLR)
        assert ours is not None
        controllers = ours.controllers
        if not all(controller.decision for controller in controllers.values()):
            return
        account = {
            "step": trainer.global_step + 1,
            "epoch": trainer.current_epoch + 1,
            "optimizers": [explanation(trainer, position, one) for position, one in controllers.items()],
        }
        raise _Explained(account, trainer.is_global_zero)


class _Explain(QuietFit):
    """A fit that writes nothing and ends with its first step."""

    SETTINGS = {**QuietFit.SETTINGS, "logger": False, "profiler": None}

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parses, and turns off what writes."""
        super().parse_arguments(parser, args)
        config, self.checkpoints = self.options, False
        if config.fixed_rate:
            raise ConfigurationError(
                "explain --fixed_rate true: there is nothing to explain of a rate that the config sets; leave it out"
            )
        if str(config.trainer.strategy).endswith(("_spawn", "_fork", "_notebook")):
            raise ConfigurationError(
                f"explain --trainer.strategy {config.trainer.strategy}: expected one that starts its processes by the "
                "command line; pass --trainer.strategy ddp, whose rate is the same"
            )

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Builds a trainer whose callbacks write nothing."""
        trainer = super().instantiate_trainer(**kwargs)
        remove_callbacks(trainer, LipschitzAudit)
        callbacks_of(trainer).append(_OneStep())
        return trainer

    def after_fit(self) -> None:
        """A fit that has ended by itself has made no step.

        Raises:
            ConfigurationError: Always.
        """
        trainer = self.trainer
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
    try:
        # What data and modules print is not part of the answer.
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            return run(_Explain, rest)
    except _Explained as end:
        if end.chief:
            print(to_json(end.account, indent=1) if as_json else text(end.account))
        return 0
    except ConfigurationError as error:
        return fail(error, 2)


# -- what there is to say ----------------------------------------------------------------------------------------------


def explanation(trainer: L.Trainer, position: int, controller: Controller) -> dict[str, Any]:
    """How the rate of an optimizer comes about, as plain values."""
    policy, options, decision = controller.policy, controller.options, controller.decision
    assert decision is not None
    optimizer = controller.optimizer
    name, rates = type(optimizer).__name__, controller.rates
    schedulers = [c.scheduler for c in trainer.lr_scheduler_configs if c.scheduler.optimizer is optimizer]
    rule = policy.rule_for(name, optimizer.param_groups)
    return {
        "optimizer": name,
        "position": position,
        "head": _head(controller),
        "loss": _loss(controller),
        **_constant(trainer, controller),
        "L": decision.constant or None,
        "rule": rule,
        "rule_says": (rules.RULES[rule].__doc__ or "").partition("\n")[0],
        "rate": decision.lr,
        "limit": decision.cap or None,
        "by_hand": options.initial_lr if not decision.constant else None,
        "factor": rates[0] / decision.lr if decision.lr else 1.0,
        "schedulers": [type(scheduler).__name__ for scheduler in schedulers]
        + [f"LipschitzLR's own {controller.schedule}"] * (controller.schedule is not None),
        "scale": controller.measurement.scale if rule in rules.SCALED and controller.measurement else None,
        "direction_only": controller.direction_only,
        "observed": decision.observed or None,
        "effective": decision.effective if rule in rules.SLOPED and decision.observed else None,
        "lengthening": _lengthening(controller, rule),
        "mean": _mean(controller.rule_state, rule),
        "smooth_constant": decision.curvature or None,
        "unexplained": controller.unexplained,
        "restraint": controller.restraint,
        "momentum": optimizer.param_groups[0]["momentum"] if rule == "noise" else None,
        "beta": optimizer.param_groups[0]["betas"][0] if rule == "schedule_free" else None,
        "lr": rates[0],
        "lr_of_groups": rates,
        "dry_run": options.dry_run,
    }


def _mean(state: rules.RuleState, rule: str) -> float | None:
    """The mean that limits the rate, of the rules that have one."""
    if rule in rules.SLOPED:
        return rules.mean_of(state)
    return state.average if rule == "grafted" else None


def _lengthening(controller: Controller, rule: str) -> float | None:
    """The c of the rules that have one; without a slope all examples count in it."""
    settings, decision, measured = controller.optimizer.param_groups[0], controller.decision, controller.measurement
    if rule in rules.SLOPED and decision is not None and measured is not None:
        examples = decision.effective or measured.batch_size
        if rule == "observed":
            return rules.noise_lengthening(settings, examples, measured.batch_size)
        return rules.schedule_free_lengthening(settings, examples)
    return rules.lengthening(settings) if rule == "grafted" else None


def _head(controller: Controller) -> dict[str, Any] | None:
    head = controller.head
    if head is None:
        return None
    width, outputs = inspection.head_size(head)
    bias = getattr(head, "bias", None) is not None
    how = "found" if controller.options.head == "auto" else "named by head="
    return {"name": controller.head_name, "class": type(head).__name__, "inputs": width, "bias": bias,
            "outputs": outputs, "how": how}  # fmt: skip


def _loss(controller: Controller) -> dict[str, Any] | None:
    loss = controller.loss
    if loss is None:
        return None
    how = "found in the autograd graph" if controller.options.loss == "auto" else "named by loss="
    about: dict[str, Any] = {"name": loss.name, "reduction": loss.reduction, "how": how}
    if loss.name == "cross_entropy":
        about.update(label_smoothing=loss.label_smoothing, class_weights=loss.class_weights)
    elif loss.name == "binary_cross_entropy":
        about.update(pos_weight=loss.pos_weight)
    elif loss.name in ("huber", "smooth_l1"):
        about.update(threshold=loss.threshold)
    return about


def _constant(trainer: L.Trainer, controller: Controller) -> dict[str, Any]:
    """L and what it is made of; without the numbers where the rate does not come from a measurement."""
    policy, measured, loss = controller.policy, controller.measurement, controller.loss
    about: dict[str, Any] = {"bound": policy.bound, "norm": policy.norm, "measure": controller.options.measure}
    if measured is None or loss is None or controller.head is None:
        return {**about, "formula": None}
    whole = policy.norm in ("frobenius", "spectral")
    m, size, optimizer = measured.batch_size, measured.activation_norm, controller.optimizer
    kind, formula = _FORMULAS[policy.bound, whole]
    _, outputs = inspection.head_size(controller.head)
    unit = loss.constant(1.0, batch_size=m, num_outputs=outputs, bound=policy.bound, norm=policy.norm,
                         output_norm=measured.output_norm)  # fmt: skip
    divisor = _divisor(policy.bound, whole, m)
    decay = policy.decay_of(type(optimizer).__name__, optimizer.param_groups)
    data = unit * (size**2 if policy.bound == "smooth" else size)
    pieces = trainer.world_size * controller.accumulated
    return {
        **about,
        "k": outputs,
        "m": m,
        "batch": m / pieces,
        "accumulation": controller.accumulated,
        "ranks": trainer.world_size,
        "K_z": size,
        "W": measured.weight_norm,
        "weights": controller.options.weights,
        "weight_decay": decay,
        "output_norm": measured.output_norm if loss.needs_outputs(policy.bound) else None,
        "coefficient": kind,
        kind: unit * divisor,
        "formula": formula + (" + lambda" if policy.bound == "smooth" else " + lambda * W"),
        "data_term": data,
        "l2_term": decay if policy.bound == "smooth" else decay * measured.weight_norm,
    }


def _divisor(bound: Bound, whole: bool, m: int) -> float:
    """What the formula divides by."""
    if bound == "strict":
        return math.sqrt(m) if whole else 1.0
    return float(m) if whole or bound == "paper" else 1.0
