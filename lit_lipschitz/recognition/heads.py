"""Lists the modules that can be the output layer (the head), and reshapes their inputs and outputs to rows."""

import difflib
import re
from collections.abc import Container

from torch import Tensor, nn

from lit_lipschitz.errors import ConfigurationError

_COMPILED = re.compile(r"(^|\.)_orig_mod(?=\.|$)")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
HEADS = (nn.Linear, *_CONVOLUTIONS)
"""The classes of modules that can be a head."""


def is_head(module: nn.Module) -> bool:
    """Whether a module can be a head: an affine layer, the same for each example, token or pixel."""
    if isinstance(module, _CONVOLUTIONS):
        plain = {*module.kernel_size, *module.stride, module.groups} == {1}
        return plain and (module.padding == "valid" or not any(module.padding))
    return isinstance(module, nn.Linear)


def _channels(head: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> int:
    """The dimension of a convolution's channels, counted from the end."""
    return -1 - len(head.kernel_size)


def head_size(head: nn.Module) -> tuple[int, int]:
    """Width and number of outputs of a head."""
    if isinstance(head, _CONVOLUTIONS):
        return head.in_channels, head.out_channels
    assert isinstance(head, nn.Linear)
    return head.in_features, head.out_features


def head_inputs(head: nn.Module, activations: Tensor) -> Tensor:
    """A head's input without a copy, with the features in the last of at least 2 dimensions."""
    if isinstance(head, _CONVOLUTIONS):
        activations = activations.movedim(_channels(head), -1)
    return activations if activations.ndim > 1 else activations.unsqueeze(0)


def head_rows(head: nn.Module, activations: Tensor) -> Tensor:
    """A head's input as a matrix of shape (rows, width), one row an example, token or pixel."""
    return head_inputs(head, activations).flatten(0, -2)


def output_rows(head: nn.Module, outputs: Tensor, width: int | None = None) -> Tensor:
    """A head's outputs, or their targets, as a matrix, shape (rows, outputs).

    Of each row there are ``width`` outputs, None for all. If that does not divide their number, each output is a row.
    """
    width = width or head_size(head)[1]
    if isinstance(head, _CONVOLUTIONS) and outputs.ndim >= -_channels(head):
        outputs = outputs.movedim(_channels(head), -1)
    return outputs.reshape(-1, 1 if outputs.numel() % width else width)


def name_without_compile(name: str) -> str:
    """The name of a module or a parameter as users write it, without the parts that torch.compile adds."""
    return _COMPILED.sub("", name).removeprefix(".")


def head_candidates(
    module: nn.Module, name: str = "auto", owned: Container[Tensor] | None = None
) -> dict[str, nn.Module]:
    """The modules that can be the head, by name, at least one: every Linear and 1x1 convolution, or the named one.

    The head's weight must be among the parameters ``owned``, if given. A ConfigurationError says why there is none.
    """
    modules = {name_without_compile(key): part for key, part in module.named_modules()}
    if name == "auto":
        return _automatic_candidates(module, modules, owned)
    if name not in modules:
        close = difflib.get_close_matches(name, modules, n=3) or [key for key in modules if is_head(modules[key])][-3:]
        raise ConfigurationError(
            f"LipschitzLR(head={name!r}): {type(module).__name__} has no module of that name; pass one of "
            f"{', '.join(map(repr, close))}"
        )
    if not is_head(modules[name]):
        raise ConfigurationError(
            f"LipschitzLR(head={name!r}): expected a torch.nn.Linear or a 1x1 convolution, found "
            f"{type(modules[name]).__name__}; pass the name of the last affine layer"
        )
    return {name: modules[name]}


def _automatic_candidates(
    module: nn.Module, modules: dict[str, nn.Module], owned: Container[Tensor] | None
) -> dict[str, nn.Module]:
    found = {key: part for key, part in modules.items() if is_head(part)}
    if not found:
        raise ConfigurationError(
            f"LipschitzLR looked for a head (torch.nn.Linear or a 1x1 convolution) in {type(module).__name__} and "
            f"found none among {len(modules)} modules; compute the outputs by one of these layers, or train without "
            "LipschitzLR"
        )
    own = {key: part for key, part in found.items() if owned is None or part.weight in owned}
    if not own:
        raise ConfigurationError(
            "LipschitzLR looked for a head (torch.nn.Linear or a 1x1 convolution) among the modules that the "
            "controlled optimizer trains and found none; pass optimizers= with the position of another optimizer that "
            f"configure_optimizers of {type(module).__name__} returns"
        )
    return own
