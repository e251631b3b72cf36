"""Damping of regressions whose noise is being fitted, and the residuals in the rate of SGD."""

import math
from dataclasses import asdict

import lightning as L
import numpy as np
import pytest
import torch
from helpers import Classifier, Steps, due_steps, explained, loader, trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lit_lipschitz import LipschitzLR
from lit_lipschitz.bounds.loss_spec import Loss
from lit_lipschitz.control import noise_damping
from lit_lipschitz.control.noise_damping import NoiseDamping
from lit_lipschitz.control.policy import Measurement, Policy
from lit_lipschitz.data import DeviceLoader
from lit_lipschitz.measurement.optimizer_updates import optimizer_info
from lit_lipschitz.measurement.residuals import Residuals
from lit_lipschitz.measurement.step_scale import StepScaleEstimator
from lit_lipschitz.optim.schedules import linear_warmup_decay
from lit_lipschitz.rules.base import RuleInput
from lit_lipschitz.rules.bounded import PastState, bounded

COUNT, BATCH = 96, 16


def after(fractions, steps=10, first=1.0, begin=0, parameters=100):
    """The damping after epochs of ``steps`` steps each with these unexplained fractions."""
    seen = NoiseDamping()
    seen.add_first_batches(Residuals(1e12, 1e12, 1e12, 1e12 * first), begin)  # so many that their error does not matter
    for epoch, share in enumerate(fractions, 1):
        seen.add_epoch(Residuals(100.0, 100.0, 100.0, 100.0 * share), begin + epoch * steps, parameters)
    return seen


def test_the_factor_by_hand():
    # Epochs around steps 5, 15 and 25. Since steps 2.5, 7.5 and 12.5, where the fractions were 0.9, 0.75 and 0.65, they
    # have fallen by 0.1, 0.15 and 0.1; and 0.45 / 0.55 of the variance are explained.
    assert after([0.8, 0.6]).factor == 1
    assert after([0.8, 0.6, 0.55]).factor == pytest.approx((0.1 / 0.15) ** 4)
    assert after([0.8, 0.6, 0.6]).factor == pytest.approx(0.1)  # a third of the speed, of which 0.01 would be left
    assert after([0.8, 0.5, 0.4, 0.33, 0.33, 0.33, 0.33]).factor == pytest.approx((0.67 / 0.33 / 3) ** 4)


HARD = [1 - 0.05 * math.log2(2 + epoch) for epoch in range(50)]  # as much again whenever the steps double


@pytest.mark.parametrize(
    "fractions",
    [
        [],
        [0.9],
        [1.0] * 5,
        [3.0, 2.0, 1.5],
        [0.5**epoch for epoch in range(1, 10)],
        [0.6, 0.25, 0.25, 0.25, 0.25],
        [0.5, 0.0, 0.0],
        HARD,
    ],
    ids=["nothing", "one epoch", "nothing learned", "less than nothing", "fast", "three quarters", "all", "hard"],
)
def test_the_rate_is_not_damped(fractions):
    assert after(fractions).factor == pytest.approx(1.0, abs=0.15 if fractions is HARD else 0)


def test_the_rate_is_damped_at_most_tenfold_where_only_noise_is_left():
    factors = [after([0.9, 0.6, 0.53, *[0.5] * more]).factor for more in range(12)]
    assert factors == sorted(factors, reverse=True)
    assert factors[0] > 0.1
    assert factors[-1] == noise_damping.MIN_DAMPING == 0.1
    assert after([0.9, 0.6, 0.5, 0.7, 1.2, math.inf, math.nan]).factor == noise_damping.MIN_DAMPING


def test_with_many_targets_per_parameter_the_noise_cannot_be_fitted():
    noise = [0.9, 0.6, 0.55, *[0.5] * 9]
    assert after(noise, parameters=50).factor == pytest.approx(0.1)
    assert after(noise, parameters=10).factor == pytest.approx(100 / (20 * 10))
    assert after(noise, parameters=5).factor == 1.0


def test_a_network_that_has_learned_before_is_not_taken_to_have_learned_now():
    late = after(HARD[20:], begin=200, first=HARD[19])
    assert late.factor > 0.5
    assert after([0.4, 0.4, 0.4, 0.4], first=0.4).factor == 1.0
    unknown = NoiseDamping()  # a run that goes on without its state
    for epoch in range(30, 60):
        unknown.add_epoch(Residuals(100.0, 100.0, 100.0, 100.0 * HARD[epoch - 20]), epoch * 10, 100)
    assert unknown.factor > 0.5


