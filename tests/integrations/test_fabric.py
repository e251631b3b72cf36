"""``attach`` on what ``fabric.setup`` returns has the numbers of a plain loop."""

import pytest
import torch
from helpers import loader
from helpers.loops import BATCH, EPOCHS, OPTIMIZERS, Loop, network
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from torch.nn import functional as F

from lit_lipschitz import attach


def scaler():
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fabric_has_the_numbers_of_a_plain_loop(optimizer, scaled):
    plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler())] if scaled else []
    fabric = Fabric(accelerator="cpu", devices=1, plugins=plugins)
    batches = fabric.setup_dataloaders(loader(BATCH))
    net = network()
    model, stepped = fabric.setup(net, OPTIMIZERS[optimizer](net.parameters()))
    total_steps = EPOCHS * len(batches)
    rates = []
    with attach(model, stepped, total_steps=total_steps, epoch_steps=len(batches), notify=lambda text: None) as control:
        for _ in range(EPOCHS):
            for inputs, targets in batches:
                stepped.zero_grad()
                fabric.backward(F.cross_entropy(model(inputs), targets))
                stepped.step()
                rates.append([control.lr])
        assert control.controller.head_name == "2"
    expected = Loop(OPTIMIZERS[optimizer], scaler=scaler() if scaled else None).run()
    assert rates == expected[0]
    assert all(torch.equal(one, other) for one, other in zip(net.parameters(), expected[2], strict=True))
