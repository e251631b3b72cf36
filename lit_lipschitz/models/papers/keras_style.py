"""Layers and weight initialisation with Keras's defaults, for the networks that the papers built in Keras."""

import math
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Standard deviation of a standard normal that is truncated at -2 and 2.
_TRUNCATED_STD = 0.87962566103423978


def he_normal_(weight: Tensor) -> Tensor:
    """Fills a weight with Keras's `he_normal`, a normal distribution truncated at two of its standard deviations.

    The normal is widened before it is truncated, so that the variance of the samples is 2 / fan_in, where fan_in is the
    size of weight[0].

    References:
        K. He, X. Zhang, S. Ren, J. Sun: Delving Deep into Rectifiers, arXiv 1502.01852, equation 10.
    """
    std = math.sqrt(2 / weight[0].numel()) / _TRUNCATED_STD
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def init_keras_(network: nn.Module, dense: Callable[[Tensor], Tensor] = nn.init.xavier_uniform_) -> None:
    """Initialises convolutions by `he_normal_`, dense layers by ``dense`` (in Keras Glorot-uniform), biases to zero."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            init = he_normal_ if isinstance(module, nn.Conv2d) else dense
            init(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class _KerasBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm with bias-corrected moving statistics, as in Keras 2 on TensorFlow 1.

    The moving averages are divided by 1 - 0.99^t after t batches, as Adam's are, so that the first batch replaces the
    initial mean 0 and variance 1. In torch these keep a weight of 0.99^t: a tenth after an epoch of MNIST.

    References:
        Keras 2.2, `moving_average_update` with `zero_debias`; D. Kingma, J. Ba: Adam, arXiv 1412.6980, section 3.
    """

    running_mean: Tensor  # never None here
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, channels: int, eps: float = 1e-3) -> None:
        # torch's momentum is the weight of the new batch, Keras's (0.99) that of the old average.
        super().__init__(channels, eps=eps, momentum=0.01)

    def forward(self, input: Tensor) -> Tensor:
        """The input, normalised by the batch's statistics in training and by the moving ones in evaluation."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        mean, variance = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        output = nn.functional.batch_norm(input, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
        # The weight of the newest batch in a bias-corrected average.
        weight = (self.momentum / (1 - (1 - self.momentum) ** self.num_batches_tracked.add_(1))).to(mean.dtype)
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(variance, weight)
        return output


class KerasBatchNorm1d(_KerasBatchNorm, nn.BatchNorm1d):
    """BatchNorm of inputs of shape (batch, channels), with bias-corrected moving statistics."""


class KerasBatchNorm2d(_KerasBatchNorm, nn.BatchNorm2d):
    """BatchNorm of inputs of shape (batch, channels, height, width), with bias-corrected moving statistics."""


def conv_norm_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    """A 3x3 convolution with bias, BatchNorm and ReLU, as children conv, norm and relu."""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(in_channels, out_channels, 3, padding=1), norm=KerasBatchNorm2d(out_channels), relu=nn.ReLU()
        )
    )


class StridedConv3x3(nn.Conv2d):
    """A 3x3 convolution of stride 2 with bias and Keras's "same" padding.

    Keras pads an even side with one zero after the last pixel only, torch's padding=1 also with one before the first.
    So the windows are centred on pixels 1, 3, ... instead of 0, 2, ...
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, stride=2)

    def forward(self, input: Tensor) -> Tensor:
        """Shape (batch, out_channels, height / 2, width / 2), both rounded up."""
        height, width = input.shape[-2:]
        return super().forward(F.pad(input, (width % 2, 1, height % 2, 1)))


class KerasBasicBlock(nn.Module):
    """Two 3x3 convolutions with bias and BatchNorm, added to a shortcut without BatchNorm, as in cifar10_resnet v1."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            OrderedDict(
                conv1=StridedConv3x3(in_channels, out_channels)
                if stride == 2
                else nn.Conv2d(in_channels, out_channels, 3, padding=1),
                norm1=KerasBatchNorm2d(out_channels),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(out_channels, out_channels, 3, padding=1),
                norm2=KerasBatchNorm2d(out_channels),
            )
        )
        self.shortcut_conv: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut_conv = nn.Conv2d(in_channels, out_channels, 1, stride)

    def forward(self, activations: Tensor) -> Tensor:
        """ReLU of the residual plus the shortcut."""
        return F.relu(self.residual(activations) + self.shortcut_conv(activations))
