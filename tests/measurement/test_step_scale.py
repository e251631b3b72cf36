"""What is measured of a step: its loss, the descent over it, and what clipping and unusable gradients leave."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_lipschitz.measurement.step_scale import StepScaleEstimator

ROOT_19 = math.sqrt(1.9 / 0.1)  # the displacement of AdamW over its update


def estimator_of(optimizer):
    estimator = StepScaleEstimator(optimizer, nn.Identity())
    estimator.begin_step()
    return estimator


def measured(estimator, grad_scale=1.0):
    estimator.update(estimator.pack(grad_scale, [1.0], 0, 1).tolist())
    return estimator.scale


def adamw(gradient):
    parameter = nn.Parameter(torch.zeros_like(torch.tensor(gradient)))
    parameter.grad = torch.tensor(gradient)
    return torch.optim.AdamW([parameter], lr=1.0, weight_decay=0.0)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 8), st.floats(1e-2, 1e2))
def test_the_descent_of_least_squares_is_at_most_twice_the_largest_eigenvalue(seed, width, examples, size):
    """|g|^2 / f, of the mean squared error of a linear map, whose Hessian is 2 A'A / m, wherever its weights are."""
    generator = torch.Generator().manual_seed(seed)
    inputs = size * torch.randn(examples, width, generator=generator, dtype=torch.float64)
    targets = torch.randn(examples, generator=generator, dtype=torch.float64)
    weights = nn.Parameter(torch.randn(width, generator=generator, dtype=torch.float64))
    loss = (inputs @ weights - targets).square().mean()
    loss.backward()
    estimator = StepScaleEstimator(torch.optim.SGD([weights], lr=1.0), nn.Identity())
    estimator.add_loss(loss, 1.0)
    estimator.begin_step()
    largest = float(torch.linalg.eigvalsh(2 * inputs.T @ inputs / examples)[-1])
    assert 0 < measured(estimator).descent <= 2 * largest * (1 + 1e-5)


def test_the_losses_of_a_step_are_added_and_divided_by_their_factors():
    optimizer = adamw([[3.0, 0.0], [0.0, 4.0]])
    estimator = estimator_of(optimizer)
    for value, factor in ((6.0, 4.0), (2.0, 4.0)):  # a mean of 1 each, of 2 accumulated batches
        estimator.add_loss(torch.tensor(value), factor)
    # The gradient's norm is 5, the update's sqrt(2), both of its numbers are 1, and the loss is 2.
    scale = measured(estimator)
    assert scale.value == pytest.approx(5 / (math.sqrt(2) * ROOT_19), rel=1e-5)
    assert scale.descent == pytest.approx((3 + 4) / 2, rel=1e-5)
    assert measured(estimator).descent == 0  # the next one has no loss yet


@pytest.mark.parametrize("value", [0.0, -3.0, -1e-30])
def test_a_loss_that_is_not_positive_has_no_descent(value):
    estimator = estimator_of(adamw([[3.0, 0.0], [0.0, 4.0]]))
    estimator.add_loss(torch.tensor(value), 1.0)
    assert measured(estimator).descent == 0
    assert estimator.scale.value > 0


def test_the_losses_before_a_batch_that_is_discarded_are_forgotten():
    estimator = estimator_of(adamw([[3.0, 0.0], [0.0, 4.0]]))
    estimator.add_loss(torch.tensor(100.0), 1.0)
    estimator.discard()
    estimator.add_loss(torch.tensor(1.0), 1.0)
    assert measured(estimator).descent == pytest.approx(3 + 4, rel=1e-5)


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_a_gradient_that_tells_nothing_leaves_the_last_measurement(value):
    optimizer = adamw([[3.0, 0.0], [0.0, 4.0]])
    estimator = estimator_of(optimizer)
    estimator.add_loss(torch.tensor(1.0), 1.0)
    before = measured(estimator)
    optimizer.param_groups[0]["params"][0].grad.fill_(value)
    estimator.add_loss(torch.tensor(1.0), 1.0)
    assert measured(estimator) == before


