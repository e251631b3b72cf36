"""The tasks that compare.py compares learning-rate policies on: real data, small enough for a CPU.

Each task is a network, data cut into a training, a validation and a test part, a loss and a length. Nothing is
downloaded: the images are read from the folder that LIT_LIPSCHITZ_DATA names, the tables come with scikit-learn and
the text with Python.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_lipschitz import MLP, MNISTCNN, DenseNet, ResNetV1
from lit_lipschitz.data.augmentation import random_affine, random_crop, random_flip
from lit_lipschitz.data.sources import SOURCES

Part = tuple[Tensor, Tensor]
Transform = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Data:
    """Inputs and targets of the three parts, and the augmentation of training inputs."""

    train: Part
    val: Part
    test: Part
    augment: Transform


@dataclass(frozen=True)
class Task:
    """A network, its data and the length of its training.

    Attributes:
        network: Makes the network.
        data: Makes the data; called with the seed, which draws the training and validation parts but not the test part.
        loss: Of outputs and targets, a mean.
        metric: Of outputs and targets: ``"accuracy"`` in per cent, or ``"loss"``.
        epochs: Length of the run.
        batch_size: Examples in a batch.
        weight_decay: Of the optimizer, coupled in SGD and decoupled in AdamW.
    """

    network: Callable[[], nn.Module]
    data: Callable[[int], Data]
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    metric: str = "accuracy"
    epochs: int = 10
    batch_size: int = 64
    weight_decay: float = 0.0


def _keep(inputs: Tensor, generator: torch.Generator) -> Tensor:
    return inputs


def split(inputs: Tensor, targets: Tensor, sizes: tuple[int, int], seed: int) -> tuple[Part, Part]:
    """Cuts a training and a validation part of given sizes, drawn by the seed."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    train, val = order[: sizes[0]], order[sizes[0] : sum(sizes)]
    return (inputs[train], targets[train]), (inputs[val], targets[val])


@cache
def _table(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=0.3, random_state=0)
    mean, std = train_x.mean(axis=0), train_x.std(axis=0)
    std[std == 0] = 1.0
    if name == "diabetes":
        center, scale = train_y.mean(), train_y.std()
        train_y, test_y = (train_y - center) / scale, (test_y - center) / scale
    scaled = (torch.tensor((part - mean) / std).float() for part in (train_x, test_x))
    train_inputs, test_inputs = scaled
    return train_inputs, torch.tensor(train_y), test_inputs, torch.tensor(test_y)


def table(name: str, floating: bool, seed: int) -> Data:
    """A table of scikit-learn with standardised columns: 30 % of the rows to test, 20 % of the rest to validate.

    The test rows are the same for all seeds.
    """
    train_x, train_y, test_x, test_y = _table(name)
    if floating:
        train_y, test_y = train_y.float().unsqueeze(1), test_y.float().unsqueeze(1)
    held_out = len(train_x) // 5
    train, val = split(train_x, train_y, (len(train_x) - held_out, held_out), seed)
    return Data(train, val, (test_x, test_y), _keep)


@cache
def _images(source: str, half: bool) -> tuple[Part, Part]:
    folder = Path(os.environ.get("LIT_LIPSCHITZ_DATA", "data"))
    parts = []
    for train in (True, False):
        images, labels = SOURCES[source].load(folder, train, verify=False)
        images = images.float().div_(255)
        if half:
            images = F.avg_pool2d(images, 2)
        parts.append((images, labels))
    mean = parts[0][0].mean(dim=(0, 2, 3), keepdim=True)
    std = parts[0][0].std(dim=(0, 2, 3), keepdim=True)
    return tuple(((images - mean) / std, labels) for images, labels in parts)  # type: ignore[return-value]


def _shift_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    return random_flip(random_crop(images, 2, generator), generator)


