"""MNIST, Fashion-MNIST, CIFAR and scikit-learn's digits as LightningDataModules."""

import abc
import os
from pathlib import Path
from typing import ClassVar, Literal

import lightning as L
import torch
from torch import Tensor

from lit_lipschitz.data.augmentation import random_affine, random_crop, random_flip
from lit_lipschitz.data.loader import DeviceLoader, Transform
from lit_lipschitz.data.sources import SOURCES
from lit_lipschitz.errors import ConfigurationError, LitLipschitzError

Pixels = tuple[Tensor, Tensor]
"""uint8 images of shape (examples, channels, height, width) and int64 labels."""


class ImageDataModule(L.LightningDataModule, abc.ABC):
    """Small images for classification, kept as uint8 tensors on the training device.

    The validation set is split from the training set; the official test set is only used by ``test`` and ``predict``.

    Args:
        data_dir: Folder of the files; by default the environment variable LIT_LIPSCHITZ_DATA, or else ``data``.
        batch_size: Examples per batch on each device.
        val_split: Fraction of the training set used for validation, in [0, 1).
        seed: Seed of the split, of the permutations and of the augmentation.
        augment: Whether training images are augmented.
        preprocessing: ``"standard"``, or ``"papers"`` for that of the papers' runs: pixels / 255, and for CIFAR
            minus the mean training image, with shifts up to 10 % instead of the padded crop.
        train_subset: Number of examples sampled from the training set by the seed; by default all.
        download: Whether to download missing files.
        verify: Whether to compare files with torchvision's checksums; false accepts repacked mirrors.
        num_workers: Processes that prepare training batches on the CPU; 0 prepares them on the training device.

    Raises:
        ConfigurationError: An argument is out of range.
    """

    num_classes: ClassVar[int] = 10
    image_shape: ClassVar[tuple[int, int, int]]
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]
    centered: ClassVar[bool] = False

    def __init__(
        self,
        data_dir: str | None = None,
        batch_size: int = 128,
        val_split: float = 0.1,
        seed: int = 0,
        augment: bool = True,
        preprocessing: Literal["standard", "papers"] = "standard",
        train_subset: int | None = None,
        download: bool = True,
        verify: bool = True,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= val_split < 1:
            raise ConfigurationError(f"val_split={val_split}: expected a fraction of at least 0 and below 1")
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value < least:
                raise ConfigurationError(f"{name}={value}: expected at least {least}")
        if train_subset is not None and train_subset < 1:
            raise ConfigurationError(f"train_subset={train_subset}: expected at least 1, or null for all examples")
        if preprocessing not in ("standard", "papers"):
            raise ConfigurationError(f"preprocessing={preprocessing!r}: expected 'standard' or 'papers'")
        self.folder = Path(data_dir or os.environ.get("LIT_LIPSCHITZ_DATA") or "data")
        self.batch_size, self.val_split, self.seed, self.augment = batch_size, val_split, seed, augment
        self.preprocessing, self.train_subset = preprocessing, train_subset
        self.download, self.verify, self.num_workers = download, verify, num_workers
        self.splits: dict[str, Pixels] = {}  # "train", "val" and "test", as far as they are set up
        self._center: Tensor | None = None  # the mean training image, in [0, 1]
        self._training: DeviceLoader | None = None
        self._position: dict[str, int] = {}  # of a loaded checkpoint, for the next training loader

    @abc.abstractmethod
    def load(self, train: bool) -> Pixels:
        """Reads the training or the test set."""

    @abc.abstractmethod
    def augment_pixels(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augments a batch of float32 images with values in [0, 255]."""

    def augment_like_the_papers(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augments a batch after the scaling and centering of ``preprocessing="papers"``."""
        return self.augment_pixels(images, generator)

    def setup(self, stage: str) -> None:
        """Reads the data of the stage and splits off the validation set."""
        self._find_center()
        if stage in ("fit", "validate") and "train" not in self.splits:
            images, labels = self.load(train=True)
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))
            order = order[: self.train_subset]
            held_out = round(len(order) * self.val_split)
            val, train = order[:held_out], order[held_out:]
            none_left = f"val_split={self.val_split} leaves none of {len(order)} examples"
            if not len(train):
                raise ConfigurationError(f"{none_left} to train on: choose a smaller one")
            if stage == "validate" and not len(val):
                raise ConfigurationError(f"{none_left} to validate on: choose a larger one")
            self.splits |= {"train": (images[train], labels[train]), "val": (images[val], labels[val])}
        if stage in ("test", "predict") and "test" not in self.splits:
            self.splits["test"] = self.load(train=False)

    def _find_center(self) -> None:
        """Computes the mean training image for ``preprocessing="papers"``, once."""
        if self.preprocessing == "papers" and self.centered and self._center is None:
            images, _ = self.load(train=True)
            self._center = (images.sum(dim=0, dtype=torch.int64) / (255 * len(images))).float()

    def train_dataloader(self) -> DeviceLoader:
        """Shuffled, augmented batches of the training set."""
        self._training = self._loader("train", shuffle=True)
        if self._position:
            self._training.load_state_dict(self._position)
            self._position = {}
        return self._training

    def state_dict(self) -> dict[str, int]:
        """Position of the training in its epoch."""
        # Lightning does not restore the loader's state if a scheduler's length was requested before.
        return self._training.state_dict() if self._training is not None else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Resumes the next training loader at the state's position."""
        self._position = dict(state_dict)

    def lipschitz_dataloader(self) -> DeviceLoader:
        """Batches of the training set in order, without augmentation, for ``LipschitzLR(measure="pass")``."""
        return self._loader("train")

    def val_dataloader(self) -> DeviceLoader | list[DeviceLoader]:
        """Batches of the validation set; an empty list if ``val_split`` is 0."""
        return self._loader("val") if len(self.splits["val"][0]) else []

    def test_dataloader(self) -> DeviceLoader:
        """Batches of the official test set."""
        return self._loader("test")

    def predict_dataloader(self) -> DeviceLoader:
        """Batches of the official test set, in order."""
        return self.test_dataloader()

    def normalisation(self) -> tuple[Tensor, Tensor]:
        """What is subtracted from pixels / 255, and what the difference is divided by."""
        self._find_center()
        if self.preprocessing == "papers":
            return torch.zeros(()) if self._center is None else self._center, torch.ones(())
        return torch.tensor(self.mean).reshape(-1, 1, 1), torch.tensor(self.std).reshape(-1, 1, 1)

    def _loader(self, split: str, shuffle: bool = False) -> DeviceLoader:
        trainer = self.trainer
        device = trainer.strategy.root_device if trainer else torch.device("cpu")
        num_workers = self.num_workers if shuffle else 0
        images, labels = (part if num_workers else part.to(device) for part in self.splits[split])
        return DeviceLoader(
            images,
            labels,
            self.batch_size,
            self._transform(augment=shuffle and self.augment, device=images.device),
            shuffle=shuffle,
            seed=self.seed,
            epoch=(lambda: trainer.current_epoch) if trainer else lambda: 0,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
            num_workers=num_workers,
        )

    def _transform(self, augment: bool, device: torch.device) -> Transform:
        center = torch.zeros((), device=device) if self._center is None else self._center.to(device)
        mean, std = (255 * torch.tensor(values, device=device).reshape(-1, 1, 1) for values in (self.mean, self.std))

        def standard(images: Tensor, generator: torch.Generator) -> Tensor:
            images = images.float()
            if augment:
                images = self.augment_pixels(images, generator)
            return images.sub_(mean).div_(std)

        def like_the_papers(images: Tensor, generator: torch.Generator) -> Tensor:
            images = images.float().div_(255).sub_(center)
            return self.augment_like_the_papers(images, generator) if augment else images

        return like_the_papers if self.preprocessing == "papers" else standard