def test_a_first_batch_that_is_worse_by_chance_is_nothing_learned():
    for first in (0.6, 0.8, 0.99):
        pretrained = NoiseDamping()
        pretrained.add_first_batches(Residuals(16.0, 16.0, 16.0, 16.0 * first), 0)
        for epoch, share in enumerate((0.6, 0.61, 0.59, 0.6, 0.6), 1):
            pretrained.add_epoch(Residuals(512.0, 512.0, 512.0, 512.0 * share), epoch * 32, 500)
            assert pretrained.factor > 0.5


def test_an_interval_of_several_epochs_has_the_numbers_of_one():
    seen = NoiseDamping()
    seen.add_first_batches(Residuals(1e12, 1e12, 1e12, 1e12), 0)
    for interval, share in enumerate([0.9, 0.6, 0.55, *[0.5] * 9], 1):
        seen.add_epoch(Residuals(1000.0, 1000.0, 1000.0, 1000.0 * share), interval * 100, 10, num_epochs=10)
    assert seen.factor == pytest.approx(100 / (20 * 10))


def test_before_learning_has_begun_the_rate_is_not_damped():
    assert after([1.0, 0.99, 0.987, 0.986, 0.986]).factor > 0.5
    assert after([1.0, 0.8, 0.8, 0.8, 0.95, 0.99]).factor == 0.1


def test_epochs_whose_targets_do_not_vary_are_ignored():
    seen, same = after([0.8, 0.6]), after([0.8, 0.6])
    seen.add_epoch(Residuals(100.0, 0.0, 100.0, 10.0), 30, 100)
    assert (seen.factor, seen.fraction_unexplained) == (same.factor, 0.6)


def test_the_damping_continues_from_its_state():
    fractions = [0.9, 0.6, 0.55, 0.5, 0.5]
    resumed = NoiseDamping(**asdict(after(fractions[:3])))
    for epoch in (4, 5):
        resumed.add_epoch(Residuals(100.0, 100.0, 100.0, 100.0 * fractions[epoch - 1]), epoch * 10, 100)
    assert resumed.factor == after(fractions).factor


class Regression(L.LightningModule):
    """Somebody's own module, which keeps what it has seen in each epoch."""

    def __init__(self, optimizer, net=None, scheduled=False, loss=F.mse_loss):
        super().__init__()
        torch.manual_seed(2)
        self.net = net or nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 1))
        self.make, self.scheduled, self.loss = optimizer, scheduled, loss
        self.epochs = []
        self.heads = []
        self.net[-1].register_forward_pre_hook(lambda _, inputs: self.heads.append(inputs[0].detach()))

    def training_step(self, batch, batch_idx):
        outputs = self.net(batch[0])
        if batch_idx == 0:
            self.epochs.append([])
        self.epochs[-1].append((outputs.detach(), batch[1]))
        return self.loss(outputs, batch[1])

    def configure_optimizers(self):
        optimizer = self.make(self.parameters())
        if not self.scheduled:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def seen(self, epoch=-1):
        """The outputs and targets of an epoch."""
        return tuple(torch.cat(part) for part in zip(*self.epochs[epoch], strict=True))


def unexplained(module, columns=lambda values: values):
    """The mean square of the residuals of the last epoch, over the variance of the targets in the measured steps."""
    batches = [columns(targets) for epoch in module.epochs for _, targets in epoch]
    measured = torch.cat([batches[step - 1] for step in due_steps(len(batches), len(module.epochs[0]))]).double()
    outputs, targets = (columns(part).double() for part in module.seen())
    return float((outputs - targets).square().mean() / measured.var(dim=0, correction=0).mean())


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.1)


def noisy(noise=1.0, count=COUNT):
    """Half signal, half noise by default; and without noise."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 6, generator=generator)
    targets = inputs @ torch.full((6, 1), 6**-0.5) + noise * torch.randn(count, 1, generator=generator)
    return DataLoader(TensorDataset(inputs, targets), BATCH)


class DampingRecorder(Steps):
    """Keeps the callback's damping factor of each step too."""

    def __init__(self, callback):
        super().__init__()
        self.callback, self.factors = callback, []

    def _record(self, optimizer, *more):
        super()._record(optimizer, *more)
        self.factors.append(self.callback.controllers[0].damping)


