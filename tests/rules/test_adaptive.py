"""Adam-type optimizers: their direction, in steps as long as SGD's at 1/L."""

import math
import warnings
from functools import partial

import lightning as L
import pytest
import torch
from helpers import ADAPTIVE_DEFAULTS, Classifier, Steps, adamws_scale, loader, trainer
from lightning.pytorch.plugins import MixedPrecision
from torch.nn import functional as F

from lit_lipschitz import LipschitzLR, LitLipschitzError
from lit_lipschitz.bounds.loss_spec import Loss
from lit_lipschitz.control.policy import Measurement, Policy
from lit_lipschitz.measurement.optimizer_updates import optimizer_info
from lit_lipschitz.measurement.step_scale import StepScale
from lit_lipschitz.rules.adaptive import MeanByGradNormState, MeanState, grafted
from lit_lipschitz.rules.base import RuleInput

LONGER = math.sqrt(1 / math.sqrt(1 - 0.9) / math.sqrt(1 - 0.9**2))  # of what momentum 0.9 does to a step


def fit(callback, module, *more, batch_size=16, **settings):
    run = trainer(callback, steps := Steps(), *more, **{"max_epochs": 2, **settings})
    run.fit(module, loader(batch_size))
    return [rate for (rate,) in steps.rates]


class Moves(L.Callback):
    """How far the weights move in each step, and the length of its gradient."""

    def __init__(self):
        self.moves, self.gradients = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.before = [p.detach().clone() for p in pl_module.parameters()]
        self.gradients.append(
            torch.cat([p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]).norm().item()
        )

    def on_train_batch_end(self, trainer, pl_module, *_):
        moved = [(p.detach() - b).flatten() for p, b in zip(pl_module.parameters(), self.before, strict=True)]
        self.moves.append(torch.cat(moved).norm().item())


@pytest.mark.parametrize("name", ADAPTIVE_DEFAULTS)
def test_the_first_step_is_as_long_as_sgds_by_the_roots_factor(name):
    module = Classifier(ADAPTIVE_DEFAULTS[name])
    callback = LipschitzLR(rule="grafted", schedule="none")
    fit(callback, module, moves := Moves(), max_steps=1)
    longer = 1.0 if name == "RMSprop" else LONGER
    assert moves.moves[0] == pytest.approx(longer * moves.gradients[0] / callback.constant, rel=1e-4)


