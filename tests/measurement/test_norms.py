"""The largest norm of a weight, W in the L2 term."""

import torch
from torch import nn

from lit_lipschitz.measurement import norms


def test_the_weight_norm_is_the_largest_tensors():
    parameters = [nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.tensor([[1.0]]))]
    groups = [{"params": [p]} for p in parameters]
    module = nn.BatchNorm1d(4)
    module.running_var.fill_(10)
    assert norms.weight_norm(torch.optim.SGD(groups, lr=1.0), module).item() == 5
    groups = [{"params": [p], "weight_decay": p.ndim - 1} for p in parameters]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    assert norms.weight_norm(optimizer, module).item() == 1
    assert norms.weight_norm(optimizer, module, "parameters").item() == 5
    assert norms.weight_norm(optimizer, module, "all").item() == 20
