"""Recognises a loss, and the head behind it, in the autograd graph of the loss's value.

Names and saved tensors of the nodes are torch's (2.8 to 2.14); what is not recognised is refused with the names that
were seen, never guessed.
"""

import math
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
        bent: The same where an activation with slopes of at most 1 stands between, as it may before some losses.
        rows: Examples, tokens or pixels that the loss looks at, ignored ones included.
        head_rows: Rows of the affine map's outputs that the loss looks at; more than ``rows`` where its classes are
            places.
        width: Outputs of the head that the loss is taken of, or classes, where the loss tells, or None.
        group: Rows of the affine map's outputs that one target of a cross-entropy is chosen among.
        pooled: Whether the affine map's outputs are averaged over places, or enlarged, before the loss.
        calls: Calls of the affine map whose outputs were put together.
        joined: Whether the outputs were put together, of one call or several.
        inputs: The input of the affine map, where it was called once and the graph keeps it.
    """

    loss: Loss
    scale: float
    head_weight: Tensor | None
    chain: tuple[str, ...]
    bent: tuple[str, ...]
    rows: int
    head_rows: int
    width: int | None
    group: int
    pooled: bool
    calls: int
    joined: bool
    inputs: Tensor | None


@dataclass(frozen=True)
class Reading:
    """What a loss was taken of in one batch; tensors are on their device, and were not read.

    Attributes:
        count: Examples, tokens or pixels that it averages over, or sums up.
        elements: The same times the outputs that it averages over too: all that are divided by in a mean.
        scale: The factor in front of the mean or the sum.
        rows: Examples, tokens or pixels that it looks at, ignored ones included.
        outputs: The head's outputs and the targets, where their sizes matter; else empty.
        calls: Calls of the head whose outputs were put together.
        stretch: The factor of the head's outputs, as of a temperature.
    """

    count: int | Tensor
    elements: int | Tensor
    scale: float | Tensor
    rows: int
    outputs: tuple[Tensor, ...] = ()
    calls: int = 1
    stretch: float | Tensor = 1.0


@dataclass(frozen=True)
class Edge:
    """Where the gradient in the outputs that a loss is taken of enters the graph below.

    Attributes:
        node: The node that made the outputs.
        place: Which of its results they are.
        dim: The dimension of the classes in what a cross-entropy is taken of, from 0; None for the other losses.
        head_weight: The weight of the affine map behind them, None where the graph does not tell.
    """

    node: Any
    place: int
    dim: int | None
    head_weight: Tensor | None


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
    divisor: int = 1  # of a sum, where it is made in steps of which some are means

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

    @property
    def logits(self) -> int:
        """Outputs that the loss is taken of."""
        return self.elements if self.log_softmax is None else self.log_softmax._saved_result.numel()

    @property
    def edge(self) -> Edge:
        """Where the gradient in the outputs goes."""
        node, weight = self.log_softmax or self.node, _affine(self.below, self.name).weight
        dim = None if self.log_softmax is None else _dim(self.log_softmax, self.log_softmax._saved_result.ndim)
        while True:
            for below, place in node.next_functions:
                if below is self.below:
                    return Edge(below, place, dim, weight)
            node = _next(node)[0]

    def reading(self, num_outputs: int, scale: float | Tensor, joined: bool) -> Reading:
        """What the loss was taken of."""
        rows, maker = self.rows(num_outputs), _affine(self.below, self.name) if joined else _Maker()
        stretch: Any = abs(_product(_stretch(self.below))) if maker.chain else 1.0
        if self.name != "cross_entropy":
            outputs: tuple[Tensor, ...] = ()
            if self.name == "mean_squared_error":
                outputs = (self.node._saved_self.detach(), self.node._saved_target.detach())
            return Reading(rows, self.elements, scale, rows, outputs, maker.calls, stretch)
        count: int | Tensor = self.elements
        if not self.each and self.probabilities is None:
            count = self.node._saved_total_weight
            if self.node._saved_weight is not None:
                count = (self.node._saved_target != self.node._saved_ignore_index).sum()
        return Reading(count, count, scale, rows, calls=maker.calls, stretch=stretch)


def find_loss(loss: Tensor) -> FoundLoss:
    """Recognises a loss by the autograd graph of its value.

    Args:
        loss: A scalar with a graph, as torch's functions return it, multiplied or divided by single numbers; or a sum
            of several of one kind that are taken of the same outputs, as in mixup.

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
    found = [_found(*term) for term in _terms(loss.grad_fn, None)]
    if found and all(term.loss == found[0].loss for term in found):
        return replace(found[0], scale=sum(abs(term.scale) for term in found)) if len(found) > 1 else found[0]
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
    found = [_found(*term, named=True) for term in _of_head(terms, head)]
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
    loss: Tensor,
    name: LossName,
    num_outputs: int,
    *,
    among_terms: bool = False,
    head: Tensor | None = None,
    joined: bool = True,
) -> Reading | None:
    """What a loss was taken of in this batch, without reading anything of the device to the host.

    Args:
        loss: As for :func:`find_loss`.
        name: Which loss it was found to be.
        num_outputs: Outputs of the head.
        among_terms: Whether to look for it as :func:`find_term` does.
        head: As for :func:`find_term`.
        joined: Whether to look for the calls and the factor of the outputs, which takes as long as all the rest.

    Returns:
        The reading, or None where the graph shows another loss.
    """
    if loss.grad_fn is None:
        return None
    terms = _terms(loss.grad_fn, name if among_terms else None)
    terms = [term for term in terms if term[1].name == name]
    terms = _of_head(terms, head) if len(terms) > 1 else terms
    readings = [match.reading(num_outputs, _product(factors), joined) for factors, match in terms]
    return _together(readings) if len(readings) > 1 else next(iter(readings), None)


