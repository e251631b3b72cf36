"""The classification models of torchvision, as their documentation has them, under a plain LightningModule."""

import math

import lightning as L
import pytest
import torch
from helpers import trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models

from lit_lipschitz import LipschitzLR

CLASSES = 7
# Sizes of images that a model insists on, by the beginning of its name; others take any.
SIZES = {"vit": 224, "maxvit": 224, "inception": 299, "swin": 64, "vgg": 32, "alexnet": 64}
SAMPLE = [
    "alexnet",
    "densenet121",
    "googlenet",
    "inception_v3",
    "mobilenet_v3_small",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "vit_b_32",
]


class Plain(L.LightningModule):
    """What a user writes around a network."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def training_step(self, batch, batch_idx):
        outputs = self.network(batch[0])
        # GoogLeNet and Inception return their auxiliary outputs as well.
        return F.cross_entropy(outputs if isinstance(outputs, torch.Tensor) else outputs.logits, batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class FirstInputs(L.Callback):
    """The inputs of the last affine map that makes as many outputs as there are classes, apart from LipschitzLR."""

    def on_fit_start(self, trainer, pl_module):
        self.heads = {
            name: part
            for name, part in pl_module.named_modules()
            if getattr(part, "out_features", getattr(part, "out_channels", 0)) == CLASSES and "aux" not in name.lower()
        }
        self.inputs = {}
        for name, part in self.heads.items():
            part.register_forward_pre_hook(lambda _, args, name=name: self.inputs.setdefault(name, args[0].detach()))


def train_two_steps(name):
    torch.manual_seed(0)
    options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    network = models.get_model(name, weights=None, num_classes=CLASSES, **options)
    size = next((size for start, size in SIZES.items() if name.startswith(start)), 32)
    data = TensorDataset(torch.randn(4, 3, size, size), torch.tensor([0, 1, 2, 6]))
    callback, seen = LipschitzLR(), FirstInputs()
    trainer(callback, seen, max_steps=1).fit(Plain(network), DataLoader(data, batch_size=2))
    (head, inputs), *others = seen.inputs.items()
    assert not others
    assert callback.head_name == head
    rows = inputs.movedim(1, -1).flatten(0, 2) if isinstance(seen.heads[head], nn.Conv2d) else inputs
    ones = 0 if seen.heads[head].bias is None else 1
    expected = math.sqrt(2) * (rows.square().sum(dim=1) + ones).mean().sqrt().item()
    assert callback.constant == pytest.approx(expected, rel=1e-4)
    trainer(longer := LipschitzLR(), max_steps=2).fit(Plain(network), DataLoader(data, batch_size=2))
    return longer.rate


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_the_models_trains_with_the_heads_own_constant(name):
    assert 0 < train_two_steps(name) < math.inf


@pytest.mark.slow
def test_every_classification_model_trains(figure):
    names = models.list_models(module=models)
    failed = {}
    for name in names:
        try:
            train_two_steps(name)
        except Exception as error:
            failed[name] = repr(error)[:300]
    figure(f"{len(names) - len(failed)} of {len(names)} classification models of torchvision train")
    assert len(names) >= 80
    assert not failed
