"""Regression on scikit-learn's diabetes data, with SGD and the computed learning rate."""

import lightning as L
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lit_lipschitz import LipschitzLR


class Regressor(L.LightningModule):
    """An MLP with the mean squared error."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The mean squared error of a batch."""
        return F.mse_loss(self.network(batch[0]), batch[1])

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Logs R², the explained fraction of the variance."""
        self.log("r2", 1 - F.mse_loss(self.network(batch[0]), batch[1]) / batch[1].var())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The value of lr has no effect: LipschitzLR sets the learning rate."""
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def standardized(values: Tensor, reference: Tensor) -> Tensor:
    """Values with the mean and the standard deviation of a reference taken out."""
    return (values - reference.mean(dim=0)) / reference.std(dim=0)


def main() -> None:
    """Trains and tests."""
    L.seed_everything(0, verbose=False)
    inputs, targets = (torch.tensor(part, dtype=torch.float32) for part in load_diabetes(return_X_y=True))
    order = torch.randperm(len(inputs))
    train, test = order[:309], order[309:]
    parts = [
        TensorDataset(standardized(inputs[rows], inputs[train]), standardized(targets[rows], targets[train])[:, None])
        for rows in (train, test)
    ]
    callback, module = LipschitzLR(), Regressor()
    trainer = L.Trainer(max_epochs=15, callbacks=[callback], logger=False, enable_checkpointing=False)
    trainer.fit(module, DataLoader(parts[0], batch_size=32, shuffle=True))
    (metrics,) = trainer.test(module, DataLoader(parts[1], batch_size=133), verbose=False)
    print(f"learning rate {callback.rate:.2g} (times the schedule's factor)")
    print(f"r2 {metrics['r2']:.3f}")


if __name__ == "__main__":
    main()
