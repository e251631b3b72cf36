"""Runs with the rule `bounded`: scalers, parameters that thaw, schedulers, passes, checkpoints, Schedule-Free."""

import copy
import math
import warnings
from functools import partial

import pytest
import torch
from helpers import Classifier, Steps, length, loader, trainer
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from schedulefree import AdamWScheduleFree, RAdamScheduleFree, SGDScheduleFree
from torch.nn import functional as F

from lit_lipschitz import ConfigurationError, LipschitzLR, LitLipschitzError
from lit_lipschitz.control.policy import Policy
from lit_lipschitz.measurement.optimizer_updates import optimizer_info
from lit_lipschitz.measurement.step_lengths import step_lengths


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1.0)


def fit(callback, module, *more, batch_size=16, **settings):
    run = trainer(callback, steps := Steps(), *more, **{"max_epochs": 2, **settings})
    run.fit(module, loader(batch_size))
    return [rate for (rate,) in steps.rates]


@pytest.mark.parametrize("fused", [False, True])
def test_the_scale_of_a_gradscaler_does_not_enter(fused):
    """A fused optimizer divides by it by itself, after the callback has looked."""
    rates = []
    for plugins in ([], [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))]):
        torch.manual_seed(0)
        module = Classifier(lambda p: torch.optim.AdamW(p, lr=1.0, fused=fused))
        rates.append(fit(LipschitzLR(schedule="none"), module, max_steps=1, plugins=plugins)[0])
    assert rates[1] == pytest.approx(rates[0], rel=2e-2)  # half precision


@pytest.mark.parametrize("settings", [{}, {"update": 1}, {"on_nonfinite": "raise"}], ids=str)
def test_steps_that_a_scaler_skips_at_the_start_leave_no_step_at_the_configured_rate(settings):
    class Overflowing(Classifier):
        def on_after_backward(self):
            if self.global_step < 2:
                for parameter in self.parameters():
                    parameter.grad.fill_(math.inf)

    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**8))
    module = Overflowing(lambda p: torch.optim.AdamW(p, lr=1.0))
    rates = fit(LipschitzLR(schedule="none", **settings), module, plugins=[plugin])
    assert len(rates) == 10
    assert max(rates) < 0.5


def test_parameters_that_thaw_restart_the_estimate():
    """Their constant is another one, and the past begins again."""

    class Thawing(Classifier):
        def configure_optimizers(self):
            self.net[0].requires_grad_(False)
            return torch.optim.AdamW(self.net.parameters(), lr=1.0, weight_decay=0.0)

        def on_train_epoch_start(self):
            self.net[0].requires_grad_(self.current_epoch >= 8)

    module = Thawing(net=torch.nn.Sequential(torch.nn.Linear(6, 4096), torch.nn.ReLU(), torch.nn.Linear(4096, 3)))
    callback = LipschitzLR(bound="smooth", schedule="none")
    fit(callback, module, max_steps=49, max_epochs=20)
    terms = {term.symbol: term.value for term in callback.controllers[0].decision.terms}
    assert terms["past"] == pytest.approx(terms["C"] / (terms["c"] * terms["s"]), rel=1e-12)  # of one update
    assert callback.rate == pytest.approx(1 / max(terms["past"], terms["P"]))


def test_the_state_of_another_optimizers_rule_is_refused():
    run = trainer(LipschitzLR(bound="paper", schedule="none"), max_epochs=1)
    run.fit(Classifier(), loader())
    run.save_checkpoint("sgd.ckpt")
    with pytest.raises(LitLipschitzError, match="rule 'inverse' of SGD, and this run's AdamW has the rule 'adam'"):
        trainer(LipschitzLR(bound="paper", schedule="none"), max_epochs=2).fit(
            Classifier(adamw), loader(), ckpt_path="sgd.ckpt"
        )


