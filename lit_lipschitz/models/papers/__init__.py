"""Networks of the LipschitzLR papers' experiments, with the layers and initial weights of their Keras originals."""

from lit_lipschitz.models.papers.densenet import DenseNet
from lit_lipschitz.models.papers.mnist_cnn import MNISTCNN
from lit_lipschitz.models.papers.resnet_v2 import ResNetV2

__all__ = ["MNISTCNN", "DenseNet", "ResNetV2"]
