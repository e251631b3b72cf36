import pytest
import torch

from lit_lipschitz import rules


def test_gradient_descent_is_the_inverse():
    rate, state = rules.inverse(4.0, rules.RuleState(), {})
    assert (rate, state.updates) == (0.25, 1)


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
    optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=momentum, dampening=dampening)
    if momentum:
        # torch starts the velocity at g, not at (1 - dampening) g.
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros(10, dtype=torch.float64)
    state = rules.RuleState()
    for constant, gradient in zip(constants, gradients, strict=True):
        rate, state = rules.adamo(constant, state, optimizer.param_groups[0])
        optimizer.param_groups[0]["lr"] = rate
        parameter.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(parameter.data, weights, rtol=1e-12, atol=0)


def test_adamo_corrects_for_the_start_whatever_the_momentum_was():
    # Schedulers may cycle the momentum; with a constant L the average is L all the same.
    state = rules.RuleState()
    for momentum in (0.85, 0.95, 0.95, 0.85):
        rate, state = rules.adamo(2.0, state, {"momentum": momentum})
        assert rate == pytest.approx((1 - momentum) / 2.0, rel=1e-12)


def test_a_rule_does_not_change_the_state_it_is_given():
    state = rules.RuleState()
    rules.adamo(1.0, state, {"momentum": 0.9})
    assert state == rules.RuleState()


@pytest.mark.parametrize(
    ("settings", "named"), [({"momentum": 1.0}, "momentum=1.0"), ({"momentum": 0.9, "dampening": 1.0}, "dampening=1.0")]
)
def test_settings_without_a_rate_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        rules.adamo(1.0, rules.RuleState(), settings)


@pytest.mark.parametrize("constant", [0.0, -1.0, float("nan"), float("inf")])
def test_a_constant_without_an_inverse_is_refused(constant):
    with pytest.raises(ValueError, match="constant="):
        rules.inverse(constant, rules.RuleState(), {})


def test_the_rule_follows_the_optimizer_and_the_family():
    assert rules.rule_for("SGD", {"momentum": 0.9}, "paper") == "adamo"
    assert rules.rule_for("SGD", {"momentum": 0.0}, "paper") == "inverse"
    assert rules.rule_for("SGD", {"momentum": 0.9}, "strict") == "inverse"


def test_an_unknown_optimizer_is_refused_with_what_is_known():
    with pytest.raises(ValueError, match=r"LBFGS; known: SGD; rule='inverse', rule='adamo' would force one"):
        rules.rule_for("LBFGS", {}, "strict")
