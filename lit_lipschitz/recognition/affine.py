"""The affine map that made the outputs a loss is taken of, looked for in the autograd graph."""

import re
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lit_lipschitz.recognition.autograd_nodes import (
    VIEWS,
    Factors,
    dim_of,
    leaf_of,
    names_below,
    nodes_below,
    take_factors,
)

# Slopes of 0 and 1, so that neither a gradient nor a curvature is larger behind them.
_CUTS = ("ClampBackward0", "ClampBackward1", "ClampMinBackward0", "ClampMaxBackward0", "MaskedFillBackward0")
# Slopes of at most 1 that bend: no gradient is larger behind them, but a curvature may be.
_BENDS = ("SigmoidBackward0", "TanhBackward0", "ReluBackward0")
_MOVES = ("TBackward0", "TransposeBackward0", "PermuteBackward0")
# Where the weight stands among the inputs of each.
AFFINE = {"AddmmBackward0": 2, "MmBackward0": 1, "LinearBackward0": 1, "ConvolutionBackward0": 1}
_POOLS = ("MeanBackward1", "AdaptiveAvgPool2DBackward0", "AvgPool2DBackward0")
_WRITTEN = "torch::autograd::CopySlices"


@dataclass(frozen=True)
class Maker:
    """What has made the outputs.

    Attributes:
        weight: The affine map's weight, or a view of it where it is frozen; None where the graph does not tell.
        chain: What stands between, or in its place, where that is no affine map; else empty.
        pooled: Whether its outputs were averaged over places, or enlarged.
        calls: Calls of the map whose outputs were put together.
        outputs: How many of its outputs the loss is taken of, or None where the graph does not tell.
        bent: What stands between, where that is an activation with slopes of at most 1; else empty.
        call: The node of the one call, or None.
        joined: Whether the outputs were put together, of one call or several.
    """

    weight: Tensor | None = None
    chain: tuple[str, ...] = ()
    pooled: bool = False
    calls: int = 1
    outputs: int | None = None
    bent: tuple[str, ...] = ()
    call: Any = None
    joined: bool = False


@dataclass(frozen=True)
class _Part:
    """A part of a tensor along one dimension."""

    dim: int
    ndim: int
    size: int
    left: int
    selected: bool


