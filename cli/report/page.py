"""A report as one HTML page that loads nothing: its style and its figures are inside."""

from html import escape

from lit_lipschitz.cli.output import printable
from lit_lipschitz.cli.report.panels import DARK, LIGHT, Panel, has_training
from lit_lipschitz.cli.report.runs import Run
from lit_lipschitz.cli.report.svg import marker, svg

_STYLE = """\
:root { color-scheme: light dark; --ground: #ffffff; --text: #1c2126; --faint: #5c6670; --line: #e3e6e9; LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14181c; --text: #e6e9ec; --faint: #9aa4ad; --line: #2c3339; DARK }
}
body { background: var(--ground); color: var(--text); font: 15px/1.5 system-ui, sans-serif; margin: 0 auto;
       max-width: 1080px; padding: 1.5rem 1.2rem 3rem; }
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1rem; margin: 0 0 .3rem; }
.faint { color: var(--faint); margin: .2rem 0 1.2rem; }
.legend { background: var(--ground); display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; list-style: none; margin: 0;
          padding: .5rem 0; position: sticky; top: 0; }
.legend li { align-items: center; display: flex; gap: .45rem; }
.legend svg { height: 14px; width: 34px; }
.figures { display: grid; gap: 1.6rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); }
figure { margin: 0; }
figure svg { display: block; width: 100%; }
svg text { fill: var(--faint); font: 11px system-ui, sans-serif; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); }
.axis { fill: none; stroke: var(--faint); }
polyline, .plain { fill: none; stroke: var(--c); stroke-linejoin: round; stroke-width: 1.8; }
.dashed polyline, .dashed .plain { stroke-dasharray: 5 3; stroke-width: 1.1; }
circle, .mark { fill: var(--c); }
.place { pointer-events: stroke; stroke: transparent; stroke-linecap: round; stroke-width: 12; }
.scroll { margin: 1.6rem 0; overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .9rem .3rem 0; text-align: right; }
th:first-child, td:first-child { text-align: left; }
th { color: var(--faint); font-weight: 500; }
"""


def page(runs: list[Run], drawn: list[Panel], rows: list[list[str]]) -> str:
    """The page of some runs, with their diagrams and the table with its header."""
    names = ", ".join(run.name for run in runs[:4]) + (f" and {len(runs) - 4} more" if len(runs) > 4 else "")
    figures = "\n".join(
        f"<figure>\n<h2>{escape(panel.title)}{f' ({panel.unit})' if panel.unit else ''}"
        f"{_faint('logarithmic') if panel.y.log else ''}</h2>\n{svg(panel, runs)}\n</figure>"
        for panel in drawn
    )
    folders = "<br>".join(escape(printable(str(run.folder.resolve()))) for run in runs)
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>lit-lipschitz: {escape(names)}</title>
<style>
{_style()}</style>
</head>
<body>
<h1>{escape(names)}</h1>
<p class="faint">{_count(len(runs), "run")}, {_length(runs)};
report of lit-lipschitz</p>
{_legend(runs, drawn)}
<div class="scroll">
{_table(rows)}
</div>
<div class="figures">
{figures}
</div>
<p class="faint" style="margin-top: 2rem">{folders}</p>
</body>
</html>
"""


def _style() -> str:
    light, dark = (" ".join(f"--c{i}: {colour};" for i, colour in enumerate(colours)) for colours in (LIGHT, DARK))
    classes = "".join(f".c{i} {{ --c: var(--c{i}); }}\n" for i in range(len(LIGHT)))
    return _STYLE.replace("LIGHT", light).replace("DARK", dark) + classes


def _faint(text: str) -> str:
    return f' <span style="color: var(--faint); font-weight: 400">{text}</span>'


def _length(runs: list[Run]) -> str:
    least, most = (end(run.epochs for run in runs) for end in (min, max))
    return _count(most, "epoch") if least == most else f"{least} to {most} epochs"


def _count(count: int, what: str) -> str:
    return f"{count} {what}" + "s" * (count != 1)


def _legend(runs: list[Run], drawn: list[Panel]) -> str:
    entries = [(f"c{i % len(LIGHT)}", marker(i, 17, 7), run.name) for i, run in enumerate(runs)]
    if has_training(drawn):
        entries += [("", "", "validation"), ("dashed", "", "training")]
    items = "\n".join(
        f'<li class="{kind}"{"" if mark else " style=--c:var(--faint)"}><svg viewBox="0 0 34 14" aria-hidden="true">'
        f'<path class="plain" d="M0 7h34"/>{mark}</svg>{escape(name)}</li>'
        for kind, mark, name in entries
    )
    return f'<ul class="legend">\n{items}\n</ul>'


def _table(rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
