"""Recognises a loss, and the head behind it, in the autograd graph of the loss's value.

Names and saved tensors of the nodes are torch's (2.8 to 2.14); what is not recognised is refused with the names that
were seen, never guessed.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_lipschitz.constants import Reduction
from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.losses import LOSSES, Loss, LossName


@dataclass(frozen=True)
class FoundLoss:
    """What the autograd graph tells of a loss.

    Attributes:
        loss: The loss.
        scale: The factor in front of its mean or its sum.
        head_weight: The weight of the affine map that made the outputs, or a view of it where it is frozen; None where
            the graph can't name it, as in a compiled network.
        chain: What made the outputs, from the loss down, where that is no affine map; else empty.
        rows: Examples, tokens or pixels that the loss looks at, ignored ones included.
        width: Outputs of the head, where the loss tells, or None.
        pooled: Whether the affine map's outputs are averaged over places before the loss.
        calls: Calls of the affine map whose outputs were put together.
    """

    loss: Loss
    scale: float
    head_weight: Tensor | None
    chain: tuple[str, ...]
    rows: int
    width: int | None
    pooled: bool
    calls: int


@dataclass(frozen=True)
class Reading:
    """What a loss was taken of in one batch; tensors are on their device, and were not read.

    Attributes:
        count: Examples, tokens or pixels that it averages over, or sums up.
        elements: The same times the outputs that it averages over too: all that are divided by in a mean.
        scale: The factor in front of the mean or the sum.
        outputs: The head's outputs and the targets, where their sizes matter; else empty.
    """

    count: int | Tensor
    elements: int | Tensor
    scale: float | Tensor
    outputs: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class _Match:
    """The nodes of a recognised loss."""

    name: LossName
    node: Any  # whose saved tensors tell the loss's arguments; of the products, for probabilities as targets
    below: Any  # what made the head's outputs
    reduction: Reduction
    each: bool = False  # a mean or a sum over what was not reduced, with the ignored targets as zeros
    label_smoothing: float = 0.0
    log_softmax: Any = None

    @property
    def probabilities(self) -> Tensor | None:
        """The targets, where they are probabilities of classes."""
        if self.name != "cross_entropy" or self.node.name().startswith("NllLoss"):
            return None
        return self.node._saved_self if self.node._saved_other is None else self.node._saved_other

    @property
    def elements(self) -> int:
        """Losses that are averaged: targets of a cross-entropy, outputs of the others."""
        probabilities = self.probabilities
        if probabilities is not None:
            return probabilities.numel() // probabilities.shape[_dim(self.log_softmax, probabilities.ndim)]
        if self.name == "mean_absolute_error":
            return self.node._saved_self.numel()
        return self.node._saved_target.numel()

    def rows(self, num_outputs: int) -> int:
        """Examples, tokens or pixels."""
        return self.elements if self.name == "cross_entropy" else max(1, self.elements // num_outputs)

    @property
    def width(self) -> int | None:
        """Classes of a cross-entropy."""
        if self.log_softmax is None:
            return None
        result = self.log_softmax._saved_result
        return result.shape[_dim(self.log_softmax, result.ndim)]

    def reading(self, num_outputs: int, scale: float | Tensor) -> Reading:
        """What the loss was taken of."""
        if self.name != "cross_entropy":
            outputs: tuple[Tensor, ...] = ()
            if self.name == "mean_squared_error":
                outputs = (self.node._saved_self.detach(), self.node._saved_target.detach())
            return Reading(self.rows(num_outputs), self.elements, scale, outputs)
        count: int | Tensor = self.elements
        if not self.each and self.probabilities is None:
            count = self.node._saved_total_weight
            if self.node._saved_weight is not None:
                count = (self.node._saved_target != self.node._saved_ignore_index).sum()
        return Reading(count, count, scale)


def find_loss(loss: Tensor) -> FoundLoss:
    """Recognises a loss by the autograd graph of its value.

    Args:
        loss: A scalar with a graph, as torch's functions return it, multiplied or divided by single numbers.

    Returns:
        What was found.

    Raises:
        ConfigurationError: The graph is missing or shows anything else.
    """
    if loss.grad_fn is None:
        raise ConfigurationError(
            "LipschitzLR looked for the loss in its autograd graph and found a tensor without one: the loss that "
            f"training_step returns must depend on trainable parameters; return one that does, or pass loss= with one "
            f"of {_quoted()} if that is what it is"
        )
    terms = _terms(loss.grad_fn, None)
    if terms:
        return _found(*terms[0])
    _, node = _descend(loss.grad_fn)
    if node.name().startswith("CompiledFunction"):
        raise ConfigurationError(
            "LipschitzLR looked for the loss in its autograd graph and found one compiled function, which hides it; "
            f"compile the network rather than the whole module, or pass loss= with one of {_quoted()}"
        )
    raise ConfigurationError(
        f"LipschitzLR looked for a loss that it has a constant for ({', '.join(LOSSES)}) and found "
        f"{' > '.join(_names(node))}; return one of them, or pass loss= with its name if it is a mean of one in other "
        "words, or if what is added to one is to be disregarded"
    )


def find_term(loss: Tensor, name: LossName, head: Tensor | None = None) -> FoundLoss | None:
    """Looks for a loss of one name among the terms of a sum.

    Args:
        loss: As for :func:`find_loss`.
        name: The loss's name.
        head: The weight of the head that it must be taken of, or None for any.

    Returns:
        What was found, with the sum of the factors where several terms have one head; None where there is no such term.

    Raises:
        ConfigurationError: There are terms with different heads.
    """
    terms = _terms(loss.grad_fn, name) if loss.grad_fn is not None else []
    found = [_found(*term, named=True) for term in terms]
    found = [term for term in found if head is None or same_weight(term.head_weight, head)]
    if not found:
        return None
    first = found[0]
    if any(not same_weight(term.head_weight, first.head_weight) or term.loss != first.loss for term in found[1:]):
        raise ConfigurationError(
            f"LipschitzLR(loss={name!r}) looked for one such term of the loss and found {len(found)} of different "
            "heads or kinds; pass head= with the name of the affine map to go by"
        )
    return replace(first, scale=sum(abs(term.scale) for term in found))


def read_loss(
    loss: Tensor, name: LossName, num_outputs: int, *, among_terms: bool = False, head: Tensor | None = None
) -> Reading | None:
    """What a loss was taken of in this batch, without reading anything of the device to the host.

    Args:
        loss: As for :func:`find_loss`.
        name: Which loss it was found to be.
        num_outputs: Outputs of the head.
        among_terms: Whether to look for it as :func:`find_term` does.
        head: As for :func:`find_term`.

    Returns:
        The reading, or None where the graph shows another loss.
    """
    if loss.grad_fn is None:
        return None
    terms = _terms(loss.grad_fn, name if among_terms else None)
    terms = [term for term in terms if term[1].name == name]
    if len(terms) > 1 and head is not None:
        terms = [term for term in terms if same_weight(_affine(term[1].below).weight, head)]
    if not terms:
        return None
    scale = _product(terms[0][0])
    for factors, _ in terms[1:]:
        scale = scale + _product(factors)
    return terms[0][1].reading(num_outputs, scale)


def first_heads(loss: Tensor) -> list[Tensor]:
    """The weights of the affine maps that a loss is made from with no other in between.

    Args:
        loss: A tensor.

    Returns:
        The weights, or views of them where they are frozen, of which the graph knows.
    """
    stack, seen, weights = [loss.grad_fn], set(), list[Tensor]()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        weight = _weight(node) if node.name() in _AFFINE else None
        if weight is None:
            stack.extend(_next(node))
        elif not any(same_weight(weight, other) for other in weights):
            weights.append(weight)
    return weights


def same_weight(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are one weight, or views of it."""
    if one is None or other is None:
        return one is other
    return one is other or (one.data_ptr() == other.data_ptr() != 0 and one.numel() == other.numel())


