import math

import pytest
import torch
from helpers import ROOT

from lit_lipschitz import ZeroStartSGD
from lit_lipschitz.bounds import families as constants
from lit_lipschitz.rules import registry as rules


def seen(constant, squared=None, activation_norm=1.0):
    return rules.Observation(constant, constant**2 if squared is None else squared, activation_norm)


def test_gradient_descent_is_the_inverse():
    rate, state = rules.inverse(seen(4.0), rules.RuleState(), {})
    assert (rate, state.updates) == (0.25, 1)


@pytest.mark.parametrize("batch_size", [1, 8, 128])
def test_the_gradients_of_two_batches_are_apart_by_what_the_rule_of_noise_takes_for_their_constant(batch_size):
    """Autograd's gradients of a head, on labels that are drawn at random; sharp outputs come near the bound."""
    torch.manual_seed(0)
    head = torch.nn.Linear(20, 2, dtype=torch.float64)
    examples = torch.randn(5000, 20, dtype=torch.float64)
    with torch.no_grad():
        head.weight[0] += 300.0  # every example is one class or the other with certainty, and half of them are wrong

    def gradient():
        a = examples[torch.randint(len(examples), (batch_size,))]
        loss = torch.nn.functional.cross_entropy(head(a), torch.randint(2, (batch_size,)))
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, tuple(head.parameters()))])

    apart = [float((gradient() - gradient()).square().sum()) for _ in range(2000)]
    size = math.sqrt(float(examples.square().sum(dim=1).mean() + 1))
    strict = constants.cross_entropy(size, num_classes=2, batch_size=1)
    rate, _ = rules.noise(rules.Observation(strict, 1.0, batch_size=batch_size), rules.RuleState(), {"momentum": 0.9})
    constant = 0.1 / rate
    distance = math.sqrt(sum(apart) / len(apart))
    assert 0.6 * constant < distance < 1.03 * constant


def test_momentum_makes_the_steps_of_the_rule_of_noise_as_long_as_without():
    """In the long run torch's velocity is 1 / (1 - b) gradients long, with dampening (1 - d) / (1 - b)."""
    for momentum, dampening in ((0.5, 0.0), (0.9, 0.0), (0.9, 0.5)):
        parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=momentum, dampening=dampening)
        for _ in range(400):
            observation = rules.Observation(4.0, 16.0, batch_size=2.0 * 1.5**2)
            optimizer.param_groups[0]["lr"], _ = rules.noise(observation, rules.RuleState(), optimizer.param_groups[0])
            before = parameter.item()
            parameter.grad = torch.ones(1, dtype=torch.float64)
            optimizer.step()
        assert before - parameter.item() == pytest.approx(min(1.5, 1 / (1 - momentum) ** 1.5) / 4, rel=1e-9)


def test_the_rule_of_noise_grows_with_the_root_of_the_batch_up_to_its_limit():
    def rate(m, momentum=0.9):
        settings = {"momentum": momentum}
        return rules.noise(rules.Observation(2.0, 4.0, batch_size=m), rules.RuleState(), settings)[0]

    assert rate(800) == pytest.approx(2 * rate(200), rel=1e-12)
    assert rate(128) == pytest.approx(0.4, rel=1e-12)
    assert rate(1_000_000) == rate(2001) == pytest.approx(10**0.5 / 2, rel=1e-12)
    assert rate(32, 0.0) == 0.5  # the plain inverse
    with pytest.raises(ValueError, match="batch_size=0: expected a positive"):
        rate(0)


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
    state = rules.RuleState()
    for constant, gradient in zip(constants, gradients, strict=True):
        rate, state = rules.adamo(seen(constant), state, optimizer.param_groups[0])
        optimizer.param_groups[0]["lr"] = rate
        parameter.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(parameter.data, weights, rtol=1e-12, atol=0)


