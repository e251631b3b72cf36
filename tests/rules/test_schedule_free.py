"""Schedule-Free AdamW: the weights' step as long as SGD's, by a scale that does not fall, a warm-up and no decay."""

import math
from dataclasses import replace

import lightning as L
import pytest
import torch
from helpers import CLASSES, Classifier, Steps, length, loader, mean_of_matrices, trainer
from schedulefree import AdamWScheduleFree, RAdamScheduleFree
from torch.nn import functional as F

from lit_lipschitz import ConfigurationError, LipschitzLR
from lit_lipschitz.control.policy import Policy
from lit_lipschitz.measurement.optimizer_updates import optimizer_info, update_norms
from lit_lipschitz.measurement.step_scale import FlooredScale
from lit_lipschitz.rules.adaptive import MeanByGradNormState
from lit_lipschitz.rules.base import RuleInput
from lit_lipschitz.rules.schedule_free import schedule_free


class Free(Classifier):
    """Turns the optimizer to training and to evaluation, as its documentation asks for."""

    def __init__(self, **settings):
        torch.manual_seed(0)
        super().__init__(lambda p: AdamWScheduleFree(p, **settings))

    def on_train_epoch_start(self):
        self.trainer.optimizers[0].train()

    def on_train_epoch_end(self):
        self.trainer.optimizers[0].eval()


class Look(L.Callback):
    """Gradients and moves of the weights, the lengths of z's step at a rate of 1, and what was written."""

    def __init__(self, ours=None):
        self.ours, self.gradients, self.moves, self.rates, self.ratios, self.constants = ours, [], [], [], [], []
        self.norms = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with torch.no_grad():
            wrong = pl_module.net(batch[0]).softmax(dim=1) - F.one_hot(batch[1], CLASSES)
        self.norms.append((wrong.norm(dim=1).square().mean().sqrt().item(), wrong.norm(dim=1).mean().item()))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.before = [p.detach().clone() for p in pl_module.parameters()]
        self.grads = [p.grad.clone() for p in pl_module.parameters()]
        self.gradients.append(length(self.grads))

    def on_train_batch_end(self, trainer, pl_module, *_):
        optimizer = trainer.optimizers[0]
        group = optimizer.param_groups[0]
        self.moves.append(length([p.detach() - b for p, b in zip(pl_module.parameters(), self.before, strict=True)]))
        self.rates.append(group["lr"])
        self.constants.append(self.ours.constant)
        roots = [
            (optimizer.state[p]["exp_avg_sq"] / (1 - 0.999 ** group["k"])) ** 0.5 + 1e-8 for p in pl_module.parameters()
        ]
        updates = [grad / root for grad, root in zip(self.grads, roots, strict=True)]
        self.ratios.append(mean_of_matrices(self.grads, updates))


def without_warm_up(look):
    """The rates from the ratios, gradient norms and constants of a run, written out; batches of 16."""
    ratios, seen, rates, norm, mean = [], [], [], None, None
    for step, (ratio, constant, now) in enumerate(zip(look.ratios, look.constants, look.norms, strict=True), start=1):
        if step in (1, 2, 4, 8, 16, 32, 48):
            ratios.append(ratio)
            norm, mean = now if norm is None else (math.sqrt(norm * now[0]), math.sqrt(mean * now[1]))
            seen.append(0.1 * 16 * (mean / norm) ** 2 / (constant * norm / math.sqrt(2)))
            first = ratios[:5]
            floored = max(sum(first) / len(first), sum(ratios) / len(ratios))
            rate = floored * min(seen[-1], sum(seen) / len(seen))
        rates.append(rate)
    return rates


def fit(callback, module, **settings):
    run = trainer(callback, look := Look(callback), **{"max_epochs": 2, **settings})
    run.fit(module, loader(16))
    return look


def test_the_length_is_that_of_the_step_of_the_averaged_sequence():
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(3, 4, generator=generator)) for _ in range(2)]
    idle = torch.nn.Parameter(torch.ones(2))
    optimizer = AdamWScheduleFree([*parameters, idle], lr=1.0, betas=(0.8, 0.95))
    optimizer.train()
    for step in range(12):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator) / (1 + step)
        before = [optimizer.state[p]["z"].clone() if step else p.detach().clone() for p in parameters]
        gradient, found = length([p.grad for p in parameters]), update_norms(optimizer)
        optimizer.step()
        moved = [optimizer.state[p]["z"] - b for p, b in zip(parameters, before, strict=True)]
        assert found.tolist() == pytest.approx([gradient, length(moved)], rel=2e-5)


def test_without_a_gradient_norm_the_first_step_of_a_matrix_is_a_tenth_of_the_batch_times_as_long_as_sgds():
    callback, module = LipschitzLR(bound="smooth", schedule="none"), Free()
    module.net = torch.nn.Sequential(torch.nn.Linear(6, CLASSES, bias=False))
    look = fit(callback, module, max_steps=1)
    # In the first step the average is the sequence itself, so the weights move by all of it.
    assert look.moves[0] == pytest.approx(1.6 * look.gradients[0] / callback.constant, rel=1e-4)


@pytest.mark.parametrize(("examples", "longer"), [(1, 0.1), (16, 1.6), (70, 7.0), (2000, math.sqrt(50))])
def test_the_rate_grows_with_the_examples_that_count_up_to_a_limit(examples, longer):
    inputs = RuleInput(4.0, 16.0, step_scale=3.0, observed_constant=2.0, effective_sample_size=examples)
    result = schedule_free(inputs, MeanByGradNormState(), {"betas": (0.9, 0.999)})
    assert result.rate == pytest.approx(longer * 3.0 / 2.0)