def _found(factors: "_Factors", match: _Match, named: bool = False) -> FoundLoss:
    maker = _affine(match.below)
    leaf = isinstance(maker.weight, nn.Parameter)
    width = match.width or (maker.weight.shape[0] if leaf and maker.weight is not None else None)
    top = "LogSoftmax" if match.name == "cross_entropy" else _short(match.node)
    chain = (top, *maker.chain) if maker.chain else ()
    scale = float(_product(factors))
    rows = match.rows(width or 1)
    return FoundLoss(_loss(match, named), scale, maker.weight, chain, rows, width, maker.pooled, maker.calls)


def _loss(match: _Match, named: bool) -> Loss:
    """The loss's arguments, read to the host; what has no constant is disregarded where the user has named the loss."""
    node, name, reduction = match.node, match.name, match.reduction
    if name == "cross_entropy":
        probabilities = match.probabilities
        if probabilities is not None:
            totals = probabilities.float().sum(dim=_dim(match.log_softmax, probabilities.ndim))
            if not named and not torch.allclose(totals, torch.ones_like(totals), atol=1e-2):
                raise ConfigurationError(
                    "LipschitzLR found a cross-entropy whose targets are probabilities that do not sum to 1 (the first "
                    f"ones' sum is {float(totals.flatten()[0]):g}), for which it has no constant; make them sum to 1, "
                    "or pass loss='cross_entropy' to have that disregarded"
                )
            return Loss(name, reduction)
        weights = node._saved_weight
        if named and match.each:
            weights = None
        if weights is not None and match.each:
            raise ConfigurationError(
                "LipschitzLR found a cross-entropy with class weights and reduction='none' that is averaged by hand, "
                "for which it has no constant; use reduction='mean', or pass loss='cross_entropy' to have the weights "
                "disregarded"
            )
        values = None if weights is None else tuple(float(weight) for weight in weights.tolist())
        return Loss(name, reduction, label_smoothing=match.label_smoothing, class_weights=values)
    if name == "binary_cross_entropy":
        if node._saved_weight is not None and not named:
            raise ConfigurationError(
                "LipschitzLR found a binary cross-entropy with weight=, for which it has no constant; use pos_weight= "
                "or none, or pass loss='binary_cross_entropy' to have the weights disregarded"
            )
        positive = getattr(node, "_saved_pos_weight", None)
        return Loss(name, reduction, pos_weight=1.0 if positive is None else float(positive.max()))
    threshold = getattr(node, "_saved_delta", None) or getattr(node, "_saved_beta", None) or 1.0
    return Loss(name, reduction, threshold=float(threshold))


