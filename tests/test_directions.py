"""Lengths of steps against the steps that torch's optimizers make."""

import pytest
import torch
from torch import nn

from lit_lipschitz.directions import DIRECTIONS, lengths

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


def test_an_optimizer_that_is_not_known_is_no_guess():
    assert "SGD" not in DIRECTIONS
    with pytest.raises(KeyError):
        lengths(torch.optim.Adagrad([nn.Parameter(torch.ones(1))]))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax])
def test_counters_are_read_from_the_device_at_once(kind, monkeypatch):
    parameters = [nn.Parameter(torch.randn(3)) for _ in range(4)]
    optimizer = kind(parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.randn(3)
    optimizer.step()
    reads = []
    for name in ("__float__", "item", "tolist"):
        own = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, own=own: reads.append(self) or own(self))
    lengths(optimizer)
    assert len(reads) == 1
