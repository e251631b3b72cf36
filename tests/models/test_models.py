"""The bundled networks: parameters as published, initialisation and layers as in Keras, shapes and gradients."""

from fnmatch import fnmatch

import pytest
import torch
from torch import nn

from lit_lipschitz.models import MLP, MNISTCNN, DenseNet, ResNetV1, ResNetV2
from lit_lipschitz.models.papers.keras_style import KerasBatchNorm1d, KerasBatchNorm2d, StridedConv3x3, he_normal_

KERAS_STYLE = {
    "ResNet v1": lambda: ResNetV1(8, variant="keras"),
    "ResNet v2": lambda: ResNetV2(11),
    "DenseNet": lambda: DenseNet(10),
}
keras_style = pytest.mark.parametrize("make", KERAS_STYLE.values(), ids=list(KERAS_STYLE))


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


@pytest.mark.parametrize(
    ("make", "trainable", "moving"),
    [
        (lambda: ResNetV1(20, variant="keras"), 273_066, 1_376),
        (lambda: ResNetV1(56, variant="keras"), 857_706, 4_064),
        (lambda: ResNetV2(56), 1_663_338, 10_400),
        (lambda: ResNetV2(164), 4_941_546, 31_136),
        (lambda: ResNetV2(164, num_classes=100), 4_964_676, 31_136),
        (lambda: DenseNet(40, 12), 1_059_298, 18_720),
        (lambda: DenseNet(40, 12, num_classes=100), 1_100_428, 18_720),
    ],
)
def test_keras_style_networks_have_the_parameters_that_keras_counts(make, trainable, moving):
    with torch.device("meta"):
        network = make()
    # What Keras 3.15 counted for the same networks built there: trainable, and the BatchNorms' moving statistics.
    assert parameters(network) == trainable
    assert moving_statistics(network) == moving


def test_the_default_resnet_draws_what_it_always_drew():
    torch.manual_seed(0)
    weights = ResNetV1(8).state_dict()
    assert weights["head.weight"][0, :2].tolist() == pytest.approx([-0.028466, 0.085075], abs=1e-5)
    assert weights["blocks.2.shortcut.0.weight"][0, :2].flatten().tolist() == pytest.approx(
        [-0.231665, -0.197933], abs=1e-5
    )


def test_the_mlp_has_the_parameters_of_its_layers():
    assert parameters(MLP((1, 8, 8), (256, 128), 10)) == 64 * 256 + 256 + 256 * 128 + 128 + 128 * 10 + 10


@pytest.mark.parametrize(
    ("network", "shape", "classes"),
    [
        (MNISTCNN(), (1, 28, 28), 10),
        (MNISTCNN(num_classes=26), (1, 28, 28), 26),
        (ResNetV1(8), (3, 32, 32), 10),
        (ResNetV1(14, num_classes=100, in_channels=1, width=8), (1, 32, 32), 100),
        (ResNetV1(14, num_classes=100, in_channels=1, width=8, variant="keras"), (1, 28, 28), 100),
        (ResNetV1(8, variant="keras"), (3, 33, 31), 10),
        (ResNetV2(11), (3, 32, 32), 10),
        (ResNetV2(20, num_classes=100, in_channels=1), (1, 28, 28), 100),
        (DenseNet(10), (3, 32, 32), 10),
        (DenseNet(7, growth_rate=4, num_classes=100, in_channels=1), (1, 28, 28), 100),
        (MLP((3, 4, 4), (), 5), (3, 4, 4), 5),
    ],
)
def test_images_go_in_and_logits_come_out(network, shape, classes):
    assert network(torch.randn(2, *shape)).shape == (2, classes)
    assert list(network.children())[-1] is network.head


@pytest.mark.parametrize(
    ("network", "depth", "rule"),
    [(ResNetV1, depth, r"6 n \+ 2") for depth in (2, 18, 21)]
    + [(ResNetV2, depth, r"9 n \+ 2") for depth in (2, 14, 163)]
    + [(DenseNet, depth, r"3 n \+ 4") for depth in (1, 4, 41)],
)
def test_a_depth_that_makes_no_network_is_refused(network, depth, rule):
    with pytest.raises(ValueError, match=f"depth={depth}: expected {rule}"):
        network(depth)


def test_a_variant_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="variant='v2': expected 'he' or 'keras'"):
        ResNetV1(8, variant="v2")


def assert_glorot_uniform(weight):
    bound = (6 / sum(weight.shape)) ** 0.5
    assert 0.9 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_the_mnist_cnn_starts_as_keras_starts_it():
    for module in MNISTCNN().modules():
        if isinstance(module, nn.Conv2d):
            assert_he_normal(module.weight)
        if isinstance(module, nn.Linear):
            assert_glorot_uniform(module.weight)
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert not module.bias.any()


def test_convolutions_start_he_normal():
    for module in ResNetV1(20).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 2000:
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.1)


@keras_style
def test_keras_style_networks_start_as_keras_starts_them(make):
    network = make()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            assert_he_normal(module.weight)
            assert module.bias is None or not module.bias.any()
    assert not network.head.bias.any()
    if isinstance(network, DenseNet):
        assert_glorot_uniform(network.head.weight)
    else:
        assert_he_normal(network.head.weight)


def assert_he_normal(weight):
    std = (2 / weight[0].numel()) ** 0.5
    assert weight.abs().max() <= 2 * std / 0.8796 * 1.0001
    assert weight.std().item() == pytest.approx(std, rel=4 / (2 * weight.numel()) ** 0.5)  # five deviations of it


