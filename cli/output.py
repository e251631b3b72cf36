"""Output of all commands: errors in one line, JSON without NaN, tables, locks, files that are never half written."""

import json
import math
import os
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from glob import escape
from itertools import chain, count
from pathlib import Path
from typing import Any

from lit_lipschitz.errors import ConfigurationError


def fail(error: object, code: int | None = None) -> int:
    """Prints an error in one line on stderr.

    Returns:
        The exit code: the given one, or else 2 for a mistake in the configuration and 1 for another error.
    """
    print(f"lit-lipschitz: error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
    return code if code is not None else 2 if isinstance(error, ConfigurationError) else 1


def printable(text: str) -> str:
    """A text with escapes for what a terminal or a page would not show as a character, such as control sequences."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def to_json(content: Any, indent: int | None = None) -> str:
    """JSON in which numbers that are not finite are null, since the format does not know them."""
    return json.dumps(_finite(content), indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def align(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """The lines of a table: columns two spaces apart, aligned right, but for the column with the index ``left``."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:{'<' if i == left else '>'}{widths[i]}}" for i, cell in enumerate(row)).rstrip()
        for row in rows
    ]


_ABANDONED = 3600.0
"""Age in seconds from which a half-written file is one that a kill has left."""


class Busy(Exception):
    """Another process holds a lock."""


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Holds the lock of a file or a name: one process at a time, of those on the same file system.

    The lock is a file ``.NAME.lock`` in the folder of ``path``, which must exist. It is gone afterwards; the operating
    system releases that of a process that was killed.

    Raises:
        Busy: Another process holds it, and ``wait`` is false.
        OSError: The folder can't be written.
    """
    from filelock import FileLock, Timeout  # here, since the help texts need none of it

    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise Busy from None
    try:
        yield
    finally:
        # Before the release: a process that waits for a file that is gone tries again with a new one.
        with suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()


def relative(path: str | Path) -> str:
    """A path as people type it, relative to the working folder where it is below it."""
    path = str(path)
    return os.path.relpath(path) if os.path.isabs(path) and Path.cwd() in Path(path).parents else path


def free_path(path: Path) -> Path:
    """The path, or where it exists the first of NAME-v1.csv, NAME-v2.csv, ... that does not.

    As ModelCheckpoint names a checkpoint that would overwrite another.
    """
    numbered = (path.with_name(f"{path.stem}-v{version}{path.suffix}") for version in count(1))
    return next(one for one in chain([path], numbered) if not os.path.lexists(one))


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Writes a file under a name of its own and moves it into place.

    A kill or a full disk leaves the earlier file whole, and of two writers the later one's file is there.
    """
    for part in path.parent.glob(f".{escape(path.name)}.*.part"):
        with suppress(OSError):
            if part.stat().st_mtime < time.time() - _ABANDONED:
                part.unlink()
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
