"""Layers and initial weights with Keras's defaults, for networks that were first built there."""

import math
from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional as F

# Standard deviation of a standard normal that is truncated at -2 and 2.
_TRUNCATED_STD = 0.87962566103423978


def he_normal_(weight: Tensor) -> Tensor:
    """Fills a weight with Keras's `he_normal`, a normal truncated at two of its standard deviations.

    The normal is widened before it is truncated, so that the variance of what is drawn is 2 / fan_in.

    Args:
        weight: Shape (outputs, inputs, ...), filled in place; fan_in is the size of weight[0].

    Returns:
        The weight.

    References:
        K. He, X. Zhang, S. Ren, J. Sun: Delving Deep into Rectifiers, arXiv 1502.01852, equation 10.
    """
    std = math.sqrt(2 / weight[0].numel()) / _TRUNCATED_STD
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def init_convolutions_(network: nn.Module) -> None:
    """Starts every convolution of a network with `he_normal_` kernels and biases of zero."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            he_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def init_he_head_(head: nn.Linear) -> None:
    """Starts a head with a `he_normal_` kernel and a bias of zero."""
    he_normal_(head.weight)
    nn.init.zeros_(head.bias)


def init_glorot_(layer: nn.Linear) -> None:
    """Starts a dense layer with Keras's defaults, a Glorot-uniform kernel and a bias of zero."""
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)


def batch_norm(channels: int, eps: float = 1e-3) -> nn.BatchNorm2d:
    """BatchNorm with Keras's defaults: torch's momentum is the new batch's share, Keras's (0.99) the old average's."""
    return nn.BatchNorm2d(channels, eps=eps, momentum=0.01)


def conv_norm_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    """A 3x3 convolution with bias, BatchNorm and ReLU, as children conv, norm and relu."""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(in_channels, out_channels, 3, padding=1), norm=batch_norm(out_channels), relu=nn.ReLU()
        )
    )


class StridedConv3x3(nn.Conv2d):
    """A 3x3 convolution of stride 2 with bias and Keras's "same" padding.

    On an even side Keras adds a zero after the last pixel only, where torch's padding=1 adds one before the first too:
    the windows are centred on pixels 1, 3, ... instead of 0, 2, ...

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, stride=2)

    def forward(self, input: Tensor) -> Tensor:
        """Half the height and width, rounded up."""
        height, width = input.shape[-2:]
        return super().forward(F.pad(input, (width % 2, 1, height % 2, 1)))
