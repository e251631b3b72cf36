"""The file of `lit-lipschitz compare`: a line a run, whole at any time, never repeated."""

import csv
import io
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from lit_lipschitz.cli.report.plots import write_whole
from lit_lipschitz.errors import ConfigurationError, LitLipschitzError


@dataclass(frozen=True)
class Row:
    """What a run has come to.

    Attributes:
        policy: Its policy's name.
        seed: Its seed.
        config: A short hash of its configuration without the seed.
        metric: What val, test and best_val are, without the stage: ``acc`` of val_acc.
        val: The value on the validation set with the final weights.
        test: On the test set; None where there is none.
        best_val: The best that the validation set had in any epoch; looked at only by people.
        best_epoch: Which one that was, from 1; 0 where no epoch had a finite value.
        epochs: Epochs that were trained; a run whose weights are no longer finite ends with its epoch.
        rate_first: The rate behind the first optimizer step, at a schedule factor of 1.
        rate_last: The same of the last step.
        seconds: Of training, validation included.
        diverged: Whether a loss was not finite.
    """

    policy: str
    seed: int
    config: str
    metric: str
    val: float
    test: float | None
    best_val: float
    best_epoch: int
    epochs: int
    rate_first: float
    rate_last: float
    seconds: float
    diverged: bool

    @property
    def key(self) -> tuple[str, int, str]:
        """What no two rows have in common."""
        return self.policy, self.seed, self.config


COLUMNS = [field.name for field in fields(Row)]


class Ledger:
    """The rows of a CSV file.

    Args:
        path: The file, which need not be there.

    Raises:
        ConfigurationError: There is another file of that name, or no folder for it.
        LitLipschitzError: It can't be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_dir() or not path.absolute().parent.is_dir():
            found = "a folder of that name" if path.is_dir() else f"no folder {path.absolute().parent}"
            raise ConfigurationError(f"compare --output {path}: expected the name of a file, found {found}")
        self.rows()

    def rows(self) -> dict[tuple[str, int, str], Row]:
        """The rows that the file has now."""
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
                f"compare --output {self.path}: there is such a file, and `lit-lipschitz compare` has not written it "
                f"(its first line would be {','.join(COLUMNS[:4])},...); pass another name"
            )
        found = [self._row(cells, number) for number, cells in enumerate(table[1:], 2) if cells]
        return {row.key: row for row in found}

    def _row(self, cells: list[str], number: int) -> Row:
        try:
            one = dict(zip(COLUMNS, cells, strict=True))
            return Row(
                policy=one["policy"],
                seed=int(one["seed"]),
                config=one["config"],
                metric=one["metric"],
                val=float(one["val"]),
                test=float(one["test"]) if one["test"] else None,
                best_val=float(one["best_val"]),
                best_epoch=int(one["best_epoch"]),
                epochs=int(one["epochs"]),
                rate_first=float(one["rate_first"]),
                rate_last=float(one["rate_last"]),
                seconds=float(one["seconds"]),
                diverged={"yes": True, "no": False}[one["diverged"]],
            )
        except (ValueError, KeyError):
            raise ConfigurationError(
                f"compare --output {self.path}, line {number}: not a run as `lit-lipschitz compare` writes it; mend or "
                "remove the line, or pass another name"
            ) from None

    def add(self, row: Row) -> None:
        """Writes a row; what others have written in the meantime stays.

        Raises:
            LitLipschitzError: The file can't be written.
        """
        rows = {**self.rows(), row.key: row}
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([_cell(value) for value in asdict(one).values()] for one in rows.values())
        try:
            write_whole(self.path, text.getvalue().encode())
        except OSError as error:
            raise LitLipschitzError(f"compare --output {self.path}: can't be written: {error.strerror}") from None


def _cell(value: str | float | None) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


def finite(value: float | None) -> float | None:
    """A number as JSON has it, where there are no infinities."""
    return value if value is not None and math.isfinite(value) else None