@pytest.mark.parametrize("value", [0.0, 3.0, 1e-3, math.inf])
@pytest.mark.parametrize("momentum", [0.0, 0.75])
def test_the_scale_of_sgd_is_known_whatever_the_gradient_is_and_was_before_clipping(value, momentum):
    """So its clipped steps are shorter, as they are meant to be, and the descent is that of the gradient itself."""
    parameter = nn.Parameter(torch.zeros(2, 2))
    parameter.grad = torch.full((2, 2), 8.0)
    estimator = StepScaleEstimator(torch.optim.SGD([parameter], lr=1.0, momentum=momentum), nn.Identity())
    estimator.after_backward(1.0)
    parameter.grad.fill_(value)
    estimator.add_loss(torch.tensor(2.0), 1.0)
    estimator.begin_step()
    assert measured(estimator).value == pytest.approx(1 - momentum)
    usable = 0 < value < math.inf
    assert estimator.scale.descent == pytest.approx(4 * 8.0**2 / 2 if usable else 0.0, rel=1e-5)


def test_the_gradient_of_adam_is_that_before_clipping():
    """The length of its update does not depend on that of the gradient."""
    optimizer = adamw([[3.0, 0.0], [0.0, 4.0]])
    parameter = optimizer.param_groups[0]["params"][0]
    estimator = StepScaleEstimator(optimizer, nn.Identity())
    estimator.after_backward(1.0)
    parameter.grad /= 100
    estimator.add_loss(torch.tensor(1.0), 1.0)
    estimator.begin_step()
    scale = measured(estimator)
    assert scale.value == pytest.approx(5 / (math.sqrt(2) * ROOT_19), rel=1e-4)
    assert scale.descent == pytest.approx(3 + 4, rel=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.5, 0.9]),
    st.sampled_from([0.0, 0.4]),
    st.floats(1e-3, 1e3),
    st.integers(1, 4),
)
def test_the_descent_is_how_fast_the_loss_falls_along_the_velocity_of_sgd(seed, momentum, dampening, factor, steps):
    """Of a quadratic function in numpy, by the difference of its values along the velocity that is written out."""
    random = np.random.default_rng(seed)
    root = random.normal(size=(5, 5))
    matrix, start = factor * (root @ root.T + np.eye(5)), random.normal(size=5)

    def loss(weights):
        return float(weights @ matrix @ weights) / 2

    parameter = nn.Parameter(torch.tensor(start))
    optimizer = torch.optim.SGD([parameter], lr=0.01 / factor, momentum=momentum, dampening=dampening)
    estimator = estimator_of(optimizer)
    velocity = None
    for _ in range(steps):
        gradient = matrix @ start
        parameter.grad = torch.tensor(gradient)
        started = velocity is not None and momentum  # torch dampens neither the first gradient nor without momentum
        velocity = momentum * velocity + (1 - dampening) * gradient if started else gradient
        estimator.add_loss(torch.tensor(loss(start)), 1.0)
        step = 1e-4 / factor
        fall = (loss(start + step * velocity) - loss(start - step * velocity)) / (2 * step)
        assert measured(estimator).descent == pytest.approx(max(fall, 0.0) / loss(start), rel=1e-3)
        optimizer.step()
        start = parameter.detach().numpy().copy()


@pytest.mark.parametrize(
    "make",
    [
        lambda p, **settings: torch.optim.SGD(p, lr=0.01, **settings),
        lambda p, **settings: torch.optim.SGD(p, lr=0.01, momentum=0.9, **settings),
        lambda p, **settings: torch.optim.Adam(p, lr=0.01, **settings),
    ],
)
def test_to_maximize_the_negative_of_a_loss_has_the_descent_of_the_loss(make):
    found = []
    for sign in (1, -1):
        weights = nn.Parameter(torch.arange(1.0, 7.0).reshape(2, 3))
        optimizer = make([weights], maximize=sign < 0)
        estimator = estimator_of(optimizer)
        for _ in range(4):
            optimizer.zero_grad()
            loss = sign * weights.square().sum()
            loss.backward()
            estimator.add_loss(loss, 1.0)
            found.append(measured(estimator).descent)
            optimizer.step()
    assert found[4:] == pytest.approx(found[:4], rel=1e-6)
    assert min(found) > 0


def test_the_typical_gradient_norm_is_the_largest_of_this_interval_and_the_one_before():
    estimator = StepScaleEstimator(torch.optim.SGD([torch.zeros(1, requires_grad=True)]), nn.Linear(1, 1), True)
    found = []
    for norms in ([2.0, 6.0], [4.0], [10.0, 3.0], [1.0], []):
        for norm in norms:  # of two examples, of which one has a gradient of 0
            estimator.begin_step()
            estimator.update([1.0, 1.0, 0.0, 1.0, norm**2 / 2, norm / 2])
            found.append(estimator.scale.largest_mean)
        estimator.end_interval()
        found.append(estimator.scale.largest_mean)
    assert found == pytest.approx([2, 6, 6, 6, 4, 10, 10, 10, 10, 1, 1])
