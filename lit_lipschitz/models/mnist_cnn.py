"""The MNIST network of the LipschitzLR paper's experiments."""

from torch import Tensor, nn

from lit_lipschitz.models.keras_style import KerasBatchNorm1d, init_convolutions_, init_glorot_


class MNISTCNN(nn.Module):
    """Five 3x3 convolutions, a dense layer with BatchNorm, and the head, with dropout.

    730,602 parameters as Keras counts them, the 256 moving statistics of the BatchNorm included.

    Args:
        num_classes: Outputs.

    References:
        R. Yedida, S. Saha, arXiv 1902.07399, section on experiments, and its script: kernels start as Keras's
        `he_normal`, dense layers Glorot-uniform, biases as zero. The size of the dense layer's outputs, and with it the
        first rate, depends on that.
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
        init_convolutions_(self)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_glorot_(module)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, num_classes) for images of shape (batch, 1, 28, 28)."""
        return self.head(self.features(images))
