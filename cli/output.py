"""Output of all commands: errors in one line, JSON without NaN, tables, and files that are never half written."""

import json
import math
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
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


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Writes a file under another name and moves it into place: a kill or a full disk leaves the earlier file whole."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
