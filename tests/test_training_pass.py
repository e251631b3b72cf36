"""LipschitzLR(measure="pass"): the papers' way to measure, and the rules of their scripts."""

import copy
import math
from contextlib import suppress

import lightning as L
import pytest
import torch
from helpers import CLASSES, WIDTH, Classifier, Steps, examples, loader, trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, OnExceptionCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

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
    """The papers' constant at the start of every epoch, manually: largest norm over the batches, in inference mode."""

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
    """Modes, moving statistics, random numbers and gradients: the same weights as with the rates written manually."""

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


def test_the_authors_momentum_starts_from_a_number_set_manually():
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
    mapped = Mapped()
    mapped.lipschitz_dataloader = Batches
    trainer(LipschitzLR(bound="paper", measure="pass"), steps, max_steps=1).fit(mapped, Batches())
    assert steps.rates == fit(LipschitzLR(bound="paper", measure="pass"), Regularized, max_steps=1)[1]


@pytest.mark.parametrize(
    "settings",
    [{"shuffle": True, "generator": torch.Generator()}, {"num_workers": 1, "persistent_workers": True}],
    ids=["generator", "persistent workers"],
)
def test_the_training_loader_goes_on_undisturbed(settings):
    def inputs_of(callback):
        if "generator" in settings:
            settings["generator"].manual_seed(3)

        class Seen(L.Callback):
            batches = []

            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                self.batches.append(batch[0].clone())

        seen = Seen()
        Seen.batches = []
        module = Regularized(lambda p: torch.optim.SGD(p, lr=0.1))
        trainer(callback, seen, max_epochs=2).fit(module, DataLoader(examples(), batch_size=16, **settings))
        return seen.batches

    with_pass, without = (inputs_of(LipschitzLR(measure=measure)) for measure in ("pass", "running"))
    assert len(with_pass) == len(without) == 12
    assert all(torch.equal(a, b) for a, b in zip(with_pass, without, strict=True))


def test_a_loader_that_can_be_read_only_once_is_refused():
    once = (batch for batch in loader())
    with pytest.raises(ConfigurationError, match=r"a generator can't be read .* a method lipschitz_dataloader\(\)"):
        trainer(LipschitzLR(measure="pass")).fit(Regularized(), once)


def test_a_forward_of_two_arguments_is_refused():
    class Pair(Classifier):
        def forward(self, inputs, targets):
            return F.cross_entropy(self.net(inputs), targets)

    with pytest.raises(ConfigurationError, match="its forward does not take that .*targets"):
        fit(LipschitzLR(measure="pass"), Pair)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_a_pass_in_other_precisions(precision):
    _, rates = fit(LipschitzLR(measure="pass"), Regularized, precision=precision, max_steps=1)
    _, single = fit(LipschitzLR(measure="pass"), Regularized, max_steps=1)
    assert rates[0][0] == pytest.approx(single[0][0], rel=1e-5 if "64" in precision else 2e-2)


def test_a_pass_follows_the_accumulation_as_it_changes():
    """Frozen weights, so that only the number of examples in a step changes, from 4 x 16 to 16."""
    frozen = lambda p: torch.optim.SGD([{"params": list(p), "weight_decay": 0.0}], lr=1.0)  # noqa: E731
    schedule = GradientAccumulationScheduler({0: 3, 1: 1})
    callback = LipschitzLR(bound="paper", measure="pass", max_lr=1e-30)
    seen = []

    class Constants(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(callback.constant)

    torch.manual_seed(1)
    trainer(callback, schedule, Constants(), max_epochs=2).fit(Classifier(frozen), loader())
    # K is sqrt(3) times as large at most, m three times.
    assert seen[1] == pytest.approx(seen[0] * math.sqrt(3), rel=1e-5)


@pytest.mark.parametrize("stop", [0, 6])
def test_a_pass_whose_first_step_failed_is_made_again_on_resume(stop):
    class Failing(Regularized):
        fails = True

        def training_step(self, batch, batch_idx):
            if self.fails and self.trainer.global_step == stop:
                raise RuntimeError("out of luck")
            return super().training_step(batch, batch_idx)

    class Fine(Regularized):
        fails = False

    def run(kind, **settings):
        torch.manual_seed(1)
        callback = LipschitzLR(bound="paper", measure="pass")
        saved = OnExceptionCheckpoint(".", filename="failed")
        run = trainer(callback, steps := Steps(), saved, max_epochs=2, **{"enable_checkpointing": True})
        with suppress(RuntimeError):
            run.fit(kind(), loader(), **settings)
        return steps.rates

    expected = run(Fine)
    run(Failing)
    resumed = run(Fine, ckpt_path="failed.ckpt")
    assert resumed[0] == expected[stop]