def find_edges(loss: Tensor, name: LossName, *, among_terms: bool = False) -> list[Edge]:
    """Where the gradients in the outputs that the terms of a loss are taken of go, each once.

    Args:
        loss: As for :func:`find_loss`.
        name: Which loss it was found to be.
        among_terms: As for :func:`read_loss`.
    """
    terms = _terms(loss.grad_fn, name if among_terms else None) if loss.grad_fn is not None else []
    edges = [match.edge for _, match in terms if match.name == name]
    return list({(edge.node, edge.place): edge for edge in edges}.values())


def _of_head(terms: "list[_Term]", head: Tensor | None) -> "list[_Term]":
    """The terms that are taken of a head; where the graph shows none to be, those of which it does not tell."""
    if head is None:
        return terms
    weights = [_affine(match.below, match.name).weight for _, match in terms]
    own = [term for term, weight in zip(terms, weights, strict=True) if same_weight(weight, head)]
    return own or [term for term, weight in zip(terms, weights, strict=True) if weight is None]


def _together(readings: list[Reading]) -> Reading:
    """What several losses of the same outputs have together: none is larger than the largest, nor of fewer targets."""
    first = readings[0]
    scale: Any = sum(abs(reading.scale) for reading in readings)
    count, elements = first.count, first.elements
    for reading in readings[1:]:
        count, elements = _least(count, reading.count), _least(elements, reading.elements)
    outputs = first.outputs
    for reading in readings[1:]:
        if [part.shape for part in reading.outputs] == [part.shape for part in outputs]:
            pairs = zip(outputs, reading.outputs, strict=True)
            outputs = tuple(torch.maximum(one.abs(), other.abs()) for one, other in pairs)
    return replace(first, count=count, elements=elements, scale=scale, outputs=outputs)


def _least(one: int | Tensor, other: int | Tensor) -> int | Tensor:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return torch.minimum(torch.as_tensor(one), torch.as_tensor(other))
    return min(one, other)


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
        weight = _weight(node) if node.name() in _AFFINE else _multiplied(node)
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
    maker = _affine(match.below, match.name)
    width = match.width or maker.outputs
    top = "LogSoftmax" if match.name == "cross_entropy" else _short(match.node)
    chain, bent = ((top, *names) if names else () for names in (maker.chain, maker.bent))
    rows = match.rows(width or 1)
    head_rows, group = rows, 1
    if match.width and maker.outputs and match.width % maker.outputs == 0:
        head_rows, group = match.logits // maker.outputs, match.width // maker.outputs
    return FoundLoss(
        loss=_loss(match, named),
        scale=float(_product(factors)),
        head_weight=maker.weight,
        chain=chain,
        bent=bent,
        rows=rows,
        head_rows=head_rows,
        width=width,
        group=group,
        pooled=maker.pooled,
        calls=maker.calls,
        joined=maker.joined,
        inputs=_inputs(maker.call),
    )


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
_BY_HAND: dict[str, Reduction] = {
    "MeanBackward0": "mean",
    "MeanBackward1": "mean",
    "SumBackward0": "sum",
    "SumBackward1": "sum",
}
_RESHAPES = ("ViewBackward0", "UnsafeViewBackward0", "SqueezeBackward0", "UnsqueezeBackward0")


