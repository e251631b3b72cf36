"""Makes each mistake of docs/reference/errors.md and compares its message with the page, word for word."""

import math
import os
import re
import sys
import tempfile

import pytest
import torch
from helpers import CLASSES, ROOT, WIDTH, Classifier, loader, trainer
from lightning.pytorch.callbacks import LearningRateFinder
from torch import nn
from torch.nn import functional as F

from lit_lipschitz import LipschitzAudit, LipschitzLR, attach, suggest
from lit_lipschitz.errors import LitLipschitzError

# Nothing is measured with it, so that a loss or a head that is not recognised is an error.
UNMEASURED = {"norm": "sample"}

PAGE = ROOT / "docs" / "reference" / "errors.md"
CATALOGUE = PAGE.read_text()


def fit(*callbacks, module=None, data=None):
    module = module or Classifier()
    trainer(*callbacks).fit(module, data or loader())


def with_step(step, **attributes):
    """A module whose training step is a function of the logits and the targets."""

    class Own(Classifier):
        def training_step(self, batch, batch_idx):
            return step(self.net(batch[0]), batch[1])

    module = Own()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def manual(backward):
    class Manual(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            backward(self, loss)
            self.optimizers().step()

    return Manual()


def without_linear():
    return Classifier(
        net=nn.Sequential(nn.Unflatten(1, (WIDTH, 1)), nn.Conv1d(WIDTH, CLASSES, 3, padding=1), nn.Flatten())
    )


def compiled_before():
    torch.compiler.reset()
    module = Classifier()
    module.net = torch.compile(module.net, backend="aot_eager")
    module.net(torch.zeros(16, WIDTH))
    return module


class Spare(Classifier):
    """Logits from the weight of a Linear, by a function."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(16, CLASSES)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(F.linear(self.net[:-1](batch[0]), self.spare.weight, self.spare.bias), batch[1])


class Either(Classifier):
    """Two layers, of which the named one computes the logits."""

    def __init__(self, used):
        super().__init__(net=nn.ModuleDict({"first": nn.Linear(WIDTH, CLASSES), "second": nn.Linear(WIDTH, CLASSES)}))
        self.used = used

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net[self.used](batch[0]), batch[1])


class Descends(Classifier):
    """Makes its own step of gradient descent."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.sub_(parameter.grad)


class TwoOptimizers(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net[0], self.net[2])]


