"""Weights in front of a normalisation, whose length the loss does not know: how far a step turns them."""

import math

import lightning as L
import pytest
import torch
from conftest import CLASSES, WIDTH, Classifier, Steps, loader, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from lit_lipschitz import LipschitzLR
from lit_lipschitz.directions import lengths
from lit_lipschitz.invariance import ScaleInvariance


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.0)


def normalised(width=64):
    """The second matrix knows nothing of its length."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(WIDTH, width), nn.Tanh(), nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(),
        nn.Linear(width, CLASSES),
    )  # fmt: skip


def with_gradients(network, inputs, optimizer=None):
    """A backward of the cross-entropy; the optimizer's gradients are zero before."""
    network.zero_grad()
    targets = torch.arange(len(inputs)) % CLASSES
    F.cross_entropy(network(inputs).flatten(1)[:, :CLASSES], targets).backward()
    return list(network.parameters())


CONV = {"kernel_size": 3, "padding": 1}
IMAGES = torch.randn(12, 3, 6, 6, generator=torch.Generator().manual_seed(1))
INVARIANT = {
    "conv, BatchNorm": (nn.Sequential(nn.Conv2d(3, 8, **CONV), nn.BatchNorm2d(8)), IMAGES),
    "conv without bias, GroupNorm": (nn.Sequential(nn.Conv2d(3, 8, **CONV, bias=False), nn.GroupNorm(2, 8)), IMAGES),
    "depthwise conv": (nn.Sequential(nn.Conv2d(3, 6, **CONV, groups=3, bias=False), nn.BatchNorm2d(6)), IMAGES),
    "linear, LayerNorm": (nn.Sequential(nn.Linear(6, 8, bias=False), nn.LayerNorm(8)), IMAGES),
    "linear, ReLU, BatchNorm": (
        nn.Sequential(nn.Flatten(), nn.Linear(108, 8, bias=False), nn.ReLU(), nn.BatchNorm1d(8)), IMAGES,
    ),
    "double precision": (nn.Sequential(nn.Conv2d(3, 8, **CONV), nn.BatchNorm2d(8)).double(), IMAGES.double()),
}  # fmt: skip


def followed(body, inputs):
    """The body with an activation and a head after it, so that the loss is more than its normalisation."""
    with torch.no_grad():
        width = body(inputs).flatten(1).shape[1]
    head = nn.Linear(width, CLASSES).to(inputs.dtype)
    return nn.Sequential(body, nn.Tanh(), nn.Flatten(), head)


