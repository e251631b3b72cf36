"""Recognises a loss, and the head behind it, in the autograd graph of the loss's value.

Names and saved tensors of the nodes are torch's (2.8 to 2.14); what is not recognised is refused with the names that
were seen, never guessed.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lit_lipschitz.bounds.loss_spec import LOSSES, Loss
from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.recognition.affine import (
    AFFINE,
    Maker,
    find_maker,
    inputs_of,
    multiplied_by,
    same_weight,
    stretch_of,
    weight_of,
)
from lit_lipschitz.recognition.autograd_nodes import (
    VIEWS,
    Factors,
    dim_of,
    names_below,
    nodes_below,
    only_below,
    product_of,
    short_name,
    take_factors,
)
from lit_lipschitz.recognition.loss_patterns import BY_HAND, Match, find_match

_Term = tuple[Factors, Match]


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
        terms: Losses that are added up; the outputs of several are no smaller than any of theirs.
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
    terms: int = 1


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
    _, node = take_factors(loss.grad_fn)
    if node.name().startswith("CompiledFunction"):
        raise ConfigurationError(
            "LipschitzLR looked for the loss in its autograd graph and found one compiled function, which hides it; "
            f"compile the network rather than the whole module, or pass loss= with one of {_quoted()}"
        )
    raise ConfigurationError(
        f"LipschitzLR looked for a loss that it has a constant for ({', '.join(LOSSES)}) and found "
        f"{' > '.join(names_below(node))}; return one of them, or pass loss= with its name if it is a mean of one in "
        "other words, or if what is added to one is to be disregarded"
    )


def find_term(loss: Tensor, name: str, head: Tensor | None = None) -> FoundLoss | None:
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
    name: str,
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
    readings = [_reading(match, num_outputs, product_of(factors), joined) for factors, match in terms]
    return _together(readings) if len(readings) > 1 else next(iter(readings), None)


def find_edges(loss: Tensor, name: str, *, among_terms: bool = False) -> list[Edge]:
    """Where the gradients in the outputs that the terms of a loss are taken of go, each once.

    Args:
        loss: As for :func:`find_loss`.
        name: Which loss it was found to be.
        among_terms: As for :func:`read_loss`.
    """
    terms = _terms(loss.grad_fn, name if among_terms else None) if loss.grad_fn is not None else []
    edges = [_edge(match) for _, match in terms if match.name == name]
    return list({(edge.node, edge.place): edge for edge in edges}.values())


def _edge(match: Match) -> Edge:
    """Where the gradient in the outputs goes."""
    node, weight = match.log_softmax or match.node, find_maker(match.below, match.name).weight
    dim = None if match.log_softmax is None else dim_of(match.log_softmax, match.log_softmax._saved_result.ndim)
    while True:
        for below, place in node.next_functions:
            if below is match.below:
                return Edge(below, place, dim, weight)
        node = nodes_below(node)[0]


def _reading(match: Match, num_outputs: int, scale: float | Tensor, joined: bool) -> Reading:
    """What the loss was taken of."""
    rows, maker = match.rows(num_outputs), find_maker(match.below, match.name) if joined else Maker()
    stretch: Any = abs(product_of(stretch_of(match.below))) if maker.chain else 1.0
    if match.log_softmax is None:
        outputs: tuple[Tensor, ...] = ()
        if LOSSES[match.name].needs_output_norm:
            outputs = (match.node._saved_self.detach(), match.node._saved_target.detach())
            if match.node.next_functions[0][0] is None:  # the first argument has no gradient: it is the targets
                outputs = outputs[::-1]
        return Reading(rows, match.elements, scale, rows, outputs, maker.calls, stretch)
    count: int | Tensor = match.elements
    if not match.each and match.probabilities is None:
        count = match.node._saved_total_weight
        if match.node._saved_weight is not None:
            count = (match.node._saved_target != match.node._saved_ignore_index).sum()
    return Reading(count, count, scale, rows, calls=maker.calls, stretch=stretch)


def _of_head(terms: list[_Term], head: Tensor | None) -> list[_Term]:
    """The terms that are taken of a head; where the graph shows none to be, those of which it does not tell."""
    if head is None:
        return terms
    weights = [find_maker(match.below, match.name).weight for _, match in terms]
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
    return replace(first, count=count, elements=elements, scale=scale, outputs=outputs, terms=len(readings))


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
        weight = weight_of(node) if node.name() in AFFINE else multiplied_by(node)
        if weight is None:
            stack.extend(nodes_below(node))
        elif not any(same_weight(weight, other) for other in weights):
            weights.append(weight)
    return weights


def _found(factors: Factors, match: Match, named: bool = False) -> FoundLoss:
    maker = find_maker(match.below, match.name)
    width = match.width or maker.outputs
    top = "LogSoftmax" if match.name == "cross_entropy" else short_name(match.node)
    chain, bent = ((top, *names) if names else () for names in (maker.chain, maker.bent))
    rows = match.rows(width or 1)
    head_rows, group = rows, 1
    if match.width and maker.outputs and match.width % maker.outputs == 0:
        head_rows, group = match.logits // maker.outputs, match.width // maker.outputs
    return FoundLoss(
        loss=_loss(match, named),
        scale=float(product_of(factors)),
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
        inputs=inputs_of(maker.call),
    )


def _loss(match: Match, named: bool) -> Loss:
    """The loss's arguments, read to the host; what has no constant is disregarded where the user has named the loss."""
    node, name, reduction = match.node, match.name, match.reduction
    if name == "cross_entropy":
        probabilities = match.probabilities
        if probabilities is not None:
            totals = probabilities.float().sum(dim=dim_of(match.log_softmax, probabilities.ndim))
            if not named and not torch.allclose(totals, torch.ones_like(totals), atol=1e-2):
                raise ConfigurationError(
                    "LipschitzLR found a cross-entropy whose targets are probabilities that do not sum to 1 (the first "
                    f"ones' sum is {float(totals.flatten()[0]):g}), for which it has no constant; make them sum to 1, "
                    "or pass loss='cross_entropy' to have that disregarded"
                )
            return LOSSES[name].loss(reduction)
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
        return LOSSES[name].loss(reduction, label_smoothing=match.label_smoothing, class_weights=values)
    read = LOSSES[name].arguments
    if "_saved_weight" not in read.values() and getattr(node, "_saved_weight", None) is not None and not named:
        raise ConfigurationError(
            f"LipschitzLR found a {name} with weight=, for which it has no constant; leave it out, or pass "
            f"loss={name!r} to have the weights disregarded"
        )
    saved = {argument: getattr(node, attribute, None) for argument, attribute in read.items()}
    arguments = {
        argument: float(value.max() if isinstance(value, Tensor) else value)
        for argument, value in saved.items()
        if value is not None
    }
    return LOSSES[name].loss(reduction, **arguments)


