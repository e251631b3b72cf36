"""Updates measured by steps of a copy, against the steps that follow; how optimizers depend on the gradients."""

import math
import random
from copy import deepcopy

import numpy as np
import pytest
import torch
from helpers import LINEAR_OPTIMIZERS, MEASURED_OPTIMIZERS, Lion, OtherAdamW, OtherSGD, stepping
from schedulefree import RAdamScheduleFree
from torch import nn

from lit_lipschitz.measurement import trial_step as module
from lit_lipschitz.measurement.trial_step import Behaviour, TrialError, behaviour_of, is_schedule_free, trial_step


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 4), (5, 2), (4,))
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def set_gradients(trained, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) / (1 + seed)


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


@pytest.mark.parametrize("name", MEASURED_OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_update_is_that_of_the_step_which_follows(name, dtype):
    """At whatever rate the step is made, and without decoupled weight decay."""
    trained = parameters(dtype)
    optimizer = MEASURED_OPTIMIZERS[name](trained)
    for seed in range(6):  # fewer steps than Adafactor's limit of the rate needs
        set_gradients(trained, seed)
        set_lr(optimizer, 0.01 * (1 + seed))
        update_of = trial_step(optimizer)
        updates = [update_of(parameter) for parameter in trained]
        before = [parameter.detach().clone() for parameter in trained]
        optimizer.step()
        if name == "Lookahead" and seed == 4:  # goes back to where it was, which no rate changes
            continue
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                (i,) = (i for i, one in enumerate(trained) if one is parameter)
                moved = (before[i] - parameter.detach()) / group["lr"]
                decay = group["weight_decay"] if name in ("Lion, weight decay", "a step of its own") else 0.0
                torch.testing.assert_close(updates[i], moved - decay * before[i], rtol=2e-2, atol=2e-3)


def test_low_precision_moves_far_enough_to_be_measured():
    trained = [nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16())]
    optimizer = Lion(trained, lr=1e-6)  # less than bfloat16 can tell apart
    set_gradients(trained, 0)
    assert float(trial_step(optimizer)(trained[0]).float().norm()) == pytest.approx(64, rel=0.02)


def test_scaled_gradients_count_unscaled():
    trained = parameters()
    optimizer = OtherSGD(trained)
    set_gradients(trained, 0)
    plain = trial_step(optimizer)(trained[0])
    for parameter in trained:
        parameter.grad *= 1024
    torch.testing.assert_close(trial_step(optimizer, torch.tensor(1024.0))(trained[0]), plain)


def values_of(thing):
    """All numbers within an optimizer, in order."""
    if isinstance(thing, torch.Tensor):
        return [thing.detach().clone(), None if thing.grad is None else thing.grad.clone()]
    if isinstance(thing, dict):
        return [value for pair in thing.items() for part in pair for value in values_of(part)]
    if isinstance(thing, list | tuple):
        return [value for part in thing for value in values_of(part)]
    return values_of(vars(thing)) if isinstance(thing, torch.optim.Optimizer) else [thing]


class Noisy(OtherSGD):
    """Draws random numbers, and changes gradients in place."""

    def update(self, parameter, grad, state, group):
        grad.mul_(0.5)
        return grad + torch.rand_like(grad)


@pytest.mark.parametrize("name", [*MEASURED_OPTIMIZERS, "noisy"])
def test_nothing_of_the_training_changes(name):
    """Parameters, gradients, settings, state, hooks, schedulers and the generator of random numbers."""
    trained, calls = parameters(), []
    optimizer = {**MEASURED_OPTIMIZERS, "noisy": Noisy}[name](trained)
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)  # counts the steps of its optimizer
    for seed in range(3):
        set_gradients(trained, seed)
        handles = [
            optimizer.register_step_pre_hook(lambda *_: calls.append("before")),
            optimizer.register_step_post_hook(lambda *_: calls.append("after")),
        ]
        before, random = values_of(vars(optimizer)), torch.get_rng_state()
        behaviour_of(optimizer)
        trial_step(optimizer)(trained[0])
        after = values_of(vars(optimizer))
        assert not calls
        assert torch.equal(random, torch.get_rng_state())
        assert len(before) == len(after)
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old, new) if isinstance(old, torch.Tensor) else old is new or old == new
        for handle in handles:
            handle.remove()
        optimizer.step()
        calls.clear()


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam", "Adamax"])
def test_weight_decay_that_is_added_to_the_gradient_is_told_from_other(name):
    assert behaviour_of(getattr(torch.optim, name)(parameters(), lr=0.1, weight_decay=0.2)).couples_weight_decay == (
        name != "AdamW"
    )


@pytest.mark.parametrize("name", MEASURED_OPTIMIZERS)
def test_an_optimizer_that_rescales_the_gradient_is_not_linear(name):
    behaviour = behaviour_of(MEASURED_OPTIMIZERS[name](parameters()))
    assert (behaviour.linear, behaviour.momentum) == (False, 0.0)


@pytest.mark.parametrize("name", ["RAdam", "Rprop", "Muon", "RMSprop"])
def test_nor_is_one_of_torch(name):
    optimizer = getattr(torch.optim, name)(parameters()[:2])
    assert not behaviour_of(optimizer).linear


SGD = {
    "plain": {},
    "heavy ball": {"momentum": 0.9},
    "nesterov": {"momentum": 0.95, "nesterov": True},
    "dampening": {"momentum": 0.8, "dampening": 0.5},
    "averaged gradients": {"momentum": 0.99, "dampening": 0.99},
    "little momentum": {"momentum": 0.01},
    "maximize": {"momentum": 0.9, "maximize": True},
}


