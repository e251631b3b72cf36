"""docs/reference/errors.md has the message of each mistake; they are made here and compared, word for word."""

import math
import re
import sys

import lightning as L
import pytest
import torch
from helpers import CLASSES, ROOT, WIDTH, Classifier, loader, trainer
from lightning.pytorch.callbacks import LearningRateFinder
from torch import nn
from torch.nn import functional as F

from lit_lipschitz import LipschitzAudit, LipschitzLR
from lit_lipschitz.errors import LitLipschitzError

CATALOGUE = (ROOT / "docs" / "reference" / "errors.md").read_text()


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


def spare():
    module = Classifier()
    module.spare = nn.Linear(2, 2)
    return module


class TwoOptimizers(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net[0], self.net[2])]


class Functional(Classifier):
    """An output embedding that is no module's."""

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


def checkpointed(before, after):
    run = trainer(LipschitzLR(**before), max_epochs=1)
    run.fit(Classifier(), loader())
    run.save_checkpoint("some.ckpt")
    trainer(LipschitzLR(**after), max_epochs=2).fit(Classifier(), loader(), ckpt_path="some.ckpt")


def dead():
    module = Classifier(net=nn.Sequential(nn.Linear(WIDTH, 16), nn.Linear(16, CLASSES, bias=False)))
    nn.init.constant_(module.net[1].weight, 0.5)
    nn.init.zeros_(module.net[0].weight)
    nn.init.zeros_(module.net[0].bias)
    return module


