"""While a network trains it can be saved, pickled, scripted and copied; after a fit nothing of it is left."""

import contextlib
import copy
import gc
import io
import itertools
import os
import pickle
import warnings
import weakref

import lightning as L
import pytest
import torch
from helpers import CLASSES, WIDTH, Classifier, loader, trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lit_lipschitz import LipschitzLR

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": torch.optim.AdamW,
    "measured": torch.optim.Adagrad,
}
SETTINGS = [{}, {"loss": "measured"}, {"bound": "smooth"}, {"bound": "paper"}, {"update": 2}]

# The papers' rules know their optimizers alone.
PAIRS = [pair for pair in itertools.product(OPTIMIZERS, SETTINGS) if pair != ("measured", {"bound": "paper"})]


def scripted(network):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it is deprecated
        return torch.jit.script(network)


def saved(network):
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "saved": saved,
    "pickled": lambda network: pickle.loads(pickle.dumps(network)),
    "scripted": scripted,
    "copied": copy.deepcopy,
    "copied and scripted": lambda network: scripted(copy.deepcopy(network)),
    "saved and scripted": lambda network: scripted(saved(network)),
}
HOOKS = ["on_train_batch_start", "on_before_backward", "on_after_backward", "on_train_batch_end", "on_train_epoch_end"]


class Copies(L.Callback):
    """Copies the network in one hook, and compares the outputs."""

    def __init__(self, hook, how):
        self.how, self.count = how, 0
        setattr(self, hook, self.copy)

    def copy(self, trainer, pl_module, *_):
        inputs = torch.ones(2, WIDTH)
        other = self.how(pl_module.net)
        with torch.no_grad():
            assert torch.equal(other(inputs), pl_module.net(inputs))
        self.count += 1


def rates(callback, *more, optimizer="adamw", **settings):
    """The learning rate after each epoch of a fit."""
    torch.manual_seed(1)
    found = []
    each = L.pytorch.callbacks.LambdaCallback(on_train_epoch_end=lambda *_: found.append(callback.lr))
    module = Classifier(OPTIMIZERS[optimizer])
    trainer(callback, *more, each, **settings).fit(module, loader())
    return found


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("how", COPIES)
def test_the_network_can_be_copied_while_it_trains_and_the_rates_are_the_same(how, hook):
    found = rates(LipschitzLR(), copies := Copies(hook, COPIES[how]))
    assert copies.count >= 2
    assert found == rates(LipschitzLR())


class Pickles(L.Callback):
    """Pickles and copies the callback in each of some hooks."""

    def __init__(self):
        self.seen = []
        for hook in (*HOOKS, "on_fit_start", "on_train_start", "on_before_optimizer_step", "on_train_end"):
            setattr(self, hook, self.pickle)

    def pickle(self, trainer, *_):
        lipschitz = trainer.callbacks[0]
        for other in (pickle.loads(pickle.dumps(lipschitz)), copy.deepcopy(lipschitz)):
            assert (other.lr, other.rate, other.constant) == (lipschitz.lr, lipschitz.rate, lipschitz.constant)
            assert other.head_name == lipschitz.head_name
            self.seen.append(other)


@pytest.mark.parametrize(("optimizer", "settings"), PAIRS, ids=str)
def test_the_callback_pickles_before_while_and_after(settings, optimizer):
    callback = pickle.loads(pickle.dumps(LipschitzLR(**settings)))
    found = rates(callback, pickles := Pickles(), optimizer=optimizer)
    assert len(pickles.seen) > 100
    assert found == rates(pickles.seen[-1], optimizer=optimizer)  # one that was copied begins a fit of its own
    after = pickle.loads(pickle.dumps(callback))
    assert (after.lr, after.constant) == (callback.lr, callback.constant)


class Fails(L.Callback):
    """Ends a fit by an error in one hook, or does not."""

    def __init__(self, hook=None):
        if hook:
            setattr(self, hook, self.fail)

    def fail(self, trainer, *_):
        if trainer.global_step >= 3:
            raise RuntimeError("stopped")


def hooks_of(module, optimizer):
    """All hooks of a network, its parameters and its optimizer."""
    parts = [*module.modules(), optimizer]
    found = [getattr(part, name) for part in parts for name in vars(part) if name.endswith("_hooks")]
    found += [p._backward_hooks for p in module.parameters()]
    return [hook for hooks in found if hooks for hook in hooks]


