"""Writes checkpoints that are never half written, finds the newest one, and checks one before it is loaded."""

import io
import math
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import ZipFile

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch._C import PyTorchFileReader

from lit_lipschitz.cli.output import write_whole
from lit_lipschitz.data.plain_pickle import Call, Name, PlainReader
from lit_lipschitz.errors import ConfigurationError, LitLipschitzError


class WholeCheckpoints(TorchCheckpointIO):
    """Writes each checkpoint beside its final path and moves it there once it is on the disk.

    Lightning moves it from the system's folder for temporary files. Between two file systems that is a copy, and a kill
    or a full disk leaves a part of it where the earlier checkpoint was; an error of permissions is ignored.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint.

        Raises:
            LitLipschitzError: It can't be written; an earlier one of that name is unchanged.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, buffer.getbuffer())
        except OSError as error:
            raise LitLipschitzError(
                f"the checkpoint {target} can't be written: {error.strerror or error}; earlier ones are unchanged: "
                "make room there or pass --checkpoint.dirpath, and resume with --ckpt_path last"
            ) from error


def newest_checkpoint(root: Path) -> Path:
    """The last checkpoint of the newest run below a folder.

    Raises:
        ConfigurationError: There is none.
    """
    found = list(root.glob("lightning_logs/*/checkpoints/last*.ckpt"))
    if not found:
        raise ConfigurationError(
            f"--ckpt_path last: no run below {root.absolute() / 'lightning_logs'} has saved a checkpoint; pass a path"
        )
    return max(found, key=lambda path: path.stat().st_mtime)


def check_checkpoint(path: Path) -> None:
    """Makes sure that a file is a whole checkpoint of Lightning, without running code and in bounded memory.

    Raises:
        ConfigurationError: There is no such file.
        LitLipschitzError: It is something else, or only a part of one.
    """
    if not path.is_file():
        raise ConfigurationError(f"--ckpt_path {path}: {'a folder, not a' if path.is_dir() else 'no such'} file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check_archive(path)
            content = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except OSError:
        raise
    except Exception:  # a damaged file can raise anything
        content = None
    if content is None:
        raise LitLipschitzError(f"--ckpt_path {path}: not a checkpoint, or only a part of one; pass another")
    if not isinstance(content, dict) or not {"state_dict", "pytorch-lightning_version"} <= set(content):
        raise LitLipschitzError(f"--ckpt_path {path}: not saved by Lightning; pass a checkpoint of `lit-lipschitz fit`")


_MAX_OPCODES = 1 << 21  # of a checkpoint's pickle; a tensor has about 40
_MAX_EXPANDED = 1 << 26  # numbers that a checkpoint may have beyond its bytes, as a tensor that was expanded has
_REBUILD = "torch._utils._rebuild"


def _check_archive(path: Path) -> None:
    """Refuses an archive that ``torch.load(weights_only=True)`` would admit, and that takes any amount of memory.

    Raises:
        UnpicklingError: It is compressed, or the calls in its pickle make much of little.
        Exception: It is damaged; which one depends on where.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # older formats are pickles and tar archives
            raise UnpicklingError("no archive")
    size = path.stat().st_size
    archive = PyTorchFileReader(str(path))
    records = archive.get_all_records()
    if _size_of_records(archive, path) > size or "constants.pkl" in records:
        raise UnpicklingError("compressed, or TorchScript")
    reader = PlainReader(admitted=None, max_opcodes=_MAX_OPCODES)
    reader.read(archive.get_record("data.pkl"))
    if sum(map(_length, reader.calls)) > size + _MAX_EXPANDED:
        raise UnpicklingError("larger than the file")


def _size_of_records(archive: Any, path: Path) -> int:
    """Bytes of all records of an archive, uncompressed; torch tells them from 2.13 on."""
    if hasattr(archive, "get_record_size"):
        return sum(map(archive.get_record_size, archive.get_all_records()))
    with ZipFile(path) as entries:
        return sum(entry.file_size for entry in entries.infolist())


def _length(call: Call) -> int:
    """How many numbers, characters or entries a call makes; UnpicklingError if that has no limit."""
    function, arguments = call.function.replace("__builtin__.", "builtins.", 1), call.arguments  # of Python 2
    first = arguments[0] if arguments else None
    unlimited = {
        # Some codecs write two bytes for one, and a chain of them has no limit.
        "_codecs.encode": arguments[1:] != ("latin1",),
        "builtins.bytearray": isinstance(first, int),
        "torch._tensor._rebuild_from_type_v2": not (isinstance(first, Name) and first.path.startswith(_REBUILD)),
    }
    # A tensor class makes a tensor of any size; a checkpoint's are views of what is in the file.
    is_tensor_class = function.startswith("torch.") and function.endswith("Tensor")
    if unlimited.get(function, is_tensor_class):
        raise UnpicklingError(f"a call of {function}")
    if function.startswith(_REBUILD) and len(arguments) > 3 and isinstance(arguments[2], tuple):
        return math.prod(arguments[2])  # storage, offset, size, stride
    return sum(len(one) for one in arguments if isinstance(one, (str, bytes, bytearray, tuple, list, dict)))
