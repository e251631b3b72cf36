"""Networks of the bundled configs, as plain modules whose last child is the head."""

from lit_lipschitz.models.densenet import DenseNet
from lit_lipschitz.models.mlp import MLP
from lit_lipschitz.models.mnist_cnn import MNISTCNN
from lit_lipschitz.models.resnet import ResNetV1
from lit_lipschitz.models.resnet9 import ResNet9
from lit_lipschitz.models.resnet_v2 import ResNetV2

__all__ = ["MLP", "MNISTCNN", "DenseNet", "ResNet9", "ResNetV1", "ResNetV2"]
