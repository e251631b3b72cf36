import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_lipschitz import inspection
from lit_lipschitz.errors import ConfigurationError

HEAD = nn.Linear(4, 3)
INPUTS, TARGETS = torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0])


@pytest.mark.parametrize(
    ("make", "coefficient"),
    [
        (lambda: F.cross_entropy(HEAD(INPUTS), TARGETS), 1.0),
        (lambda: F.nll_loss(F.log_softmax(HEAD(INPUTS), dim=1), TARGETS), 1.0),
        (lambda: F.cross_entropy(HEAD(INPUTS), TARGETS, label_smoothing=0.1), 1.0),
        (lambda: F.nll_loss(F.log_softmax(HEAD(INPUTS), dim=1).clamp(-16, 0), TARGETS), 1.0),
        (lambda: F.cross_entropy(HEAD(INPUTS), TARGETS) / 4, 0.25),
        (lambda: 3 * F.cross_entropy(HEAD(INPUTS), TARGETS) / 4, 0.75),
        (lambda: F.cross_entropy(HEAD(INPUTS.reshape(1, 5, 4)).transpose(1, 2), TARGETS.reshape(1, 5)), 1.0),
        (lambda: F.cross_entropy(HEAD(INPUTS.reshape(1, 5, 4)).reshape(-1, 3), TARGETS), 1.0),
    ],
    ids=["plain", "nll of log-softmax", "clipped", "smoothed", "divided", "scaled", "sequence", "flattened sequence"],
)
def test_a_cross_entropy_is_recognised_with_its_head(make, coefficient):
    found = inspection.find_cross_entropy(make())
    assert found.head_weight is HEAD.weight
    assert found.coefficient == pytest.approx(coefficient)
    assert found.chain == ()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_sum_is_told_from_a_mean(smoothing):
    for reduction in ("mean", "sum"):
        loss = F.cross_entropy(HEAD(INPUTS), TARGETS, reduction=reduction, label_smoothing=smoothing)
        found = inspection.find_cross_entropy(loss / 2)
        assert (found.summed, found.coefficient) == (reduction == "sum", 0.5)
        assert found.head_weight is HEAD.weight


