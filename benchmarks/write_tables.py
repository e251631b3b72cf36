"""Fills the tables of README.md and docs/ from the summaries in results/, between their markers.

python benchmarks/write_tables.py
"""

import re
from collections.abc import Callable
from pathlib import Path

import compare
import growth
import public
import readme_tables
import startup
import summary
import throughput
from rows import read_summary

ROOT = Path(__file__).parent.parent
PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "published": lambda: readme_tables.published(read_summary(public.SUMMARY)),
        "everyday": lambda: readme_tables.everyday(read_summary(readme_tables.BOUNDED), readme_tables.fixed_rates()),
    },
    "docs/guide/evidence.md": {
        "defaults": lambda: summary.defaults(read_summary(compare.SUMMARY)),
        "unseen": lambda: summary.defaults(read_summary(compare.RESULTS / "unseen.csv")),
        "regrets": lambda: summary.regrets(read_summary(compare.SUMMARY)),
        "public": lambda: public.table(read_summary(public.SUMMARY)),
        "repeated": lambda: public.repeated(read_summary(public.SUMMARY)),
    },
    "docs/guide/performance.md": {
        "throughput": lambda: "\n".join(throughput.lines(throughput.read())),
        "growth": lambda: "\n".join(growth.growth_lines(read_summary(growth.OUT))).strip(),
        "heads": lambda: "\n".join(growth.head_lines(read_summary(growth.OUT))),
        "startup": lambda: "\n".join(startup.lines(read_summary(startup.RESULTS))),
    },
}


def filled(name: str, page: str) -> str:
    """The text of a page with its tables from the summaries."""
    for table, text in PAGES[name].items():
        block = f"<!-- table: {table} -->\n\n{text()}\n\n<!-- end -->"
        page, count = re.subn(
            rf"<!-- table: {table} -->.*?<!-- end -->", lambda _, block=block: block, page, flags=re.S
        )
        if count != 1:
            raise SystemExit(f"{name}: expected one place for the table {table!r}, found {count}")
    return page


if __name__ == "__main__":
    for name in PAGES:
        path = ROOT / name
        path.write_text(filled(name, path.read_text()))
