"""Reads the files of MNIST-like and CIFAR-like data sets as uint8 tensors; torchvision downloads and verifies them."""

import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
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
    """A data set in files that torchvision can download.

    Attributes:
        title: Name of the data set.
        download: Called with a folder, downloads the files into it in torchvision's layout.
        train: Files of the training set, relative to the data folder.
        test: Files of the test set, likewise.
        checksums: MD5 by file, where torchvision has one.
        read: Reads images and labels from such files.
    """

    title: str
    download: Callable[[str], Any]
    train: tuple[str, ...]
    test: tuple[str, ...]
    checksums: dict[str, str]
    read: Callable[[tuple[Path, ...]], tuple[Tensor, Tensor]]

    def fetch(self, folder: Path, download: bool) -> None:
        """Downloads missing files.

        Files are downloaded to a temporary folder and moved at the end, so that a failure leaves nothing behind.

        Args:
            folder: The data folder.
            download: Whether to download; if false, missing files are an error.

        Raises:
            DataError: Files are missing and can't be downloaded, or the folder can't be written.
        """
        missing = [name for name in (*self.train, *self.test) if not (folder / name).is_file()]
        if not missing:
            return
        if not download:
            raise self._missing(folder, missing, "data.download is off")
        made = _make_folder(folder, self.title)
        staging: Path | None = None
        try:
            staging = Path(tempfile.mkdtemp(prefix=".download-", dir=folder))
            self.download(str(staging))
            for name in missing:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(staging / name, folder / name)
        except PermissionError as error:
            raise DataError(
                f"{self.title}: no permission to write to {folder} ({error.strerror}); {HOW_TO_POINT}"
            ) from None
        except Exception as error:  # of urllib, sockets or torchvision
            raise self._missing(folder, missing, f"downloading failed: {_first_line(error)}") from None
        finally:
            if staging is not None:
                shutil.rmtree(staging, ignore_errors=True)
            for path in made:
                with suppress(OSError):
                    path.rmdir()

    def load(self, folder: Path, train: bool, verify: bool) -> tuple[Tensor, Tensor]:
        """Reads the training or the test set.

        Args:
            folder: The data folder.
            train: Whether to read the training set.
            verify: Whether to compare the files with their checksums.

        Returns:
            Images of shape (examples, channels, height, width) and dtype uint8, labels of dtype int64.

        Raises:
            DataError: A file is missing, has another checksum or can't be read.
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


def _cifar_reader(label_key: str) -> Callable[[tuple[Path, ...]], tuple[Tensor, Tensor]]:
    def read(paths: tuple[Path, ...]) -> tuple[Tensor, Tensor]:
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

    return read


def _encode(text: str, encoding: str) -> bytes:
    """The codec with which old pickles of numpy store bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"codec {encoding!r} is not admitted")
    return text.encode("latin1")


def _plain_globals() -> dict[tuple[str, str], Any]:
    admitted: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _encode,
    }
    reconstruct = np.zeros(1).__reduce__()[0]
    frombuffer = np.zeros(1).__reduce_ex__(5)[0]
    for package in ("numpy.core", "numpy._core"):
        admitted[f"{package}.multiarray", "_reconstruct"] = reconstruct
        admitted[f"{package}.numeric", "_frombuffer"] = frombuffer
    return admitted


class PlainUnpickler(pickle.Unpickler):
    """An unpickler of numpy arrays and plain containers that refuses all other classes and functions."""

    _admitted = _plain_globals()

    def find_class(self, module: str, name: str) -> Any:
        """Resolves the names that an array's pickle needs.

        Raises:
            pickle.UnpicklingError: Any other name.
        """
        if (module, name) not in self._admitted:
            raise pickle.UnpicklingError(f"{module}.{name} is not admitted in a data file")
        return self._admitted[module, name]


def _idx_source(title: str, dataset: type[datasets.MNIST]) -> Source:
    def download(folder: str) -> None:
        dataset(folder, download=True)

    names = [
        (f"{title}/raw/{part}-images-idx3-ubyte", f"{title}/raw/{part}-labels-idx1-ubyte") for part in ("train", "t10k")
    ]
    return Source(title, download, names[0], names[1], {}, _read_idx)


def _cifar_source(title: str, dataset: type[datasets.CIFAR10], label_key: str) -> Source:
    def download(folder: str) -> None:
        dataset(folder, download=True)

    base = dataset.base_folder
    checksums = {f"{base}/{name}": md5 for name, md5 in (*dataset.train_list, *dataset.test_list)}
    train = tuple(f"{base}/{name}" for name, _ in dataset.train_list)
    test = tuple(f"{base}/{name}" for name, _ in dataset.test_list)
    return Source(title, download, train, test, checksums, _cifar_reader(label_key))


SOURCES = {
    "MNIST": _idx_source("MNIST", datasets.MNIST),
    "FashionMNIST": _idx_source("FashionMNIST", datasets.FashionMNIST),
    "CIFAR10": _cifar_source("CIFAR-10", datasets.CIFAR10, "labels"),
    "CIFAR100": _cifar_source("CIFAR-100", datasets.CIFAR100, "fine_labels"),
}