def _same_gradient(node: Any) -> Any:
    """What a node leaves as it is, up to its sign or a constant; None where it does more."""
    name, below = node.name(), only_below(node)
    if below is None:
        return None
    if name in ("AddBackward0", "SubBackward0", "RsubBackward1"):
        return below if node._saved_alpha == 1 else None
    if name in BY_HAND:
        return below if math.prod(node._saved_self_sym_sizes) == 1 else None
    return below if name in VIEWS or name == "NegBackward0" else None


def _terms(node: Any, name: str | None) -> list[_Term]:
    """The loss that a graph begins with, or several of the same outputs; for a name, those of that name in a sum."""
    factors, node = take_factors(node)
    match = find_match(node)
    if match is not None and name in (None, match.name):
        if match.divisor != 1:
            factors = [*factors, (torch.tensor(float(match.divisor)), True)]
        return [(factors, match)]
    below = _same_gradient(node)
    if below is not None:
        return [([*factors, *more], found) for more, found in _terms(below, name)]
    if node.name() not in ("AddBackward0", "SubBackward0") or node._saved_alpha != 1:
        return []
    parts = [_terms(part, name) for part in nodes_below(node)]
    terms = [([*factors, *more], found) for part in parts for more, found in part]
    if name is None and not (all(parts) and all(_are_alike(terms[0][1], found) for _, found in terms[1:])):
        return []
    return terms


def _are_alike(one: Match, other: Match) -> bool:
    """Whether two losses are of one kind and of outputs of one call, so that their gradients have one bound."""
    kinds = [(match.name, match.reduction, match.width, match.elements) for match in (one, other)]
    calls = [find_maker(match.below, match.name).call for match in (one, other)]
    return kinds[0] == kinds[1] and (one.below is other.below or (calls[0] is calls[1] is not None))


def _quoted() -> str:
    return ", ".join(map(repr, LOSSES))
