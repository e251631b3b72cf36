"""The registry of losses: what it holds, and that another package adds a loss with one call."""

import pickle
import subprocess
import sys

import pytest
import torch
from helpers import CLASSES, LOSSES, ROWS, WIDTH, AnyLoss, first_constant
from torch import nn
from torch.nn import functional as F

from lit_lipschitz import ConfigurationError, LipschitzLR, bounds
from lit_lipschitz.bounds import Loss, LossSpec
from lit_lipschitz.bounds.loss_spec import ALIASES
from lit_lipschitz.recognition.loss_graph import LossGraph

SIGNS = torch.linspace(-3, 3, ROWS * CLASSES).reshape(ROWS, CLASSES).sign()
LABELS = torch.arange(ROWS) % CLASSES


def soft_margin(activation_norm, *, batch_size, num_outputs=1, bound="strict", norm="auto", reduction="mean"):
    """Constant of log(1 + exp(-t z)) for targets t of -1 and 1."""
    per_output = bounds.LossBounds(estimate=0.5, gradient_norm=1.0, curvature=0.25)
    return bounds.outputwise_constant(
        per_output, activation_norm, num_outputs, batch_size=batch_size, bound=bound, norm=norm, reduction=reduction
    )


def multi_margin(activation_norm, *, batch_size, num_classes, p=1.0, bound="strict", norm="auto", reduction="mean"):
    """Constant of 1/k times the sum over j != y of max(0, margin - z_y + z_j)."""
    if p != 1 or bound == "smooth":
        raise ValueError(f"p={p}, bound={bound!r}: expected p=1, and paper or strict")
    steepest = ((num_classes - 1) / num_classes) ** 0.5
    per_example = bounds.LossBounds(estimate=steepest, gradient_norm=steepest, curvature=0.0)
    return bounds.batch_constant(
        per_example, activation_norm, batch_size=batch_size, bound=bound, norm=norm, reduction=reduction
    )


SOFT_MARGIN = LossSpec("soft_margin", soft_margin, nodes=("SoftMarginLossBackward0",))
MULTI_MARGIN = LossSpec(
    "multi_margin",
    multi_margin,
    nodes=("MultiMarginLossBackward0",),
    arguments={"p": "_saved_p"},
    outputs="num_classes",
)


@pytest.fixture
def _registered():
    known = dict(bounds.LOSSES)
    bounds.register_loss(SOFT_MARGIN)
    bounds.register_loss(MULTI_MARGIN)
    yield
    bounds.LOSSES.clear()
    bounds.LOSSES.update(known)


@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize("settings", [{}, {"loss": "soft_margin"}])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_a_loss_with_a_target_an_output_is_added_from_outside(settings, scale):
    for reduction, times in (("mean", 1), ("sum", ROWS * CLASSES)):
        module = AnyLoss(lambda z, t, reduction=reduction: F.soft_margin_loss(z, t, reduction=reduction), scale=scale)
        constant = first_constant(module, SIGNS, **settings)
        size = (module.inputs.square().sum(dim=1) + 1).mean().sqrt().item()
        assert constant == pytest.approx(times * size / CLASSES**0.5, rel=1e-5)
        assert 0 < module.gradient <= constant
    module = AnyLoss(F.soft_margin_loss, scale=scale)
    constant = first_constant(module, SIGNS, bound="smooth", norm="sample", **settings)
    assert constant == pytest.approx((module.inputs.square().sum(dim=1) + 1).max().item() / 4 / CLASSES, rel=1e-5)


