"""SGD: 1/L, and with momentum a rate by the gradient noise."""

import math

import pytest
import torch

from lit_lipschitz import bounds
from lit_lipschitz.rules.base import RuleInput, Stateless
from lit_lipschitz.rules.sgd import inverse, noise


def test_gradient_descent_is_the_inverse():
    assert inverse(RuleInput(4.0, 16.0), Stateless(), {}) == (0.25, Stateless(), ())


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
    strict = bounds.cross_entropy(size, num_classes=2, batch_size=1)
    constant = 0.1 / noise(RuleInput(strict, 1.0, batch_size=batch_size), Stateless(), {"momentum": 0.9}).rate
    distance = math.sqrt(sum(apart) / len(apart))
    assert 0.6 * constant < distance < 1.03 * constant


def test_momentum_makes_the_steps_of_the_rule_of_noise_as_long_as_without():
    """In the long run torch's velocity is 1 / (1 - b) gradients long, with dampening (1 - d) / (1 - b)."""
    for momentum, dampening in ((0.5, 0.0), (0.9, 0.0), (0.9, 0.5)):
        parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=momentum, dampening=dampening)
        for _ in range(400):
            (group,), inputs = optimizer.param_groups, RuleInput(4.0, 16.0, batch_size=2.0 * 1.5**2)
            group["lr"] = noise(inputs, Stateless(), group).rate
            before = parameter.item()
            parameter.grad = torch.ones(1, dtype=torch.float64)
            optimizer.step()
        assert before - parameter.item() == pytest.approx(min(1.5, 1 / (1 - momentum) ** 1.5) / 4, rel=1e-9)


def test_the_rule_of_noise_grows_with_the_root_of_the_batch_up_to_its_limit():
    def rate(m, momentum=0.9):
        settings = {"momentum": momentum}
        return noise(RuleInput(2.0, 4.0, batch_size=m), Stateless(), settings).rate

    assert rate(800) == pytest.approx(2 * rate(200), rel=1e-12)
    assert rate(128) == pytest.approx(0.4, rel=1e-12)
    assert rate(1_000_000) == rate(2001) == pytest.approx(10**0.5 / 2, rel=1e-12)
    assert rate(32, 0.0) == 0.5  # the plain inverse
    with pytest.raises(ValueError, match="batch_size=0: expected a positive"):
        rate(0)
