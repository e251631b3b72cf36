"""Writes checkpoints that are never half written, finds the newest one, and checks one before it is loaded."""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lit_lipschitz.cli.output import write_whole
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
    """Makes sure that a file is a whole checkpoint of Lightning.

    Raises:
        ConfigurationError: There is no such file.
        LitLipschitzError: It is something else, or only a part of one.
    """
    if not path.is_file():
        raise ConfigurationError(f"--ckpt_path {path}: {'a folder, not a' if path.is_dir() else 'no such'} file")
    try:
        whole = zipfile.is_zipfile(path)
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=True) if whole else None
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError):
        content = None
    if content is None:
        raise LitLipschitzError(f"--ckpt_path {path}: not a checkpoint, or only a part of one; pass another")
    if not isinstance(content, dict) or not {"state_dict", "pytorch-lightning_version"} <= set(content):
        raise LitLipschitzError(f"--ckpt_path {path}: not saved by Lightning; pass a checkpoint of `lit-lipschitz fit`")
