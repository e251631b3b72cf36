"""Files of the benchmarks' results: raw rows as JSON lines, and summaries as CSV."""

import csv
import json
import os
from pathlib import Path
from typing import Any

SPECIAL = {"": None, "True": True, "False": False}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; none if there is no file. A line that a kill has cut off is skipped."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Appends a row to a file of JSON lines, and flushes it to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = not path.is_file() or path.read_bytes()[-1:] in (b"", b"\n")
    with path.open("a") as file:
        file.write(("" if whole else "\n") + json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_summary(path: Path) -> list[dict[str, Any]]:
    """The rows of a summary, with numbers, booleans and None where :func:`write_summary` had them."""
    with path.open(newline="") as file:
        return [{name: _parsed(text) for name, text in row.items()} for row in csv.DictReader(file)]


def write_summary(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows with the same keys as CSV, numbers with 6 digits; an earlier file is replaced as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    with aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _shortened(value) for name, value in row.items()} for row in rows)
    os.replace(aside, path)


def _shortened(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def _parsed(text: str) -> Any:
    if text in SPECIAL:
        return SPECIAL[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