def test_the_rate_follows_a_loop_that_shares_no_code():
    """AdamW's update from torch's own state after the step; the smoothing written out."""
    callback, ratios = LipschitzLR(rule="grafted", schedule="none"), []

    class Look(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.grads = [p.grad.clone() for p in pl_module.parameters()]

        def on_train_batch_end(self, trainer, pl_module, *_):
            ratios.append((adamws_scale(trainer.optimizers[0], self.grads)[0], callback.constant))

    rates = fit(callback, Classifier(lambda p: torch.optim.AdamW(p, lr=1.0)), Look(), max_epochs=8)
    recent, history, expected = None, [], []
    for step, (ratio, constant) in enumerate(ratios, start=1):
        if step in (1, 2, 4, 8, 16, 32, 48):
            recent = ratio if recent is None else (recent * ratio) ** 0.5
            history.append(recent)
            rate = LONGER * min(recent, sum(history) / len(history)) / constant
        expected.append(rate)
    assert len(rates) == 48
    assert rates == pytest.approx(expected, rel=1e-4)


def test_the_weight_of_a_measured_ratio_halves_with_each_that_follows():
    scale = StepScale()
    assert scale.value == 0
    scale = scale.update(3.0)
    assert scale.value == 3.0
    assert scale.update(12.0).value == pytest.approx(6.0)
    assert scale.update(12.0).update(1 / 6).value == pytest.approx(1.0)
    for ratio in (math.nan, math.inf, 0.0):
        assert scale.update(ratio) == scale


def test_a_rate_falls_at_once_with_the_gradients_and_grows_slowly_with_them():
    settings, state = {"betas": (0.0, 0.999)}, MeanState()
    for _ in range(9):
        rate, state, _ = grafted(RuleInput(2.0, 4.0, step_scale=1.0), state, settings)
        assert rate == pytest.approx(0.5)
    assert grafted(RuleInput(2.0, 4.0, step_scale=0.1), state, settings).rate == pytest.approx(0.05)
    assert grafted(RuleInput(2.0, 4.0, step_scale=100.0), state, settings).rate == pytest.approx(5.45)


def test_a_rate_follows_the_constant_at_once():
    settings, state = {"betas": (0.0, 0.999)}, MeanState()
    for constant in (2.0, 2.0, 4.0):
        rate, state, _ = grafted(RuleInput(constant, constant**2, step_scale=1.0), state, settings)
        assert rate == pytest.approx(1 / constant)


def test_without_a_usable_gradient_there_is_no_rate():
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    arguments = {"optimizer": optimizer_info(optimizer), "groups": optimizer.param_groups, "last": None}
    arguments |= {"loss": Loss("cross_entropy"), "num_outputs": 3, "state": MeanByGradNormState()}
    assert Policy().decide(Measurement(4.0, 1.0, 16, 0, step_scale=0.0), **arguments) is None
    (decision, _) = Policy().decide(Measurement(4.0, 1.0, 16, 0, step_scale=0.5), **arguments)
    assert decision.lr == pytest.approx(0.1 * math.sqrt(16 / 2) * LONGER * 0.5 / decision.constant)


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


@pytest.mark.parametrize("ratio", [0.01, 0.1, 1.0, 10.0])
def test_groups_with_other_rates_count_by_them(ratio):
    """The whole step is as long as that of SGD with the same groups."""

    class Grouped(Classifier):
        def configure_optimizers(self):
            groups = [{"params": self.net[2].parameters()}, {"params": self.net[0].parameters(), "lr": ratio}]
            return torch.optim.AdamW(groups, lr=1.0, weight_decay=0.0)

    class Look(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.before = [[p.detach().clone() for p in group["params"]] for group in optimizer.param_groups]

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.moved = self.sgd = 0.0
            groups = trainer.optimizers[0].param_groups
            for group, before, weight in zip(groups, self.before, (1.0, ratio), strict=True):
                for parameter, old in zip(group["params"], before, strict=True):
                    self.moved += ((parameter.detach() - old) ** 2).sum().item()
                    self.sgd += (weight * parameter.grad).pow(2).sum().item()

    trainer(callback := LipschitzLR(rule="grafted", schedule="none"), look := Look(), max_steps=1).fit(
        Grouped(), loader()
    )
    assert look.moved**0.5 == pytest.approx(LONGER * look.sgd**0.5 / callback.constant, rel=1e-4)


def test_parameters_that_thaw_restart_the_estimate():
    """The step of many more parameters is longer; the mean over the ratios of the few would keep the rate up."""

    class Thawing(Classifier):
        def configure_optimizers(self):
            self.net[0].requires_grad_(False)
            return torch.optim.AdamW(self.net.parameters(), lr=1.0, weight_decay=0.0)

        def on_train_epoch_start(self):
            self.net[0].requires_grad_(self.current_epoch >= 8)

    module = Thawing(net=torch.nn.Sequential(torch.nn.Linear(6, 4096), torch.nn.ReLU(), torch.nn.Linear(4096, 3)))
    moves = Moves()
    callback = LipschitzLR(rule="grafted", schedule="none")
    fit(callback, module, moves, max_steps=49, max_epochs=20)
    assert moves.moves[-1] == pytest.approx(LONGER * moves.gradients[-1] / callback.constant, rel=1e-3)


def test_the_state_of_another_optimizers_rule_is_refused():
    run = trainer(LipschitzLR(schedule="none"), max_epochs=1)
    run.fit(Classifier(), loader())
    run.save_checkpoint("sgd.ckpt")
    module = Classifier(lambda p: torch.optim.AdamW(p, lr=1.0))
    with pytest.raises(LitLipschitzError, match="rule 'inverse', and this run's AdamW has the rule 'observed'"):
        trainer(LipschitzLR(schedule="none"), max_epochs=2).fit(module, loader(), ckpt_path="sgd.ckpt")


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
