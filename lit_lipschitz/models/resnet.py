"""Residual networks for 32x32 images."""

from torch import Tensor, nn
from torch.nn import functional as F


class ResNetV1(nn.Module):
    """ResNet for CIFAR: a 3x3 stem, three stages of basic blocks of width 16, 32 and 64, average pooling, the head.

    Depth 20 has 272,474 parameters. Where a stage begins, the shortcut is a strided 1x1 convolution with BatchNorm.

    Args:
        depth: Layers with weights, 6 n + 2 (20, 32, 44, 56, 110).
        num_classes: Outputs.
        in_channels: Channels of the images.
        width: Channels of the first stage.

    Raises:
        ValueError: The depth is not 6 n + 2.

    References:
        K. He, X. Zhang, S. Ren, J. Sun: Deep Residual Learning for Image Recognition, arXiv 1512.03385, section 4.2.
    """

    def __init__(self, depth: int = 20, num_classes: int = 10, in_channels: int = 3, width: int = 16) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth={depth}: expected 6 n + 2, such as 8, 20 or 56")
        self.stem = nn.Sequential(_conv3x3(in_channels, width), nn.BatchNorm2d(width), nn.ReLU())
        blocks: list[nn.Module] = []
        channels = width
        for stage in range(3):
            for block in range((depth - 2) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(BasicBlock(channels, width * 2**stage, stride))
                channels = width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, num_classes) for images of shape (batch, in_channels, height, width)."""
        return self.head(self.pool(self.blocks(self.stem(images))))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, added to a shortcut.

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out.
        stride: Stride of the first convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            _conv3x3(in_channels, out_channels, stride),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            _conv3x3(out_channels, out_channels),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, activations: Tensor) -> Tensor:
        """ReLU of the residual plus the shortcut."""
        return F.relu(self.residual(activations) + self.shortcut(activations))


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
