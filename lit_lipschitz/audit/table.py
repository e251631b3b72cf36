"""Prints an audit's summary: a table of the layers and the conclusions as sentences."""

import io
import shutil
import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_lipschitz.audit.summary import AuditSummary, LayerSummary

_MAX_ROWS = 40


def print_summary(summary: AuditSummary, every: int) -> None:
    """Prints the summary of an audit of every ``every``-th step on stderr."""
    text = io.StringIO()
    # Lines are only wrapped in a terminal.
    width = shutil.get_terminal_size().columns if sys.stderr.isatty() else None
    console = Console(file=text, width=width or 240, highlight=False)
    if summary.layers:
        rows = sorted(summary.layers, key=lambda layer: (layer.largest_ratio or 0.0, layer.largest_norm), reverse=True)
        title = f"Gradients before clipping, in {summary.steps} audited steps (one in {every})"
        if len(rows) > _MAX_ROWS:
            what = "ratios to L" if summary.compared else "gradients"
            title += f"; the {_MAX_ROWS} of {len(rows)} layers with the largest {what}, largest first"
        console.print(Text(title))
        console.print(_table(summary, rows[:_MAX_ROWS] if len(rows) > _MAX_ROWS else list(summary.layers)))
    for sentence in summary.verdicts:
        console.print(Text(sentence), soft_wrap=width is None)
    # print() and not a rich console on stderr: an active progress bar makes room for print() only.
    print("\n".join(line.rstrip() for line in text.getvalue().splitlines()), file=sys.stderr, flush=True)


def _table(summary: AuditSummary, layers: list[LayerSummary]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("\nlayer", overflow="fold")
    headings = ["median\nnorm", "largest\nnorm", "largest\nentry", "largest\nby norm", "largest\nby entry"]
    headings += ["largest\nnorm / L", "norm\nabove L"] if summary.compared else []
    headings += ["not\nfinite"] if summary.nonfinite else []
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in layers:
        cells = [f"{layer.median_norm:.3g}", f"{layer.largest_norm:.3g}", f"{layer.largest_entry:.3g}"]
        cells += [f"{count}/{layer.steps}" for count in (layer.largest_by_norm, layer.largest_by_entry)]
        if summary.compared:
            ratio = "-" if layer.largest_ratio is None else f"{layer.largest_ratio:.3g}"
            cells += [ratio, f"{layer.exceeded}/{layer.compared}"]
        cells += [str(layer.nonfinite)] if summary.nonfinite else []
        name = f"{layer.name} (head)" if layer.name == summary.head else layer.name
        table.add_row(Text(name), *cells)
    return table
