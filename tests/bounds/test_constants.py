"""Every constant against autograd: gradients and Hessians of torch's own losses in the weights of a linear head."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor
from torch.nn import functional as F

from lit_lipschitz import bounds

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None, max_examples=100)
settings.load_profile("repeatable")


@dataclass
class Draw:
    """A head's inputs (a column of ones included), its weights, targets, and the settings of a loss."""

    inputs: Tensor
    weight: Tensor
    targets: Tensor
    settings: dict = field(default_factory=dict)

    @property
    def outputs(self) -> Tensor:
        return self.inputs @ self.weight.T


@dataclass
class Case:
    """One of torch's losses, and the constant that belongs to it."""

    torch: Callable[..., Tensor]  # outputs, targets and the settings to a scalar
    constant: Callable[..., float]
    targets: Callable[[int, int], st.SearchStrategy]  # for so many examples and outputs
    outputs: tuple[int, int] = (1, 3)
    options: Callable[[int], st.SearchStrategy] = lambda _: st.just({})
    attained: list[Draw] = field(default_factory=list)  # draws in which the strict constant is (nearly) reached


def tensor(values) -> Tensor:
    return torch.as_tensor(np.asarray(values), dtype=torch.float64)


def floats(*shape, most=100.0):
    return arrays(np.float64, shape, elements=st.floats(-most, most, width=32)).map(tensor)


def class_indices(rows, outputs):
    return arrays(np.int64, rows, elements=st.integers(0, outputs - 1)).map(torch.as_tensor)


def shares(rows, outputs):
    return arrays(np.float64, (rows, outputs), elements=st.floats(0, 1)).map(tensor)


def class_settings(classes):
    weights = st.none() | st.lists(st.floats(0.1, 10), min_size=classes, max_size=classes)
    return st.fixed_dictionaries({"label_smoothing": st.sampled_from([0.0, 0.1, 0.7, 1.0]), "class_weights": weights})


def cross_entropy(outputs, targets, label_smoothing=0.0, class_weights=None, reduction="mean"):
    weight = None if class_weights is None else tensor(class_weights)
    return F.cross_entropy(outputs, targets, weight, reduction=reduction, label_smoothing=label_smoothing)


def binary_cross_entropy(outputs, targets, pos_weight=1.0, label_smoothing=0.0, reduction="mean"):
    targets = targets * (1 - label_smoothing) + label_smoothing / 2
    return F.binary_cross_entropy_with_logits(outputs, targets, pos_weight=tensor(pos_weight), reduction=reduction)


def pinball(outputs, targets, level, reduction="mean"):
    residual = targets - outputs
    loss = torch.maximum(level * residual, (level - 1) * residual)
    return loss.mean() if reduction == "mean" else loss.sum()


def squared(outputs, targets, half=False, reduction="mean"):
    if not half:
        return F.mse_loss(outputs, targets, reduction=reduction)
    return (outputs - targets).square().sum() / 2 / (len(outputs) if reduction == "mean" else 1)


def ones(rows, width=3):
    return torch.ones(rows, width, dtype=torch.float64)


def one_sided(outputs):
    """Outputs that are large and of one sign, for inputs of ones."""
    return torch.full((outputs, 3), 50.0, dtype=torch.float64)


TWO_CLASSES = torch.stack([one_sided(1)[0], -one_sided(1)[0]])  # sure of class 0 for ones, of class 1 for minus ones
SKEWED = tensor([[4, 4, 4], *[[-1, -1, -1]] * 4])  # one long row, and four of the other sign
OUTPUTWISE = [Draw(ones(4), one_sided(n), torch.zeros(4, n, dtype=torch.float64)) for n in (1, 2)]