@pytest.mark.parametrize("name", SGD)
def test_the_momentum_of_sgd_is_found(name):
    settings = SGD[name]
    behaviour = behaviour_of(torch.optim.SGD(parameters(), lr=1e-3, weight_decay=1e-4, **settings))
    expected = settings.get("momentum", 0.0), settings.get("dampening", 0.0)
    assert behaviour[:3] == (True, *expected)
    assert behaviour.couples_weight_decay or "maximize" in settings


@pytest.mark.parametrize("name", LINEAR_OPTIMIZERS)
def test_the_momentum_of_another_packages_sgd_is_found(name):
    optimizer = LINEAR_OPTIMIZERS[name](parameters())
    momentum = 0.9 if name in ("another SGD", "a step of its own") else 0.0
    assert behaviour_of(optimizer)[:3] == (True, momentum, 0.0)


def test_groups_of_different_momentum_have_a_measured_update():
    first, *others = parameters()
    groups = [{"params": [first], "momentum": 0.9}, {"params": others, "momentum": 0.5}]
    assert not behaviour_of(torch.optim.SGD(groups, lr=0.1)).linear
    assert behaviour_of(torch.optim.SGD([{**group, "momentum": 0.5} for group in groups], lr=0.1)).linear


class Reluctant(OtherAdamW):
    """No copy of it can step."""

    def update(self, *arguments):
        if self is not self.only:
            raise RuntimeError("not this one")
        return super().update(*arguments)

    def __init__(self, trained, **settings):
        super().__init__(trained, **settings)
        type(self).only = self


def test_an_optimizer_that_no_copy_can_step_of_is_assumed_to_be_of_adams_type():
    trained = parameters()
    optimizer = Reluctant(trained)
    set_gradients(trained, 0)
    assert behaviour_of(optimizer) == Behaviour()
    with pytest.raises(TrialError, match="RuntimeError: not this one"):
        trial_step(optimizer)


class WithClosure(OtherAdamW):
    """As sharpness-aware minimization, which computes the gradients twice."""

    def step(self, closure):
        assert closure is not None
        assert math.isfinite(float(closure()))
        return super().step(closure)


def test_an_optimizer_that_needs_a_closure_is_given_one():
    trained = parameters()
    set_gradients(trained, 0)
    found = trial_step(WithClosure(trained))(trained[0])
    torch.testing.assert_close(found, trial_step(OtherAdamW(trained))(trained[0]))


class Holding(OtherAdamW):
    """Has attributes of its own, one of which can't be copied."""

    def __init__(self, trained, **settings):
        super().__init__(trained, **settings)
        self.factor, self.lock = 3.0, (one for one in trained)  # a generator can't be copied

    def update(self, parameter, grad, state, group):
        assert self.lock is not None
        return self.factor * super().update(parameter, grad, state, group)


def test_attributes_that_torch_does_not_copy_are_copied_or_shared():
    trained = parameters()
    optimizer = Holding(trained)
    with pytest.raises(TypeError):
        deepcopy(optimizer.lock)
    set_gradients(trained, 0)
    plain = trial_step(OtherAdamW(trained))(trained[0])
    torch.testing.assert_close(trial_step(optimizer)(trained[0]), 3 * plain, rtol=1e-3, atol=0)


def test_attributes_of_parameters_are_copied():
    class Marked(OtherSGD):
        def update(self, parameter, grad, state, group):
            return grad * parameter.factor

    trained = parameters()
    for parameter in trained:
        parameter.factor = 5.0
    set_gradients(trained, 0)
    torch.testing.assert_close(trial_step(Marked(trained))(trained[0]), 5 * trained[0].grad, rtol=1e-3, atol=1e-3)


def test_of_a_schedule_free_optimizer_the_update_is_that_of_the_sequence_z():
    trained = parameters()
    optimizer = RAdamScheduleFree(trained, lr=0.1)
    optimizer.train()
    assert is_schedule_free(optimizer)
    assert not is_schedule_free(OtherSGD(trained))
    for seed in range(8):
        set_gradients(trained, seed)
        update = trial_step(optimizer)(trained[0])
        before = optimizer.state[trained[0]]["z"].clone() if seed else trained[0].detach().clone()
        optimizer.step()
        moved = (before - optimizer.state[trained[0]]["z"]) / 0.1
        torch.testing.assert_close(update, moved, rtol=1e-2, atol=1e-3)
    assert float(moved.norm()) > 0


def test_a_tensor_as_learning_rate_is_left_alone():
    trained = parameters()
    lr = torch.tensor(0.25)
    optimizer = stepping(torch.optim.AdamW, lr=lr, foreach=False)(trained)
    set_gradients(trained, 0)
    found = trial_step(optimizer)(trained[0])
    assert optimizer.param_groups[0]["lr"] is lr
    assert float(lr) == 0.25
    torch.testing.assert_close(found, trained[0].grad.sign(), rtol=1e-3, atol=1e-3)


def test_small_copies_have_the_initial_state(monkeypatch):
    """Adagrad's accumulators exist before the first step."""
    seen = []
    small_state = module._small_state
    monkeypatch.setattr(
        module, "_small_state", lambda *arguments: seen.append(deepcopy(one := small_state(*arguments))) or one
    )
    behaviour_of(torch.optim.Adagrad(parameters(), lr=0.1, initial_accumulator_value=0.5))
    sums = [one for one in seen if one.ndim]
    assert sums
    assert all(torch.equal(one, torch.full_like(one, 0.5)) and one.shape == (4, 4) for one in sums)


def test_random_numbers_of_every_generator_are_left_alone():
    class Noisy(torch.optim.SGD):
        def step(self, closure=None):
            noise = random.random() + float(np.random.rand()) + float(torch.rand(()))
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.sub_(group["lr"] * noise * parameter.grad)

    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    trial_step(Noisy([weight], lr=0.1))
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])
