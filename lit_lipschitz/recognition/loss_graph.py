"""Recognises a loss, and the output layer behind it, in its autograd graph; a graph of other nodes is refused."""

import math
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lit_lipschitz.bounds.loss_spec import LOSSES, Loss
from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.recognition.affine import AffineSource, is_call, logit_scale_of, same_weight, trace_to_affine
from lit_lipschitz.recognition.autograd_nodes import (
    CHECKPOINT,
    VIEWS,
    Factors,
    GraphReader,
    dim_of,
    product_of,
    short_name,
)
from lit_lipschitz.recognition.loss_patterns import MANUAL_REDUCTIONS, LossMatch, match_loss
from lit_lipschitz.recognition.output_layers import (
    COMPILED,
    HiddenLayers,
    OutputLayer,
    OutputLayerSearch,
)


@dataclass(frozen=True)
class FoundLoss:
    """A loss that was recognised in the graph, and the affine layer that made its logits."""

    loss: Loss
    scale: float = 1.0  # factor of its mean or sum
    head_weight: Tensor | None = None  # a view of it if it is frozen; None if the graph hides it, as when compiled
    unrecognised: tuple[str, ...] = ()  # names of the nodes between the loss and the layer that are not understood
    behind_activation: tuple[str, ...] = ()  # the same, if an activation with derivatives of at most 1 stands between
    rows: int = 0  # examples, tokens or pixels, including ignored ones
    head_rows: int = 0  # of the layer's outputs in the loss; more than `rows` if its classes are positions
    num_outputs: int | None = None  # of the layer that enter the loss, or classes; None if unknown
    rows_per_target: int = 1  # of the layer's outputs, among which one target of a cross-entropy is chosen
    pooled: bool = False  # whether the layer's outputs are averaged over positions, or upsampled, before the loss
    calls: int = 1  # of the layer whose outputs are concatenated
    concatenated: bool = False  # whether outputs are concatenated, of one call or several
    inputs: Tensor | None = None  # of the layer, if it was called once and the graph saves them
    saved: tuple[Any, ...] = ()  # what the graph saves of the loss's arguments
    plain: bool = False  # whether the loss is that of the outputs of one call themselves


_NOT_TRACED = AffineSource()


@dataclass  # not frozen, which takes longer than all the rest of reading a batch
class BatchLoss:
    """A loss in one batch; tensors stay on their device."""

    count: int | Tensor  # examples, tokens or pixels that are reduced
    elements: int | Tensor  # the same times the outputs, if the mean is over these too
    scale: float | Tensor  # factor of the mean or the sum
    rows: int  # examples, tokens or pixels, including ignored ones
    outputs: tuple[Tensor, ...] = ()  # and targets, of losses whose constant depends on their norms
    calls: int = 1  # of the affine layer whose outputs are concatenated
    logit_scale: float | Tensor = 1.0  # factor of the layer's outputs, such as a temperature
    terms: int = 1  # losses of the same logits that are added up


@dataclass(frozen=True)
class LogitEdge:
    """Where the gradient with respect to the logits enters the graph below the loss."""

    node: Any  # the node that made the logits
    index: int  # which of its results they are
    dim: int | None  # of the classes of a cross-entropy, counted from 0; None for other losses
    head_weight: Tensor | None  # of the affine layer behind them; None if the graph does not show it


