"""G, A, m and n of a step, against autograd on the same batches."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lit_lipschitz.measurement.measured_outputs import MeasuredOutputs
from lit_lipschitz.recognition.loss_graph import LossGraph

CPU = torch.device("cpu")


def batch(count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, generator=generator), torch.randint(3, (count,), generator=generator)


def focal(logits, targets):
    entropy = F.cross_entropy(logits, targets, reduction="none")
    return ((1 - torch.exp(-entropy)) ** 2 * entropy).mean()


def masked(logits, targets):
    kept = torch.arange(len(targets)) % 3 > 0
    return F.cross_entropy(logits[kept] / 0.2, targets[kept])


def backward(outputs, loss, scale=1.0):
    outputs.watch(LossGraph(loss).output_layers(), scale)
    loss.backward()


def packed(outputs):
    """Largest norm of the inputs over sqrt(m), m, and the largest gradient norm of a row times m."""
    (size, count, *_), (largest,) = outputs.pack(1.0, 0).tolist(), outputs.pack_grad_norms(True).tolist()[:1]
    return size, count, largest


def moments(outputs):
    """Mean squared and mean gradient norm of the rows, times m."""
    return outputs.pack_gradients(0, 1, CPU).flatten().tolist()


def expected(gradients, inputs):
    """The same five numbers, from the rows of the gradient in the outputs and the inputs with a 1 for the bias."""
    norms = gradients.norm(dim=1)
    counted = norms > 0
    norms, inputs = norms[counted], F.pad(inputs[counted], (0, 1), value=1.0)
    m = len(norms)
    return (
        (inputs.norm() / math.sqrt(m)).item(),
        m,
        m * norms.max().item(),
        m * norms.square().sum().item(),
        norms.sum().item(),
    )


@pytest.mark.parametrize("loss", [focal, masked])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_one_layer_against_autograd(loss, scale):
    head, (inputs, targets), outputs = nn.Linear(5, 3), batch(), MeasuredOutputs(CPU)
    backward(outputs, scale * loss(head(inputs), targets), scale)
    outputs.end_step()
    logits = head(inputs).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logits, targets), logits)
    size, m, largest, square, mean = expected(gradient, inputs)
    assert m == (4 if loss is masked else 6)
    assert packed(outputs) == pytest.approx((size, m, largest), rel=1e-5)
    assert moments(outputs) == pytest.approx([square, mean], rel=1e-5)
    # The product of both norms bounds the gradient in weight and bias, and n is Kish's effective sample size.
    step = math.sqrt(square / m) * size * math.sqrt(m)
    assert torch.cat([head.weight.grad, head.bias.grad[:, None]], 1).norm().item() / scale <= step * (1 + 1e-5)
    norms = gradient.norm(dim=1)
    assert m * mean**2 / square == pytest.approx((norms.sum() ** 2 / norms.square().sum()).item(), rel=1e-5)


def test_the_backwards_of_a_step_count_together():
    head, outputs = nn.Linear(5, 3), MeasuredOutputs(CPU)
    rows = []
    for seed in (0, 1):
        inputs, targets = batch(seed=seed)
        backward(outputs, focal(head(inputs), targets) / 2)
        logits = head(inputs).detach().requires_grad_()
        rows.append((torch.autograd.grad(focal(logits, targets) / 2, logits)[0], inputs))
    outputs.end_step()
    gradients, inputs = map(torch.cat, zip(*rows, strict=True))
    *sizes, square, mean = expected(gradients, inputs)
    assert packed(outputs) == pytest.approx(tuple(sizes), rel=1e-5)
    assert moments(outputs) == pytest.approx([square, mean], rel=1e-5)


def test_several_layers_are_joined_by_the_root_of_the_sum_of_squares():
    classes, values, (inputs, targets) = nn.Linear(5, 3), nn.Linear(5, 1), batch()
    outputs = MeasuredOutputs(CPU)
    backward(outputs, focal(classes(inputs), targets) + 0.1 * values(inputs).square().mean())
    outputs.end_step()
    logits, estimates = classes(inputs).detach().requires_grad_(), values(inputs).detach().requires_grad_()
    loss = focal(logits, targets) + 0.1 * estimates.square().mean()
    with_ones = F.pad(inputs, (0, 1), value=1.0)
    products = [g.norm() * with_ones.norm() for g in torch.autograd.grad(loss, [logits, estimates])]
    size, m, _ = packed(outputs)
    square, _ = moments(outputs)
    assert size * math.sqrt(square) == pytest.approx(math.hypot(*products), rel=1e-5)
    assert m == 6


def test_a_convolution_bounds_the_gradient_in_its_kernel():
    head = nn.Conv2d(2, 3, 3, padding=1)
    images, outputs = torch.randn(4, 2, 5, 5), MeasuredOutputs(CPU)
    loss = 1 - head(images).sigmoid().square().mean()
    backward(outputs, loss)
    outputs.end_step()
    size, m, _ = packed(outputs)
    square, _ = moments(outputs)
    assert m == 4 * 25
    gradient = torch.cat([head.weight.grad.flatten(), head.bias.grad]).norm().item()
    assert 0 < gradient <= size * math.sqrt(square)
    maps = head(images).detach().requires_grad_()
    (g,) = torch.autograd.grad(1 - maps.sigmoid().square().mean(), maps)
    patches = 9 * images.square().sum() + m
    assert size * math.sqrt(square) == pytest.approx((g.norm() * patches.sqrt()).item(), rel=1e-5)


def test_maxima_hold_until_a_step_of_the_next_interval_is_measured():
    head, outputs, (inputs, targets) = nn.Linear(5, 3), MeasuredOutputs(CPU), batch()

    def step(factor):
        backward(outputs, focal(head(factor * inputs), targets))
        outputs.end_step()
        return packed(outputs)[0]

    large, small = step(2.0), step(1.0)
    assert small == large
    outputs.reset()
    assert packed(outputs)[0] == large
    assert step(1.0) < large


def test_a_loss_that_is_not_finite_changes_nothing():
    head, outputs, (inputs, targets) = nn.Linear(5, 3), MeasuredOutputs(CPU), batch()
    backward(outputs, focal(head(inputs), targets))
    outputs.end_step()
    before = packed(outputs)
    backward(outputs, math.nan * focal(head(inputs), targets))
    outputs.end_step()
    assert packed(outputs) == before
    assert moments(outputs) == [-1.0, -1.0]


def test_losses_before_a_step_of_another_optimizer_count_if_no_other_comes():
    head, (inputs, targets) = nn.Linear(5, 3), batch()
    alone, followed = MeasuredOutputs(CPU), MeasuredOutputs(CPU)
    for outputs in (alone, followed):
        backward(outputs, focal(head(inputs), targets))
        outputs.on_other_optimizer_step()
        outputs.on_other_optimizer_step()
    backward(followed, focal(head(3 * inputs), targets))
    for outputs, factor in ((alone, 1), (followed, 3)):
        outputs.end_step()
        rows = F.pad(factor * inputs, (0, 1), value=1.0)
        assert packed(outputs)[0] == pytest.approx((rows.norm() / math.sqrt(6)).item(), rel=1e-5)


def test_a_parameter_without_a_layer_counts_as_one_row():
    scale, shift = (nn.Parameter(torch.randn(4)) for _ in range(2))
    outputs = MeasuredOutputs(CPU)
    backward(outputs, (scale * torch.randn(7, 4) + shift).square().sum())
    outputs.end_step()
    size, count, largest = packed(outputs)
    longest = max(scale.grad.norm(), shift.grad.norm()).item()
    together = torch.cat([scale.grad, shift.grad]).norm().item()
    assert (count, largest) == (1, pytest.approx(longest))
    assert outputs.pack_grad_norms(True).tolist()[1] == pytest.approx(together)
    assert size * largest == pytest.approx(together)


def test_its_state_is_restored():
    head, outputs, (inputs, targets) = nn.Linear(5, 3), MeasuredOutputs(CPU), batch()
    backward(outputs, focal(head(inputs), targets))
    outputs.end_step()
    restored = MeasuredOutputs(CPU)
    restored.load_state_dict(outputs.state_dict())
    assert packed(restored) == packed(outputs)
    assert restored.state_dict()["new_interval"] == outputs.state_dict()["new_interval"]
    assert restored.state_dict()["new_interval"] != MeasuredOutputs(CPU).state_dict()["new_interval"]


class Operations(TorchDispatchMode):
    """Keeps the names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device():
    head, outputs, (inputs, targets) = nn.Linear(5, 3), MeasuredOutputs(CPU), batch()
    loss = focal(head(inputs), targets)
    with Operations() as operations:
        backward(outputs, loss)
        outputs.end_step()
        outputs.reset()
        outputs.pack(1.0, 0)
        outputs.pack_grad_norms(measured=False)
        outputs.pack_gradients(0, 1, CPU)
    assert "aten::linalg_vector_norm" in operations.names
    assert not operations.names & {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}
    # A tensor that is made of the host's numbers is copied to the device, which waits.
    assert not operations.names & {"aten::lift_fresh", "aten::detach_"}


