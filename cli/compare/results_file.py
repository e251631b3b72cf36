"""The CSV file of `lit-lipschitz compare`: one line a run, so that no run is repeated."""

import contextlib
import csv
import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lit_lipschitz.cli.output import locked, write_whole
from lit_lipschitz.errors import ConfigurationError, LitLipschitzError


@dataclass(frozen=True)
class Row:
    """The result of a run."""

    policy: str  # its name
    seed: int
    config: str  # a short hash of the configuration without the seed
    metric: str  # name without the stage: acc for val_acc
    val: float  # on the validation set, with the final weights
    test: float | None  # on the test set, with the final weights; None if there is no test set
    best_val: float  # best value on the validation set in any epoch; only shown, nothing is chosen by it
    best_epoch: int  # its epoch, from 1; 0 if no epoch had a finite value
    epochs: int  # number of epochs that were trained; a run whose weights are no longer finite ends early
    rate_first: float  # learning rate of the first optimizer step at a schedule factor of 1
    rate_last: float  # the same of the last step
    seconds: float  # time of training, validation included
    diverged: bool  # whether a loss was not finite

    @property
    def key(self) -> tuple[str, int, str]:
        """What identifies a run."""
        return self.policy, self.seed, self.config


COLUMNS = [field.name for field in fields(Row)]
_PARSERS: dict[Any, Callable[[str], Any]] = {
    str: str,
    int: int,
    float: float,
    float | None: lambda cell: float(cell) if cell else None,
    bool: {"yes": True, "no": False}.__getitem__,
}


class ResultsFile:
    """The runs in a CSV file.

    Args:
        path: The file, which need not exist.

    Raises:
        ConfigurationError: There is another file of that name, or no folder for it.
        LitLipschitzError: It can't be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._target = path.resolve()  # the same for all links to the file
        if path.is_dir() or not path.absolute().parent.is_dir():
            found = "a folder of that name" if path.is_dir() else f"no folder {path.absolute().parent}"
            raise ConfigurationError(f"compare --output {path}: expected the name of a file, found {found}")
        self.rows()

    def rows(self) -> dict[tuple[str, int, str], Row]:
        """The runs that are in the file now."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        except UnicodeDecodeError:
            text = ""
        except OSError as error:
            raise LitLipschitzError(f"compare --output {self.path}: can't be read: {error.strerror}") from None
        table = list(csv.reader(io.StringIO(text)))
        if not table or table[0] != COLUMNS:
            raise ConfigurationError(
                f"compare --output {self.path}: the file exists, and was not written by `lit-lipschitz compare` (its "
                f"first line would be {','.join(COLUMNS[:4])},...); pass another name"
            )
        found = [self._row(cells, number) for number, cells in enumerate(table[1:], 2) if cells]
        return {row.key: row for row in found}

    def _row(self, cells: list[str], number: int) -> Row:
        try:
            return Row(*(_PARSERS[field.type](cell) for field, cell in zip(fields(Row), cells, strict=True)))
        except (ValueError, KeyError):
            raise ConfigurationError(
                f"compare --output {self.path}, line {number}: not a run as `lit-lipschitz compare` writes it; correct "
                "or remove the line, or pass another name"
            ) from None

    def add(self, row: Row) -> Row:
        """Writes a run; runs that others have written in the meantime are kept, and the same run is not replaced.

        Returns:
            The row of this run that is in the file.

        Raises:
            LitLipschitzError: The file can't be written.
        """
        with self._writing(), locked(self._target):
            rows = self.rows()
            if row.key in rows:
                return rows[row.key]
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows([_cell(value) for value in asdict(one).values()] for one in (*rows.values(), row))
            write_whole(self._target, text.getvalue().encode())
        return row

    @contextlib.contextmanager
    def claim(self, key: tuple[str, int, str], wait: bool) -> Iterator[None]:
        """Reserves a run, so that no other process makes it at the same time.

        Raises:
            Busy: Another process makes it, and ``wait`` is false.
            LitLipschitzError: The folder of the file can't be written.
        """
        name = hashlib.sha256(repr(key).encode()).hexdigest()[:10]
        with contextlib.ExitStack() as claims:
            with self._writing():
                claims.enter_context(locked(self._target.with_name(f"{self._target.name}.{name}"), wait))
            yield

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LitLipschitzError(f"compare --output {self.path}: can't be written: {error.strerror}") from None


def _cell(value: str | float | None) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)