# -- losses ------------------------------------------------------------------------------------------------------------

_BY_NODE: dict[str, LossName] = {
    "BinaryCrossEntropyWithLogitsBackward0": "binary_cross_entropy",
    "BinaryCrossEntropyBackward0": "binary_cross_entropy",
    "MseLossBackward0": "mean_squared_error",
    "HuberLossBackward0": "huber",
    "SmoothL1LossBackward0": "smooth_l1",
}
_REDUCTIONS: dict[int, Reduction] = {1: "mean", 2: "sum"}
_BY_HAND: dict[str, Reduction] = {"MeanBackward0": "mean", "SumBackward0": "sum"}


def _match(node: Any) -> _Match | None:
    """The loss whose graph begins with a node."""
    by_hand = _BY_HAND.get(node.name())
    if by_hand is not None:
        below = _only(node)
        if below is None:
            return None
        if below.name() == "AbsBackward0":
            difference = _only(below)
            outputs = _only(difference) if difference is not None and difference.name() == "SubBackward0" else None
            return None if outputs is None else _Match("mean_absolute_error", below, outputs, by_hand)
        while below.name() in ("ViewBackward0", "UnsafeViewBackward0"):
            below = _next(below)[0]
        return _match_reduced(below, by_hand, each=True) if getattr(below, "_saved_reduction", None) == 0 else None
    if node.name() == "AddBackward0":
        return _match_smoothed(node)
    if node.name().startswith("DivBackward"):
        return _match_probabilities(node)
    reduction = _REDUCTIONS.get(getattr(node, "_saved_reduction", None) or 0)
    return None if reduction is None else _match_reduced(node, reduction)


