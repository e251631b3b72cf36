"""``attach``: a plain loop has the rates, the metrics and the weights of the Lightning callback, bit for bit."""

import gc
import weakref
from functools import partial

import pytest
import torch
from helpers import CLASSES, EXAMPLES, WIDTH, Classifier, Steps, loader, trainer
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from lit_lipschitz import ConfigurationError, LipschitzLR, attach

BACKWARD = torch.autograd.backward
BATCH, EPOCHS = 8, 3
BATCHES = EXAMPLES // BATCH


@pytest.fixture(autouse=True)
def _restored():
    yield
    gc.collect()
    assert torch.autograd.backward is BACKWARD


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, CLASSES))


OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "AdamW": partial(torch.optim.AdamW, lr=0.1),
}


def halving(optimizer):
    return LambdaLR(optimizer, lambda step: 0.9**step)


class Logged(Steps):
    """Records the callback's metrics after each step, too."""

    def __init__(self):
        super().__init__()
        self.metrics = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        ours = next(one for one in trainer.callbacks if isinstance(one, LipschitzLR))
        if len(self.metrics) < trainer.global_step:
            self.metrics.append({f"lipschitz/{name}": value for name, value in ours.controllers[0].metrics().items()})


class Scheduled(Classifier):
    def __init__(self, make, scheduler, loss):
        super().__init__(net=network())
        self.make, self.scheduler, self.loss = make, scheduler, loss

    def training_step(self, batch, batch_idx):
        return self.loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = self.make(self.parameters())
        if self.scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": self.scheduler(optimizer), "interval": "step"}]


def by_lightning(make, scheduler=None, loss=F.cross_entropy, settings=None, **trainer_settings):
    module = Scheduled(make, scheduler, loss)
    steps = Logged()
    # The callback's own hooks come first.
    run = trainer(LipschitzLR(**settings or {}), steps, max_epochs=EPOCHS, **trainer_settings)
    run.fit(module, loader(BATCH))
    return steps.rates, steps.metrics, [p.detach().clone() for p in module.net.parameters()]


class Loop:
    """A plain loop with ``attach``; ``save`` and ``load`` at an optimizer step."""

    def __init__(self, make, scheduler=None, loss=F.cross_entropy, k=1, clip=None, settings=None, scaler=None):
        self.net, self.loss, self.k, self.clip, self.scaler = network(), loss, k, clip, scaler
        self.optimizer = make(self.net.parameters())
        self.scheduler = scheduler and scheduler(self.optimizer)
        self.control = attach(
            self.net,
            self.optimizer,
            total_steps=EPOCHS * BATCHES // k,
            epoch_steps=BATCHES // k,
            accumulate_grad_batches=k,
            grad_scaler=scaler,
            notify=lambda message: None,
            **settings or {},
        )
        self.rates, self.metrics = [], []
        handle = self.optimizer.register_step_post_hook(self.record)
        self.optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)

    def record(self, optimizer, *_):
        self.rates.append([float(group["lr"]) for group in optimizer.param_groups])

    def backward(self, batch):
        loss = self.loss(self.net(batch[0]), batch[1]) / self.k
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def step(self):
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        if self.clip:
            nn.utils.clip_grad_norm_(self.net.parameters(), self.clip)
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        if self.scheduler:
            self.scheduler.step()
        self.optimizer.zero_grad()
        self.metrics.append(self.control.metrics())

    def run(self, first=0, last=EPOCHS * BATCHES):
        batches = [batch for _ in range(EPOCHS) for batch in loader(BATCH)]
        for i in range(first, last):
            self.backward(batches[i])
            if (i + 1) % self.k == 0:
                self.step()
            with torch.no_grad():  # validation
                self.net(100 * batches[i][0])
        return self.rates, self.metrics, [p.detach().clone() for p in self.net.parameters()]

    def state(self):
        parts = [self.net, self.optimizer, self.control, *([self.scheduler] if self.scheduler else [])]
        return [part.state_dict() for part in parts]

    def load(self, state):
        for part, saved in zip(
            [self.net, self.optimizer, self.control, *([self.scheduler] if self.scheduler else [])], state, strict=True
        ):
            part.load_state_dict(saved)


def assert_same(found, expected):
    (rates, metrics, weights), (other_rates, other_metrics, other_weights) = found, expected
    assert rates == other_rates
    assert metrics == other_metrics
    assert all(torch.equal(one, other) for one, other in zip(weights, other_weights, strict=True))


def squared(outputs, targets):
    return F.mse_loss(outputs, F.one_hot(targets, CLASSES).float())


def masked(outputs, targets):
    """Not recognised, so that its constant is measured."""
    return F.multi_margin_loss(outputs, targets)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("own", "lightnings"),
    [
        ({}, {}),
        ({"k": 4}, {"accumulate_grad_batches": 4}),
        ({"clip": 0.1}, {"gradient_clip_val": 0.1}),
        ({"k": 2, "clip": 0.1}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
        ({"scheduler": halving}, {"scheduler": halving}),
        ({"loss": squared}, {"loss": squared}),
        ({"loss": masked}, {"loss": masked}),
        ({"loss": masked, "k": 2}, {"loss": masked, "accumulate_grad_batches": 2}),
        *[
            ({"settings": settings}, {"settings": settings})
            for settings in (
                {"bound": "smooth"},
                {"bound": "paper"},
                {"norm": "sample"},
                {"update": 5},
                {"loss": "measured"},
                {"schedule": "none", "max_lr": 0.05},
                {"dry_run": True},
            )
        ],
    ],
    ids=str,
)
def test_a_plain_loop_has_the_numbers_of_the_callback(optimizer, own, lightnings):
    make = OPTIMIZERS[optimizer]
    expected = by_lightning(make, **lightnings)
    loop = Loop(make, **own)
    found = loop.run()
    assert len(found[0]) == EPOCHS * BATCHES // own.get("k", 1)
    assert found[0][0][0] > 0
    assert_same(found, expected)
    assert loop.control.lr == found[1][-1]["lipschitz/lr"]
    assert loop.control.constant == found[1][-1].get("lipschitz/constant")
    loop.control.detach()
