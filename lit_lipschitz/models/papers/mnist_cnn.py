"""The convolutional network for MNIST of the LipschitzLR paper's experiments."""

from torch import Tensor, nn

from lit_lipschitz.models.papers.keras_style import KerasBatchNorm1d, init_keras_


class MNISTCNN(nn.Module):
    """Five 3x3 convolutions, a dense layer with BatchNorm, and the output layer, with dropout.

    730,602 parameters as counted by Keras, which includes the 256 moving statistics of BatchNorm.

    Args:
        num_classes: Number of classes.

    References:
        R. Yedida, S. Saha, arXiv 1902.07399, section on experiments, and its script: convolutions are initialised by
        Keras's `he_normal`, dense layers Glorot-uniform, biases to zero. The norm of the output layer's inputs, and
        with it the first learning rate, depends on that.

    Example:
        >>> import torch
        >>> MNISTCNN()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.25),
            nn.Conv2d(64, 128, 3, padding=1),
            nn.ReLU(),
            nn.Dropout(0.25),
            nn.Flatten(),
            nn.Linear(128 * 6 * 6, 128),
            nn.ReLU(),
            KerasBatchNorm1d(128),
            nn.Dropout(0.25),
        )
        self.head = nn.Linear(128, num_classes)
        init_keras_(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, num_classes) for images of shape (batch, 1, 28, 28)."""
        return self.head(self.features(images))
