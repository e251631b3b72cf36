import math

import pytest
import torch
from torch.nn import functional as F

from lit_lipschitz import constants


def gradient_norm(inputs, weight, targets):
    """Norm of the gradient of the mean cross-entropy in the head's weights, by autograd."""
    weight = weight.clone().requires_grad_()
    loss = F.cross_entropy(inputs @ weight.T, targets)
    return torch.autograd.grad(loss, weight)[0].norm().item()


def hessian(inputs, weight, targets):
    size = weight.numel()
    matrix = torch.autograd.functional.hessian(lambda w: F.cross_entropy(inputs @ w.T, targets), weight)
    return matrix.reshape(size, size)


def draws(count=60):
    """Heads from mild to saturated, with targets that are random and targets that are the worst for the weights."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        rows, width, classes = (int(torch.randint(low, 9, (), generator=generator)) for low in (1, 1, 2))
        inputs = torch.randn(rows, width, generator=generator, dtype=torch.float64) * 3 ** (i % 4)
        weight = torch.randn(classes, width, generator=generator, dtype=torch.float64) * 5 ** (i % 3)
        targets = torch.randint(classes, (rows,), generator=generator)
        yield inputs, weight, targets if i % 2 else (inputs @ weight.T).argmin(dim=1)


@pytest.mark.parametrize("norm", ["frobenius", "sample"])
def test_the_gradient_is_never_above_the_strict_constant(norm):
    for inputs, weight, targets in draws():
        size = inputs.norm() if norm == "frobenius" else inputs.norm(dim=1).max()
        bound = constants.cross_entropy(
            size.item(), num_classes=len(weight), batch_size=len(inputs), bound="strict", norm=norm
        )
        assert gradient_norm(inputs, weight, targets) <= bound * (1 + 1e-12)


@pytest.mark.parametrize("norm", ["frobenius", "sample"])
def test_the_strict_constant_is_attained(norm):
    # All examples alike, and a head that is sure of the wrong class.
    inputs = torch.ones(4, 3, dtype=torch.float64)
    weight = torch.tensor([[50.0] * 3, [-50.0] * 3], dtype=torch.float64)
    size = inputs.norm() if norm == "frobenius" else inputs[0].norm()
    bound = constants.cross_entropy(size.item(), num_classes=2, batch_size=4, bound="strict", norm=norm)
    assert gradient_norm(inputs, weight, torch.ones(4, dtype=torch.long)) == pytest.approx(bound, rel=1e-6)


def test_the_paper_constant_is_the_gradient_in_one_logit_at_uniform_outputs():
    # One example in a batch of 5 is not 0, all logits are 0: |dE/dz_y| = (k-1)/k.
    inputs = torch.zeros(5, 4, dtype=torch.float64)
    inputs[0] = torch.tensor([1.0, 2, 3, 4])
    weight = torch.zeros(7, 4, dtype=torch.float64, requires_grad=True)
    F.cross_entropy(inputs @ weight.T, torch.zeros(5, dtype=torch.long)).backward()
    largest_row = weight.grad.norm(dim=1).max().item()
    constant = constants.cross_entropy(inputs.norm().item(), num_classes=7, batch_size=5, bound="paper")
    assert constant == pytest.approx(largest_row, rel=1e-12)


def test_the_paper_constant_is_no_bound():
    inputs = torch.ones(128, 3, dtype=torch.float64)
    weight = torch.zeros(10, 3, dtype=torch.float64)
    weight[0] = 50
    gradient = gradient_norm(inputs, weight, torch.ones(128, dtype=torch.long))
    constant = constants.cross_entropy(inputs.norm().item(), num_classes=10, batch_size=128, bound="paper")
    assert gradient / constant == pytest.approx(math.sqrt(2 * 128) * 10 / 9, rel=1e-6)  # 17.8


@pytest.mark.parametrize("norm", ["spectral", "frobenius", "sample"])
def test_no_eigenvalue_of_the_hessian_is_above_the_smooth_constant(norm):
    closest = 0.0
    for inputs, weight, targets in draws(30):
        weight = weight * 0.1
        size = {
            "spectral": torch.linalg.matrix_norm(inputs, 2),
            "frobenius": inputs.norm(),
            "sample": inputs.norm(dim=1).max(),
        }[norm]
        bound = constants.cross_entropy(
            size.item(), num_classes=len(weight), batch_size=len(inputs), bound="smooth", norm=norm
        )
        largest = torch.linalg.eigvalsh(hessian(inputs, weight, targets)).max().item()
        assert largest <= bound * (1 + 1e-9)
        closest = max(closest, largest / bound)
    assert closest > 0.3


def test_the_smooth_constant_is_attained_by_two_classes():
    inputs = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    bound = constants.cross_entropy(5.0, num_classes=2, batch_size=1, bound="smooth")
    matrix = hessian(inputs, torch.zeros(2, 2, dtype=torch.float64), torch.zeros(1, dtype=torch.long))
    assert torch.linalg.eigvalsh(matrix).max().item() == pytest.approx(bound, rel=1e-12)


@pytest.mark.parametrize("bound", ["paper", "strict"])
def test_an_l2_term_adds_its_own_gradient(bound):
    plain = constants.cross_entropy(2.0, num_classes=3, batch_size=4, bound=bound)
    with_l2 = constants.cross_entropy(2.0, num_classes=3, batch_size=4, bound=bound, weight_decay=0.1, weight_norm=7)
    weight = torch.tensor([7.0], requires_grad=True)
    (0.5 * 0.1 * weight.square().sum()).backward()
    assert with_l2 - plain == pytest.approx(weight.grad.item())


def test_an_l2_term_adds_its_own_curvature():
    plain = constants.cross_entropy(2.0, num_classes=3, batch_size=4, bound="smooth")
    with_l2 = constants.cross_entropy(2.0, num_classes=3, batch_size=4, bound="smooth", weight_decay=0.1, weight_norm=7)
    assert with_l2 - plain == pytest.approx(0.1)


def test_the_recorded_first_rate_of_the_paper_comes_out():
    # ResNet-20 on CIFAR-10 as the authors recorded it: K_z 206.7, W 43.3, rate 0.668; their lambda is the run's 1e-3.
    constant = constants.cross_entropy(206.7, num_classes=10, batch_size=128, bound="paper")
    assert 1 / constant == pytest.approx(0.688, abs=1e-3)
    with_l2 = constants.cross_entropy(
        206.7, num_classes=10, batch_size=128, bound="paper", weight_decay=1e-3, weight_norm=43.3
    )
    assert 1 / with_l2 == pytest.approx(0.668, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_classes": 1}, "num_classes=1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"weight_norm": math.nan}, "weight_norm=nan"),
        ({"activation_norm": math.inf}, "activation_norm=inf"),
        ({"bound": "loose"}, "bound='loose'"),
        ({"bound": "strict", "norm": "unit"}, "norm='unit'"),
        ({"bound": "paper", "norm": "spectral"}, "norm='spectral'"),
    ],
)
def test_a_value_out_of_its_range_is_named(change, named):
    arguments = {"activation_norm": 1.0, "num_classes": 3, "batch_size": 4, **change}
    with pytest.raises(ValueError, match=named):
        constants.cross_entropy(**arguments)
