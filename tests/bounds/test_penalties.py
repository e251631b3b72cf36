"""Penalties on the weights against autograd, and the second moment of the papers' rules."""

import math

import pytest
import torch
from torch import Tensor

from lit_lipschitz import bounds


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("bound", ["paper", "strict"])
def test_penalties_add_their_own_gradient(bound):
    weight = tensor([3.0, 4.0]).requires_grad_()
    (0.5 * 0.1 * weight.square().sum()).backward()
    assert bounds.l2(0.1, 5.0, bound=bound) == pytest.approx(weight.grad.norm().item())
    weight.grad = None
    gamma = tensor([[1.0, 2.0], [2.0, 1.0]])
    (gamma @ weight).square().sum().backward()
    largest = torch.linalg.matrix_norm(gamma @ gamma, 2).item()
    assert weight.grad.norm().item() <= bounds.tikhonov(largest, 5.0, bound=bound)
    along = tensor([1.0, 1.0]).requires_grad_()  # the eigenvector of the eigenvalue 3
    (gamma @ along).square().sum().backward()
    bound_along = bounds.tikhonov(largest, along.detach().norm().item(), bound=bound)
    assert bound_along == pytest.approx(along.grad.norm().item())


def test_penalties_add_their_own_curvature():
    gamma = tensor([[1.0, 2.0], [2.0, 1.0]])
    matrix = torch.autograd.functional.hessian(
        lambda w: 0.05 * w.square().sum() + (gamma @ w).square().sum(), tensor([1.0, 2.0])
    )
    added = bounds.l2(0.1, 99.0, bound="smooth") + bounds.tikhonov(9.0, 99.0, bound="smooth")
    assert torch.linalg.eigvalsh(matrix).max().item() == pytest.approx(added)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: bounds.l2(-0.1, 1.0), "weight_decay=-0.1: expected a finite number of at least 0"),
        (lambda: bounds.l2(0.1, math.nan), "weight_norm=nan"),
        (lambda: bounds.tikhonov(-1.0, 1.0), "gamma_norm=-1.0"),
        (lambda: bounds.tikhonov(1.0, 1.0, bound="loose"), "bound='loose'"),
    ],
)
def test_penalties_out_of_their_range_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


@pytest.mark.parametrize(("estimate", "expected"), [("constant", 0.36), ("scripts", 0.25 / 100 * 7 + 2 * 0.1 * 0.5)])
def test_the_second_moment(estimate, expected):
    value = bounds.second_moment(0.5, 0.1, estimate=estimate, activation_norm=10.0, fourth_moment_norm=7.0)
    assert value == pytest.approx(expected)


def test_an_unknown_estimate_is_refused():
    with pytest.raises(ValueError, match="estimate='mean': expected one of constant, scripts"):
        bounds.second_moment(1.0, estimate="mean")