def _match(node: Any) -> _Match | None:
    """The loss whose graph begins with a node."""
    if node.name() in _BY_HAND:
        return _match_by_hand(node)
    if node.name() == "AddBackward0":
        return _match_smoothed(node)
    if node.name().startswith("DivBackward"):
        return _match_probabilities(node)
    reduction = _REDUCTIONS.get(getattr(node, "_saved_reduction", None) or 0)
    return None if reduction is None else _match_reduced(node, reduction)


def _match_by_hand(node: Any) -> _Match | None:
    """The mean or the sum, in one step or several, of losses that were not reduced."""
    below, divisor, means, sums = node, 1, 0, 0
    while below is not None and (below.name() in _BY_HAND or below.name() in _RESHAPES):
        if below.name() in _BY_HAND:
            mean = _BY_HAND[below.name()] == "mean"
            means, sums = means + mean, sums + (not mean)
            divisor *= _reduced(below) if mean else 1
        below = _only(below)
    if below is None:
        return None
    reduction: Reduction = "sum" if sums else "mean"
    divisor = divisor if sums else 1
    if below.name() == "AbsBackward0":
        difference = _only(below)
        outputs = _only(difference) if difference is not None and difference.name() == "SubBackward0" else None
        return None if outputs is None else _Match("mean_absolute_error", below, outputs, reduction, divisor=divisor)
    if getattr(below, "_saved_reduction", None) != 0:
        return None
    match = _match_reduced(below, reduction, each=True)
    return None if match is None else replace(match, divisor=divisor)


def _reduced(node: Any) -> int:
    """How many numbers each result of a mean is the mean of."""
    sizes, dims = node._saved_self_sym_sizes, getattr(node, "_saved_dim", None)
    return math.prod(sizes[dim if dim < 2**63 else dim - 2**64] for dim in dims) if dims else math.prod(sizes)


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
# Slopes of 0 and 1, so that neither a gradient nor a curvature is larger behind them.
_CUTS = ("ClampBackward0", "ClampBackward1", "ClampMinBackward0", "ClampMaxBackward0", "MaskedFillBackward0")
# Slopes of at most 1 that bend: no gradient is larger behind them, but a curvature may be.
_BENDS = ("SigmoidBackward0", "TanhBackward0", "ReluBackward0")
_MOVES = ("TBackward0", "TransposeBackward0", "PermuteBackward0")
# Where the weight stands among the inputs of each.
_AFFINE = {"AddmmBackward0": 2, "MmBackward0": 1, "LinearBackward0": 1, "ConvolutionBackward0": 1}
_POOLS = ("MeanBackward1", "AdaptiveAvgPool2DBackward0", "AvgPool2DBackward0")
_WRITTEN = "torch::autograd::CopySlices"


@dataclass(frozen=True)
class _Maker:
    """What has made the outputs; see :class:`FoundLoss`."""

    weight: Tensor | None = None
    chain: tuple[str, ...] = ()
    pooled: bool = False
    calls: int = 1
    outputs: int | None = None
    bent: tuple[str, ...] = ()
    call: Any = None  # the node of the one call
    joined: bool = False


@dataclass(frozen=True)
class _Part:
    """A part of a tensor along one dimension."""

    dim: int
    ndim: int
    size: int
    left: int
    selected: bool


def _affine(node: Any, loss: LossName) -> _Maker:
    """The affine map behind the outputs that a loss is taken of, or the names of what stands between."""
    names, pooled, bent, moved, parts = tuple(_names(node)), False, False, False, list[_Part]()
    while True:
        name = node.name()
        # A part of the rows, or of the outputs, has a part of their gradient.
        part = _part(node)
        if part is not None:
            parts.append(part)
            node = _next(node)[0]
        elif name in _VIEWS or name in _CUTS:
            moved = moved or name in _MOVES
            node = _next(node)[0]
        elif name == "AddBackward0" and (sum_of := _without_bias(node)) is not None:
            node = sum_of
        elif name in _POOLS or (pooled and name == "ReluBackward0") or _is_enlarged(node):
            pooled = True
            node = _next(node)[0]
        elif name in _BENDS and loss != "cross_entropy":
            bent = True
            node = _next(node)[0]
        else:
            break
    maker = _joined(node, names, loss) or _mapped(node, names)
    if maker.chain:
        return maker
    outputs = _outputs_left(node, maker, parts, moved)
    if outputs is None and any(part.selected and part.size > 1 for part in parts):
        return _Maker(chain=names)
    pooled = pooled or maker.pooled
    return replace(maker, pooled=pooled, outputs=outputs, bent=names if bent or maker.bent else ())


