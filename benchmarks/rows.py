"""Result files with a JSON object a line, which a kill can cost no more than the line under way."""

import argparse
import json
import os
from pathlib import Path
from typing import Any


def numbers(text: str) -> list[int]:
    """The whole numbers of a text such as 0,1,2."""
    return list(map(int, text.split(",")))


def results_parser(results: Path, seeds: str = "0,1,2") -> argparse.ArgumentParser:
    """What the scripts that fill a file with the runs of some seeds have in common: --seeds and --results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=numbers, default=seeds)
    parser.add_argument("--results", type=Path, default=results)
    return parser


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; none where there is no file. What a kill has left of a line is passed over."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Writes a row, and has it on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = not path.is_file() or path.read_bytes()[-1:] in (b"", b"\n")
    with path.open("a") as file:
        file.write(("" if whole else "\n") + json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
