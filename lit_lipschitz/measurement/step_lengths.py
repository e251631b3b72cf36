"""The lengths of the step that an optimizer is about to make: gradient norm, update norm, and their product."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_lipschitz.measurement.norms import as_real, grad_norm, inner_product, norms, on_device
from lit_lipschitz.measurement.optimizer_updates import OptimizerInfo, optimizer_info
from lit_lipschitz.measurement.scale_invariance import ScaleInvariance
from lit_lipschitz.measurement.trial_step import UpdateOf, trial_step
from lit_lipschitz.rules.bounded import momentum_of_any

_LAYERS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag)
_NORMALISATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


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
    divided by ``grad_scale``. ``info`` is what :func:`.optimizer_info` returned before the first step. For a linear
    optimizer the first two are 1, and its weight decay is left out; one that is not registered has the update
    ``update_of``, or that of a step of a copy. Not finite where one of the gradients is not.

    Raises:
        TrialError: No copy can step.
    """
    info = info or optimizer_info(optimizer)
    if info.is_linear:
        return _lengths_of_linear(optimizer, grad_scale, ratios, info)
    steps = [step for step in _steps(optimizer, grad_scale, ratios, info, update_of) if step.ratio]
    if not steps:
        return torch.zeros(3)
    steps.sort(key=lambda step: step.parameter.dim() < 2)
    grad_norms, update_norms = norms([step.grad for step in steps]), norms([step.update for step in steps])
    device = grad_norms.device
    update_norms, rates = update_norms.to(device), on_device([step.ratio for step in steps], device)
    descent = (rates * torch.stack([inner_product(step.grad, step.update).to(grad_norms) for step in steps])).sum()
    descent = descent * info.moved_share(optimizer.param_groups[0])
    least = _least_share(optimizer, info) * (rates * grad_norms * update_norms).sum()
    counted = on_device([is_weight(step.parameter) for step in steps], device)
    quotients = _growths(steps, invariance, device) * grad_norms / update_norms
    usable = (counted > 0) & (grad_norms > 0) & (update_norms > 0)
    mean = torch.where(usable, quotients, 0.0).sum() / usable.sum()
    of_all = torch.stack([grad_norms.norm(), update_norms.norm()])
    lengths = torch.where(of_all.isfinite().all() & usable.any(), torch.stack([mean, torch.ones_like(mean)]), of_all)
    return torch.cat([lengths, torch.maximum(descent, least).reshape(1)])


def _growths(steps: Sequence["_Step"], invariance: ScaleInvariance | None, device: torch.device) -> Tensor:
    """Growth of the norms of scale-invariant weights, 1 for others; matrices come first; shape (len(steps),)."""
    matrices = [step for step in steps if step.parameter.dim() > 1]
    if invariance is None or not matrices:
        return torch.ones(len(steps), device=device)
    growths = invariance.norm_growth(
        [step.parameter for step in matrices], [step.raw_grad for step in matrices], [step.index for step in matrices]
    )
    return torch.cat([growths.to(device), torch.ones(len(steps) - len(matrices), device=device)])


def _least_share(optimizer: Optimizer, info: OptimizerInfo) -> float:
    """Half of the part 1 - b of the displacement by a gradient, over the norm of the update."""
    group = optimizer.param_groups[0]
    return info.displacement_gain(group) * (1 - momentum_of_any(info.settings(group))) / 2


def _lengths_of_linear(
    optimizer: Optimizer, grad_scale: float | Tensor, ratios: Sequence[float], info: OptimizerInfo
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
    descent = descent * info.moved_share(optimizer.param_groups[0])
    least = _least_share(optimizer, info) * most
    return torch.stack([torch.where(torch.isfinite(most), one, most), one, torch.maximum(descent, least)])


def _product(parameter: Tensor, buffer: Tensor | None) -> Tensor:
    """Inner product of a parameter's gradient and its momentum buffer; 0 without both."""
    if parameter.grad is None or buffer is None:
        return torch.zeros((), device=parameter.device)
    grad = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
    return inner_product(as_real(grad.detach()), as_real(buffer)).float()


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
