"""Finds the modules that can be the head of a network that nobody prepared, and measures its weights."""

import difflib
import math
import re
from collections.abc import Callable, Container
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.measurement.optimizer_updates import is_matrix

_COMPILED = re.compile(r"(^|\.)_orig_mod(?=\.|$)")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LAYERS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag)
_NORMALISATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
HEADS = (nn.Linear, *_CONVOLUTIONS)
"""The classes of modules that can be a head."""


def is_head(module: nn.Module) -> bool:
    """Whether a module can be a head: an affine map of each example, token or pixel by itself."""
    if isinstance(module, _CONVOLUTIONS):
        plain = {*module.kernel_size, *module.stride, module.groups} == {1}
        return plain and (module.padding == "valid" or not any(module.padding))
    return isinstance(module, nn.Linear)


def _channels(head: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> int:
    """The dimension of a convolution's channels, from the last one."""
    return -1 - len(head.kernel_size)


def head_size(head: nn.Module) -> tuple[int, int]:
    """Width and number of outputs of a head."""
    if isinstance(head, _CONVOLUTIONS):
        return head.in_channels, head.out_channels
    assert isinstance(head, nn.Linear)
    return head.in_features, head.out_features


def head_inputs(head: nn.Module, activations: Tensor) -> Tensor:
    """A head's input as it lies in memory, with the width as the last of at least 2 dimensions."""
    if isinstance(head, _CONVOLUTIONS):
        activations = activations.movedim(_channels(head), -1)
    return activations if activations.ndim > 1 else activations.unsqueeze(0)


def head_rows(head: nn.Module, activations: Tensor) -> Tensor:
    """A head's input as a matrix: one row an example, token or pixel, shape (rows, width)."""
    return head_inputs(head, activations).flatten(0, -2)


def output_rows(head: nn.Module, outputs: Tensor, width: int | None = None) -> Tensor:
    """A head's outputs, or their targets, as a matrix, shape (rows, outputs).

    Args:
        head: The head.
        outputs: The outputs, or those of them that a loss is taken of.
        width: How many of a row's outputs these are; None are all. Where they can't be, each is a row of its own.
    """
    width = width or head_size(head)[1]
    if isinstance(head, _CONVOLUTIONS) and outputs.ndim >= -_channels(head):
        outputs = outputs.movedim(_channels(head), -1)
    return outputs.reshape(-1, 1 if outputs.numel() % width else width)


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


def usual_lengths(module: nn.Module) -> dict[Tensor, float]:
    """The Euclidean norm that He's initialisation gives the weights of linear maps and convolutions.

    An entry's variance is 2 over the inputs of an output, so a weight of k outputs has the norm sqrt(2 k), whatever its
    inputs.

    References:
        K. He, X. Zhang, S. Ren, J. Sun: Delving Deep into Rectifiers, arXiv 1502.01852, 2015, section 2.2.
    """
    lengths: dict[Tensor, float] = {}
    for part in module.modules():
        if isinstance(part, nn.Linear):
            lengths[part.weight] = math.sqrt(2 * part.out_features)
        elif isinstance(part, nn.modules.conv._ConvNd):
            lengths[part.weight] = math.sqrt(2 * part.out_channels)
    return lengths


def head_candidates(
    module: nn.Module, name: str = "auto", owned: Container[Tensor] | None = None
) -> dict[str, nn.Module]:
    """The modules that can be the head, by name.

    Args:
        module: Where to look.
        name: The head's name as in ``module.named_modules()``, or ``"auto"`` for every Linear and 1x1 convolution.
        owned: The parameters among which the head's weight must be, or None for any.

    Returns:
        At least one module.

    Raises:
        ConfigurationError: There is none, or the named one does not exist or is no affine map.
    """
    # A compiled module calls itself _orig_mod in the names of its parts; people name what they wrote.
    modules = {_COMPILED.sub("", key).removeprefix("."): part for key, part in module.named_modules()}
    if name == "auto":
        found = {key: part for key, part in modules.items() if is_head(part)}
        if not found:
            raise ConfigurationError(
                f"LipschitzLR looked for a head (torch.nn.Linear or a 1x1 convolution) in {type(module).__name__} and "
                f"found none among {len(modules)} modules; make the outputs by one, or train without LipschitzLR"
            )
        own = {key: part for key, part in found.items() if owned is None or part.weight in owned}
        if not own:
            raise ConfigurationError(
                "LipschitzLR looked for a head (torch.nn.Linear or a 1x1 convolution) among the parameters of the "
                "optimizer that it is to control and found none; pass optimizers= with another one's position in what "
                f"configure_optimizers of {type(module).__name__} returns"
            )
        return own
    if name not in modules:
        close = difflib.get_close_matches(name, modules, n=3) or [key for key in modules if is_head(modules[key])][-3:]
        raise ConfigurationError(
            f"LipschitzLR(head={name!r}): {type(module).__name__} has no module of that name; pass one of "
            f"{', '.join(map(repr, close))}"
        )
    if not is_head(modules[name]):
        raise ConfigurationError(
            f"LipschitzLR(head={name!r}): expected a torch.nn.Linear or a 1x1 convolution, found "
            f"{type(modules[name]).__name__}; pass the name of the last affine map"
        )
    return {name: modules[name]}


Weights = Literal["decayed", "parameters", "all"]


def weight_norm(optimizer: torch.optim.Optimizer, module: nn.Module, which: Weights = "decayed") -> Tensor:
    """Largest Euclidean norm of a weight tensor.

    Args:
        optimizer: Whose parameters.
        module: Whose tensors.
        which: ``"decayed"`` are the parameters in groups with weight decay, or all where no group has any;
            ``"parameters"`` all parameters of the optimizer; ``"all"`` every floating-point tensor of the module,
            BatchNorm's moving statistics included, as in the scripts of the papers' authors.

    Returns:
        A scalar of dtype float32, on the tensors' device.
    """
    groups = optimizer.param_groups
    if which == "decayed":
        groups = [group for group in groups if group.get("weight_decay", 0)] or groups
    tensors = [p.detach() for group in groups for p in group["params"]]
    if which == "all":
        tensors = [t.detach() for t in module.state_dict().values() if t.is_floating_point()]
    # A sharded tensor's norm is put together from its parts, by all ranks.
    sharded: list[Any] = [tensor for tensor in tensors if hasattr(tensor, "full_tensor")]
    norms: list[Tensor] = [torch.linalg.vector_norm(tensor).full_tensor() for tensor in sharded]
    whole = [tensor for tensor in tensors if not hasattr(tensor, "full_tensor")]
    if whole:
        # torch takes no norm in a narrower type than the tensor's.
        double = any(tensor.dtype == torch.float64 for tensor in whole)
        norms += torch._foreach_norm(whole, dtype=torch.float64 if double else torch.float32)
    return torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms]).max()