def test_he_normal_is_a_truncated_normal_of_the_right_variance():
    weight = he_normal_(torch.empty(400, 50, 10)) / (2 / 500) ** 0.5
    assert weight.mean().item() == pytest.approx(0, abs=0.01)
    assert weight.std().item() == pytest.approx(1, rel=0.01)
    assert weight.abs().max().item() == pytest.approx(2.2737, rel=0.001)  # 2 / 0.87963
    # A normal truncated at two deviations: 0.7152 of it within one, as 0.6827 / 0.9545.
    assert (weight.abs() < 1 / 0.87963).float().mean().item() == pytest.approx(0.7152, abs=0.005)


@pytest.mark.parametrize(
    ("make", "eps"),
    [
        (KERAS_STYLE["ResNet v1"], 1e-3),
        (KERAS_STYLE["ResNet v2"], 1e-3),
        (KERAS_STYLE["DenseNet"], 1.1e-5),
    ],
)
def test_keras_style_networks_normalise_as_keras_does(make, eps):
    norms = [module for module in make().modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(eps, 0.01)}


def kernels(network, kind):
    return {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, kind)}


def matches(network, *patterns):
    return {name for name, _ in network.named_parameters() if any(fnmatch(name, pattern) for pattern in patterns)}


@pytest.mark.parametrize("network", [ResNetV1(20, variant="keras"), ResNetV2(20)])
def test_a_pattern_matches_a_resnets_convolution_kernels_and_nothing_else(network):
    assert matches(network, "*conv*.weight") == kernels(network, nn.Conv2d)
    assert len(kernels(network, nn.Conv2d)) == (21 if isinstance(network, ResNetV1) else 22)


def test_patterns_match_a_densenets_stem_and_transitions_and_nothing_else():
    network = DenseNet(10)
    assert matches(network, "stem.weight", "*transition*conv.weight") == {
        "stem.weight",
        "features.transition1.conv.weight",
        "features.transition2.conv.weight",
    }
    assert matches(network, "stem.weight", "*conv.weight") == kernels(network, nn.Conv2d)


@keras_style
def test_the_gradient_reaches_every_parameter(make):
    network = make()
    network(torch.randn(4, 3, 32, 32)).logsumexp(1).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if parameter.ndim > 1:  # a bias that BatchNorm takes away again has a gradient of zero
            assert parameter.grad.any(), name


@pytest.mark.parametrize(("size", "centres"), [(4, [1, 3]), (5, [0, 2, 4])])
def test_strided_convolutions_pad_as_keras_does(size, centres):
    convolution = StridedConv3x3(1, 1)
    with torch.no_grad():
        convolution.weight.zero_()[0, 0, 1, 1] = 1  # picks the pixel at the centre of each window
        convolution.bias.zero_()
        rows = torch.arange(float(size))[:, None].expand(1, 1, size, size)
        assert convolution(rows)[0, 0, :, 0].tolist() == centres
        assert convolution(rows.mT)[0, 0, 0].tolist() == centres


def test_a_bottlenecks_shortcut_starts_before_batch_norm_and_relu():
    network = ResNetV2(20)
    activations = torch.randn(2, 64, 4, 4)
    for block in network.blocks[1:3]:  # one with the identity, one with a strided convolution
        nn.init.zeros_(block.conv3.weight)
        assert torch.equal(block(activations), block.shortcut_conv(activations))


@pytest.mark.parametrize(("norm", "shape"), [(KerasBatchNorm1d, (6, 4)), (KerasBatchNorm2d, (6, 4, 3, 3))])
def test_moving_statistics_forget_their_start(norm, shape):
    ours, torchs = norm(4), nn.BatchNorm1d(4, eps=1e-3) if len(shape) == 2 else nn.BatchNorm2d(4, eps=1e-3)
    batches = [torch.randn(shape) * 3 + 7 for _ in range(5)]
    axes = [axis for axis in range(len(shape)) if axis != 1]
    for batch in batches:
        torch.testing.assert_close(ours(batch), torchs(batch))
    mean = variance = 0.0
    for batch in batches:  # averages from 0, corrected at the end
        mean = 0.99 * mean + 0.01 * batch.mean(dim=axes)
        variance = 0.99 * variance + 0.01 * batch.var(dim=axes)
    torch.testing.assert_close(ours.running_mean, mean / (1 - 0.99**5))
    torch.testing.assert_close(ours.running_var, variance / (1 - 0.99**5))
    ours.eval()
    expected = (batches[0].movedim(1, -1) - ours.running_mean) / (ours.running_var + 1e-3).sqrt()
    torch.testing.assert_close(ours(batches[0]), expected.movedim(-1, 1))


@pytest.mark.parametrize(("training", "least", "most"), [(False, 0.0, 1e-5), (True, 0.5, 5.0)])
def test_the_first_rate_of_resnet164_needs_batch_statistics(training, least, most):
    """1/L of the paper family at initialisation, by torch alone: k = 100 classes, 32 images of noise."""
    network = ResNetV2(164, num_classes=100).train(training)
    seen = []
    network.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].norm().item()))
    with torch.no_grad():
        network(torch.rand(32, 3, 32, 32) - 0.5)
    assert least < 1 / (99 / (100 * 32) * seen[0]) < most
