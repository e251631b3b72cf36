"""The tasks of public.py: data, network, loss, batch and length as in the sources of the published figures.

A seed draws the initialisation and the order of the examples. MNIST is read from the folder that LIT_LIPSCHITZ_DATA
names, the citation graphs from its folder ``planetoid``, and the quadratic problem is generated.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from citation_graphs import read_graph
from tasks import Part
from torch import Tensor, nn
from torch.nn import functional as F

from lit_lipschitz.data.sources import SOURCES


class Data(NamedTuple):
    """Inputs and targets of the three parts."""

    train: Part
    val: Part
    test: Part


Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""The training loss of a network on inputs and targets."""


@dataclass(frozen=True)
class Published:
    """A published figure.

    Attributes:
        figure: Of the test metric, after the last epoch.
        title: The optimizer and its settings, as in the source.
        source: The address of the page or paper that has it.
        policy: The policy of public.py that repeats it, or the name of a grid, or none.
    """

    figure: float
    title: str
    source: str
    policy: str = ""


@dataclass(frozen=True)
class PublicTask:
    """A task with published figures.

    Attributes:
        settings: Where the settings stand.
        network: Makes the network.
        data: Makes the data. If the source has no validation part, the test part validates too.
        loss: The training loss.
        metric: ``"accuracy"`` in per cent, ``"loss"``, or ``"steps"`` until the validation accuracy is above 97 %.
        epochs: Length of the run.
        batch_size: Examples in a batch.
        drop_last: Whether an incomplete last batch is left out.
        seeds: Number of runs.
        stop_early: Whether the source ends a run by the validation loss.
        published: The published figures.
        grids: Learning rates of the tuned grid by policy.
        weight_decay: Of the optimizer; no source has one.
    """

    settings: str
    network: Callable[[], nn.Module]
    data: Callable[[], Data]
    loss: Loss
    metric: str
    epochs: int
    batch_size: int
    published: tuple[Published, ...]
    grids: dict[str, tuple[float, ...]]
    drop_last: bool = True
    seeds: int = 3
    stop_early: bool = False
    weight_decay: float = 0.0


def cross_entropy(network: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(network(inputs), targets)


@cache
def _pixels(train: bool) -> Part:
    folder = Path(os.environ.get("LIT_LIPSCHITZ_DATA", "data"))
    images, labels = SOURCES["MNIST"].load(folder, train, verify=False)
    return images.float().div_(255), labels


@cache
def _standardised(train: bool) -> Part:
    images, labels = _pixels(train)
    return (images - 0.1307) / 0.3081, labels


def _mnist() -> Data:
    return Data(_standardised(True), _standardised(False), _standardised(False))


def _mnist_50000() -> Data:
    images, labels = _standardised(True)
    return Data((images[:50_000], labels[:50_000]), (images[50_000:], labels[50_000:]), _standardised(False))


def _mnist_autoencoder() -> Data:
    images, tests = _pixels(True)[0], _pixels(False)[0][:9_984]  # DeepOBS leaves out the incomplete last batch
    test = (tests, tests)
    return Data((images, images), test, test)


def _mlp(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for width, following in pairwise(widths):
        layers += [nn.Linear(width, following), activation()]
    return nn.Sequential(*layers[:-1])


def _example_cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)),
        *(nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)),
    )


class GraphNetwork(nn.Module):
    """Two graph convolutions, softmax(A relu(A X W0) W1) without the softmax; its inputs are numbers of nodes."""

    def __init__(self, name: str, width: int = 16) -> None:
        super().__init__()
        graph = read_graph(name)
        self.adjacency, self.features = graph.adjacency, graph.features
        self.first = nn.Parameter(nn.init.xavier_uniform_(torch.empty(self.features.shape[1], width)))
        self.second = nn.Linear(width, int(graph.labels.max()) + 1, bias=False)
        nn.init.xavier_uniform_(self.second.weight)

    def forward(self, nodes: Tensor) -> Tensor:
        """Logits of the nodes, with dropout of half of the non-zero features and of the hidden units in training."""
        values = F.dropout(self.features.values(), 0.5, self.training)
        size = self.features.shape
        features = torch.sparse_coo_tensor(
            self.features.indices(), values, size, is_coalesced=True, check_invariants=False
        )
        hidden = torch.sparse.mm(self.adjacency, torch.sparse.mm(features, self.first)).relu()
        outputs = self.second(F.dropout(hidden, 0.5, self.training))
        return torch.sparse.mm(self.adjacency, outputs)[nodes]


