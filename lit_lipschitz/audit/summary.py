"""Statistics of layer gradients over the audited steps, and what they say about L; plain numbers only."""

import math
import statistics
from array import array
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field

from lit_lipschitz.bounds.families import Bound

_ROUNDING = 1e-5  # relative float32 error of the norm of a gradient that attains the bound


@dataclass
class LayerSummary:
    """Statistics of one layer's gradient over the audited steps."""

    name: str  #: its name as in ``named_modules()``
    norms: "array[float]" = field(default_factory=lambda: array("d"), repr=False)  #: Euclidean, of finite gradients
    nonfinite: int = 0  #: steps in which its gradient was not finite; they count nowhere else
    largest_entry: float = 0.0  #: largest absolute entry
    largest_by_norm: int = 0  #: steps in which no layer's norm was larger
    largest_by_entry: int = 0  #: steps in which no layer's largest entry was larger
    compared: int = 0  #: steps in which there was a constant L that bounds gradients
    largest_ratio: float | None = None  #: largest norm / L; None if nothing was compared
    exceeded: int = 0  #: steps in which the norm was above L by more than float32 rounding

    @property
    def steps(self) -> int:
        """Audited steps in which it had a gradient."""
        return len(self.norms)

    @property
    def median_norm(self) -> float:
        """Median norm of its gradient; NaN without a step."""
        return statistics.median(self.norms) if self.norms else math.nan

    @property
    def largest_norm(self) -> float:
        """Largest norm of its gradient; 0 without a step."""
        return max(self.norms, default=0.0)

    def compare(self, norm: float, constant: float) -> None:
        """Counts a step that has a constant."""
        self.compared += 1
        self.largest_ratio = max(self.largest_ratio or 0.0, norm / constant)
        self.exceeded += _exceeds(norm, constant)


@dataclass(frozen=True)
class AuditSummary:
    """Statistics of all layers' gradients over the audited steps."""

    bound: Bound  #: family of L
    steps: int  #: audited steps with finite gradients; all numbers refer to these
    nonfinite: int  #: audited steps in which some gradient was not finite
    head: str | None  #: name of the head, or None before it is known
    layers: tuple[LayerSummary, ...]  #: the layers that had a gradient, in network order
    #: largest norm of another layer's gradient over the head's in the same step; above 1 the premise is violated; None
    #: without a step in which both had one
    largest_over_head: float | None
    largest_other: str  #: name of that layer
    compared: int  #: steps in which there was a constant L that bounds gradients
    bounded: int  #: steps among these in which no layer's norm was above L

    @property
    def head_layer(self) -> LayerSummary | None:
        """Statistics of the head; None if it had no gradient."""
        return next((layer for layer in self.layers if layer.name == self.head and layer.steps), None)

    @property
    def verdicts(self) -> list[str]:
        """Conclusions about the premise, about L and, if there were any, about non-finite steps, one sentence each."""
        lost = f"Gradients were not finite in {self.nonfinite} audited steps, which are not counted."
        sentences = [self._premise(), *self._comparison()] if self.steps else ["No gradient was audited."]
        return [*sentences, lost] if self.nonfinite else sentences

    def _premise(self) -> str:
        head = self.head_layer
        if head is None:
            return f"The head{f' {self.head}' if self.head else ''} had no gradient of its own in any audited step."
        sentence = (
            f"The head's gradient had the largest norm in {head.largest_by_norm} of {head.steps} audited steps, and "
            f"the largest entry in {head.largest_by_entry}"
        )
        if self.largest_over_head is None:
            return f"{sentence}."
        factor = f"{self.largest_over_head:.3g}"
        return (
            f"{sentence}; the norm of another layer ({self.largest_other}) was up to {factor} times that of the head."
        )

    def _comparison(self) -> list[str]:
        if self.bound == "smooth":
            return ["L was not compared: the constant of bound='smooth' bounds the Hessian, not the gradient."]
        if not self.compared:
            return ["L was not compared: in no audited step was the learning rate computed from a constant."]
        sentences = []
        head = self.head_layer
        if head is not None and head.compared:
            sentences.append(
                f"L bounded the head's gradient in {head.compared - head.exceeded} of {head.compared} steps; "
                f"the largest norm / L was {head.largest_ratio:.3g}."
            )
        worst = max(self.layers, key=lambda layer: layer.largest_ratio or 0.0)
        sentences.append(
            f"L bounded every layer's gradient in {self.bounded} of {self.compared} steps; the largest "
            f"norm / L was {worst.largest_ratio or 0.0:.3g} ({worst.name})."
        )
        return sentences


