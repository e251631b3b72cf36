"""Reads the files of MNIST-like and CIFAR-like data sets as uint8 tensors; torchvision downloads and verifies them."""

import math
import os
import struct
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
from torchvision.datasets.utils import check_md5

from lit_lipschitz.data.plain_pickle import Call, PlainReader
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


def _labels(values: Any, classes: int, path: Path) -> Tensor:
    """Labels as int64; a DataError unless each is the number of a class."""
    labels = np.asarray(values, dtype=np.int64)
    outside = labels[(labels < 0) | (labels >= classes)]
    if outside.size:
        raise DataError(f"{path} has the label {outside[0]}; expected 0 to {classes - 1}")
    return torch.from_numpy(labels.copy())


def _check_counts(images: int, labels: int, image_file: Path, label_file: Path | None = None) -> None:
    if images != labels:
        other = f" and {label_file} has {labels} labels" if label_file else f" and {labels} labels"
        raise DataError(f"{image_file} has {images} images{other}; expected as many")
    if not images:
        raise DataError(f"{image_file} has no images; expected at least one")


def _read_idx_file(path: Path, shape: tuple[int, ...]) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """The bytes of a file in the IDX format: 0, 0, 8 and the number of dimensions, their sizes, and the bytes."""
    head = 4 * (2 + len(shape))
    with path.open("rb") as file:
        header = file.read(head)
        if len(header) < head or header[:4] != bytes([0, 0, 8, 1 + len(shape)]):
            raise _unreadable(path)
        count, *sizes = struct.unpack(f">{1 + len(shape)}I", header[4:])
        if tuple(sizes) != shape:
            expected, found = (" x ".join(map(str, each)) for each in (shape, sizes))
            raise DataError(f"{path} has images of {found} pixels; expected {expected}")
        # Compared before it is read: a header can ask for any amount of memory.
        if path.stat().st_size != head + count * math.prod(shape):
            raise _unreadable(path, f" ({count} entries do not make up its size)")
        return np.fromfile(file, dtype=np.uint8).reshape(count, *shape)


def _read_idx(classes: int, paths: tuple[Path, ...]) -> tuple[Tensor, Tensor]:
    images, labels = (_read_idx_file(path, shape) for path, shape in zip(paths, ((28, 28), ()), strict=True))
    _check_counts(len(images), len(labels), *paths)
    return torch.from_numpy(images).unsqueeze(1), _labels(labels, classes, paths[1])


def _read_cifar(label_key: str, classes: int, paths: tuple[Path, ...]) -> tuple[Tensor, Tensor]:
    images, labels = [], []
    for path in paths:
        if path.stat().st_size > _MAX_BATCH:
            raise _unreadable(path, f" (larger than {_MAX_BATCH >> 20} MiB)")
        try:
            batch = PlainReader(_ARRAY_NAMES).read(path.read_bytes())
            pixels, targets = _pixels(batch["data"]), batch[label_key]
            if type(targets) is not list or not all(type(target) is int for target in targets):
                raise ValueError(f"{label_key}: expected a list of numbers")
            chosen = _labels(targets, classes, path)
        except DataError:
            raise
        except Exception as error:  # a broken pickle can raise anything
            raise _unreadable(path, f" ({_first_line(error)})") from None
        _check_counts(len(pixels), len(chosen), path)
        images.append(torch.from_numpy(pixels.copy()))
        labels.append(chosen)
    return torch.cat(images), torch.cat(labels)


_MAX_BATCH = 1 << 29  # bytes of a file; CIFAR-100's training set has 156 MB
_ENCODE, _DTYPE = "_codecs.encode", "numpy.dtype"
_RECONSTRUCT = tuple(f"{package}.multiarray._reconstruct" for package in ("numpy.core", "numpy._core"))
_FROMBUFFER = tuple(f"{package}.numeric._frombuffer" for package in ("numpy.core", "numpy._core"))
_ARRAY_NAMES = frozenset((_ENCODE, _DTYPE, "numpy.ndarray", *_RECONSTRUCT, *_FROMBUFFER))


def _pixels(array: Any) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """The pixels in the pickle of a numpy array of bytes; shape (examples, 3, 32, 32).

    numpy stores an array as ``_reconstruct`` with the state (version, shape, dtype, column-major, bytes), and from
    protocol 5 on as ``_frombuffer(bytes, dtype, shape, order)``. The array is built here, from the bytes alone.
    """
    if not isinstance(array, Call):
        raise ValueError("data: expected an array")
    if array.function in _RECONSTRUCT:
        _, shape, dtype, column_major, content = array.state
    else:
        content, dtype, shape, order = array.arguments
        column_major = order == "F"
    if not (isinstance(dtype, Call) and dtype.function == _DTYPE and dtype.arguments[0] in ("u1", "|u1", "uint8")):
        raise ValueError("data: expected an array of bytes")
    if not (len(shape) == 2 and shape[1] == 3 * 32 * 32):
        raise ValueError(f"data: expected images of 3 x 32 x 32 pixels in rows, found the shape {shape!r:.40}")
    values = np.frombuffer(_bytes(content), dtype=np.uint8)
    return values.reshape(shape, order="F" if column_major else "C").reshape(-1, 3, 32, 32)


def _bytes(content: Any) -> bytes | bytearray:
    """Bytes as a pickle has them: of Python 3, of Python 2, or of protocol 2 in Python 3 as text with its codec."""
    if isinstance(content, Call) and content.function == _ENCODE and content.arguments[1:] == ("latin1",):
        content = content.arguments[0]
    if isinstance(content, str):
        return content.encode("latin1")
    if not isinstance(content, (bytes, bytearray)):
        raise ValueError("data: expected bytes")
    return content


def _idx_source(title: str, dataset: Any) -> Source:
    train, test = (
        (f"{title}/raw/{part}-images-idx3-ubyte", f"{title}/raw/{part}-labels-idx1-ubyte") for part in ("train", "t10k")
    )
    return Source(title, partial(dataset, download=True), train, test, {}, partial(_read_idx, 10))


def _cifar_source(title: str, dataset: Any, label_key: str, classes: int) -> Source:
    base = dataset.base_folder
    checksums = {f"{base}/{name}": md5 for name, md5 in (*dataset.train_list, *dataset.test_list)}
    train = tuple(f"{base}/{name}" for name, _ in dataset.train_list)
    test = tuple(f"{base}/{name}" for name, _ in dataset.test_list)
    read = partial(_read_cifar, label_key, classes)
    return Source(title, partial(dataset, download=True), train, test, checksums, read)


SOURCES = {
    "MNIST": _idx_source("MNIST", datasets.MNIST),
    "FashionMNIST": _idx_source("FashionMNIST", datasets.FashionMNIST),
    "CIFAR10": _cifar_source("CIFAR-10", datasets.CIFAR10, "labels", 10),
    "CIFAR100": _cifar_source("CIFAR-100", datasets.CIFAR100, "fine_labels", 100),
}