class LossGraph:
    """The autograd graph of a loss, walked once for all questions about one backward.

    The loss is a recognised one, multiplied or divided by scalars, or a sum of several of one kind with the same
    logits, as in mixup. If the user named it, only terms of that name in a sum are considered.
    """

    def __init__(self, loss: Tensor, name: str | None = None) -> None:
        self._root, self._name = loss.grad_fn, name
        self._reader = GraphReader()
        self._traced: dict[Any, AffineSource] = {}
        self._search = OutputLayerSearch(self._reader, self._root)

    @cached_property
    def _terms(self) -> list[LossMatch]:
        return [] if self._root is None else self._terms_below(self._root, self._name)

    def found(self, head: Tensor | None = None) -> FoundLoss | None:
        """The loss, with the sum of its terms' factors; None without a term of the given name and head weight."""
        if self._name is not None:
            return self._found_named(head)
        if self._root is None:
            raise ConfigurationError(
                "LipschitzLR looked for the loss in its autograd graph and found a tensor without a graph; return a "
                "loss from training_step that depends on trainable parameters, or pass loss= with the name of the loss "
                f"(one of {_quoted()})"
            )
        terms = [self._describe(term) for term in self._terms]
        if terms and all(term.loss == terms[0].loss for term in terms):
            return replace(terms[0], scale=sum(abs(term.scale) for term in terms)) if len(terms) > 1 else terms[0]
        raise ConfigurationError(_not_recognised(self._reader, self._root))

    def _found_named(self, head: Tensor | None) -> FoundLoss | None:
        terms = [self._describe(term) for term in self._of_head(self._terms, head)]
        if not terms:
            return None
        first = terms[0]
        if any(not same_weight(term.head_weight, first.head_weight) or term.loss != first.loss for term in terms[1:]):
            raise ConfigurationError(
                f"LipschitzLR(loss={self._name!r}) looked for one such term of the loss and found {len(terms)} of "
                "different heads or kinds; pass head= with the name of the layer to measure"
            )
        return replace(first, scale=sum(abs(term.scale) for term in terms))

    def batch(self, name: str, num_outputs: int, head: Tensor | None = None, trace: bool = True) -> BatchLoss | None:
        """The recognised loss in this batch, without a host synchronisation; None if the graph shows another one."""
        # Tracing counts the layer's calls and finds the factor of its outputs; it takes as long as all the rest.
        terms = [term for term in self._terms if term.name == name]
        terms = self._of_head(terms, head) if len(terms) > 1 else terms
        losses = [self._read(term, num_outputs, trace) for term in terms]
        return _combine(losses) if len(losses) > 1 else next(iter(losses), None)

    def agrees(self, found: FoundLoss, head: Tensor | None = None) -> bool:
        """Whether all terms are the loss that another batch showed, with the same arguments, of the same layer."""
        terms = self._of_head(self._terms, head)
        return bool(terms) and all(self._term_agrees(term, found) for term in terms)

    def _term_agrees(self, match: LossMatch, found: FoundLoss) -> bool:
        loss = found.loss
        if match.name != loss.name or match.reduction != loss.reduction:
            return False
        if not all(map(_same_value, _saved_arguments(match), found.saved)):
            return False
        if found.plain and is_call(self._reader, match.below, found.head_weight):
            return True
        source, num_classes = self._source(match), match.num_classes
        sharded = hasattr(found.head_weight, "full_tensor")  # the graph has another tensor each time
        return (
            (num_classes or source.num_outputs) == found.num_outputs
            and (source.pooled, source.concatenated) == (found.pooled, found.concatenated)
            and bool(source.unrecognised) == bool(found.unrecognised)
            and (sharded or same_weight(source.weight, found.head_weight))
        )

    def edges(self, name: str) -> list[LogitEdge]:
        """Where the gradients with respect to the logits of a recognised loss enter the graph below, each once."""
        edges = [self._edge(term) for term in self._terms if term.name == name]
        return list({(edge.node, edge.index): edge for edge in edges}.values())

    def compiled_outputs(self) -> tuple[Tensor, int | None] | None:
        """The outputs of compiled code that a recognised loss is computed from directly, if the graph saves them.

        Of a cross-entropy, their log-softmax, and its dimension.
        """
        match = next(iter(self._terms), None)
        if match is None or not match.below.name().startswith(COMPILED):
            return None
        if match.log_softmax is not None:
            result: Tensor = match.log_softmax._saved_result
            return result, dim_of(match.log_softmax, result.ndim)
        direct = any(below is match.below for below in self._reader.below(match.node))
        saves = hasattr(match.node, "_saved_self") and hasattr(match.node, "_saved_target")
        return (_outputs_and_targets(self._reader, match)[0], None) if direct and saves else None

    def other_loss(self) -> str | None:
        """Name of a recognised loss that is not the one that the user named; None without."""
        if self._root is None or self._name is None or self._terms:
            return None
        terms = self._terms_below(self._root, None)
        return terms[0].name if terms else None

    def function_of_loss(self) -> str | None:
        """Name of a function that is applied to the reduced loss, such as the root of a mean square; None without."""
        stack = [self._root]
        while stack:
            node = stack.pop()
            if node is None or node.name() in MANUAL_REDUCTIONS or match_loss(self._reader, node) is not None:
                continue
            below = [part for part, index in self._reader.edges(node) if part is not None and _is_scalar(part, index)]
            if below and len(below) == len(self._reader.below(node)) and not _is_linear(self._reader, node):
                return short_name(node)
            stack.extend(below)
        return None

    def output_layers(self, owned: Set[Tensor] | None = None) -> Sequence[OutputLayer | HiddenLayers]:
        """The calls of affine maps, of parameters ``owned`` if given, that the graph meets first on each path."""
        return self._search.layers(owned)

    @property
    def first_affine_maps(self) -> list[Tensor]:
        """The weights of the affine layers that the graph meets first on each path; views of frozen ones."""
        return self._search.weights

    def _terms_below(self, node: Any, name: str | None) -> list[LossMatch]:
        """The loss that a graph begins with, or several with the same logits; of a named loss, its terms in a sum."""
        terms = list[LossMatch]()
        stack: list[tuple[Factors, Any]] = [((), node)]
        while stack:
            outer, node = stack.pop()
            factors, node = self._reader.take_factors(node)
            factors, match = outer + factors, match_loss(self._reader, node)
            if match is not None and name in (None, match.name):
                terms.append(match._replace(factors=factors + match.factors))
            elif (below := _same_gradient(self._reader, node)) is not None:
                stack.append((factors, below))
            elif node.name() in ("AddBackward0", "SubBackward0") and node._saved_alpha == 1:
                stack.extend((factors, part) for part in reversed(self._reader.below(node)))
            elif name is None:
                return []
        usable = name is not None or all(self._alike(terms[0], term) for term in terms[1:])
        return terms if usable else []

    def _alike(self, one: LossMatch, other: LossMatch) -> bool:
        """Whether two losses are of one kind and of the outputs of one call, so that their gradients have one bound."""
        kinds = [(match.name, match.reduction, match.num_classes, match.elements) for match in (one, other)]
        calls = [self._source(match).node for match in (one, other)]
        return kinds[0] == kinds[1] and (one.below is other.below or (calls[0] is calls[1] is not None))

    def _source(self, match: LossMatch) -> AffineSource:
        """The affine layer behind a loss, traced once."""
        if match.below not in self._traced:
            self._traced[match.below] = trace_to_affine(
                self._reader, match.below, through_activations=match.log_softmax is None
            )
        return self._traced[match.below]

    def _of_head(self, terms: list[LossMatch], head: Tensor | None) -> list[LossMatch]:
        """The terms with a head; if there are none, those whose head the graph does not show."""
        if head is None:
            return terms
        own = [term for term in terms if same_weight(self._source(term).weight, head)]
        return own or [term for term in terms if self._source(term).weight is None]

    def _describe(self, match: LossMatch) -> FoundLoss:
        source = self._source(match)
        num_outputs = match.num_classes or source.num_outputs
        top = short_name(match.log_softmax or match.node)
        unrecognised, behind_activation = (
            (top, *names) if names else () for names in (source.unrecognised, source.behind_activation)
        )
        rows = match.rows(num_outputs or 1)
        head_rows, rows_per_target = rows, 1
        if match.num_classes and source.num_outputs and match.num_classes % source.num_outputs == 0:
            head_rows = match.log_softmax._saved_result.numel() // source.num_outputs
            rows_per_target = match.num_classes // source.num_outputs
        return FoundLoss(
            loss=_loss_of(match, named=self._name is not None),
            scale=float(product_of(match.factors)),
            head_weight=source.weight,
            unrecognised=unrecognised,
            behind_activation=behind_activation,
            rows=rows,
            head_rows=head_rows,
            num_outputs=num_outputs,
            rows_per_target=rows_per_target,
            pooled=source.pooled,
            calls=source.calls,
            concatenated=source.concatenated,
            inputs=source.inputs,
            saved=_saved_arguments(match),
            plain=source.node is match.below,
        )

    def _edge(self, match: LossMatch) -> LogitEdge:
        node, weight = match.log_softmax or match.node, self._source(match).weight
        dim = None if match.log_softmax is None else dim_of(match.log_softmax, match.log_softmax._saved_result.ndim)
        while True:
            for below, index in self._reader.edges(node):
                if below is match.below:
                    return LogitEdge(below, index, dim, weight)
            node = self._reader.below(node)[0]

    def _read(self, match: LossMatch, num_outputs: int, trace: bool) -> BatchLoss:
        scale = product_of(match.factors)
        source = self._source(match) if trace else _NOT_TRACED
        logit_scale: Any = abs(product_of(logit_scale_of(self._reader, match.below))) if source.unrecognised else 1.0
        rows = match.rows(num_outputs)
        if match.log_softmax is None:
            outputs = _outputs_and_targets(self._reader, match) if LOSSES[match.name].needs_output_norm else ()
            return BatchLoss(rows, match.elements, scale, rows, outputs, source.calls, logit_scale)
        count: int | Tensor = match.elements
        if not match.unreduced and match.probabilities is None:
            count = match.node._saved_total_weight
            if match.node._saved_weight is not None:
                count = (match.node._saved_target != match.node._saved_ignore_index).sum()
        return BatchLoss(count, count, scale, rows, calls=source.calls, logit_scale=logit_scale)


