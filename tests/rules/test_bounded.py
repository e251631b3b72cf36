"""The rule `bounded` beside computations that share no code with it, and plain gradient descent."""

import itertools
import math
import statistics
from dataclasses import replace

import pytest
import torch
from helpers import CLASSES, Classifier, due_steps, length, loader, mean_of_matrices, trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from schedulefree import AdamWScheduleFree
from torch import nn
from torch.nn import functional as F

from lit_lipschitz import LipschitzLR, bounds
from lit_lipschitz.bounds.loss_spec import Loss
from lit_lipschitz.control.policy import Measurement, Policy
from lit_lipschitz.measurement.optimizer_updates import optimizer_info
from lit_lipschitz.rules.base import RuleInput, Stateless
from lit_lipschitz.rules.bounded import PastState, bounded, inverse, momentum_of_any

ADAM = {"betas": (0.9, 0.999)}


def test_gradient_descent_is_the_inverse():
    assert inverse(RuleInput(4.0, 16.0), Stateless(), {}) == (0.25, Stateless(), ())


@pytest.mark.parametrize(
    ("group", "momentum"),
    [
        ({}, 0.0),
        ({"momentum": 0.0}, 0.0),
        ({"momentum": 0.9, "dampening": 0.5}, 0.9),
        ({"betas": (0.8, 0.99)}, 0.8),
        ({"betas": (0.8, 0.99), "momentum": 0.5}, 0.8),
        ({"betas": (torch.tensor(0.75), 0.99)}, 0.75),
    ],
)
def test_the_memory_is_the_momentum_or_the_first_beta(group, momentum):
    assert momentum_of_any(group) == momentum
    _, _, terms = bounded(RuleInput(4.0, 16.0), PastState(), group)
    assert {term.symbol: term.value for term in terms}["b"] == momentum


def rms(values):
    """Root mean square."""
    return math.sqrt(statistics.fmean(value**2 for value in values))


def grown(rates):
    """Rates of which none is more than a quarter above the one before."""
    return list(itertools.accumulate(rates, lambda before, rate: min(rate, 1.25 * before)))


def written_out(measured, b, smooth=False, decays=True, steps=None):
    """The rates of updates (C, n, s, P) before these steps, from the docstring of the rule; one in each by default."""
    rates, all_of_them, last = [], [], 0
    for (constant, examples, scale, descent), step in zip(measured, steps or itertools.count(1), strict=False):
        gain = 1 / (1 - b) if smooth else min(math.sqrt(examples / 2), 1 / (1 - b))
        all_of_them += [constant / (gain * scale)] * (step - last)  # one for each step
        last = step
        past = rms(all_of_them) if decays else max(all_of_them)
        rates.append(1 / max(all_of_them[-1], past, descent))
    return grown(rates)


MEASURED = st.tuples(*[st.floats(1e-3, 1e3)] * 4)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(MEASURED, min_size=1, max_size=20),
    st.sampled_from([0.0, 0.5, 0.9, 0.99]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 2, 5]),
)
def test_the_rates_are_those_of_the_formula_written_out(measured, b, smooth, decays, every):
    """With L and m, with O and n in their place, and with a constant of the curvature."""
    state, seen, rates, steps = PastState(), PastState(), [], range(1, 1 + every * len(measured), every)
    for (constant, examples, scale, descent), step in zip(measured, steps, strict=True):
        inputs = RuleInput(constant, 1.0, step_scale=scale, batch_size=examples, descent=descent, step=step)
        inputs = replace(inputs, decays=decays)
        rate, state, _ = bounded(replace(inputs, is_curvature=smooth), state, {"momentum": b})
        rates.append(rate)
        if not smooth:
            instead = {"observed_constant": constant, "effective_sample_size": examples}
            inputs = RuleInput(7.0, 1.0, step_scale=scale, batch_size=3.0, descent=descent, **instead)
            found, seen, _ = bounded(replace(inputs, decays=decays, step=step), seen, {"betas": (b, 0.99)})
            assert found == pytest.approx(rate, rel=1e-12)
    assert rates == pytest.approx(written_out(measured, b, smooth, decays, steps), rel=1e-9)


