"""Segmentation of discs with cross-entropy plus Dice, a loss without a formula: its constant is measured."""

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lit_lipschitz import LipschitzLR


def discs(count: int, seed: int, size: int = 24) -> TensorDataset:
    """Noisy images of one disc, and its pixels."""
    generator = torch.Generator().manual_seed(seed)
    center = size * (0.25 + 0.5 * torch.rand(count, 2, 1, 1, generator=generator))
    radius = size * (0.1 + 0.15 * torch.rand(count, 1, 1, generator=generator))
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    mask = ((rows - center[:, 0]).square() + (columns - center[:, 1]).square() < radius.square()).float()
    return TensorDataset((mask + 0.7 * torch.randn(mask.shape, generator=generator)).unsqueeze(1), mask.unsqueeze(1))


def dice(logits: Tensor, mask: Tensor) -> Tensor:
    """1 - the Dice coefficient, averaged over the images."""
    probabilities, dims = logits.sigmoid(), (1, 2, 3)
    overlap = (probabilities * mask).sum(dims)
    return (1 - (2 * overlap + 1) / (probabilities.sum(dims) + mask.sum(dims) + 1)).mean()


class Segmenter(L.LightningModule):
    """A small convolutional network with a logit for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
        self.network = nn.Sequential(*layers, nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 1, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy plus Dice."""
        logits = self.network(batch[0])
        return F.binary_cross_entropy_with_logits(logits, batch[1]) + dice(logits, batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Logs the Dice coefficient."""
        self.log("val_dice", 1 - dice(self.network(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The value of lr has no effect: LipschitzLR sets the learning rate."""
        return torch.optim.AdamW(self.parameters())


if __name__ == "__main__":
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(max_epochs=4, callbacks=[LipschitzLR()], logger=False, enable_checkpointing=False)
    trainer.fit(Segmenter(), DataLoader(discs(400, 0), 10, shuffle=True), DataLoader(discs(200, 1), 200))
    print(f"val_dice {trainer.callback_metrics['val_dice']:.3f}")