def images(source: str, half: bool, sizes: tuple[int, int], tests: int, augment: Transform, seed: int) -> Data:
    """A part of an image data set, at half its resolution or all of it, and the first ``tests`` of its test images."""
    train, test = _images(source, half)
    return Data(*split(*train, sizes, seed), (test[0][:tests], test[1][:tests]), augment)


CONTEXT = 64


@cache
def _text() -> tuple[Tensor, int]:
    from pydoc_data.topics import topics

    text = "".join(topics[name] for name in sorted(topics))
    alphabet = {character: i for i, character in enumerate(sorted(set(text)))}
    return torch.tensor([alphabet[character] for character in text]), len(alphabet)


def text(seed: int) -> Data:
    """The language reference that ships with Python, character by character; its last tenths validate and test."""
    tokens, _ = _text()
    windows = tokens[: (len(tokens) - 1) // CONTEXT * CONTEXT + 1]
    inputs, targets = windows[:-1].reshape(-1, CONTEXT), windows[1:].reshape(-1, CONTEXT)
    tenth = len(inputs) // 10
    first, second = len(inputs) - 2 * tenth, len(inputs) - tenth
    order = torch.randperm(first, generator=torch.Generator().manual_seed(seed))[:4800]
    return Data(
        (inputs[order], targets[order]),
        (inputs[first:second], targets[first:second]),
        (inputs[second:], targets[second:]),
        _keep,
    )


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over all tokens; logits of shape (batch, tokens, characters)."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, tokens, width) to the same shape."""
        parts = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=self.causal)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class CharacterModel(nn.Module):
    """A language model of characters: embeddings, blocks, a last LayerNorm, the head."""

    def __init__(self, width: int = 64, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        _, characters = _text()
        self.embedding = nn.Embedding(characters, width)
        self.positions = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of shape (batch, tokens, characters)."""
        return self.head(self.norm(self.blocks(self.embedding(tokens) + self.positions)))


class VisionTransformer(nn.Module):
    """A small vision transformer: patches, blocks, mean over patches, the head."""

    def __init__(self, size: int = 16, patch: int = 4, width: int = 64, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, 10)."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


def plain_cnn() -> nn.Module:
    """Convolutions with stride 2 and dropout, without normalisation."""
    convolutions = [nn.Conv2d(before, after, 3, 2, 1) for before, after in ((3, 16), (16, 32), (32, 32))]
    layers = [layer for convolution in convolutions for layer in (convolution, nn.ReLU())]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.25), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))


class Rows(nn.Module):
    """A GRU that reads an image row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.head = nn.GRU(28, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, 10), of images of shape (batch, 1, 28, 28)."""
        return self.head(self.memory(images.squeeze(1))[0][:, -1])


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution, LayerNorm and two linear maps, with a skip connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, width, height, width) to the same shape."""
        return x + self.mlp(self.depthwise(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    """A small ConvNeXt."""
    stages = nn.Conv2d(3, 32, 2, 2), ConvNeXtBlock(32), ConvNeXtBlock(32), nn.Conv2d(32, 64, 2, 2), ConvNeXtBlock(64)
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 10))


class CharacterLSTM(nn.Module):
    """A language model of characters: embeddings, an LSTM, the head."""

    def __init__(self) -> None:
        super().__init__()
        _, characters = _text()
        self.embedding, self.memory = nn.Embedding(characters, 32), nn.LSTM(32, 128, batch_first=True)
        self.head = nn.Linear(128, characters)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of shape (batch, tokens, characters)."""
        return self.head(self.memory(self.embedding(tokens))[0])


def pixels(seed: int) -> Data:
    """Images of MNIST as inputs and as targets, between 0 and 1."""
    folder = Path(os.environ.get("LIT_LIPSCHITZ_DATA", "data"))
    train, test = (
        SOURCES["MNIST"].load(folder, is_train, verify=False)[0].flatten(1).float().div_(255)
        for is_train in (True, False)
    )
    return Data(*split(train, train, (6000, 2500), seed), (test, test), _keep)


def friedman(seed: int) -> Data:
    """Friedman's first regression problem, with a standard deviation of the noise of 1; standardised."""
    from sklearn.datasets import make_friedman1

    columns = (torch.tensor(column).float() for column in make_friedman1(5000, noise=1.0, random_state=0))
    inputs, targets = ((column - column.mean(dim=0)) / column.std(dim=0) for column in columns)
    return Data(
        *split(inputs[:2500], targets[:2500, None], (2000, 500), seed), (inputs[2500:], targets[2500:, None]), _keep
    )


def quick_norms(make: Callable[[], nn.Module]) -> nn.Module:
    """A network whose BatchNorm forgets as fast as torch's does by default.

    That of the papers' networks averages over 100 batches, a quarter of such a short run, so that the evaluation would
    depend more on the lag of its statistics than on the weights.
    """
    network = make()
    for part in network.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.momentum = 0.1
    return network


def _affine_batch(inputs: Tensor, generator: torch.Generator) -> Tensor:
    return random_affine(inputs, degrees=15, zoom=0.1, shift=0.1, generator=generator)


TASKS: dict[str, Task] = {
    "digits_mlp": Task(partial(MLP, (64,)), partial(table, "digits", False), epochs=15, batch_size=32),
    "breast_cancer_mlp": Task(
        partial(MLP, (30,), (16,), 1),
        partial(table, "breast_cancer", True),
        F.binary_cross_entropy_with_logits,
        metric="loss",
        epochs=15,
        batch_size=32,
    ),
    "diabetes_mlp": Task(
        partial(MLP, (10,), (16,), 1),
        partial(table, "diabetes", True),
        F.mse_loss,
        metric="loss",
        epochs=15,
        batch_size=32,
    ),
    "mnist_cnn": Task(
        partial(quick_norms, MNISTCNN),
        partial(images, "MNIST", False, (6000, 2500), 10000, _affine_batch),
        epochs=2,
        batch_size=32,
    ),
    "cifar10_resnet20": Task(
        partial(ResNetV1, depth=20, num_classes=10),
        partial(images, "CIFAR10", True, (6000, 2500), 10000, _shift_and_flip),
        epochs=4,
        batch_size=64,
        weight_decay=5e-4,
    ),
    "cifar10_densenet": Task(
        partial(quick_norms, DenseNet),
        partial(images, "CIFAR10", True, (1500, 500), 2000, _shift_and_flip),
        epochs=2,
        batch_size=32,
        weight_decay=1e-4,
    ),
    "cifar10_vit": Task(
        VisionTransformer,
        partial(images, "CIFAR10", True, (8000, 2500), 10000, _shift_and_flip),
        epochs=4,
        batch_size=64,
        weight_decay=0.05,
    ),
    "text_transformer": Task(CharacterModel, text, token_loss, metric="loss", epochs=2, batch_size=16),
    # The following ones are of other kinds; docs/guide/evidence.md says which choices were made on them.
    "cifar10_cnn": Task(
        plain_cnn,
        partial(images, "CIFAR10", False, (10000, 2500), 10000, _keep),
        epochs=6,
        batch_size=128,
    ),
    "cifar10_convnext": Task(
        convnext,
        partial(images, "CIFAR10", True, (6000, 2500), 10000, _shift_and_flip),
        partial(F.cross_entropy, label_smoothing=0.1),
        epochs=4,
        batch_size=64,
        weight_decay=0.05,
    ),
    "mnist_gru": Task(Rows, partial(images, "MNIST", False, (6000, 2500), 10000, _keep), epochs=5),
    "mnist_autoencoder": Task(
        partial(MLP, (784,), (128, 32, 128), 784), pixels, F.binary_cross_entropy_with_logits, metric="loss", epochs=8
    ),
    "friedman_mlp": Task(
        partial(MLP, (10,), (64, 64), 1), friedman, F.mse_loss, metric="loss", epochs=20, batch_size=32
    ),
    "text_lstm": Task(CharacterLSTM, text, token_loss, metric="loss", epochs=4, batch_size=16),
}
