import pytest
import torch
from torch import nn

from lit_lipschitz import MLP, MNISTCNN, ResNetV1


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def moving_statistics(network):
    return sum(b.numel() for name, b in network.named_buffers() if "running" in name)


def test_the_mnist_cnn_has_the_papers_parameters():
    network = MNISTCNN()
    assert parameters(network) + moving_statistics(network) == 730_602  # Keras counts the BatchNorm's statistics
    assert parameters(network) == 730_346


@pytest.mark.parametrize(("depth", "count"), [(20, 272_474), (56, 855_770)])
def test_resnets_have_their_parameters(depth, count):
    assert parameters(ResNetV1(depth)) == count


def test_the_mlp_has_the_parameters_of_its_layers():
    assert parameters(MLP((1, 8, 8), (256, 128), 10)) == 64 * 256 + 256 + 256 * 128 + 128 + 128 * 10 + 10


@pytest.mark.parametrize(
    ("network", "shape", "classes"),
    [
        (MNISTCNN(), (1, 28, 28), 10),
        (MNISTCNN(num_classes=26), (1, 28, 28), 26),
        (ResNetV1(8), (3, 32, 32), 10),
        (ResNetV1(14, num_classes=100, in_channels=1, width=8), (1, 32, 32), 100),
        (MLP((3, 4, 4), (), 5), (3, 4, 4), 5),
    ],
)
def test_images_go_in_and_logits_come_out(network, shape, classes):
    assert network(torch.randn(2, *shape)).shape == (2, classes)
    assert list(network.children())[-1] is network.head


@pytest.mark.parametrize("depth", [2, 18, 21])
def test_a_depth_that_makes_no_resnet_is_refused(depth):
    with pytest.raises(ValueError, match=f"depth={depth}"):
        ResNetV1(depth)


@pytest.mark.parametrize("network", [MNISTCNN(), ResNetV1(20)])
def test_convolutions_start_he_normal(network):
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 2000:
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.1)