CASES = {
    "cross-entropy": Case(
        cross_entropy,
        lambda size, outputs, **rest: bounds.cross_entropy(size, num_classes=outputs, **rest),
        class_indices,
        outputs=(2, 4),
        options=class_settings,
        attained=[
            Draw(ones(4), TWO_CLASSES, torch.ones(4, dtype=torch.long)),
            Draw(ones(4), TWO_CLASSES, torch.ones(4, dtype=torch.long), {"label_smoothing": 0.3}),
            Draw(SKEWED, TWO_CLASSES, tensor([1, 0, 0, 0, 0]).long(), {"class_weights": [1.0, 4.0]}),
        ],
    ),
    "binary cross-entropy": Case(
        binary_cross_entropy,
        lambda size, outputs, **rest: bounds.binary_cross_entropy(size, num_outputs=outputs, **rest),
        shares,
        options=lambda _: st.fixed_dictionaries(
            {"pos_weight": st.floats(0.1, 10), "label_smoothing": st.sampled_from([0.0, 0.2, 1.0])}
        ),
        attained=[*OUTPUTWISE, Draw(ones(4), -one_sided(2), ones(4, 2), {"pos_weight": 3.0, "label_smoothing": 0.2})],
    ),
    "mean absolute error": Case(
        F.l1_loss,
        lambda size, outputs, **rest: bounds.mean_absolute_error(size, num_outputs=outputs, **rest),
        floats,
        attained=OUTPUTWISE,
    ),
    "quantile": Case(
        pinball,
        lambda size, outputs, **rest: bounds.quantile(size, num_outputs=outputs, **rest),
        floats,
        options=lambda _: st.fixed_dictionaries({"level": st.floats(0.01, 0.99)}),
        attained=[Draw(draw.inputs, draw.weight, draw.targets, {"level": 0.2}) for draw in OUTPUTWISE],
    ),
    "huber": Case(
        F.huber_loss,
        lambda size, outputs, **rest: bounds.huber(size, num_outputs=outputs, **rest),
        floats,
        options=lambda _: st.fixed_dictionaries({"delta": st.floats(0.1, 10)}),
        attained=OUTPUTWISE,
    ),
    "smooth l1": Case(
        F.smooth_l1_loss,
        lambda size, outputs, **rest: bounds.smooth_l1(size, num_outputs=outputs, **rest),
        floats,
        options=lambda _: st.fixed_dictionaries({"beta": st.floats(0.1, 10)}),
        attained=OUTPUTWISE,
    ),
    "mean squared error": Case(
        squared,
        lambda size, outputs, **rest: bounds.mean_squared_error(size, num_outputs=outputs, **rest),
        floats,
        options=lambda _: st.fixed_dictionaries({"half": st.booleans()}),
        attained=[*OUTPUTWISE, Draw(ones(4), one_sided(2), ones(4, 2) * -9, {"half": True})],
    ),
}


@st.composite
def draws(draw, loss: Case):
    """Mild and saturated heads; rows that differ and rows that are alike; targets as they come."""
    rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    outputs = draw(st.integers(*loss.outputs))
    inputs = draw(floats(1, width)).expand(rows, width) if draw(st.booleans()) else draw(floats(rows, width))
    if draw(st.booleans()):
        inputs = torch.cat([inputs, ones(rows, 1)], dim=1)
    weight = draw(floats(outputs, inputs.shape[1], most=draw(st.sampled_from([1.0, 100.0]))))
    return Draw(inputs, weight, draw(loss.targets(rows, outputs)), draw(loss.options(outputs)))


def size_of(matrix: Tensor, norm: str) -> float:
    return {
        "frobenius": matrix.norm(),
        "sample": matrix.norm(dim=1).max(),
        "spectral": torch.linalg.matrix_norm(matrix, 2),
    }[norm].item()


def constant_of(loss: Case, draw: Draw, bound: str, norm: str, reduction: str = "mean") -> float:
    rest = dict(draw.settings)
    if loss.torch is squared and bound != "smooth":
        rest["output_norm"] = size_of(draw.outputs, norm)
        rest["target_norm"] = size_of(draw.targets, norm)
    rows, outputs = draw.outputs.shape
    size = size_of(draw.inputs, norm)
    return loss.constant(size, outputs, batch_size=rows, bound=bound, norm=norm, reduction=reduction, **rest)


def gradient_norm(loss: Case, draw: Draw, reduction: str = "mean") -> float:
    weight = draw.weight.clone().requires_grad_()
    value = loss.torch(draw.inputs @ weight.T, draw.targets, **draw.settings, reduction=reduction)
    return torch.autograd.grad(value, weight)[0].norm().item()


