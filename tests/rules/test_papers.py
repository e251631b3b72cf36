"""The paper's rules make an optimizer divide the constant as it divides the gradient; the authors' recorded rates."""

import pytest
import torch

from lit_lipschitz import ZeroStartSGD, bounds
from lit_lipschitz.rules.base import RuleInput
from lit_lipschitz.rules.papers import (
    AdamState,
    AverageState,
    adam,
    adam_authors,
    adamo,
    adamo_authors,
    rmsprop,
    rmsprop_authors,
)
from lit_lipschitz.rules.registry import RULES


def given(constant):
    return RuleInput(constant, constant**2)


@pytest.mark.parametrize(("momentum", "dampening"), [(0.9, 0.0), (0.5, 0.0), (0.9, 0.3), (0.0, 0.0)])
def test_adamo_makes_torch_walk_as_the_paper_writes(momentum, dampening):
    constants = [5.0, 3.0, 8.0, 2.0]
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(4, 10, generator=generator, dtype=torch.float64)

    # The paper's algorithm, with its moving average of L corrected for the start at 0.
    beta, velocity, average, weights = momentum, torch.zeros(10, dtype=torch.float64), 0.0, torch.zeros(10)
    weights = weights.double()
    for t, (constant, gradient) in enumerate(zip(constants, gradients, strict=True), start=1):
        velocity = beta * velocity + (1 - beta) * gradient
        average = beta * average + (1 - beta) * constant
        weights = weights - velocity / (average / (1 - beta**t))

    parameter = torch.nn.Parameter(torch.zeros(10, dtype=torch.float64))
    optimizer = ZeroStartSGD([parameter], lr=1.0, momentum=momentum, dampening=dampening)
    state = AverageState()
    for constant, gradient in zip(constants, gradients, strict=True):
        optimizer.param_groups[0]["lr"], state, _ = adamo(given(constant), state, optimizer.param_groups[0])
        parameter.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(parameter.data, weights, rtol=1e-12, atol=0)


def test_adamo_corrects_for_the_start_whatever_the_momentum_was():
    # Schedulers may cycle the momentum; with a constant L the average is L all the same.
    state = AverageState()
    for momentum in (0.85, 0.95, 0.95, 0.85):
        rate, state, _ = adamo(given(2.0), state, {"momentum": momentum})
        assert rate == pytest.approx((1 - momentum) / 2.0, rel=1e-12)


def test_a_rule_does_not_change_the_state_it_is_given():
    state = AverageState()
    adamo(given(1.0), state, {"momentum": 0.9})
    assert state == AverageState()


CONSTANTS = [5.0, 3.0, 8.0, 2.0, 2.5]


def gradients():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(CONSTANTS), 10, generator=generator, dtype=torch.float64)


def walk(make, rule, state):
    """torch's optimizer with a rule's rates: where it ends."""
    parameter = torch.nn.Parameter(torch.zeros(10, dtype=torch.float64))
    optimizer = make([parameter])
    for constant, gradient in zip(CONSTANTS, gradients(), strict=True):
        optimizer.param_groups[0]["lr"], state, _ = rule(given(constant), state, optimizer.param_groups[0])
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.data


def test_nesterov_has_the_steady_step_of_momentum():
    """With gradient and constant standing still, g + b v tends to v, and both steps to g / L."""
    for nesterov in (False, True):
        parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=0.5, nesterov=nesterov)
        state = AverageState()
        for _ in range(60):
            optimizer.param_groups[0]["lr"], state, _ = adamo(given(4.0), state, optimizer.param_groups[0])
            before = parameter.item()
            parameter.grad = torch.ones(1, dtype=torch.float64)
            optimizer.step()
        assert before - parameter.item() == pytest.approx(1 / 4)


@pytest.mark.parametrize("corrected", [True, False])
def test_rmsprop_divides_the_gradient_as_torch_does_and_the_constant_alike(corrected):
    alpha, eps = 0.8, 1e-8
    weights, average, square = torch.zeros(10, dtype=torch.float64), torch.zeros(10, dtype=torch.float64), 0.0
    for t, (constant, gradient) in enumerate(zip(CONSTANTS, gradients(), strict=True), start=1):
        average = alpha * average + (1 - alpha) * gradient**2
        square = alpha * square + (1 - alpha) * constant**2
        root = (square / (1 - alpha**t) if corrected else square) ** 0.5
        weights = weights - (gradient / (average.sqrt() + eps)) / (constant / (root + eps))

    rule = rmsprop
    if not corrected:  # the authors divide by K_z, which is L here

        def rule(inputs, state, settings):
            same = RuleInput(99.0, inputs.second_moment, inputs.constant)
            return rmsprop_authors(same, state, settings)

    reached = walk(lambda p: torch.optim.RMSprop(p, lr=1.0, alpha=alpha, eps=eps), rule, AverageState())
    torch.testing.assert_close(reached, weights, rtol=1e-9, atol=0)


def test_rmsprop_with_momentum_has_the_steady_step_of_rmsprop():
    settings = {"alpha": 0.9, "eps": 1e-8}
    plain = rmsprop(given(2.0), AverageState(), settings)
    heavy = rmsprop(given(2.0), AverageState(), {**settings, "momentum": 0.9})
    assert heavy.rate == pytest.approx(0.1 * plain.rate)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("corrected", [True, False])