class Functional(Classifier):
    """Logits from the weight of an embedding, by a function."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, 16)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(F.linear(self.net[:-1](batch[0]), self.embedding.weight), batch[1])


class TwoHeads(Classifier):
    def training_step(self, batch, batch_idx):
        tokens = batch[0][:, None].expand(-1, 4, -1)
        return F.cross_entropy(self.net(tokens)[:, :1].flatten(0, 1), batch[1])


class Stretching(nn.Linear):
    def forward(self, inputs):
        return F.linear(10 * inputs, self.weight, self.bias)


def checkpointed(before, after, make_before=Classifier, make_after=Classifier):
    run = trainer(LipschitzLR(**before), max_epochs=1)
    run.fit(make_before(), loader())
    run.save_checkpoint("some.ckpt")
    trainer(LipschitzLR(**after), max_epochs=2).fit(make_after(), loader(), ckpt_path="some.ckpt")


def dead():
    module = Classifier(net=nn.Sequential(nn.Linear(WIDTH, 16), nn.Linear(16, CLASSES, bias=False)))
    nn.init.constant_(module.net[1].weight, 0.5)
    nn.init.zeros_(module.net[0].weight)
    nn.init.zeros_(module.net[0].bias)
    return module


def plain(backwards=1, scaler=None, early=None, late=None, before=None):
    """A step of a plain loop."""
    net = nn.Linear(WIDTH, CLASSES)
    optimizer = torch.optim.AdamW(net.parameters())
    _ = early and early(optimizer)
    with attach(net, optimizer, notify=lambda message: None):
        _ = late and late(optimizer)
        inputs, targets = next(iter(loader()))
        for _ in range(backwards):
            loss = F.cross_entropy(net(before(inputs) if before else inputs), targets)
            (scaler.scale(loss) if scaler else loss).backward()
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        _ = scaler.step(optimizer) if scaler else optimizer.step()


def suggested(batches=None, loss_fn=F.cross_entropy, make=torch.optim.SGD, controlled=False, **arguments):
    """A suggestion for a plain loop."""
    net = nn.Linear(WIDTH, CLASSES)
    optimizer = make(net.parameters(), lr=0.1)
    if controlled:
        attach(net, optimizer, notify=lambda message: None)
    suggest(net, optimizer, loader() if batches is None else batches, loss_fn, **arguments)


class StepsItself(torch.optim.SGD):
    def __init__(self, parameters, lr):
        super().__init__(parameters, lr)
        self.identity = id(self)

    def step(self, closure=None):
        if self.identity != id(self):
            raise TypeError("a copy")
        return super().step(closure)


class Wrapped(torch.optim.Optimizer):
    """A wrapper around AdamW that does not call its base class."""

    def __init__(self, parameters):
        self.inner = torch.optim.AdamW(parameters)
        self.param_groups, self.state, self.defaults = self.inner.param_groups, self.inner.state, {}

    def step(self, closure=None):
        return self.inner.step(closure)


MISTAKES = {
    "No head": lambda: fit(LipschitzLR(**UNMEASURED), module=without_linear()),
    "The head's name is not that of a module": lambda: fit(LipschitzLR(head="net.3")),
    "The head is not an affine layer": lambda: fit(LipschitzLR(head="net.1")),
    "The named head does not compute the outputs": lambda: fit(LipschitzLR(head="net.0")),
    "The head is not called in training": lambda: fit(LipschitzLR(head="spare", **UNMEASURED), module=Spare()),
    "The compiled network has been run before the fit": lambda: fit(
        LipschitzLR(**UNMEASURED), module=compiled_before()
    ),
    "The logits are not the output of a module": lambda: fit(LipschitzLR(**UNMEASURED), module=Functional()),
    "An operation between the head and the loss": lambda: fit(
        LipschitzLR(**UNMEASURED), module=with_step(lambda z, y: F.cross_entropy(z / 0.05, y))
    ),
    "The head has more rows than the loss has targets": lambda: fit(LipschitzLR(**UNMEASURED), module=TwoHeads()),
    "The head changes its input": lambda: fit(
        LipschitzLR(**UNMEASURED), module=Classifier(net=nn.Sequential(nn.Linear(WIDTH, 16), Stretching(16, CLASSES)))
    ),
    "The loss has no autograd graph": lambda: fit(
        LipschitzLR(), module=with_step(lambda z, y: F.cross_entropy(z, y).detach().requires_grad_().clone().detach())
    ),
    "The loss is a sum of several losses": lambda: fit(
        LipschitzLR(**UNMEASURED), module=with_step(lambda z, y: F.cross_entropy(z, y) + 0.1 * z.square().mean())
    ),
    "The loss is not a known one": lambda: fit(
        LipschitzLR(**UNMEASURED), module=with_step(lambda z, y: F.multi_margin_loss(z, y))
    ),
    "The loss is compiled": lambda: fit(
        LipschitzLR(**UNMEASURED),
        module=with_step(torch.compile(lambda z, y: F.cross_entropy(z, y), backend="aot_eager")),
    ),
    "An argument that does not apply to a measured loss": lambda: LipschitzLR(loss="measured", bound="smooth"),
    "One of the paper's rules for a measured loss": lambda: LipschitzLR(loss="measured", rule="adamo"),
    "A measured loss without output layers": lambda: fit(
        LipschitzLR(loss="measured"), module=with_step(lambda z, y: torch.zeros((), requires_grad=True))
    ),
    "manual_backward is not called with the loss": lambda: fit(
        LipschitzLR(loss="measured", optimizers=0), module=manual(lambda module, loss: loss.backward())
    ),
    "Target probabilities do not sum to 1": lambda: fit(
        LipschitzLR(**UNMEASURED), module=with_step(lambda z, y: F.cross_entropy(z, torch.ones_like(z)))
    ),
    "The loss has a weight for each element": lambda: fit(
        LipschitzLR(**UNMEASURED),
        module=with_step(
            lambda z, y: F.binary_cross_entropy_with_logits(z, torch.ones_like(z), weight=torch.ones_like(z))
        ),
    ),
    "A squared error that is not computed by mse_loss": lambda: fit(
        LipschitzLR(loss="mean_squared_error", **UNMEASURED), module=with_step(lambda z, y: (z - 1).square().mean())
    ),
    "The smooth bound of a loss with a discontinuous gradient": lambda: fit(
        LipschitzLR(bound="smooth"), module=with_step(lambda z, y: F.l1_loss(z, torch.ones_like(z)))
    ),
    "A cross-entropy with one class": lambda: fit(
        LipschitzLR(**UNMEASURED),
        module=with_step(lambda z, y: F.cross_entropy(z, 0 * y), net=nn.Sequential(nn.Linear(WIDTH, 1))),
    ),
    "Ignored targets with measure='pass'": lambda: fit(
        LipschitzLR(bound="paper", measure="pass"),
        module=with_step(lambda z, y: F.cross_entropy(z, torch.where(torch.arange(len(y)) < 4, -100, y))),
    ),
    "Another loss than the named one": lambda: fit(
        LipschitzLR(loss="cross_entropy", **UNMEASURED),
        module=with_step(lambda z, y: F.mse_loss(z, F.one_hot(y, CLASSES).float())),
    ),
    "A function of a named loss": lambda: fit(
        LipschitzLR(loss="mean_squared_error", **UNMEASURED),
        module=with_step(lambda z, y: F.mse_loss(z, torch.ones_like(z)).sqrt()),
    ),
    "Manual optimization without optimizers=": lambda: fit(
        LipschitzLR(), module=manual(lambda module, loss: module.manual_backward(loss))
    ),
    "An optimizer position that does not exist": lambda: fit(LipschitzLR(optimizers=2), module=TwoOptimizers()),
    "loss.backward() instead of manual_backward(loss)": lambda: fit(
        LipschitzLR(optimizers=0), module=manual(lambda module, loss: loss.backward())
    ),
    "A loss weight under manual optimization": lambda: fit(
        LipschitzLR(optimizers=0, **UNMEASURED), module=manual(lambda module, loss: module.manual_backward(loss / 4))
    ),
    "Weights that move without a step of the optimizer": lambda: fit(LipschitzLR(optimizers=0), module=Descends()),
    "No optimizer": lambda: fit(LipschitzLR(), module=Classifier(lambda parameters: [])),
    "An optimizer without torch's hooks": lambda: fit(LipschitzLR(), module=Classifier(Wrapped)),
    "An optimizer without a rule": lambda: fit(LipschitzLR(bound="paper"), module=Classifier(torch.optim.Adagrad)),
    "A rule for another bound": lambda: LipschitzLR(bound="paper", rule="bounded"),
    "A rule that needs another setting of the optimizer": lambda: fit(
        LipschitzLR(rule="adamo"), module=Classifier(torch.optim.Adagrad)
    ),
    "A configured learning rate of 0": lambda: fit(
        LipschitzLR(), module=Classifier(lambda p: torch.optim.SGD(p, lr=0.0))
    ),
    "Two LipschitzLR callbacks": lambda: fit(LipschitzLR(), LipschitzLR()),
    "LearningRateFinder together with LipschitzLR": lambda: fit(LipschitzLR(), LearningRateFinder()),
    "LipschitzAudit without LipschitzLR": lambda: fit(LipschitzAudit()),
    "A norm that the bound is not defined for": lambda: LipschitzLR(bound="strict", norm="spectral"),
    "measure='pass' with an update interval": lambda: LipschitzLR(measure="pass", update=10),
    "A number of steps between measurements that is not positive": lambda: LipschitzLR(measure_every=0),
    "A checkpoint with other settings": lambda: checkpointed({"bound": "smooth"}, {}),
    "A checkpoint with another head": lambda: checkpointed({}, {}, lambda: Either("first"), lambda: Either("second")),
    "A checkpoint of a recognised loss": lambda: checkpointed({}, {"loss": "measured"}),
    "More backward passes than described": lambda: plain(backwards=2),
    "A GradScaler that was not passed": lambda: plain(scaler=torch.amp.GradScaler("cpu")),
    "A scheduler that was created after attach": lambda: plain(
        late=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3)
    ),
    "A OneCycleLR that was not passed": lambda: plain(
        early=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)
    ),
    "No backward pass before the step": lambda: plain(backwards=0),
    "A loss of several modules": lambda: plain(before=nn.Linear(WIDTH, WIDTH)),
    "Arguments in another order": lambda: attach(torch.optim.SGD([nn.Parameter(torch.ones(1))]), nn.Linear(1, 1)),
    "An optimizer that is already attached": lambda: plain(late=lambda optimizer: attach(nn.Linear(1, 1), optimizer)),
    "Another model than that of the optimizer": lambda: attach(
        nn.Linear(1, 1), torch.optim.SGD([nn.Parameter(torch.ones(1))])
    ),
    "A GradScaler of another type": lambda: attach(
        one := nn.Linear(1, 1), torch.optim.SGD(one.parameters()), grad_scaler=True
    ),
    "The model and the optimizer in another order": lambda: suggest(
        torch.optim.SGD([nn.Parameter(torch.ones(1))]), nn.Linear(1, 1), loader(), F.cross_entropy
    ),
    "A number of batches that is not positive": lambda: suggested(num_batches=0),
    "Too few batches": lambda: suggested(accumulate_grad_batches=10),
    "A loss that is not a scalar": lambda: suggested(loss_fn=lambda z, y: F.cross_entropy(z, y, reduction="none")),
    "A loss that is not finite before training": lambda: suggested(loss_fn=lambda z, y: math.nan * z.sum()),
    "An argument that does not apply before training": lambda: suggested(grad_scaler=torch.amp.GradScaler("cpu")),
    "An optimizer that is controlled already": lambda: suggested(controlled=True),
    "An optimizer that cannot be copied": lambda: suggested(make=StepsItself),
    "A non-finite loss": lambda: fit(
        LipschitzLR(on_nonfinite="raise"), module=with_step(lambda z, y: F.cross_entropy(z, y) + math.nan)
    ),
    "Activations that are all zero": lambda: fit(LipschitzLR(on_nonfinite="raise"), module=dead()),
}


def entries():
    """Heading, message and text of each entry of the catalogue."""
    return {
        heading: " ".join(message.split())
        for heading, message in re.findall(r"^### (.+?)\n+```\n(.*?)\n```$", CATALOGUE, re.MULTILINE | re.DOTALL)
    }


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_prints_what_the_catalogue_says(mistake):
    with pytest.raises(LitLipschitzError) as caught:
        MISTAKES[mistake]()
    assert entries()[mistake] == str(caught.value)


ADVICE = {
    "The head's name is not that of a module": {"head": "net.2"},
    "The named head does not compute the outputs": {"head": "net.2"},
    "An operation between the head and the loss": {"head": "net.2", **UNMEASURED},
    "The head has more rows than the loss has targets": {"head": "net.2", **UNMEASURED},
    "The head changes its input": {"head": "net.1", **UNMEASURED},
    "The loss is a sum of several losses": {"loss": "cross_entropy", **UNMEASURED},
    "The loss is compiled": {"loss": "cross_entropy", **UNMEASURED},
    "Target probabilities do not sum to 1": {"loss": "cross_entropy", **UNMEASURED},
    "The loss has a weight for each element": {"loss": "binary_cross_entropy", **UNMEASURED},
    "A loss weight under manual optimization": {"optimizers": 0, "loss": "cross_entropy", **UNMEASURED},
    "loss.backward() instead of manual_backward(loss)": {"optimizers": 0, "loss": "cross_entropy"},
    "Manual optimization without optimizers=": {"optimizers": 0},
    "An optimizer without a rule": {"rule": "inverse"},
    "A rule that needs another setting of the optimizer": {"rule": "inverse"},
    "Ignored targets with measure='pass'": {"bound": "paper", "measure": "running"},
}


MEASURED = (
    "An operation between the head and the loss",
    "The loss is a sum of several losses",
    "The loss is not a known one",
)


@pytest.mark.parametrize("mistake", MEASURED)
def test_what_a_message_says_of_measuring_works(mistake, monkeypatch):
    assert "with the default bound= and norm= the constant of any loss is measured" in entries()[mistake]
    callback = LipschitzLR()
    monkeypatch.setattr(sys.modules[__name__], "LipschitzLR", lambda **_: callback)
    MISTAKES[mistake]()
    assert callback.rate > 0


@pytest.mark.parametrize("mistake", ADVICE)
def test_what_a_message_says_to_pass_works(mistake, monkeypatch):
    callback = LipschitzLR(**ADVICE[mistake])
    monkeypatch.setattr(sys.modules[__name__], "LipschitzLR", lambda **_: callback)
    MISTAKES[mistake]()
    assert callback.rate > 0


BY_DEFAULT_MEASURED = (
    "No head",
    "The head is not called in training",
    "The logits are not the output of a module",
    "An operation between the head and the loss",
    "The head has more rows than the loss has targets",
    "The head changes its input",
    "The loss is a sum of several losses",
    "The loss is not a known one",
    "Target probabilities do not sum to 1",
    "The loss has a weight for each element",
    "A squared error that is not computed by mse_loss",
    "A function of a named loss",
    "A loss weight under manual optimization",
)


@pytest.mark.parametrize("mistake", BY_DEFAULT_MEASURED)
def test_what_is_an_error_without_measuring_is_measured_by_default(mistake, monkeypatch):
    made, original = [], LipschitzLR

    def without(norm, **settings):
        assert norm == UNMEASURED["norm"]
        made.append(original(**settings))
        return made[0]

    monkeypatch.setattr(sys.modules[__name__], "LipschitzLR", without)
    MISTAKES[mistake]()
    (callback,) = made
    (controller,) = callback.controllers.values()
    assert controller.metrics()["measured"] == 1
    assert callback.rate > 0


def test_the_catalogue_has_nothing_else():
    assert list(entries()) == list(MISTAKES)


if (
    __name__ == "__main__"
):  # PYTHONPATH=.:tests python tests/project/test_errors.py writes the messages into the catalogue
    os.chdir(tempfile.mkdtemp())
    torch.manual_seed(0)
    text = CATALOGUE
    for name, make in MISTAKES.items():
        with pytest.raises(LitLipschitzError) as caught:
            make()
        block = re.compile(rf"(?<=^### {re.escape(name)}\n\n```\n).*?(?=\n```$)", re.MULTILINE | re.DOTALL)
        text, found = block.subn(lambda _, message=str(caught.value): message, text)
        assert found == 1, name
    PAGE.write_text(text)
