"""Finds the output layers of any loss: the affine maps that its autograd graph meets first on each path."""

import math
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lit_lipschitz.recognition.autograd_nodes import leaf_of, nodes_below


@dataclass(frozen=True)
class OutputLayer:
    """One call of an affine map, as the graph shows it before the backward."""

    node: Any  # of the autograd graph; its incoming gradient is that of the outputs
    parameters: tuple[Tensor, ...]  # of its weight, the same for all calls: one, or those that it is computed from
    inputs: Tensor | None  # what the weight multiplies; None for one-hot rows
    outputs_dim: int | None  # dimension of the outputs in the gradient; None if the gradient is one row
    copies: int = 1  # in how many rows an input value counts at most, as in the patches of a convolution
    has_bias: bool = False


def output_layers(root: Any, owned: Container[Tensor] | None = None) -> list[OutputLayer]:
    """The calls of affine maps that a graph meets first on each path.

    Args:
        root: The node of a loss.
        owned: Parameters of which one must be in the weight of a map, such as those of an optimizer; None for all.

    Returns:
        Linear layers, convolutions, bilinear layers, embeddings and matrix products with a parameter, or with a weight
        that is computed from parameters alone. If the graph shows no such call, the parameters that it meets, each as
        the output of itself; empty behind a node of ``HIDING``.
    """
    graphs, leaves = _ParameterGraphs(), list[OutputLayer]()
    layers, stack, seen = list[OutputLayer](), [root], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen or node.name().startswith(HIDING):
            continue
        seen.add(node)
        layer = _affine_call(node, graphs)
        if layer is not None and (owned is None or any(p in owned for p in layer.parameters)):
            layers.append(layer)
            continue
        parameter = getattr(node, "variable", None)
        if isinstance(parameter, nn.Parameter) and (owned is None or parameter in owned):
            leaves.append(OutputLayer(node, (parameter,), None, None))
        stack.extend(nodes_below(node))
    return layers or leaves


HIDING = ("CompiledFunction", "CheckpointFunction")
"""Beginnings of the names of nodes that hide layers, of compiled code and of reentrant activation checkpointing."""
_LOOKUPS = (
    "EmbeddingBackward0",
    "EmbeddingBagBackward0",
    "GatherBackward0",
    "IndexBackward0",
    "IndexSelectBackward0",
)
"""Nodes whose result depends on data, the indices, though the graph shows a parameter alone."""


class _ParameterGraphs:
    """Tells the parts of a graph that depend on parameters alone, such as a weight with weight normalisation."""

    def __init__(self) -> None:
        self._known: dict[Any, bool] = {}

    def contains(self, node: Any) -> bool:
        """Whether a node is made from parameters alone."""
        if node is None:
            return False
        stack = [node]
        while stack:
            current = stack[-1]
            if current in self._known:
                stack.pop()
                continue
            if hasattr(current, "variable"):
                # An input may require gradients too, as for a gradient penalty.
                self._known[current] = isinstance(current.variable, nn.Parameter)
                continue
            if _uses_data(current):
                self._known[current] = False
                continue
            below = nodes_below(current)
            unknown = [operand for operand in below if operand not in self._known]
            if unknown:
                stack.extend(unknown)
            else:
                self._known[current] = bool(below) and all(self._known[operand] for operand in below)
        return self._known[node]


def _uses_data(node: Any) -> bool:
    """Whether a node has data as an input; what needs no gradient in an elementwise product may be a mask."""
    name = node.name()
    if name in _LOOKUPS:
        return True
    if "Norm" in name or "Rnn" in name:  # a normalisation or a recurrent layer of inputs
        return node.next_functions[0][0] is None
    return name in _AFFINE and None in _factors(node) and not _is_power_iteration(node)


def _is_power_iteration(node: Any) -> bool:
    """Whether a node is a parameter times a single constant vector, as in a spectral norm."""
    factors = _factors(node)
    return None in factors and (node.name() == "DotBackward0" or (node.name() == "MvBackward0" and factors[1] is None))


def _factors(node: Any) -> list[Any]:
    """The operands that an affine map multiplies, without what it adds."""
    return [node.next_functions[i][0] for i in _AFFINE[node.name()].factors]


@dataclass(frozen=True)
class _Affine:
    """The positions of a node's factors, and how to read its call if the factor at a position is a weight."""

    factors: tuple[int, ...]
    read: Callable[[Any, int, tuple[Tensor, ...]], OutputLayer | None]


