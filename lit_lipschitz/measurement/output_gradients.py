"""How steep a loss is in the head's outputs: the slopes of its examples, seen in the backward."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_lipschitz.bounds.families import Reduction
from lit_lipschitz.recognition.loss_graph import Edge, Reading

Rows = Callable[[Tensor, int | None], Tensor]
"""From outputs, and the dimension of the classes where there is one, to the shape (examples, outputs)."""


class Slopes:
    """Watches the backwards of the batches that make one optimizer step; nothing is read to the host.

    The gradient of a mean over m examples in the head's outputs has a row of each example, which is 1/m of the gradient
    of the example's own loss; the norm of that is the example's slope. Factors of the loss, as Lightning's division by
    the accumulated batches and a GradScaler's, are taken out.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[list[Tensor], Any, Any]] = []
        self._before = 0  # how many of them were there when another optimizer stepped

    def pass_turn(self) -> None:
        """Another optimizer steps: what was watched so far is its loss, if more comes before the own step.

        The generator's loss goes through the discriminator's head, and is none of the discriminator's.
        """
        self._before = len(self._batches)

    def watch(self, reading: Reading, edges: Sequence[Edge], reduction: Reduction, rows: Rows) -> None:
        """Has the backward of a loss, which is about to begin, add its slopes.

        Args:
            reading: What the loss is taken of.
            edges: Where its gradients go.
            reduction: Whether it is a mean or a sum over the examples.
            rows: Brings what is shaped like the outputs that the loss is taken of to the shape (examples, outputs).
        """
        norms: list[Tensor] = []
        summed: Any = reading.elements if reduction == "sum" else 1
        factor: Any = abs(reading.scale) * summed
        self._batches.append((norms, factor, reading.count))
        for edge in edges:
            edge.node.register_prehook(_keeper(norms, edge, rows))

    def slots(self, rank: int, world_size: int, device: torch.device) -> Tensor:
        """This rank's slopes since the last call, which are forgotten, beside -1 for the others.

        Args:
            rank: This rank.
            world_size: How many there are; the MAX over all of them has the slopes of each.
            device: Where the result is wanted.

        Returns:
            The squares' mean and the mean of the slopes, of batches that count alike; shape (2, world_size), float32.
            -1 where no backward was seen.
        """
        batches = self._batches[self._before :] or self._batches
        self._batches, self._before = [], 0
        found: list[Tensor] = []
        for norms, factor, count in batches:
            if norms:
                # Gradients of several losses of the same outputs add up to no more than their norms do.
                root, total = torch.stack(norms).sum(dim=0) / factor
                found.append(torch.stack([root * root * count, total]).to(device))
        slots = torch.full((2, world_size), -1.0, device=device)
        if found:
            slots[:, rank] = torch.stack(found).mean(dim=0)
        return slots


def slopes_of_all(slots: Sequence[float]) -> tuple[float, float]:
    """The root mean square of all ranks' slopes and their mean; zeros where none has seen any.

    Args:
        slots: The MAX over the ranks of :meth:`Slopes.slots`, flattened.
    """
    count = len(slots) // 2
    seen = [pair for pair in zip(slots[:count], slots[count:], strict=True) if pair[0] >= 0]
    if not seen:
        return 0.0, 0.0
    squares, means = zip(*seen, strict=True)
    return math.sqrt(sum(squares) / len(seen)), sum(means) / len(seen)


def _keeper(norms: list[Tensor], edge: Edge, rows: Rows) -> Callable[[tuple[Tensor | None, ...]], None]:
    """A hook of a node that keeps, of one of the gradients that come in, its norm and the sum of its rows' norms."""
    seen, place, dim = False, edge.place, edge.dim  # a node that its own hook holds would not be freed

    def keep(grads: tuple[Tensor | None, ...]) -> None:
        nonlocal seen
        grad: Any = grads[place]
        if grad is None or seen:  # a graph that is retained may have other backwards
            return
        seen = True
        grad = grad.detach()
        if hasattr(grad, "full_tensor"):  # of outputs that are sharded, put together by all ranks
            grad = grad.full_tensor()
        grad = grad.float() if grad.dtype == torch.float64 else grad
        lengths: Tensor = torch.linalg.vector_norm(rows(grad, dim), dim=1, dtype=torch.float32)
        norms.append(torch.stack([torch.linalg.vector_norm(lengths), lengths.sum()]))

    return keep
