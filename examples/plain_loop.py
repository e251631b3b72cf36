"""A convolutional network on handwritten digits in a plain PyTorch loop, without a learning rate to choose."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from lit_lipschitz import attach


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()

    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels))
    train_data, test_data = random_split(data, [1500, len(data) - 1500])
    loader = DataLoader(train_data, options.batch_size, shuffle=True)

    model = nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    optimizer = torch.optim.AdamW(model.parameters())
    control = attach(model, optimizer, total_steps=options.epochs * len(loader), epoch_steps=len(loader))

    for epoch in range(options.epochs):
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            right = sum(int((model(x).argmax(1) == y).sum()) for x, y in DataLoader(test_data, 256))
        accuracy = right / len(test_data)
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, learning rate {control.lr:.4g}, accuracy {accuracy:.1%}")
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "lr": control.state_dict()}, "last.pt"
    )


if __name__ == "__main__":
    main()
