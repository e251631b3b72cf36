"""A loss whose autograd graph begins with a node: torch's functions, and what is written by hand in their place."""

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lit_lipschitz.bounds.families import Reduction
from lit_lipschitz.bounds.loss_spec import LOSSES, find_spec
from lit_lipschitz.recognition.autograd_nodes import VIEWS, dim_of, nodes_below, only_below

_REDUCTIONS: dict[int, Reduction] = {1: "mean", 2: "sum"}
BY_HAND: dict[str, Reduction] = {
    "MeanBackward0": "mean",
    "MeanBackward1": "mean",
    "SumBackward0": "sum",
    "SumBackward1": "sum",
}
_RESHAPES = ("ViewBackward0", "UnsafeViewBackward0", "SqueezeBackward0", "UnsqueezeBackward0")


@dataclass(frozen=True)
class Match:
    """The nodes of a recognised loss.

    Attributes:
        name: The loss's name.
        node: The node whose saved tensors tell the loss's arguments; of the products, for probabilities as targets.
        below: The node that made the outputs that it is taken of.
        reduction: How the losses of the examples were put together.
        each: Whether that was a mean or a sum over what was not reduced, with the ignored targets as zeros.
        label_smoothing: Probability that is spread over all classes.
        log_softmax: The node of a cross-entropy's log-softmax.
        divisor: Of a sum, where it is made in steps of which some are means.
    """

    name: str
    node: Any
    below: Any
    reduction: Reduction
    each: bool = False
    label_smoothing: float = 0.0
    log_softmax: Any = None
    divisor: int = 1

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
            return probabilities.numel() // probabilities.shape[dim_of(self.log_softmax, probabilities.ndim)]
        if self.name == "mean_absolute_error":
            return self.node._saved_self.numel()
        return self.node._saved_target.numel()

    def rows(self, num_outputs: int) -> int:
        """Examples, tokens or pixels."""
        return max(1, self.elements // num_outputs) if LOSSES[self.name].per_output else self.elements

    @property
    def width(self) -> int | None:
        """Classes of a cross-entropy."""
        if self.log_softmax is None:
            return None
        result = self.log_softmax._saved_result
        return result.shape[dim_of(self.log_softmax, result.ndim)]

    @property
    def logits(self) -> int:
        """Outputs that the loss is taken of."""
        return self.elements if self.log_softmax is None else self.log_softmax._saved_result.numel()


def find_match(node: Any) -> Match | None:
    """The loss whose graph begins with a node."""
    if node.name() in BY_HAND:
        return _match_by_hand(node)
    if node.name() == "AddBackward0":
        return _match_smoothed(node)
    if node.name().startswith("DivBackward"):
        return _match_probabilities(node)
    reduction = _REDUCTIONS.get(getattr(node, "_saved_reduction", None) or 0)
    return None if reduction is None else _match_reduced(node, reduction)


def _match_by_hand(node: Any) -> Match | None:
    """The mean or the sum, in one step or several, of losses that were not reduced."""
    below, divisor, means, sums = node, 1, 0, 0
    while below is not None and (below.name() in BY_HAND or below.name() in _RESHAPES):
        if below.name() in BY_HAND:
            mean = BY_HAND[below.name()] == "mean"
            means, sums = means + mean, sums + (not mean)
            divisor *= _reduced(below) if mean else 1
        below = only_below(below)
    if below is None:
        return None
    reduction: Reduction = "sum" if sums else "mean"
    divisor = divisor if sums else 1
    if below.name() == "AbsBackward0":
        difference = only_below(below)
        outputs = only_below(difference) if difference is not None and difference.name() == "SubBackward0" else None
        return None if outputs is None else Match("mean_absolute_error", below, outputs, reduction, divisor=divisor)
    if getattr(below, "_saved_reduction", None) != 0:
        return None
    match = _match_reduced(below, reduction, each=True)
    return None if match is None else replace(match, divisor=divisor)


def _reduced(node: Any) -> int:
    """How many numbers each result of a mean is the mean of."""
    sizes, dims = node._saved_self_sym_sizes, getattr(node, "_saved_dim", None)
    return math.prod(sizes[dim if dim < 2**63 else dim - 2**64] for dim in dims) if dims else math.prod(sizes)


def _match_reduced(node: Any, reduction: Reduction, each: bool = False, smoothing: float = 0.0) -> Match | None:
    """A loss that torch has a function for."""
    if node.name().startswith("NllLoss"):
        below = only_below(node)
        # Log-probabilities that are clamped have the gradient of the cross-entropy, or none: the constants hold.
        while below is not None and below.name() in (*VIEWS, "ClampBackward0", "ClampBackward1"):
            below = nodes_below(below)[0]
        if below is None or below.name() != "LogSoftmaxBackward0":
            return None
        return Match("cross_entropy", node, nodes_below(below)[0], reduction, each, smoothing, below)
    below = only_below(node)
    if below is None:
        return None
    if node.name() == "BinaryCrossEntropyBackward0":
        while below.name() in VIEWS:
            below = nodes_below(below)[0]
        if below.name() != "SigmoidBackward0":
            return None
        return Match("binary_cross_entropy", node, nodes_below(below)[0], reduction, each)
    spec = find_spec(node.name())
    return None if spec is None else Match(spec.name, node, below, reduction, each)


def _match_smoothed(node: Any) -> Match | None:
    """Label smoothing: (1 - s) * nll + s / k * sum of the log-probabilities; torch makes both terms by MulBackward1."""
    terms = nodes_below(node)
    if len(terms) != 2 or any(term.name() != "MulBackward1" for term in terms):
        return None
    nll, rest = (nodes_below(term)[0] for term in terms)
    reduction = _REDUCTIONS.get(getattr(nll, "_saved_reduction", None) or 0)
    if reduction is None or not nll.name().startswith("NllLoss") or rest.name() not in ("DivBackward0", "SumBackward0"):
        return None
    return _match_reduced(nll, reduction, smoothing=1 - float(terms[0]._saved_other))


def _match_probabilities(node: Any) -> Match | None:
    """Probabilities as targets: minus the sum of target times log-probability, over the rows."""
    names = ("NegBackward0", "SumBackward0", "MulBackward0", "LogSoftmaxBackward0")
    below = node
    product = None
    for name in names:
        below = only_below(below)
        if below is None or below.name() != name:
            return None
        product = below if name == "MulBackward0" else product
    return Match("cross_entropy", product, nodes_below(below)[0], "mean", log_softmax=below)