def _mapped(node: Any, names: tuple[str, ...]) -> _Maker:
    """The affine map that is a node of the graph."""
    name = node.name()
    if name.startswith("CompiledFunction"):
        return _Maker()
    if name not in _AFFINE:
        return _Maker(chain=names)
    weight = _weight(node)
    if weight is not None:
        return _Maker(weight, outputs=weight.shape[0] if isinstance(weight, nn.Parameter) else None, call=node)
    computed = node.next_functions[_AFFINE[name]][0]
    # A weight that is computed, as by weight_norm, from parameters whose gradients are others.
    return _Maker() if computed is None else _Maker(chain=(*names, "weight", *_names(computed)))


def _joined(node: Any, names: tuple[str, ...], loss: LossName) -> _Maker | None:
    """The affine map that was called several times, where a node puts outputs together; None at another node."""
    if node.name() in ("CatBackward0", "StackBackward0"):
        nodes = _next(node)
    elif node.name() == _WRITTEN:
        nodes = []
        while node is not None and node.name() == _WRITTEN:
            (base, _), *written = node.next_functions
            nodes += [part for part, _ in written if part is not None]
            node = base
        nodes += [] if node is None else [node]
    else:
        return None
    makers = [_affine(part, loss) for part in nodes]
    first = makers[0]
    # Outputs that were put together come from one map that was called several times, or from several maps.
    if first.weight is None or not all(
        same_weight(maker.weight, first.weight) and not maker.pooled for maker in makers
    ):
        return _Maker(chain=names)
    bent = next((maker.bent for maker in makers if maker.bent), ())
    return _Maker(first.weight, (), False, sum(maker.calls for maker in makers), first.outputs, bent, joined=True)


def _part(node: Any) -> _Part | None:
    """What a node takes of a tensor; None for one that takes no part."""
    name = node.name()
    if name == "GatherBackward0":
        sizes, index = node._saved_self.shape, node._saved_index.shape
    elif name in ("SliceBackward0", "SelectBackward0", "SplitBackward0", "SplitWithSizesBackward0"):
        sizes = node._saved_self_sym_sizes
    else:
        return None
    dim = _dim(node, len(sizes))
    size, left = sizes[dim], 1
    if name == "GatherBackward0" and index[dim] != 1:
        return None  # may take one output several times
    if name == "SliceBackward0":
        start, end = (end - 2**64 if end >= 2**63 else end for end in (node._saved_start, node._saved_end))
        left = len(range(*slice(start, end, node._saved_step).indices(size)))
    elif name == "SplitBackward0":
        left = min(size, node._saved_split_size)
    elif name == "SplitWithSizesBackward0":
        left = max(node._saved_split_sizes)
    return _Part(dim, len(sizes), size, left, name in ("SelectBackward0", "GatherBackward0"))


def _outputs_left(node: Any, maker: _Maker, parts: list[_Part], moved: bool) -> int | None:
    """How many of a map's outputs the loss is taken of; None where the graph does not tell, or takes one place."""
    outputs = maker.outputs
    last = node.name() != "ConvolutionBackward0"
    for part in reversed(parts):
        here = moved or part.dim == (part.ndim - 1 if last else 1)
        if outputs is not None and here and part.size == outputs:
            outputs = part.left
        elif part.selected and part.size > 1:
            return None
    return outputs


def _is_enlarged(node: Any) -> bool:
    """Whether a map is enlarged by whole numbers, so that each place has the same share in what it becomes.

    No row of the enlarged matrix is longer than the longest one, and its norms grow by no more than the root of the
    number of rows.
    """
    name = node.name()
    if not re.match(r"Upsample(Nearest[123]|Linear1|Bilinear2|Trilinear3)DBackward", name):
        return False
    before, after = node._saved_self_sym_sizes[2:], node._saved_output_size
    ratios = [large / size for size, large in zip(before, after, strict=True)]
    given = [getattr(node, key) for key in dir(node) if key.startswith("_saved_scales")]
    whole = all(ratio >= 1 and ratio.is_integer() for ratio in ratios)
    return whole and {*given} <= {None, *ratios} and not getattr(node, "_saved_align_corners", False)


def _stretch(node: Any) -> "_Factors":
    """The numbers that an affine map's outputs are multiplied by; none where the graph shows more than that."""
    stretch: _Factors = []
    while node.name() not in _AFFINE:
        factors, below = _descend(node)
        stretch += factors
        if below is node:
            if not (node.name() in _VIEWS or node.name() in _CUTS or _part(node) is not None):
                return []
            below = _next(node)[0]
        node = below
    return stretch