def largest_curvature(loss: Case, draw: Draw, reduction: str = "mean") -> float:
    def value(weight):
        return loss.torch(draw.inputs @ weight.T, draw.targets, **draw.settings, reduction=reduction)

    size = draw.weight.numel()
    matrix = torch.autograd.functional.hessian(value, draw.weight).reshape(size, size)
    return torch.linalg.eigvalsh(matrix).max().item()


@pytest.mark.parametrize("norm", ["frobenius", "sample"])
@pytest.mark.parametrize("name", CASES)
def test_no_gradient_is_above_the_strict_constant_and_some_come_close(name, norm, figure):
    loss = CASES[name]
    ratios = []

    def measure(draw: Draw, reduction: str) -> None:
        gradient, bound = gradient_norm(loss, draw, reduction), constant_of(loss, draw, "strict", norm, reduction)
        assert gradient <= bound * (1 + 1e-9) + 1e-12
        ratios.append(gradient / bound if bound else 0.0)

    given(draws(loss), st.sampled_from(["mean", "sum"]))(measure)()
    by_hypothesis = max(ratios)
    for draw in loss.attained:
        measure(draw, "mean")
    figure(f"{name}, {norm}: closest {max(ratios):.4f} of the bound, {by_hypothesis:.4f} by hypothesis")
    assert max(ratios) > 0.99


@pytest.mark.parametrize("draw", CASES["cross-entropy"].attained, ids=["plain", "smoothed", "weighted"])
def test_each_setting_of_cross_entropy_has_a_tight_constant(draw):
    loss = CASES["cross-entropy"]
    assert gradient_norm(loss, draw) / constant_of(loss, draw, "strict", "frobenius") == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("norm", ["spectral", "frobenius", "sample"])
@pytest.mark.parametrize("name", ["cross-entropy", "binary cross-entropy", "huber", "smooth l1", "mean squared error"])
def test_no_eigenvalue_of_the_hessian_is_above_the_smooth_constant_and_some_come_close(name, norm):
    loss = CASES[name]
    ratios = [0.0]

    def measure(draw: Draw, reduction: str) -> None:
        curvature, bound = largest_curvature(loss, draw, reduction), constant_of(loss, draw, "smooth", norm, reduction)
        assert curvature <= bound * (1 + 1e-9) + 1e-9
        ratios.append(curvature / bound if bound > 1e-9 else 0.0)

    given(draws(loss), st.sampled_from(["mean", "sum"]))(settings(max_examples=40)(measure))()
    flat = Draw(ones(4), torch.zeros(2, 3, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64))
    if name == "cross-entropy":
        flat.targets = torch.zeros(4, dtype=torch.long)
        # One heavy example with long inputs, and light ones with next to none.
        long = torch.cat([ones(1), 1e-3 * ones(3)])
        measure(Draw(long, flat.weight, tensor([1, 0, 0, 0]).long(), {"class_weights": [1.0, 4.0]}), "mean")
        if norm == "spectral":
            assert ratios[-1] > 0.99
    measure(flat, "mean")
    assert max(ratios) > 0.99


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("cross-entropy", math.sqrt(2 * 128) * 10 / 9),  # 17.8
        ("binary cross-entropy", 2 * math.sqrt(128)),  # 22.6
        ("mean absolute error", math.sqrt(128)),  # 11.3
        ("quantile", math.sqrt(128)),
        ("huber", math.sqrt(128)),
        ("smooth l1", math.sqrt(128)),
        ("mean squared error", 1.0),
    ],
)
def test_how_far_the_paper_constants_are_exceeded(name, factor, figure):
    """By the worst gradient at m = 128, k = 10 (one output where there are no classes), as the documentation says."""
    loss = CASES[name]
    draw = Draw(ones(128), one_sided(1), torch.zeros(128, 1, dtype=torch.float64))
    if name == "cross-entropy":
        weight = torch.zeros(10, 3, dtype=torch.float64)
        weight[0] = 50
        draw = Draw(ones(128), weight, torch.ones(128, dtype=torch.long))
    if name == "quantile":
        draw.settings = {"level": 0.1}
    measured = gradient_norm(loss, draw) / constant_of(loss, draw, "paper", "frobenius")
    figure(f"{name}: worst gradient over the paper's constant at m=128, k=10: {measured:.2f}")
    assert measured == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_paper_constant_is_the_gradient_in_one_logit_at_uniform_outputs(smoothing):
    # One example in a batch of 5 is not 0, all logits are 0: |dE/dz_y| = (1 - s)(k-1)/k.
    inputs = torch.zeros(5, 4, dtype=torch.float64)
    inputs[0] = torch.tensor([1.0, 2, 3, 4])
    weight = torch.zeros(7, 4, dtype=torch.float64, requires_grad=True)
    F.cross_entropy(inputs @ weight.T, torch.zeros(5, dtype=torch.long), label_smoothing=smoothing).backward()
    largest_row = weight.grad.norm(dim=1).max().item()
    constant = bounds.cross_entropy(
        inputs.norm().item(), num_classes=7, batch_size=5, bound="paper", label_smoothing=smoothing
    )
    assert constant == pytest.approx(largest_row, rel=1e-12)


