"""Pre-activation ResNet for CIFAR (version 2), as in the LipschitzLR paper's experiments."""

from torch import Tensor, nn
from torch.nn import functional as F

from lit_lipschitz.models.papers.keras_style import KerasBatchNorm2d, conv_norm_relu, he_normal_, init_keras_


class ResNetV2(nn.Module):
    """Pre-activation ResNet for CIFAR of the Keras example: a stem, three stages of bottlenecks, output layer.

    The stem is a 3x3 convolution of 16 filters with BatchNorm and ReLU. The stages have bottlenecks of width 16, 64 and
    128 with 64, 128 and 256 output channels; the last two halve the image. They are followed by BatchNorm, ReLU and
    global average pooling (over 8x8 pixels of a 32x32 image).

    Convolutions have biases. All kernels, also the output layer's, are initialised by Keras's `he_normal`, biases to
    zero. BatchNorm has Keras's defaults. The pattern `*conv*.weight` selects the convolution kernels.

    Args:
        depth: Layers with weights on the longest path, 9 n + 2 (20, 56, 110, 164).
        num_classes: Number of classes.
        in_channels: Channels of the images.

    Raises:
        ValueError: The depth is not 9 n + 2.

    References:
        K. He, X. Zhang, S. Ren, J. Sun: Identity Mappings in Deep Residual Networks, arXiv 1603.05027, for the blocks;
        the Keras example cifar10_resnet, version 2, for the rest, as used by R. Yedida, S. Saha, arXiv 1902.07399.
    """

    def __init__(self, depth: int = 164, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        if depth < 11 or (depth - 2) % 9:
            raise ValueError(f"depth={depth}: expected 9 n + 2, such as 11, 56 or 164")
        self.stem = conv_norm_relu(in_channels, 16)
        blocks: list[nn.Module] = []
        channels = 16
        for stage, (width, out_channels) in enumerate([(16, 64), (64, 128), (128, 256)]):
            for block in range((depth - 2) // 9):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(Bottleneck(channels, width, out_channels, stride, activated=not blocks))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.Sequential(KerasBatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, num_classes)
        init_keras_(self, dense=he_normal_)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, num_classes) for images of shape (batch, in_channels, height, width)."""
        return self.head(self.pool(self.blocks(self.stem(images))))


class Bottleneck(nn.Module):
    """Convolutions 1x1, 3x3 and 1x1, each after BatchNorm and ReLU, added to a shortcut.

    The shortcut starts before the first BatchNorm, and is a 1x1 convolution if the number of channels changes. An input
    that is ``activated`` has passed BatchNorm and ReLU already, and they are omitted.
    """

    def __init__(
        self, in_channels: int, width: int, out_channels: int, stride: int = 1, activated: bool = False
    ) -> None:
        super().__init__()
        self.activation = nn.Identity() if activated else nn.Sequential(KerasBatchNorm2d(in_channels), nn.ReLU())
        self.conv1 = nn.Conv2d(in_channels, width, 1, stride)
        self.norm2 = KerasBatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.norm3 = KerasBatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1)
        self.shortcut_conv: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut_conv = nn.Conv2d(in_channels, out_channels, 1, stride)

    def forward(self, activations: Tensor) -> Tensor:
        """The residual plus the shortcut, without a final activation."""
        residual = self.conv1(self.activation(activations))
        residual = self.conv2(F.relu(self.norm2(residual)))
        residual = self.conv3(F.relu(self.norm3(residual)))
        return self.shortcut_conv(activations) + residual