@pytest.mark.usefixtures("_registered")
def test_a_loss_with_a_target_an_example_is_added_from_outside():
    for reduction, times in (("mean", 1), ("sum", ROWS)):
        module = AnyLoss(lambda z, y, reduction=reduction: F.multi_margin_loss(z, y, reduction=reduction))
        constant = first_constant(module, LABELS)
        size = (module.inputs.square().sum(dim=1) + 1).mean().sqrt().item()
        assert constant == pytest.approx(times * size * (2 / 3) ** 0.5, rel=1e-5)
        assert 0 < module.gradient <= constant
    with pytest.raises(ConfigurationError, match="no constant for the multi_margin of the head 'head': p=2.0"):
        first_constant(AnyLoss(lambda z, y: F.multi_margin_loss(z, y, p=2)), LABELS, norm="sample")
    with pytest.raises(ConfigurationError, match="found a multi_margin with weight=, for which it has no constant"):
        first_constant(
            AnyLoss(lambda z, y: F.multi_margin_loss(z, y, weight=torch.ones(CLASSES))), LABELS, norm="sample"
        )


def test_without_its_record_the_loss_is_refused():
    with pytest.raises(ConfigurationError, match="found SoftMarginLoss > Addmm"):
        first_constant(AnyLoss(F.soft_margin_loss), SIGNS, norm="sample")
    with pytest.raises(ConfigurationError, match="loss='soft_margin'"):
        LipschitzLR(loss="soft_margin")


def test_a_registered_loss_is_a_choice_of_the_signature():
    code = (
        "import inspect, typing\n"
        "from lit_lipschitz import bounds\n"
        "bounds.register_loss(bounds.LossSpec('soft_margin', bounds.huber, nodes=('SoftMarginLossBackward0',)))\n"
        "from lit_lipschitz import LipschitzLR\n"
        "print(*typing.get_args(inspect.signature(LipschitzLR).parameters['loss'].annotation))\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert printed.stdout.split() == ["auto", "measured", *bounds.LOSSES, "soft_margin", *ALIASES]


@pytest.mark.parametrize(
    "spec",
    [LossSpec("huber", soft_margin), LossSpec("soft_margin", soft_margin, nodes=("HuberLossBackward0",))],
)
def test_a_name_or_a_node_that_is_taken_is_refused(spec):
    with pytest.raises(ValueError, match="'huber' is registered for the same"):
        bounds.register_loss(spec)


def test_the_shared_table_has_every_loss():
    assert {case.name for case in LOSSES.values()} == set(bounds.LOSSES)


@pytest.mark.parametrize("case", LOSSES.values(), ids=LOSSES)
def test_each_loss_of_the_table_is_found_by_its_name(case):
    outputs = nn.Linear(WIDTH, CLASSES)(torch.randn(ROWS, WIDTH))
    assert LossGraph(case.function(outputs, case.targets(LABELS))).found().loss.name == case.name


def test_losses_with_the_same_arguments_are_equal():
    spec = bounds.LOSSES["huber"]
    assert spec.loss(delta=1.0) == Loss("huber") != spec.loss(delta=0.5) == Loss("huber", "mean", {"delta": 0.5})
    assert spec.loss("sum", delta=0.5) != spec.loss(delta=0.5)
    assert pickle.loads(pickle.dumps(spec.loss(delta=0.5))) == spec.loss(delta=0.5)


@pytest.mark.parametrize("name", bounds.LOSSES)
def test_the_constant_of_a_loss_is_that_of_its_function(name):
    """Of a sum it is divided by the number of terms, which the size of a batch holds."""
    spec = bounds.LOSSES[name]
    settings = {"batch_size": 7, "bound": "strict", "norm": "frobenius"}
    norms = {"output_norm": 5.0, "target_norm": 0.0} if spec.needs_output_norm else {}
    terms = 7 * 3 if spec.per_output else 7
    for reduction, divisor in (("mean", 1), ("sum", terms)):
        expected = spec.bound(2.0, **{spec.outputs: 3}, reduction=reduction, **settings, **norms) / divisor
        assert Loss(name, reduction).constant(2.0, num_outputs=3, output_norm=5.0, **settings) == expected
    assert Loss(name).needs_output_norm("strict") == (name == "mean_squared_error")
    assert not Loss(name).needs_output_norm("smooth")
