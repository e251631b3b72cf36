"""A torchvision ResNet-18 on scikit-learn's digits, with AdamW and the computed learning rate; seconds on a CPU."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchvision.models import resnet18

from lit_lipschitz import LipschitzLR


class Classifier(L.LightningModule):
    """Any network that returns logits, with a cross-entropy."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """The loss of a batch."""
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def test_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Logs the accuracy."""
        images, labels = batch
        self.log("test_acc", (self.network(images).argmax(dim=1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The value of lr has no effect: LipschitzLR sets the learning rate."""
        return torch.optim.AdamW(self.parameters(), weight_decay=0.01)


def digits() -> list[TensorDataset]:
    """1,500 images to train with and 297 to test with, 16x16 with three channels."""
    arrays = load_digits()
    images = torch.tensor(arrays.images, dtype=torch.float32).div(16).unsqueeze(1).expand(-1, 3, -1, -1)
    data = TensorDataset(F.interpolate(images, scale_factor=2.0), torch.tensor(arrays.target))
    return random_split(data, [1500, 297])


def main() -> None:
    """Trains and tests."""
    L.seed_everything(0, verbose=False)
    train, test = digits()
    callback = LipschitzLR()
    trainer = L.Trainer(max_epochs=3, callbacks=[callback], logger=False, enable_checkpointing=False)
    module = Classifier(resnet18(num_classes=10))
    trainer.fit(module, DataLoader(train, batch_size=50, shuffle=True))
    (metrics,) = trainer.test(module, DataLoader(test, batch_size=297), verbose=False)
    print(f"head {callback.head_name}, learning rate {callback.rate:.2g} (times the schedule's factor)")
    print(f"test_acc {metrics['test_acc']:.3f}")


if __name__ == "__main__":
    main()
