"""A tiny GPT-2 of transformers, trained on the bytes of Python's documentation with the computed learning rate."""

from pydoc_data.topics import topics

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from lit_lipschitz import LipschitzLR

CONTEXT = 64


class LanguageModel(L.LightningModule):
    """A causal language model; the loss is the one that transformers returns."""

    def __init__(self) -> None:
        super().__init__()
        config = GPT2Config(vocab_size=256, n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=4)
        self.network = GPT2LMHeadModel(config)

    def training_step(self, tokens: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """The mean cross-entropy of the next bytes."""
        loss: torch.Tensor = self.network(input_ids=tokens, labels=tokens).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, tokens: torch.Tensor, batch_idx: int) -> None:
        """Logs the loss on text that was not trained on."""
        self.log("val_loss", self.network(input_ids=tokens, labels=tokens).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The value of lr has no effect: LipschitzLR sets the learning rate."""
        return torch.optim.AdamW(self.parameters(), weight_decay=0.01)


def windows(count: int) -> torch.Tensor:
    """Consecutive pieces of text, a row each."""
    text = "".join(topics[name] for name in sorted(topics)).encode()[: count * CONTEXT]
    return torch.tensor(list(text)).reshape(count, CONTEXT)


def main() -> None:
    """Trains for an epoch and validates."""
    L.seed_everything(0, verbose=False)
    data = windows(3400)
    callback = LipschitzLR()
    trainer = L.Trainer(max_epochs=1, callbacks=[callback], logger=False, enable_checkpointing=False)
    train, val = DataLoader(data[:3200], batch_size=16, shuffle=True), DataLoader(data[3200:], batch_size=50)
    trainer.fit(LanguageModel(), train, val)
    print(f"head {callback.head_name}, learning rate {callback.rate:.2g} (times the schedule's factor)")
    print(f"val_loss {trainer.callback_metrics['val_loss']:.3f}")


if __name__ == "__main__":
    main()
