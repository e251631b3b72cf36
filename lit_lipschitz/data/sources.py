"""Reads the files of MNIST-like and CIFAR-like data sets as uint8 tensors; torchvision downloads and verifies them."""

import os
import pickle
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import check_md5

from lit_lipschitz.errors import DataError

HOW_TO_POINT = "point to a folder that has them with --data.data_dir or the environment variable LIT_LIPSCHITZ_DATA"


@dataclass(frozen=True)
class Source:
    """A data set in files that torchvision can download."""

    title: str
    download: Callable[[str], Any]  # downloads the files into a folder, in torchvision's layout
    train: tuple[str, ...]  # files of the training set, relative to the data folder
    test: tuple[str, ...]
    checksums: dict[str, str]  # MD5 by file, where torchvision has one
    read: Callable[[tuple[Path, ...]], tuple[Tensor, Tensor]]  # from the files of a set to images and labels

    def fetch(self, folder: Path, download: bool) -> None:
        """Downloads missing files, or raises a DataError if it is not to or if that fails.

        Files are downloaded to a temporary folder and moved at the end, so that a failure leaves nothing behind.
        """
        missing = [name for name in (*self.train, *self.test) if not (folder / name).is_file()]
        if not missing:
            return
        if not download:
            raise self._missing(folder, missing, "data.download is off")
        made = _make_folder(folder, self.title)
        try:
            with tempfile.TemporaryDirectory(prefix=".download-", dir=folder, ignore_cleanup_errors=True) as staging:
                self.download(staging)
                for name in missing:
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(Path(staging, name), folder / name)
        except PermissionError as error:
            raise DataError(
                f"{self.title}: no permission to write to {folder} ({error.strerror}); {HOW_TO_POINT}"
            ) from None
        except Exception as error:  # of urllib, sockets or torchvision
            raise self._missing(folder, missing, f"downloading failed: {_first_line(error)}") from None
        finally:
            for path in made:
                with suppress(OSError):
                    path.rmdir()

    def load(self, folder: Path, train: bool, verify: bool) -> tuple[Tensor, Tensor]:
        """Reads the training or the test set: uint8 images (examples, channels, height, width) and int64 labels.

        Raises:
            DataError: A file is missing, can't be read or, with ``verify``, has another checksum.
        """
        names = self.train if train else self.test
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise self._missing(folder, missing, "nothing was downloaded")
        for name in names:
            if verify and name in self.checksums and not check_md5(str(folder / name), self.checksums[name]):
                raise DataError(
                    f"{self.title}: {folder / name} does not have the checksum of the original; remove it to have it "
                    "downloaded again, or pass --data.verify false if it is a mirror that you trust"
                )
        return self.read(tuple(folder / name for name in names))

    def _missing(self, folder: Path, missing: list[str], why: str) -> DataError:
        return DataError(
            f"{self.title}: {', '.join(missing)} not found in {folder.absolute()}, and {why}; {HOW_TO_POINT}"
        )


def _make_folder(folder: Path, title: str) -> list[Path]:
    """Creates a folder and its parents; returns those that were missing, innermost first."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{title}: the folder {folder} can't be made ({error.strerror}); {HOW_TO_POINT}") from None
    return made


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")


def _unreadable(path: Path, why: str = "") -> DataError:
    return DataError(
        f"{path} can't be read: it is truncated or of another format{why}; remove it to have it downloaded again"
    )


def _read_idx(paths: tuple[Path, ...]) -> tuple[Tensor, Tensor]:
    parts = []
    for path, read in zip(paths, (read_image_file, read_label_file), strict=True):
        try:
            parts.append(read(str(path)))
        except Exception:  # assertions of torchvision, various errors of numpy and torch
            raise _unreadable(path) from None
    images, labels = parts
    if len(images) != len(labels):
        raise DataError(
            f"{paths[0]} has {len(images)} images and {paths[1]} has {len(labels)} labels; expected as many"
        )
    return images.unsqueeze(1), labels.long()


def _read_cifar(label_key: str, paths: tuple[Path, ...]) -> tuple[Tensor, Tensor]:
    images, labels = [], []
    for path in paths:
        try:
            with path.open("rb") as file:
                batch = PlainUnpickler(file, encoding="latin1").load()
            pixels = np.asarray(batch["data"], dtype=np.uint8).reshape(-1, 3, 32, 32)
            targets = np.asarray(batch[label_key], dtype=np.int64)
        except Exception as error:  # a broken pickle can raise anything
            raise _unreadable(path, f" ({_first_line(error)})") from None
        if len(pixels) != len(targets):
            raise DataError(f"{path} has {len(pixels)} images and {len(targets)} labels; expected as many")
        images.append(torch.from_numpy(pixels.copy()))
        labels.append(torch.from_numpy(targets.copy()))
    return torch.cat(images), torch.cat(labels)


def _encode(text: str, encoding: str) -> bytes:
    """The codec with which old pickles of numpy store bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"codec {encoding!r} is not admitted")
    return text.encode("latin1")


_RECONSTRUCT, _FROMBUFFER = np.zeros(1).__reduce__()[0], np.zeros(1).__reduce_ex__(5)[0]
_NUMPY_GLOBALS = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
    **{(f"{package}.multiarray", "_reconstruct"): _RECONSTRUCT for package in ("numpy.core", "numpy._core")},
    **{(f"{package}.numeric", "_frombuffer"): _FROMBUFFER for package in ("numpy.core", "numpy._core")},
}


class PlainUnpickler(pickle.Unpickler):
    """An unpickler of numpy arrays and plain containers that refuses all other classes and functions."""

    def find_class(self, module: str, name: str) -> Any:
        """Resolves the names that an array's pickle needs; UnpicklingError for any other name."""
        if (module, name) not in _NUMPY_GLOBALS:
            raise pickle.UnpicklingError(f"{module}.{name} is not admitted in a data file")
        return _NUMPY_GLOBALS[module, name]


def _idx_source(title: str, dataset: Any) -> Source:
    train, test = (
        (f"{title}/raw/{part}-images-idx3-ubyte", f"{title}/raw/{part}-labels-idx1-ubyte") for part in ("train", "t10k")
    )
    return Source(title, partial(dataset, download=True), train, test, {}, _read_idx)


def _cifar_source(title: str, dataset: Any, label_key: str) -> Source:
    base = dataset.base_folder
    checksums = {f"{base}/{name}": md5 for name, md5 in (*dataset.train_list, *dataset.test_list)}
    train = tuple(f"{base}/{name}" for name, _ in dataset.train_list)
    test = tuple(f"{base}/{name}" for name, _ in dataset.test_list)
    return Source(title, partial(dataset, download=True), train, test, checksums, partial(_read_cifar, label_key))


SOURCES = {
    "MNIST": _idx_source("MNIST", datasets.MNIST),
    "FashionMNIST": _idx_source("FashionMNIST", datasets.FashionMNIST),
    "CIFAR10": _cifar_source("CIFAR-10", datasets.CIFAR10, "labels"),
    "CIFAR100": _cifar_source("CIFAR-100", datasets.CIFAR100, "fine_labels"),
}
