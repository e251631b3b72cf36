"""Data, callbacks and the plain training loop of throughput.py; its configs name the classes by their paths."""

import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from lit_lipschitz import CIFAR10DataModule, LinearWarmupDecay, MNISTDataModule
from lit_lipschitz.module import seed_device

EXAMPLES = 16_384
"""Number of random images in place of a data set; the time does not depend on the pixels."""


def random_pixels(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Images of dtype uint8 and labels, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (EXAMPLES, *shape), dtype=torch.uint8, generator=generator)
    return images, torch.randint(10, (EXAMPLES,), generator=generator)


class RandomMNIST(MNISTDataModule):
    """MNIST's shapes, augmentation and loader."""

    def prepare_data(self) -> None:
        """Nothing to download."""

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """Random images."""
        return random_pixels(self.image_shape)


class RandomCIFAR10(CIFAR10DataModule):
    """CIFAR-10's shapes, augmentation and loader."""

    def prepare_data(self) -> None:
        """Nothing to download."""

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """Random images."""
        return random_pixels(self.image_shape)


class PerImage(L.LightningDataModule):
    """The usual way: torchvision's transforms image by image, in the worker processes of a DataLoader.

    Args:
        data: ``"mnist"`` or ``"cifar10"``, for shapes and augmentation.
        batch_size: Images in a batch.
        num_workers: Processes.
    """

    def __init__(self, data: str = "cifar10", batch_size: int = 128, num_workers: int = 2) -> None:
        super().__init__()
        kind = RandomMNIST if data == "mnist" else RandomCIFAR10
        augmentation: list[nn.Module] = (
            [v2.RandomAffine(degrees=15, translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=_BILINEAR)]
            if data == "mnist"
            else [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
        )
        scaling = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(kind.mean), list(kind.std))]
        self._set = _Transformed(*random_pixels(kind.image_shape), v2.Compose([*augmentation, *scaling]))
        self._options = {"batch_size": batch_size, "num_workers": num_workers, "drop_last": True}

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches."""
        pinned = torch.cuda.is_available()
        return DataLoader(self._set, shuffle=True, pin_memory=pinned, **self._options)


_BILINEAR = v2.InterpolationMode.BILINEAR


class _Transformed(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, images: Tensor, labels: Tensor, transform: Callable[[Tensor], Tensor]) -> None:
        self._images, self._labels, self._transform = images, labels, transform

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._transform(self._images[index]), self._labels[index]


class Turns(L.Callback):
    """Takes turns with the plain loop: after each step of the trainer one of the loop, and both are timed.

    A slow phase of the machine slows both. On a GPU a turn is ``stride`` steps, with a synchronisation at its end.

    Args:
        skip: Turns at the start that are not counted.
        stride: Steps in a turn.
    """

    partner: ClassVar[Iterator[None] | None] = None
    """The loop, one item a step; set before the trainer is started."""
    last: ClassVar["Turns | None"] = None
    """The instance that the trainer made."""

    def __init__(self, skip: int = 4, stride: int = 1) -> None:
        self._skip, self._stride = skip, stride
        self._step = 0
        self._mark: _Moment | None = None
        self._loop: _Moment | None = None
        self.turns: list[tuple[_Moment, _Moment]] = []
        self.end = 0.0
        type(self).last = self

    def on_train_batch_start(self, *_: object) -> None:
        """Ends the trainer's turn, takes the loop's, and starts the trainer's next one."""
        if self._step % self._stride == 0:
            now = _Moment()
            if self._mark is not None and self._loop is not None and self._step > self._skip * self._stride:
                self.turns.append((self._loop, now - self._mark))
            partner = type(self).partner
            assert partner is not None
            now = _Moment()
            for _step in range(self._stride):
                next(partner)
            self._loop = _Moment() - now
            self._mark = _Moment()
        self._step += 1

    def on_train_batch_end(self, *_: object) -> None:
        """Records the time, for the seconds after the last step."""
        self._ended = time.perf_counter()

    def on_train_end(self, *_: object) -> None:
        """Seconds from the last step to the end: the checkpoint, the lines, the loggers."""
        self.end = _Moment().wall - self._ended

    def seconds(self) -> dict[str, list[float]]:
        """Seconds a step of the loop and of the trainer, in wall time and in CPU time of this thread."""
        of = {"loop": 0, "trainer": 1}
        return {
            f"{clock} {who}": [getattr(turn[side], clock) / self._stride for turn in self.turns]
            for who, side in of.items()
            for clock in ("wall", "cpu")
        }


class _Moment:
    """A point in time, or the difference of two, after a synchronisation of the device."""

    def __init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.wall, self.cpu = time.perf_counter(), time.thread_time()

    def __sub__(self, other: "_Moment") -> "_Moment":
        difference = object.__new__(_Moment)
        difference.wall, difference.cpu = self.wall - other.wall, self.cpu - other.cpu
        return difference


def plain_loop(
    data: CIFAR10DataModule | MNISTDataModule,
    network: nn.Module,
    steps: int,
    device: torch.device,
    precision: str,
    compiled: bool,
) -> Iterator[None]:
    """A minimal PyTorch loop with the same batches, augmentation, loss, optimizer and schedule."""
    data.setup("fit")
    images, labels = (part.to(device) for part in data.splits["train"])
    transform = data._transform(augment=True, device=device)
    layout = torch.channels_last if device.type == "cuda" else torch.preserve_format
    network = network.to(device, memory_format=layout)  # type: ignore[call-overload]
    run: Callable[[Tensor], Tensor] = torch.compile(network) if compiled else network
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    schedule = LinearWarmupDecay(optimizer, total_steps=steps)
    generator = torch.Generator(device=device)
    half = torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16-mixed")
    total, correct = torch.zeros((), device=device), torch.zeros((), device=device)
    order = torch.randperm(len(images)).to(device)
    for step in range(steps):
        at = step * data.batch_size % (len(images) - data.batch_size + 1)
        index = order[at : at + data.batch_size]
        generator.manual_seed(step)
        seed_device(step, device)
        batch, targets = transform(images[index], generator), labels[index]
        optimizer.zero_grad()
        with half:
            logits = run(batch.contiguous(memory_format=layout) if device.type == "cuda" else batch)
            loss = F.cross_entropy(logits, targets)
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            total += loss
            correct += (logits.argmax(1) == targets).sum()
        yield