def _match_reduced(node: Any, reduction: Reduction, each: bool = False, smoothing: float = 0.0) -> _Match | None:
    """A loss that torch has a function for."""
    if node.name().startswith("NllLoss"):
        below = _only(node)
        # Log-probabilities that are clamped have the gradient of the cross-entropy, or none: the constants hold.
        while below is not None and below.name() in (*_VIEWS, "ClampBackward0", "ClampBackward1"):
            below = _next(below)[0]
        if below is None or below.name() != "LogSoftmaxBackward0":
            return None
        return _Match("cross_entropy", node, _next(below)[0], reduction, each, smoothing, below)
    name = _BY_NODE.get(node.name())
    below = _only(node)
    if name is None or below is None:
        return None
    if node.name() == "BinaryCrossEntropyBackward0":
        while below.name() in _VIEWS:
            below = _next(below)[0]
        if below.name() != "SigmoidBackward0":
            return None
        below = _next(below)[0]
    return _Match(name, node, below, reduction, each)


def _match_smoothed(node: Any) -> _Match | None:
    """Label smoothing: (1 - s) * nll + s / k * sum of the log-probabilities; torch makes both terms by MulBackward1."""
    terms = _next(node)
    if len(terms) != 2 or any(term.name() != "MulBackward1" for term in terms):
        return None
    nll, rest = (_next(term)[0] for term in terms)
    reduction = _REDUCTIONS.get(getattr(nll, "_saved_reduction", None) or 0)
    if reduction is None or not nll.name().startswith("NllLoss") or rest.name() not in ("DivBackward0", "SumBackward0"):
        return None
    return _match_reduced(nll, reduction, smoothing=1 - float(terms[0]._saved_other))


def _match_probabilities(node: Any) -> _Match | None:
    """Probabilities as targets: minus the sum of target times log-probability, over the rows."""
    names = ("NegBackward0", "SumBackward0", "MulBackward0", "LogSoftmaxBackward0")
    below = node
    product = None
    for name in names:
        below = _only(below)
        if below is None or below.name() != name:
            return None
        product = below if name == "MulBackward0" else product
    return _Match("cross_entropy", product, _next(below)[0], "mean", log_softmax=below)


# -- what makes the outputs --------------------------------------------------------------------------------------------

# What DistributedDataParallel, hooks on a module's gradients and fully_shard put into a graph.
_IDENTITIES = frozenset(
    ("_DDPSinkBackward", "BackwardHookFunctionBackward", "RegisterPostBackwardFunctionBackward", "CloneBackward0")
)
_VIEWS = _IDENTITIES | frozenset(
    f"{name}Backward{version}"
    for name in (
        *("T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Alias"),
        *("Squeeze", "Unsqueeze", "ToCopy", "Clone"),
    )
    for version in (0, 1)
)
# Where the weight stands among the inputs of each.
_AFFINE = {"AddmmBackward0": 2, "MmBackward0": 1, "LinearBackward0": 1, "ConvolutionBackward0": 1}
_POOLS = ("MeanBackward1", "AdaptiveAvgPool2DBackward0", "AvgPool2DBackward0")


@dataclass(frozen=True)
class _Maker:
    """What has made the outputs; see :class:`FoundLoss`."""

    weight: Tensor | None = None
    chain: tuple[str, ...] = ()
    pooled: bool = False
    calls: int = 1


def _affine(node: Any) -> _Maker:
    """The affine map behind a node, or the names of what stands between."""
    names, pooled = tuple(_names(node)), False
    while True:
        name = node.name()
        # A part of the rows, or of the outputs, has a part of their gradient.
        if name in _VIEWS or name == "SliceBackward0" or _is_select_of_one(node):
            node = _next(node)[0]
        elif name == "AddBackward0" and (sum_of := _without_bias(node)) is not None:
            node = sum_of
        elif name in _POOLS or (pooled and name == "ReluBackward0"):
            pooled = True
            node = _next(node)[0]
        else:
            break
    if name in ("CatBackward0", "StackBackward0"):
        parts = [_affine(part) for part in _next(node)]
        first = parts[0]
        # Outputs that were put together come from one map that was called several times, or from several maps.
        if first.weight is None or not all(
            same_weight(part.weight, first.weight) and not part.pooled for part in parts
        ):
            return _Maker(chain=names)
        return _Maker(first.weight, (), pooled, sum(part.calls for part in parts))
    if name.startswith("CompiledFunction"):
        return _Maker(pooled=pooled)
    if name not in _AFFINE:
        return _Maker(chain=names)
    weight = _weight(node)
    if weight is not None:
        return _Maker(weight, (), pooled)
    computed = node.next_functions[_AFFINE[name]][0]
    # A weight that is computed, as by weight_norm, from parameters whose gradients are others.
    return _Maker(pooled=pooled) if computed is None else _Maker(chain=(*names, "weight", *_names(computed)))


