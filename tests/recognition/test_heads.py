"""Which modules can be the output layer, and their inputs and outputs as rows."""

import pytest
import torch
from torch import nn

from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.recognition import heads

HEAD = nn.Linear(4, 3)


def test_the_candidates_are_the_affine_maps():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, stride=2), nn.Flatten(), HEAD)
    assert list(heads.head_candidates(network)) == ["1", "4"]


def test_names_are_those_that_people_wrote():
    network = nn.Module()
    network.net = torch.compile(nn.Sequential(HEAD))
    assert heads.head_candidates(network, "net.0") == {"net.0": HEAD}
    network.net = torch.compile(HEAD)
    assert heads.head_candidates(network, "net") == heads.head_candidates(network) == {"net": HEAD}


@pytest.mark.parametrize(
    ("name", "message"),
    [("classifer", "pass one of 'classifier'"), ("norm", "found LayerNorm"), ("nothing like it", "'classifier'")],
)
def test_a_head_that_is_none_is_refused(name, message):
    network = nn.Module()
    network.classifier, network.norm = HEAD, nn.LayerNorm(3)
    with pytest.raises(ConfigurationError, match=message):
        heads.head_candidates(network, name)


def test_a_network_without_an_affine_map_is_refused():
    with pytest.raises(ConfigurationError, match="found none among 2 modules"):
        heads.head_candidates(nn.Sequential(nn.ReLU()))


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
    matrix = heads.head_rows(head, inputs)
    assert matrix.shape == (rows, 4)
    outputs = heads.head_rows(head, head(inputs))
    flat = head.weight.reshape(3, 4)
    torch.testing.assert_close(matrix @ flat.T + head.bias, outputs)


def test_outputs_have_the_rows_of_the_inputs():
    convolution = nn.Conv2d(4, 3, 1)
    inputs = torch.randn(2, 4, 3, 5)
    outputs = heads.output_rows(convolution, convolution(inputs))
    torch.testing.assert_close(outputs, heads.head_rows(convolution, convolution(inputs)))
    assert heads.output_rows(nn.Linear(4, 1), torch.zeros(7)).shape == (7, 1)


def test_heads_of_other_optimizers_are_left_out():
    network = nn.Sequential(nn.Linear(4, 4), HEAD)
    assert list(heads.head_candidates(network, owned={HEAD.weight})) == ["1"]
    with pytest.raises(ConfigurationError, match="pass optimizers="):
        heads.head_candidates(network, owned=set())
