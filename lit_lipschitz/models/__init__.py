"""Networks of the bundled configs: plain modules whose last child is the output layer."""

from lit_lipschitz.models.mlp import MLP
from lit_lipschitz.models.named import named_network
from lit_lipschitz.models.papers import MNISTCNN, DenseNet, ResNetV2
from lit_lipschitz.models.resnet import ResNetV1
from lit_lipschitz.models.resnet9 import ResNet9

__all__ = ["MLP", "MNISTCNN", "DenseNet", "ResNet9", "ResNetV1", "ResNetV2", "named_network"]
