"""All that is asked about the graph of one backward is answered by reading each of its nodes once."""

from collections import Counter

import pytest
import torch
from helpers import CLASSES, WIDTH, Classifier, due_steps, loader, trainer
from torch import nn
from torch.nn import functional as F

from lit_lipschitz import LipschitzLR
from lit_lipschitz.recognition.loss_graph import LossGraph


class CountedNode:
    """A node of an autograd graph that counts how often the nodes below it are read."""

    def __init__(self, node, made, reads):
        self._node, self._made, self._reads = node, made, reads

    def __getattr__(self, name):
        return getattr(self._node, name)

    @property
    def next_functions(self):
        self._reads[self] += 1
        return tuple((below and self.of(below), index) for below, index in self._node.next_functions)

    def of(self, node):
        if node not in self._made:
            self._made[node] = CountedNode(node, self._made, self._reads)
        return self._made[node]


@pytest.fixture
def graphs(monkeypatch):
    """How often each node was read, of each graph."""
    reads = []

    class CountedLoss:
        def __init__(self, loss):
            reads.append(Counter())
            self.grad_fn = loss.grad_fn and CountedNode(loss.grad_fn, {}, reads[-1])

    init = LossGraph.__init__
    monkeypatch.setattr(LossGraph, "__init__", lambda self, loss, name=None: init(self, CountedLoss(loss), name))
    return reads


def focal(net, inputs, targets):
    entropy = F.cross_entropy(net(inputs), targets, reduction="none")
    return ((1 - torch.exp(-entropy)) ** 2 * entropy).mean()


LOSSES = {
    "recognised": lambda net, x, y: F.cross_entropy(net(x), y),
    "behind a temperature": lambda net, x, y: F.cross_entropy(net(x) * 3, y),
    "mixup": lambda net, x, y: F.cross_entropy(out := net(x), y) * 0.3 + F.cross_entropy(out, y.flip(0)) * 0.7,
    "squared": lambda net, x, y: F.mse_loss(net(x), F.one_hot(y, CLASSES).float()),
    "joined calls": lambda net, x, y: F.cross_entropy(torch.cat([net(x[:4]), net(x[4:])]), y),
    "focal": focal,
    "sum": lambda net, x, y: focal(net, x, y) + 0.1 * F.cross_entropy(net(x), y) + net[2].weight.square().sum(),
}


class Module(Classifier):
    """A classifier with any loss, whose head may have weight normalisation."""

    def __init__(self, loss, normed=False):
        head = nn.Linear(8, CLASSES)
        head = nn.utils.parametrizations.weight_norm(head) if normed else head
        body = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0)
        super().__init__(lambda p: torch.optim.AdamW(p, lr=0.1), nn.Sequential(body, nn.Linear(WIDTH, 8), head))
        self.loss = loss

    def training_step(self, batch, batch_idx):
        return self.loss(self.net, *batch)


@pytest.mark.parametrize("settings", [{}, {"loss": "cross_entropy"}, {"head": "net.2"}, {"loss": "measured"}], ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_no_node_is_read_twice_in_a_backward(name, normed, settings, graphs):
    trainer(LipschitzLR(**settings), max_epochs=2).fit(Module(LOSSES[name], normed), loader())
    assert len(graphs) == len(due_steps(12, 6))
    assert any(graphs)
    assert {count for reads in graphs for count in reads.values()} == {1}


class Two(Module):
    """Two optimizers, each with its own head and loss."""

    def __init__(self):
        super().__init__(LOSSES["recognised"])
        self.automatic_optimization, self.other = False, nn.Linear(8, CLASSES)

    def training_step(self, batch, batch_idx):
        one, other = self.optimizers()
        for optimizer, loss in ((one, super().training_step), (other, self.of_other)):
            optimizer.zero_grad()
            self.manual_backward(loss(batch, batch_idx))
            optimizer.step()

    def of_other(self, batch, batch_idx):
        return focal(lambda x: self.other(self.net[:2](x)), *batch)

    def configure_optimizers(self):
        return [torch.optim.AdamW(part.parameters(), lr=0.1) for part in (self.net, self.other)]


def test_several_optimizers_share_what_was_read(graphs):
    trainer(LipschitzLR(optimizers=[0, 1]), max_epochs=2).fit(Two(), loader())
    assert len(graphs) == 24
    assert {count for reads in graphs for count in reads.values()} == {1}
