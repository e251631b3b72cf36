"""DenseNet for CIFAR, as in the LipschitzLR paper's experiments."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from lit_lipschitz.models.papers.keras_style import KerasBatchNorm2d, init_keras_

_EPS = 1.1e-5


class DenseNet(nn.Module):
    """DenseNet for CIFAR without bottlenecks or compression: a 3x3 stem, three dense blocks, pooling, output layer.

    The stem has 2 growth_rate filters. Between dense blocks a transition halves the image and keeps the channels. The
    last block is followed by BatchNorm, ReLU and global average pooling.

    The convolutions have no bias and are initialised by Keras's `he_normal`, the output layer Glorot-uniform with a
    bias of zero. BatchNorm has eps 1.1e-5 and torch's momentum 0.01. The authors' runs put L2 only on `stem.weight` and
    `*transition*conv.weight`.

    Args:
        depth: Layers with weights, 3 n + 4 (40, 100).
        growth_rate: k, channels added by each layer of a dense block.
        num_classes: Number of classes.
        in_channels: Channels of the images.

    Raises:
        ValueError: The depth is not 3 n + 4.

    References:
        G. Huang, Z. Liu, L. van der Maaten, K. Weinberger: Densely Connected Convolutional Networks, arXiv 1608.06993,
        section 3; eps and initialisation as in titu1994's DenseNet for Keras, used by R. Yedida, S. Saha,
        arXiv 1902.07399.
    """

    def __init__(self, depth: int = 40, growth_rate: int = 12, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        if depth < 7 or (depth - 4) % 3:
            raise ValueError(f"depth={depth}: expected 3 n + 4, such as 7, 40 or 100")
        channels = 2 * growth_rate
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        features: OrderedDict[str, nn.Module] = OrderedDict()
        for block in (1, 2, 3):
            if block > 1:
                features[f"transition{block - 1}"] = _transition(channels)
            layers = (depth - 4) // 3
            features[f"dense{block}"] = nn.Sequential(
                *(DenseLayer(channels + layer * growth_rate, growth_rate) for layer in range(layers))
            )
            channels += layers * growth_rate
        self.features = nn.Sequential(features)
        self.pool = nn.Sequential(KerasBatchNorm2d(channels, _EPS), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, num_classes)
        init_keras_(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, num_classes) for images of shape (batch, in_channels, height, width)."""
        return self.head(self.pool(self.features(self.stem(images))))


class DenseLayer(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution, whose output is appended to the input's channels."""

    def __init__(self, in_channels: int, growth_rate: int) -> None:
        super().__init__()
        self.norm = KerasBatchNorm2d(in_channels, _EPS)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(in_channels, growth_rate, 3, padding=1, bias=False)

    def forward(self, activations: Tensor) -> Tensor:
        """Shape (batch, in_channels + growth_rate, height, width)."""
        return torch.cat([activations, self.conv(self.relu(self.norm(activations)))], dim=1)


def _transition(channels: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            norm=KerasBatchNorm2d(channels, _EPS),
            relu=nn.ReLU(),
            conv=nn.Conv2d(channels, channels, 1, bias=False),
            pool=nn.AvgPool2d(2),
        )
    )
