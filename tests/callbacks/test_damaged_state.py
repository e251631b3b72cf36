"""Checkpoints whose state of LipschitzLR was damaged: resumed exactly as it says, or refused in one line."""

import math
import random

import pytest
import torch
from helpers import Classifier, Steps, damaged_state, loader, trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lit_lipschitz import LipschitzLR, LitLipschitzError


class Regression(Classifier):
    """Squared error of the same network, whose state has residuals."""

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch[0]), batch[0][:, :3])


MODULES = {
    "sgd": (Classifier, {}),
    "adamw": (lambda: Classifier(torch.optim.AdamW), {}),
    "regression": (lambda: Regression(torch.optim.AdamW), {}),
    "measured": (lambda: Classifier(torch.optim.AdamW), {"loss": "measured"}),
}


def fit(name, epochs, path=None):
    """The learning rates of a fit."""
    make, options = MODULES[name]
    steps = Steps()
    training = trainer(steps, LipschitzLR(**options), max_epochs=epochs)
    torch.manual_seed(0)
    training.fit(make(), loader(), ckpt_path=path)
    training.save_checkpoint("last.ckpt")
    return [rate for rates in steps.rates for rate in rates]


def saved(name):
    """The checkpoint of a short fit."""
    fit(name, 1)
    return torch.load("last.ckpt", weights_only=True)


@pytest.fixture(scope="module", params=MODULES)
def checkpoint(request, tmp_path_factory):
    """The checkpoint of a short fit, and the name of the fit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("fit"))
        return request.param, saved(request.param)


def resumed(name, content, position, chance):
    """Resumes from a damaged state; True if it was refused."""
    states = content["callbacks"]["LipschitzLR"]["optimizers"]
    state, what = damaged_state(states[position], chance)
    callbacks = {"LipschitzLR": {**content["callbacks"]["LipschitzLR"], "optimizers": {position: state}}}
    torch.save({**content, "callbacks": callbacks}, "damaged.ckpt")
    try:
        rates = fit(name, 2, "damaged.ckpt")
    except LitLipschitzError as error:
        return "\n" not in str(error)
    assert all(0 < rate < math.inf for rate in rates), what
    return False


@settings(max_examples=30, deadline=None)
@given(chance=st.randoms(use_true_random=False))
def test_a_damaged_state_is_refused_or_gives_learning_rates(checkpoint, chance):
    resumed(*checkpoint, 0, chance)


def test_most_damages_are_refused(checkpoint):
    assert sum(resumed(*checkpoint, 0, random.Random(seed)) for seed in range(20)) >= 12


@pytest.mark.parametrize("state", [{}, {"settings": {}}, {"settings": None, "optimizers": {}}, {"optimizers": 3}, 3])
def test_a_state_of_another_form_is_refused(state):
    with pytest.raises(LitLipschitzError, match="of another version of lit-lipschitz"):
        LipschitzLR().load_state_dict(state)


def test_a_state_without_entries_is_refused():
    content = saved("sgd")
    content["callbacks"]["LipschitzLR"]["optimizers"] = {0: {}}
    torch.save(content, "damaged.ckpt")
    with pytest.raises(LitLipschitzError, match="of another version of lit-lipschitz"):
        fit("sgd", 2, "damaged.ckpt")