def test_adam_divides_gradient_and_constant_alike(corrected, amsgrad):
    b1, b2, eps = 0.7, 0.8, 1e-8
    weights, m, v = (torch.zeros(10, dtype=torch.float64) for _ in range(3))
    k1 = k2 = most = 0.0
    most_v = torch.zeros(10, dtype=torch.float64)
    for t, (constant, gradient) in enumerate(zip(CONSTANTS, gradients(), strict=True), start=1):
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        k1, k2 = b1 * k1 + (1 - b1) * constant, b2 * k2 + (1 - b2) * constant**2
        most_v, most = torch.maximum(most_v, v), max(most, k2)
        second, square = (most_v, most) if amsgrad else (v, k2)
        direction = (m / (1 - b1**t)) / ((second / (1 - b2**t)).sqrt() + eps)
        if corrected:
            weights = weights - direction / ((k1 / (1 - b1**t)) / ((square / (1 - b2**t)) ** 0.5 + eps))
        else:
            weights = weights - direction / (k1 / (square**0.5 + eps))
    rule = adam if corrected else adam_authors
    make = {"lr": 1.0, "betas": (b1, b2), "eps": eps, "amsgrad": amsgrad}
    for optimizer in (torch.optim.Adam, torch.optim.AdamW):
        rest = {"weight_decay": 0.0} if optimizer is torch.optim.AdamW else {}
        reached = walk(lambda p, kind=optimizer, rest=rest: kind(p, **make, **rest), rule, AdamState())
        torch.testing.assert_close(reached, weights, rtol=1e-9, atol=0)


def test_nadam_has_the_steady_step_of_adam():
    for kind in (torch.optim.Adam, torch.optim.NAdam):
        parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = kind([parameter], lr=1.0, betas=(0.5, 0.6))
        state = AdamState()
        for _ in range(60):
            optimizer.param_groups[0]["lr"], state, _ = adam(given(4.0), state, optimizer.param_groups[0])
            before = parameter.item()
            parameter.grad = torch.full((1,), 7.0, dtype=torch.float64)
            optimizer.step()
        assert before - parameter.item() == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("rule", ["rmsprop", "adam"])
def test_a_constant_that_stands_still_gives_a_rate_of_one(rule):
    state, settings = RULES[rule].initial_state(), {"alpha": 0.99, "betas": (0.9, 0.999), "eps": 1e-8}
    for _ in range(5):
        rate, state, _ = RULES[rule].function(given(3.0), state, settings)
        assert rate == pytest.approx(1.0, rel=1e-6)


def test_the_recorded_rates_of_momentum_on_mnist():
    """The authors' notebook: first rate and first average 0.1; its 19 rates belong to one constant, 6.106."""
    recorded = [1.42734, 0.80571, 0.57883, 0.46179, 0.39070, 0.34315, 0.30928, 0.28404, 0.26461, 0.24926]
    recorded += [0.23690, 0.22677, 0.21837, 0.21133, 0.20536, 0.20028, 0.19591, 0.19214, 0.18887]
    state = RULES["adamo_authors"].initial_state(0.1)
    for rate in recorded:
        # The authors' optimizer averages the gradient, v = b v + (1 - b) g: torch's with dampening b.
        ours, state, _ = adamo_authors(given(6.106), state, {"momentum": 0.9, "dampening": 0.9})
        assert ours == pytest.approx(rate, rel=1e-4)


def test_the_recorded_rates_of_adam_on_mnist():
    """The authors' notebook prints S, the constant and the rate of every epoch; these are the first five."""
    recorded = [
        (377.14963, 0.5617056906, 0.0384388757),
        (635.5947, 0.5201457202, 0.0344882860),
        (289.10205, 0.4991703093, 0.0281887175),
        (377.49567, 0.5740796864, 0.0245523083),
        (303.20068, 0.5211514413, 0.0225800546),
    ]
    scale = 9 / (10 * 256)
    state = AdamState()
    for squares, constant, rate in recorded:
        estimate = bounds.second_moment(
            constant, estimate="scripts", activation_norm=constant / scale, fourth_moment_norm=squares
        )
        inputs = RuleInput(constant, estimate, constant / scale)
        # Keras' epsilon is 1e-7.
        ours, state, _ = adam_authors(inputs, state, {"betas": (0.9, 0.999), "eps": 1e-7})
        assert ours == pytest.approx(rate, rel=1e-6)


def test_the_authors_first_rate_of_momentum_is_ten_times_too_large():
    settings = {"momentum": 0.9, "dampening": 0.9}
    corrected = adamo(given(0.31), AverageState(), settings).rate
    theirs = adamo_authors(given(0.31), AverageState(), settings).rate
    assert corrected == pytest.approx(1 / 0.31)
    assert theirs == pytest.approx(10 * corrected)  # "around 32"


def test_a_fixed_first_rate_starts_the_authors_average_alone():
    assert RULES["adamo_authors"].initial_state(0.5) == AverageState(0.5)
    assert RULES["adamo_authors"].initial_state(None) == AverageState()
    assert RULES["adamo"].initial_state(0.5) == AverageState()


def test_torchs_own_momentum_starts_with_longer_steps():
    """By the first gradient, undamped: nine of them in all at 0.9, as the documentation says."""
    ends = []
    for kind in (ZeroStartSGD, torch.optim.SGD):
        parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = kind([parameter], lr=1.0, momentum=0.9, dampening=0.9)
        for step in range(200):
            parameter.grad = torch.full((1,), 1.0 if step == 0 else 0.0, dtype=torch.float64)
            optimizer.step()
        ends.append(-parameter.item())
    assert ends == pytest.approx([1.0, 10.0])
