"""Nodes of torch's autograd graph: what is below one, and what it multiplies by.

Names and saved tensors of the nodes are torch's (2.8 to 2.14).
"""

import re
from typing import Any

from torch import Tensor

# What DistributedDataParallel, hooks on a module's gradients and fully_shard put into a graph.
IDENTITIES = frozenset(
    ("_DDPSinkBackward", "BackwardHookFunctionBackward", "RegisterPostBackwardFunctionBackward", "CloneBackward0")
)
VIEWS = IDENTITIES | frozenset(
    f"{name}Backward{version}"
    for name in (
        *("T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Alias"),
        *("Squeeze", "Unsqueeze", "ToCopy", "Clone"),
    )
    for version in (0, 1)
)
Factors = list[tuple[Tensor, bool]]
"""Numbers that a loss is multiplied by, and whether it is divided by them."""


def nodes_below(node: Any) -> list[Any]:
    """The nodes below one, without the inputs that need no gradient."""
    return [following for following, _ in node.next_functions if following is not None]


def only_below(node: Any) -> Any:
    """The one node below, or None where there are none or several."""
    below = nodes_below(node)
    return below[0] if len(below) == 1 else None


def leaf_of(node: Any) -> Tensor | None:
    """The parameter whose gradient a node, or one below it past views, takes in; None where it is another node."""
    while node.name() in VIEWS:
        node = nodes_below(node)[0]
    return getattr(node, "variable", None)


def dim_of(node: Any, ndim: int) -> int:
    """A node's dimension, which torch shows as an unsigned number, counted from 0."""
    dim = int(node._saved_dim)
    dim = dim - 2**64 if dim >= 2**63 else dim
    return dim % ndim


def factor_of(node: Any) -> Tensor | None:
    """The number that a node multiplies by or divides by, on whichever side it stands; None for another node."""
    if node.name() not in ("DivBackward0", "MulBackward0") or only_below(node) is None:
        return None
    other = getattr(node, "_saved_other", None)
    if other is None and node.name() == "MulBackward0":
        other = getattr(node, "_saved_self", None)
    # Minus a sum over rows, divided by their number, is the cross-entropy with probabilities as targets.
    return None if other is None or other.numel() != 1 or nodes_below(node)[0].name() == "NegBackward0" else other


def take_factors(node: Any) -> tuple[Factors, Any]:
    """Takes factors off the top of a graph."""
    factors: Factors = []
    while (factor := factor_of(node)) is not None or node.name() in IDENTITIES:
        if factor is not None:
            factors.append((factor, node.name() == "DivBackward0"))
        node = nodes_below(node)[0]
    return factors, node


def product_of(factors: Factors) -> float | Tensor:
    """The product: a number of the host where the factors are."""
    product: Any = 1.0
    for factor, divide in factors:
        value: Any = float(factor) if factor.device.type == "cpu" else factor
        product = product / value if divide else product * value
    return product


def short_name(node: Any) -> str:
    """A node's name without what all have at its end."""
    return re.sub(r"Backward\d$", "", node.name())


def names_below(node: Any, limit: int = 4) -> list[str]:
    """The short names of a node and of the first ones below it, for messages."""
    names: list[str] = []
    while node is not None and len(names) < limit and not node.name().endswith("AccumulateGrad"):
        names.append(short_name(node))
        node = next(iter(nodes_below(node)), None)
    return names