def test_a_rate_falls_at_once_with_the_gradients_and_grows_slowly_with_them():
    inputs, state = RuleInput(4.0, 16.0, observed_constant=2.0, effective_sample_size=2.0), PastState()
    for _ in range(9):
        rate, state, _ = bounded(inputs, state, ADAM)
        assert rate == pytest.approx(0.5)
    assert bounded(replace(inputs, step_scale=0.1), state, ADAM).rate == pytest.approx(0.05)
    # The mean of nine squares of 2 and one of 0.02.
    past = math.sqrt((9 * 2.0**2 + 0.02**2) / 10)
    for smaller in (replace(inputs, step_scale=100.0), replace(inputs, observed_constant=0.02)):
        assert bounded(smaller, state, ADAM).rate == pytest.approx(1 / past)
        assert bounded(replace(smaller, decays=False), state, ADAM).rate == pytest.approx(1 / 2)
    assert bounded(replace(inputs, observed_constant=4.0), state, ADAM).rate == pytest.approx(0.25)


def test_the_descent_bounds_its_own_update_and_is_no_part_of_the_past():
    for decays in (True, False):
        inputs, state = RuleInput(4.0, 16.0, batch_size=2.0, decays=decays), PastState()
        rates = []
        for descent in (0.0, 100.0, 3.0, 0.0):
            rate, state, _ = bounded(replace(inputs, descent=descent), state, {})
            rates.append(rate)
        assert rates == pytest.approx([1 / 4, 1 / 100, 1.25 / 100, 1.25**2 / 100])


GROUPS = st.sampled_from([{}, {"momentum": 0.9}, ADAM])
VANISHING_CONSTANTS = st.lists(st.floats(1e-30, 1e3), min_size=2, max_size=60)


def rates_of(constants, descents, group, decays):
    """The rates of updates with these O and P."""
    state, rates = PastState(), []
    for constant, descent in zip(constants, descents, strict=False):
        inputs = RuleInput(5.0, 25.0, observed_constant=constant, effective_sample_size=4.0, decays=decays)
        rate, state, _ = bounded(replace(inputs, descent=descent), state, group)
        rates.append(rate)
    return rates


@settings(max_examples=100, deadline=None)
@given(VANISHING_CONSTANTS, GROUPS)
def test_a_rate_that_decays_later_rises_at_most_with_the_root_of_the_updates(constants, group):
    rates = rates_of(constants, itertools.repeat(0.0), group, decays=True)
    for updates, rate in enumerate(rates, start=1):
        assert rate <= min(rates[:updates]) * math.sqrt(updates) * (1 + 1e-9)


@settings(max_examples=100, deadline=None)
@given(VANISHING_CONSTANTS, GROUPS)
def test_a_rate_that_does_not_decay_later_never_rises(constants, group):
    rates = rates_of(constants, itertools.repeat(0.0), group, decays=False)
    assert rates == sorted(rates, reverse=True)


@settings(max_examples=100, deadline=None)
@given(VANISHING_CONSTANTS, st.lists(st.floats(0.0, 1e6), min_size=60, max_size=60), GROUPS, st.booleans())
def test_with_the_descent_no_rate_is_above_its_inverse_or_the_rate_without_it(constants, descents, group, decays):
    b = momentum_of_any(group)
    measured = [(constant, 4.0, 1.0, descent) for constant, descent in zip(constants, descents, strict=False)]
    rates = rates_of(constants, descents, group, decays)
    assert rates == pytest.approx(written_out(measured, b, decays=decays), rel=1e-12)
    assert all(rate * descent <= 1 + 1e-12 for rate, descent in zip(rates, descents, strict=False))


@pytest.mark.parametrize("group", [{}, {"momentum": 0.9}, ADAM])
def test_the_rate_grows_with_the_root_of_the_examples_until_the_gradient_bounds_it(group):
    b = momentum_of_any(group)
    rates = {n: bounded(RuleInput(3.0, 9.0, batch_size=n), PastState(), group).rate for n in (0.5, 2, 8, 1e3, 1e6)}
    assert rates[2] == pytest.approx(1 / 3)
    assert rates[0.5] == pytest.approx(1 / 6)
    assert rates[8] == pytest.approx(min(2, 1 / (1 - b)) / 3)
    # A single step, 1 - b of the displacement, is as long as with a rate of 1 / C.
    assert (1 - b) * rates[1e3] == (1 - b) * rates[1e6] == pytest.approx(1 / 3)


