"""The training set read once more: for the papers' way to measure, and for BatchNorm of averaged weights."""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, IterableDataset, Subset

from lit_lipschitz.errors import ConfigurationError

NORM_BATCHES = 50
"""Batches that BatchNorm's statistics are taken from, as Schedule-Free's authors do."""


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
    if batches is None:
        raise ConfigurationError(
            "LipschitzLR(measure='pass') reads the training set once more before every epoch, and "
            f"{_unreadable(trainer)}, or use measure='running'"
        )
    with _aside(trainer, module):
        module.eval()
        most = trainer.num_training_batches
        for inputs in islice(_inputs(trainer, batches), None if math.isinf(most) else int(most)):
            _call(module, inputs)


def refresh_norms(trainer: Trainer, module: LightningModule, norms: Sequence[_BatchNorm]) -> None:
    """Gives BatchNorm the statistics of the weights as they are, in the place of those that it had moved with.

    For weights that are an average of those that were trained. The statistics are the means over
    :data:`NORM_BATCHES` batches of the training set and over all ranks, all else being in inference mode. The batches
    are the first ones of ``lipschitz_dataloader()``, as for :func:`inference_pass`, or else drawn from the data set of
    the training DataLoader. Where the training set can't be read without disturbing the training, the statistics are
    left as they are, with a warning.

    Args:
        trainer: A trainer that is fitting the module.
        module: The module.
        norms: Those of its parts that are to have new statistics, all of which keep some.
    """
    if not norms:
        return
    batches = _batches(trainer, module, drawn=True)
    if batches is None:
        warnings.warn(
            "BatchNorm's statistics are those of the weights that were trained, not of their average, which is what is "
            f"evaluated and saved: they are measured over the training set, and {_unreadable(trainer)}",
            stacklevel=2,
        )
        return
    momenta = [norm.momentum for norm in norms]
    try:
        with _aside(trainer, module):
            module.eval()
            for norm in norms:
                norm.train().reset_running_stats()
                norm.momentum = None  # type: ignore[assignment]  # the mean over all batches
            for inputs in islice(_inputs(trainer, batches), int(min(NORM_BATCHES, trainer.num_training_batches))):
                module(inputs)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    for norm in norms:
        for statistic in (norm.running_mean, norm.running_var):
            assert statistic is not None
            statistic.copy_(trainer.strategy.reduce(statistic.clone(), reduce_op="mean"))


@contextmanager
def _aside(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Records no gradients, and leaves the modes of a module's parts and the random numbers as they were."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        with torch.no_grad(), isolate_rng(), trainer.precision_plugin.forward_context():
            yield
    finally:
        for part, training in modes:
            part.training = training


def _inputs(trainer: Trainer, batches: Iterable[Any]) -> Iterator[Any]:
    """What the module is called with, where it is."""
    for batch in batches:
        batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
        yield batch[0] if isinstance(batch, (tuple, list)) else batch


def _call(module: LightningModule, inputs: Any) -> None:
    try:
        module(inputs)
    except TypeError as error:
        raise ConfigurationError(
            f"LipschitzLR(measure='pass') calls {type(module).__name__} with the first element of a batch, and its "
            f"forward does not take that ({error}); let lipschitz_dataloader() give what it takes, or use "
            "measure='running'"
        ) from error


def _batches(trainer: Trainer, module: LightningModule, drawn: bool = False) -> Iterable[Any] | None:
    """Batches of the training set, apart from those of the training; None where there is no way to have them.

    Args:
        trainer: The trainer.
        module: The module.
        drawn: Of a DataLoader's data set, whether to draw them, each rank as many, and no rest of one row, in place of
            all in their order.
    """
    for source in (trainer.datamodule, module):  # type: ignore[attr-defined]
        if callable(make := getattr(source, "lipschitz_dataloader", None)):
            return make()
    loader: Any = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    if size is None:
        return None
    # Training's own loader has workers, samplers and generators under way.
    indices = torch.as_tensor(getattr(loader.sampler, "indices", range(len(loader.dataset))))  # type: ignore[arg-type]
    if drawn:
        indices = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))]
        indices = indices[: max(len(indices) // trainer.world_size, 1) * trainer.world_size]
    share = indices[trainer.global_rank :: trainer.world_size].tolist()
    return DataLoader(
        Subset(loader.dataset, share),
        batch_size=size,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        drop_last=drawn and len(share) >= size,
    )


def _unreadable(trainer: Trainer) -> str:
    """Why there is none, and what to do."""
    return (
        f"a {type(trainer.train_dataloader).__name__} can't be read without disturbing the training: give the "
        "datamodule or the module a method lipschitz_dataloader() that returns batches of it"
    )
