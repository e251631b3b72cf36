"""The rule `observed`: Adam's direction, with the measured gradient norm in the logits instead of the largest one."""

import math
from dataclasses import replace

import lightning as L
import pytest
import torch
from helpers import CLASSES, Classifier, Steps, adamws_scale, loader, trainer
from torch.nn import functional as F

from lit_lipschitz import ConfigurationError, LipschitzLR
from lit_lipschitz.bounds.loss_spec import Loss
from lit_lipschitz.control.policy import Measurement, Policy
from lit_lipschitz.measurement.optimizer_updates import optimizer_info
from lit_lipschitz.rules.adaptive import MeanByGradNormState, observed
from lit_lipschitz.rules.base import RuleInput
from lit_lipschitz.rules.schedule_free import schedule_free


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1.0)


def test_the_rate_follows_a_loop_that_shares_no_code():
    """AdamW's update from torch's own state, gradient norms from softmax less one-hot, the smoothing written out."""

    class Look(L.Callback):
        def __init__(self):
            self.measured, self.rates = [], []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            with torch.no_grad():
                probabilities = pl_module.net(batch[0]).softmax(dim=1)
            norms = (probabilities - F.one_hot(batch[1], CLASSES)).square().sum(dim=1).sqrt()
            self.norms = norms.square().mean().sqrt().item(), norms.mean().item()

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.gradients = [p.grad.clone() for p in pl_module.parameters()]

        def on_train_batch_end(self, trainer, pl_module, *_):
            _, scale = adamws_scale(trainer.optimizers[0], self.gradients)
            self.measured.append((scale, *self.norms, callback.constant))
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    callback = LipschitzLR(schedule="none")
    trainer(callback, look := Look(), max_epochs=8).fit(Classifier(adamw), loader())
    scale = norm = mean = None
    seen, expected = [], []
    for step, (ratio, new_norm, new_mean, constant) in enumerate(look.measured, start=1):
        if step in (1, 2, 4, 8, 16, 32, 48):
            scale = ratio if scale is None else (scale * ratio) ** 0.5
            norm = new_norm if norm is None else (norm * new_norm) ** 0.5
            mean = new_mean if mean is None else (mean * new_mean) ** 0.5
            gain = (1 - 0.9) * math.sqrt(16 / 2) * (mean / norm) ** 1.5 / (0.19 * 0.1) ** 0.25
            seen.append(gain * scale / (constant * norm / math.sqrt(2)))
            rate = min(seen[-1], sum(seen) / len(seen))
        expected.append(rate)
    assert len(look.rates) == 48
    assert look.rates == pytest.approx(expected, rel=1e-4)
    assert min(norm for _, norm, _, _ in look.measured) < 0.9 * look.measured[0][1]  # it has changed


def decide(grad_norm, optimizer="AdamW", batch_size=16, even=1.0, **settings):
    optimizer = getattr(torch.optim, optimizer)([torch.zeros(1, requires_grad=True)], **settings)
    norms = {"logit_grad_norm": grad_norm, "mean_logit_grad_norm": even * grad_norm}
    return Policy().decide(
        Measurement(4.0, 1.0, batch_size, 0, step_scale=0.5, **norms),
        loss=Loss("cross_entropy"),
        num_outputs=3,
        optimizer=optimizer_info(optimizer),
        groups=optimizer.param_groups,
        state=MeanByGradNormState(),
        last=None,
    )


def test_a_loss_that_is_learned_does_not_raise_the_rate_without_a_limit():
    rates = [decide(norm)[0].lr for norm in (1.4, 0.7, 0.02, 0.01, 0.001, 1e-9)]
    assert rates == sorted(rates)
    assert rates[1] == pytest.approx(2 * rates[0])
    assert rates[3:] == pytest.approx([100 * 1.4 / math.sqrt(2) * rates[0]] * 3)


def test_no_gradient_norm_counts_as_more_than_the_largest_possible():
    assert decide(9.0)[0].observed_constant == decide(9.0)[0].constant


