"""Which output layers are found in the graph of any loss, with which inputs, and which belong to an optimizer."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lit_lipschitz.recognition.loss_graph import LossGraph
from lit_lipschitz.recognition.output_layers import HiddenLayers


def rows(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def found(loss, owned=None):
    """The parameters of each output layer, as a set of sets of their ids, and the layers."""
    layers = LossGraph(loss).output_layers(owned)
    return {frozenset(map(id, layer.parameters)) for layer in layers}, layers


def ids(*parameters):
    return frozenset(map(id, parameters))


def body():
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 6), (5, 3, 6)])
def test_a_linear_layer_and_not_those_below_it(bias, shape):
    below, head = body(), nn.Linear(4, 3, bias=bias)
    hidden = below(rows(*shape))
    layers, (layer,) = found((head(hidden) / 0.1).softmax(-1).square().mean())
    assert layers == {ids(head.weight)}
    assert torch.equal(layer.inputs.reshape(hidden.shape), hidden)
    assert (layer.outputs_dim, layer.copies, layer.has_bias) == (-1, 1, bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "call",
    [
        lambda head, hidden: head(hidden.transpose(0, 1)),  # not contiguous: torch makes a product and a sum of it
        lambda head, hidden: hidden @ head.weight.T + (0 if head.bias is None else head.bias),
        lambda head, hidden: (head.bias if head.bias is not None else 1) + hidden.flatten(0, 1) @ head.weight.T,
    ],
)
def test_a_bias_that_is_added_to_a_product_is_seen(bias, call):
    head = nn.Linear(4, 3, bias=bias)
    _, (layer,) = found(call(head, body()(rows(5, 3, 6))).softmax(-1).square().mean())
    assert layer.has_bias is bias


@pytest.mark.parametrize(("stride", "copies"), [(1, 9), (2, 4), (3, 1)])
def test_a_convolution_counts_in_how_many_patches_a_value_is(stride, copies):
    head = nn.Conv2d(2, 3, 3, stride=stride, padding=1)
    images = rows(2, 2, 8, 8).requires_grad_()
    layers, (layer,) = found(head(images).sigmoid().mean())
    assert layers == {ids(head.weight)}
    assert torch.equal(layer.inputs, images)
    assert (layer.outputs_dim, layer.copies, layer.has_bias) == (1, copies, True)
    patches = F.unfold(images, 3, padding=1, stride=stride)
    assert patches.norm() <= copies**0.5 * images.norm() * (1 + 1e-6)


def test_a_transposed_convolution_of_one_dimension():
    head = nn.ConvTranspose1d(2, 3, 4, stride=2)
    layers, (layer,) = found(head(rows(2, 2, 8)).tanh().mean())
    assert layers == {ids(head.weight)}
    assert (layer.outputs_dim, layer.copies) == (1, 4)


def test_a_tied_embedding_is_found_as_the_map_that_makes_the_logits():
    embedding, below = nn.Embedding(7, 4), nn.Linear(4, 4)
    hidden = below(embedding(torch.tensor([1, 2, 3]))).relu()
    layers, (layer,) = found(F.linear(hidden, embedding.weight).logsumexp(1).mean())
    assert layers == {ids(embedding.weight)}
    assert torch.equal(layer.inputs, hidden)


def test_an_embedding_by_itself_multiplies_one_hot_rows():
    embedding = nn.Embedding(7, 4)
    layers, (layer,) = found(embedding(torch.tensor([1, 2, 2])).square().mean())
    assert layers == {ids(embedding.weight)}
    assert layer.inputs is None


PARAMETER = nn.Parameter(rows(4, 3))


@pytest.mark.parametrize(
    "make",
    [
        lambda hidden: F.linear(hidden, PARAMETER.T),
        lambda hidden: hidden @ PARAMETER,
        lambda hidden: (PARAMETER.T @ hidden.T).T,
        lambda hidden: torch.einsum("ij,jk->ik", hidden, PARAMETER),
        lambda hidden: torch.baddbmm(torch.zeros(1), hidden[None], PARAMETER[None]),
        lambda hidden: hidden @ PARAMETER[:, 0],
    ],
)
def test_a_product_with_a_parameter(make):
    hidden = body()(rows(5, 6))
    layers, (layer,) = found(make(hidden).square().mean())
    assert layers == {ids(PARAMETER)}
    assert layer.inputs.norm().item() == pytest.approx(hidden.norm().item())


def test_two_heads_of_two_losses():
    below, classes, values = body(), nn.Linear(4, 3), nn.Linear(4, 1)
    hidden = below(rows(5, 6))
    layers, _ = found(classes(hidden).logsumexp(1).mean() + values(hidden).square().mean())
    assert layers == {ids(classes.weight), ids(values.weight)}


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 3), lambda: nn.Conv1d(4, 3, 1)])
def test_a_weight_with_spectral_norm(norm, make):
    head = norm(make())
    below = nn.Conv1d(2, 4, 1)
    hidden = below(rows(5, 2, 4)).relu()
    (weight,) = (parameter for name, parameter in head.named_parameters() if "bias" not in name)
    layers, (layer,) = found(head(hidden).exp().mean())
    assert layers == {ids(weight)}
    assert torch.equal(layer.inputs.reshape(hidden.shape), hidden)


def test_a_weight_that_is_computed_from_parameters():
    head = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    magnitude, direction = head.parametrizations.weight.original0, head.parametrizations.weight.original1
    layers, _ = found(head(body()(rows(5, 6))).square().mean())
    assert layers == {ids(magnitude, direction)}


def test_two_calls_of_a_layer_are_of_the_same_weight():
    head = nn.Linear(6, 3)
    layers, calls = found((head(rows(5, 6)) - head(2 * rows(5, 6))).square().mean())
    assert layers == {ids(head.weight)}
    assert len(calls) == 2
    assert calls[0].parameters == calls[1].parameters


def test_products_without_a_weight_are_passed():
    below = nn.Linear(6, 4)
    hidden = below(rows(5, 6))
    layers, _ = found((hidden @ hidden.T).logsumexp(1).mean())
    assert layers == {ids(below.weight)}


def test_frozen_layers_and_those_of_another_optimizer_are_passed():
    generator, critic = nn.Linear(6, 4), nn.Linear(4, 1)
    loss = critic(generator(rows(5, 6))).mean()
    assert found(loss)[0] == {ids(critic.weight)}
    assert found(loss, set(generator.parameters()))[0] == {ids(generator.weight)}
    critic.requires_grad_(False)
    assert found(critic(generator(rows(5, 6))).mean())[0] == {ids(generator.weight)}


def test_a_penalty_of_the_parameters_is_not_a_layer_but_a_loss_without_one_has_its_parameters():
    head = nn.Linear(6, 3)
    penalty = sum(p.square().sum() for p in head.parameters())
    assert found(head(rows(5, 6)).exp().mean() + penalty)[0] == {ids(head.weight)}
    assert found(penalty)[0] == {ids(head.weight), ids(head.bias)}


def test_inputs_that_require_gradients_are_not_parameters():
    below, head = body(), nn.Linear(4, 3)
    assert found(head(below(rows(5, 6).requires_grad_())).exp().mean())[0] == {ids(head.weight)}


@pytest.mark.parametrize("look_up", [lambda table, i: table[i], lambda table, i: table.index_select(0, i), F.embedding])
def test_rows_of_a_table_are_data(look_up):
    table, head = nn.Parameter(rows(7, 4)), nn.Linear(4, 3)
    indices = torch.tensor([1, 2, 2])
    looked_up = F.embedding(indices, table) if look_up is F.embedding else look_up(table, indices)
    assert found(head(looked_up).exp().mean())[0] == {ids(head.weight)}


def test_a_convolution_of_images_with_a_computed_weight():
    head = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, (3, 5)))
    magnitude, direction = head.parametrizations.weight.original0, head.parametrizations.weight.original1
    layers, (layer,) = found(head(rows(2, 2, 8, 8)).exp().mean())
    assert layers == {ids(magnitude, direction)}
    assert layer.copies == 15


class Scaled(nn.Module):
    """Inputs times a parameter, plus one."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(6))

    def forward(self, inputs):
        return inputs * self.scale + self.shift