@pytest.mark.parametrize("batch_size", [1, 8, 128])
def test_the_gradients_of_two_batches_differ_by_what_the_rule_takes_for_the_constant_of_the_noise(batch_size):
    """Autograd's gradients of a head, on labels that are drawn at random; sharp outputs come near the bound."""
    torch.manual_seed(0)
    head = nn.Linear(20, 2, dtype=torch.float64)
    inputs = torch.randn(5000, 20, dtype=torch.float64)
    with torch.no_grad():
        head.weight[0] += 300.0  # every example is one class or the other with certainty, and half of them are wrong

    def gradient():
        a = inputs[torch.randint(len(inputs), (batch_size,))]
        loss = F.cross_entropy(head(a), torch.randint(2, (batch_size,)))
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, tuple(head.parameters()))])

    apart = [float((gradient() - gradient()).square().sum()) for _ in range(2000)]
    size = math.sqrt(float(inputs.square().sum(dim=1).mean() + 1))
    strict = bounds.cross_entropy(size, num_classes=2, batch_size=1)
    measured = RuleInput(strict, 1.0, batch_size=batch_size, step_scale=0.1)  # of momentum 0.9
    constant = 0.1 / bounded(measured, PastState(), {"momentum": 0.9}).rate
    distance = math.sqrt(sum(apart) / len(apart))
    assert 0.6 * constant < distance < 1.03 * constant


def decide(grad_norm, optimizer="AdamW", batch_size=16, even=1.0, policy=None, state=None, scale=0.5, **settings):
    optimizer = getattr(torch.optim, optimizer)([torch.zeros(1, requires_grad=True)], **settings)
    norms = {"logit_grad_norm": grad_norm, "mean_logit_grad_norm": even * grad_norm}
    return (policy or Policy()).decide(
        Measurement(4.0, 1.0, batch_size, 0, step_scale=scale, **norms),
        loss=Loss("cross_entropy"),
        num_outputs=3,
        optimizer=optimizer_info(optimizer),
        groups=optimizer.param_groups,
        state=state or PastState(),
        last=None,
    )


def test_without_a_usable_gradient_there_is_no_rate():
    assert decide(0.0, scale=0.0) is None
    decision, _ = decide(0.0)
    assert decision.lr == pytest.approx(math.sqrt(16 / 2) * 0.5 / decision.constant)


def test_without_a_gradient_norm_in_the_outputs_the_largest_one_counts_and_all_examples():
    without, _ = decide(0.0, batch_size=8)
    measured, _ = decide(math.sqrt(2), batch_size=8)
    assert (without.observed_constant, measured.observed_constant) == (0, pytest.approx(measured.constant))
    assert without.lr == pytest.approx(measured.lr)
    terms = {term.symbol: term.value for term in without.terms}
    assert (terms["C"], terms["n"]) == (without.constant, 8)


@pytest.mark.parametrize(("largest", "share"), [(0.1, 0.1), (0.4, 0.4), (0.7, None), (1.4, None), (0.0, None)])
def test_a_linear_optimizer_has_three_deviations_above_the_typical_gradient_and_at_most_the_largest(largest, share):
    """Three outputs; the largest possible norm is the root of 2."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], momentum=0.9)
    norms = {"logit_grad_norm": 0.05, "mean_logit_grad_norm": 0.01, "largest_logit_grad_norm": largest}
    decision, _ = Policy().decide(
        Measurement(4.0, 1.0, 16, 0, step_scale=0.1, **norms),
        loss=Loss("cross_entropy"),
        num_outputs=3,
        optimizer=optimizer_info(optimizer),
        groups=optimizer.param_groups,
        state=PastState(),
        last=None,
    )
    constant = decision.constant * (1 if share is None else share * (1 + 3 / math.sqrt(6)) / math.sqrt(2))
    terms = {term.symbol: term for term in decision.terms}
    assert (terms["C"].value, terms["n"].value) == (pytest.approx(constant), 16)
    assert (terms["C"].meaning == "equal to L", terms["n"].meaning) == (share is None, "equal to m")
    assert decision.lr == pytest.approx(math.sqrt(16 / 2) * 0.1 / constant)


def test_a_linear_optimizer_has_a_measured_constant_whatever_the_number_of_outputs():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], momentum=0.9)
    norms = {"logit_grad_norm": 0.05, "mean_logit_grad_norm": 0.01, "largest_logit_grad_norm": 0.1}
    for outputs in (1, 10):  # a resumed run does not know how many there were
        decision, _ = Policy().decide(
            Measurement(4.0, 1.0, 16, 0, step_scale=0.1, largest_grad_norm=0.5, **norms),
            loss=Loss("cross_entropy"),
            num_outputs=outputs,
            optimizer=optimizer_info(optimizer),
            groups=optimizer.param_groups,
            state=PastState(),
            last=None,
        )
        assert decision.constant == pytest.approx(0.5 * 4.0 / 4)
        assert decision.lr == pytest.approx(math.sqrt(16 / 2) * 0.1 / decision.constant)


def test_no_gradient_norm_counts_as_more_than_the_largest_possible():
    assert decide(9.0)[0].observed_constant == decide(9.0)[0].constant


def test_a_loss_that_is_learned_raises_the_rate_by_the_root_mean_square():
    state, norms, rates = PastState(), (1.4, 0.7, 0.02, 1e-9, 1e-12), []
    for norm in norms:
        decision, state = decide(norm, state=state)
        rates.append(decision.lr)
        assert decision.observed_constant == pytest.approx(decision.constant * norm / math.sqrt(2))
    assert rates == pytest.approx(grown([rates[0] * 1.4 / rms(norms[:i]) for i in range(1, 6)]))


@pytest.mark.parametrize(
    ("batch_size", "even", "longer"),
    [(2, 1.0, 1.0), (32, 1.0, 4.0), (200, 1.0, 10.0), (2000, 1.0, 10.0), (128, 0.5, 4.0), (2000, 0.1, math.sqrt(10))],
)
def test_the_examples_that_count_are_those_that_still_have_a_gradient(batch_size, even, longer):
    """Kish's number: a quarter with the mean at half of the root mean square, a hundredth at a tenth."""
    decision, _ = decide(1.0, batch_size=batch_size, even=even)
    assert decision.lr == pytest.approx(longer * 0.5 / decision.observed_constant)


