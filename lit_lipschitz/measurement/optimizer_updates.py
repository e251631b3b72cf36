"""The optimizers that are known: their update at lr = 1, its norm compared with the gradient norm, and their rules."""

import inspect
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop

from lit_lipschitz.measurement.trial_step import Behaviour, behaviour_of, is_schedule_free
from lit_lipschitz.rules.bounded import momentum_of_any

UpdateFunction = Callable[[Tensor, Mapping[str, Any], Mapping[str, Any]], Tensor]
"""From a gradient, the parameter's state before the step (empty at first) and its group to the update at lr = 1."""


@dataclass(frozen=True)
class OptimizerInfo:
    """What is known of an optimizer.

    Attributes:
        cls: Its class, or ``"module:Class"`` for a package that may not be installed and is not imported for this.
        update: Its update at lr = 1; None where it is measured (:mod:`lit_lipschitz.measurement.trial_step`), and where
            it is linear.
        rules: The name of its rule for each family of constants (``bound``); without an entry a family is refused.
        momentum_rules: Likewise, where its setting ``momentum`` is not 0 and the rule differs then.
        unsupported: For each family of constants, a setting for which its rule is not valid.
        decoupled_weight_decay: Whether its weight decay is never added to the gradient.
        averages_weights: Whether it averages the weights instead of decaying the learning rate.
        behaviour: What was measured of an optimizer that is not registered; None for others.
        linear: Whether its updates are sums of gradients with weights b^k and the settings ``momentum`` and
            ``dampening`` of torch's SGD, so that the displacement by a gradient is known.
        sets_lengths: Whether it sets the length of its steps itself, so that no learning rate follows from L.
    """

    cls: type[Optimizer] | str
    update: UpdateFunction | None = None
    rules: Mapping[str, str] = field(default_factory=dict)
    momentum_rules: Mapping[str, str] = field(default_factory=dict)
    unsupported: Mapping[str, str] = field(default_factory=dict)
    decoupled_weight_decay: bool = False
    averages_weights: bool = False
    behaviour: Behaviour | None = None
    linear: bool = False
    sets_lengths: bool = False

    @property
    def name(self) -> str:
        """The name of the class."""
        return self.cls.rpartition(":")[2] if isinstance(self.cls, str) else self.cls.__name__

    def resolve(self) -> Any:
        """The class; None while its module has not been imported."""
        if not isinstance(self.cls, str):
            return self.cls
        module, _, name = self.cls.rpartition(":")
        return getattr(sys.modules.get(module), name, None)

    def rule_name(self, bound: str, settings: Mapping[str, Any]) -> str | None:
        """The name of its rule for a family of constants and the :meth:`settings` of a parameter group, or None."""
        rules = {**self.rules, **self.momentum_rules} if settings.get("momentum", 0) else self.rules
        return rules.get(bound)

    def settings(self, group: Mapping[str, Any]) -> Mapping[str, Any]:
        """The settings of a parameter group by torch's names, for a rule.

        Of an optimizer that is not registered, ``momentum`` and ``dampening`` are measured if its updates are linear in
        the gradients. Otherwise the first of ``betas`` is the group's, or its ``momentum``; 0 without both.
        """
        if self.behaviour is None:
            return group
        if self.averages_weights and self.behaviour.linear:
            b = momentum_of_any(group)
            return {"momentum": b, "dampening": b}  # a gradient moves z once
        if self.behaviour.linear:
            return {"momentum": self.behaviour.momentum, "dampening": self.behaviour.dampening}
        (beta, *_) = group.get("betas") or (group.get("momentum", 0.0),)
        return {"betas": (beta if isinstance(beta, float) and 0 <= beta < 1 else 0.0,)}

    def displacement_gain(self, group: Mapping[str, Any]) -> float:
        r"""Norm of D over that of the update at lr = 1; for a linear optimizer over that of the gradient.

        D is what one of many independent gradients moves the weights by in the long run. If a gradient enters k updates
        later with the weight a b^k, the updates' norm is a / sqrt(1 - b^2) times that of a gradient, and D is the sum
        a / (1 - b): the quotient is :math:`\sqrt{(1 + b) / (1 - b)}`, whatever a is. Schedule-Free moves its sequence
        by one gradient at a time.

        Raises:
            ValueError: ``momentum`` or ``dampening`` is out of its range.
        """
        settings = self.settings(group)
        momentum = momentum_of_any(settings)
        if self.is_linear:
            dampening = float(settings.get("dampening", 0.0))
            if not dampening < 1:
                raise ValueError(
                    f"dampening={dampening}: expected less than 1, since gradients enter with 1 - dampening"
                )
            return (1 - dampening) / (1 - momentum)
        return 1.0 if self.averages_weights else math.sqrt((1 + momentum) / (1 - momentum))

    def moved_share(self, group: Mapping[str, Any]) -> float:
        """Share of an update by which the coming step moves the weights that the gradients are taken at.

        Schedule-Free takes them at y = (1 - b) z + b x, and the average x has the new z with the weight c: a step moves
        y by 1 - b (1 - c) of the update of z. c is 1 in the first step, and 1 / t in step t at a constant learning
        rate. The share is 1 for other optimizers, and where c is not known.
        """
        known = {"weight_sum", "lr_max", "k", "r", "weight_lr_power"} <= set(group)
        if not (self.averages_weights and known and group["weight_sum"] > 0):
            return 1.0
        weight = (group["k"] + 1) ** group["r"] * group["lr_max"] ** group["weight_lr_power"]
        return 1 - momentum_of_any(group) * (1 - weight / (group["weight_sum"] + weight))

    @property
    def is_linear(self) -> bool:
        """Whether its updates are sums of gradients, as is known or was measured."""
        return self.linear or (self.behaviour is not None and self.behaviour.linear)

    def couples_weight_decay(self, group: Mapping[str, Any]) -> bool:
        """Whether the weight decay of a parameter group is added to the gradient, as an L2 term of the loss is."""
        return not self.decoupled_weight_decay and not group.get("decoupled_weight_decay", False)


