"""A GAN on a ring of eight points: two optimizers under manual optimization, each with a computed learning rate."""

import math

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lit_lipschitz import LipschitzLR

LATENT = 8


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    """A network with two hidden layers."""
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs))


class GAN(L.LightningModule):
    """Generator and discriminator with the non-saturating loss."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = mlp(LATENT, 2), mlp(2, 1)

    def training_step(self, real: Tensor, batch_idx: int) -> None:
        """A step of the discriminator and one of the generator."""
        for_generator, for_discriminator = self.optimizers()
        fake = self.generator(torch.randn(len(real), LATENT, device=self.device))
        logits = self.discriminator(torch.cat([real, fake.detach()]))
        labels = torch.cat([torch.ones(len(real), 1), torch.zeros(len(real), 1)]).to(logits)
        self._step(for_discriminator, F.binary_cross_entropy_with_logits(logits, labels))
        verdict = self.discriminator(fake)
        self._step(for_generator, F.binary_cross_entropy_with_logits(verdict, torch.ones_like(verdict)))

    def _step(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """The values of lr have no effect: LipschitzLR sets both learning rates."""
        return [torch.optim.Adam(net.parameters(), betas=(0.5, 0.999)) for net in (self.generator, self.discriminator)]


if __name__ == "__main__":
    L.seed_everything(1, verbose=False)
    angles = torch.randint(8, (6400,)) * math.pi / 4
    ring = torch.stack([angles.cos(), angles.sin()], dim=1) + 0.05 * torch.randn(6400, 2)
    module, callback = GAN(), LipschitzLR(optimizers=[0, 1])
    trainer = L.Trainer(max_epochs=10, callbacks=[callback], logger=False, enable_checkpointing=False)
    trainer.fit(module, DataLoader(ring, batch_size=64, shuffle=True))
    samples = module.generator(torch.randn(1000, LATENT)).detach()
    print("learning rates", *(f"{controller.decision.lr:.2g}" for controller in callback.controllers.values()))
    print(f"mean distance from the ring {(samples.norm(dim=1) - 1).abs().mean():.3f}")