class Last(nn.Module):
    """The last output of a recurrent layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(6, 6, batch_first=True)

    def forward(self, inputs):
        return self.layer(inputs[:, None])[0][:, -1]


FIRST = {"batch norm": lambda: nn.BatchNorm1d(6), "layer norm": lambda: nn.LayerNorm(6), "LSTM": Last, "scaled": Scaled}


# Behind a weight that is computed, an elementwise product with data looks like a mask of the weight.
@pytest.mark.parametrize(
    ("first", "normed"), [*((name, False) for name in FIRST), *((name, True) for name in list(FIRST)[:3])]
)
def test_a_first_layer_of_inputs_without_gradients_is_not_a_weight(first, normed):
    make, head = FIRST[first](), nn.Linear(6, 3)
    head = nn.utils.parametrizations.weight_norm(head) if normed else head
    weights = [parameter for name, parameter in head.named_parameters() if name != "bias"]
    hidden = make(rows(5, 6))
    layers, (layer,) = found(head(hidden).exp().mean())
    assert layers == {ids(*weights)}
    assert torch.equal(layer.inputs, hidden)


def test_penalties_of_weights_are_passed():
    head, other = nn.utils.spectral_norm(nn.Linear(6, 3)), nn.Linear(6, 6)
    loss = head(rows(5, 6)).exp().mean()
    orthogonal = (other.weight @ other.weight.T - torch.eye(6)).square().sum()
    assert found(loss + head.weight.square().sum() + orthogonal)[0] == {ids(head.weight_orig)}


def test_compiled_code_with_a_weight_is_found_and_other_compiled_code_is_passed():
    torch.compiler.reset()
    below, head = body(), nn.Linear(4, 3)
    network = torch.compile(nn.Sequential(below, head), backend="aot_eager")
    squares = torch.compile(lambda outputs: outputs.square().mean(), backend="aot_eager")
    for loss in (network(rows(5, 6)).exp().mean(), squares(network(rows(5, 6)))):
        (code,) = LossGraph(loss).output_layers()
        assert isinstance(code, HiddenLayers)
        assert code.is_compiled
        assert set(code.parameters) == {*below.parameters(), *head.parameters()}
        for parameter, position in code.parameters.items():
            assert code.node.next_functions[position][0].variable is parameter
        (code,) = LossGraph(loss).output_layers(set(head.parameters()))
        assert set(code.parameters) == set(head.parameters())
    assert found(squares(head(below(rows(5, 6)))))[0] == {ids(head.weight)}


def test_checkpointed_code_is_found_with_what_is_below_it():
    below, head = body(), nn.Linear(4, 3)
    hidden = below(rows(5, 6))
    (code,) = LossGraph(checkpoint(head, hidden, use_reentrant=True).exp().mean()).output_layers()
    assert isinstance(code, HiddenLayers)
    assert not code.is_compiled
    assert code.below == (hidden.grad_fn,)