ESTIMATED = [
    ("cross-entropy", {"label_smoothing": 0.3, "class_weights": [1.0, 5.0, 2.0]}, 3),
    ("cross-entropy", {"class_weights": [1.0, 5.0, 2.0]}, 3),
    ("binary cross-entropy", {"pos_weight": 3.0, "label_smoothing": 0.2}, 1),
    ("binary cross-entropy", {"pos_weight": 0.2}, 2),
    ("mean absolute error", {}, 2),
    ("quantile", {"level": 0.3}, 2),
    ("huber", {"delta": 0.7}, 2),
    ("smooth l1", {"beta": 0.3}, 2),
]


@pytest.mark.parametrize(("name", "settings", "outputs"), ESTIMATED)
def test_the_paper_family_has_the_largest_derivative_in_one_output(name, settings, outputs):
    """Of one example: where the outputs are 0 for the cross-entropies, anywhere for losses of a difference."""
    loss = CASES[name]
    derivatives = []
    places = [0.0] if "entropy" in name else [-50.0, 50.0]
    targets = [torch.zeros(1, outputs, dtype=torch.float64), torch.ones(1, outputs, dtype=torch.float64)]
    for place in places:
        for target in [torch.tensor([y]) for y in range(outputs)] if name == "cross-entropy" else targets:
            values = torch.full((1, outputs), place, dtype=torch.float64, requires_grad=True)
            (derivative,) = torch.autograd.grad(loss.torch(values, target, **settings), values)
            derivatives.append(derivative.abs().max().item())
    constant = loss.constant(3.0, outputs, batch_size=1, bound="paper", norm="frobenius", **settings)
    assert constant == pytest.approx(3 * max(derivatives), rel=1e-9)


def test_class_weights_make_the_paper_estimate_as_much_larger_as_the_bound():
    def both(weights):
        return [
            bounds.cross_entropy(3.0, num_classes=2, batch_size=5, bound=bound, class_weights=weights)
            for bound in ("paper", "strict")
        ]

    (paper, strict), (weighted_paper, weighted_strict) = both(None), both([1.0, 4.0])
    assert weighted_paper / paper == pytest.approx(5 / 4)
    assert weighted_strict / strict == pytest.approx(5 / 4)


@pytest.mark.parametrize("norm", ["frobenius", "sample"])
def test_the_papers_printed_formulas(norm):
    """The table of the papers, typed once more, for K = 3, m = 8, k = 5."""
    rest = {"batch_size": 8, "bound": "paper", "norm": norm}
    assert bounds.cross_entropy(3.0, num_classes=5, **rest) == pytest.approx(4 / 40 * 3)
    assert bounds.binary_cross_entropy(3.0, **rest) == pytest.approx(3 / 16)
    assert bounds.mean_absolute_error(3.0, **rest) == pytest.approx(3 / 8)
    halves = bounds.mean_squared_error(3.0, output_norm=2.0, target_norm=7.0, half=True, **rest)
    assert halves == pytest.approx((2 + 7) * 3 / 8)
    assert bounds.mean_squared_error(3.0, output_norm=2.0, target_norm=7.0, **rest) == pytest.approx(2 * halves)


