"""How long the step of an optimizer is that rescales the gradient, at a rate of 1, beside the gradient itself."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_lipschitz.measurement.scale_invariance import ScaleInvariance, norm

_LAYERS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag)
_NORMALISATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
Direction = Callable[[Tensor, Mapping[str, Any], Mapping[str, Any]], Tensor]
"""From a gradient, the parameter's state before the step (empty at first) and its group to the update at rate 1."""


def _adam(grad: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    first, second, step = _moments(grad, state, group)
    square = second / (1 - group["betas"][1] ** step)
    if group.get("amsgrad", False) and "max_exp_avg_sq" in state:
        square = torch.maximum(state["max_exp_avg_sq"], second) / (1 - group["betas"][1] ** step)
    return first / (1 - group["betas"][0] ** step) / (square.sqrt() + group["eps"])


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
    first = grad * (1 - beta1)
    largest = grad.abs() + group["eps"]
    if state:
        first = first + beta1 * state["exp_avg"]
        largest = torch.maximum(beta2 * state["exp_inf"], largest)
    return first / ((1 - beta1 ** _step(state)) * largest)


def _rmsprop(grad: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    """Without the momentum, which makes a step as many times longer as it makes that of SGD."""
    alpha = group["alpha"]
    square = (1 - alpha) * grad * grad + (alpha * state["square_avg"] if state else 0.0)
    if group.get("centered", False):
        mean = (1 - alpha) * grad + (alpha * state["grad_avg"] if state else 0.0)
        square = square - mean * mean
    return grad / (square.sqrt() + group["eps"])


def _schedule_free(grad: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    """Of the sequence that is averaged, the z of its authors; the weights move by 1 - beta of it at once."""
    beta = group["betas"][1]
    second = (1 - beta) * grad * grad + (beta * state["exp_avg_sq"] if "exp_avg_sq" in state else 0.0)
    return grad / ((second / (1 - beta ** (group["k"] + 1))).sqrt() + group["eps"])


DIRECTIONS: dict[str, Direction] = {
    "Adam": _adam,
    "AdamW": _adam,
    "NAdam": _nadam,
    "RAdam": _radam,
    "Adamax": _adamax,
    "RMSprop": _rmsprop,
    "AdamWScheduleFree": _schedule_free,
}
"""What the optimizers do that rescale the gradient, by their class."""
DECOUPLED = ("AdamW", "AdamWScheduleFree")
"""Optimizers whose weight decay is never a part of the loss."""


def is_matrix(parameter: Tensor) -> bool:
    """Whether a parameter has two dimensions that are longer than 1."""
    return sum(size > 1 for size in parameter.shape) > 1


@torch.no_grad()
def lengths(optimizer: Optimizer, grad_scale: float | Tensor = 1.0, ratios: Sequence[float] = ()) -> Tensor:
    """Length of the gradient, and of the step that the optimizer makes of it at a rate of 1.

    Weight decay that is added to the gradient counts in both, weight decay that is not in neither.

    Args:
        optimizer: One of :data:`DIRECTIONS`, about to step.
        grad_scale: What the gradients have been multiplied by and the optimizer will divide by.
        ratios: Each parameter group's rate over the first one's; groups beyond the list have 1.

    Returns:
        The two Euclidean norms over all parameters that have a gradient, each group times its ratio; shape (2,),
        float32, on the gradients' device.

    Raises:
        KeyError: The optimizer is none of them.
    """
    squares: list[Tensor] = []
    for step in _steps(optimizer, grad_scale, ratios):
        squares += [step.ratio**2 * _square(step.grad), step.ratio**2 * _square(step.update)]
    return _summed(squares).sqrt()


@torch.no_grad()
def lengths_of_weights(
    optimizer: Optimizer,
    grad_scale: float | Tensor = 1.0,
    ratios: Sequence[float] = (),
    invariance: ScaleInvariance | None = None,
    is_weight: Callable[[Tensor], bool] = is_matrix,
) -> Tensor:
    r"""Mean over the weights of how long the gradient is beside the step that the optimizer makes of it at a rate of 1.

    A large weight counts no more than a small one, and a group's rate makes no difference. Other parameters, as biases,
    take part in the steps and have no say in how long these are.

    Args:
        optimizer: One of :data:`DIRECTIONS`, about to step.
        grad_scale: What the gradients have been multiplied by and the optimizer will divide by.
        ratios: Each parameter group's rate over the first one's; what is in groups of 0 does not count.
        invariance: Tells of which weights only the direction matters. Their gradients, which are the shorter the
            longer the weights are, count as if the weights had the length that they usually start with.
        is_weight: Tells a weight from other parameters.

    Returns:
        The mean of :math:`\|g\| / \|u\|` over the weights that have a gradient and are about to move, with Euclidean
        norms, and 1. Where there are none, as in an optimizer of biases or of a flat part of a sharded network, the two
        lengths of all parameters together. Not finite where one of the gradients is not. Shape (2,), float32, on the
        gradients' device.

    Raises:
        KeyError: The optimizer is none of them.
    """
    weights: list[Tensor] = []
    squares: list[Tensor] = []
    for step in _steps(optimizer, grad_scale, ratios):
        if not step.ratio:
            continue
        growth = invariance.growth(step.parameter, step.slopes, step.place) if invariance else 1.0
        pair = [growth**2 * _square(step.grad), _square(step.update)]
        squares += pair
        if is_weight(step.parameter):
            weights += pair
    together = _summed(squares).sqrt()
    if not weights:
        return together
    gradients, moves = torch.stack([square.to(together.device) for square in weights]).sqrt().reshape(-1, 2).T
    counted = (gradients > 0) & (moves > 0)
    mean = torch.where(counted, gradients / moves, 0.0).sum() / counted.sum()
    known = torch.isfinite(together).all() & counted.any()
    return torch.where(known, torch.stack([mean, torch.ones_like(mean)]), together)


@dataclass(frozen=True)
class _Step:
    """What an optimizer is about to do with one parameter: real tensors, the update at a rate of 1."""

    parameter: Tensor
    place: int  # among all parameters of the optimizer
    ratio: float  # of its group's rate to the first one's
    slopes: Tensor  # as the backward has left them
    grad: Tensor  # as the optimizer takes it
    update: Tensor


def _steps(optimizer: Optimizer, grad_scale: float | Tensor, ratios: Sequence[float]) -> Iterator[_Step]:
    """The steps of all parameters that have a gradient."""
    direction = DIRECTIONS[type(optimizer).__name__]
    counters = _counters(optimizer)
    place = -1
    for group, ratio in zip(optimizer.param_groups, chain(ratios, repeat(1.0)), strict=False):
        for parameter in group["params"]:
            place += 1
            slopes = parameter.grad
            if slopes is None:
                continue
            # The moments of a complex parameter are those of its parts.
            grad, weight = (
                torch.view_as_real(t) if t.is_complex() else t for t in (slopes.detach(), parameter.detach())
            )
            state = {name: _real(value) for name, value in optimizer.state.get(parameter, {}).items()}
            state.update(counters.get(parameter, {}))
            grad = grad / (-grad_scale if group.get("maximize", False) else grad_scale)
            if _coupled(optimizer, group):
                grad = grad + group["weight_decay"] * weight
            yield _Step(parameter, place, ratio, slopes, grad, direction(grad, state, group))


def _summed(squares: Sequence[Tensor]) -> Tensor:
    """The sums of every other value, which may be on several devices; shape (2,)."""
    if not squares:
        return torch.zeros(2)
    return torch.stack([square.to(squares[0].device) for square in squares]).reshape(-1, 2).sum(dim=0)


def _counters(optimizer: Optimizer) -> dict[Tensor, dict[str, float]]:
    """The numbers of each parameter's state, which fused optimizers keep on the device, read from it at once."""
    found = [
        (parameter, name, value)
        for parameter, state in optimizer.state.items()
        for name, value in state.items()
        if isinstance(value, Tensor) and value.numel() == 1 and name in ("step", "mu_product")
    ]
    counters: dict[Tensor, dict[str, float]] = {}
    if found:
        device = found[0][2].device
        read = torch.stack([value.reshape(()).float().to(device) for *_, value in found]).tolist()
        for (parameter, name, _), number in zip(found, read, strict=True):
            counters.setdefault(parameter, {})[name] = number
    return counters


def _real(value: Any) -> Any:
    return torch.view_as_real(value) if isinstance(value, Tensor) and value.is_complex() else value


def _coupled(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    decoupled = type(optimizer).__name__ in DECOUPLED or group.get("decoupled_weight_decay", False)
    return bool(group.get("weight_decay", 0.0)) and not decoupled


def _step(state: Mapping[str, Any]) -> float:
    return float(state["step"]) + 1 if state else 1.0


def _moments(grad: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> tuple[Tensor, Tensor, float]:
    """The moving averages of the gradient and of its square with this step's in them, and the number of the step."""
    beta1, beta2 = group["betas"]
    first, second = (1 - beta1) * grad, (1 - beta2) * grad * grad
    if state:
        first, second = first + beta1 * state["exp_avg"], second + beta2 * state["exp_avg_sq"]
    return first, second, _step(state)


def _square(values: Tensor) -> Tensor:
    return norm(values).to(torch.float32) ** 2


def weights_of(module: nn.Module) -> Callable[[Tensor], bool]:
    """What tells the weights of a network from its other parameters.

    Weights are those of linear maps, convolutions and embeddings, by the class of the module that has them, however
    small; of modules that are none of these what has two dimensions longer than 1. Those of a normalisation are none,
    nor is a single number.
    """
    known: dict[Tensor, bool] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if isinstance(part, _NORMALISATIONS):
                known[parameter] = False
            elif isinstance(part, _LAYERS) and name in ("weight", "bias"):
                known[parameter] = name == "weight"
    return lambda parameter: parameter.numel() > 1 and known.get(parameter, is_matrix(parameter))