MISTAKES = {
    "No head": lambda: fit(LipschitzLR(), module=without_linear()),
    "A head that does not exist": lambda: fit(LipschitzLR(head="net.3")),
    "A head that is no affine map": lambda: fit(LipschitzLR(head="net.1")),
    "A head that does not run": lambda: fit(LipschitzLR(head="spare"), module=spare()),
    "A compiled network that has run before": lambda: fit(LipschitzLR(), module=compiled_before()),
    "Outputs that no module makes": lambda: fit(LipschitzLR(), module=Functional()),
    "Something between the head and the loss": lambda: fit(
        LipschitzLR(), module=with_step(lambda z, y: F.cross_entropy(z / 0.05, y))
    ),
    "More rows at the head than targets": lambda: fit(LipschitzLR(), module=TwoHeads()),
    "A head that changes its input": lambda: fit(
        LipschitzLR(), module=Classifier(net=nn.Sequential(nn.Linear(WIDTH, 16), Stretching(16, CLASSES)))
    ),
    "A loss without a graph": lambda: fit(
        LipschitzLR(), module=with_step(lambda z, y: F.cross_entropy(z, y).detach().requires_grad_().clone().detach())
    ),
    "A sum of losses": lambda: fit(
        LipschitzLR(), module=with_step(lambda z, y: F.cross_entropy(z, y) + 0.1 * z.square().mean())
    ),
    "Another loss": lambda: fit(LipschitzLR(), module=with_step(lambda z, y: F.multi_margin_loss(z, y))),
    "A compiled loss": lambda: fit(
        LipschitzLR(), module=with_step(torch.compile(lambda z, y: F.cross_entropy(z, y), backend="aot_eager"))
    ),
    "Probabilities that do not sum to 1": lambda: fit(
        LipschitzLR(), module=with_step(lambda z, y: F.cross_entropy(z, torch.ones_like(z)))
    ),
    "Weights of single elements": lambda: fit(
        LipschitzLR(),
        module=with_step(
            lambda z, y: F.binary_cross_entropy_with_logits(z, torch.ones_like(z), weight=torch.ones_like(z))
        ),
    ),
    "A squared error without bounded outputs": lambda: fit(
        LipschitzLR(loss="mean_squared_error"), module=with_step(lambda z, y: (z - 1).square().mean())
    ),
    "A loss with a gradient that jumps": lambda: fit(
        LipschitzLR(bound="smooth"), module=with_step(lambda z, y: F.l1_loss(z, torch.ones_like(z)))
    ),
    "One class": lambda: fit(
        LipschitzLR(),
        module=with_step(lambda z, y: F.cross_entropy(z, 0 * y), net=nn.Sequential(nn.Linear(WIDTH, 1))),
    ),
    "Ignored targets and a pass": lambda: fit(
        LipschitzLR(bound="paper", measure="pass"),
        module=with_step(lambda z, y: F.cross_entropy(z, torch.where(torch.arange(len(y)) < 4, -100, y))),
    ),
    "Manual optimization": lambda: fit(LipschitzLR(), module=manual(lambda module, loss: module.manual_backward(loss))),
    "A position that does not exist": lambda: fit(LipschitzLR(optimizers=2), module=TwoOptimizers()),
    "A backward of one's own": lambda: fit(
        LipschitzLR(optimizers=0), module=manual(lambda module, loss: loss.backward())
    ),
    "A weight under manual optimization": lambda: fit(
        LipschitzLR(optimizers=0), module=manual(lambda module, loss: module.manual_backward(loss / 4))
    ),
    "An optimizer without a rule": lambda: fit(LipschitzLR(), module=Classifier(torch.optim.Adagrad)),
    "A rule that needs the update of another optimizer": lambda: fit(
        LipschitzLR(rule="grafted"), module=Classifier(torch.optim.Adagrad)
    ),
    "A rule for another family of constants": lambda: LipschitzLR(bound="smooth", rule="observed"),
    "A rule that does not fit the optimizer": lambda: fit(
        LipschitzLR(rule="adamo"), module=Classifier(torch.optim.Adagrad)
    ),
    "A configured rate of 0": lambda: fit(LipschitzLR(), module=Classifier(lambda p: torch.optim.SGD(p, lr=0.0))),
    "Two callbacks": lambda: fit(LipschitzLR(), LipschitzLR()),
    "A search for a rate": lambda: fit(LipschitzLR(), LearningRateFinder()),
    "An audit without LipschitzLR": lambda: fit(LipschitzAudit()),
    "A norm that a family has no constant for": lambda: LipschitzLR(bound="strict", norm="spectral"),
    "A pass and an interval": lambda: LipschitzLR(measure="pass", update=10),
    "A checkpoint of other settings": lambda: checkpointed({"bound": "smooth"}, {}),
    "A checkpoint of another head": lambda: checkpointed({"head": "net.0", "loss": "cross_entropy"}, {}),
    "A loss that is not finite": lambda: fit(
        LipschitzLR(on_nonfinite="raise"), module=with_step(lambda z, y: F.cross_entropy(z, y) + math.nan)
    ),
    "Activations of zero": lambda: fit(LipschitzLR(on_nonfinite="raise"), module=dead()),
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
    "A head that does not exist": {"head": "net.2"},
    "Something between the head and the loss": {"head": "net.2"},
    "More rows at the head than targets": {"head": "net.2"},
    "A head that changes its input": {"head": "net.1"},
    "A sum of losses": {"loss": "cross_entropy"},
    "A compiled loss": {"loss": "cross_entropy"},
    "Probabilities that do not sum to 1": {"loss": "cross_entropy"},
    "Weights of single elements": {"loss": "binary_cross_entropy"},
    "A weight under manual optimization": {"optimizers": 0, "loss": "cross_entropy"},
    "A backward of one's own": {"optimizers": 0, "loss": "cross_entropy"},
    "Manual optimization": {"optimizers": 0},
    "An optimizer without a rule": {"rule": "inverse"},
    "A rule that does not fit the optimizer": {"rule": "inverse"},
    "Ignored targets and a pass": {"bound": "paper", "measure": "running"},
}


@pytest.mark.parametrize("mistake", ADVICE)
def test_what_a_message_says_to_pass_works(mistake, monkeypatch):
    callback = LipschitzLR(**ADVICE[mistake])
    monkeypatch.setattr(sys.modules[__name__], "LipschitzLR", lambda **_: callback)
    MISTAKES[mistake]()
    assert callback.rate > 0


def test_the_catalogue_has_nothing_else():
    assert list(entries()) == list(MISTAKES)


if __name__ == "__main__":  # prints the catalogue's blocks
    L.pytorch._logger.setLevel("ERROR")
    torch.manual_seed(0)
    for name, make in MISTAKES.items():
        try:
            make()
            print(f"### {name}\n\nNO ERROR\n")
        except LitLipschitzError as error:
            print(f"### {name}\n\n```\n{error}\n```\n")
        except Exception as error:
            print(f"### {name}\n\nOTHER {type(error)} {error}\n")
    sys.exit()