def _graph_data(name: str) -> Data:
    graph = read_graph(name)
    train, val, test = ((nodes, graph.labels[nodes]) for nodes in (graph.train, graph.val, graph.test))
    return Data(train, val, test)


def _graph_loss(network: nn.Module, nodes: Tensor, labels: Tensor) -> Tensor:
    assert isinstance(network, GraphNetwork)
    return cross_entropy(network, nodes, labels) + 5e-4 / 2 * network.first.square().sum()


class Quadratic(nn.Module):
    """The parameters of a noisy quadratic, which start at 1, minus its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(100))

    def forward(self, inputs: Tensor) -> Tensor:
        """Deviations, of shape (batch, 100)."""
        return self.theta - inputs


@cache
def hessian() -> Tensor:
    """A matrix with 90 eigenvalues in (0, 1) and 10 in (30, 60), in DeepOBS's order of random numbers.

    The rotation is drawn by the subgroup algorithm of Diaconis and Shahshahani (1987): from size d to d + 1 by a
    reflection that maps the first axis to a random direction.
    """
    random = np.random.RandomState(42)
    eigenvalues = np.concatenate([random.uniform(0, 1, 90), random.uniform(30, 60, 10)])
    angle = 2 * np.pi * random.uniform()
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    for size in range(3, 101):
        normal = -random.normal(size=size)
        normal /= np.linalg.norm(normal)
        normal[0] += 1
        normal /= np.linalg.norm(normal)
        grown = np.eye(size)
        grown[1:, 1:] = rotation
        rotation = grown - 2 * np.outer(normal, normal @ grown)
    return torch.from_numpy(rotation.T * eigenvalues @ rotation).float()


def _quadratic_loss(network: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    deviations = network(inputs)
    return 0.5 * (deviations @ hessian() * deviations).sum(dim=1).mean()


def _quadratic_data() -> Data:
    train, test = (np.random.RandomState(seed).normal(0, 0.6, (1000, 100)) for seed in (42, 43))
    inputs, tests = torch.from_numpy(train).float(), torch.from_numpy(test[:896]).float()  # 7 batches of 128
    held_out = (tests, tests)
    return Data((inputs, inputs), held_out, held_out)


class Autoencoder(nn.Module):
    """The variational autoencoder of DeepOBS, with 8 latent units; padding as TensorFlow's "same"."""

    def __init__(self) -> None:
        super().__init__()
        leaky = partial(nn.LeakyReLU, 0.3)
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, 64, 4, 2, 1), leaky(), nn.Dropout(0.2), nn.Conv2d(64, 64, 4, 2, 1), leaky()),
            *(nn.Dropout(0.2), nn.ZeroPad2d((1, 2, 1, 2)), nn.Conv2d(64, 64, 4), leaky(), nn.Dropout(0.2)),
            nn.Flatten(),
        )
        self.mean, self.spread = nn.Linear(3136, 8), nn.Linear(3136, 8)
        # A transposed convolution of width 4 and stride 1 has 3 rows and columns too many; cut off as in TensorFlow.
        cut = partial(nn.ZeroPad2d, (-1, -2, -1, -2))
        self.decoder = nn.Sequential(
            *(nn.Linear(8, 24), leaky(), nn.Linear(24, 49), leaky(), nn.Unflatten(1, (1, 7, 7))),
            *(nn.ConvTranspose2d(1, 64, 4, 2, 1), nn.ReLU(), nn.Dropout(0.2)),
            *(nn.ConvTranspose2d(64, 64, 4), cut(), nn.ReLU(), nn.Dropout(0.2)),
            *(nn.ConvTranspose2d(64, 64, 4), cut(), nn.ReLU(), nn.Flatten(), nn.Linear(12544, 784), nn.Sigmoid()),
        )
        for part in self.modules():
            if isinstance(part, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images from a sampled code, and the mean and the log of the standard deviation of the code."""
        hidden = self.encoder(images)
        mean, log_deviation = self.mean(hidden), 0.5 * self.spread(hidden)
        code = mean + torch.randn_like(mean) * log_deviation.exp()
        return self.decoder(code), mean, log_deviation


def _autoencoder_loss(network: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    outputs, mean, log_deviation = network(images)
    squares = (outputs - targets.flatten(1)).square().sum(dim=1)
    divergence = -0.5 * (1 + 2 * log_deviation - mean.square() - (2 * log_deviation).exp()).sum(dim=1)
    return (squares + divergence).mean()


SGD_RATES, ADAMW_RATES = (0.003, 0.01, 0.03, 0.1, 0.3), (0.0003, 0.001, 0.003, 0.01, 0.03)
RECORDS = "https://github.com/fabian-sp/step-back/blob/main/stepback/records/mnist_mlp.csv"
EXAMPLE = "https://github.com/facebookresearch/schedule_free/blob/main/examples/mnist/README.md"
DEEPOBS = "https://arxiv.org/abs/1903.05499"
GCN = "https://arxiv.org/abs/1609.02907"


def _gcn(name: str, figure: float) -> PublicTask:
    return PublicTask(
        settings="https://github.com/tkipf/gcn, gcn/train.py",
        network=partial(GraphNetwork, name),
        data=partial(_graph_data, name),
        loss=_graph_loss,
        metric="accuracy",
        epochs=200,
        batch_size=60 if name == "pubmed" else 120 if name == "citeseer" else 140,
        seeds=100,
        stop_early=True,
        published=(Published(figure, "Adam 0.01", GCN, "adam-constant:0.01"),),
        grids={"sgd": (0.1, 0.3, 1.0, 3.0, 10.0), "adamw": (0.003, 0.01, 0.03, 0.1)},
    )


TASKS = {
    "mnist_mlp": PublicTask(
        settings="https://github.com/fabian-sp/step-back, configs/mnist_mlp.json",
        network=partial(_mlp, 784, 100, 100, 10),
        data=_mnist,
        loss=cross_entropy,
        metric="accuracy",
        epochs=10,
        batch_size=128,
        published=(
            Published(97.73, "SGD 0.1, momentum and dampening 0.9", RECORDS, "sgd-dampened:0.1"),
            Published(97.75, "Adam 0.001", RECORDS, "adam-constant:0.001"),
            Published(97.97, "MoMo 1", RECORDS, "momo"),
            Published(97.96, "MoMo-Adam 0.01", RECORDS, "momo-adam"),
        ),
        grids={"sgd": SGD_RATES, "adamw": ADAMW_RATES},
    ),
    "mnist_example": PublicTask(
        settings="https://github.com/pytorch/examples, mnist/main.py",
        network=_example_cnn,
        data=_mnist,
        loss=cross_entropy,
        metric="accuracy",
        epochs=14,
        batch_size=64,
        drop_last=False,
        published=(
            Published(99.22, "Adadelta 1, times 0.7 after each epoch", EXAMPLE, "adadelta"),
            Published(99.35, "Schedule-Free AdamW 0.0025, no warm-up", EXAMPLE, "schedulefree-default"),
        ),
        grids={"sgd": (0.01, 0.03, 0.1), "adamw": (0.0003, 0.001, 0.003)},
    ),
    "gcn_cora": _gcn("cora", 81.5),
    "gcn_citeseer": _gcn("citeseer", 70.3),
    "gcn_pubmed": _gcn("pubmed", 79.0),
    "quadratic_deep": PublicTask(
        settings="https://github.com/fsschneider/DeepOBS, quadratic_deep of version 1.1",
        network=Quadratic,
        data=_quadratic_data,
        loss=_quadratic_loss,
        metric="loss",
        epochs=100,
        batch_size=128,
        seeds=10,
        published=(Published(87.05, "momentum 0.9, best constant of 36", DEEPOBS, "sgd-constant"),),
        grids={
            "sgd": (0.0003, 0.001, 0.003, 0.01, 0.03),
            "adamw": (0.003, 0.01, 0.03, 0.1, 0.3),
            "sgd-constant": tuple(float(f"{10**power:.3g}") for power in np.linspace(-5, 2, 36)),
        },
    ),
    "mnist_vae": PublicTask(
        settings="https://github.com/fsschneider/DeepOBS, mnist_vae of version 1.1",
        network=Autoencoder,
        data=_mnist_autoencoder,
        loss=_autoencoder_loss,
        metric="loss",
        epochs=50,
        batch_size=64,
        published=(Published(27.83, "Adam, best constant of 36", DEEPOBS),),
        grids={"sgd": (0.0003, 0.001, 0.003), "adamw": (0.0003, 0.001, 0.003)},
    ),
    "algoperf_mnist": PublicTask(
        settings="https://github.com/mlcommons/algorithmic-efficiency, workloads/mnist",
        network=partial(_mlp, 784, 128, 10, activation=nn.Sigmoid),
        data=_mnist_50000,
        loss=cross_entropy,
        metric="steps",
        epochs=10,
        batch_size=64,
        published=(),  # the target alone; its step_hint of 7,813 steps, 10 epochs of batch 64, is the length here
        grids={"sgd": (0.03, 0.1, 0.3, 1.0), "adamw": ADAMW_RATES},
    ),
}
