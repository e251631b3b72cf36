"""Runs that are resumed on other devices, with other lengths, batches or update intervals, or with more that trains."""

import logging
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import Classifier, ranks
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn

from lit_lipschitz import LipschitzLR
from lit_lipschitz.optim.schedules import linear_warmup_decay

SAVED = 17  # optimizer steps
BEFORE = {"count": 2, "batch_size": 4, "max_epochs": 3, "update": "epoch", "accumulate_grad_batches": 1}


class Groups(Classifier):
    """The first layer has a tenth of the head's learning rate."""

    def configure_optimizers(self):
        groups = [{"params": self.net[2].parameters()}, {"params": self.net[0].parameters(), "lr": 0.01}]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


class Saves(L.Callback):
    """Saves after a step."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == SAVED and not Path("changed.ckpt").exists():
            trainer.save_checkpoint("changed.ckpt")


class Sizes(L.Callback):
    """Keeps the number of examples of each decision, and the factor of the schedule."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, *_):
        lipschitz = trainer.callbacks[0]
        self.seen.append((lipschitz.controllers[0].measurement.batch_size, lipschitz.lr / lipschitz.rate))

    def on_train_end(self, trainer, *_):
        torch.save(self.seen, f"seen{trainer.global_rank}.pt")


def fit(path=None, **settings):
    """The rates of each rank's steps, and what it has seen."""
    settings = {**BEFORE, **settings}
    count, batch_size, update = (settings.pop(name) for name in ("count", "batch_size", "update"))
    if count == 1:
        settings["strategy"] = "auto"
    torch.manual_seed(1)
    found = ranks(count, LipschitzLR(update=update), Groups(), batch_size, Saves(), Sizes(), ckpt_path=path, **settings)
    return [(one["rates"], torch.load(f"seen{rank}.pt")) for rank, one in enumerate(found)]


@pytest.fixture
def said():
    """What the runs of a test have said of changes."""
    logger = logging.getLogger("lightning.pytorch")
    handler = logging.FileHandler("said.txt")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lambda: [line for line in Path("said.txt").read_text().splitlines() if "has changed" in line]
    logger.removeHandler(handler)
    handler.close()


@pytest.mark.parametrize(
    ("changes", "words", "size", "total"),
    [
        ({}, "", 8, 36),
        ({"count": 1}, "devices 2 -> 1, optimizer steps of an epoch 12 -> 24, optimizer steps of the", 4, 72),
        ({"count": 1, "batch_size": 8}, "devices 2 -> 1;", 8, 36),
        ({"max_epochs": 5}, "optimizer steps of the run 36 -> 60;", 8, 60),
        ({"batch_size": 2}, "optimizer steps of an epoch 12 -> 24, optimizer steps of the run 36 -> 72;", 4, 72),
        ({"batch_size": 8}, "optimizer steps of an epoch 12 -> 6, optimizer steps of the run 36 -> 18;", 16, 18),
        ({"update": 4}, "update epoch -> 4;", 8, 36),
        ({"accumulate_grad_batches": 2, "max_epochs": 5}, "accumulated batches 1 -> 2, optimizer steps", 16, 30),
    ],
)  # fmt: skip
def test_a_changed_run_goes_on_and_says_what_has_changed(changes, words, size, total, said):
    (whole, seen), _ = fit()
    assert not said()
    found = fit("changed.ckpt", **changes)
    (rates, sizes), others = found[0], found[1:]
    assert all(other == found[0] for other in others)
    assert [words in line for line in said()] == ([True] if words else [])
    assert rates
    assert all(head > 0 and layer == pytest.approx(0.1 * head) for head, layer in rates)
    if not words or "update" in changes:
        assert rates[:1] == whole[SAVED : SAVED + 1]
    assert sizes[-1][0] == size
    if "accumulate_grad_batches" not in changes:  # the epoch goes on with a step of one batch there
        assert sizes[0][0] == size
    assert sizes[0][1] == pytest.approx(linear_warmup_decay(SAVED, total))
    assert 1 / 3 < (rates[0][0] / sizes[0][1]) / (whole[SAVED][0] / seen[SAVED][1]) < 3


class Backbone(Classifier):
    """A network whose first part thaws."""

    def __init__(self):
        super().__init__(net=nn.Linear(16, 3))
        self.backbone = nn.Sequential(nn.Linear(6, 16), nn.ReLU())

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def test_a_backbone_that_thaws_after_a_resume_goes_on_as_without_one_on_two_ranks(said):
    def run(path=None):
        torch.manual_seed(1)
        thaw = BackboneFinetuning(2, lambda epoch: 2.0, backbone_initial_ratio_lr=0.1)
        callbacks = (LipschitzLR(), Backbone(), 4, thaw, Saves())
        return ranks(2, *callbacks, ckpt_path=path, max_epochs=4, ddp={"find_unused_parameters": True})

    whole = run()
    rest = run("changed.ckpt")
    assert rest[0]["rates"] == rest[1]["rates"] == whole[0]["rates"][SAVED:]
    assert not said()
    assert len(rest[0]["rates"][-1]) == 2
