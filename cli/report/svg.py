"""Draws a report's figures as SVG, with nothing but Python's standard library."""

from html import escape

from lit_lipschitz.cli.report.panels import LIGHT, MARKERS, Line, Panel, number
from lit_lipschitz.cli.report.runs import Run

_WIDTH, _HEIGHT = 460, 250
_PLACES = 100
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 10, 34


def svg(panel: Panel, runs: list[Run]) -> str:
    """A diagram as an SVG element, whose colours are the page's variables."""
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(panel.title)} per epoch">',
        *_grid(panel),
        *(_curve(panel, line, runs[line.run].name) for line in panel.lines),
        "</svg>",
    ]
    return "\n".join(parts)


def _position(panel: Panel, epoch: float, value: float) -> tuple[float, float]:
    x = _LEFT + panel.x.share(epoch) * (_WIDTH - _LEFT - _RIGHT)
    y = _HEIGHT - _BOTTOM - panel.y.share(value) * (_HEIGHT - _TOP - _BOTTOM)
    return round(x, 1), round(y, 1)


def _grid(panel: Panel) -> list[str]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for tick in panel.y.ticks:
        _, y = _position(panel, panel.x.low, tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {y}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y + 4}" text-anchor="end">{panel.y.label(tick)}</text>')
    for tick in panel.x.ticks:
        x, _ = _position(panel, tick, panel.y.low)
        parts.append(f'<path class="axis" d="M{x} {bottom}v4"/>')
        parts.append(f'<text x="{x}" y="{bottom + 17}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>')
    parts.append(f'<text class="name" x="{(_LEFT + right) / 2}" y="{_HEIGHT - 3}" text-anchor="middle">epoch</text>')
    return parts


def _curve(panel: Panel, line: Line, name: str) -> str:
    positions = [_position(panel, epoch, value) for epoch, value in line.points]
    path = " ".join(f"{x},{y}" for x, y in positions)
    kind = f"c{line.run % len(LIGHT)}" + (" dashed" if line.dashed else "")
    last_epoch, last = line.points[-1]
    title = f"<title>{escape(name)}, {escape(line.tag)}: {last:.4g}{panel.unit} in epoch {last_epoch}</title>"
    # Below the pointer a browser shows the title of what it finds; a long curve has such places for some epochs.
    places = "".join(
        f'<g class="place"><title>{escape(name)}, {escape(line.tag)}, epoch {epoch}: {value:.4g}{panel.unit}</title>'
        f'<path d="M{x} {y}h0"/></g>'
        for (epoch, value), (x, y) in list(zip(line.points, positions, strict=True))[:: -(-len(positions) // _PLACES)]
    )
    end = "" if line.dashed and len(positions) > 1 else marker(line.run, *positions[-1])
    return f'<g class="{kind}">{title}<polyline points="{path}"/>{end}{places}</g>'


def marker(run: int, x: float, y: float) -> str:
    """The shape that a run has at its lines' ends and in the legend."""
    shape = MARKERS[run % len(MARKERS)]
    if shape == "o":
        return f'<circle cx="{x}" cy="{y}" r="3.5"/>'
    paths = {"s": "m-3.2-3.2h6.4v6.4h-6.4z", "D": "m0-4.4l4.4 4.4-4.4 4.4-4.4-4.4z", "^": "m0-4.4l4.2 7.4h-8.4z"}
    return f'<path class="mark" d="M{x} {y}{paths[shape]}"/>'
