"""Finds the head and the loss of a module that nobody prepared for it."""

import difflib
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_lipschitz.errors import ConfigurationError

_COMPILED = "_orig_mod."


def is_head(module: nn.Module) -> bool:
    """Whether a module can be a head: an affine map of each example, token or pixel by itself."""
    if isinstance(module, nn.Conv2d):
        return (module.kernel_size, module.stride, module.groups) == ((1, 1), (1, 1), 1) and module.padding == (0, 0)
    return isinstance(module, nn.Linear)


def head_size(head: nn.Module) -> tuple[int, int]:
    """Width and number of outputs of a head."""
    if isinstance(head, nn.Conv2d):
        return head.in_channels, head.out_channels
    assert isinstance(head, nn.Linear)
    return head.in_features, head.out_features


def head_rows(head: nn.Module, activations: Tensor) -> Tensor:
    """A head's input as a matrix: one row an example, token or pixel, shape (rows, width)."""
    if isinstance(head, nn.Conv2d):
        activations = activations.movedim(-3, -1)
    return activations.flatten(0, -2) if activations.ndim > 1 else activations.unsqueeze(0)


def head_candidates(module: nn.Module, name: str = "auto") -> dict[str, nn.Module]:
    """The modules that can be the head, by name.

    Args:
        module: Where to look.
        name: The head's name as in ``module.named_modules()``, or ``"auto"`` for every Linear and 1x1 convolution.

    Returns:
        At least one module.

    Raises:
        ConfigurationError: There is none, or the named one does not exist or is no affine map.
    """
    # A compiled module calls itself _orig_mod in the names of its parts; people name what they wrote.
    modules = {key.replace(_COMPILED, ""): part for key, part in module.named_modules()}
    if name == "auto":
        found = {key: part for key, part in modules.items() if is_head(part)}
        if not found:
            raise ConfigurationError(
                f"LipschitzLR looked for a head (torch.nn.Linear or a 1x1 Conv2d) in {type(module).__name__} and "
                f"found none among {len(modules)} modules; it can't be used with this network"
            )
        return found
    if name not in modules:
        close = difflib.get_close_matches(name, modules, n=3) or [key for key in modules if is_head(modules[key])][-3:]
        raise ConfigurationError(
            f"LipschitzLR(head={name!r}): {type(module).__name__} has no module of that name; pass one of "
            f"{', '.join(map(repr, close))}"
        )
    if not is_head(modules[name]):
        raise ConfigurationError(
            f"LipschitzLR(head={name!r}): expected a torch.nn.Linear or a 1x1 Conv2d, found "
            f"{type(modules[name]).__name__}; pass the name of the last affine map"
        )
    return {name: modules[name]}


@dataclass(frozen=True)
class FoundLoss:
    """What the autograd graph tells of a loss.

    Attributes:
        coefficient: Factor in front of the mean or the sum over the examples.
        head_weight: The weight of the affine map that made the logits, or None where the graph can't name it: the
            weight is frozen or computed, or the network is compiled.
        chain: What made the logits, from the log-softmax down, where that is no affine map; else empty.
        summed: Whether it is the sum over the examples, not their mean.
    """

    coefficient: float
    head_weight: nn.Parameter | None
    chain: tuple[str, ...] = ()
    summed: bool = False


def find_cross_entropy(loss: Tensor) -> FoundLoss:
    """Recognises a softmax cross-entropy, a mean or a sum, by the autograd graph of its value.

    Args:
        loss: A scalar with a graph, as ``torch.nn.functional.cross_entropy`` returns it, with or without label
            smoothing, divided or multiplied by plain numbers.

    Returns:
        What was found.

    Raises:
        ConfigurationError: The graph is missing or shows anything else.
    """
    if loss.grad_fn is None:
        raise ConfigurationError(
            "LipschitzLR looked for the loss in its autograd graph and found a tensor without one: the loss that "
            "training_step returns must depend on trainable parameters; pass loss='cross_entropy' if that is what it is"
        )
    coefficient, node = _strip_scale(loss.grad_fn)
    nll, log_softmax = _match_cross_entropy(node)
    if nll is None or log_softmax is None:
        raise ConfigurationError(
            f"LipschitzLR looked for a softmax cross-entropy and found {' > '.join(_names(node))}; only "
            "torch.nn.functional.cross_entropy with class indices is known; pass loss='cross_entropy' if it is one "
            "in other words"
        )
    if nll._saved_weight is not None:
        raise ConfigurationError(
            "LipschitzLR found a cross-entropy with class weights, for which it has no constant; use one without "
            "weights, or pass loss='cross_entropy' to have the weights disregarded"
        )
    if nll._saved_reduction not in (1, 2):
        raise ConfigurationError(
            "LipschitzLR found a cross-entropy with reduction='none', expected one number for the batch: use "
            "reduction='mean' or 'sum'"
        )
    weight, chain = _head_weight(log_softmax)
    return FoundLoss(coefficient, weight, chain, summed=nll._saved_reduction == 2)


