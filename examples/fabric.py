"""The loop of plain_loop.py in Lightning Fabric; --devices 2 trains on two processes with the same rates on both."""

import argparse

import torch
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lit_lipschitz import attach


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--accelerator", default="auto")
    options = parser.parse_args()

    fabric = Fabric(accelerator=options.accelerator, devices=options.devices)
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    loader = fabric.setup_dataloaders(DataLoader(data, 64, shuffle=True))

    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9))
    control = attach(model, optimizer, total_steps=options.epochs * len(loader), epoch_steps=len(loader))

    for epoch in range(options.epochs):
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            fabric.backward(loss)
            optimizer.step()
        fabric.print(f"epoch {epoch + 1}: loss {loss.item():.3f}, learning rate {control.lr:.4g}")
    control.share()  # on all ranks, so that each has what any of them measured
    fabric.save("last.ckpt", {"model": model, "optimizer": optimizer, "lr": control.state_dict()})


if __name__ == "__main__":
    main()
