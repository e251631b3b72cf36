"""Files of random images in the formats of MNIST and CIFAR."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets

TRAIN_IMAGES, TEST_IMAGES = 30, 10


def _idx(array: "np.ndarray[Any, Any]") -> bytes:
    """The IDX format of MNIST's files."""
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def write_idx(folder: Path, title: str = "MNIST") -> Path:
    """Writes a data set of MNIST's format; returns the folder of its files."""
    raw = folder / title / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for part, count in (("train", TRAIN_IMAGES), ("t10k", TEST_IMAGES)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = generator.integers(0, 10, count, dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(_idx(images))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(_idx(labels))
    return raw


def write_cifar(folder: Path, dataset: Any = datasets.CIFAR10, key: str = "labels", protocol: int = 2) -> Path:
    """Writes a data set of CIFAR's format; returns the folder of its files."""
    base = folder / dataset.base_folder
    base.mkdir(parents=True)
    generator = np.random.default_rng(0)
    train_files = len(dataset.train_list)
    for name, _ in (*dataset.train_list, *dataset.test_list):
        count = TRAIN_IMAGES // train_files if (name, _) in map(tuple, dataset.train_list) else TEST_IMAGES
        batch = {"data": generator.integers(0, 256, (count, 3072), dtype=np.uint8), key: list(range(count))}
        (base / name).write_bytes(pickle.dumps(batch, protocol=protocol))
    return base
