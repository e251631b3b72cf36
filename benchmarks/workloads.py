"""What throughput.py trains, by each of the ways that it compares; class paths of its configs name what is here."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from lit_lipschitz import CIFAR10DataModule, LinearWarmupDecay, MNISTDataModule
from lit_lipschitz.module import seed_device

EXAMPLES = 16_384
"""Random images that stand for a data set; what is in them makes no difference to the time."""


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
    """The customary way: torchvision's transforms image by image, in the worker processes of a DataLoader.

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


class Clock(L.Callback):
    """Seconds of each step, from the start of one batch to the start of the next; waits for a GPU before it looks.

    Args:
        skip: Steps at the start that are not counted.
        stride: Steps between two looks.
    """

    last: "Clock | None" = None
    """The clock of the newest run, for who has started that through the command."""

    def __init__(self, skip: int = 4, stride: int = 1) -> None:
        self._skip, self._stride = skip, stride
        self._looks: list[tuple[float, float]] = []
        self._step = 0
        self.end = 0.0
        type(self).last = self

    def look(self) -> None:
        """Starts a step; to be called once more after the last one."""
        if self._step >= self._skip and (self._step - self._skip) % self._stride == 0:
            self._looks.append((_now(), time.thread_time()))
        self._step += 1

    def seconds(self, cpu: bool = False) -> list[float]:
        """The steps that were counted, each the mean of a stride; of the wall's clock or of this thread's."""
        pairs = zip(self._looks, self._looks[1:], strict=False)
        return [(later[cpu] - earlier[cpu]) / self._stride for earlier, later in pairs]

    def on_train_batch_start(self, *_: object) -> None:
        """A step starts."""
        self.look()

    def on_train_batch_end(self, *_: object) -> None:
        """Notes the time, for what comes after the last step."""
        self._ended = time.perf_counter()

    def on_train_end(self, *_: object) -> None:
        """Seconds from the last step to the end: the checkpoint, the lines, the loggers."""
        self.end = _now() - self._ended


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def by_hand(
    data: CIFAR10DataModule | MNISTDataModule,
    network: nn.Module,
    steps: int,
    clock: Clock,
    device: torch.device,
    precision: str,
    compiled: bool,
) -> None:
    """The loop that a person in a hurry writes: the same batches, augmentation, loss, optimizer and schedule."""
    data.setup("fit")
    assert data._train is not None
    images, labels = (part.to(device) for part in data._train)
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
        clock.look()
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
    clock.look()


def summary(seconds: list[float]) -> tuple[float, float, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return low, middle, high
