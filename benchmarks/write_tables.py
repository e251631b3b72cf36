"""Writes the tables that the scripts print from results/ into the pages of docs/, between their markers.

python benchmarks/write_tables.py
"""

import re
from collections.abc import Callable
from pathlib import Path

import compare
import sensitivity
import startup
import throughput
import variants

DOCS = Path(__file__).parent.parent / "docs"
PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "evidence.md": {
        "defaults": lambda: compare.pairs(compare.read(compare.RESULTS)),
        "regrets": lambda: compare.regrets(compare.read(compare.RESULTS)),
        "runs": lambda: compare.tables(compare.read(compare.RESULTS)),
        "sensitivity": lambda: sensitivity.table(compare.read(sensitivity.RESULTS)),
        "variants": lambda: variants.table(compare.read(variants.RESULTS)),
    },
    "performance.md": {
        "throughput": lambda: "\n".join(throughput.lines(throughput.read())),
        "startup": lambda: "\n".join(startup.lines(startup.read())),
    },
}


def filled(name: str, page: str) -> str:
    """A page with its tables as they are printed today."""
    for table, printed in PAGES[name].items():
        block = f"<!-- table: {table} -->\n\n{printed()}\n\n<!-- end -->"
        page, count = re.subn(
            rf"<!-- table: {table} -->.*?<!-- end -->", lambda _, block=block: block, page, flags=re.S
        )
        if count != 1:
            raise SystemExit(f"{name}: expected one place for the table {table!r}, found {count}")
    return page


if __name__ == "__main__":
    for name in PAGES:
        path = DOCS / name
        path.write_text(filled(name, path.read_text()))