class AuditTally:
    """Accumulates the statistics of an audit step by step; ``bound`` is the family of L.

    Example:
        >>> tally = AuditTally()
        >>> tally.add({"body": (2.0, 1.0), "head": (1.0, 0.5)}, constant=1.5, head="head")
        True
        >>> tally.summary("head", order=["body", "head"]).largest_over_head
        2.0
    """

    def __init__(self, bound: Bound = "strict") -> None:
        self.bound: Bound = bound
        self.steps = self.nonfinite = self.compared = self.bounded = 0
        self._largest_over_head: tuple[float, str] | None = None
        self._layers: dict[str, LayerSummary] = {}

    def add(self, gradients: Mapping[str, tuple[float, float]], constant: float | None, head: str | None) -> bool:
        """Adds a step with the norm and the largest absolute entry of each layer's gradient, and L if it bounds them.

        Returns whether all gradients were finite; a step that is not counts as non-finite and nowhere else.
        """
        lost = [name for name, sizes in gradients.items() if not all(map(math.isfinite, sizes))]
        for name in gradients:
            self._layers.setdefault(name, LayerSummary(name)).nonfinite += name in lost
        if lost:
            self.nonfinite += 1
            return False
        self.steps += 1
        largest_norm, largest_entry = (max(sizes) for sizes in zip(*gradients.values(), strict=True))
        for name, (norm, entry) in gradients.items():
            layer = self._layers[name]
            layer.norms.append(norm)
            layer.largest_entry = max(layer.largest_entry, entry)
            layer.largest_by_norm += norm == largest_norm
            layer.largest_by_entry += entry == largest_entry
            if constant:
                layer.compare(norm, constant)
        if constant:
            self.compared += 1
            self.bounded += not _exceeds(largest_norm, constant)
        if head is not None and head in gradients and len(gradients) > 1:
            self._compare_with_head(gradients, head)
        return True

    def _compare_with_head(self, gradients: Mapping[str, tuple[float, float]], head: str) -> None:
        other = max((name for name in gradients if name != head), key=lambda name: gradients[name][0])
        largest, own = gradients[other][0], gradients[head][0]
        factor = largest / own if own else math.inf if largest else 0.0
        if self._largest_over_head is None or factor > self._largest_over_head[0]:
            self._largest_over_head = factor, other

    def summary(self, head: str | None, order: list[str]) -> AuditSummary:
        """The statistics so far; layers that are not in ``order``, as they were removed during training, come last."""
        factor, other = self._largest_over_head or (None, "")
        names = dict.fromkeys([*order, *self._layers])
        return AuditSummary(
            bound=self.bound,
            steps=self.steps,
            nonfinite=self.nonfinite,
            head=head,
            layers=tuple(deepcopy(self._layers[name]) for name in names if name in self._layers),
            largest_over_head=factor,
            largest_other=other,
            compared=self.compared,
            bounded=self.bounded,
        )


def step_metrics(
    gradients: Mapping[str, tuple[float, float]], constant: float | None, head: str | None
) -> dict[str, float]:
    """Metrics of one audited step for loggers; arguments as for :meth:`AuditTally.add`.

    Example:
        >>> step_metrics({"body": (2.0, 1.0), "head": (1.0, 0.5)}, constant=4.0, head="head")
        {'audit/body/ratio': 0.5, 'audit/head/ratio': 0.25, 'audit/largest_layer': 0.0, 'audit/largest_is_head': 0.0}
    """
    metric, unit = ("ratio", constant) if constant else ("gradient", 1.0)
    metrics = {f"audit/{name}/{metric}": norm / unit for name, (norm, _) in gradients.items()}
    norms = [norm for norm, _ in gradients.values()]
    metrics["audit/largest_layer"] = float(norms.index(max(norms)))
    if head is not None and head in gradients:
        metrics["audit/largest_is_head"] = float(gradients[head][0] == max(norms))
    return metrics


def _exceeds(norm: float, constant: float) -> bool:
    return norm > constant * (1 + _ROUNDING)