def test_a_coupled_weight_decay_is_in_the_constant_that_is_measured():
    plain, decayed = (decide(0.7, "Adam", weight_decay=decay)[0] for decay in (0.0, 0.3))
    assert decayed.observed_constant == pytest.approx(plain.observed_constant + 0.3)


def test_with_a_constant_of_the_curvature_there_is_no_noise():
    for batch_size in (1, 1000):
        decision, _ = decide(0.7, batch_size=batch_size, policy=Policy("smooth"))
        assert (decision.rule, decision.observed_constant) == ("bounded", 0)
        assert decision.lr == pytest.approx(10 * 0.5 / decision.constant)
        assert "n" not in {term.symbol for term in decision.terms}


class SignMomentum(torch.optim.Optimizer):
    """The sign of a moving average, as an optimizer that is not registered."""

    def __init__(self, parameters, lr=1.0):
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.99)})

    def step(self, closure=None):
        loss = closure() if closure else None
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                parameter.sub_(self.param_groups[0]["lr"] * average.lerp(parameter.grad, 0.1).sign())
                average.lerp_(parameter.grad, 0.01)
        return loss


ROOT_19 = math.sqrt(1.9 / 0.1)
# How the optimizer is made, b, and the displacement by one of many gradients over the update, or over the gradient.
OPTIMIZERS = {
    "SGD": (lambda p: torch.optim.SGD(p, lr=1.0), 0.0, 1.0),
    "SGD, momentum": (lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9), 0.9, 10.0),
    "SGD, nesterov": (lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.5, nesterov=True), 0.5, 2.0),
    "SGD, dampening": (lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9, dampening=0.4), 0.9, 6.0),
    "AdamW": (lambda p: torch.optim.AdamW(p, lr=1.0, weight_decay=0.0), 0.9, ROOT_19),
    "NAdam": (lambda p: torch.optim.NAdam(p, lr=1.0), 0.9, ROOT_19),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, lr=1.0), 0.0, 1.0),
    "RMSprop, momentum": (lambda p: torch.optim.RMSprop(p, lr=1.0, momentum=0.8), 0.8, 3.0),
    "Schedule-Free": (lambda p: AdamWScheduleFree(p, lr=1.0), 0.9, 1.0),
    "sign of momentum": (SignMomentum, 0.9, ROOT_19),
}


class Trained(Classifier):
    """In double precision; turns an optimizer of the package schedulefree to training."""

    def on_train_epoch_start(self):
        self.double()
        if hasattr(self.trainer.optimizers[0], "train"):
            self.trainer.optimizers[0].train()

    def training_step(self, batch, batch_idx):
        return super().training_step([batch[0].double(), batch[1]], batch_idx)


