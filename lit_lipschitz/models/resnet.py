"""ResNet for CIFAR (version 1, post-activation): He et al.'s and the Keras example's variant."""

from typing import Literal, get_args

from torch import Tensor, nn
from torch.nn import functional as F

from lit_lipschitz.models.papers.keras_style import KerasBasicBlock, conv_norm_relu, he_normal_, init_keras_

Variant = Literal["he", "keras"]


class ResNetV1(nn.Module):
    """ResNet for CIFAR: a 3x3 stem, three stages of basic blocks of width 16, 32 and 64, average pooling, output layer.

    The first block of stages 2 and 3 has a strided 1x1 convolution as its shortcut. There are two variants:

    - "he": convolutions without bias, BatchNorm on the shortcut too. Depth 20 has 272,474 parameters.
    - "keras": the Keras example of the LipschitzLR paper's runs. Convolutions have biases, the shortcut has no
      BatchNorm, and BatchNorm and "same" padding follow Keras. All kernels, also the output layer's, are initialised by
      `he_normal`, biases to zero. The pattern `*conv*.weight` selects the convolution kernels. Depth 20 has 273,066
      parameters.

    Args:
        depth: Layers with weights on the longest path, 6 n + 2 (20, 32, 44, 56, 110).
        num_classes: Number of classes.
        in_channels: Channels of the images.
        width: Channels of the first stage.
        variant: "he" or "keras".

    Raises:
        ValueError: The depth is not 6 n + 2, or the variant is unknown.

    References:
        K. He, X. Zhang, S. Ren, J. Sun: Deep Residual Learning for Image Recognition, arXiv 1512.03385, section 4.2;
        the Keras example cifar10_resnet, version 1, as used by R. Yedida, S. Saha, arXiv 1902.07399.

    Example:
        >>> import torch
        >>> ResNetV1(depth=8)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, depth: int = 20, num_classes: int = 10, in_channels: int = 3, width: int = 16, variant: Variant = "he"
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth={depth}: expected 6 n + 2, such as 8, 20 or 56")
        if variant not in get_args(Variant):
            raise ValueError(f"variant={variant!r}: expected 'he' or 'keras'")
        if variant == "keras":
            self.stem = conv_norm_relu(in_channels, width)
        else:
            self.stem = nn.Sequential(_conv3x3(in_channels, width), nn.BatchNorm2d(width), nn.ReLU())
        make_block = KerasBasicBlock if variant == "keras" else BasicBlock
        blocks: list[nn.Module] = []
        channels = width
        for stage in range(3):
            for block in range((depth - 2) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(make_block(channels, width * 2**stage, stride))
                channels = width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, num_classes)
        if variant == "keras":
            init_keras_(self, dense=he_normal_)
        else:
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, num_classes) for images of shape (batch, in_channels, height, width)."""
        return self.head(self.pool(self.blocks(self.stem(images))))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, added to a shortcut."""

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
