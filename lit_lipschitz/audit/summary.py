"""Statistics of layer gradients over the audited steps, and what they say about L; plain numbers only."""

import math
import statistics
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field

from lit_lipschitz.bounds.families import Bound

_ROUNDING = 1e-5  # relative float32 error of the norm of a gradient that attains the bound


@dataclass(frozen=True)
class LayerSummary:
    """Statistics of one layer's gradient over the audited steps. Norms are Euclidean.

    Attributes:
        name: The layer's name as in ``named_modules()``.
        steps: Audited steps in which it had a gradient.
        nonfinite: Steps in which its gradient was not finite; they count nowhere else.
        median_norm: Median norm of its gradient; NaN without a step.
        largest_norm: Largest norm.
        largest_entry: Largest absolute entry.
        largest_by_norm: Steps in which no layer's norm was larger.
        largest_by_entry: Steps in which no layer's largest entry was larger.
        compared: Steps in which there was a constant L that bounds gradients.
        largest_ratio: Largest norm / L; None if nothing was compared.
        exceeded: Steps in which the norm was above L by more than float32 rounding.
    """

    name: str
    steps: int
    nonfinite: int
    median_norm: float
    largest_norm: float
    largest_entry: float
    largest_by_norm: int
    largest_by_entry: int
    compared: int
    largest_ratio: float | None
    exceeded: int


@dataclass(frozen=True)
class AuditSummary:
    """Statistics of all layers' gradients over the audited steps.

    Attributes:
        bound: Family of L.
        steps: Audited steps with finite gradients; all numbers refer to these.
        nonfinite: Audited steps in which some gradient was not finite.
        head: Name of the head, or None before it is known.
        layers: The layers that had a gradient, in network order.
        largest_over_head: Largest norm of another layer's gradient over the head's in the same step; above 1 the
            premise is violated. None without a step in which both had one.
        largest_other: Name of that layer.
        compared: Steps in which there was a constant L that bounds gradients.
        bounded: Steps among these in which no layer's norm was above L.
    """

    bound: Bound
    steps: int
    nonfinite: int
    head: str | None
    layers: tuple[LayerSummary, ...]
    largest_over_head: float | None
    largest_other: str
    compared: int
    bounded: int

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
            f"The head's gradient was the largest in {head.largest_by_norm} of {head.steps} audited steps (by norm; "
            f"{head.largest_by_entry} by largest entry)"
        )
        if self.largest_over_head is None:
            return f"{sentence}."
        return (
            f"{sentence}; another layer's was up to {self.largest_over_head:.3g} times its norm ({self.largest_other})."
        )

    def _comparison(self) -> list[str]:
        if self.bound == "smooth":
            return ["L was not compared: the constant of bound='smooth' bounds the Hessian, not the gradient."]
        if not self.compared:
            return ["L was not compared: no audited step's rate came from a constant."]
        sentences = []
        head = self.head_layer
        if head is not None and head.compared:
            sentences.append(
                f"L bounded the head's gradient in {head.compared - head.exceeded} of {head.compared} steps; "
                f"largest factor {head.largest_ratio:.3g}."
            )
        worst = max(self.layers, key=lambda layer: layer.largest_ratio or 0.0)
        sentences.append(
            f"L bounded every layer's gradient in {self.bounded} of {self.compared} steps; largest factor "
            f"{worst.largest_ratio or 0.0:.3g}, layer {worst.name}."
        )
        return sentences


@dataclass
class _LayerTally:
    """Running statistics of one layer."""

    norms: "array[float]" = field(default_factory=lambda: array("d"))
    largest_entry: float = 0.0
    largest_by_norm: int = 0
    largest_by_entry: int = 0
    compared: int = 0
    largest_ratio: float = 0.0
    exceeded: int = 0
    nonfinite: int = 0

    def compare(self, norm: float, constant: float) -> None:
        self.compared += 1
        self.largest_ratio = max(self.largest_ratio, norm / constant)
        self.exceeded += _exceeds(norm, constant)

    def summary(self, name: str) -> LayerSummary:
        return LayerSummary(
            name=name,
            steps=len(self.norms),
            nonfinite=self.nonfinite,
            median_norm=statistics.median(self.norms) if self.norms else math.nan,
            largest_norm=max(self.norms, default=0.0),
            largest_entry=self.largest_entry,
            largest_by_norm=self.largest_by_norm,
            largest_by_entry=self.largest_by_entry,
            compared=self.compared,
            largest_ratio=self.largest_ratio if self.compared else None,
            exceeded=self.exceeded,
        )


class AuditTally:
    """Accumulates the statistics of an audit step by step.

    Args:
        bound: Family of L.

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
        self._layers: dict[str, _LayerTally] = {}

    def add(self, gradients: Mapping[str, tuple[float, float]], constant: float | None, head: str | None) -> bool:
        """Adds a step.

        Args:
            gradients: Norm and largest absolute entry of each layer's gradient.
            constant: L of the step, if it bounds gradients.
            head: Name of the head, if it is known.

        Returns:
            Whether all gradients were finite; a step that is not counts as non-finite and nowhere else.
        """
        lost = [name for name, sizes in gradients.items() if not all(map(math.isfinite, sizes))]
        for name in gradients:
            self._layers.setdefault(name, _LayerTally()).nonfinite += name in lost
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
        factor = _ratio(gradients[other][0], gradients[head][0])
        if self._largest_over_head is None or factor > self._largest_over_head[0]:
            self._largest_over_head = factor, other

    def summary(self, head: str | None, order: list[str]) -> AuditSummary:
        """The statistics so far.

        Args:
            head: Name of the head, if it is known.
            order: Names of the network's layers; others, which were removed during training, come last.
        """
        factor, other = self._largest_over_head or (None, "")
        names = dict.fromkeys([*order, *self._layers])
        return AuditSummary(
            bound=self.bound,
            steps=self.steps,
            nonfinite=self.nonfinite,
            head=head,
            layers=tuple(self._layers[name].summary(name) for name in names if name in self._layers),
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
    if constant:
        metrics = {f"audit/{name}/ratio": norm / constant for name, (norm, _) in gradients.items()}
    else:
        metrics = {f"audit/{name}/gradient": norm for name, (norm, _) in gradients.items()}
    norms = [norm for norm, _ in gradients.values()]
    metrics["audit/largest_layer"] = float(norms.index(max(norms)))
    if head is not None and head in gradients:
        metrics["audit/largest_is_head"] = float(gradients[head][0] == max(norms))
    return metrics


def _exceeds(norm: float, constant: float) -> bool:
    return norm > constant * (1 + _ROUNDING)


def _ratio(norm: float, other: float) -> float:
    if other:
        return norm / other
    return math.inf if norm else 0.0
