"""LipschitzLR(measure="pass"): the papers' way to measure, and the rules of their scripts."""

import copy
import math

import lightning as L
import pytest
import torch
from conftest import CLASSES, WIDTH, Classifier, Steps, loader, trainer
from torch import nn
from torch.nn import functional as F

from lit_lipschitz import ConfigurationError, LipschitzLR


def fit(callback, kind, **settings):
    """Trains a module from a fixed seed; returns it and the rates of every step."""
    torch.manual_seed(1)
    module, steps = kind(), Steps()
    trainer(callback, steps, **settings).fit(module, loader())
    return module, steps.rates


class Regularized(Classifier):
    """Dropout and BatchNorm, which a pass in inference mode must see at rest."""

    def __init__(self, optimizer=None):
        net = nn.Sequential(
            nn.Linear(WIDTH, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, CLASSES)
        )
        super().__init__(optimizer, net)


class Before(L.Callback):
    """The papers' constant at the start of every epoch, by hand: largest norm over the batches, in inference mode."""

    def __init__(self):
        self.sizes, self.squares, self.weights = [], [], []

    def on_train_epoch_start(self, trainer, pl_module):
        net = copy.deepcopy(pl_module.net).eval()
        with torch.no_grad():
            inputs = [net[:-1](batch) for batch, _ in loader()]
        self.sizes.append(max(batch.norm().item() for batch in inputs))
        self.squares.append(max(batch.square().norm().item() for batch in inputs))
        self.weights.append(max(v.norm().item() for v in net.state_dict().values() if v.is_floating_point()))


def test_a_pass_measures_before_every_epoch_in_inference_mode():
    before = Before()
    callback = LipschitzLR(bound="paper", measure="pass")
    # The reference stands first, and sees the weights that the pass sees.
    torch.manual_seed(1)
    steps = Steps()
    trainer(before, callback, steps, max_epochs=3).fit(Regularized(), loader())
    scale = (CLASSES - 1) / (CLASSES * 16)
    for epoch, size in enumerate(before.sizes):
        expected = 1 / (scale * size)
        assert [rate for (rate,) in steps.rates[6 * epoch : 6 * epoch + 6]] == pytest.approx([expected] * 6, rel=1e-5)


def test_a_pass_leaves_the_run_as_it_is():
    """Modes, moving statistics, random numbers and gradients: the same weights as with the rates written by hand."""

    class Written(L.Callback):
        def __init__(self, rates):
            self.rates = iter(rates)

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            optimizer.param_groups[0]["lr"] = next(self.rates)[0]

    module, rates = fit(LipschitzLR(bound="paper", measure="pass"), Regularized, max_epochs=3)
    torch.manual_seed(1)
    by_hand = Regularized()
    trainer(Written(rates), max_epochs=3).fit(by_hand, loader())
    for name, value in by_hand.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name


@pytest.mark.parametrize(
    ("which", "largest"), [("all", lambda before: before.weights), ("parameters", lambda before: [4.0] * 3)]
)
def test_the_l2_term_can_have_its_own_coefficient_and_its_own_weights(which, largest):
    class Large(Regularized):
        """A moving statistic that is larger than any weight, and a weight of known size."""

        def __init__(self):
            super().__init__(lambda p: torch.optim.SGD(p, lr=0.1))
            self.net[1].momentum = 0.0
            self.net[1].running_var.fill_(100.0)
            with torch.no_grad():
                self.net[0].weight.mul_(4 / self.net[0].weight.norm())
            self.net[0].weight.requires_grad_(False)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    before = Before()
    callback = LipschitzLR(bound="paper", measure="pass", weight_decay=0.25, weights=which)
    torch.manual_seed(1)
    steps = Steps()
    trainer(before, callback, steps, max_epochs=3).fit(Large(), loader())
    for epoch, weight in enumerate(largest(before)):
        expected = (CLASSES - 1) / (CLASSES * 16) * before.sizes[epoch] + 0.25 * weight
        assert 1 / steps.rates[6 * epoch][0] == pytest.approx(expected, rel=1e-5)


