"""Traces a loss's input back to the affine layer that produced it, in the autograd graph."""

import re
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lit_lipschitz.recognition.autograd_nodes import VIEWS, Factors, GraphReader, dim_of, signed

# Derivatives of 0 and 1: neither a gradient nor a curvature is larger behind them.
_MASKS = ("ClampBackward0", "ClampBackward1", "ClampMinBackward0", "ClampMaxBackward0", "MaskedFillBackward0")
# Derivatives of at most 1 that vary: no gradient is larger behind them, but a curvature may be.
_ACTIVATIONS = ("SigmoidBackward0", "TanhBackward0", "ReluBackward0")
_PERMUTATIONS = ("TBackward0", "TransposeBackward0", "PermuteBackward0")
# Position of the weight among the inputs of each, and where the node saves the weight and the layer's input.
_AFFINE = {
    "AddmmBackward0": (2, "_saved_mat2", "_saved_mat1"),
    "MmBackward0": (1, "_saved_mat2", "_saved_self"),
    "LinearBackward0": (1, "_saved_weight", "_saved_input"),
    "ConvolutionBackward0": (1, "_saved_weight", "_saved_input"),
}
_POOLS = ("MeanBackward1", "AdaptiveAvgPool2DBackward0", "AvgPool2DBackward0")
_ASSIGNMENT = "torch::autograd::CopySlices"


@dataclass(frozen=True)
class AffineSource:
    """The affine layer that produced the outputs."""

    weight: Tensor | None = None  # a view of it if it is frozen; None if the graph does not show it
    unrecognised: tuple[str, ...] = ()  # names of the nodes between the outputs and the layer, if not understood
    pooled: bool = False  # whether its outputs are averaged over positions, or upsampled
    calls: int = 1  # of the layer whose outputs are concatenated
    num_outputs: int | None = None  # that are used; None if the graph does not tell
    behind_activation: tuple[str, ...] = ()  # names of the nodes between, if one is an activation of _ACTIVATIONS
    node: Any = None  # of the call, if there is only one
    concatenated: bool = False  # whether outputs are concatenated, of one call or several

    @property
    def inputs(self) -> Tensor | None:
        """The input of the layer, as its node saves it for the weight's gradient."""
        inputs = None if self.node is None else getattr(self.node, _AFFINE[self.node.name()][2], None)
        return None if inputs is None else inputs.detach()


@dataclass(frozen=True)
class _Slice:
    """A slice of a tensor along one dimension."""

    dim: int
    ndim: int
    size: int
    size_left: int
    selects_one: bool


@dataclass
class _Path:
    """The nodes between the outputs and the affine layer."""

    pooled: bool = False
    behind_activation: bool = False
    permuted: bool = False
    slices: tuple[_Slice, ...] = ()


