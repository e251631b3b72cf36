import pytest
import torch
from torch import nn

from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.measurement import norms
from lit_lipschitz.recognition import heads as inspection

HEAD = nn.Linear(4, 3)


def test_the_candidates_are_the_affine_maps():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, stride=2), nn.Flatten(), HEAD)
    assert list(inspection.head_candidates(network)) == ["1", "4"]


def test_names_are_those_that_people_wrote():
    network = nn.Module()
    network.net = torch.compile(nn.Sequential(HEAD))
    assert inspection.head_candidates(network, "net.0") == {"net.0": HEAD}
    network.net = torch.compile(HEAD)
    assert inspection.head_candidates(network, "net") == inspection.head_candidates(network) == {"net": HEAD}


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
    [
        (HEAD, (5, 4), 5),
        (HEAD, (2, 7, 4), 14),
        (HEAD, (4,), 1),
        (nn.Conv2d(4, 3, 1), (2, 4, 3, 5), 30),
        (nn.Conv1d(4, 3, 1), (2, 4, 7), 14),
        (nn.Conv3d(4, 3, 1, padding="valid"), (2, 4, 3, 5, 2), 60),
    ],
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
    assert norms.weight_norm(torch.optim.SGD(groups, lr=1.0), module).item() == 5
    groups = [{"params": [p], "weight_decay": p.ndim - 1} for p in parameters]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    assert norms.weight_norm(optimizer, module).item() == 1
    assert norms.weight_norm(optimizer, module, "parameters").item() == 5
    assert norms.weight_norm(optimizer, module, "all").item() == 20


def test_outputs_have_the_rows_of_the_inputs():
    convolution = nn.Conv2d(4, 3, 1)
    inputs = torch.randn(2, 4, 3, 5)
    outputs = inspection.output_rows(convolution, convolution(inputs))
    torch.testing.assert_close(outputs, inspection.head_rows(convolution, convolution(inputs)))
    assert inspection.output_rows(nn.Linear(4, 1), torch.zeros(7)).shape == (7, 1)


def test_heads_of_other_optimizers_are_left_out():
    network = nn.Sequential(nn.Linear(4, 4), HEAD)
    assert list(inspection.head_candidates(network, owned={HEAD.weight})) == ["1"]
    with pytest.raises(ConfigurationError, match="pass optimizers="):
        inspection.head_candidates(network, owned=set())