def same_weight(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are one weight, or views of it."""
    if one is None or other is None:
        return one is other
    return one is other or (one.data_ptr() == other.data_ptr() != 0 and one.numel() == other.numel())


def find_maker(node: Any, loss: str) -> Maker:
    """The affine map behind the outputs that a loss is taken of, or the names of what stands between."""
    names, pooled, bent, moved, parts = tuple(names_below(node)), False, False, False, list[_Part]()
    while True:
        name = node.name()
        # A part of the rows, or of the outputs, has a part of their gradient.
        part = _part(node)
        if part is not None:
            parts.append(part)
            node = nodes_below(node)[0]
        elif name in VIEWS or name in _CUTS:
            moved = moved or name in _MOVES
            node = nodes_below(node)[0]
        elif name == "AddBackward0" and (sum_of := _without_bias(node)) is not None:
            node = sum_of
        elif name in _POOLS or (pooled and name == "ReluBackward0") or _is_enlarged(node):
            pooled = True
            node = nodes_below(node)[0]
        elif name in _BENDS and loss != "cross_entropy":
            bent = True
            node = nodes_below(node)[0]
        else:
            break
    maker = _joined(node, names, loss) or _mapped(node, names)
    if maker.chain:
        return maker
    outputs = _outputs_left(node, maker, parts, moved)
    if outputs is None and any(part.selected and part.size > 1 for part in parts):
        return Maker(chain=names)
    pooled = pooled or maker.pooled
    return replace(maker, pooled=pooled, outputs=outputs, bent=names if bent or maker.bent else ())


def _mapped(node: Any, names: tuple[str, ...]) -> Maker:
    """The affine map that is a node of the graph."""
    name = node.name()
    if name.startswith("CompiledFunction"):
        return Maker()
    if name not in AFFINE:
        return Maker(chain=names)
    weight = weight_of(node)
    if weight is not None:
        return Maker(weight, outputs=weight.shape[0] if isinstance(weight, nn.Parameter) else None, call=node)
    computed = node.next_functions[AFFINE[name]][0]
    # A weight that is computed, as by weight_norm, from parameters whose gradients are others.
    return Maker() if computed is None else Maker(chain=(*names, "weight", *names_below(computed)))


def _joined(node: Any, names: tuple[str, ...], loss: str) -> Maker | None:
    """The affine map that was called several times, where a node puts outputs together; None at another node."""
    if node.name() in ("CatBackward0", "StackBackward0"):
        nodes = nodes_below(node)
    elif node.name() == _WRITTEN:
        nodes = []
        while node is not None and node.name() == _WRITTEN:
            (base, _), *written = node.next_functions
            nodes += [part for part, _ in written if part is not None]
            node = base
        nodes += [] if node is None else [node]
    else:
        return None
    makers = [find_maker(part, loss) for part in nodes]
    first = makers[0]
    # Outputs that were put together come from one map that was called several times, or from several maps.
    if first.weight is None or not all(
        same_weight(maker.weight, first.weight) and not maker.pooled for maker in makers
    ):
        return Maker(chain=names)
    bent = next((maker.bent for maker in makers if maker.bent), ())
    return Maker(first.weight, (), False, sum(maker.calls for maker in makers), first.outputs, bent, joined=True)


def _part(node: Any) -> _Part | None:
    """What a node takes of a tensor; None for one that takes no part."""
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
        start, end = (end - 2**64 if end >= 2**63 else end for end in (node._saved_start, node._saved_end))
        left = len(range(*slice(start, end, node._saved_step).indices(size)))
    elif name == "SplitBackward0":
        left = min(size, node._saved_split_size)
    elif name == "SplitWithSizesBackward0":
        left = max(node._saved_split_sizes)
    return _Part(dim, len(sizes), size, left, name in ("SelectBackward0", "GatherBackward0"))


def _outputs_left(node: Any, maker: Maker, parts: list[_Part], moved: bool) -> int | None:
    """How many of a map's outputs the loss is taken of; None where the graph does not tell, or takes one place."""
    outputs = maker.outputs
    last = node.name() != "ConvolutionBackward0"
    for part in reversed(parts):
        here = moved or part.dim == (part.ndim - 1 if last else 1)
        if outputs is not None and here and part.size == outputs:
            outputs = part.left
        elif part.selected and part.size > 1:
            return None
    return outputs


def _is_enlarged(node: Any) -> bool:
    """Whether a map is enlarged by whole numbers, so that each place has the same share in what it becomes.

    No row of the enlarged matrix is longer than the longest one, and its norms grow by no more than the root of the
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


def stretch_of(node: Any) -> "Factors":
    """The numbers that an affine map's outputs are multiplied by; none where the graph shows more than that."""
    stretch: Factors = []
    while node.name() not in AFFINE:
        factors, below = take_factors(node)
        stretch += factors
        if below is node:
            if not (node.name() in VIEWS or node.name() in _CUTS or _part(node) is not None):
                return []
            below = nodes_below(node)[0]
        node = below
    return stretch


def inputs_of(node: Any) -> Tensor | None:
    """The input of an affine map, as its node keeps it for the weight's gradient."""
    names = {"AddmmBackward0": "_saved_mat1", "MmBackward0": "_saved_self"}
    inputs = None if node is None else getattr(node, names.get(node.name(), "_saved_input"), None)
    return None if inputs is None else inputs.detach()


def weight_of(node: Any) -> Tensor | None:
    """The weight of an affine map; where it is frozen, the view that the graph keeps of it."""
    for leaf in map(leaf_of, nodes_below(node)):
        if isinstance(leaf, nn.Parameter) and leaf.ndim > 1:
            return leaf
    if node.next_functions[AFFINE[node.name()]][0] is not None:
        return None
    return getattr(node, "_saved_mat2", None) if "mm" in node.name() or "Mm" in node.name() else node._saved_weight


def multiplied_by(node: Any) -> Tensor | None:
    """The parameter that torch.einsum or a product of batches multiplies by."""
    leaves = map(leaf_of, nodes_below(node)) if node.name() == "BmmBackward0" else ()
    return next((leaf for leaf in leaves if isinstance(leaf, nn.Parameter)), None)


def _without_bias(node: Any) -> Any:
    """What a bias, or something that needs no gradient, is added to; None where it is more than that."""
    others = [
        part for part in nodes_below(node) if not (isinstance(leaf := leaf_of(part), nn.Parameter) and leaf.ndim == 1)
    ]
    return others[0] if len(others) == 1 else None
