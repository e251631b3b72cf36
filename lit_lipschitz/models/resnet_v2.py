"""Residual networks of pre-activated bottlenecks for 32x32 images."""

from torch import Tensor, nn
from torch.nn import functional as F

from lit_lipschitz.models.keras_style import KerasBatchNorm2d, conv_norm_relu, init_convolutions_, init_he_head_


class ResNetV2(nn.Module):
    """Pre-activation ResNet for CIFAR as the Keras example builds it: a stem, three stages of bottlenecks, the head.

    The stem is a 3x3 convolution of 16 filters with BatchNorm and ReLU. The stages have bottlenecks of width 16, 64 and
    128 that put out 64, 128 and 256 channels; the last two halve the image. BatchNorm, ReLU and average pooling precede
    the head. Pooling is over what is left of the image, 8x8 where it was 32x32.

    Every convolution has a bias. Kernels, the head's included, start as Keras's `he_normal`, biases as zero. BatchNorm
    has Keras's defaults. The convolutions' kernels are the parameters that match `*conv*.weight`.

    Args:
        depth: Layers with weights on the longest path, 9 n + 2 (20, 56, 110, 164).
        num_classes: Outputs.
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
        init_convolutions_(self)
        init_he_head_(self.head)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, num_classes) for images of shape (batch, in_channels, height, width)."""
        return self.head(self.pool(self.blocks(self.stem(images))))


class Bottleneck(nn.Module):
    """Convolutions 1x1, 3x3 and 1x1, each after BatchNorm and ReLU, added to a shortcut.

    Where the channels change, the shortcut is a 1x1 convolution of the block's input, before its BatchNorm.

    Args:
        in_channels: Channels that come in.
        width: Channels between the convolutions.
        out_channels: Channels that go out.
        stride: Stride of the first convolution and of the shortcut.
        activated: The input has been through BatchNorm and ReLU, so that the first convolution takes it as it is.
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
        """The residual plus the shortcut, with no activation after it."""
        residual = self.conv1(self.activation(activations))
        residual = self.conv2(F.relu(self.norm2(residual)))
        residual = self.conv3(F.relu(self.norm3(residual)))
        return self.shortcut_conv(activations) + residual
