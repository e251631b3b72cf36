"""A multilayer perceptron for small images and tables."""

import math

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with ReLU and dropout between them, applied to flattened inputs.

    Args:
        in_shape: Shape of one example.
        hidden: Widths of the hidden layers.
        num_classes: Number of classes.
        dropout: Probability of dropping a hidden activation.

    Example:
        >>> import torch
        >>> MLP(in_shape=(4,), hidden=(8,), num_classes=3)(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        in_shape: tuple[int, ...] = (1, 8, 8),
        hidden: tuple[int, ...] = (256, 128),
        num_classes: int = 10,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        width = math.prod(in_shape)
        for size in hidden:
            layers += [nn.Linear(width, size), nn.ReLU(), nn.Dropout(dropout)]
            width = size
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, num_classes) for inputs of shape (batch, *in_shape)."""
        return self.head(self.features(images))
