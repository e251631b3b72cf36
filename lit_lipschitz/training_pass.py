"""A no-grad pass over the training set: for measurement as in the papers, and to re-estimate BatchNorm's statistics."""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, IterableDataset, Subset

from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.lightning_api import LightningModule, Trainer, isolate_rng

BATCH_NORM_BATCHES = 50
"""Batches that BatchNorm's statistics are estimated from, as many as Schedule-Free's authors use."""

_FORWARD_ERRORS = (TypeError, LookupError, AttributeError, NotImplementedError)
"""What a module raises whose forward takes other inputs or is missing."""


def inference_pass(trainer: Trainer, module: LightningModule) -> None:
    """Calls a module with the inputs of its training batches; the module and the random numbers stay as they were.

    No gradients are recorded; dropout is off and BatchNorm uses its running statistics. The batches come from
    ``lipschitz_dataloader()`` of the datamodule or the module if one of them has it (the bundled data modules have one
    that neither shuffles nor augments), otherwise from a separate loader over the data set of the training DataLoader,
    in its order; as many as an epoch of training has. A batch that is a tuple or a list gives its first element, any
    other is passed as it is. Each rank reads its own share.

    Raises:
        ConfigurationError: The training set can't be read without disturbing the training, or the module's forward
            takes other arguments.
    """
    batches = _batches(trainer, module)
    if batches is None:
        raise ConfigurationError(
            "LipschitzLR(measure='pass') reads the training set again before every epoch, and "
            f"{_unreadable(trainer)}, or use measure='running'"
        )
    with _undisturbed(trainer, module):
        module.eval()
        most = trainer.num_training_batches
        for inputs in islice(_inputs(trainer, batches), None if math.isinf(most) else int(most)):
            try:
                module(inputs)
            except TypeError as error:
                raise ConfigurationError(
                    f"LipschitzLR(measure='pass') calls {type(module).__name__} with the first element of a batch, and "
                    f"its forward does not take that ({error}); let lipschitz_dataloader() give what it takes, or use "
                    "measure='running'"
                ) from error


def reestimate_batch_norm(trainer: Trainer, module: LightningModule, layers: Sequence[_BatchNorm]) -> None:
    """Measures BatchNorm's statistics again, for weights that they have not moved with, such as averaged weights.

    The statistics of the layers, which all track them, are the means over :data:`BATCH_NORM_BATCHES` batches of the
    training set and over all ranks, with everything else in inference mode. The batches are the first ones of
    ``lipschitz_dataloader()``, as for :func:`inference_pass`, or else drawn from the data set of the training
    DataLoader. The statistics stay as they are, with a warning, where the training set can't be read again without
    disturbing the training or the module's forward takes other arguments, and for layers that forward doesn't use.
    """
    batches = _batches(trainer, module, shuffled=True)
    if batches is None:
        _warn_of_old_statistics(_unreadable(trainer))
        return
    try:
        with _undisturbed(trainer, module), _means_over_batches(layers):
            module.eval()
            for layer in layers:
                layer.train()
            most = int(min(BATCH_NORM_BATCHES, trainer.num_training_batches))
            for inputs in islice(_inputs(trainer, batches), most):
                module(inputs)
    except _FORWARD_ERRORS as error:
        _warn_of_old_statistics(
            f"{type(module).__name__} can't be called with the first element of a batch ({error}): let "
            "lipschitz_dataloader() give what its forward takes"
        )
        return
    for layer in layers:
        for statistic in (layer.running_mean, layer.running_var):
            assert statistic is not None
            statistic.copy_(trainer.strategy.reduce(statistic.clone(), reduce_op="mean"))


@contextmanager
def _means_over_batches(layers: Sequence[_BatchNorm]) -> Iterator[None]:
    """Has layers take the means over the batches inside; keeps the old statistics on an error, or without a batch."""
    old = [(layer.momentum, {name: buffer.clone() for name, buffer in layer.named_buffers()}) for layer in layers]
    finished = False
    try:
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # type: ignore[assignment]
        yield
        finished = True
    finally:
        for layer, (momentum, buffers) in zip(layers, old, strict=True):
            layer.momentum = momentum
            if not finished or not layer.num_batches_tracked:
                layer.load_state_dict(buffers, strict=False)


def _warn_of_old_statistics(reason: str) -> None:
    warnings.warn(
        "BatchNorm's statistics are those of the training weights, not of the averaged weights that are evaluated and "
        f"saved: they are measured over the training set, and {reason}",
        stacklevel=3,
    )


@contextmanager
def _undisturbed(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Records no gradients, and restores the modes of a module's parts and the random numbers."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        with torch.no_grad(), isolate_rng(), trainer.precision_plugin.forward_context():
            yield
    finally:
        for part, training in modes:
            part.training = training


def _inputs(trainer: Trainer, batches: Iterable[Any]) -> Iterator[Any]:
    """What the module is called with, on its device."""
    for batch in batches:
        batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
        yield batch[0] if isinstance(batch, (tuple, list)) else batch


def _batches(trainer: Trainer, module: LightningModule, shuffled: bool = False) -> Iterable[Any] | None:
    """Batches of the training set from a loader separate from that of the training; None if there can't be one.

    ``shuffled``: by a fixed seed, and cut to full batches, as many on each rank.
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
    # The training loader's workers, samplers and generators are in use.
    indices = torch.as_tensor(getattr(loader.sampler, "indices", range(len(loader.dataset))))  # type: ignore[arg-type]
    if shuffled:
        indices = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))]
        indices = indices[: max(len(indices) // trainer.world_size, 1) * trainer.world_size]
    share = indices[trainer.global_rank :: trainer.world_size].tolist()
    return DataLoader(
        Subset(loader.dataset, share),
        batch_size=size,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        drop_last=shuffled and len(share) >= size,
    )


def _unreadable(trainer: Trainer) -> str:
    """Why the training set can't be read again, and what to do."""
    return (
        f"a {type(trainer.train_dataloader).__name__} can't be read without disturbing the training: give the "
        "datamodule or the module a method lipschitz_dataloader() that returns batches of it"
    )