def _inputs(node: Any) -> Tensor | None:
    """The input of an affine map, as its node keeps it for the weight's gradient."""
    names = {"AddmmBackward0": "_saved_mat1", "MmBackward0": "_saved_self"}
    inputs = None if node is None else getattr(node, names.get(node.name(), "_saved_input"), None)
    return None if inputs is None else inputs.detach()


def _weight(node: Any) -> Tensor | None:
    """The weight of an affine map; where it is frozen, the view that the graph keeps of it."""
    for leaf in map(_leaf, _next(node)):
        if isinstance(leaf, nn.Parameter) and leaf.ndim > 1:
            return leaf
    if node.next_functions[_AFFINE[node.name()]][0] is not None:
        return None
    return getattr(node, "_saved_mat2", None) if "mm" in node.name() or "Mm" in node.name() else node._saved_weight


def _multiplied(node: Any) -> Tensor | None:
    """The parameter that torch.einsum or a product of batches multiplies by."""
    leaves = map(_leaf, _next(node)) if node.name() == "BmmBackward0" else ()
    return next((leaf for leaf in leaves if isinstance(leaf, nn.Parameter)), None)


def _without_bias(node: Any) -> Any:
    """What a bias, or something that needs no gradient, is added to; None where it is more than that."""
    others = [part for part in _next(node) if not (isinstance(leaf := _leaf(part), nn.Parameter) and leaf.ndim == 1)]
    return others[0] if len(others) == 1 else None


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
_Term = tuple[_Factors, _Match]


def _factor(node: Any) -> Tensor | None:
    """The number that a node multiplies by or divides by, on whichever side it stands; None for another node."""
    if node.name() not in ("DivBackward0", "MulBackward0") or _only(node) is None:
        return None
    other = getattr(node, "_saved_other", None)
    if other is None and node.name() == "MulBackward0":
        other = getattr(node, "_saved_self", None)
    # Minus a sum over rows, divided by their number, is the cross-entropy with probabilities as targets.
    return None if other is None or other.numel() != 1 or _next(node)[0].name() == "NegBackward0" else other


def _descend(node: Any) -> tuple[_Factors, Any]:
    """Takes factors off the top of a graph."""
    factors: _Factors = []
    while (factor := _factor(node)) is not None or node.name() in _IDENTITIES:
        if factor is not None:
            factors.append((factor, node.name() == "DivBackward0"))
        node = _next(node)[0]
    return factors, node


def _product(factors: _Factors) -> float | Tensor:
    """The product: a number of the host where the factors are."""
    product: Any = 1.0
    for factor, divide in factors:
        value: Any = float(factor) if factor.device.type == "cpu" else factor
        product = product / value if divide else product * value
    return product


def _same_gradient(node: Any) -> Any:
    """What a node leaves as it is, up to its sign or a constant; None where it does more."""
    name, below = node.name(), _only(node)
    if below is None:
        return None
    if name in ("AddBackward0", "SubBackward0", "RsubBackward1"):
        return below if node._saved_alpha == 1 else None
    if name in _BY_HAND:
        return below if math.prod(node._saved_self_sym_sizes) == 1 else None
    return below if name in _VIEWS or name == "NegBackward0" else None


def _terms(node: Any, name: LossName | None) -> list[_Term]:
    """The loss that a graph begins with, or several of the same outputs; for a name, those of that name in a sum."""
    factors, node = _descend(node)
    match = _match(node)
    if match is not None and name in (None, match.name):
        if match.divisor != 1:
            factors = [*factors, (torch.tensor(float(match.divisor)), True)]
        return [(factors, match)]
    below = _same_gradient(node)
    if below is not None:
        return [([*factors, *more], found) for more, found in _terms(below, name)]
    if node.name() not in ("AddBackward0", "SubBackward0") or node._saved_alpha != 1:
        return []
    parts = [_terms(part, name) for part in _next(node)]
    terms = [([*factors, *more], found) for part in parts for more, found in part]
    if name is None and not (all(parts) and all(_are_alike(terms[0][1], found) for _, found in terms[1:])):
        return []
    return terms


def _are_alike(one: _Match, other: _Match) -> bool:
    """Whether two losses are of one kind and of outputs of one call, so that their gradients have one bound."""
    kinds = [(match.name, match.reduction, match.width, match.elements) for match in (one, other)]
    calls = [_affine(match.below, match.name).call for match in (one, other)]
    return kinds[0] == kinds[1] and (one.below is other.below or (calls[0] is calls[1] is not None))


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
