"""The papers' way to measure: a pass in inference mode over the training set, before every epoch."""

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, IterableDataset, Subset

from lit_lipschitz.errors import ConfigurationError


def inference_pass(trainer: Trainer, module: LightningModule) -> None:
    """Calls a module with the inputs of its training batches, and leaves it, and the random numbers, as they were.

    No gradients are recorded; dropout is off and BatchNorm uses its moving statistics. The batches come from
    ``lipschitz_dataloader()`` of the datamodule or the module, where there is one (the bundled data modules have one
    that neither shuffles nor augments), or else from a loader of its own over the data set of the training DataLoader,
    in its order; as many as an epoch of training has. A batch that is a tuple or a list gives its first element, any
    other is passed as it is. Each rank goes over its own share.

    Args:
        trainer: A trainer that is fitting the module.
        module: The module.

    Raises:
        ConfigurationError: There is no way to read the training set without disturbing the training, or the module's
            forward takes other arguments.
    """
    batches = _batches(trainer, module)
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), isolate_rng(), trainer.precision_plugin.forward_context():
            for number, batch in enumerate(batches):
                if number >= trainer.num_training_batches:
                    break
                batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
                _call(module, batch[0] if isinstance(batch, (tuple, list)) else batch)
    finally:
        for part, training in modes:
            part.training = training


def _call(module: LightningModule, inputs: Any) -> None:
    try:
        module(inputs)
    except TypeError as error:
        raise ConfigurationError(
            f"LipschitzLR(measure='pass') calls {type(module).__name__} with the first element of a batch, and its "
            f"forward does not take that ({error}); let lipschitz_dataloader() give what it takes, or use "
            "measure='running'"
        ) from error


def _batches(trainer: Trainer, module: LightningModule) -> Iterable[Any]:
    for source in (trainer.datamodule, module):  # type: ignore[attr-defined]
        if callable(make := getattr(source, "lipschitz_dataloader", None)):
            return make()
    loader: Any = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise ConfigurationError(
            "LipschitzLR(measure='pass') reads the training set once more before every epoch, and a "
            f"{type(loader).__name__} can't be read without disturbing the training: give the datamodule or the module "
            "a method lipschitz_dataloader() that returns batches of it, or use measure='running'"
        )
    # Training's own loader has workers, samplers and generators under way.
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    data = loader.dataset
    if trainer.world_size > 1:
        data = Subset(data, range(trainer.global_rank, len(data), trainer.world_size))  # type: ignore[arg-type]
    return DataLoader(data, batch_size=size, collate_fn=loader.collate_fn, num_workers=loader.num_workers)