def fit(module, data, callback=None, **settings):
    callback = callback or LipschitzLR()
    steps = DampingRecorder(callback)
    path = settings.pop("ckpt_path", None)
    trainer(callback, steps, **{"max_epochs": 12, **settings}).fit(module, data, ckpt_path=path)
    return callback, steps


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_where_only_noise_is_left_the_rate_is_damped(optimizer):
    module = Regression(optimizer)
    callback, steps = fit(module, noisy())
    plain, _ = fit(Regression(optimizer), noisy(), LipschitzLR(schedule="none"))
    assert steps.factors[:6] == [1.0] * 6  # what is seen for the first time
    assert min(steps.factors) < 0.5
    controller = callback.controllers[0]
    assert controller.fraction_unexplained == pytest.approx(unexplained(module), rel=1e-4)
    expected = callback.rate * linear_warmup_decay(71, 72) * steps.factors[-1]
    assert steps.rates[-1][0] == pytest.approx(expected)
    assert controller.metrics()["damping"] == steps.factors[-1]
    assert plain.controllers[0].damping == 1


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_where_there_is_no_noise_it_is_not(optimizer):
    callback, steps = fit(Regression(optimizer), noisy(noise=0.0))
    assert callback.controllers[0].fraction_unexplained < 0.05
    assert steps.factors[-36:] == [1.0] * 36


def test_a_scheduler_of_ones_own_is_left_alone():
    callback, steps = fit(Regression(sgd, scheduled=True), noisy())
    assert steps.rates[-1][0] == callback.rate
    assert callback.controllers[0].damping == 1


def test_other_losses_are_not_damped():
    callback, steps = fit(Regression(sgd, loss=F.l1_loss), noisy())
    assert callback.controllers[0].fraction_unexplained is None
    assert set(steps.factors) == {1.0}
    assert "damping" not in callback.controllers[0].metrics()
    classifier = LipschitzLR()
    trainer(classifier).fit(Classifier(), loader())
    assert "damping" not in classifier.controllers[0].metrics()


@pytest.mark.parametrize("update", [1, 4, 9])
def test_an_interval_of_steps_looks_at_epochs_too(update):
    module = Regression(sgd)
    callback, steps = fit(module, noisy(), LipschitzLR(update=update))
    epochs = len(callback.controllers[0].state_dict()["damping"]["fractions"]) - 1
    assert epochs == (12 if update < 6 else 8)  # an interval that is longer than an epoch is one
    assert min(steps.factors) < 0.5
    if update == 1:
        assert callback.controllers[0].fraction_unexplained == pytest.approx(1 - explained(*module.seen()), rel=1e-4)


@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("stop", [40, 42])  # in the middle of an epoch, and at its end
def test_a_resumed_run_is_damped_like_an_uninterrupted_one(optimizer, stop):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == stop:
                trainer.save_checkpoint("stopped.ckpt")

    callback = LipschitzLR(update=4)
    data = DeviceLoader(*noisy().dataset.tensors, BATCH, lambda batch, _: batch)  # which resumes in mid-epoch
    trainer(callback, steps := DampingRecorder(callback), Save(), max_epochs=12).fit(Regression(optimizer), data)
    resumed = Regression(optimizer)
    resumed.epochs = [[]]
    _, rest = fit(resumed, data, LipschitzLR(update=4), ckpt_path="stopped.ckpt")
    assert rest.rates == steps.rates[stop:]
    assert rest.factors[-1] == steps.factors[-1] < 1


def test_double_precision():
    inputs, targets = noisy().dataset.tensors
    data = DataLoader(TensorDataset(inputs.double(), targets.double()), BATCH)
    module = Regression(sgd)
    callback, _ = fit(module, data, precision="64-true", max_epochs=3)
    assert callback.controllers[0].fraction_unexplained == pytest.approx(unexplained(module), rel=1e-4)


def test_a_layer_without_a_shape_yet_counts_when_it_has_one_and_a_frozen_one_does_not():
    net = nn.Sequential(nn.Linear(6, 400), nn.ReLU(), nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 1))
    net[0].requires_grad_(False)
    callback, _ = fit(Regression(sgd, net), noisy(), max_epochs=3)
    assert callback.controllers[0].state_dict()["damping"]["samples_per_param"] == COUNT / (20 * (400 * 4 + 4 + 5))