@pytest.mark.parametrize(
    ("batch_size", "even", "longer"),
    [
        *[(2, 1.0, 0.1), (32, 1.0, 0.4), (200, 1.0, 1.0), (2000, 1.0, 1.0)],
        *[(128, 0.5, 0.4 / math.sqrt(2)), (2000, 0.1, 0.1)],  # a quarter and a hundredth of the examples count
    ],
)
def test_the_rate_grows_with_the_examples_that_count_up_to_a_limit(batch_size, even, longer):
    decision, _ = decide(1.0, batch_size=batch_size, even=even)
    assert decision.lr == pytest.approx(longer / (0.19 * 0.1) ** 0.25 * 0.5 / decision.observed_constant)


def test_a_coupled_weight_decay_is_in_the_constant_that_is_seen():
    plain, decayed = (decide(0.7, "Adam", weight_decay=decay)[0] for decay in (0.0, 0.3))
    assert decayed.observed_constant == pytest.approx(plain.observed_constant + 0.3)


def test_a_rate_falls_at_once_with_the_gradients_and_grows_slowly_with_them():
    settings, state = {"betas": (0.0, 0.999)}, MeanByGradNormState()
    inputs = RuleInput(4.0, 16.0, observed_constant=2.0, effective_sample_size=16)
    for _ in range(9):
        rate, state, _ = observed(inputs, state, settings)
        assert rate == pytest.approx(0.5)
    for scale, expected in ((0.1, 0.05), (100.0, 5.45)):
        assert observed(replace(inputs, step_scale=scale), state, settings).rate == pytest.approx(expected)


@pytest.mark.parametrize("rule", [observed, schedule_free])
def test_the_mean_is_over_the_updates_with_a_measured_gradient_norm(rule):
    """The first update after parameters have thawed is without one, and far below those that follow."""
    settings, state = {"betas": (0.9, 0.999)}, MeanByGradNormState()
    without, measured = RuleInput(4.0, 16.0, step_scale=3.0), RuleInput(4.0, 16.0, 1.0, 3.0, 1.0, 0.04, 1.0)
    wanted = rule(measured, state, settings).rate
    low, state, _ = rule(without, state, settings)
    assert low < 0.02 * wanted
    for _ in range(3):
        rate, state, terms = rule(measured, state, settings)
        assert rate == wanted
    assert {term.symbol: term.value for term in terms}["mean"] == state.mean


def test_without_any_measured_gradient_norm_a_rate_grows_slowly_too():
    settings, state = {"betas": (0.9, 0.999)}, MeanByGradNormState()
    for _ in range(9):
        rate, state, _ = observed(RuleInput(4.0, 16.0, step_scale=1.0), state, settings)
    grown = observed(RuleInput(4.0, 16.0, step_scale=100.0), state, settings)
    assert grown.rate == pytest.approx(10.9 * rate)


@pytest.mark.parametrize("rule", [observed, schedule_free])
def test_without_a_measured_gradient_norm_the_largest_one_counts_and_all_examples(rule):
    settings, state = {"betas": (0.9, 0.999)}, MeanByGradNormState()
    without = RuleInput(4.0, 16.0, step_scale=3.0, batch_size=16)
    measured = replace(without, observed_constant=4.0, effective_sample_size=16)
    assert rule(without, state, settings).rate == rule(measured, state, settings).rate


def test_the_rule_is_for_constants_that_contain_the_largest_gradient_norm():
    with pytest.raises(ConfigurationError, match="bound='strict'.*found 'smooth'"):
        LipschitzLR(bound="smooth", rule="observed")
    callback = LipschitzLR(bound="smooth", schedule="none")
    trainer(callback, max_steps=1).fit(Classifier(adamw), loader())
    assert callback.controllers[0].decision.observed_constant == 0


def test_a_run_that_is_resumed_has_the_rates_of_one_that_was_not():
    torch.manual_seed(0)
    trainer(LipschitzLR(schedule="none"), whole := Steps(), max_epochs=6).fit(Classifier(adamw), loader())
    torch.manual_seed(0)
    run = trainer(LipschitzLR(schedule="none"), first := Steps(), max_epochs=3)
    run.fit(Classifier(adamw), loader())
    run.save_checkpoint("half.ckpt")
    run = trainer(callback := LipschitzLR(schedule="none"), second := Steps(), max_epochs=6)
    run.fit(Classifier(adamw), loader(), ckpt_path="half.ckpt")
    assert first.rates + second.rates == whole.rates
    assert 0 < callback.controllers[0].decision.observed_constant < callback.constant
