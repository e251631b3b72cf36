"""A loader of seeded, sharded and resumable batches from tensors that stay on the training device."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lit_lipschitz.errors import ConfigurationError

Transform = Callable[[Tensor, torch.Generator], Tensor]


class DeviceLoader:
    """An iterable of (images, labels) batches, indexed from resident tensors and transformed batch by batch.

    With ``shuffle`` an epoch is a permutation that depends only on the seed and the epoch. Rank r of R has every R-th
    example of it, from the r-th: R ranks with batch size B have the same global batches as one rank with R B. The
    generator of a transform is seeded by seed, epoch, batch and rank. A checkpoint in mid-epoch resumes at the next
    batch.

    Raises:
        ConfigurationError: The examples to shuffle do not fill one global batch, or ``batch_size`` is below 1.

    Example:
        >>> pixels, labels = torch.arange(5.0)[:, None], torch.arange(5)
        >>> loader = DeviceLoader(pixels, labels, batch_size=2, transform=lambda batch, generator: batch / 4)
        >>> [labels.tolist() for _, labels in loader]
        [[0, 1], [2, 3], [4]]
    """

    def __init__(
        self,
        images: Tensor,  # of shape (examples, ...), on the device of the batches
        labels: Tensor,  # of shape (examples,), on the same device
        batch_size: int,  # examples on each rank
        transform: Transform,  # of a batch of images, with a seeded generator
        *,
        shuffle: bool = False,  # whether to permute the examples every epoch and drop the last incomplete global batch
        seed: int = 0,  # of the permutations and the transforms
        epoch: Callable[[], int] = lambda: 0,  # returns the current epoch, at the start of an iteration
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,  # processes that prepare batches of CPU tensors; 0 prepares them in this process
    ) -> None:
        if batch_size < 1:
            raise ConfigurationError(f"batch_size={batch_size}: expected at least 1")
        if shuffle and len(images) < batch_size * world_size:
            raise ConfigurationError(
                f"batch_size={batch_size} on {world_size} device(s) makes global batches of {batch_size * world_size}, "
                f"and the training set has {len(images)} examples: choose a smaller data.batch_size"
            )
        self.images, self.labels = images, labels
        self.batch_size, self.transform, self.shuffle, self.seed = batch_size, transform, shuffle, seed
        self.epoch, self.rank, self.world_size, self.num_workers = epoch, rank, world_size, num_workers
        self._current = self._resume = (0, 0)  # epoch, batches of it that were returned

    def __len__(self) -> int:
        """Batches per epoch on this rank."""
        if self.shuffle:
            return len(self.images) // (self.batch_size * self.world_size)
        share = len(range(self.rank, len(self.images), self.world_size))
        return -(-share // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterates over the epoch that :attr:`epoch` returns, from the batch at which a loaded checkpoint stopped."""
        epoch, (begun, position) = self.epoch(), self._resume
        self._resume = (0, 0)
        start = position if begun == epoch and position < len(self) else 0
        batches: Any = self._batches(epoch, start)
        if self.num_workers:
            loader = copy.copy(self)
            loader.epoch = partial(int, epoch)  # can be pickled, unlike one that refers to the trainer
            batches = DataLoader(_WorkerBatches(loader, start), batch_size=None, num_workers=self.num_workers)
        for position, batch in enumerate(batches, start=start):
            self._current = (epoch, position + 1)
            yield batch

    def _batches(self, epoch: int, start: int, step: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(len(self.images))
        if self.shuffle:
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(fold(self.seed, epoch)))
        share = order[self.rank :: self.world_size].to(self.images.device)
        generator = torch.Generator(device=self.images.device)
        for position in range(start, len(self), step):
            index = share[position * self.batch_size : (position + 1) * self.batch_size]
            generator.manual_seed(fold(self.seed, epoch, position, self.rank))
            yield self.transform(self.images[index], generator), self.labels[index]

    def state_dict(self) -> dict[str, int]:
        """The epoch, and the number of its batches so far."""
        return {"epoch": self._current[0], "position": self._current[1]}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resumes the next iteration at the state's position, if it is in the same epoch."""
        self._resume = (state["epoch"], state["position"])


class _WorkerBatches(IterableDataset[tuple[Tensor, Tensor]]):
    """The batches of one epoch: worker i of n prepares every n-th, and DataLoader asks them in turn."""

    def __init__(self, loader: DeviceLoader, start: int) -> None:
        self.loader, self.start = loader, start

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = torch.utils.data.get_worker_info()
        offset, step = (worker.id, worker.num_workers) if worker else (0, 1)
        return self.loader._batches(self.loader.epoch(), self.start + offset, step)


def fold(*numbers: int) -> int:
    """Combines several numbers into one seed; different numbers give different seeds."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % 2**63
    return seed