def test_adamo_corrects_for_the_start_whatever_the_momentum_was():
    # Schedulers may cycle the momentum; with a constant L the average is L all the same.
    state = rules.RuleState()
    for momentum in (0.85, 0.95, 0.95, 0.85):
        rate, state = rules.adamo(seen(2.0), state, {"momentum": momentum})
        assert rate == pytest.approx((1 - momentum) / 2.0, rel=1e-12)


def test_a_rule_does_not_change_the_state_it_is_given():
    state = rules.RuleState()
    rules.adamo(seen(1.0), state, {"momentum": 0.9})
    assert state == rules.RuleState()


CONSTANTS = [5.0, 3.0, 8.0, 2.0, 2.5]


def gradients():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(CONSTANTS), 10, generator=generator, dtype=torch.float64)


def walk(make, rule, state=None):
    """torch's optimizer with a rule's rates: where it ends."""
    parameter = torch.nn.Parameter(torch.zeros(10, dtype=torch.float64))
    optimizer = make([parameter])
    state = state or rules.RuleState()
    for constant, gradient in zip(CONSTANTS, gradients(), strict=True):
        rate, state = rule(seen(constant), state, optimizer.param_groups[0])
        optimizer.param_groups[0]["lr"] = rate
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.data


def test_nesterov_has_the_steady_step_of_momentum():
    """With gradient and constant standing still, g + b v tends to v, and both steps to g / L."""
    for nesterov in (False, True):
        parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=0.5, nesterov=nesterov)
        state = rules.RuleState()
        for _ in range(60):
            optimizer.param_groups[0]["lr"], state = rules.adamo(seen(4.0), state, optimizer.param_groups[0])
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

    rule = rules.rmsprop
    if not corrected:  # the authors divide by K_z, which is L here

        def rule(observation, state, settings):
            same = rules.Observation(99.0, observation.squared, observation.constant)
            return rules.rmsprop_authors(same, state, settings)

    reached = walk(lambda p: torch.optim.RMSprop(p, lr=1.0, alpha=alpha, eps=eps), rule)
    torch.testing.assert_close(reached, weights, rtol=1e-9, atol=0)


def test_rmsprop_with_momentum_has_the_steady_step_of_rmsprop():
    settings = {"alpha": 0.9, "eps": 1e-8}
    plain, _ = rules.rmsprop(seen(2.0), rules.RuleState(), settings)
    heavy, _ = rules.rmsprop(seen(2.0), rules.RuleState(), {**settings, "momentum": 0.9})
    assert heavy == pytest.approx(0.1 * plain)


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
    rule = rules.adam if corrected else rules.adam_authors
    make = {"lr": 1.0, "betas": (b1, b2), "eps": eps, "amsgrad": amsgrad}
    for optimizer in (torch.optim.Adam, torch.optim.AdamW):
        rest = {"weight_decay": 0.0} if optimizer is torch.optim.AdamW else {}
        reached = walk(lambda p, kind=optimizer, rest=rest: kind(p, **make, **rest), rule)
        torch.testing.assert_close(reached, weights, rtol=1e-9, atol=0)


def test_nadam_has_the_steady_step_of_adam():
    for kind in (torch.optim.Adam, torch.optim.NAdam):
        parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = kind([parameter], lr=1.0, betas=(0.5, 0.6))
        state = rules.RuleState()
        for _ in range(60):
            optimizer.param_groups[0]["lr"], state = rules.adam(seen(4.0), state, optimizer.param_groups[0])
            before = parameter.item()
            parameter.grad = torch.full((1,), 7.0, dtype=torch.float64)
            optimizer.step()
        assert before - parameter.item() == pytest.approx(1.0, rel=1e-3)