def test_the_recorded_first_rate_of_the_paper_comes_out():
    # ResNet-20 on CIFAR-10 as the authors recorded it: K_z 206.7, W 43.3, rate 0.668; their lambda is the run's 1e-3.
    constant = bounds.cross_entropy(206.7, num_classes=10, batch_size=128, bound="paper")
    assert 1 / constant == pytest.approx(0.688, abs=1e-3)
    assert 1 / (constant + bounds.l2(1e-3, 43.3, bound="paper")) == pytest.approx(0.668, abs=1e-3)


CLASSES = {"num_classes": 3, "batch_size": 4}


@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        ("cross_entropy", {**CLASSES, "num_classes": 1}, "num_classes=1: expected a whole number of at least 2"),
        ("cross_entropy", {**CLASSES, "batch_size": 0}, "batch_size=0: expected a whole number of at least 1"),
        ("cross_entropy", {**CLASSES, "bound": "loose"}, "bound='loose': expected one of paper, strict, smooth"),
        ("cross_entropy", {**CLASSES, "bound": "strict", "norm": "spectral"}, "norm='spectral'"),
        ("cross_entropy", {**CLASSES, "bound": "paper", "norm": "spectral"}, "norm='spectral'"),
        ("cross_entropy", {**CLASSES, "reduction": "none"}, "reduction='none': expected 'mean' or 'sum'"),
        ("cross_entropy", {**CLASSES, "label_smoothing": 1.5}, "label_smoothing=1.5: expected a number from 0 to 1"),
        ("cross_entropy", {**CLASSES, "class_weights": [1.0]}, "class_weights: expected 3 of them"),
        ("cross_entropy", {**CLASSES, "class_weights": [1.0, -1, 1]}, "class_weights=-1.0: expected a finite number"),
        ("cross_entropy", {**CLASSES, "class_weights": [0, 1, 1], "label_smoothing": 0.1}, "found a weight of 0"),
        ("cross_entropy", {**CLASSES, "class_weights": [0, 0, 0]}, "class_weights, the largest=0.0"),
        ("binary_cross_entropy", {"batch_size": 0}, "batch_size=0"),
        ("binary_cross_entropy", {"batch_size": 4, "pos_weight": 0.0}, "pos_weight=0.0: expected a positive"),
        ("binary_cross_entropy", {"batch_size": 4, "num_outputs": 0}, "num_outputs=0"),
        ("mean_squared_error", {"batch_size": 0, "output_norm": 1.0, "target_norm": 1.0}, "batch_size=0"),
        ("mean_squared_error", {"batch_size": 4}, "needs bounded outputs: expected output_norm and target_norm"),
        ("mean_squared_error", {"batch_size": 4, "output_norm": -1.0, "target_norm": 1.0}, "output_norm=-1.0"),
        ("mean_absolute_error", {"batch_size": 4, "bound": "smooth"}, "is discontinuous"),
        ("quantile", {"batch_size": 4, "level": 0.5, "bound": "smooth"}, "is discontinuous"),
        ("quantile", {"batch_size": 4, "level": 1.0}, r"level=1.0: expected a quantile in \(0, 1\)"),
        ("quantile", {"batch_size": 4, "level": 0.0}, r"level=0.0: expected a quantile in \(0, 1\)"),
        ("huber", {"batch_size": 4, "delta": 0.0}, "delta=0.0: expected a positive"),
        ("smooth_l1", {"batch_size": 4, "beta": -1.0}, "beta=-1.0: expected a positive"),
    ],
)
def test_a_value_out_of_its_range_is_named(function, arguments, named):
    with pytest.raises(ValueError, match=named):
        getattr(bounds, function)(1.0, **arguments)


@pytest.mark.parametrize("size", [math.nan, math.inf, -1.0])
def test_activations_that_are_no_numbers_are_refused(size):
    with pytest.raises(ValueError, match=f"activation_norm={size}: expected a finite number of at least 0"):
        bounds.cross_entropy(size, **CLASSES)
