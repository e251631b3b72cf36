"""Patterns of autograd nodes by which a loss is recognised: torch's functions, and manual reductions of them."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_lipschitz.bounds.families import Reduction
from lit_lipschitz.bounds.loss_spec import LOSSES, find_spec
from lit_lipschitz.recognition.autograd_nodes import Factors, GraphReader, dim_of, signed

_REDUCTIONS: dict[Any, Reduction] = {1: "mean", 2: "sum"}  # torch's numbers
_MEANS, _SUMS = ("MeanBackward0", "MeanBackward1"), ("SumBackward0", "SumBackward1")
MANUAL_REDUCTIONS = (*_MEANS, *_SUMS)
_RESHAPES = ("ViewBackward0", "UnsafeViewBackward0", "SqueezeBackward0", "UnsqueezeBackward0")


class LossMatch(NamedTuple):
    """A recognised loss in the graph."""

    name: str  # in LOSSES
    node: Any  # saves the loss's arguments; if the targets are probabilities, their product with the log-probabilities
    below: Any  # the node that made the logits
    reduction: Reduction
    unreduced: bool = False  # whether it was computed with reduction="none" and reduced later, ignored targets as zeros
    label_smoothing: float = 0.0
    log_softmax: Any = None  # the node, of a cross-entropy
    factors: Factors = ()  # in front of the mean or the sum

    @property
    def probabilities(self) -> Tensor | None:
        """The targets of a cross-entropy, if they are probabilities of the classes."""
        if self.name != "cross_entropy" or self.node.name().startswith("NllLoss"):
            return None
        return self.node._saved_self if self.node._saved_other is None else self.node._saved_other

    @property
    def elements(self) -> int:
        """Number of losses that are reduced: targets of a cross-entropy, outputs of other losses."""
        if (probabilities := self.probabilities) is not None:
            return probabilities.numel() // probabilities.shape[dim_of(self.log_softmax, probabilities.ndim)]
        if self.name == "mean_absolute_error":
            return self.node._saved_self.numel()
        return self.node._saved_target.numel()

    def rows(self, num_outputs: int) -> int:
        """Number of examples, tokens or pixels."""
        return max(1, self.elements // num_outputs) if LOSSES[self.name].per_output else self.elements

    @property
    def num_classes(self) -> int | None:
        """Classes of a cross-entropy; None for other losses."""
        if self.log_softmax is None:
            return None
        result = self.log_softmax._saved_result
        return result.shape[dim_of(self.log_softmax, result.ndim)]


def match_loss(graph: GraphReader, node: Any) -> LossMatch | None:
    """The loss whose graph begins with a node, or None."""
    if node.name() in MANUAL_REDUCTIONS:
        return _match_manual_reduction(graph, node)
    if node.name() == "AddBackward0":
        return _match_label_smoothing(graph, node)
    if node.name().startswith("DivBackward"):
        return _match_probabilities(graph, node)
    reduction = _REDUCTIONS.get(getattr(node, "_saved_reduction", None))
    return None if reduction is None else _match_function(graph, node, reduction)


def _match_manual_reduction(graph: GraphReader, node: Any) -> LossMatch | None:
    """The mean or the sum, in one or several steps, of losses that were not reduced."""
    below, divisor = node, 1
    reduction: Reduction = "mean"
    while below is not None and below.name() in (*MANUAL_REDUCTIONS, *_RESHAPES):
        if below.name() in _MEANS:
            divisor *= _num_reduced(below)
        elif below.name() in _SUMS:
            reduction = "sum"
        below = graph.only_below(below)
    if below is None:
        return None
    factors: Factors = ((torch.tensor(float(divisor)), True),) if reduction == "sum" and divisor != 1 else ()
    if below.name() == "AbsBackward0":
        difference = graph.only_below(below)
        outputs = (
            graph.only_below(difference) if difference is not None and difference.name() == "SubBackward0" else None
        )
        return None if outputs is None else LossMatch("mean_absolute_error", below, outputs, reduction, factors=factors)
    unreduced = getattr(below, "_saved_reduction", None) == 0
    match = _match_function(graph, below, reduction) if unreduced else None
    return None if match is None else match._replace(unreduced=True, factors=factors)


def _num_reduced(node: Any) -> int:
    """How many numbers each result of a mean is the mean of."""
    sizes, dims = node._saved_self_sym_sizes, getattr(node, "_saved_dim", None)
    return math.prod(sizes[signed(dim)] for dim in dims) if dims else math.prod(sizes)


def _match_function(graph: GraphReader, node: Any, reduction: Reduction) -> LossMatch | None:
    """A loss that torch computes in one node, possibly of a log-softmax or a sigmoid."""
    below = graph.only_below(node)
    if below is None:
        return None
    if node.name().startswith("NllLoss"):
        # Clamped log-probabilities have the gradient of the cross-entropy, or none: the constants hold.
        below = graph.below_views(below, "ClampBackward0", "ClampBackward1")
        if below.name() != "LogSoftmaxBackward0":
            return None
        return LossMatch("cross_entropy", node, graph.below(below)[0], reduction, log_softmax=below)
    if node.name() == "BinaryCrossEntropyBackward0":
        below = graph.below_views(below)
        if below.name() != "SigmoidBackward0":
            return None
        return LossMatch("binary_cross_entropy", node, graph.below(below)[0], reduction)
    spec = find_spec(node.name())
    return None if spec is None else LossMatch(spec.name, node, below, reduction)


def _match_label_smoothing(graph: GraphReader, node: Any) -> LossMatch | None:
    """(1 - s) * nll + s / k * sum of the log-probabilities; torch makes both terms by MulBackward1."""
    terms = graph.below(node)
    if len(terms) != 2 or any(term.name() != "MulBackward1" for term in terms):
        return None
    nll, rest = (graph.below(term)[0] for term in terms)
    reduction = _REDUCTIONS.get(getattr(nll, "_saved_reduction", None))
    if reduction is None or not nll.name().startswith("NllLoss") or rest.name() not in ("DivBackward0", "SumBackward0"):
        return None
    match = _match_function(graph, nll, reduction)
    return None if match is None else match._replace(label_smoothing=1 - float(terms[0]._saved_other))


def _match_probabilities(graph: GraphReader, node: Any) -> LossMatch | None:
    """Probabilities as targets: minus the sum of target times log-probability, over the number of rows."""
    below, product = node, None
    for name in ("NegBackward0", "SumBackward0", "MulBackward0", "LogSoftmaxBackward0"):
        below = graph.only_below(below)
        if below is None or below.name() != name:
            return None
        product = below if name == "MulBackward0" else product
    return LossMatch("cross_entropy", product, graph.below(below)[0], "mean", log_softmax=below)