class Look(Callback):
    """Measures each step by how far it moves the weights, the loss, and the gradient norms by softmax less one-hot."""

    def __init__(self, callback, gain):
        self.callback, self.gain, self.linear = callback, gain, False
        self.measured, self.rates, self.moves, self.gradients = [], [], [], []

    def positions(self, optimizer, parameters):
        """Of the sequence z of Schedule-Free, or of the weights."""
        return [optimizer.state[p].get("z", p).detach().clone() for p in parameters]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with torch.no_grad():
            probabilities = pl_module.net(batch[0].double()).softmax(dim=1)
        norms = (probabilities - F.one_hot(batch[1], CLASSES)).square().sum(dim=1).sqrt()
        self.norms = norms.square().mean().sqrt().item(), norms.mean().item()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.grads = [p.grad.clone() for p in pl_module.parameters()]
        self.before = self.positions(optimizer, pl_module.parameters())

    def updates(self, optimizer, parameters, moves):
        """Those at a learning rate of 1: of SGD the velocity, which Nesterov's step adds to the gradient once more."""
        if self.linear and optimizer.param_groups[0]["momentum"]:
            return [optimizer.state[p]["momentum_buffer"].clone() for p in parameters]
        return [-move / optimizer.param_groups[0]["lr"] for move in moves]

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        optimizer = trainer.optimizers[0]
        lr = optimizer.param_groups[0]["lr"]
        after = self.positions(optimizer, pl_module.parameters())
        moves = [now - then for now, then in zip(after, self.before, strict=True)]
        updates = self.updates(optimizer, list(pl_module.parameters()), moves)
        descent = sum(float((g * u).sum()) for g, u in zip(self.grads, updates, strict=True)) / float(outputs["loss"])
        if "z" in optimizer.state[next(pl_module.parameters())]:
            largest = list(itertools.accumulate(self.rates, max))  # whose squares are the weights of the average
            share = largest[-1] ** 2 / (sum(rate**2 for rate in largest) + largest[-1] ** 2) if largest else 1.0
            descent *= 1 - optimizer.param_groups[0]["betas"][0] * (1 - share)  # of z where the gradients are taken
        scale = mean_of_matrices(self.grads, self.grads if self.linear else updates) / self.gain
        self.measured.append((scale, descent, *self.norms, self.callback.constant))
        self.rates.append(lr)
        self.moves.append(length(moves))
        self.gradients.append(length(self.grads))


def look_at(name, net=None, **settings):
    """A run, and a look at each of its steps."""
    make, _, gain = OPTIMIZERS[name]
    callback = LipschitzLR(schedule="none", bound=settings.pop("bound", "strict"))
    look = Look(callback, gain)
    look.linear = name.startswith("SGD")
    trainer(callback, look, **settings).fit(Trained(make, net), loader())
    return callback, look


@pytest.mark.parametrize("bound", ["strict", "smooth"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_rates_of_a_run_are_those_of_a_loop_that_shares_no_code(name, bound):
    callback, look = look_at(name, bound=bound, max_epochs=8)
    due = due_steps(48, 6)
    updates, means = [], {}
    for step in due:
        scale, descent, norm, mean, constant = look.measured[step - 1]
        # Of a step that ends an epoch, the callback has begun the next interval by the time that it is looked at.
        epoch, examples = (step - 1) // 6, 16
        means.setdefault(epoch, []).append(norm**2 / mean)
        if bound == "strict" and look.linear:
            largest = max(means[max(epoch - 1, 0)] + means[epoch]) * (1 + 3 / math.sqrt(2 * CLASSES))
            constant *= min(largest / math.sqrt(2), 1)
        elif bound == "strict":
            constant, examples = constant * norm / math.sqrt(2), 16 * (mean / norm) ** 2
        updates.append((constant, examples, scale, descent))
    rates = written_out(updates, OPTIMIZERS[name][1], bound == "smooth", name == "Schedule-Free", due)
    expected = [rates[sum(one <= step for one in due) - 1] for step in range(1, 49)]
    assert len(look.rates) == 48
    assert look.rates == pytest.approx(expected, rel=2e-3 if name == "sign of momentum" else 1e-4)
    assert callback.controllers[0].decision.rule == "bounded"


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ("Schedule-Free", "sign of momentum")])
def test_the_first_step_with_the_smooth_constant_is_as_long_as_that_of_gradient_descent(name):
    """1 - b of the displacement by a gradient; one matrix, whose scale is that of the whole step."""
    _, b, gain = OPTIMIZERS[name]
    callback, look = look_at(name, nn.Sequential(nn.Linear(6, CLASSES, bias=False)), bound="smooth", max_steps=1)
    scale, descent, *_ = look.measured[0]
    # With Polyak's step, in units of the weights, where it is shorter.
    constant = max(callback.constant, scale * descent / (1 - b))
    expected = (1 - b) * gain * (look.rates[0] if not look.linear else 1.0)
    assert callback.constant > 0
    if look.linear:
        assert (1 - b) * gain * look.rates[0] * look.gradients[0] == pytest.approx(look.gradients[0] / constant)
    else:
        update = look.moves[0] / look.rates[0]
        assert expected * update == pytest.approx(look.gradients[0] / constant, rel=1e-4)