def _saved_arguments(match: LossMatch) -> tuple[Any, ...]:
    """What the graph saves of a loss's arguments: numbers, and tensors such as class weights."""
    if match.log_softmax is not None:
        return match.label_smoothing, getattr(match.node, "_saved_weight", None)
    names = (*LOSSES[match.name].arguments.values(), "_saved_weight")
    return tuple(getattr(match.node, name, None) for name in names)


def _same_value(one: Any, other: Any) -> bool:
    """Whether an argument is the same number or tensor; only tensors that are made again in each batch are compared."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return one is other or (not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other)
    same = one.data_ptr() == other.data_ptr() and one._version == other._version
    return same or (one.shape == other.shape and torch.equal(one, other))


def _is_scalar(node: Any, index: int) -> bool:
    """Whether a result of a node has no dimension."""
    metadata = getattr(node, "_input_metadata", ())
    return index < len(metadata) and len(metadata[index].shape) == 0


def _is_linear(graph: GraphReader, node: Any) -> bool:
    """Whether a node of numbers adds, or multiplies by a constant."""
    name = node.name()
    if name in ("MulBackward0", "DivBackward0"):
        return len(graph.below(node)) == 1 and (name[0] == "M" or graph.operand(node, 0) is not None)
    return name in ("AddBackward0", "SubBackward0", "RsubBackward1", "NegBackward0", "ToCopyBackward0", *VIEWS)


def _outputs_and_targets(graph: GraphReader, match: LossMatch) -> tuple[Tensor, ...]:
    """The outputs and the targets, which is whichever argument has no gradient."""
    outputs = (match.node._saved_self.detach(), match.node._saved_target.detach())
    return outputs[::-1] if graph.operand(match.node, 0) is None else outputs


def _combine(losses: list[BatchLoss]) -> BatchLoss:
    """Several losses of the same logits as one, an upper bound: the smallest count, the largest outputs."""
    count, elements, outputs = losses[0].count, losses[0].elements, losses[0].outputs
    for loss in losses[1:]:
        count, elements = _minimum(count, loss.count), _minimum(elements, loss.elements)
        if [part.shape for part in loss.outputs] == [part.shape for part in outputs]:
            pairs = zip(outputs, loss.outputs, strict=True)
            outputs = tuple(torch.maximum(one.abs(), other.abs()) for one, other in pairs)
    scale: Any = sum(abs(loss.scale) for loss in losses)
    return replace(losses[0], count=count, elements=elements, scale=scale, outputs=outputs, terms=len(losses))


def _minimum(one: int | Tensor, other: int | Tensor) -> int | Tensor:
    """The smaller count, of which 0 is none: all targets of that term are ignored."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        one, other = torch.as_tensor(one), torch.as_tensor(other)
        return torch.where(torch.minimum(one, other) > 0, torch.minimum(one, other), torch.maximum(one, other))
    return min(one, other)


