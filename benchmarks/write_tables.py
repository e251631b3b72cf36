"""Writes the tables that the scripts print from results/ into the pages of docs/, between their markers.

python benchmarks/write_tables.py
"""

import re
from collections.abc import Callable
from pathlib import Path

import compare
import factors
import growth
import more_tasks
import sensitivity
import startup
import throughput
import variants
from rows import read_rows

DOCS = Path(__file__).parent.parent / "docs"
PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "../README.md": {"short": lambda: compare.short(read_rows(compare.RESULTS))},
    "evidence.md": {
        "defaults": lambda: compare.pairs(read_rows(compare.RESULTS)),
        "factors": lambda: factors.chart(read_rows(factors.RESULTS)),
        "more_tasks": lambda: more_tasks.table(read_rows(more_tasks.RESULTS)),
        "regrets": lambda: compare.regrets(read_rows(compare.RESULTS)),
        "runs": lambda: compare.tables(read_rows(compare.RESULTS)),
        "sensitivity": lambda: sensitivity.table(read_rows(sensitivity.RESULTS)),
        "variants": lambda: variants.table(read_rows(variants.RESULTS)),
    },
    "performance.md": {
        "throughput": lambda: "\n".join(throughput.lines(throughput.read())),
        "growth": lambda: "\n".join(growth.growth_lines(growth.read())).strip(),
        "heads": lambda: "\n".join(growth.head_lines(growth.read())),
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