def least_squares(optimizer, steps, offset=0.0, size=1.0):
    """Full batches of a linear regression; the rates, the terms, the losses and the largest eigenvalue."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(32, 4, generator=generator) * torch.tensor([2.0, 1.0, 1.0, 1.0])
    targets = size * inputs @ torch.randn(4, 1, generator=generator)
    largest = float(torch.linalg.eigvalsh(2 * inputs.T @ inputs / 32)[-1])

    class Regression(Classifier):
        def training_step(self, batch, batch_idx):
            return F.mse_loss(self.net(batch[0]), batch[1]) - offset

    class Record(Callback):
        def __init__(self):
            self.rates, self.terms, self.losses = [], [], []

        def on_train_batch_end(self, trainer, pl_module, outputs, *_):
            decision = callback.controllers[0].decision
            self.rates.append(decision.lr)
            self.terms.append({term.symbol: term.value for term in decision.terms})
            self.losses.append(float(outputs["loss"]))

    callback = LipschitzLR(schedule="none")
    data = torch.utils.data.TensorDataset(inputs.repeat(10, 1), targets.repeat(10, 1))
    module = Regression(optimizer, nn.Sequential(nn.Linear(4, 1, bias=False)))
    with torch.no_grad():
        module.net[0].weight.mul_(size)
    trainer(callback, record := Record(), max_steps=steps, max_epochs=-1).fit(
        module, torch.utils.data.DataLoader(data, batch_size=32)
    )
    return record, largest


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_descent_bounds_the_rate_of_least_squares_with_small_residuals(momentum):
    """The constant of the gradient is as small as outputs and targets, and the descent over the loss is not."""
    record, _ = least_squares(lambda p: torch.optim.SGD(p, lr=1.0, momentum=momentum), 200, size=1e-3)
    for rate, terms in zip(record.rates, record.terms, strict=True):
        assert rate <= (1 + 1e-6) / max(terms["past"], terms["P"])
    assert record.terms[0]["P"] > 10 * record.terms[0]["past"]
    assert record.losses[-1] < 1e-3 * record.losses[0]


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_polyaks_step_of_least_squares_is_at_least_half_of_the_inverse_of_the_largest_eigenvalue(size):
    """|g|^2 <= 2 B f: so P is at most 2 B, whatever the scale of the targets, and it comes near that."""
    record, largest = least_squares(lambda p: torch.optim.SGD(p, lr=1.0), 60, size=size)
    descents = [terms["P"] for terms in record.terms]
    assert all(0 < descent <= 2 * largest * (1 + 1e-4) for descent in descents)
    assert 0.3 * 2 * largest < max(descents)


def test_a_loss_that_is_negative_has_no_bound_of_the_descent():
    """Minus a constant it has the same gradients; Polyak's step needs a loss that is at least 0."""
    adamw = lambda p: torch.optim.AdamW(p, lr=1.0)  # noqa: E731
    torch.manual_seed(0)
    plain, _ = least_squares(adamw, 1)
    torch.manual_seed(0)
    negative, _ = least_squares(adamw, 1, offset=1e3)
    assert plain.losses[0] > 0 > negative.losses[0]
    assert plain.terms[0]["P"] > 0 == negative.terms[0]["P"]
    assert plain.terms[0]["s"] == pytest.approx(negative.terms[0]["s"], rel=1e-6)
    assert negative.rates[0] == pytest.approx(1 / negative.terms[0]["past"])


VANISHING = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1.0),
    "momentum": lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1.0, weight_decay=0.0),
}


@pytest.mark.parametrize("name", VANISHING)
def test_the_rate_of_a_regression_without_noise_does_not_run_away(name):
    """Without a schedule, long after everything is learned."""
    record, _ = least_squares(VANISHING[name], 900)
    assert min(record.losses) < 1e-6
    assert max(record.losses[100:]) <= 0.01 * record.losses[0]
    assert max(record.rates) < 10 * max(record.rates[:16])
