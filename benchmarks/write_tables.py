"""Writes the tables that the scripts print from results/ into docs/evidence.md, between its markers.

python benchmarks/write_tables.py
"""

import re
from collections.abc import Callable
from pathlib import Path

import compare
import sensitivity
import variants

PAGE = Path(__file__).parent.parent / "docs" / "evidence.md"
TABLES: dict[str, Callable[[], str]] = {
    "defaults": lambda: compare.pairs(compare.read(compare.RESULTS)),
    "regrets": lambda: compare.regrets(compare.read(compare.RESULTS)),
    "runs": lambda: compare.tables(compare.read(compare.RESULTS)),
    "sensitivity": lambda: sensitivity.table(compare.read(sensitivity.RESULTS)),
    "variants": lambda: variants.table(compare.read(variants.RESULTS)),
}


def filled(page: str) -> str:
    """The page with its tables as they are printed today."""
    for name, table in TABLES.items():
        block = f"<!-- table: {name} -->\n\n{table()}\n\n<!-- end -->"
        page, count = re.subn(rf"<!-- table: {name} -->.*?<!-- end -->", lambda _, block=block: block, page, flags=re.S)
        if count != 1:
            raise SystemExit(f"{PAGE}: expected one place for the table {name!r}, found {count}")
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
