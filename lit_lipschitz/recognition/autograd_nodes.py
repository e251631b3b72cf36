"""Helpers to read torch's autograd graph: the nodes below a node, their factors, their parameters.

Names and saved attributes of the nodes are those of torch 2.8 to 2.14.
"""

import re
from collections import deque
from collections.abc import Iterator
from typing import Any

from torch import Tensor

# Nodes that DistributedDataParallel, gradient hooks of modules and fully_shard add.
IDENTITIES = frozenset(
    ("_DDPSinkBackward", "BackwardHookFunctionBackward", "RegisterPostBackwardFunctionBackward", "CloneBackward0")
)
_VIEWS = ("T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Alias", "Squeeze", "Unsqueeze")
_COPIES = ("ToCopy", "Clone")
VIEWS = IDENTITIES | {f"{name}Backward{version}" for name in (*_VIEWS, *_COPIES) for version in (0, 1)}
CHECKPOINT = "CheckpointFunction"
"""Begins the name of the node of activation checkpointing that hides the layers (``use_reentrant=True``)."""
Factors = tuple[tuple[Tensor, bool], ...]
"""Scalar factors, each with whether it divides rather than multiplies."""


class GraphReader:
    """The nodes of one autograd graph, each of which is read once, whoever asks."""

    def __init__(self) -> None:
        self._edges: dict[Any, tuple[tuple[Any, int], ...]] = {}

    def edges(self, node: Any) -> tuple[tuple[Any, int], ...]:
        """The nodes that made a node's inputs, None for one that needs no gradient, and which results these are."""
        found = self._edges.get(node)
        if found is None:
            found = self._edges[node] = node.next_functions
        return found

    def operand(self, node: Any, position: int) -> Any:
        """The node that made a node's input at a position; None if that needs no gradient."""
        return self.edges(node)[position][0]

    def below(self, node: Any) -> list[Any]:
        """The nodes below a node, without inputs that need no gradient."""
        return [operand for operand, _ in self.edges(node) if operand is not None]

    def only_below(self, node: Any) -> Any:
        """The single node below a node; None if there are none or several."""
        below = self.below(node)
        return below[0] if len(below) == 1 else None

    def below_views(self, node: Any, *others: str) -> Any:
        """The first node from a node on that is neither a view nor one of the others."""
        while node.name() in VIEWS or node.name() in others:
            node = self.below(node)[0]
        return node

    def leaf(self, node: Any) -> Tensor | None:
        """The parameter that a node accumulates the gradient of, possibly behind views; None for other nodes."""
        return getattr(self.below_views(node), "variable", None)

    def factor(self, node: Any) -> Tensor | None:
        """The scalar that a node multiplies by or divides by; None for other nodes."""
        if node.name() not in ("DivBackward0", "MulBackward0") or (below := self.only_below(node)) is None:
            return None
        other = getattr(node, "_saved_other", None)
        if other is None and node.name() == "MulBackward0":
            other = getattr(node, "_saved_self", None)
        # The negated sum over the rows, divided by their number, is the cross-entropy with probabilities as targets.
        return None if other is None or other.numel() != 1 or below.name() == "NegBackward0" else other

    def take_factors(self, node: Any) -> tuple[Factors, Any]:
        """The scalar factors at the top of a graph, and the node below them."""
        factors: Factors = ()
        while (factor := self.factor(node)) is not None or node.name() in IDENTITIES:
            if factor is not None:
                factors += ((factor, node.name() == "DivBackward0"),)
            node = self.below(node)[0]
        return factors, node

    def names(self, node: Any, limit: int = 4) -> tuple[str, ...]:
        """The short names of a node and of the first nodes below it, for messages."""
        names: list[str] = []
        while node is not None and len(names) < limit and not node.name().endswith("AccumulateGrad"):
            names.append(short_name(node))
            node = next(iter(self.below(node)), None)
        return tuple(names)


def signed(number: int) -> int:
    """A number that a node saves; torch saves a negative one as an unsigned number."""
    return number - 2**64 if number >= 2**63 else number


def dim_of(node: Any, ndim: int) -> int:
    """The saved dimension of a node, counted from 0."""
    return signed(node._saved_dim) % ndim


def product_of(factors: Factors) -> float | Tensor:
    """The product of the factors; a float if all are on the CPU."""
    product: Any = 1.0
    for factor, divide in factors:
        value: Any = float(factor) if factor.device.type == "cpu" else factor
        product = product / value if divide else product * value
    return product


def short_name(node: Any) -> str:
    """A node's name without the suffix that all have."""
    return re.sub(r"Backward\d$", "", node.name())


def beginning_of(node: Any, length: int = 4) -> str:
    """The names of the first nodes below one, each the first input of that above: enough to tell losses apart."""
    names: list[str] = []
    for _ in range(length):
        if node is None:
            break
        names.append(node.name())
        below = node.next_functions
        node = below[0][0] if below else None
    return " ".join(names)


def parameters_below(node: Any) -> Iterator[Tensor | None]:
    """The tensors whose gradients a graph computes, nearest first; None for code that hides some of them."""
    seen, queue = {node}, deque([node])
    while queue:
        node = queue.popleft()
        variable = getattr(node, "variable", None)
        if variable is not None:
            yield variable
        elif node.name().startswith(CHECKPOINT):
            yield None
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                queue.append(below)