def test_channels_that_were_moved_are_columns_still():
    class Moved(nn.Sequential):
        def forward(self, images):
            return super().forward(images).movedim(1, -1)

    images = torch.randn(32, 1, 5, 5)
    targets = torch.cat([images + 5, images - 5], dim=1).movedim(1, -1) + torch.randn(32, 5, 5, 2)
    module = Regression(sgd, Moved(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    callback, _ = fit(module, DataLoader(TensorDataset(images, targets), 8), max_epochs=2)
    outputs, targets = (part.reshape(-1, 2) for part in module.seen())
    assert callback.controllers[0].fraction_unexplained == pytest.approx(
        min(1 - explained(outputs, targets), 1), rel=1e-3
    )


@pytest.mark.parametrize("update", [1, 3])
def test_single_examples_do_not_make_a_run_diverge(update):
    data = DataLoader(noisy().dataset, 1)
    callback, _ = fit(Regression(sgd), data, LipschitzLR(update=update), max_epochs=4)
    assert callback.controllers[0].fraction_unexplained < 1


def test_the_targets_are_what_has_no_gradient():
    swapped = Regression(sgd, loss=lambda outputs, targets: F.mse_loss(targets, outputs))
    callback, _ = fit(swapped, noisy(), max_epochs=3)
    plain, _ = fit(Regression(sgd), noisy(), max_epochs=3)
    assert callback.controllers[0].fraction_unexplained == plain.controllers[0].fraction_unexplained
    assert callback.rate == plain.rate


def test_several_terms_tell_nothing():
    twice = Regression(
        sgd, loss=lambda outputs, targets: F.mse_loss(outputs, targets) + F.mse_loss(outputs, targets**3)
    )
    callback, _ = fit(twice, noisy(), max_epochs=3)
    assert callback.controllers[0].fraction_unexplained is None
    assert callback.controllers[0].decision.observed_constant == 0


def test_the_damping_is_logged_from_the_first_step_on_after_a_resume_too():
    class Look(L.Callback):
        def on_train_start(self, *_):
            self.keys = []

        def on_train_batch_end(self, *_):
            self.keys.append("damping" in callback.controllers[0].metrics())

    callback = LipschitzLR()
    trainer(callback, look := Look(), max_epochs=3).fit(Regression(sgd), noisy())
    assert look.keys == [True] * 18


def test_outputs_of_a_convolution_are_columns_by_their_channel():
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    images = torch.randn(32, 1, 5, 5)
    targets = torch.cat([images + 5, 2 * images], dim=1) + torch.randn(32, 2, 5, 5)
    module = Regression(sgd, net)
    callback, _ = fit(module, DataLoader(TensorDataset(images, targets), 8), max_epochs=2)
    expected = unexplained(module, lambda values: values.movedim(1, -1).reshape(-1, 2))
    assert callback.controllers[0].fraction_unexplained == pytest.approx(expected, rel=1e-3)


def test_momentums_rate_has_the_residuals_of_the_interval_before_in_it():
    """In the sixth epoch those of the first step of the fifth, which is the only one of it that was measured."""
    module = Regression(sgd)
    callback, _ = fit(module, noisy(), LipschitzLR(schedule="none"), max_epochs=6)
    controller = callback.controllers[0]
    assert [step for step in due_steps(36, 6) if step > 24] == [25, 31]
    outputs, targets = module.epochs[4][0]
    deviation = np.sqrt(np.mean((outputs - targets).numpy().astype(float) ** 2))
    size = math.sqrt(float((module.heads[24].square().sum(dim=1) + 1).mean()))
    # Twice the largest residual of normal ones with one output, times the inputs' root mean square.
    observed = 2 * (1 + 3 / math.sqrt(2)) * deviation * size
    assert controller.metrics()["observed_constant"] == pytest.approx(observed, rel=1e-4)
    terms = terms_of(controller.decision)
    assert terms["K"] == pytest.approx(observed / (0.1 * math.sqrt(BATCH / 2)), rel=1e-4)
    assert callback.rate == pytest.approx(1 / max(terms["past"], terms["P"]))


def test_in_a_run_without_epochs_they_are_those_of_the_interval():
    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield from noisy(noise=0.1).dataset

    module = Regression(sgd)
    data = DataLoader(Endless(), BATCH)
    callback, _ = fit(
        module, data, LipschitzLR(update=20, schedule="none", measure_every=6), max_epochs=-1, max_steps=101
    )
    measured = [80, 86, 92, 98]  # the first step of the interval and every sixth after it
    outputs, targets = (torch.cat([part[i] for i in measured]) for part in zip(*module.epochs[0], strict=True))
    measured = callback.controllers[0].measurement
    assert measured.residual_rms == pytest.approx((outputs - targets).square().mean().sqrt().item(), rel=1e-4)


def terms_of(decision):
    return {term.symbol: term.value for term in decision.terms}


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_the_descent_grows_with_a_factor_of_the_loss(factor):
    """The gradient's square with that of the factor, over the loss."""
    descents = []
    for one in (1.0, factor):
        torch.manual_seed(0)
        module = Regression(sgd, loss=lambda outputs, targets, one=one: one * F.mse_loss(outputs, targets))
        callback, _ = fit(module, noisy(), LipschitzLR(schedule="none"), max_steps=1)
        descents.append(terms_of(callback.controllers[0].decision)["P"])
    assert descents[1] == pytest.approx(factor * descents[0], rel=1e-5)
    assert descents[0] > 0


@pytest.mark.parametrize(
    ("deviation", "most", "seed"),
    [
        *((0.1, 0.05, seed) for seed in (1, 2, 4)),
        (0.01, 0.6, 1),
        (0.01, 0.6, 2),
        (0.01, 0.6, 4),
    ],
)
def test_small_targets_without_noise_do_not_make_a_run_diverge(deviation, most, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(1024, 6, generator=generator)
    data = TensorDataset(inputs, deviation * inputs @ torch.full((6, 1), 6**-0.5))
    net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    callback, _ = fit(Regression(sgd, net), DataLoader(data, 32, shuffle=True), max_epochs=15)
    assert callback.controllers[0].fraction_unexplained < most


def test_in_the_first_interval_outputs_and_targets_stand_for_them():
    module = Regression(sgd)
    callback, _ = fit(module, noisy(), LipschitzLR(schedule="none"), max_epochs=1)
    terms = terms_of(callback.controllers[0].decision)
    assert (terms["C"], terms["n"], terms["s"]) == (callback.constant, BATCH, pytest.approx(0.1))
    largest = max(callback.constant / (0.1 * math.sqrt(BATCH / 2)), terms["past"], terms["P"])
    assert callback.rate == pytest.approx(1 / largest)
    assert callback.controllers[0].metrics()["observed_constant"] == 0


@pytest.mark.parametrize(
    ("residual", "share"), [(0.5, 0.25), (1.5, 0.75), (6.0, 3.0), (0.1, 0.05), (0.01, 0.005), (1e-30, 5e-31)]
)
def test_residuals_that_vanish_leave_the_rate_to_the_descent(residual, share):
    groups = sgd([torch.zeros(1, requires_grad=True)]).param_groups
    # Three outputs of 16 examples, of a norm that is two to an output with that of the targets.
    measured = Measurement(
        4.0, 1.0, 16, 0, output_norm=2 * math.sqrt(3 * 16), step_scale=0.1, descent=7.0, residual_rms=residual
    )
    arguments = {"loss": Loss("mean_squared_error"), "num_outputs": 3, "groups": groups}
    info = optimizer_info(sgd([torch.zeros(1, requires_grad=True)]))
    decision, _ = Policy().decide(measured, optimizer=info, state=PastState(), last=None, **arguments)
    # Half of the norm that outputs and targets have together, times the largest of three normal numbers' over that.
    assert decision.observed_constant == pytest.approx(share * (1 + 3 / math.sqrt(6)) * decision.constant)
    assert decision.lr == pytest.approx(min(0.1 * math.sqrt(16 / 2) / decision.observed_constant, 1 / 7))


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_no_rate_of_momentum_is_above_polyaks_step(dampening):
    """The loss over the inner product of gradient and velocity, 2.5 over 5 times 5 at first, which is not dampened."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=0.9, dampening=dampening)
    estimator = StepScaleEstimator(optimizer, nn.Identity())
    for gradient, velocity in ((5.0, 5.0), (3.0, 0.9 * 5.0 + (1 - dampening) * 3.0)):
        parameter.grad = torch.tensor([gradient])
        estimator.add_loss(torch.tensor(2.5), 1.0)
        estimator.begin_step()
        estimator.update(estimator.pack(1.0, [1.0], 0, 1).tolist())
        optimizer.step()
        limit = 2.5 / (gradient * velocity)
        for observed in (0.0, 1e-3, 1e4):
            measured = RuleInput(
                1e-3 if not observed else 10.0,
                1.0,
                step_scale=estimator.scale.value,
                descent=estimator.scale.descent,
                observed_constant=observed,
                effective_sample_size=8.0,
                batch_size=8.0,
            )
            rate, _, _ = bounded(measured, PastState(), optimizer.param_groups[0])
            # s = 0.1 / (1 - d) and c = 2, the root of half of the examples.
            assert rate == pytest.approx(limit if observed < 1 else 2 * 0.1 / (1 - dampening) / 1e4)


@pytest.mark.parametrize("settings", [{"norm": "sample"}, {"rule": "inverse"}, {"bound": "smooth"}, {"bound": "paper"}])
def test_other_norms_rules_and_families_are_what_they_were(settings):
    callback, _ = fit(Regression(sgd), noisy(), LipschitzLR(schedule="none", **settings), max_epochs=3)
    assert callback.controllers[0].decision.observed_constant == 0