def files():
    found = []
    for one in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.append(os.readlink(f"/proc/self/fd/{one}"))
    return sorted(found)


@pytest.mark.parametrize("ends", [None, "on_train_batch_start", "on_before_backward", "on_train_batch_end"])
@pytest.mark.parametrize(("optimizer", "settings"), PAIRS, ids=str)
def test_after_a_fit_there_are_no_hooks_no_references_and_no_files(settings, optimizer, ends):
    torch.manual_seed(1)
    callback, module = LipschitzLR(**settings), Classifier(OPTIMIZERS[optimizer])
    run = trainer(callback, Fails(ends))
    with contextlib.suppress(RuntimeError):
        run.fit(module, loader())
    assert hooks_of(module, run.optimizers[0]) == []
    assert callback.lr > 0
    held = [weakref.ref(one) for one in (module, run, run.optimizers[0], module.net[0], module.net[2].weight)]
    del module, run
    gc.collect()
    assert [one() for one in held] == [None] * len(held)


def test_a_fit_leaves_no_file_open():
    rates(LipschitzLR())
    before = files()
    rates(LipschitzLR(), optimizer="sgd")
    assert files() == before


class Part(nn.Module):
    """A hidden layer that is computed in some other way."""

    def __init__(self, how):
        super().__init__()
        self.inner, self.how = nn.Linear(WIDTH, WIDTH), how

    def forward(self, inputs):
        return HOW[self.how](self.inner, inputs)


def through_jvp(layer, inputs):
    outputs, tangents = torch.func.jvp(layer, (inputs,), (torch.ones_like(inputs),))
    return outputs + 0.1 * tangents


def sparse(layer, inputs):
    return layer(inputs) + torch.sparse.mm(inputs.relu().to_sparse(), layer.weight.T)


def jagged(layer, inputs):
    nested = torch.nested.nested_tensor([inputs[:3], inputs[3:]], layout=torch.jagged)
    return layer(nested).values()


def of_complex(layer, inputs):
    weight = torch.complex(layer.weight, layer.weight)
    return F.linear(torch.complex(inputs, inputs), weight).abs() + layer.bias


HOW = {
    "vmap": lambda layer, inputs: torch.vmap(layer)(inputs),
    "vmap of the gradient": lambda layer, inputs: torch.vmap(torch.func.grad(lambda row: layer(row).square().sum()))(
        inputs
    ),
    "jvp": through_jvp,
    "checkpoint": lambda layer, inputs: checkpoint(layer, inputs, use_reentrant=False),
    "reentrant checkpoint": lambda layer, inputs: checkpoint(layer, inputs, use_reentrant=True),
    "sparse": sparse,
    "jagged": jagged,
    "complex": of_complex,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", SETTINGS[:3], ids=str)
@pytest.mark.parametrize("place", ["first", "middle"])
@pytest.mark.parametrize("how", HOW)
def test_hidden_layers_may_be_computed_in_any_way(how, place, settings):
    torch.manual_seed(1)
    layers = [nn.Linear(WIDTH, WIDTH), Part(how)] if place == "middle" else [Part(how), nn.Linear(WIDTH, WIDTH)]
    module = Classifier(OPTIMIZERS["adamw"], nn.Sequential(*layers, nn.ReLU(), nn.Linear(WIDTH, CLASSES)))
    callback = LipschitzLR(**settings)
    before = module.net[3].weight.detach().clone()
    trainer(callback, max_epochs=2).fit(module, loader())
    assert callback.lr > 0
    assert callback.head_name == "net.3"
    assert not torch.equal(before, module.net[3].weight)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["vmap", "jvp", "checkpoint", "reentrant checkpoint"])
def test_the_head_may_be_computed_in_any_way(how):
    class Other(Classifier):
        def training_step(self, batch, batch_idx):
            hidden = self.net[1](self.net[0](batch[0]))
            return F.cross_entropy(HOW[how](self.net[2], hidden), batch[1])

    torch.manual_seed(1)
    callback = LipschitzLR()
    trainer(callback, max_epochs=2).fit(Other(), loader())
    assert callback.lr > 0
