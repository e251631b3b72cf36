"""Finds the output layers of any loss: the affine maps that its autograd graph meets first on each path."""

import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from lit_lipschitz.recognition.affine import same_weight, weight_of
from lit_lipschitz.recognition.autograd_nodes import CHECKPOINT, VIEWS, GraphReader


@dataclass(frozen=True)
class OutputLayer:
    """One call of an affine map, as the graph shows it before the backward."""

    node: Any  # of the autograd graph; its incoming gradient is that of the outputs
    parameters: tuple[Tensor, ...]  # of its weight, the same for all calls: one, or those that it is computed from
    inputs: Tensor | None  # what the weight multiplies; None for one-hot rows
    outputs_dim: int | None  # dimension of the outputs in the gradient; None if the gradient is one row
    copies: int = 1  # in how many rows an input value counts at most, as in the patches of a convolution
    has_bias: bool = False

    @property
    def is_parameter(self) -> bool:
        """Whether this is a parameter as the output of itself."""
        return self.outputs_dim is None


@dataclass(frozen=True)
class HiddenLayers:
    """Code whose layers the graph does not show, since it is one node of it."""

    node: Any
    parameters: dict[Tensor, int]  # with their positions among the inputs of the node; empty if it does not show them
    below: tuple[Any, ...] = ()  # nodes that made the inputs of the node, if it may have no layer

    @property
    def is_compiled(self) -> bool:
        """Whether the code is compiled, and not run again in the backward."""
        return bool(self.parameters)


COMPILED = "CompiledFunction"
"""Begins the names of the nodes of compiled code."""
_LOOKUPS = (
    "EmbeddingBackward0",
    "EmbeddingBagBackward0",
    "GatherBackward0",
    "IndexBackward0",
    "IndexSelectBackward0",
)
"""Nodes whose result depends on data, the indices, though the graph shows a parameter alone."""


@dataclass(frozen=True)
class _Affine:
    """How to read the call of an affine map from its node."""

    # By the position of the weight: where the inputs are saved, and the dimension of the outputs in the gradient.
    inputs: dict[int, tuple[str, int]]
    factors: tuple[int, ...]  # positions of what it multiplies
    added: int | None = None  # position of what it adds


_AFFINE = {
    "LinearBackward0": _Affine({1: ("_saved_input", -1)}, (0, 1), 2),
    "AddmmBackward0": _Affine({1: ("_saved_mat2", 0), 2: ("_saved_mat1", -1)}, (1, 2), 0),
    "MmBackward0": _Affine({0: ("_saved_mat2", 0), 1: ("_saved_self", -1)}, (0, 1)),
    "BmmBackward0": _Affine({0: ("_saved_mat2", 1), 1: ("_saved_self", -1)}, (0, 1)),
    "BaddbmmBackward0": _Affine({1: ("_saved_batch2", 1), 2: ("_saved_batch1", -1)}, (1, 2), 0),
    "MvBackward0": _Affine({0: ("_saved_vec", 0), 1: ("_saved_self", 1)}, (0, 1)),
    "AddmvBackward0": _Affine({1: ("_saved_vec", 0), 2: ("_saved_mat", 1)}, (1, 2), 0),
    "DotBackward0": _Affine({0: ("_saved_tensor", 1), 1: ("_saved_self", 1)}, (0, 1)),
    "TrilinearBackward0": _Affine(dict.fromkeys(range(3), ("_saved_i1", -1)), (0, 1, 2)),
    "ConvolutionBackward0": _Affine({1: ("_saved_input", 1)}, (0, 1), 2),
    "EmbeddingBackward0": _Affine({0: ("", -1)}, (0,)),
}


def _inputs_of(node: Any, saved: str, outputs_dim: int) -> Tensor | None:
    """What the weight of a call multiplies, one row a row of the outputs; None for one-hot rows."""
    if not saved:
        return None
    inputs: Tensor = getattr(node, saved)
    if node.name() == "TrilinearBackward0":
        # The features of a bilinear map are the products of those of both inputs.
        return (inputs.flatten(1).norm(dim=1) * node._saved_i3.flatten(1).norm(dim=1))[:, None]
    if inputs.ndim == 1:
        return inputs[None]
    return inputs.T if outputs_dim == 0 else inputs


