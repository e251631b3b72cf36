"""Random losses of small networks: no gradient exceeds a constant of its step, nor, in any step, one called a bound."""

import itertools
import random

import lightning as L
import pytest
import torch
from helpers import trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lit_lipschitz import LipschitzLR

ROWS, WIDTH, OUTPUTS, STEPS = 8, 5, 3, 7


def between(name, module, z):
    """An operation between the output layer and the loss."""
    if name == "temperature":
        return z / module.number
    if name == "learned":
        return z * module.learned.exp()
    if name == "each output":
        return z * module.numbers
    if name == "rows":
        return z[torch.rand(len(z)) > 0.4]
    if name == "clamp":
        return z.clamp(-3 * module.number, 3 * module.number)
    if name == "offset":
        return torch.add(module.numbers, z, alpha=module.number)
    if name == "broadcast":
        return (z[:, None] + torch.zeros(1, 4, 1)).flatten(0, 1)
    if name == "twice":
        return torch.cat([z, z.flip(0)])
    return z.relu() if name == "relu" else z


def loss_of(name, z, factor):
    """A loss of outputs with random targets."""
    if len(z) == 0:
        return z.sum()
    classes = torch.randint(OUTPUTS, (len(z),))
    if name == "cross-entropy":
        return factor * F.cross_entropy(z, classes)
    if name == "ignored":
        return F.cross_entropy(z, torch.where(torch.rand(len(z)) < 0.5, classes, -100), reduction="sum") * factor
    if name == "sum":
        return F.cross_entropy(z, classes, reduction="sum") / 3
    if name == "probabilities":
        reduction = random.choice(["mean", "sum"])
        return F.cross_entropy(z, torch.randn(len(z), OUTPUTS).softmax(1), reduction=reduction)
    if name == "binary":
        return factor * F.binary_cross_entropy_with_logits(z, torch.rand_like(z), pos_weight=torch.rand(OUTPUTS) * 5)
    if name == "squares":
        return F.mse_loss(z, 5 * torch.randn_like(z)) * factor
    if name == "absolute":
        return (z - torch.randn_like(z)).abs().mean() * factor
    if name == "huber":
        return F.huber_loss(z, torch.randn_like(z), delta=factor)
    if name == "focal":
        entropy = F.cross_entropy(z, classes, reduction="none")
        return ((1 - torch.exp(-entropy)) ** 2 * entropy).mean()
    return F.cross_entropy(z, classes) + 0.1 * F.multi_margin_loss(z, classes)


BETWEEN = ["", "", "temperature", "learned", "each output", "rows", "clamp", "offset", "broadcast", "twice", "relu"]
LOSSES = ["cross-entropy", "ignored", "sum", "probabilities", "binary", "squares", "absolute", "huber", "focal", "two"]


class Random(L.LightningModule):
    """A random loss, whose targets, masks and factors may change from batch to batch."""

    def __init__(self, seed):
        super().__init__()
        self.choice = random.Random(seed)
        self.body, self.head = nn.Linear(WIDTH, 6), nn.Linear(6, OUTPUTS)
        self.learned = nn.Parameter(torch.tensor(self.choice.uniform(-2, 3)))
        self.number, self.numbers = self.choice.choice([0.05, 1.0, 20.0]), 3 * torch.rand(OUTPUTS)
        self.steps = self.choice.choices(BETWEEN, k=2)
        self.kind, self.changes = self.choice.choice(LOSSES), self.choice.random() < 0.3
        with torch.no_grad():
            self.head.weight.mul_(self.choice.choice([0.1, 1.0, 30.0]))

    def training_step(self, batch, batch_idx):
        z, factor = self.head(self.body(batch[0])), 1.0
        if self.changes and batch_idx > 2:
            factor = 1.0 + batch_idx
            self.kind = LOSSES[(LOSSES.index(self.kind) + 1) % len(LOSSES)]
        for name in self.steps:
            z = between(name, self, z)
        return loss_of(self.kind, z, factor)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=self.choice.choice([0.0, 0.9]))


@pytest.mark.filterwarnings("ignore:LipschitzLR")
@pytest.mark.parametrize("seed", range(120))
def test_no_gradient_exceeds_its_constant(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    module = Random(seed)
    # The weights stay where they are, and each batch has the same inputs: a bound holds in each later step too.
    callback = LipschitzLR(schedule="none", max_lr=1e-12)
    steps = itertools.count(1)

    def compare(*_):
        step, decision = next(steps), callback.controllers[0].updater.state.decision
        gradient = sum(p.grad.square().sum() for p in module.head.parameters() if p.grad is not None) ** 0.5
        if decision is None:  # all gradients so far are 0
            assert gradient == 0
        elif not decision.is_measured or step & (step - 1) == 0:
            kind = "measured" if decision.is_measured else "bound"
            found.append((kind, float(gradient) / decision.constant))

    class Watch(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            trainer.optimizers[0].register_step_post_hook(compare)

    found = []
    inputs = torch.randn(ROWS, WIDTH).repeat(STEPS, 1)
    trainer(callback, Watch(), max_epochs=1).fit(module, DataLoader(TensorDataset(inputs), batch_size=ROWS))
    assert all(ratio <= 1.001 for _, ratio in found), (module.kind, module.steps, found)
