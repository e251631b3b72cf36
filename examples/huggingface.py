"""A text classifier in the Hugging Face Trainer, without a learning rate to choose; nothing is downloaded."""

import argparse

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from lit_lipschitz.integrations.transformers import LipschitzCallback

WORDS = 64


def sentences(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Sentences of 16 words; the label is whether those of the upper half of the vocabulary are the majority."""
    tokens = torch.randint(1, WORDS, (count, 16), generator=torch.Generator().manual_seed(seed))
    labels = ((tokens >= WORDS // 2).sum(dim=1) > 8).long()
    return [{"input_ids": ids, "labels": label} for ids, label in zip(tokens, labels, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=float, default=5)
    options = parser.parse_args()

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=2
    )
    trainer = Trainer(
        BertForSequenceClassification(config),
        TrainingArguments(
            "run",
            num_train_epochs=options.epochs,
            per_device_train_batch_size=32,
            warmup_steps=0.1,
            logging_steps=20,
            eval_strategy="epoch",
            report_to="none",
        ),
        train_dataset=sentences(2000, seed=0),
        eval_dataset=sentences(500, seed=1),
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())},
        callbacks=[LipschitzCallback()],
    )
    trainer.train()


if __name__ == "__main__":
    main()