def test_adamax_divides_gradient_and_constant_alike():
    b1, b2, eps = 0.7, 0.8, 1e-8
    weights, m, u = (torch.zeros(10, dtype=torch.float64) for _ in range(3))
    k1 = most = 0.0
    for t, (constant, gradient) in enumerate(zip(CONSTANTS, gradients(), strict=True), start=1):
        m, u = b1 * m + (1 - b1) * gradient, torch.maximum(b2 * u, gradient.abs() + eps)
        k1, most = b1 * k1 + (1 - b1) * constant, max(b2 * most, constant)
        weights = weights - (m / (1 - b1**t) / u) / (k1 / (1 - b1**t) / (most + eps))
    reached = walk(lambda p: torch.optim.Adamax(p, lr=1.0, betas=(b1, b2), eps=eps), rules.adamax)
    torch.testing.assert_close(reached, weights, rtol=1e-9, atol=0)


@pytest.mark.parametrize("rule", ["rmsprop", "adam", "adamax"])
def test_a_constant_that_stands_still_gives_a_rate_of_one(rule):
    state, settings = rules.RuleState(), {"alpha": 0.99, "betas": (0.9, 0.999), "eps": 1e-8}
    for _ in range(5):
        rate, state = rules.RULES[rule](seen(3.0), state, settings)
        assert rate == pytest.approx(1.0, rel=1e-6)


def test_the_recorded_rates_of_momentum_on_mnist():
    """The authors' notebook: first rate and first average 0.1; its 19 rates belong to one constant, 6.106."""
    recorded = [1.42734, 0.80571, 0.57883, 0.46179, 0.39070, 0.34315, 0.30928, 0.28404, 0.26461, 0.24926]
    recorded += [0.23690, 0.22677, 0.21837, 0.21133, 0.20536, 0.20028, 0.19591, 0.19214, 0.18887]
    state = rules.initial_state("adamo_authors", 0.1)
    for rate in recorded:
        # The authors' optimizer averages the gradient, v = b v + (1 - b) g: torch's with dampening b.
        ours, state = rules.adamo_authors(seen(6.106), state, {"momentum": 0.9, "dampening": 0.9})
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
    state = rules.RuleState()
    for squares, constant, rate in recorded:
        estimate = constants.squared(constant, estimate="scripts", activation_norm=constant / scale, squares=squares)
        observation = rules.Observation(constant, estimate, constant / scale)
        # Keras' epsilon is 1e-7.
        ours, state = rules.adam_authors(observation, state, {"betas": (0.9, 0.999), "eps": 1e-7})
        assert ours == pytest.approx(rate, rel=1e-6)


def test_the_authors_first_rate_of_momentum_is_ten_times_too_large():
    settings = {"momentum": 0.9, "dampening": 0.9}
    corrected, _ = rules.adamo(seen(0.31), rules.RuleState(), settings)
    theirs, _ = rules.adamo_authors(seen(0.31), rules.RuleState(), settings)
    assert corrected == pytest.approx(1 / 0.31)
    assert theirs == pytest.approx(10 * corrected)  # "around 32"


def test_a_rate_set_by_hand_starts_the_authors_average_alone():
    assert rules.initial_state("adamo_authors", 0.5).average == 0.5
    assert rules.initial_state("adamo_authors", None) == rules.RuleState()
    assert rules.initial_state("adamo", 0.5) == rules.RuleState()


@pytest.mark.parametrize(
    ("estimate", "expected"), [("constant", 0.36), ("text", 0.25 + 0.01), ("scripts", 0.25 / 100 * 7 + 2 * 0.1 * 0.5)]
)
def test_the_estimates_of_the_squared_constant(estimate, expected):
    value = constants.squared(0.5, 0.1, estimate=estimate, activation_norm=10.0, squares=7.0)
    assert value == pytest.approx(expected)


def test_an_unknown_estimate_is_refused():
    with pytest.raises(ValueError, match="estimate='mean': expected one of constant, text, scripts"):
        constants.squared(1.0, estimate="mean")