def ignored_targets(loss: Tensor) -> Tensor | None:
    """Whether a cross-entropy leaves targets out of its mean (``ignore_index``), without reading it to the host.

    Args:
        loss: As for :func:`find_cross_entropy`.

    Returns:
        A scalar of dtype bool on the loss's device, or None where the graph shows no cross-entropy.
    """
    node = loss.grad_fn
    while node is not None and node.name() in ("DivBackward0", "MulBackward0") and len(_next(node)) == 1:
        node = _next(node)[0]
    nll, _ = _match_cross_entropy(node) if node is not None else (None, None)
    return None if nll is None else nll._saved_total_weight < nll._saved_target.numel()


def _next(node: Any) -> list[Any]:
    """The nodes below one, without the inputs that need no gradient."""
    return [following for following, _ in node.next_functions if following is not None]


def _strip_scale(node: Any) -> tuple[float, Any]:
    """Takes divisions and multiplications by plain numbers off the top of a graph."""
    coefficient = 1.0
    while node.name() in ("DivBackward0", "MulBackward0") and len(_next(node)) == 1:
        other = getattr(node, "_saved_other", None)
        if other is None or other.numel() != 1:
            break
        coefficient = coefficient / float(other) if node.name() == "DivBackward0" else coefficient * float(other)
        node = _next(node)[0]
    return coefficient, node


def _match_cross_entropy(node: Any) -> tuple[Any, Any]:
    """The nodes of the negative log likelihood and of the log-softmax, or None for either."""
    if node.name() == "AddBackward0" and len(_next(node)) == 2:
        # Label smoothing: (1 - s) * nll + s / k * sum of the log-probabilities; torch makes both terms by MulBackward1.
        terms = [_next(term)[0] for term in _next(node) if term.name() == "MulBackward1"]
        if (
            len(terms) != 2
            or not terms[0].name().startswith("NllLoss")
            or terms[1].name() not in ("DivBackward0", "SumBackward0")
        ):
            return None, None
        node = terms[0]
    if not node.name().startswith("NllLoss"):
        return None, None
    below = _next(node)[0]
    # Log-probabilities that are clamped have the gradient of the cross-entropy, or none: the constants hold.
    while below.name() in ("ViewBackward0", "UnsafeViewBackward0", "ClampBackward0", "ClampBackward1"):
        below = _next(below)[0]
    return node, below if below.name() == "LogSoftmaxBackward0" else None


_SHAPE_NODES = frozenset(
    f"{name}Backward{version}"
    for name in ("T", "Transpose", "View", "UnsafeView", "ToCopy", "Permute", "Squeeze", "Unsqueeze", "Clone")
    for version in (0, 1)
)
_AFFINE_NODES = ("AddmmBackward0", "MmBackward0", "LinearBackward0", "ConvolutionBackward0")


def _head_weight(log_softmax: Any) -> tuple[nn.Parameter | None, tuple[str, ...]]:
    """The weight of the affine map that feeds the log-softmax, or the names of the nodes that stand between."""
    node = _next(log_softmax)[0]
    while node.name() in _SHAPE_NODES:
        node = _next(node)[0]
    if node.name().startswith("CompiledFunction"):
        return None, ()
    if node.name() not in _AFFINE_NODES:
        return None, ("LogSoftmax", *_names(node))
    for leaf in map(_leaf, _next(node)):
        if isinstance(leaf, nn.Parameter) and leaf.ndim > 1:
            return leaf, ()
    return None, ()


def _leaf(node: Any) -> Tensor | None:
    while node.name() in _SHAPE_NODES:
        node = _next(node)[0]
    return getattr(node, "variable", None)


def _names(node: Any, limit: int = 4) -> list[str]:
    names: list[str] = []
    while node is not None and len(names) < limit:
        names.append(re.sub(r"Backward\d$", "", node.name()))
        node = next(iter(_next(node)), None)
    return names


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
    # torch takes no norm in a narrower type than the tensor's.
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    norms = torch._foreach_norm(tensors, dtype=torch.float64 if double else torch.float32)
    return torch.stack([norm.to(norms[0].device) for norm in norms]).max().float()
