"""Layers and initial weights with Keras's defaults, for networks that were first built there."""

import math
from collections import OrderedDict

import torch
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


class _KerasBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm whose moving statistics forget their start, as those of Keras 2 on TensorFlow 1 did.

    The moving averages are corrected for their start as Adam's are, by 1 - 0.99^t after t batches, so that the first
    batch replaces the initial 0 and 1 and nothing of these stays. torch's keep a share of 0.99^t of them, a tenth after
    an epoch of MNIST.

    Args:
        channels: Channels of the input.
        eps: Added to the variance.

    References:
        Keras 2.2, `moving_average_update` with `zero_debias`; D. Kingma, J. Ba: Adam, arXiv 1412.6980, section 3.
    """

    def __init__(self, channels: int, eps: float = 1e-3) -> None:
        # torch's momentum is the new batch's share, Keras's (0.99) the old average's.
        super().__init__(channels, eps=eps, momentum=0.01)

    def forward(self, input: Tensor) -> Tensor:
        """The input, normalised by the batch's statistics while training and by the moving ones otherwise."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        mean, variance = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        output = nn.functional.batch_norm(input, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
        share = self._share(self.num_batches_tracked.add_(1)).to(mean.dtype)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)
        return output

    def _share(self, batches: Tensor) -> Tensor:
        """Of the new batch in an average that is corrected for its start."""
        assert self.momentum is not None
        return self.momentum / (1 - (1 - self.momentum) ** batches)


class KerasBatchNorm1d(_KerasBatchNorm, nn.BatchNorm1d):
    """For inputs of shape (batch, channels): moving statistics that forget their start."""


class KerasBatchNorm2d(_KerasBatchNorm, nn.BatchNorm2d):
    """For inputs of shape (batch, channels, height, width): moving statistics that forget their start."""


def conv_norm_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    """A 3x3 convolution with bias, BatchNorm and ReLU, as children conv, norm and relu."""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(in_channels, out_channels, 3, padding=1), norm=KerasBatchNorm2d(out_channels), relu=nn.ReLU()
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
