"""The callbacks in the Trainer of ``lightning`` and of ``pytorch_lightning``, which need not both be installed."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from helpers import ROOT

if find_spec("pytorch_lightning") is None:  # importing it here would change the other tests
    pytest.skip("pytorch_lightning is not installed", allow_module_level=True)

# Hides a package as if it were not installed; {hidden} is its name, {package} the one that is used.
RUN = """
import importlib, json, sys, warnings
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.split(".")[0] == {hidden!r} else find(name, *rest)
warnings.simplefilter("ignore")
import torch
from schedulefree import AdamWScheduleFree
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lit_lipschitz import AveragedWeights, LipschitzAudit, LipschitzLR
pl = importlib.import_module({package!r})
callbacks = importlib.import_module({package!r} + ".callbacks")

class Module(pl.LightningModule):
    def __init__(self, make):
        super().__init__()
        torch.manual_seed(1)
        self.make, self.net = make, nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    def forward(self, inputs):
        return self.net(inputs)
    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])
    def configure_optimizers(self):
        return self.make(self.parameters())

class NoForward(Module):
    forward = pl.LightningModule.forward

class Rates(pl.Callback):
    def __init__(self):
        self.rates = []
    def on_train_batch_end(self, trainer, *_):
        self.rates.append(next(one for one in trainer.callbacks if isinstance(one, LipschitzLR)).lr)

def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

def fit(module, *more, epochs=2, ckpt_path=None, **settings):
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(96, 6, generator=generator), torch.randint(3, (96,), generator=generator)
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    run = pl.Trainer(callbacks=list(more), max_epochs=epochs, accelerator="cpu", **quiet, **settings)
    run.fit(module, DataLoader(TensorDataset(inputs, targets), batch_size=8), ckpt_path=ckpt_path)
    return run

def error(*arguments, **settings):
    try:
        fit(*arguments, **settings)
    except Exception as raised:
        return f"{{type(raised).__name__}}: {{raised}}"

found = {{}}
audit, rates = LipschitzAudit(every=5), Rates()
fit(Module(sgd), LipschitzLR(), audit, rates, accumulate_grad_batches=2).save_checkpoint("some.ckpt")
found["rates"] = rates.rates
found["audit"] = audit.summary().steps
rates = Rates()
fit(Module(sgd), LipschitzLR(), rates, epochs=3, ckpt_path="some.ckpt", accumulate_grad_batches=2)
found["resumed"] = rates.rates
rates = Rates()
averaged = fit(Module(AdamWScheduleFree), LipschitzLR(), rates)
found["averaged"] = rates.rates, isinstance(averaged.callbacks[0], AveragedWeights)
rates = Rates()
fit(Module(sgd), LipschitzLR(bound="paper", measure="pass"), rates)
found["pass"] = rates.rates
found["no forward"] = error(NoForward(sgd), LipschitzLR(bound="paper", measure="pass"))
found["finder"] = error(Module(sgd), LipschitzLR(), callbacks.LearningRateFinder())
found["two"] = error(Module(sgd), LipschitzLR(), LipschitzLR())
rates = Rates()  # no decay, since the length is unknown
fit(Module(sgd), LipschitzLR(), rates, callbacks.EarlyStopping("loss", strict=False, check_on_train_epoch_end=False))
found["stopping"] = rates.rates
names = [one for one in ("lightning", "pytorch_lightning") if one in sys.modules]
print(json.dumps([names, found]))
"""


def run(code):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_each_package_alone_gives_the_same_numbers_and_messages():
    names, expected = run(RUN.format(package="lightning.pytorch", hidden="pytorch_lightning"))
    assert names == ["lightning"]
    names, found = run(RUN.format(package="pytorch_lightning", hidden="lightning"))
    assert names == ["pytorch_lightning"]
    assert found == expected
    assert len(found["rates"]) == 24
    assert found["audit"] == 3
    assert found["averaged"][1]
    assert "has no forward" in found["no forward"]
    assert "LearningRateFinder" in found["finder"]
    assert "expected one such callback, found 2" in found["two"]
    assert found["stopping"][-1] > found["rates"][-1]


BOTH = """
import json, sys
{imports}
from lit_lipschitz import LipschitzLR
trainers = []
for name in ("lightning.pytorch", "pytorch_lightning"):
    package = __import__(name, fromlist=["Trainer"])
    trainer = package.Trainer(callbacks={callbacks}, logger=False, enable_checkpointing=False)
    trainers.append([type(one).__name__ for one in trainer.callbacks if isinstance(one, LipschitzLR)])
print(json.dumps(trainers))
"""


@pytest.mark.parametrize(
    ("imports", "callbacks"),
    [
        ("import lightning, pytorch_lightning", "LipschitzLR()"),
        ("import pytorch_lightning, lightning", "[LipschitzLR()]"),
        pytest.param("import pytorch_lightning", "[LipschitzLR()]", marks=pytest.mark.slow),
        ("", "[LipschitzLR()]"),
    ],
)
def test_both_trainers_accept_the_callback(imports, callbacks):
    """One that is not in a list has to be a Callback of the Trainer's package."""
    assert run(BOTH.format(imports=imports, callbacks=callbacks)) == [["LipschitzLR"]] * 2


FACTORY = """
import json, sys
sys.path.insert(0, ".")
trainers = []
for name in ("lightning.pytorch", "pytorch_lightning"):
    package = __import__(name, fromlist=["Trainer"])
    trainer = package.Trainer(logger=False, enable_checkpointing=False)
    trainers.append([type(one).__name__ for one in trainer.callbacks if type(one).__name__ == "LipschitzLR"])
print(json.dumps(trainers))
"""


@pytest.mark.parametrize("turned_on", [False, True])
def test_every_trainer_has_the_callback_only_if_a_user_registers_it(turned_on, tmp_path):
    if turned_on:
        (tmp_path / "mine.py").write_text(
            "from lit_lipschitz import LipschitzLR\n\n\ndef callbacks():\n    return [LipschitzLR()]\n"
        )
        (tmp_path / "mine-1.dist-info").mkdir()
        (tmp_path / "mine-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
        groups = ("lightning.pytorch.callbacks_factory", "pytorch_lightning.callbacks_factory")
        lines = "".join(f"[{group}]\nlipschitz = mine:callbacks\n" for group in groups)
        (tmp_path / "mine-1.dist-info" / "entry_points.txt").write_text(lines)
    assert run(FACTORY) == [["LipschitzLR"] if turned_on else []] * 2
