"""ResNet-9, and what LipschitzLR makes of the factor before its head."""

import math

import pytest
import torch
from helpers import trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lit_lipschitz import ConfigurationError, ImageClassifier, LipschitzLR, ResNet9


def test_it_has_the_parameters_of_its_layers():
    kernels = [(3, 64), (64, 128), (128, 128), (128, 128), (128, 256), (256, 512), (512, 512), (512, 512)]
    convolutions = sum(9 * before * after for before, after in kernels)
    norms = sum(2 * after for _, after in kernels)
    assert convolutions + norms + 512 * 10 == 6_573_120
    assert sum(parameter.numel() for parameter in ResNet9().parameters()) == 6_573_120


@pytest.mark.parametrize(
    ("network", "shape", "classes"),
    [
        (ResNet9(width=8), (3, 32, 32), 10),
        (ResNet9(num_classes=100, in_channels=1, width=8), (1, 28, 28), 100),
        (ResNet9(width=8), (3, 33, 40), 10),
    ],
)
def test_images_go_in_and_logits_come_out(network, shape, classes):
    assert network(torch.randn(2, *shape)).shape == (2, classes)
    assert list(network.children())[-1] is network.head


def pages_network(images, weights):
    """The network as Page writes it, from a list of weights: its logits, not its features, times 0.125."""

    def block(inputs):
        kernel, gain, shift = weights.pop(0), weights.pop(0), weights.pop(0)
        outputs = F.conv2d(inputs, kernel, padding=1)
        mean, variance = outputs.mean((0, 2, 3), keepdim=True), outputs.var((0, 2, 3), keepdim=True, unbiased=False)
        normal = (outputs - mean) / (variance + 1e-5).sqrt()
        return (gain[:, None, None] * normal + shift[:, None, None]).relu()

    outputs = block(images)
    outputs = F.max_pool2d(block(outputs), 2)
    outputs = outputs + block(block(outputs))
    outputs = F.max_pool2d(block(outputs), 2)
    outputs = F.max_pool2d(block(outputs), 2)
    outputs = outputs + block(block(outputs))
    return 0.125 * (outputs.amax((2, 3)) @ weights.pop(0).mT)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_logits_and_gradients_are_those_of_pages_network(layout):
    network = ResNet9(width=8).double().to(memory_format=layout)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    weights = [parameter.detach().clone().requires_grad_() for parameter in network.parameters()]
    ours, theirs = network(images), pages_network(images, list(weights))
    torch.testing.assert_close(ours, theirs)
    ours.logsumexp(1).sum().backward()
    theirs.logsumexp(1).sum().backward()
    for parameter, weight in zip(network.parameters(), weights, strict=True):
        torch.testing.assert_close(parameter.grad, weight.grad)
        assert parameter.grad.any()


class Scaled(nn.Module):
    """The factor where Page has it."""

    def __init__(self, network: ResNet9) -> None:
        super().__init__()
        self.network, self.network.scale = network, 1.0

    def forward(self, images):
        return 0.125 * self.network(images)


def first_rate(network, **options):
    """The rate of the first step, on 6 images of noise, and the head's inputs in it."""
    images, labels = torch.randn(6, 3, 32, 32), torch.arange(6)
    inputs = []
    head = next(module for module in network.modules() if isinstance(module, nn.Linear))
    head.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].detach()))
    callback = LipschitzLR(**options)
    trainer(callback, max_steps=1, num_sanity_val_steps=0).fit(
        ImageClassifier(network, label_smoothing=0.2), DataLoader(TensorDataset(images, labels), batch_size=6)
    )
    return callback.rate, inputs[0]


def test_the_rate_is_one_over_the_constant_of_the_scaled_features():
    rate, inputs = first_rate(ResNet9(width=8), rule="inverse")
    # The longest gradient in the logits: all on a wrong class, with 0.82 on the right one and 0.02 on the others.
    slope = math.sqrt(0.98**2 + 0.82**2 + 8 * 0.02**2)
    assert rate == pytest.approx(1 / (slope / math.sqrt(6) * float(inputs.norm())), rel=1e-5)


def test_a_factor_behind_the_head_is_refused_and_has_the_same_rate_once_the_head_is_named():
    torch.manual_seed(0)
    rate, _ = first_rate(ResNet9(width=8))
    torch.manual_seed(0)
    scaled = Scaled(ResNet9(width=8))
    with pytest.raises(ConfigurationError, match="LogSoftmax > Mul > "):
        first_rate(scaled, norm="sample")
    torch.manual_seed(0)
    named, _ = first_rate(Scaled(ResNet9(width=8)), head="network.network.head")
    assert named == pytest.approx(rate, rel=1e-5)