def _weight(node: Any) -> Tensor | None:
    """The weight of an affine map; where it is frozen, the view that the graph keeps of it."""
    for leaf in map(_leaf, _next(node)):
        if isinstance(leaf, nn.Parameter) and leaf.ndim > 1:
            return leaf
    if node.next_functions[_AFFINE[node.name()]][0] is not None:
        return None
    return getattr(node, "_saved_mat2", None) if "mm" in node.name() or "Mm" in node.name() else node._saved_weight


def _without_bias(node: Any) -> Any:
    """What a bias, or something that needs no gradient, is added to; None where it is more than that."""
    others = [part for part in _next(node) if not (isinstance(leaf := _leaf(part), nn.Parameter) and leaf.ndim == 1)]
    return others[0] if len(others) == 1 else None


def _is_select_of_one(node: Any) -> bool:
    if node.name() != "SelectBackward0":
        return False
    sizes = node._saved_self_sym_sizes
    return sizes[_dim(node, len(sizes))] == 1


def _dim(node: Any, ndim: int) -> int:
    """A node's dimension, which torch shows as an unsigned number, counted from 0."""
    dim = int(node._saved_dim)
    dim = dim - 2**64 if dim >= 2**63 else dim
    return dim % ndim


def _leaf(node: Any) -> Tensor | None:
    while node.name() in _VIEWS:
        node = _next(node)[0]
    return getattr(node, "variable", None)


# -- the graph ---------------------------------------------------------------------------------------------------------


def _next(node: Any) -> list[Any]:
    """The nodes below one, without the inputs that need no gradient."""
    return [following for following, _ in node.next_functions if following is not None]


def _only(node: Any) -> Any:
    """The one node below, or None where there are none or several."""
    below = _next(node)
    return below[0] if len(below) == 1 else None


_Factors = list[tuple[Tensor, bool]]
"""Numbers that a loss is multiplied by, and whether it is divided by them."""


def _is_scale(node: Any) -> bool:
    if node.name() not in ("DivBackward0", "MulBackward0") or _only(node) is None:
        return False
    other = getattr(node, "_saved_other", None)
    # Minus a sum over rows, divided by their number, is the cross-entropy with probabilities as targets.
    return other is not None and other.numel() == 1 and _next(node)[0].name() != "NegBackward0"


def _descend(node: Any) -> tuple[_Factors, Any]:
    """Takes factors off the top of a graph."""
    factors: _Factors = []
    while _is_scale(node) or node.name() in _IDENTITIES:
        if _is_scale(node):
            factors.append((node._saved_other, node.name() == "DivBackward0"))
        node = _next(node)[0]
    return factors, node


def _product(factors: _Factors) -> float | Tensor:
    """The product: a number of the host where the factors are."""
    product: Any = 1.0
    for factor, divide in factors:
        value: Any = float(factor) if factor.device.type == "cpu" else factor
        product = product / value if divide else product * value
    return product


def _terms(node: Any, name: LossName | None) -> list[tuple[_Factors, _Match]]:
    """The loss that a graph begins with; for a name, the losses of that name among the terms of a sum."""
    factors, node = _descend(node)
    match = _match(node)
    if match is not None and name in (None, match.name):
        return [(factors, match)]
    if name is None or node.name() not in ("AddBackward0", "SubBackward0"):
        return []
    return [([*factors, *more], found) for part in _next(node) for more, found in _terms(part, name)]


def _short(node: Any) -> str:
    return re.sub(r"Backward\d$", "", node.name())


def _names(node: Any, limit: int = 4) -> list[str]:
    names: list[str] = []
    while node is not None and len(names) < limit and not node.name().endswith("AccumulateGrad"):
        names.append(_short(node))
        node = next(iter(_next(node)), None)
    return names


def _quoted() -> str:
    return ", ".join(map(repr, LOSSES))