def _copies(node: Any, weight: tuple[Any, int]) -> int:
    """In how many patches of a convolution an input value is at most."""
    maker, index = weight  # the weight itself is saved only if the input needs a gradient
    kernel = maker._input_metadata[index].shape[2:]
    if node._saved_transposed:
        return math.prod(kernel)
    return math.prod(math.ceil(size / stride) for size, stride in zip(kernel, node._saved_stride, strict=True))


class OutputLayerSearch:
    """Finds the output layers in the graph below some nodes; searches once for each set of owners."""

    def __init__(self, graph: GraphReader, *roots: Any) -> None:
        self._graph, self._roots = graph, roots
        self._layers: dict[frozenset[Tensor] | None, Sequence[OutputLayer | HiddenLayers]] = {}
        self._calls: dict[Any, OutputLayer | None] = {}  # by the node
        self._made_of_parameters: dict[Any, bool] = {}  # by the node
        self._biased = set[Any]()  # nodes of products to which a bias is added

    def layers(self, owned: Set[Tensor] | None = None) -> Sequence[OutputLayer | HiddenLayers]:
        """The calls of affine maps that the graph meets first on each path.

        Args:
            owned: Parameters of which one must be in the weight of a map, such as those of an optimizer; None for all.

        Returns:
            Linear layers, convolutions, bilinear layers, embeddings and matrix products with a parameter, or with a
            weight that is computed from parameters alone, and compiled or checkpointed code, which may contain some.
            If the graph has none of these, the parameters that it meets, each as its own output.
        """
        owner = None if owned is None else frozenset(owned)
        if owner not in self._layers:
            self._layers[owner] = self._find_layers(owner)
        return self._layers[owner]

    def _find_layers(self, owned: frozenset[Tensor] | None) -> Sequence[OutputLayer | HiddenLayers]:
        layers, leaves = list[OutputLayer | HiddenLayers](), list[OutputLayer]()

        def is_passed(node: Any) -> bool:
            if (hidden := self._hidden(node, owned)) is not None:
                layers.append(hidden)
                return False
            self._find_bias(node)
            layer = self._call(node)
            if layer is not None and (owned is None or any(p in owned for p in layer.parameters)):
                layers.append(layer)
                return False
            parameter = getattr(node, "variable", None)
            if isinstance(parameter, nn.Parameter) and (owned is None or parameter in owned):
                leaves.append(OutputLayer(node, (parameter,), None, None))
            return True

        self._visit(is_passed)
        return layers or leaves

    def _find_bias(self, node: Any) -> None:
        """Notes the product that a node adds a bias to, as a linear layer whose inputs are not contiguous has it."""
        if node.name() != "AddBackward0":
            return
        summands = self._graph.below(node)
        products = [part for part in summands if getattr(self._graph.leaf(part), "ndim", 0) != 1]
        if len(products) == 1 < len(summands):
            product = products[0]
            while product.name() in VIEWS:
                product = self._graph.below(product)[0]
            self._biased.add(product)

    def _hidden(self, node: Any, owned: frozenset[Tensor] | None) -> HiddenLayers | None:
        """The code of a node that hides layers; None for other nodes, and for compiled code without a weight."""
        name = node.name()
        if name.startswith(CHECKPOINT) and hasattr(node, "run_function"):
            return HiddenLayers(node, {}, tuple(self._graph.below(node)))
        if not name.startswith(COMPILED):
            return None
        inputs = [getattr(operand, "variable", None) for operand, _ in self._graph.edges(node)]
        parameters: dict[Tensor, int] = {
            leaf: position
            for position, leaf in enumerate(inputs)
            if isinstance(leaf, nn.Parameter) and (owned is None or leaf in owned)
        }
        return HiddenLayers(node, parameters) if any(p.ndim > 1 for p in parameters) else None

    @cached_property
    def weights(self) -> list[Tensor]:
        """The weights of the affine layers that the graph meets first on each path; views of frozen ones."""
        weights = list[Tensor]()

        def is_passed(node: Any) -> bool:
            weight = weight_of(self._graph, node)
            if weight is not None and not any(same_weight(weight, other) for other in weights):
                weights.append(weight)
            return weight is None

        self._visit(is_passed)
        return weights

    def _visit(self, is_passed: Callable[[Any], bool]) -> None:
        """Visits each node below the roots once, and the nodes below it if it is passed."""
        stack, seen = [*self._roots], {None}
        while stack:
            node = stack.pop()
            if node not in seen:
                seen.add(node)
                if is_passed(node):
                    stack.extend(self._graph.below(node))

    def _call(self, node: Any) -> OutputLayer | None:
        """The call of an affine map; None for other nodes, and for products without a weight, as in attention."""
        if node not in self._calls:
            self._calls[node] = self._read_call(node)
        return self._calls[node]

    def _read_call(self, node: Any) -> OutputLayer | None:
        kind = _AFFINE.get(node.name())
        if kind is None or self._is_power_iteration(node):
            return None
        pairs = [(i, self._graph.operand(node, i)) for i in kind.factors]
        weights = [
            i for i, factor in pairs if factor is not None and isinstance(self._graph.leaf(factor), nn.Parameter)
        ]
        if len(weights) != 1:  # the weight is computed, or a factor is one of several parameters
            weights = [i for i, factor in pairs if self._is_made_of_parameters(factor)]
        others = [position for position in kind.factors if position not in weights]
        if not weights or (not others and len(kind.factors) > 1):
            return None
        position = weights[-1]
        if position not in kind.inputs:  # a parameter is what a convolution is of
            return None
        saved, outputs_dim = kind.inputs[position]
        added = None if kind.added is None else self._graph.operand(node, kind.added)
        return OutputLayer(
            node,
            self._parameters_of(self._graph.operand(node, position)),
            _inputs_of(node, saved, outputs_dim),
            outputs_dim,
            _copies(node, self._graph.edges(node)[position]) if node.name() == "ConvolutionBackward0" else 1,
            has_bias=hasattr(added, "variable") or node in self._biased,
        )

    def _parameters_of(self, weight: Any) -> tuple[Tensor, ...]:
        """The parameters that a weight is, or is computed from."""
        stack, seen, found = [weight], set(), list[Tensor]()
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                found.append(node.variable)
            stack.extend(self._graph.below(node))
        return tuple(found)

    def _is_made_of_parameters(self, node: Any) -> bool:
        """Whether a node is made from parameters alone, such as a weight with weight normalisation."""
        if node is None:
            return False
        stack, known = [node], self._made_of_parameters
        while stack:
            current = stack[-1]
            if current in known:
                stack.pop()
                continue
            if hasattr(current, "variable"):
                # An input may require gradients too, as for a gradient penalty.
                known[current] = isinstance(current.variable, nn.Parameter)
                continue
            if self._uses_data(current):
                known[current] = False
                continue
            below = self._graph.below(current)
            unknown = [operand for operand in below if operand not in known]
            if unknown:
                stack.extend(unknown)
            else:
                known[current] = bool(below) and all(known[operand] for operand in below)
        return known[node]

    def _uses_data(self, node: Any) -> bool:
        """Whether a node has data as an input; what needs no gradient in an elementwise product may be a mask."""
        name = node.name()
        if name in _LOOKUPS:
            return True
        if "Norm" in name or "Rnn" in name:  # a normalisation or a recurrent layer of inputs
            return self._graph.operand(node, 0) is None
        return name in _AFFINE and None in self._factors(node) and not self._is_power_iteration(node)

    def _is_power_iteration(self, node: Any) -> bool:
        """Whether a node is a parameter times a single constant vector, as in a spectral norm."""
        name, factors = node.name(), self._factors(node)
        return None in factors and (name == "DotBackward0" or (name == "MvBackward0" and factors[1] is None))

    def _factors(self, node: Any) -> list[Any]:
        """The operands that an affine map multiplies, without what it adds."""
        return [self._graph.operand(node, i) for i in _AFFINE[node.name()].factors]
