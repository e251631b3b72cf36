"""Batches from a data set that lives as tensors on the training device."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lit_lipschitz.errors import ConfigurationError

Transform = Callable[[Tensor, torch.Generator], Tensor]


class DeviceLoader:
    """An iterable of (images, labels) batches, cut from resident tensors and transformed a batch at a time.

    With ``shuffle`` an epoch is a permutation that depends on the seed and the epoch alone, of which rank r of R takes
    every R-th example from the r-th on: R ranks with batch size B see the same global batches as one with R B. What is
    random in a transform depends on seed, epoch, batch and rank. A checkpoint in mid-epoch resumes at the next batch.

    Args:
        images: Shape (examples, ...), on the device where batches are wanted.
        labels: Shape (examples,), on the same device.
        batch_size: Examples in a batch, on each rank.
        transform: Called with a batch of images and a seeded generator.
        shuffle: Whether to permute each epoch, and to drop the examples that fill no global batch.
        seed: Seed of the permutations and the transforms.
        epoch: Called when an iteration starts; says which epoch it is.
        rank: Index of this process.
        world_size: Number of processes.
        num_workers: Processes that prepare batches (of tensors on the CPU); 0 prepares them in this one.

    Raises:
        ConfigurationError: A training set does not fill one global batch, or ``batch_size`` is below 1.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        transform: Transform,
        *,
        shuffle: bool = False,
        seed: int = 0,
        epoch: Callable[[], int] = lambda: 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
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
        self._current = (0, 0)  # epoch under way, batches handed out
        self._resume: tuple[int, int] | None = None

    def __len__(self) -> int:
        """Batches in an epoch, on this rank."""
        if self.shuffle:
            return len(self.images) // (self.batch_size * self.world_size)
        share = len(range(self.rank, len(self.images), self.world_size))
        return -(-share // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Starts the epoch that :attr:`epoch` names, at the batch where a loaded checkpoint left it."""
        epoch, start = self.epoch(), 0
        if self._resume is not None:
            begun, position = self._resume
            start = position if begun == epoch and position < len(self) else 0
            self._resume = None
        # One worker each takes every n-th batch, and DataLoader asks them in turn, so the order is the same.
        batches: Any = self._batches(epoch, start)
        if self.num_workers:
            source = _WorkerBatches(self, epoch, start)
            batches = DataLoader(source, batch_size=None, num_workers=self.num_workers)
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
        """Where the iteration stands."""
        return {"epoch": self._current[0], "position": self._current[1]}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Makes the next iteration go on where the state was taken, if it is of the same epoch."""
        self._resume = (state["epoch"], state["position"])


class _WorkerBatches(IterableDataset[tuple[Tensor, Tensor]]):
    """The batches of one epoch, shared out among worker processes."""

    def __init__(self, loader: DeviceLoader, epoch: int, start: int) -> None:
        self.loader, self.current, self.start = loader, epoch, start

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = torch.utils.data.get_worker_info()
        offset, step = (worker.id, worker.num_workers) if worker else (0, 1)
        return self.loader._batches(self.current, self.start + offset, step)

    def __getstate__(self) -> dict[str, Any]:
        """Without what names the trainer, which no other process needs."""
        loader = object.__new__(DeviceLoader)
        loader.__dict__.update(self.loader.__dict__, epoch=None)
        return {**self.__dict__, "loader": loader}


def fold(*numbers: int) -> int:
    """One seed from several numbers, different for different ones."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % 2**63
    return seed