def test_losses_that_become_flat_raise_the_rate_slowly_and_steep_ones_lower_it_at_once():
    settings, state = {"betas": (0.9, 0.999)}, MeanByGradNormState()
    inputs = RuleInput(4.0, 16.0, step_scale=3.0, observed_constant=2.0, effective_sample_size=16)
    for _ in range(9):
        rate, state, _ = schedule_free(inputs, state, settings)
        assert rate == pytest.approx(2.4)
    flat, steep = (replace(inputs, observed_constant=constant) for constant in (0.02, 4.0))
    assert schedule_free(flat, state, settings).rate == pytest.approx(2.4 * 10.9)
    assert schedule_free(steep, state, settings).rate == pytest.approx(1.2)


def test_later_the_gradient_moves_the_weights_by_a_tenth_of_the_rate():
    """As the optimizer's own step shows: with the gradient and with none, from the same state."""
    parameter = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))
    ends = []
    for last in (1.0, 0.0):
        parameter.data.fill_(1.0)
        optimizer = AdamWScheduleFree([parameter], lr=0.01, betas=(0.9, 0.0), eps=1e-12)
        optimizer.train()
        for step in range(1000):
            parameter.grad = torch.full_like(parameter, last if step == 999 else (-1.0) ** step)
            optimizer.step()
        ends.append(parameter.detach().clone())
    assert length([ends[0] - ends[1]]) == pytest.approx(0.01 * 0.1 * math.sqrt(5), rel=0.02)


def test_the_rate_follows_a_loop_that_shares_no_code():
    look = fit(LipschitzLR(schedule="none"), Free(), max_epochs=8)
    assert len(look.rates) == 48
    assert look.rates == pytest.approx(without_warm_up(look), rel=1e-4)


def test_the_rate_rises_over_a_tenth_of_the_run_and_does_not_decay():
    callback = LipschitzLR()
    look = fit(callback, Free(), max_epochs=5)  # 30 steps
    factors = [rate / expected for rate, expected in zip(look.rates, without_warm_up(look), strict=True)]
    assert factors == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 27, rel=1e-4)


def test_a_warm_up_of_its_own_is_the_only_one():
    look = fit(LipschitzLR(), Free(warmup_steps=3), max_epochs=2)
    assert look.rates == pytest.approx(
        without_warm_up(look), rel=1e-4
    )  # what is in "lr" is before the optimizer's own warm-up


def test_weight_decay_is_no_part_of_the_constant():
    constants = []
    for decay in (0.0, 0.5):
        callback = LipschitzLR(schedule="none")
        fit(callback, Free(weight_decay=decay), max_steps=1)
        constants.append(callback.constant)
    assert constants[0] == constants[1]


def test_a_run_that_is_resumed_has_the_same_rates_and_weights(tmp_path):
    whole = fit(LipschitzLR(schedule="none"), module := Free(), max_epochs=4)
    weights = [p.detach().clone() for p in module.parameters()]
    first = trainer(LipschitzLR(schedule="none"), max_epochs=2)
    first.fit(Free(), loader(16))
    first.save_checkpoint(tmp_path / "half.ckpt")
    second = trainer(callback := LipschitzLR(schedule="none"), look := Look(), max_epochs=4)
    look.ours = callback
    second.fit(module := Free(), loader(16), ckpt_path=tmp_path / "half.ckpt")
    assert look.rates == whole.rates[-len(look.rates) :]
    assert len(look.rates) == len(whole.rates) // 2
    assert all(torch.equal(p, weight) for p, weight in zip(module.parameters(), weights, strict=True))


def test_the_scale_is_the_mean_of_the_first_five_ratios_or_of_all_if_that_is_larger():
    scale = FlooredScale()
    for ratio in (1.0, math.nan, 3.0, 0.0, 2.0, 2.0, 7.0):
        scale = scale.update(ratio)
    assert scale.value == pytest.approx(3.0)
    fallen = scale.update(1e-3)
    assert fallen.value == pytest.approx(3.0)
    assert fallen.update(1e-3).value == pytest.approx(3.0)
    assert scale.update(15.0).value == pytest.approx(5.0)


def test_a_scale_that_began_with_vanishing_gradients_grows_with_them():
    callback, module = LipschitzLR(schedule="none"), Free()
    layers = [layer for _ in range(8) for layer in (torch.nn.Linear(16, 16), torch.nn.ReLU())]
    module.net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), *layers, torch.nn.Linear(16, 3))
    look = fit(callback, module, max_epochs=60)
    assert max(look.ratios) > 10 * look.ratios[0]
    assert callback.controllers[0].measurement.step_scale > 2 * sum(look.ratios[i] for i in (0, 1, 3, 7, 15)) / 5


def test_it_is_the_rule_of_a_bound_and_of_others_of_its_kind():
    optimizer = AdamWScheduleFree([torch.nn.Parameter(torch.ones(1))])
    info, groups = optimizer_info(optimizer), optimizer.param_groups
    assert info.averages_weights
    for bound in ("strict", "smooth"):
        assert Policy(bound=bound).rule_for(info, groups).name == "schedule_free"
    with pytest.raises(ConfigurationError, match="AdamWScheduleFree with bound='paper'; known: SGD"):
        Policy(bound="paper").rule_for(info, groups)
    callback = LipschitzLR(schedule="none")
    with pytest.warns(UserWarning, match="all gradients or updates so far were 0"):  # it begins with five without one
        trainer(callback, Steps(), max_epochs=2).fit(Classifier(RAdamScheduleFree), loader(16))
    assert callback.controllers[0].decision.rule == "schedule_free"
