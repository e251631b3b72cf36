"""Per-example norms of the loss's gradient with respect to the logits, captured during the backward."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_lipschitz.bounds.families import Reduction
from lit_lipschitz.measurement.norms import whole
from lit_lipschitz.recognition.loss_graph import BatchLoss, LogitEdge

ToRows = Callable[[Tensor, int | None], Tensor]
"""Reshapes logits, given the dimension of the classes (None if there is none), to (examples, outputs)."""


class LogitGradientNorms:
    """Captures the gradient norms of the batches that make one optimizer step, without a host synchronisation.

    The gradient of a mean over m examples with respect to the logits has one row an example, 1/m times the gradient of
    the example's own loss. Factors of the loss, such as Lightning's division by the number of accumulated batches or
    the scale of a GradScaler, are divided out.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[list[Tensor], Any, Any]] = []
        self._num_before = 0  # batches before the last step of another optimizer

    def on_other_optimizer_step(self) -> None:
        """Marks the batches so far as the other optimizer's, if more follow before the own step.

        A GAN's generator loss goes through the discriminator's head and is not a loss of the discriminator.
        """
        self._num_before = len(self._batches)

    def discard(self) -> None:
        """Forgets the batches so far."""
        self._batches, self._num_before = [], 0

    def watch(self, batch: BatchLoss, edges: Sequence[LogitEdge], reduction: Reduction, to_rows: ToRows) -> None:
        """Registers hooks where the gradients in the logits enter the graph of a loss, before its backward."""
        norms: list[Tensor] = []
        num_summed: Any = batch.elements if reduction == "sum" else 1
        factor: Any = abs(batch.scale) * num_summed
        self._batches.append((norms, factor, batch.count))
        for edge in edges:
            edge.node.register_prehook(_norm_hook(norms, edge, to_rows))

    def pack(self, rank: int, world_size: int, device: torch.device) -> Tensor:
        """Mean squared and mean norm of the examples' gradients since the last call, in this rank's column.

        For a MAX all-reduce: the other columns are -1, and all if no backward was captured. Shape (2, world_size).
        """
        batches = self._batches[self._num_before :] or self._batches
        self.discard()
        captured: list[Tensor] = []
        for norms, factor, count in batches:
            if norms:
                # The norm of a sum of gradients with respect to the same logits is at most the sum of the norms.
                root, total = torch.stack(norms).sum(dim=0) / factor
                captured.append(torch.stack([root * root * count, total]).to(device))
        packed = torch.full((2, world_size), -1.0, device=device)
        if captured:
            packed[:, rank] = torch.stack(captured).mean(dim=0)
        return packed


def grad_norms_of_ranks(reduced: Sequence[float]) -> tuple[float, float]:
    """Root mean square and mean of the gradient norms, from the MAX over the ranks; zeros if no rank captured any."""
    count = len(reduced) // 2
    known = [pair for pair in zip(reduced[:count], reduced[count:], strict=True) if pair[0] >= 0]
    if not known:
        return 0.0, 0.0
    squares, means = zip(*known, strict=True)
    return math.sqrt(sum(squares) / len(known)), sum(means) / len(known)


def _norm_hook(norms: list[Tensor], edge: LogitEdge, to_rows: ToRows) -> Callable[[tuple[Tensor | None, ...]], None]:
    """A hook of a node that appends the Frobenius norm of an incoming gradient and the sum of its row norms."""
    seen, index, dim = False, edge.index, edge.dim  # holding the node would keep it from being freed

    def append_norms(grads: tuple[Tensor | None, ...]) -> None:
        nonlocal seen
        grad: Any = grads[index]
        if grad is None or seen:  # a retained graph may have more backwards
            return
        seen = True
        grad = whole(grad.detach())
        grad = grad.float() if grad.dtype == torch.float64 else grad
        row_norms: Tensor = torch.linalg.vector_norm(to_rows(grad, dim), dim=1, dtype=torch.float32)
        norms.append(torch.stack([torch.linalg.vector_norm(row_norms), row_norms.sum()]))

    return append_norms