def _loss_of(match: LossMatch, named: bool) -> Loss:
    """The loss with its arguments, read to the host; of a loss that the user named, unknown arguments are ignored."""
    node, spec, reduction = match.node, LOSSES[match.name], match.reduction
    if match.probabilities is not None:
        _check_probabilities(match, match.probabilities, named)
        return spec.loss(reduction)
    if match.log_softmax is not None:
        weights = None if named and match.unreduced else node._saved_weight
        if weights is not None and match.unreduced:
            raise ConfigurationError(
                "LipschitzLR found a cross-entropy with class weights and reduction='none' that is averaged manually, "
                "for which it has no constant; use reduction='mean', or pass loss='cross_entropy' to ignore the weights"
            )
        values = None if weights is None else tuple(float(weight) for weight in weights.tolist())
        return spec.loss(reduction, label_smoothing=match.label_smoothing, class_weights=values)
    known = named or "_saved_weight" in spec.arguments.values()
    if not known and getattr(node, "_saved_weight", None) is not None:
        raise ConfigurationError(
            f"LipschitzLR found a {match.name} with weight=, for which it has no constant; remove it, or pass "
            f"loss={match.name!r} to ignore the weights"
        )
    saved = {argument: getattr(node, attribute, None) for argument, attribute in spec.arguments.items()}
    arguments = {
        argument: float(value.max() if isinstance(value, Tensor) else value)
        for argument, value in saved.items()
        if value is not None
    }
    return spec.loss(reduction, **arguments)


