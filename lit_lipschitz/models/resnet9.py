"""ResNet-9, a small residual network that learns CIFAR-10 in a few epochs."""

from torch import Tensor, nn


class ResNet9(nn.Module):
    """David Page's ResNet-9 for CIFAR: wide and shallow, with residual blocks only in its first and third stage.

    A 3x3 stem of width w; three stages, each a 3x3 convolution that doubles the width and a 2x2 max-pooling, the first
    and the third followed by a residual block of two 3x3 convolutions; global max-pooling; an output layer without
    bias. The convolutions have no bias and are followed by BatchNorm and ReLU. Width 64 has 6,573,120 parameters.

    Page multiplies the logits by 0.125. Here the inputs of the output layer are multiplied instead, which gives the
    same logits and keeps the output layer directly before the loss, where LipschitzLR measures its inputs.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.
        width: Channels of the stem, w.
        scale: Factor of the inputs of the output layer.

    References:
        D. Page: How to train your ResNet, parts 4 and 8, myrtle.ai, 2018-2019.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 64, scale: float = 0.125) -> None:
        super().__init__()
        self.scale = scale
        self.stem = _conv_norm_relu(in_channels, width)
        self.stages = nn.Sequential(
            _conv_norm_relu(width, 2 * width),
            nn.MaxPool2d(2),
            Residual(2 * width),
            _conv_norm_relu(2 * width, 4 * width),
            nn.MaxPool2d(2),
            _conv_norm_relu(4 * width, 8 * width),
            nn.MaxPool2d(2),
            Residual(8 * width),
        )
        self.pool = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())
        self.head = nn.Linear(8 * width, num_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, num_classes) for images of shape (batch, in_channels, height, width)."""
        features = self.pool(self.stages(self.stem(images)))
        return self.head(self.scale * features)


class Residual(nn.Module):
    """Two 3x3 convolutions with BatchNorm and ReLU, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(_conv_norm_relu(channels, channels), _conv_norm_relu(channels, channels))

    def forward(self, activations: Tensor) -> Tensor:
        """Shape of the input."""
        return activations + self.residual(activations)


def _conv_norm_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()
    )
