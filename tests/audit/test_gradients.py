"""Gradient snapshots of single modules."""

import math

import pytest
import torch
from torch import nn

from lit_lipschitz.audit.gradients import read_gradients


def test_gradients_of_every_dtype_and_of_none():
    net = nn.Module()
    net.double = nn.Linear(3, 2, dtype=torch.float64)
    net.complex = nn.ParameterList([torch.ones(2, dtype=torch.complex64)])
    net.empty = nn.ParameterList([torch.ones(0, 2)])
    net.half = nn.Linear(1, 1, bias=False, dtype=torch.float16)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    assert read_gradients(net, optimizer, 0) is None
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 3 + 4j if parameter.is_complex() else 3e4)
    assert read_gradients(net, optimizer, 0).by_layer() == {
        "double": (pytest.approx(3e4 * math.sqrt(8), rel=1e-12), 3e4),
        "complex": (pytest.approx(5 * math.sqrt(2)), 4),
        "half": (pytest.approx(3e4, rel=1e-3), pytest.approx(3e4, rel=1e-3)),
    }