class FileDataModule(ImageDataModule):
    """A data set in files that torchvision downloads; arguments as for :class:`ImageDataModule`."""

    source: ClassVar[str]

    def prepare_data(self) -> None:
        """Downloads missing files, on one process per node."""
        SOURCES[self.source].fetch(self.folder, self.download)

    def load(self, train: bool) -> Pixels:
        """Reads the training or the test set from its files."""
        return SOURCES[self.source].load(self.folder, train, self.verify)


class MNISTDataModule(FileDataModule):
    """MNIST: 60,000 + 10,000 digits, 1x28x28; rotation up to 15 degrees, zoom and shift of 10 %."""

    source = "MNIST"
    image_shape = (1, 28, 28)
    mean, std = (0.1307,), (0.3081,)

    def augment_pixels(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Rotates, zooms and shifts."""
        return random_affine(images, degrees=15, zoom=0.1, shift=0.1, generator=generator)


class FashionMNISTDataModule(FileDataModule):
    """Fashion-MNIST: 60,000 + 10,000 images of clothes, 1x28x28; crop with padding 2, and flip."""

    source = "FashionMNIST"
    image_shape = (1, 28, 28)
    mean, std = (0.2860,), (0.3530,)

    def augment_pixels(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Crops and flips."""
        return random_flip(random_crop(images, 2, generator), generator)


class CIFAR10DataModule(FileDataModule):
    """CIFAR-10: 50,000 + 10,000 images of 10 classes, 3x32x32; crop with padding 4, and flip."""

    source = "CIFAR10"
    image_shape = (3, 32, 32)
    centered = True
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

    def augment_pixels(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Crops and flips."""
        return random_flip(random_crop(images, 4, generator), generator)

    def augment_like_the_papers(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Shifts up to 10 %, with the nearest pixel outside the image, and flips."""
        images = random_affine(images, degrees=0, zoom=0, shift=0.1, generator=generator, outside="border")
        return random_flip(images, generator)


class CIFAR100DataModule(CIFAR10DataModule):
    """CIFAR-100: 50,000 + 10,000 images of 100 classes, 3x32x32; crop with padding 4, and flip."""

    source = "CIFAR100"
    num_classes = 100
    mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


class DigitsDataModule(ImageDataModule):
    """Digits: the 1,797 handwritten digits of scikit-learn, 1x8x8; rotation up to 10 degrees, zoom and shift of 10 %.

    A fifth of them, the same for every seed, is the test set. Nothing is downloaded: ``data_dir``, ``download`` and
    ``verify`` have no effect.
    """

    image_shape = (1, 8, 8)
    mean, std = (0.3053,), (0.3760,)

    def load(self, train: bool) -> Pixels:
        """Reads the digits from scikit-learn."""
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError:
            raise LitLipschitzError(
                "the Digits data come with scikit-learn, which is not installed: pip install 'lit-lipschitz[digits]'"
            ) from None
        pixels, labels = load_digits(return_X_y=True)
        rows = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)[0 if train else 1]
        # scikit-learn's values are 0 to 16.
        images = torch.from_numpy(pixels[rows]).mul(16).clamp(max=255).to(torch.uint8)
        return images.reshape(-1, 1, 8, 8), torch.from_numpy(labels[rows]).long()

    def augment_pixels(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Rotates, zooms and shifts."""
        return random_affine(images, degrees=10, zoom=0.1, shift=0.1, generator=generator)
