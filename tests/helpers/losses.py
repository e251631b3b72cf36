"""A table of losses as functions of torch, and one training step of a module with any of them."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from helpers.task import CLASSES, WIDTH, trainer
from lit_lipschitz import LipschitzLR

ROWS = 16
CLASS_WEIGHTS = torch.tensor([1.0, 2.0, 4.0])
POSITIVE_WEIGHTS = torch.tensor([0.5, 3.0, 1.0])


def one_hot(classes: Tensor) -> Tensor:
    return F.one_hot(classes, CLASSES).float()


def real_values(classes: Tensor) -> Tensor:
    return torch.linspace(-3, 3, len(classes) * CLASSES).reshape(-1, CLASSES)


def probabilities(classes: Tensor) -> Tensor:
    return real_values(classes).softmax(dim=1)


class LossCase(NamedTuple):
    """A loss of outputs of shape (rows, CLASSES) and of targets that are made from the classes of the rows."""

    name: str  # in bounds.LOSSES
    function: Callable[[Tensor, Tensor], Tensor]
    targets: Callable[[Tensor], Tensor]
    # Bounds of one example's gradient norm and curvature in the outputs, times the number of terms for a sum, derived
    # manually for ROWS examples. None: depends on the norms of outputs and targets; not bounded.
    gradient_norm: float | None
    curvature: float | None


def _classes(function: Callable[[Tensor, Tensor], Tensor], gradient_norm: float, curvature: float) -> LossCase:
    return LossCase("cross_entropy", function, lambda classes: classes, gradient_norm, curvature)


ROOT_2, ROOT_K = math.sqrt(2), math.sqrt(CLASSES)
LOSSES = {
    "cross-entropy": _classes(F.cross_entropy, ROOT_2, 1 / 2),
    "label smoothing": _classes(
        lambda z, y: F.cross_entropy(z, y, label_smoothing=0.3), math.sqrt(1 + 0.49 - 0.09 / CLASSES), 1 / 2
    ),
    "probabilities": LossCase("cross_entropy", F.cross_entropy, probabilities, ROOT_2, 1 / 2),
    "one-hot probabilities": LossCase("cross_entropy", F.cross_entropy, one_hot, ROOT_2, 1 / 2),
    # Times (hi + lo) / (2 sqrt(hi lo)), and m hi / (hi + (m - 1) lo).
    "class weights": _classes(
        lambda z, y: F.cross_entropy(z, y, weight=CLASS_WEIGHTS), ROOT_2 * 5 / 4, 1 / 2 * ROWS * 4 / (4 + ROWS - 1)
    ),
    "sum": _classes(lambda z, y: F.cross_entropy(z, y, reduction="sum"), ROWS * ROOT_2, ROWS / 2),
    "halved": _classes(lambda z, y: 0.5 * F.cross_entropy(z, y), ROOT_2 / 2, 1 / 4),
    "times 3": _classes(lambda z, y: 3 * F.cross_entropy(z, y), 3 * ROOT_2, 3 / 2),
    "manual mean": _classes(lambda z, y: F.cross_entropy(z, y, reduction="none").mean(), ROOT_2, 1 / 2),
    "nll": _classes(lambda z, y: F.nll_loss(F.log_softmax(z, dim=1), y), ROOT_2, 1 / 2),
    "mixup": _classes(lambda z, y: 0.7 * F.cross_entropy(z, y) + 0.3 * F.cross_entropy(z, y.roll(1)), ROOT_2, 1 / 2),
    "binary": LossCase(
        "binary_cross_entropy", F.binary_cross_entropy_with_logits, one_hot, 1 / ROOT_K, 1 / 4 / CLASSES
    ),
    "binary of sigmoid": LossCase(
        "binary_cross_entropy",
        lambda z, y: F.binary_cross_entropy(z.sigmoid(), y),
        one_hot,
        1 / ROOT_K,
        1 / 4 / CLASSES,
    ),
    "positive weights": LossCase(
        "binary_cross_entropy",
        lambda z, y: F.binary_cross_entropy_with_logits(z, y, pos_weight=POSITIVE_WEIGHTS),
        one_hot,
        3 / ROOT_K,
        3 / 4 / CLASSES,
    ),
    "squared": LossCase("mean_squared_error", F.mse_loss, real_values, None, 2 / CLASSES),
    "squared, one-hot": LossCase("mean_squared_error", F.mse_loss, one_hot, None, 2 / CLASSES),
    "sum of squares": LossCase(
        "mean_squared_error", lambda z, y: F.mse_loss(z, y, reduction="sum"), real_values, None, 2 * ROWS
    ),
    "absolute": LossCase("mean_absolute_error", F.l1_loss, real_values, 1 / ROOT_K, None),
    "manual absolute": LossCase("mean_absolute_error", lambda z, y: (z - y).abs().mean(), one_hot, 1 / ROOT_K, None),
    "huber": LossCase("huber", lambda z, y: F.huber_loss(z, y, delta=0.7), real_values, 0.7 / ROOT_K, 1 / CLASSES),
    "huber, one-hot": LossCase("huber", lambda z, y: F.huber_loss(z, y, delta=0.3), one_hot, 0.3 / ROOT_K, 1 / CLASSES),
    "smooth l1": LossCase(
        "smooth_l1", lambda z, y: F.smooth_l1_loss(z, y, beta=0.7), real_values, 1 / ROOT_K, 1 / 0.7 / CLASSES
    ),
}


class AnyLoss(LightningModule):
    """Somebody's own module with any loss; keeps the first step's gradient and the head's inputs and outputs."""

    def __init__(
        self, loss: Callable[[Tensor, Tensor], Tensor], outputs: int = CLASSES, scale: float = 1.0, bias: bool = True
    ) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, 8), nn.Linear(8, outputs, bias=bias)
        with torch.no_grad():
            self.head.weight.mul_(scale)
        self.loss = loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.inputs = self.body(batch[0]).relu()
        self.outputs = self.head(self.inputs)
        return self.loss(self.outputs, batch[1])

    def on_after_backward(self) -> None:
        parts = [p.grad.flatten() for p in self.head.parameters()]
        self.gradient = torch.cat(parts).norm().item()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def first_constant(module: LightningModule, targets: Tensor, inputs: Tensor | None = None, **settings: Any) -> float:
    """Trains one step at the inverse of the constant, with ``LipschitzLR(**settings)``; returns the constant."""
    inputs = torch.randn(len(targets), WIDTH) if inputs is None else inputs
    callback = LipschitzLR(**{"rule": "inverse", **settings})
    trainer(callback, max_steps=1).fit(module, DataLoader(TensorDataset(inputs, targets), batch_size=len(targets)))
    assert callback.constant is not None
    assert callback.rate == pytest.approx(1 / callback.constant)
    return callback.constant