def _check_probabilities(match: LossMatch, probabilities: Tensor, named: bool) -> None:
    totals = probabilities.float().sum(dim=dim_of(match.log_softmax, probabilities.ndim))
    if not named and not torch.allclose(totals, torch.ones_like(totals), atol=1e-2):
        raise ConfigurationError(
            "LipschitzLR found a cross-entropy whose targets are probabilities that do not sum to 1 (those of "
            f"the first target sum to {float(totals.flatten()[0]):g}), for which it has no constant; make them sum to "
            "1, or pass loss='cross_entropy' to ignore the difference"
        )


def _same_gradient(graph: GraphReader, node: Any) -> Any:
    """The node below one that changes the gradient by its sign at most; None for other nodes."""
    name, below = node.name(), graph.only_below(node)
    if below is None:
        return None
    if name in ("AddBackward0", "SubBackward0", "RsubBackward1"):
        return below if node._saved_alpha == 1 else None
    if name in MANUAL_REDUCTIONS:
        return below if math.prod(node._saved_self_sym_sizes) == 1 else None
    return below if name in VIEWS or name == "NegBackward0" else None


def _not_recognised(graph: GraphReader, root: Any) -> str:
    """The message for a graph that is not recognised."""
    _, node = graph.take_factors(root)
    if node.name().startswith("CompiledFunction"):
        return (
            "LipschitzLR looked for the loss in its autograd graph and found a compiled function, which hides it; "
            "compile the network instead of the whole module, or pass loss= with the name of the loss (one of "
            f"{_quoted()})"
        )
    names = graph.names(node)
    if not names:
        return (
            "LipschitzLR looked for the loss in its autograd graph and found a tensor that was not computed from "
            "anything; return a loss from training_step that depends on the network's outputs"
        )
    return (
        f"LipschitzLR looked for a loss that it has a constant for ({', '.join(LOSSES)}) and found "
        f"{' > '.join(names)}; return one of them, or, if your loss is the mean of one of them, or a sum of it "
        f"and terms that can be ignored, pass its name as loss=; {other_ways(names)}"
    )


def other_ways(names: Iterable[str]) -> str:
    """What a message says on a loss or a layer that is not recognised, by the names of the nodes."""
    measured = "with the default bound= and norm= the constant of any loss is measured"
    if any(name.startswith(CHECKPOINT) for name in names):
        return f"use activation checkpointing with use_reentrant=False, which hides no layers; {measured}"
    return measured


def _quoted() -> str:
    return ", ".join(map(repr, LOSSES))