def same_weight(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are the same weight, or views of it."""
    if one is None or other is None:
        return one is other
    return one is other or (one.data_ptr() == other.data_ptr() != 0 and one.numel() == other.numel())


def trace_to_affine(graph: GraphReader, node: Any, through_activations: bool) -> AffineSource:
    """Traces the outputs that a node made back to the affine layer, or to nodes that are not understood.

    Activations with derivatives of at most 1 may stand between, which make no gradient larger, but not with the
    cross-entropy, whose log-softmax they would be an input of.
    """
    start, path = node, _Path()
    while (below := _step(graph, node, path, through_activations)) is not None:
        node = below
    source = _concatenated(graph, node, start, through_activations) or _called(graph, node, start)
    if source.unrecognised:
        return source
    num_outputs, channels_last = source.num_outputs, node.name() != "ConvolutionBackward0"
    for part in reversed(path.slices):
        of_outputs = path.permuted or part.dim == (part.ndim - 1 if channels_last else 1)
        if num_outputs is not None and of_outputs and part.size == num_outputs:
            num_outputs = part.size_left
        elif part.selects_one and part.size > 1:  # one position
            return AffineSource(unrecognised=graph.names(start))
    behind_activation = graph.names(start) if path.behind_activation or source.behind_activation else ()
    return replace(source, pooled=path.pooled, num_outputs=num_outputs, behind_activation=behind_activation)


def _step(graph: GraphReader, node: Any, path: _Path, through_activations: bool) -> Any:
    """The node below one that is understood, which is noted in the path; None for any other node."""
    name = node.name()
    # A slice of the rows, or of the outputs, has a slice of their gradient.
    part = _slice(node)
    if part is not None:
        path.slices = (*path.slices, part)
    elif name in VIEWS or name in _MASKS:
        path.permuted = path.permuted or name in _PERMUTATIONS
    elif name == "AddBackward0" and (summand := _without_bias(graph, node)) is not None:
        return summand
    elif name in _POOLS or (path.pooled and name == "ReluBackward0") or _is_upsampling(node):
        path.pooled = True
    elif name in _ACTIVATIONS and through_activations:
        path.behind_activation = True
    else:
        return None
    return graph.below(node)[0]


def _called(graph: GraphReader, node: Any, start: Any) -> AffineSource:
    """The affine layer whose call is a node of the graph below ``start``."""
    name = node.name()
    if name.startswith("CompiledFunction"):
        return AffineSource()
    if name not in _AFFINE:
        return AffineSource(unrecognised=graph.names(start))
    weight = weight_of(graph, node)
    if weight is not None:
        num_outputs = weight.shape[0] if isinstance(weight, nn.Parameter) else None
        return AffineSource(weight, num_outputs=num_outputs, node=node)
    computed = graph.operand(node, _AFFINE[name][0])
    # A weight computed from other parameters, as by weight_norm, whose gradients differ.
    return (
        AffineSource()
        if computed is None
        else AffineSource(unrecognised=(*graph.names(start), "weight", *graph.names(computed)))
    )


def _concatenated(graph: GraphReader, node: Any, start: Any, through_activations: bool) -> AffineSource | None:
    """The affine layer that was called several times, if a node concatenates outputs; None for other nodes."""
    if node.name() in ("CatBackward0", "StackBackward0"):
        nodes = graph.below(node)
    elif node.name() == _ASSIGNMENT:
        nodes = []
        while node is not None and node.name() == _ASSIGNMENT:
            (base, _), *assigned = graph.edges(node)
            nodes += [part for part, _ in assigned if part is not None]
            node = base
        nodes += [] if node is None else [node]
    else:
        return None
    sources = [trace_to_affine(graph, part, through_activations) for part in nodes]
    first = sources[0]
    # Concatenated outputs come from one layer that was called several times, or from several layers.
    one_layer = all(same_weight(source.weight, first.weight) and not source.pooled for source in sources)
    if first.weight is None or not one_layer:
        return AffineSource(unrecognised=graph.names(start))
    calls = sum(source.calls for source in sources)
    behind_activation = next((source.behind_activation for source in sources if source.behind_activation), ())
    return replace(first, calls=calls, behind_activation=behind_activation, node=None, concatenated=True)


def _slice(node: Any) -> _Slice | None:
    """The slice that a node takes of a tensor; None for other nodes."""
    name = node.name()
    if name == "GatherBackward0":
        sizes, index = node._saved_self.shape, node._saved_index.shape
    elif name in ("SliceBackward0", "SelectBackward0", "SplitBackward0", "SplitWithSizesBackward0"):
        sizes = node._saved_self_sym_sizes
    else:
        return None
    dim = dim_of(node, len(sizes))
    size, left = sizes[dim], 1
    if name == "GatherBackward0" and index[dim] != 1:
        return None  # may take one output several times
    if name == "SliceBackward0":
        ends = slice(signed(node._saved_start), signed(node._saved_end), node._saved_step)
        left = len(range(*ends.indices(size)))
    elif name == "SplitBackward0":
        left = min(size, node._saved_split_size)
    elif name == "SplitWithSizesBackward0":
        left = max(node._saved_split_sizes)
    return _Slice(dim, len(sizes), size, left, name in ("SelectBackward0", "GatherBackward0"))


def _is_upsampling(node: Any) -> bool:
    """Whether a node upsamples by whole factors, so that each position has the same weight in the result.

    No row of the result is longer than the longest row, and norms of the whole grow at most by the square root of the
    number of rows.
    """
    name = node.name()
    if not re.match(r"Upsample(Nearest[123]|Linear1|Bilinear2|Trilinear3)DBackward", name):
        return False
    before, after = node._saved_self_sym_sizes[2:], node._saved_output_size
    ratios = [large / size for size, large in zip(before, after, strict=True)]
    given = [getattr(node, key) for key in dir(node) if key.startswith("_saved_scales")]
    whole = all(ratio >= 1 and ratio.is_integer() for ratio in ratios)
    return whole and {*given} <= {None, *ratios} and not getattr(node, "_saved_align_corners", False)


def logit_scale_of(graph: GraphReader, node: Any) -> Factors:
    """The scalar factors of a layer's outputs, such as a temperature; empty if the graph has more than that."""
    scale: Factors = ()
    while node.name() not in _AFFINE:
        factors, below = graph.take_factors(node)
        scale += factors
        if below is node:
            if not (node.name() in VIEWS or node.name() in _MASKS or _slice(node) is not None):
                return ()
            below = graph.below(node)[0]
        node = below
    return scale


def weight_of(graph: GraphReader, node: Any) -> Tensor | None:
    """The weight of an affine layer or a batched product; of a frozen layer the view that is saved; or None."""
    position, saved, _ = _AFFINE.get(node.name(), (None, "", ""))
    if position is None and node.name() != "BmmBackward0":  # of torch.einsum
        return None
    for leaf in map(graph.leaf, graph.below(node)):
        if isinstance(leaf, nn.Parameter) and (leaf.ndim > 1 or position is None):
            return leaf
    return None if position is None or graph.operand(node, position) is not None else getattr(node, saved, None)


def is_call(graph: GraphReader, node: Any, weight: Tensor | None) -> bool:
    """Whether a node is a call of the affine layer with a weight that trains."""
    if (name := node.name()) not in _AFFINE:
        return False
    computed = graph.operand(node, _AFFINE[name][0])
    return computed is not None and graph.leaf(computed) is weight


def _without_bias(graph: GraphReader, node: Any) -> Any:
    """The summand beside a bias or a constant; None if there are several."""
    summands = [(part, graph.leaf(part)) for part in graph.below(node)]
    others = [part for part, leaf in summands if not (isinstance(leaf, nn.Parameter) and leaf.ndim == 1)]
    return others[0] if len(others) == 1 else None
