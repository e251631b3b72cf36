"""Data sets as LightningDataModules, a loader over device-resident tensors, batched augmentation."""

from lit_lipschitz.data.datamodules import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    DigitsDataModule,
    FashionMNISTDataModule,
    ImageDataModule,
    MNISTDataModule,
)
from lit_lipschitz.data.loader import DeviceLoader

__all__ = [
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "DeviceLoader",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "ImageDataModule",
    "MNISTDataModule",
]
