"""Lengths of steps against the steps that torch's optimizers make."""

import pytest
import torch
from torch import nn

from lit_lipschitz.directions import DIRECTIONS, lengths, scale_of_weights

OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1.0, weight_decay=0.1),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=1.0, amsgrad=True, betas=(0.8, 0.9)),
    "Adam, maximize": lambda p: torch.optim.Adam(p, lr=1.0, maximize=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1.0, weight_decay=0.0, eps=1e-3),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1.0, betas=(0.7, 0.95)),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1.0, betas=(0.9, 0.95)),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1.0, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1.0),
    "RMSprop, centered": lambda p: torch.optim.RMSprop(p, lr=1.0, centered=True, weight_decay=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_the_length_is_that_of_the_step_which_follows(name, dtype):
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3, 4, generator=generator, dtype=dtype)) for _ in range(2)]
    idle = nn.Parameter(torch.ones(2))
    optimizer = OPTIMIZERS[name]([*parameters, idle])
    decay = optimizer.param_groups[0]["weight_decay"]
    for step in range(12):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=dtype) / (1 + step)
        before = [parameter.detach().clone() for parameter in parameters]
        gradient = [p.grad + decay * b for p, b in zip(parameters, before, strict=True)]
        found = lengths(optimizer)
        optimizer.step()
        moved = [p.detach() - b for p, b in zip(parameters, before, strict=True)]
        expected = [torch.cat([part.flatten() for part in parts]).norm().real for parts in (gradient, moved)]
        torch.testing.assert_close(found.double(), torch.stack(expected).double(), rtol=2e-5, atol=0)


def test_gradients_that_are_scaled_count_unscaled_and_without_any_the_lengths_are_zero():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], weight_decay=0.0)
    assert lengths(optimizer).tolist() == [0.0, 0.0]
    parameter.grad = torch.tensor([3.0, 0.0, 4.0]) * 1024
    gradient, step = lengths(optimizer, torch.tensor(1024.0)).tolist()
    assert gradient == pytest.approx(5.0)
    assert step == pytest.approx(2**0.5, rel=1e-6)


WEIGHTS = {"matrix": (3, 4), "row": (1, 5), "kernel": (2, 1, 3, 3), "positions": (1, 4, 6)}
OTHERS = {"bias": (4,), "scale of a layer": (5, 1, 1), "token": (1, 1, 6), "number": ()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_weight_has_the_same_say_in_the_scale_and_biases_have_none(name):
    """Beside the steps that torch makes; one weight in a group of its own, one without a gradient in one step."""
    generator = torch.Generator().manual_seed(0)
    parameters = {
        title: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for title, shape in {**WEIGHTS, **OTHERS}.items()
    }
    optimizer = OPTIMIZERS[name](list(parameters.values())[1:])
    optimizer.add_param_group({"params": [parameters["matrix"]]})
    decay = optimizer.param_groups[0]["weight_decay"]
    for step in range(6):
        for size, parameter in enumerate(parameters.values(), start=1):
            parameter.grad = 10**size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if step == 3:
            parameters["row"].grad = None
        found = scale_of_weights(optimizer, ratios=[1.0, 7.0])
        before = {title: parameter.detach().clone() for title, parameter in parameters.items()}
        optimizer.step()
        ratios = []
        for title in WEIGHTS:
            if parameters[title].grad is not None:
                gradient = parameters[title].grad + decay * before[title]
                ratios.append(gradient.norm() / (parameters[title].detach() - before[title]).norm())
        assert float(found) == pytest.approx(float(sum(ratios)) / len(ratios), rel=2e-5)


def test_what_does_not_move_does_not_count_in_the_scale():
    still, moving, held = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    optimizer = torch.optim.AdamW([still, moving], lr=1.0, weight_decay=0.0)
    optimizer.add_param_group({"params": [held], "lr": 0.0})
    still.grad, moving.grad, held.grad = torch.zeros(2, 2), torch.full((2, 2), 3.0), torch.full((2, 2), 50.0)
    assert float(scale_of_weights(optimizer, ratios=[1.0, 0.0])) == pytest.approx(3.0)
    still.grad = torch.full((2, 2), 1.0)
    assert float(scale_of_weights(optimizer, ratios=[1.0, 0.0])) == pytest.approx(2.0)


def test_without_a_weight_all_parameters_have_one_scale_and_without_a_gradient_there_is_none():
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    assert scale_of_weights(optimizer).isnan()
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0, 4.0]), torch.full((4,), 12.0)
    gradient, step = lengths(optimizer).tolist()
    assert float(scale_of_weights(optimizer)) == pytest.approx(gradient / step)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    assert scale_of_weights(optimizer).isnan()


def test_an_optimizer_that_is_not_known_is_no_guess():
    assert "SGD" not in DIRECTIONS
    for read in (lengths, scale_of_weights):
        with pytest.raises(KeyError):
            read(torch.optim.Adagrad([nn.Parameter(torch.ones(1))]))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax])
def test_counters_are_read_from_the_device_at_once(kind, monkeypatch):
    parameters = [nn.Parameter(torch.randn(3, 2)) for _ in range(4)]
    optimizer = kind(parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.randn(3, 2)
    optimizer.step()
    reads = []
    for name in ("__float__", "item", "tolist"):
        own = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, own=own: reads.append(self) or own(self))
    scale_of_weights(optimizer)
    assert len(reads) == 1
