"""The gradient noise scale: unbiased estimates and an interval that covers, against simulated gradients."""

import math

import pytest
import torch

from lit_lipschitz.measurement.gradient_noise import gram_matrix, noise_scale

WIDTH, GRAD_SQUARE, TRACE = 200, 2.0, 60.0


def gradients(sizes, repeats=1):
    """Gradients of batches of examples with a known mean and covariance; shape (repeats, batches, WIDTH)."""
    mean = torch.ones(WIDTH, dtype=torch.float64) * math.sqrt(GRAD_SQUARE / WIDTH)
    variances = torch.linspace(0.1, 2.0, WIDTH, dtype=torch.float64)
    deviation = (variances * TRACE / variances.sum()).sqrt()
    noise = torch.randn(repeats, len(sizes), WIDTH, dtype=torch.float64) * deviation
    return mean + noise / torch.tensor(sizes, dtype=torch.float64).sqrt()[:, None]


def test_the_formula_is_that_of_the_appendix():
    """The two estimates of the paper's appendix A.1, with B_small a batch and B_big all of them."""
    (found,) = gradients([16] * 6)
    small, big = 16, 96
    of_small, of_big = found.square().sum(dim=1).mean().item(), found.mean(dim=0).square().sum().item()
    grad_square = (big * of_big - small * of_small) / (big - small)
    trace = (of_small - of_big) / (1 / small - 1 / big)
    noise = noise_scale(found @ found.T, [16] * 6)
    assert noise.grad_square == pytest.approx(grad_square)
    assert noise.covariance_trace == pytest.approx(trace)
    assert noise.value == pytest.approx(trace / grad_square)


@pytest.mark.parametrize("sizes", [[16] * 8, [16] * 5 + [3], [4, 64, 9]])
def test_the_estimates_are_unbiased_and_the_interval_covers(sizes):
    found = [noise_scale(one @ one.T, sizes) for one in gradients(sizes, 1000)]
    for name, truth in (("grad_square", GRAD_SQUARE), ("covariance_trace", TRACE)):
        values = torch.tensor([getattr(one, name) for one in found])
        error = values.std() / math.sqrt(len(values))
        assert abs(values.mean() - truth) < 4 * error
        assert error < 0.05 * truth
    covered = sum(one.low <= TRACE / GRAD_SQUARE <= one.high for one in found) / len(found)
    assert covered > 0.9


def test_batches_that_cannot_tell_the_gradient_from_0_give_a_lower_limit():
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(8, WIDTH, generator=generator, dtype=torch.float64)
    noise -= noise.mean(dim=0)
    found = noise_scale(noise @ noise.T, [16] * 8)
    assert found.value is None
    assert found.grad_square < 0
    assert found.low > 16
    assert found.high == math.inf


def test_equal_batches_have_no_noise():
    found = noise_scale(torch.full((3, 3), 2.0, dtype=torch.float64), [4, 4, 4])
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)


def test_two_batches_have_an_estimate_without_an_interval():
    (found,) = gradients([1024, 1024])
    noise = noise_scale(found @ found.T, [1024, 1024])
    assert noise.value == pytest.approx(TRACE / GRAD_SQUARE, rel=0.3)
    assert (noise.low, noise.high) == (0.0, math.inf)
    with pytest.raises(ValueError, match="at least 2 batches, found 1"):
        noise_scale(torch.ones(1, 1), [1024])


def test_the_inner_products_are_those_of_the_joined_parts():
    zeros, (first, second, third, fourth) = (torch.zeros(6), torch.zeros(4)), torch.randn(4, 6).split(1)
    parts = [[first.view(3, 2), None], [second.view(3, 2), third[0, :4]], [None, fourth[0, :4]]]
    joined = [[first[0], zeros[1]], [second[0], third[0, :4]], [zeros[0], fourth[0, :4]]]
    rows = torch.stack([torch.cat(one) for one in joined])
    assert torch.allclose(gram_matrix(parts), (rows @ rows.T).double())
