"""Which losses are recognised in the autograd graph, with which head, factor and number of rows."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_lipschitz.bounds.loss_spec import Loss
from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.recognition.affine import same_weight
from lit_lipschitz.recognition.loss_graph import LossGraph

HEAD = nn.Linear(4, 3)
INPUTS, TARGETS = torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0])
ONES = torch.ones(5, 3)
WEIGHTS = torch.tensor([1.0, 2.0, 4.0])
SEQUENCE = INPUTS.reshape(1, 5, 4)


def logits():
    return HEAD(INPUTS)


def found_in(loss):
    return LossGraph(loss).found()


def term_in(loss, name, head=None):
    return LossGraph(loss, name).found(head)


def batch_of(loss, name, num_outputs, named=False):
    return LossGraph(loss, name if named else None).batch(name, num_outputs)


@pytest.mark.parametrize(
    ("make", "loss", "scale"),
    [
        (lambda: F.cross_entropy(logits(), TARGETS), Loss("cross_entropy"), 1.0),
        (lambda: F.nll_loss(F.log_softmax(logits(), dim=1), TARGETS), Loss("cross_entropy"), 1.0),
        (
            lambda: F.cross_entropy(logits(), TARGETS, label_smoothing=0.1),
            Loss("cross_entropy", arguments={"label_smoothing": pytest.approx(0.1)}),
            1.0,
        ),
        (lambda: F.nll_loss(F.log_softmax(logits(), dim=1).clamp(-16, 0), TARGETS), Loss("cross_entropy"), 1.0),
        (lambda: F.cross_entropy(logits(), TARGETS) / 4, Loss("cross_entropy"), 0.25),
        (lambda: 3 * F.cross_entropy(logits(), TARGETS) / 4, Loss("cross_entropy"), 0.75),
        (lambda: F.cross_entropy(HEAD(SEQUENCE).transpose(1, 2), TARGETS.reshape(1, 5)), Loss("cross_entropy"), 1.0),
        (lambda: F.cross_entropy(HEAD(SEQUENCE).reshape(-1, 3), TARGETS), Loss("cross_entropy"), 1.0),
        (
            lambda: F.cross_entropy(logits(), TARGETS, weight=WEIGHTS),
            Loss("cross_entropy", arguments={"class_weights": (1.0, 2.0, 4.0)}),
            1.0,
        ),
        (
            lambda: F.cross_entropy(logits(), TARGETS, weight=WEIGHTS, label_smoothing=0.2),
            Loss("cross_entropy", arguments={"class_weights": (1.0, 2.0, 4.0), "label_smoothing": pytest.approx(0.2)}),
            1.0,
        ),
        (lambda: F.cross_entropy(logits(), TARGETS, reduction="none").mean(), Loss("cross_entropy"), 1.0),
        (lambda: F.cross_entropy(logits(), ONES / 3), Loss("cross_entropy"), 1.0),
        (lambda: F.cross_entropy(logits(), ONES / 3) / 2, Loss("cross_entropy"), 0.5),
        (lambda: F.cross_entropy(logits(), ONES / 3, label_smoothing=0.5), Loss("cross_entropy"), 1.0),
        (lambda: F.binary_cross_entropy_with_logits(logits(), ONES), Loss("binary_cross_entropy"), 1.0),
        (lambda: F.binary_cross_entropy(torch.sigmoid(logits()), ONES), Loss("binary_cross_entropy"), 1.0),
        (
            lambda: F.binary_cross_entropy_with_logits(logits(), ONES, pos_weight=WEIGHTS),
            Loss("binary_cross_entropy", arguments={"pos_weight": 4.0}),
            1.0,
        ),
        (lambda: F.mse_loss(logits(), ONES), Loss("mean_squared_error"), 1.0),
        (lambda: F.mse_loss(ONES, logits()), Loss("mean_squared_error"), 1.0),
        (lambda: F.mse_loss(logits(), ONES, reduction="sum") / 5, Loss("mean_squared_error", "sum"), 0.2),
        (lambda: F.l1_loss(logits(), ONES), Loss("mean_absolute_error"), 1.0),
        (lambda: F.l1_loss(ONES, logits(), reduction="sum"), Loss("mean_absolute_error", "sum"), 1.0),
        (lambda: F.huber_loss(logits(), ONES, delta=0.3), Loss("huber", arguments={"delta": 0.3}), 1.0),
        (lambda: F.smooth_l1_loss(logits(), ONES, beta=0.4), Loss("smooth_l1", arguments={"beta": 0.4}), 1.0),
        (lambda: F.huber_loss(logits(), ONES, reduction="none").sum(), Loss("huber", "sum"), 1.0),
    ],
)
def test_a_loss_is_recognised_with_its_head_and_its_rows(make, loss, scale):
    found = found_in(make())
    assert found.head_weight is HEAD.weight
    assert (found.unrecognised, found.rows, found.calls, found.pooled) == ((), 5, 1, False)
    assert found.loss == loss
    assert found.scale == pytest.approx(scale)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_sum_is_told_from_a_mean(smoothing):
    for reduction in ("mean", "sum"):
        loss = F.cross_entropy(logits(), TARGETS, reduction=reduction, label_smoothing=smoothing)
        found = found_in(loss / 2)
        assert (found.loss.reduction, found.scale) == (reduction, 0.5)
        assert found.head_weight is HEAD.weight


@pytest.mark.parametrize(
    "wrap",
    [
        lambda loss: loss + 1.0,
        lambda loss: sum([loss]),
        lambda loss: 2.0 - loss,
        lambda loss: loss.mean(),
        lambda loss: loss.reshape(1).sum(),
        lambda loss: loss.double() + torch.tensor(3.0),
    ],
)
def test_what_leaves_the_gradient_as_it_is_is_passed_over(wrap):
    found = found_in(0.5 * wrap(F.cross_entropy(logits(), TARGETS)))
    assert (found.loss, found.scale, found.rows) == (Loss("cross_entropy"), 0.5, 5)
    assert found.head_weight is HEAD.weight


def test_terms_of_the_same_outputs_are_one_loss():
    """Mixup: the loss of one batch of outputs with two sets of targets."""
    outputs, share = logits(), torch.tensor(0.3)
    ignored = torch.tensor([-100, 1, 2, 0, 1])
    for loss in (
        share * F.cross_entropy(outputs, TARGETS) + (1 - share) * F.cross_entropy(outputs, ignored),
        (0.6 * F.cross_entropy(outputs, ignored) + 1.4 * F.cross_entropy(outputs, TARGETS)) / 2,
        F.cross_entropy(outputs, TARGETS) - torch.sub(F.cross_entropy(outputs, ignored), 0.0) * 0.0,
    ):
        found = found_in(loss)
        assert (found.loss, found.rows, found.head_weight is HEAD.weight) == (Loss("cross_entropy"), 5, True)
        assert found.scale == pytest.approx(1.0)
        batch = batch_of(loss, "cross_entropy", 3)
        assert (float(batch.count), float(batch.scale)) == (4.0, pytest.approx(1.0))
    difference = F.cross_entropy(outputs, TARGETS) - 0.5 * F.cross_entropy(outputs, 2 - TARGETS)
    assert found_in(difference).scale == batch_of(difference, "cross_entropy", 3).scale == 1.5
    for other in (F.cross_entropy(outputs, TARGETS, label_smoothing=0.1), F.mse_loss(outputs, ONES)):
        with pytest.raises(ConfigurationError, match="found Add > NllLoss"):
            found_in(F.cross_entropy(outputs, TARGETS) + other)


def test_targets_of_several_terms_are_as_large_as_the_largest():
    outputs = logits()
    loss = F.mse_loss(outputs, ONES) / 2 + F.mse_loss(outputs, -7 * ONES) / 2
    assert found_in(loss).scale == 1.0
    batch = batch_of(loss, "mean_squared_error", 3)
    torch.testing.assert_close(batch.outputs[1], 7 * ONES)


@pytest.mark.parametrize(
    ("reduce", "reduction", "scale"),
    [
        (lambda each: each.mean(0).mean(), "mean", 1.0),
        (lambda each: each.view(5, -1).mean(dim=1).mean(dim=0), "mean", 1.0),
        (lambda each: each.sum(dim=1).mean(), "sum", 1 / 5),
        (lambda each: each.sum(dim=(0, 1)), "sum", 1.0),
        (lambda each: each.mean(dim=-1).sum(), "sum", 1 / 3),
    ],
)
def test_a_loss_may_be_reduced_in_steps(reduce, reduction, scale):
    for each in (
        F.mse_loss(logits(), ONES, reduction="none"),
        F.binary_cross_entropy_with_logits(logits(), ONES, reduction="none"),
        (logits() - ONES).abs(),
    ):
        found = found_in(reduce(each))
        assert (found.loss.reduction, found.scale, found.rows) == (reduction, pytest.approx(scale), 5)


def test_one_output_may_lose_its_dimension():
    head = nn.Linear(4, 1)
    for outputs in (head(INPUTS)[:, 0], head(INPUTS).squeeze(-1), head(INPUTS).flatten()):
        found = found_in(F.mse_loss(outputs, torch.zeros(5)))
        assert found.head_weight is head.weight
        assert found.rows == 5


def test_a_part_of_the_outputs_is_counted_by_its_own_width():
    head, grid = nn.Linear(4, 6), nn.Conv2d(4, 6, 1)
    chosen = torch.tensor([[0], [5], [2], [3], [1]])
    for outputs, targets, width in (
        (head(INPUTS)[:, :2], torch.zeros(5, 2), 2),
        (head(INPUTS)[:, 3], torch.zeros(5), 1),
        (head(INPUTS)[..., -1:], torch.zeros(5, 1), 1),
        (head(INPUTS).gather(1, chosen), torch.zeros(5, 1), 1),
        (head(INPUTS).gather(1, chosen).squeeze(-1), torch.zeros(5), 1),
        (head(INPUTS).chunk(3, dim=1)[1], torch.zeros(5, 2), 2),
        (head(SEQUENCE).transpose(1, 2)[:, :4], torch.zeros(1, 4, 5), 4),
        (head(torch.randn(1, 7, 4))[:, 2:], torch.zeros(1, 5, 6), 6),
        (grid(torch.randn(1, 4, 5, 1))[:, 1:4], torch.zeros(1, 3, 5, 1), 3),
    ):
        found = found_in(F.huber_loss(outputs, targets))
        assert any(found.head_weight is part.weight for part in (head, grid))
        assert (found.unrecognised, found.rows, found.head_rows, found.num_outputs) == ((), 5, 5, width)


def test_classes_may_be_places():
    """The answer to a multiple choice, and the place where an answer begins, are chosen among rows of the head."""
    head, tokens = nn.Linear(4, 2), torch.randn(3, 7, 4)
    begins, _ = head(tokens).split(1, dim=-1)
    found = found_in(F.cross_entropy(begins.squeeze(-1), torch.zeros(3, dtype=torch.long)))
    assert (found.head_weight is head.weight, found.unrecognised) == (True, ())
    assert (found.rows, found.head_rows, found.num_outputs, found.rows_per_target) == (3, 21, 7, 7)
    first, last = (part.squeeze(-1).contiguous() for part in head(tokens).split(1, dim=-1))
    answers = [F.cross_entropy(part, torch.ones(3, dtype=torch.long)) for part in (first, last)]
    assert found_in(sum(answers) / 2).scale == 1.0


def test_outputs_that_are_cut_off_or_filled_are_passed_over():
    for outputs in (logits().clamp(-1, 1), logits().masked_fill(ONES > 2, -1e9)):
        found = found_in(F.cross_entropy(outputs, TARGETS))
        assert (found.head_weight is HEAD.weight, found.unrecognised) == (True, ())


@pytest.mark.parametrize("bend", [torch.sigmoid, torch.tanh, torch.relu])
def test_an_activation_that_makes_no_gradient_larger_is_passed_over_and_told(bend):
    for loss in (F.mse_loss, F.l1_loss, F.huber_loss, F.smooth_l1_loss):
        found = found_in(loss(bend(logits()), ONES))
        assert (found.head_weight is HEAD.weight, found.unrecognised) == (True, ())
        assert found.behind_activation[-1] == "Addmm"
    assert found_in(F.cross_entropy(bend(logits()), TARGETS)).unrecognised[0] == "LogSoftmax"


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_a_map_that_is_enlarged_counts_as_pooled(mode):
    head, images = nn.Conv2d(4, 3, 1), torch.randn(2, 4, 3, 4)
    targets = torch.zeros(2, 6, 12, dtype=torch.long)
    found = found_in(F.cross_entropy(F.interpolate(head(images), (6, 12), mode=mode), targets))
    assert (found.head_weight is head.weight, found.unrecognised, found.pooled) == (True, (), True)
    uneven = F.interpolate(head(images), (7, 12), mode=mode)
    assert found_in(F.cross_entropy(uneven, torch.zeros(2, 7, 12, dtype=torch.long))).unrecognised
    smaller = F.interpolate(head(images), (1, 2), mode=mode)
    assert found_in(F.cross_entropy(smaller, torch.zeros(2, 1, 2, dtype=torch.long))).unrecognised


def test_calls_may_be_written_into_one_tensor():
    outputs = torch.zeros(4, 5, 3)
    for step in range(4):
        outputs[step] = HEAD(INPUTS + step)
    loss = F.cross_entropy(outputs.view(-1, 3), TARGETS.repeat(4))
    found = found_in(loss)
    assert (found.head_weight is HEAD.weight, found.unrecognised, found.rows, found.calls) == (True, (), 20, 4)
    assert batch_of(loss, "cross_entropy", 3).calls == 4
    outputs[0] = nn.Linear(4, 3)(INPUTS)
    assert found_in(F.cross_entropy(outputs.view(-1, 3), TARGETS.repeat(4))).unrecognised


def test_the_head_is_found_under_autocast_and_without_a_bias():
    head = nn.Linear(4, 3, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(head(INPUTS), TARGETS)
    assert found_in(loss).head_weight is head.weight


def test_a_convolution_can_be_the_head():
    head = nn.Conv2d(4, 3, 1)
    images = torch.randn(2, 4, 5, 5)
    found = found_in(F.cross_entropy(head(images), torch.zeros(2, 5, 5, dtype=torch.long)))
    assert (found.head_weight is head.weight, found.rows, found.pooled) == (True, 50, False)
    pooled = F.adaptive_avg_pool2d(head(images).relu(), 1).flatten(1)
    found = found_in(F.cross_entropy(pooled, torch.zeros(2, dtype=torch.long)))
    assert (found.head_weight is head.weight, found.rows, found.pooled) == (True, 2, True)
    found = found_in(F.cross_entropy(head(images).mean((2, 3)), torch.zeros(2, dtype=torch.long)))
    assert (found.head_weight is head.weight, found.pooled) == (True, True)


def test_a_hook_on_the_heads_gradients_is_passed_over():
    head = nn.Linear(4, 3)
    head.register_full_backward_hook(lambda *_: None)
    found = found_in(F.cross_entropy(head(INPUTS.clone().requires_grad_()), TARGETS))
    assert (found.head_weight is head.weight, found.unrecognised) == (True, ())


def test_a_bias_and_a_constant_may_be_added():
    columns = torch.randn(2, 4, 5).transpose(1, 2)  # for which torch adds the bias by itself
    targets = torch.zeros(2, 5, dtype=torch.long)
    for outputs in (HEAD(columns), HEAD(columns) + torch.ones(3)):
        found = found_in(F.cross_entropy(outputs.transpose(1, 2), targets))
        assert (found.head_weight is HEAD.weight, found.unrecognised) == (True, ())
    found = found_in(F.cross_entropy(logits() + nn.Linear(4, 3)(INPUTS), TARGETS))
    assert found.unrecognised[:2] == ("LogSoftmax", "Add")


def test_shifted_tokens_and_joined_calls_are_the_heads():
    found = found_in(F.cross_entropy(HEAD(SEQUENCE)[:, :-1].reshape(-1, 3), TARGETS[1:]))
    assert (found.head_weight is HEAD.weight, found.rows) == (True, 4)
    found = found_in(F.cross_entropy(torch.cat([HEAD(INPUTS[:2]), HEAD(INPUTS[2:])]), TARGETS))
    assert (found.head_weight is HEAD.weight, found.rows, found.calls) == (True, 5, 2)


@pytest.mark.parametrize(
    ("logits", "chain"),
    [
        (lambda: HEAD(INPUTS) / 0.05, ("LogSoftmax", "Div", "Addmm")),
        (lambda: HEAD(INPUTS).relu(), ("LogSoftmax", "Relu", "Addmm")),
        (lambda: HEAD(INPUTS[:, None].expand(5, 7, 4))[:, 0], ("LogSoftmax", "Select")),
        (lambda: torch.cat([HEAD(INPUTS[:2]), nn.Linear(4, 3)(INPUTS[2:])]), ("LogSoftmax", "Cat", "Addmm")),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))(INPUTS),
            ("LogSoftmax", "Addmm", "weight", "T", "WeightNormInterface"),
        ),
    ],
    ids=["temperature", "activation", "class token", "two heads", "computed weight"],
)
def test_what_stands_between_the_head_and_the_loss_is_named(logits, chain):
    found = found_in(F.cross_entropy(logits(), TARGETS))
    assert found.head_weight is None
    assert found.unrecognised[: len(chain)] == chain


def test_a_frozen_head_is_known_by_its_memory_and_a_compiled_one_by_its_width():
    frozen = nn.Linear(4, 3).requires_grad_(False)
    inputs = INPUTS.clone().requires_grad_()
    found = found_in(F.cross_entropy(frozen(inputs), TARGETS))
    assert same_weight(found.head_weight, frozen.weight)
    assert found.unrecognised == ()
    compiled = torch.compile(HEAD, backend="aot_eager")
    found = found_in(F.cross_entropy(compiled(INPUTS), TARGETS))
    assert (found.head_weight, found.unrecognised, found.num_outputs) == (None, (), 3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, WEIGHTS])
def test_ignored_targets_do_not_count(smoothing, weight):
    targets = TARGETS.clone()
    targets[0] = -100

    def count(targets, **settings):
        loss = F.cross_entropy(logits(), targets, label_smoothing=smoothing, weight=weight, **settings)
        return float(batch_of(loss / 2, "cross_entropy", 3).count)

    assert count(targets) == 4
    assert count(TARGETS, ignore_index=1) == 3
    assert count(TARGETS) == 5
    loss = F.cross_entropy(logits(), targets, reduction="none").mean()
    assert batch_of(loss, "cross_entropy", 3).count == 5  # they are zeros in the mean


def test_the_batch_of_another_loss_is_none():
    assert batch_of(F.mse_loss(logits(), ONES), "cross_entropy", 3) is None
    assert batch_of(torch.tensor(1.0), "cross_entropy", 3) is None
    batch = batch_of(F.mse_loss(logits(), ONES), "mean_squared_error", 3)
    assert batch.count == 5
    torch.testing.assert_close(batch.outputs, (logits().detach(), ONES))


def test_a_term_of_a_sum_is_found_by_its_name():
    other, head = nn.Linear(4, 3), HEAD.weight
    smooth = 10 * F.smooth_l1_loss(logits(), ONES, reduction="sum")
    found = term_in(smooth + F.cross_entropy(logits(), TARGETS) / 2 + HEAD.bias.sum(), "smooth_l1")
    assert (found.loss, found.scale, found.head_weight is head) == (Loss("smooth_l1", "sum"), 10.0, True)
    assert term_in(smooth, "huber") is None
    two = 0.3 * F.cross_entropy(logits(), TARGETS) + 0.7 * F.cross_entropy(logits(), 2 - TARGETS)
    assert term_in(two, "cross_entropy").scale == pytest.approx(1.0)
    mixed = F.cross_entropy(logits(), TARGETS) + 0.4 * F.cross_entropy(other(INPUTS), TARGETS)
    with pytest.raises(ConfigurationError, match="found 2 of different heads"):
        term_in(mixed, "cross_entropy")
    found = term_in(mixed, "cross_entropy", other.weight)
    assert (found.scale, found.head_weight is other.weight) == (pytest.approx(0.4), True)
    assert len(LossGraph(mixed).first_affine_maps) == 2
    assert LossGraph(logits().exp().sum()).first_affine_maps[0] is head
    product = torch.einsum("bd,kd->bk", nn.Linear(4, 4)(INPUTS), head)
    assert [weight is head for weight in LossGraph(product.exp().sum()).first_affine_maps] == [True]
    batch = batch_of(smooth + HEAD.bias.sum(), "smooth_l1", 3, named=True)
    assert (batch.count, batch.elements, batch.scale) == (5, 15, 10.0)


@pytest.mark.parametrize(
    ("make", "seen"),
    [
        (lambda: (logits() - 1).square().mean(), "Mean > Pow > Sub"),
        (lambda: F.cross_entropy(logits(), TARGETS) + HEAD.weight.square().sum(), "Add"),
        (lambda: F.cross_entropy(logits(), TARGETS) + F.cross_entropy(logits(), TARGETS), "Add > NllLoss"),
        (lambda: 0.7 * F.mse_loss(logits(), ONES) + 0.3 * F.l1_loss(logits(), ONES), "Add > Mul > MseLoss"),
        (lambda: F.cross_entropy(logits()[:1], TARGETS[:1], reduction="none"), "found NllLoss"),
        (lambda: F.cross_entropy(logits(), TARGETS, reduction="none", weight=WEIGHTS).mean(), "averaged manually"),
        (lambda: F.cross_entropy(logits(), ONES / 3, weight=WEIGHTS), "Div > Neg > Sum > Mul"),
        (lambda: F.cross_entropy(logits(), ONES), "do not sum to 1"),
        (lambda: F.binary_cross_entropy_with_logits(logits(), ONES, weight=ONES), "with weight="),
        (lambda: F.binary_cross_entropy(logits().clamp(0.1, 0.9), ONES), "BinaryCrossEntropy > Clamp"),
        (lambda: F.mse_loss(logits(), nn.Linear(4, 3)(INPUTS)), "MseLoss > Addmm"),
        (lambda: F.nll_loss(logits(), TARGETS), "NllLoss > Addmm"),
        (lambda: F.kl_div(F.log_softmax(logits(), dim=1), ONES / 3, reduction="batchmean"), "Sum > Sub > Mul"),
        (lambda: logits().mean(), "Mean > Addmm"),
        (lambda: torch.tensor(1.0), "a tensor without a graph"),
    ],
)
def test_any_other_loss_is_refused_with_what_was_seen(make, seen):
    with pytest.raises(ConfigurationError, match=seen):
        found_in(make())