@pytest.mark.parametrize(
    ("rule", "settings", "named"),
    [
        ("adamo", {"momentum": 1.0}, "momentum=1.0: expected 0 <= momentum < 1"),
        ("adamo", {"momentum": 0.9, "dampening": 1.0}, "dampening=1.0"),
        ("adamo_authors", {"momentum": -0.1}, "momentum=-0.1"),
        ("rmsprop", {"alpha": 1.0, "eps": 0.0}, "alpha=1.0: expected 0 <= alpha < 1"),
        ("adam", {"betas": (0.9, 1.0), "eps": 0.0}, "betas=1.0"),
    ],
)
def test_settings_without_a_rate_are_refused(rule, settings, named):
    with pytest.raises(ValueError, match=named):
        rules.RULES[rule](seen(1.0), rules.RuleState(), settings)


@pytest.mark.parametrize("constant", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("rule", rules.RULES)
def test_a_constant_without_an_inverse_is_refused(rule, constant):
    settings = {"momentum": 0.9, "alpha": 0.9, "betas": (0.9, 0.99), "eps": 0.0}
    with pytest.raises(ValueError, match="constant="):
        rules.RULES[rule](rules.Observation(constant, 1.0), rules.RuleState(), settings)


@pytest.mark.parametrize(
    ("optimizer", "settings", "bound", "rule"),
    [
        ("SGD", {"momentum": 0.9}, "paper", "adamo"),
        ("SGD", {"momentum": 0.0}, "paper", "inverse"),
        ("SGD", {"momentum": 0.9}, "strict", "noise"),
        ("SGD", {"momentum": 0.9}, "smooth", "inverse"),
        ("SGD", {"momentum": 0.0}, "strict", "inverse"),
        ("RMSprop", {}, "paper", "rmsprop"),
        ("Adam", {}, "paper", "adam"),
        ("AdamW", {}, "paper", "adam"),
        ("NAdam", {}, "paper", "adam"),
        ("ZeroStartSGD", {"momentum": 0.9}, "paper", "adamo"),
        ("Adamax", {}, "paper", "adamax"),
    ],
)
def test_the_rule_follows_the_optimizer_and_the_family(optimizer, settings, bound, rule):
    assert rules.rule_for(optimizer, settings, bound) == rule


@pytest.mark.parametrize(
    ("optimizer", "settings", "bound", "message"),
    [
        ("RAdam", {}, "paper", "RAdam with bound=.paper.; known: SGD"),  # its first steps are not normalised
        ("LBFGS", {}, "strict", "LBFGS; known: SGD, .* rule= with one of 'inverse', 'noise', 'adamo'"),
        ("Adagrad", {}, "strict", "Adagrad; known: SGD, ZeroStartSGD, Adam, AdamW"),
        ("RMSprop", {"centered": True}, "paper", "RMSprop with centered=True"),
    ],
)
def test_an_optimizer_without_a_rule_is_refused_with_what_is_known(optimizer, settings, bound, message):
    with pytest.raises(ValueError, match=message):
        rules.rule_for(optimizer, settings, bound)


def test_every_optimizer_of_torch_has_a_documented_rule_or_is_refused_by_name():
    table = (ROOT / "docs" / "reference" / "theory.md").read_text()
    found = {kind for kind in vars(torch.optim).values() if isinstance(kind, type)} - {torch.optim.Optimizer}
    assert len(found) >= 14
    for kind in found:
        options = {"lr": 0.1} if kind is torch.optim.SGD else {}
        settings = kind([torch.nn.Parameter(torch.zeros(2, 2))], **options).param_groups[0]
        for bound in ("paper", "strict", "smooth"):
            known = rules.RULE_OF_OPTIMIZER if bound == "paper" else rules.RULE_OF_A_BOUND
            rule = known.get(kind.__name__)
            if rule is None:
                with pytest.raises(ValueError, match=f"the optimizer {kind.__name__}( with|;)"):
                    rules.rule_for(kind.__name__, settings, bound)
                refused = table.split("Refused by name")[1]
                assert f"`{kind.__name__}`" in refused
            else:
                rule = "observed" if (rule, bound) == ("grafted", "strict") else rule
                assert rules.rule_for(kind.__name__, settings, bound) == rule
                assert any(kind.__name__ in row and f"`{rule}`" in row for row in table.splitlines())


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