@pytest.mark.parametrize("name", INVARIANT)
def test_a_weight_in_front_of_a_normalisation_is_measured_beside_hes_and_a_head_is_not(name):
    torch.manual_seed(0)
    body, inputs = INVARIANT[name]
    network, seen = followed(body, inputs), ScaleInvariance()
    weights = [p for p in network.parameters() if p.dim() > 1]
    with torch.no_grad():
        weights[0].mul_(3.0)
    for _ in range(4):
        with_gradients(network, inputs)
        found = [float(seen.length(p, p.grad, i)) for i, p in enumerate(network.parameters()) if p.dim() > 1]
        outputs = weights[0].shape[0]
        he = torch.empty(outputs, 100_000 // outputs)
        nn.init.kaiming_normal_(he, nonlinearity="relu")
        assert found[0] == pytest.approx(float(weights[0].norm() / he.norm()), rel=0.02)
        assert found[1:] == [1.0]
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.sub_(0.05 * parameter.grad)


def test_what_has_changed_the_loss_once_is_never_taken_for_one():
    weight, seen = torch.tensor([[3.0, 4.0]]), ScaleInvariance()
    orthogonal, along = torch.tensor([[-4.0, 3.0]]), torch.tensor([[3.0, 4.0]])
    assert float(seen.length(weight, orthogonal, 0)) == pytest.approx(5 / math.sqrt(2))
    assert float(seen.length(weight, along, 0)) == 1.0
    assert float(seen.length(weight, orthogonal, 0)) == 1.0
    again = ScaleInvariance()
    again.load_state_dict(seen.state_dict([weight]))
    assert float(again.length(weight, orthogonal, 0)) == 1.0


def test_what_chance_makes_orthogonal_is_not_taken_for_one():
    """All matrices are seen in five readings with random gradients; one in 125 at the first, and less ever after."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(8, 8, generator=generator) for _ in range(1000)]
    seen = ScaleInvariance()
    taken = [
        sum(float(seen.length(w, torch.randn(8, 8, generator=generator), i)) != 1.0 for i, w in enumerate(weights))
        for _ in range(5)
    ]
    assert max(taken[:2]) < 20
    assert taken[2:] == [0, 0, 0]


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_a_gradient_that_tells_nothing_changes_nothing(value):
    weight, seen = torch.tensor([[3.0, 4.0]]), ScaleInvariance()
    nothing = torch.full_like(weight, value)
    assert float(seen.length(weight, nothing, 0)) == 1.0
    assert float(seen.length(weight, torch.tensor([[-4.0, 3.0]]), 0)) == pytest.approx(5 / math.sqrt(2))
    assert float(seen.length(weight, nothing, 0)) == pytest.approx(5 / math.sqrt(2))


def test_a_weight_of_zeros_has_no_length():
    seen = ScaleInvariance()
    assert float(seen.length(torch.zeros(2, 2), torch.ones(2, 2), 0)) == 1.0


def test_the_lengths_are_those_of_a_network_whose_weights_have_hes_length():
    """The same function with He's length, by hand: its gradient by autograd, its step turned as far by torch's own."""
    network, inputs = normalised(), torch.randn(24, WIDTH, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        network[2].weight.mul_(2.5)
    longer = float(network[2].weight.norm()) / math.sqrt(2 * 64)
    parameters = with_gradients(network, inputs)
    optimizer = adamw(parameters)
    found = lengths(optimizer, invariance=ScaleInvariance()).tolist()
    before = [p.detach().clone() for p in parameters]
    optimizer.step()
    moved = [p.detach() - b for p, b in zip(parameters, before, strict=True)]
    step = math.hypot(*(float(m.norm()) / (longer if p.shape == (64, 64) else 1.0) for m, p in zip(moved, parameters)))  # noqa: B905
    with torch.no_grad():
        for parameter, b in zip(parameters, before, strict=True):
            parameter.copy_(b / longer if b.shape == (64, 64) else b)
    with_gradients(network, inputs)
    gradient = math.hypot(*(float(p.grad.norm()) for p in parameters))
    assert found == pytest.approx([gradient, step], rel=1e-3)  # BatchNorm's eps is not quite without a length


class Turns(L.Callback):
    """How far each step turns the matrix in front of the normalisation, in radians."""

    def __init__(self):
        self.angles = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.before = pl_module.net[2].weight.detach().clone()

    def on_train_batch_end(self, trainer, pl_module, *_):
        cosine = F.cosine_similarity(self.before.flatten(), pl_module.net[2].weight.detach().flatten(), dim=0)
        self.angles.append(math.acos(min(float(cosine), 1.0)))


@pytest.mark.parametrize("rule", ["auto", "grafted"])
def test_weights_that_start_ten_times_as_long_are_turned_as_far(rule):
    turned = []
    for factor in (1.0, 10.0):
        net = normalised(512)
        with torch.no_grad():
            net[2].weight.mul_(factor)
        for part in (net[0], net[3]):
            part.requires_grad_(False)  # there is one rate for all, and others have no angle
        trainer(LipschitzLR(rule=rule, schedule="none"), turns := Turns(), max_steps=1).fit(
            Classifier(adamw, net), loader()
        )
        turned.append(turns.angles[0])
    assert turned[0] > 0.001
    assert turned[1] == pytest.approx(turned[0], rel=0.1)


def test_a_run_that_goes_on_from_a_checkpoint_has_the_same_rates(tmp_path):
    def fit(path=None):
        torch.manual_seed(0)
        saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
        run = trainer(LipschitzLR(), saved, steps := Steps(), max_epochs=4, enable_checkpointing=True)
        run.fit(Classifier(adamw, normalised()), loader(), ckpt_path=path)
        return [rate for (rate,) in steps.rates]

    whole = fit()
    state = torch.load(tmp_path / "step=12.ckpt", weights_only=True)["callbacks"]["LipschitzLR"]
    readings = state["optimizers"][0]["readings"]
    assert sum(0 <= cosine < 0.1 for cosine in readings["orthogonal"]) == 1
    assert fit(tmp_path / "step=12.ckpt") == whole[12:]