def _adam(grad: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    first, second, step = _moments(grad, state, group)
    beta1, beta2 = group["betas"]
    if group.get("amsgrad", False) and "max_exp_avg_sq" in state:
        second = torch.maximum(state["max_exp_avg_sq"], second)
    return first / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + group["eps"])


def _nadam(grad: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    first, second, step = _moments(grad, state, group)
    beta, decay = group["betas"][0], group["momentum_decay"]
    now, following = (beta * (1 - 0.5 * 0.96 ** (t * decay)) for t in (step, step + 1))
    product = float(state.get("mu_product", 1.0)) * now
    ahead = grad * ((1 - now) / (1 - product)) + first * (following / (1 - product * following))
    return ahead / ((second / (1 - group["betas"][1] ** step)).sqrt() + group["eps"])


def _radam(grad: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    first, second, step = _moments(grad, state, group)
    beta = group["betas"][1]
    mean = first / (1 - group["betas"][0] ** step)
    longest = 2 / (1 - beta) - 1
    length = longest - 2 * step * beta**step / (1 - beta**step)
    if length <= 5:
        return mean
    rectified = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return mean * (rectified * (1 - beta**step)) ** 0.5 / (second.sqrt() + group["eps"])


def _adamax(grad: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    beta1, beta2 = group["betas"]
    first = _average((1 - beta1) * grad, beta1, state.get("exp_avg"))
    largest = grad.abs() + group["eps"]
    if state:
        largest = torch.maximum(beta2 * state["exp_inf"], largest)
    return first / ((1 - beta1 ** _step(state)) * largest)


def _rmsprop(grad: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    alpha, momentum = group["alpha"], group.get("momentum", 0.0)
    square = _average((1 - alpha) * grad * grad, alpha, state.get("square_avg"))
    if group.get("centered", False):
        mean = _average((1 - alpha) * grad, alpha, state.get("grad_avg"))
        square = square - mean * mean
    update = grad / (square.sqrt() + group["eps"])
    return _average(update, momentum, state.get("momentum_buffer")) if momentum else update


def _schedule_free(grad: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    """Of the sequence z that is averaged; the weights move by 1 - beta of it at once."""
    beta = group["betas"][1]
    second = _average((1 - beta) * grad * grad, beta, state.get("exp_avg_sq"))
    return grad / ((second / (1 - beta ** (group["k"] + 1))).sqrt() + group["eps"])


_BOUNDED = {"strict": "bounded", "smooth": "bounded"}
_SGD = {**_BOUNDED, "paper": "inverse"}
_ADAM = {**_BOUNDED, "paper": "adam"}
_MOMENTUM = {"paper": "adamo"}
OPTIMIZERS: list[OptimizerInfo] = [
    OptimizerInfo(SGD, rules=_SGD, momentum_rules=_MOMENTUM, linear=True),
    OptimizerInfo("lit_lipschitz.optim.zero_start_sgd:ZeroStartSGD", rules=_SGD, momentum_rules=_MOMENTUM, linear=True),
    OptimizerInfo(Adam, _adam, rules=_ADAM),
    OptimizerInfo(AdamW, _adam, rules=_ADAM, decoupled_weight_decay=True),
    OptimizerInfo(NAdam, _nadam, rules=_ADAM),
    OptimizerInfo(RAdam, _radam, rules=_BOUNDED),  # the paper has no rule for first steps that are not normalised
    OptimizerInfo(Adamax, _adamax, rules=_BOUNDED),
    OptimizerInfo(RMSprop, _rmsprop, rules={**_BOUNDED, "paper": "rmsprop"}, unsupported={"paper": "centered"}),
    OptimizerInfo(
        "schedulefree:AdamWScheduleFree",
        _schedule_free,
        rules=_BOUNDED,
        decoupled_weight_decay=True,
        averages_weights=True,
    ),
]
"""The optimizers that are known; see :func:`register_optimizer`."""


def register_optimizer(info: OptimizerInfo) -> None:
    """Adds an optimizer, or replaces what is known of it.

    Example:
        >>> from torch import nn
        >>> class Halved(SGD):
        ...     "An optimizer of another package, with a step of its own."
        ...     def step(self, closure=None): ...
        >>> register_optimizer(OptimizerInfo(Halved, rules={"strict": "inverse"}))
        >>> optimizer_info(Halved([nn.Parameter(torch.ones(1))])).rule_name("strict", {})
        'inverse'
        >>> OPTIMIZERS.pop().name
        'Halved'
    """
    OPTIMIZERS[:] = [*(one for one in OPTIMIZERS if one.cls != info.cls), info]


def registered_info(optimizer: Optimizer) -> OptimizerInfo | None:
    """What is registered of an optimizer, by its class and not by the name of the class; None if nothing is.

    A subclass of a registered one counts as that, unless it overrides ``step`` or is named like another one.
    """
    kind = type(optimizer)
    known = {cls: info for info in OPTIMIZERS if (cls := info.resolve()) is not None}
    found: Any = next((cls for cls in kind.__mro__ if cls in known), None)
    # torch wraps the `step` of a class when its first instance is made.
    if found is None or inspect.unwrap(kind.step) is not inspect.unwrap(found.step):
        return None
    info = known[found]
    others = {other.name for other in OPTIMIZERS if other is not info}
    return info if kind is found or kind.__name__ not in others else None


def optimizer_info(optimizer: Optimizer) -> OptimizerInfo:
    """What is registered of an optimizer that has not stepped yet, or is measured by steps of a small copy.

    The paper's rules for SGD are those of one that is not registered if its updates are linear in the gradients.
    """
    info = registered_info(optimizer)
    if info is not None:
        return info
    behaviour = behaviour_of(optimizer)
    # LBFGS evaluates the loss several times in a step, and Rprop reads its learning rate in the first one alone.
    sets_lengths = isinstance(optimizer, (LBFGS, Rprop))
    return OptimizerInfo(
        type(optimizer),
        rules={} if sets_lengths else _SGD if behaviour.linear else _BOUNDED,
        momentum_rules=_MOMENTUM if behaviour.linear else {},
        sets_lengths=sets_lengths,
        decoupled_weight_decay=not behaviour.couples_weight_decay,
        averages_weights=is_schedule_free(optimizer),
        behaviour=behaviour,
    )


def _step(state: Mapping[str, Any]) -> float:
    return float(state["step"]) + 1 if state else 1.0


def _moments(grad: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> tuple[Tensor, Tensor, float]:
    """First and second moment after this step, and the number of the step."""
    beta1, beta2 = group["betas"]
    first = _average((1 - beta1) * grad, beta1, state.get("exp_avg"))
    second = _average((1 - beta2) * grad * grad, beta2, state.get("exp_avg_sq"))
    return first, second, _step(state)


def _average(new: Tensor, beta: float, before: Tensor | None) -> Tensor:
    """A moving average after this step, from 1 - beta times its newest value."""
    return new if before is None else new + beta * before