def test_calls_of_a_layer_whose_weight_is_computed_count_together():
    head, outputs = nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)), MeasuredOutputs(CPU)
    for seed in (0, 1):
        inputs, targets = batch(seed=seed)
        backward(outputs, focal(head(inputs), targets) / 2)
    outputs.end_step()
    assert packed(outputs)[1] == 12


def some_loss(generator):
    """Random output layers, masks, factors and reductions: the layers, and a loss of a batch."""

    def below(count):
        return int(torch.randint(count, (), generator=generator))

    bias, kinds = bool(below(2)), [below(4) for _ in range(1 + below(2))]
    makes = (
        lambda: nn.Linear(16, 3, bias=bias),
        lambda: nn.Sequential(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 3, 3, stride=1 + below(2), bias=bias)),
        lambda: nn.Sequential(nn.Unflatten(1, (4, 4)), nn.ConvTranspose1d(4, 2, 3, stride=1 + below(2), bias=bias)),
        lambda: nn.Sequential(nn.Unflatten(1, (4, 4)), nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))),
    )
    heads, body = nn.ModuleList(makes[kind]() for kind in kinds), nn.Linear(5, 16)
    reduce = (torch.mean, torch.sum, lambda values: values.square().sum().sqrt(), torch.logsumexp)[below(4)]
    act, factor, kept = (torch.tanh, torch.exp, torch.square)[below(3)], 10.0 ** (below(5) - 2), 1 + below(6)

    def loss(inputs):
        hidden = torch.tanh(body(inputs))
        rows = [act(head(hidden))[:kept].flatten() for head in heads]
        return factor * sum(reduce(row, 0) if reduce is torch.logsumexp else reduce(row) for row in rows)

    return heads, loss


@pytest.mark.parametrize("seed", range(30))
def test_the_gradient_in_the_weights_never_exceeds_the_product(seed):
    torch.manual_seed(seed)
    heads, loss = some_loss(torch.Generator().manual_seed(seed))
    outputs = MeasuredOutputs(CPU)
    for count in (4, 6):  # two backwards of one step
        backward(outputs, loss(torch.randn(count, 5)))
    outputs.end_step()
    size, square = packed(outputs)[0], moments(outputs)[0]
    weights = [p for head in heads for name, p in head.named_parameters() if "parametrizations" not in name]
    gradient = math.sqrt(sum(p.grad.square().sum().item() for p in weights))
    assert 0 <= gradient <= size * math.sqrt(square) * (1 + 1e-4)
    assert size * math.sqrt(square) > 0