def test_the_authors_momentum_starts_from_a_number_set_by_hand():
    before = Before()
    module = Regularized(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.9))
    callback = LipschitzLR(bound="paper", measure="pass", rule="adamo_authors", initial_lr=0.5)
    steps = Steps()
    trainer(before, callback, steps, max_epochs=3).fit(module, loader())
    assert steps.rates[0] == steps.rates[5] == [0.5]
    average = 0.5
    for epoch in (1, 2):
        average = 0.9 * average + 0.1 * (CLASSES - 1) / (CLASSES * 16) * before.sizes[epoch]
        assert steps.rates[6 * epoch][0] == pytest.approx(1 / average, rel=1e-5)


@pytest.mark.parametrize("rule", ["adam_authors", "rmsprop_authors"])
def test_the_authors_adam_and_rmsprop_use_the_squares(rule):
    def make(parameters):
        if rule == "adam_authors":
            return torch.optim.Adam(parameters, lr=1.0, eps=1e-7)
        return torch.optim.RMSprop(parameters, lr=1.0, alpha=0.9, eps=1e-7)

    before = Before()
    steps = Steps()
    callback = LipschitzLR(bound="paper", measure="pass", rule=rule)
    trainer(before, callback, steps, max_epochs=2).fit(Regularized(make), loader())
    scale = (CLASSES - 1) / (CLASSES * 16)
    first = second = 0.0
    for epoch in range(2):
        first = 0.9 * first + 0.1 * scale * before.sizes[epoch]
        decay = 0.999 if rule == "adam_authors" else 0.9
        second = decay * second + (1 - decay) * scale**2 * before.squares[epoch]
        divisor = first if rule == "adam_authors" else before.sizes[epoch]
        assert steps.rates[6 * epoch][0] == pytest.approx((math.sqrt(second) + 1e-7) / divisor, rel=1e-4)


def test_decoupled_weight_decay_is_no_part_of_the_loss():
    def rate(make):
        return fit(LipschitzLR(bound="paper", rule="inverse"), lambda: Classifier(make), max_steps=1)[1][0][0]

    plain = rate(lambda p: torch.optim.Adam(p, lr=1.0))
    assert rate(lambda p: torch.optim.AdamW(p, lr=1.0, weight_decay=0.5)) == plain
    assert rate(lambda p: torch.optim.Adam(p, lr=1.0, weight_decay=0.5, decoupled_weight_decay=True)) == plain
    assert rate(lambda p: torch.optim.Adam(p, lr=1.0, weight_decay=0.5)) < plain


def test_a_pass_that_misses_the_head_is_refused():
    class Elsewhere(Classifier):
        def forward(self, inputs):
            return self.net[0](inputs)

    with pytest.raises(ConfigurationError, match=r"the head 'net\.2' did not run; let forward\(\) go through"):
        fit(LipschitzLR(bound="paper", measure="pass"), Elsewhere)


def test_a_module_without_a_forward_is_refused():
    class Stepping(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(WIDTH, CLASSES)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.head(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

    with pytest.raises(ConfigurationError, match="calls the module, and Stepping has no forward"):
        fit(LipschitzLR(measure="pass"), Stepping)


def test_batches_of_other_kinds_are_passed_as_they_are():
    class Mapped(Regularized):
        def forward(self, batch):
            return self.net(batch["inputs"])

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch), batch["targets"])

    class Batches:
        def __len__(self):
            return 6

        def __iter__(self):
            return ({"inputs": inputs, "targets": targets} for inputs, targets in loader())

    torch.manual_seed(1)
    steps = Steps()
    trainer(LipschitzLR(bound="paper", measure="pass"), steps, max_steps=1).fit(Mapped(), Batches())
    assert steps.rates == fit(LipschitzLR(bound="paper", measure="pass"), Regularized, max_steps=1)[1]


def test_the_rule_of_an_optimizer_that_normalises_must_be_asked_for():
    with pytest.raises(ConfigurationError, match="Adam normalises the gradient.*bound='paper'"):
        fit(LipschitzLR(), lambda: Classifier(lambda p: torch.optim.Adam(p, lr=1.0)))