def test_the_state_of_another_optimizer_is_refused():
    run = trainer(LipschitzLR(schedule="none"), max_epochs=1)
    run.fit(Classifier(), loader())
    run.save_checkpoint("sgd.ckpt")
    with pytest.raises(LitLipschitzError, match="SGD.*and this run's.*AdamW"):
        trainer(LipschitzLR(schedule="none"), max_epochs=2).fit(Classifier(adamw), loader(), ckpt_path="sgd.ckpt")


def test_a_batch_that_makes_no_gradient_for_some_parameters_counts_the_others():
    class Frozen(Classifier):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

    module = Frozen(lambda p: torch.optim.Adam([q for q in p if q.requires_grad], lr=1.0))
    module.net[0].requires_grad_(False)
    rates = fit(LipschitzLR(schedule="none"), module, max_steps=2)
    assert all(0 < rate < math.inf for rate in rates)


def warmed(parameters):
    """AdamW under the usual linear warm-up, whose factor is 0 at first."""
    optimizer = torch.optim.AdamW(parameters, lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 4, 1))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize("measure", ["running", "pass"])
def test_a_scheduler_that_begins_at_0_is_no_reason_to_read_nothing(measure):
    torch.manual_seed(0)
    steps = Steps()
    callback = LipschitzLR(measure=measure, on_nonfinite="raise")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="LipschitzLR")
        trainer(callback, steps, max_epochs=2).fit(Classifier(warmed), loader(16))
    assert steps.rates[0] == [0.0]
    assert 0 < max(rate for (rate,) in steps.rates) < 0.1  # the configured rate is 1


@pytest.mark.parametrize("bound", ["strict", "smooth"])
def test_a_pass_whose_first_gradients_overflow_has_a_rate_as_soon_as_one_does_not(bound):
    torch.manual_seed(0)
    steps, scaler = Steps(), torch.amp.GradScaler("cpu", init_scale=2.0**20)
    callback = LipschitzLR(measure="pass", bound=bound, schedule="none")
    run = trainer(callback, steps, max_epochs=3, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    run.fit(Classifier(partial(torch.optim.AdamW, lr=1.0)), loader(16))
    assert 0 < len(steps.rates) < 18  # the scaler has left some out
    assert all(0 < rate < 0.2 for (rate,) in steps.rates)


def test_a_manual_rate_before_the_first_pass_ends_with_it():
    torch.manual_seed(0)
    steps = Steps()
    callback = LipschitzLR(measure="pass", initial_lr=0.5, schedule="none")
    trainer(callback, steps, max_epochs=6).fit(Classifier(partial(torch.optim.AdamW, lr=1.0)), loader(16))
    assert [rate for (rate,) in steps.rates[:6]] == [0.5] * 6
    assert all(rate < 0.1 for (rate,) in steps.rates[12:])


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


class Free(Classifier):
    """Turns the optimizer to training and to evaluation, as its documentation asks for."""

    def __init__(self, **settings):
        torch.manual_seed(0)
        super().__init__(lambda p: AdamWScheduleFree(p, **settings))

    def on_train_epoch_start(self):
        self.trainer.optimizers[0].train()

    def on_train_epoch_end(self):
        self.trainer.optimizers[0].eval()


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
        gradient, found = length([p.grad for p in parameters]), step_lengths(optimizer, is_weight=lambda one: False)
        optimizer.step()
        moved = [optimizer.state[p]["z"] - b for p, b in zip(parameters, before, strict=True)]
        assert found[:2].tolist() == pytest.approx([gradient, length(moved)], rel=2e-5)


@pytest.mark.parametrize(
    ("make", "steps", "error"),
    [
        *((make, steps, 1e-3) for make in (AdamWScheduleFree, SGDScheduleFree) for steps in (0, 1, 4, 50)),
        (RAdamScheduleFree, 500, 0.02),  # whose rate warms up by itself
    ],
)
def test_the_descent_is_that_where_the_gradients_are_taken(make, steps, error):
    """As the optimizer's own step shows: with the gradient and with none, from the same state."""
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(3, 4, generator=generator, dtype=torch.float64))
    optimizer = make([parameter], lr=0.01)
    info = optimizer_info(optimizer)
    optimizer.train()
    for _ in range(steps):
        parameter.grad = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        optimizer.step()
    parameter.grad = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    (*_, found), gradient = step_lengths(optimizer, info=info).tolist(), parameter.grad.clone()
    other, other_optimizer = copy.deepcopy((parameter, optimizer))
    optimizer.step()
    (other,) = other_optimizer.param_groups[0]["params"]
    other.grad = torch.zeros_like(other)
    other_optimizer.step()
    moved = (other - parameter).detach() / 0.01
    assert found == pytest.approx(float((gradient * moved).sum()), rel=error)


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


