"""The optimizers that are known: their update at lr = 1, its norm compared with the gradient norm, and their rules."""

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from lit_lipschitz.measurement.norms import as_real, grad_norm, norm, whole, wide
from lit_lipschitz.measurement.scale_invariance import ScaleInvariance
from lit_lipschitz.measurement.trial_step import Behaviour, UpdateOf, behaviour_of, is_schedule_free, trial_step
from lit_lipschitz.rules.bounded import momentum_of_any

_LAYERS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag)
_NORMALISATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
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
    return OptimizerInfo(
        type(optimizer),
        rules=_SGD if behaviour.linear else _BOUNDED,
        momentum_rules=_MOMENTUM if behaviour.linear else {},
        decoupled_weight_decay=not behaviour.couples_weight_decay,
        averages_weights=is_schedule_free(optimizer),
        behaviour=behaviour,
    )


def is_matrix(parameter: Tensor) -> bool:
    """Whether a parameter has two dimensions longer than 1."""
    return sum(size > 1 for size in parameter.shape) > 1


@torch.no_grad()
def step_lengths(
    optimizer: Optimizer,
    grad_scale: float | Tensor = 1.0,
    ratios: Sequence[float] = (),
    invariance: ScaleInvariance | None = None,
    is_weight: Callable[[Tensor], bool] = is_matrix,
    info: OptimizerInfo | None = None,
    update_of: UpdateOf | None = None,
) -> Tensor:
    r"""Measures the step that an optimizer is about to make: two norms and their product; shape (3,).

    The first two are the mean over the weights of :math:`\|g\| / \|u\|`, gradient norm over update norm at lr = 1,
    and 1. Only weights count that have a gradient and are about to move, whatever the learning rate of their group, and
    a large one counts no more than a small one. The gradients of scale-invariant weights, which are the shorter the
    longer the weights are, count as if the weights had the norm that they usually start with. Without weights, as in an
    optimizer of biases or of a flat part of a sharded network, the two are the norms over all parameters.

    The third is the inner product of gradient and update over all parameters, each times its group's learning rate over
    that of the first one (``ratios``): how fast the loss of the batch falls per unit of the learning rate. A momentum
    that turns back hides what the gradient adds, 1 - b of the displacement by it: half of that, by the norms, is the
    least.

    Weight decay that is added to the gradient counts in both, decoupled weight decay in neither. The gradients are
    divided by ``grad_scale``. ``info`` is what :func:`optimizer_info` returned before the first step. For a linear
    optimizer the first two are 1, and its weight decay is left out; one that is not registered has the update
    ``update_of``, or that of a step of a copy. Not finite where one of the gradients is not.

    Raises:
        TrialError: No copy can step.
    """
    info = info or optimizer_info(optimizer)
    if info.is_linear:
        return _lengths_of_linear(optimizer, grad_scale, ratios, _least_share(optimizer, info))
    weights: list[Tensor] = []
    squares: list[Tensor] = []
    products: list[Tensor] = []
    rates: list[float] = []
    for step in _steps(optimizer, grad_scale, ratios, info, update_of):
        if not step.ratio:
            continue
        growth = invariance.norm_growth(step.parameter, step.raw_grad, step.index) if invariance else 1.0
        pair = [_square(step.grad), _square(step.update)]
        squares += pair
        rates.append(step.ratio)
        products.append(step.ratio * whole((wide(step.grad) * wide(step.update)).sum()).float())
        if is_weight(step.parameter):
            weights += [growth**2 * pair[0], pair[1]]
    of_all = _pairs(squares)
    together = of_all.sum(dim=0).sqrt()
    descent = sum((product.to(together.device) for product in products), torch.zeros_like(together[0]))
    grad_norms, norms = _pairs(weights, together.device).sqrt().T
    counted = (grad_norms > 0) & (norms > 0)
    mean = torch.where(counted, grad_norms / norms, 0.0).sum() / counted.sum()
    usable = torch.isfinite(together).all() & counted.any()
    lengths = torch.where(usable, torch.stack([mean, torch.ones_like(mean)]), together)
    least = _least_share(optimizer, info) * (of_all.prod(dim=1).sqrt() * torch.tensor(rates).to(together)).sum()
    return torch.cat([lengths, torch.maximum(descent, least).reshape(1)])


def _least_share(optimizer: Optimizer, info: OptimizerInfo) -> float:
    """Half of the part 1 - b of the displacement by a gradient, over the norm of the update."""
    group = optimizer.param_groups[0]
    return info.displacement_gain(group) * (1 - momentum_of_any(info.settings(group))) / 2


