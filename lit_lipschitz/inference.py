"""The papers' way to measure: a pass in inference mode over the training set, before every epoch."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng


def inference_pass(trainer: Trainer, module: LightningModule) -> None:
    """Calls a module with the inputs of its training batches, and leaves it, and the random numbers, as they were.

    No gradients are recorded; dropout is off and BatchNorm uses its moving statistics. The batches are those of
    ``lipschitz_dataloader()`` of the datamodule or the module, where there is one (the bundled data modules have one
    that neither shuffles nor augments), and else those of the training loader once more, as many as an epoch of
    training has. A batch that is a tuple or a list gives its first element, any other is passed as it is. Each rank
    goes over its own share.

    Args:
        trainer: A trainer that is fitting the module.
        module: The module.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), isolate_rng(), trainer.precision_plugin.forward_context():
            for number, batch in enumerate(_batches(trainer, module)):
                if number >= trainer.num_training_batches:
                    break
                batch = trainer.strategy.batch_to_device(batch)
                module(batch[0] if isinstance(batch, Sequence) else batch)
    finally:
        for part, training in modes:
            part.training = training


def _batches(trainer: Trainer, module: LightningModule) -> Iterable[Any]:
    for source in (trainer.datamodule, module):  # type: ignore[attr-defined]
        if callable(make := getattr(source, "lipschitz_dataloader", None)):
            return make()
    assert trainer.train_dataloader is not None
    return trainer.train_dataloader