def rates_of(callback, module, **settings):
    trainer(callback, steps := Steps(), **settings).fit(module, loader())
    return [rate for (rate,) in steps.rates]


def test_the_rate_rises_over_a_tenth_of_the_run_and_does_not_decay():
    """Its factors, by what the callback would write without them."""
    scheduled = LipschitzLR()
    rates, unscaled = [], []

    class Record(Callback):
        def on_train_batch_end(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])
            unscaled.append(scheduled.controllers[0].decision.lr)

    trainer(scheduled, Record(), max_epochs=5).fit(Free(), loader())  # 30 steps
    factors = [rate / decided for rate, decided in zip(rates, unscaled, strict=True)]
    assert factors == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 27, rel=1e-4)


def test_a_warm_up_of_its_own_is_the_only_one():
    """What is in "lr" is before the optimizer's own warm-up."""
    own = rates_of(LipschitzLR(), Free(warmup_steps=3))
    assert own == rates_of(LipschitzLR(schedule="none"), Free(warmup_steps=3))
    assert own != rates_of(LipschitzLR(), Free())


def test_weight_decay_is_no_part_of_the_constant():
    constants = []
    for decay in (0.0, 0.5):
        callback = LipschitzLR(schedule="none")
        rates_of(callback, Free(weight_decay=decay), max_steps=1)
        constants.append(callback.constant)
    assert constants[0] == constants[1]


def test_a_run_that_is_resumed_has_the_same_rates_and_weights(tmp_path):
    whole = rates_of(LipschitzLR(schedule="none"), module := Free(), max_epochs=4)
    weights = [p.detach().clone() for p in module.parameters()]
    first = trainer(LipschitzLR(schedule="none"), max_epochs=2)
    first.fit(Free(), loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    second = trainer(LipschitzLR(schedule="none"), steps := Steps(), max_epochs=4)
    second.fit(module := Free(), loader(), ckpt_path=tmp_path / "half.ckpt")
    assert [rate for (rate,) in steps.rates] == whole[len(whole) // 2 :]
    assert all(torch.equal(p, weight) for p, weight in zip(module.parameters(), weights, strict=True))


def test_it_is_the_rule_of_a_bound_and_of_others_of_its_kind():
    optimizer = AdamWScheduleFree([torch.nn.Parameter(torch.ones(1))])
    info, groups = optimizer_info(optimizer), optimizer.param_groups
    assert info.averages_weights
    for bound in ("strict", "smooth"):
        assert Policy(bound=bound).rule_for(info, groups).name == "bounded"
    with pytest.raises(ConfigurationError, match="AdamWScheduleFree with bound='paper'; known: SGD"):
        Policy(bound="paper").rule_for(info, groups)
    callback = LipschitzLR(schedule="none")
    with pytest.warns(UserWarning, match="all gradients or updates so far were 0"):  # it begins with five without one
        trainer(callback, Steps(), max_epochs=2).fit(Classifier(RAdamScheduleFree), loader(16))
    assert callback.controllers[0].decision.rule == "bounded"