def _affine_call(node: Any, parameters: _ParameterGraphs) -> OutputLayer | None:
    """The call of an affine map; None for other nodes, and for products without a weight, as in attention."""
    kind = _AFFINE.get(node.name())
    if kind is None or _is_power_iteration(node):
        return None
    pairs = [(i, node.next_functions[i][0]) for i in kind.factors]
    weights = [i for i, factor in pairs if factor is not None and isinstance(leaf_of(factor), nn.Parameter)]
    if len(weights) != 1:  # the weight is computed, or a factor is one of several parameters
        weights = [i for i, factor in pairs if parameters.contains(factor)]
    others = [position for position in kind.factors if position not in weights]
    if not weights or (not others and len(kind.factors) > 1):
        return None
    return kind.read(node, weights[-1], _parameters_of(node.next_functions[weights[-1]][0]))


def _parameters_of(weight: Any) -> tuple[Tensor, ...]:
    """The parameters that a weight is, or is computed from."""
    stack, seen, found = [weight], set(), list[Tensor]()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        stack.extend(nodes_below(node))
    return tuple(found)


def _has_bias(node: Any, position: int) -> bool:
    added, _ = node.next_functions[position]
    return added is not None and hasattr(added, "variable")


def _read_addmm(node: Any, position: int, weight: tuple[Tensor, ...]) -> OutputLayer:
    bias = _has_bias(node, 0)
    if position == 2:
        return OutputLayer(node, weight, node._saved_mat1, -1, has_bias=bias)
    return OutputLayer(node, weight, node._saved_mat2.T, 0, has_bias=bias)


def _read_mm(node: Any, position: int, weight: tuple[Tensor, ...]) -> OutputLayer:
    if position == 1:
        return OutputLayer(node, weight, node._saved_self, -1)
    return OutputLayer(node, weight, node._saved_mat2.T, 0)


def _read_bmm(node: Any, position: int, weight: tuple[Tensor, ...]) -> OutputLayer:
    last = position == 1
    return OutputLayer(node, weight, node._saved_self if last else node._saved_mat2, -1 if last else 1)


def _read_baddbmm(node: Any, position: int, weight: tuple[Tensor, ...]) -> OutputLayer:
    last = position == 2
    inputs = node._saved_batch1 if last else node._saved_batch2
    return OutputLayer(node, weight, inputs, -1 if last else 1, has_bias=_has_bias(node, 0))


def _read_mv(node: Any, position: int, weight: tuple[Tensor, ...]) -> OutputLayer:
    if position == 1:  # a vector of weights: one output a row
        return OutputLayer(node, weight, node._saved_self, 1)
    return OutputLayer(node, weight, node._saved_vec[None], 0)


def _read_addmv(node: Any, position: int, weight: tuple[Tensor, ...]) -> OutputLayer:
    bias = _has_bias(node, 0)
    if position == 2:
        return OutputLayer(node, weight, node._saved_mat, 1, has_bias=bias)
    return OutputLayer(node, weight, node._saved_vec[None], 0, has_bias=bias)


def _read_dot(node: Any, position: int, weight: tuple[Tensor, ...]) -> OutputLayer:
    inputs = node._saved_self if position == 1 else node._saved_tensor
    return OutputLayer(node, weight, inputs[None], 1)


def _read_trilinear(node: Any, position: int, weight: tuple[Tensor, ...]) -> OutputLayer:
    # The features of a bilinear map are the products of those of both inputs.
    first, second = (part.flatten(1).norm(dim=1) for part in (node._saved_i1, node._saved_i3))
    return OutputLayer(node, weight, (first * second)[:, None], -1)


def _read_convolution(node: Any, position: int, weight: tuple[Tensor, ...]) -> OutputLayer | None:
    if position == 0:  # a parameter is the image
        return None
    weight_node, index = node.next_functions[1]  # the weight itself is saved only if the input needs a gradient
    kernel = weight_node._input_metadata[index].shape[2:]
    if node._saved_transposed:
        copies = math.prod(kernel)
    else:
        copies = math.prod(math.ceil(size / stride) for size, stride in zip(kernel, node._saved_stride, strict=True))
    return OutputLayer(node, weight, node._saved_input, 1, copies=copies, has_bias=_has_bias(node, 2))


def _read_embedding(node: Any, position: int, weight: tuple[Tensor, ...]) -> OutputLayer:
    return OutputLayer(node, weight, None, -1)


_AFFINE = {
    "AddmmBackward0": _Affine((1, 2), _read_addmm),
    "MmBackward0": _Affine((0, 1), _read_mm),
    "BmmBackward0": _Affine((0, 1), _read_bmm),
    "BaddbmmBackward0": _Affine((1, 2), _read_baddbmm),
    "MvBackward0": _Affine((0, 1), _read_mv),
    "AddmvBackward0": _Affine((1, 2), _read_addmv),
    "DotBackward0": _Affine((0, 1), _read_dot),
    "TrilinearBackward0": _Affine((0, 1, 2), _read_trilinear),
    "ConvolutionBackward0": _Affine((0, 1), _read_convolution),
    "EmbeddingBackward0": _Affine((0,), _read_embedding),
}
