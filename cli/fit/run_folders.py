"""The folders that a run writes into: one run at a time in each, and a failed one removes what it made itself."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from fnmatch import fnmatch
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lit_lipschitz.callbacks.trainer_facts import callbacks_of
from lit_lipschitz.cli.output import Busy, free_path, locked
from lit_lipschitz.errors import LitLipschitzError

_TRACES = ("events.*", "hparams.yaml", "config.yaml", "config-v*.yaml")
"""The files that a run writes before its first step."""
_ATTEMPTS = 100
"""How often a folder is made again that another run has just removed."""


class RunFolders:
    """The folders of loggers and checkpoints that this process has reserved for its run."""

    def __init__(self) -> None:
        self._locks = ExitStack()
        self._made: list[Path] = []  # folders that were not there before, parents first
        self._before: dict[Path, set[str]] = {}  # the names that were in a folder before the run

    def claim(self, trainer: L.Trainer, checkpoints: bool) -> None:
        """Reserves the folders before anything is written; only the rank that writes calls it.

        Args:
            trainer: The trainer.
            checkpoints: Whether the run saves checkpoints.

        Raises:
            LitLipschitzError: Another run writes into one of them now.
            OSError: A folder can't be made or written.
        """
        for logger in trainer.loggers:
            if _is_local(logger.root_dir):
                root = Path(str(logger.root_dir))
                # A logger takes the next number without a folder, so only one run at a time may do that.
                with self._lock(root):
                    folder = Path(str(logger.log_dir))
                    self._make(folder)
                self._claim(folder, "--trainer.logger.version")
                if isinstance(logger, CSVLogger):
                    _set_aside(folder / "metrics.csv")
        for folder in _checkpoint_folders(trainer) if checkpoints else ():
            self._claim(folder, "--checkpoint.dirpath")

    def _claim(self, folder: Path, option: str) -> None:
        folder = folder.resolve()
        if folder in self._before:
            return
        try:
            self._locks.enter_context(self._lock(folder, wait=False))
        except Busy:
            raise LitLipschitzError(
                f"{folder}: another run writes there now; wait for its end, or pass another {option}"
            ) from None
        self._before[folder] = set(os.listdir(folder))

    def _lock(self, folder: Path, wait: bool = True) -> ExitStack:
        """Makes a folder and holds its lock."""
        for attempt in range(_ATTEMPTS):
            self._make(folder)
            with ExitStack() as stack:
                try:
                    stack.enter_context(locked(folder / "run", wait))
                except FileNotFoundError:  # another run has just failed, and removed the folder that it had made
                    if attempt == _ATTEMPTS - 1:
                        raise
                    continue
                return stack.pop_all()
        raise AssertionError

    def _make(self, folder: Path) -> None:
        missing = [one for one in (folder, *folder.parents) if not one.exists()]
        for one in reversed(missing):
            try:
                one.mkdir()
            except FileExistsError:
                if not one.is_dir():
                    raise
            else:
                self._made.append(one)

    def undo(self) -> None:
        """Removes what a run that failed before its first step has written, and releases the folders."""
        for folder, names in self._before.items():
            for name in set(os.listdir(folder)) - names:
                if any(fnmatch(name, pattern) for pattern in _TRACES):
                    (folder / name).unlink(missing_ok=True)
        self.release()

    def release(self) -> None:
        """Releases the folders; those that the run has made and left empty are removed."""
        self._locks.close()
        for folder in reversed(self._made):
            with suppress(OSError):
                folder.rmdir()
        self._made, self._before = [], {}


def _checkpoint_folders(trainer: L.Trainer) -> Iterator[Path]:
    """The folders of checkpoints that are in no logger's folder."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, ModelCheckpoint):
            if callback.dirpath is None and not trainer.loggers:
                yield Path(trainer.default_root_dir, "checkpoints")
            elif _is_local(callback.dirpath):
                yield Path(str(callback.dirpath))


def _is_local(folder: object) -> bool:
    return folder is not None and "://" not in str(folder)


def _set_aside(curves: Path) -> None:
    """Renames the curves of an earlier run, which CSVLogger would delete."""
    if curves.exists():
        kept = free_path(curves)
        curves.rename(kept)
        print(f"lit-lipschitz: warning: {curves} is of an earlier run, and is now {kept}", file=sys.stderr)