def test_the_head_is_found_under_autocast_and_without_a_bias():
    head = nn.Linear(4, 3, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(head(INPUTS), TARGETS)
    assert inspection.find_cross_entropy(loss).head_weight is head.weight


def test_a_convolution_can_be_the_head():
    head = nn.Conv2d(4, 3, 1)
    loss = F.cross_entropy(head(torch.randn(2, 4, 5, 5)), torch.zeros(2, 5, 5, dtype=torch.long))
    assert inspection.find_cross_entropy(loss).head_weight is head.weight


@pytest.mark.parametrize(
    ("logits", "chain"),
    [
        (lambda: HEAD(INPUTS) / 0.05, ("LogSoftmax", "Div", "Addmm")),
        (lambda: HEAD(INPUTS).relu(), ("LogSoftmax", "Relu", "Addmm")),
        (lambda: HEAD(INPUTS.expand(2, 5, 4)).mean(dim=0), ("LogSoftmax", "Mean")),
        (lambda: HEAD(INPUTS[:, None].expand(5, 7, 4))[:, 0], ("LogSoftmax", "Select")),
        (lambda: torch.cat([HEAD(INPUTS[:2]), HEAD(INPUTS[2:])]), ("LogSoftmax", "Cat", "Addmm")),
    ],
    ids=["temperature", "activation", "pooling", "class token", "two calls"],
)
def test_what_stands_between_the_head_and_the_loss_is_named(logits, chain):
    found = inspection.find_cross_entropy(F.cross_entropy(logits(), TARGETS))
    assert found.head_weight is None
    assert found.chain[: len(chain)] == chain


def test_a_frozen_head_and_a_compiled_one_are_not_named_and_not_refused():
    frozen = nn.Linear(4, 3).requires_grad_(False)
    inputs = INPUTS.clone().requires_grad_()
    compiled = torch.compile(HEAD, backend="aot_eager")
    for logits in (frozen(inputs), compiled(INPUTS)):
        found = inspection.find_cross_entropy(F.cross_entropy(logits, TARGETS))
        assert (found.head_weight, found.chain) == (None, ())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ignored_targets_are_noticed(smoothing):
    targets = TARGETS.clone()
    targets[0] = -100

    def ignored(targets, **settings):
        loss = F.cross_entropy(HEAD(INPUTS), targets, label_smoothing=smoothing, **settings) / 2
        return bool(inspection.ignored_targets(loss))

    assert ignored(targets)
    assert ignored(TARGETS, ignore_index=2)
    assert not ignored(TARGETS)
    assert inspection.ignored_targets(F.mse_loss(HEAD(INPUTS), torch.zeros(5, 3))) is None


@pytest.mark.parametrize(
    ("make", "seen"),
    [
        (lambda: F.mse_loss(HEAD(INPUTS), torch.zeros(5, 3)), "MseLoss"),
        (lambda: F.cross_entropy(HEAD(INPUTS), TARGETS) + HEAD.weight.square().sum(), "Add"),
        (lambda: F.cross_entropy(HEAD(INPUTS), TARGETS, weight=torch.ones(3)), "class weights"),
        (lambda: F.cross_entropy(HEAD(INPUTS)[:1], TARGETS[:1], reduction="none"), "reduction='none', expected one"),
        (lambda: F.cross_entropy(HEAD(INPUTS), TARGETS, reduction="none").mean(), "Mean > NllLoss"),
        (lambda: F.cross_entropy(HEAD(INPUTS), torch.full((5, 3), 1 / 3)), "Div > Neg"),
        (lambda: F.nll_loss(HEAD(INPUTS), TARGETS), "NllLoss > Addmm"),
        (lambda: torch.tensor(1.0), "without one"),
    ],
)
def test_any_other_loss_is_refused_with_what_was_seen(make, seen):
    with pytest.raises(ConfigurationError, match=seen):
        inspection.find_cross_entropy(make())


def test_the_candidates_are_the_affine_maps():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, stride=2), nn.Flatten(), HEAD)
    assert list(inspection.head_candidates(network)) == ["1", "4"]


def test_names_are_those_that_people_wrote():
    network = nn.Module()
    network.net = torch.compile(nn.Sequential(HEAD))
    assert inspection.head_candidates(network, "net.0") == {"net.0": HEAD}


@pytest.mark.parametrize(
    ("name", "message"),
    [("classifer", "pass one of 'classifier'"), ("norm", "found LayerNorm"), ("nothing like it", "'classifier'")],
)
def test_a_head_that_is_none_is_refused(name, message):
    network = nn.Module()
    network.classifier, network.norm = HEAD, nn.LayerNorm(3)
    with pytest.raises(ConfigurationError, match=message):
        inspection.head_candidates(network, name)


def test_a_network_without_an_affine_map_is_refused():
    with pytest.raises(ConfigurationError, match="found none among 2 modules"):
        inspection.head_candidates(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize(
    ("head", "shape", "rows"),
    [(HEAD, (5, 4), 5), (HEAD, (2, 7, 4), 14), (HEAD, (4,), 1), (nn.Conv2d(4, 3, 1), (2, 4, 3, 5), 30)],
)
def test_rows_are_examples_tokens_or_pixels(head, shape, rows):
    inputs = torch.randn(shape)
    matrix = inspection.head_rows(head, inputs)
    assert matrix.shape == (rows, 4)
    outputs = inspection.head_rows(head, head(inputs))
    flat = head.weight.reshape(3, 4)
    torch.testing.assert_close(matrix @ flat.T + head.bias, outputs)


def test_the_weight_norm_is_the_largest_tensors():
    parameters = [nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.tensor([[1.0]]))]
    groups = [{"params": [p]} for p in parameters]
    module = nn.BatchNorm1d(4)
    module.running_var.fill_(10)
    assert inspection.weight_norm(torch.optim.SGD(groups, lr=1.0), module).item() == 5
    groups = [{"params": [p], "weight_decay": p.ndim - 1} for p in parameters]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    assert inspection.weight_norm(optimizer, module).item() == 1
    assert inspection.weight_norm(optimizer, module, "parameters").item() == 5
    assert inspection.weight_norm(optimizer, module, "all").item() == 20
