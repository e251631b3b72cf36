"""The bundled data sets as LightningDataModules, with a loader and augmentation for device-resident tensors."""

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