def _lengths_of_linear(
    optimizer: Optimizer, grad_scale: float | Tensor, ratios: Sequence[float], least: float
) -> Tensor:
    """The result of :func:`step_lengths` for an optimizer with torch's momentum buffers, or without."""
    descent, most = torch.zeros(()), torch.zeros(())
    for group, ratio in zip(optimizer.param_groups, chain(ratios, repeat(1.0)), strict=False):
        grads = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
        if not grads:
            continue
        square = grad_norm(grads).square() / grad_scale**2
        descent, most = descent.to(square.device), most.to(square.device) + ratio * square
        if any(optimizer.state[one].get("momentum_buffer") is not None for one in group["params"]):
            momentum = float(group["momentum"]) * (-1 if group.get("maximize", False) else 1)
            square = (1 - float(group.get("dampening", 0.0))) * square + momentum * sum(
                (_product(one, optimizer.state[one].get("momentum_buffer")) for one in group["params"]),
                torch.zeros_like(square),
            ) / grad_scale
        descent = descent + ratio * square
    one = (most > 0).to(most.dtype)
    return torch.stack([torch.where(torch.isfinite(most), one, most), one, torch.maximum(descent, least * most)])


def _product(parameter: Tensor, buffer: Tensor | None) -> Tensor:
    """Inner product of a parameter's gradient and its momentum buffer; 0 without both."""
    if parameter.grad is None or buffer is None:
        return torch.zeros((), device=parameter.device)
    grad = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
    return whole((wide(as_real(grad.detach())) * wide(as_real(buffer))).sum()).float()


@dataclass(frozen=True)
class _Step:
    """What an optimizer is about to do with one parameter: real tensors, the update at lr = 1."""

    parameter: Tensor
    index: int  # among all parameters of the optimizer
    ratio: float  # of its group's learning rate to the first one's
    raw_grad: Tensor  # as the backward has left it
    grad: Tensor  # as the optimizer takes it, with weight decay
    update: Tensor


def _steps(
    optimizer: Optimizer,
    grad_scale: float | Tensor,
    ratios: Sequence[float],
    info: OptimizerInfo,
    update_of: UpdateOf | None,
) -> Iterator[_Step]:
    """The steps of all parameters that have a gradient."""
    if info.update is None and update_of is None:
        update_of = trial_step(optimizer, grad_scale, keep_decay=not info.decoupled_weight_decay)
    counters = _counters(optimizer) if update_of is None else {}
    groups = zip(optimizer.param_groups, chain(ratios, repeat(1.0)), strict=False)
    places = ((group, ratio, parameter) for group, ratio in groups for parameter in group["params"])
    for index, (group, ratio, parameter) in enumerate(places):
        if parameter.grad is None:
            continue
        raw_grad = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        grad = as_real(raw_grad.detach()) / (-grad_scale if group.get("maximize", False) else grad_scale)
        if group.get("weight_decay", 0.0) and info.couples_weight_decay(group):
            grad = grad + group["weight_decay"] * as_real(parameter.detach())
        if update_of is not None:
            update = update_of(parameter)
        else:
            assert info.update is not None
            state = {
                name: counters.get((parameter, name), as_real(value))
                for name, value in optimizer.state.get(parameter, {}).items()
            }
            update = info.update(grad, state, group)
        yield _Step(parameter, index, ratio, raw_grad, grad, update)


def _pairs(squares: Sequence[Tensor], device: torch.device | None = None) -> Tensor:
    """Values that may be on several devices, in rows of two."""
    if not squares:
        return torch.zeros(0, 2, device=device)
    return torch.stack([square.to(device or squares[0].device) for square in squares]).reshape(-1, 2)


def _counters(optimizer: Optimizer) -> dict[tuple[Tensor, str], float]:
    """The counters in each parameter's state, which fused optimizers keep on the device, read in one transfer."""
    found = {
        (parameter, name): value.reshape(()).float()
        for parameter, state in optimizer.state.items()
        for name, value in state.items()
        if isinstance(value, Tensor) and value.numel() == 1 and name in ("step", "mu_product")
    }
    if not found:
        return {}
    device = next(iter(found.values())).device
    return dict(zip(found, torch.stack([value.to(device) for value in found.values()]).tolist(), strict=True))


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


def _square(values: Tensor) -> Tensor:
    return norm(values).to(torch.float32) ** 2


def weight_filter(module: nn.Module) -> Callable[[Tensor], bool]:
    """A function that tells the weights of a network from its other parameters.

    Weights are those of linear maps, convolutions and embeddings, by the class of the module that has them, however
    small; of other modules the parameters with two dimensions longer than 1. Parameters of a normalisation and single
    numbers are not.
    """
    is_weight: dict[Tensor, bool] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if isinstance(part, _NORMALISATIONS):
                is_weight[parameter] = False
            elif isinstance(part, _LAYERS) and name in ("weight", "bias"):
                is_weight[parameter] = name == "weight"
    return lambda parameter: parameter.numel() > 1 and is_weight.get(parameter, is_matrix(parameter))
