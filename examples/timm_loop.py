"""A timm network with timm's optimizer and scheduler: a scheduler's value is a factor of the computed rate."""

import argparse

import timm
import torch
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import dispatch_clip_grad
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lit_lipschitz import attach


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()

    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    data = TensorDataset(F.interpolate(inputs, size=32, mode="bilinear"), torch.tensor(labels))
    loader = DataLoader(data, 64, shuffle=True)

    model = timm.create_model("resnet10t", num_classes=10, in_chans=1)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.05)  # lr: the unit of the schedule
    steps = options.epochs * len(loader)
    scheduler = CosineLRScheduler(optimizer, steps, warmup_t=steps // 10, warmup_prefix=True, t_in_epochs=False)
    control = attach(model, optimizer, total_steps=steps, epoch_steps=len(loader))

    step = 0
    for epoch in range(options.epochs):
        for images, targets in loader:
            loss = F.cross_entropy(model(images), targets, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            dispatch_clip_grad(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            scheduler.step_update(step)
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, learning rate {control.lr:.4g}, rate {control.rate:.4g}")


if __name__ == "__main__":
    main()
