"""Cost of the callback's statistic over batch size, head width and classes, compared with the head's matmul.

Measures time and peak extra memory of the callback's work on a batch, for each norm, over rows, width and classes, and
fits the slope in log-log coordinates; then compares it with the head's own matmul, forward alone and forward with
backward, in turns in one process. Prints tables and writes their rows as CSV:

    python benchmarks/growth.py [--rounds 9] [--device cpu] [--threads 1] [--out benchmarks/results/growth.csv]

A head whose matmul would take more than ``--slice`` floating-point operations is measured on as many of its rows as
fit, and its time is scaled to all of them; the tables mark it with a star. The statistic is always measured on all
rows. With one thread a time is the process's own on the CPU, which others on the machine do not add to.
"""

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from figures import device_name
from rows import write_summary
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from lit_lipschitz.measurement.running_maximum import RunningMaximum

OUT = Path(__file__).parent / "results" / "growth.csv"
STATISTICS: dict[str, dict[str, Any]] = {
    "paper": {"norm": "frobenius"},
    "strict": {"norm": "frobenius", "bias": True, "mean": True},
    "strict, sample": {"norm": "sample", "bias": True},
    "smooth": {"norm": "spectral", "bias": True, "mean": True},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SWEEPS = {
    "rows": [(rows, 1024, 1000) for rows in (128, 256, 512, 1024, 2048, 4096, 8192)],
    "width": [(1024, width, 1000) for width in (128, 256, 512, 1024, 2048, 4096, 8192)],
    "classes": [(1024, 512, classes) for classes in (10, 100, 1000, 10_000, 50_000)],
}
HEADS = [
    *((128, width, 10) for width in (64, 512, 4096)),
    *((1024, width, 1000) for width in (64, 512, 2048, 4096)),
    *((1024, width, 50_000) for width in (64, 512, 4096)),
    (8192, 4096, 50_000),
]
LARGE = 2**19
"""Activations from which on the fit begins: below, a fixed number of small operations is most of the time."""
SETTLE = 2e-3
"""Seconds that one timing lasts at least, by calls that are repeated."""

Shape = tuple[int, int, int]
"""Rows, width and classes."""
Row = dict[str, Any]


class Touched(TorchDispatchMode):
    """Counts the elements that operations read and write; views of tensors count for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.operations = 0

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), settings: Any = None) -> Any:
        """Makes the operation, and counts."""
        result = operation(*arguments, **(settings or {}))
        if not getattr(operation, "is_view", False):
            given = [part for one in arguments for part in (one if isinstance(one, list | tuple) else [one])]
            made = result if isinstance(result, list | tuple) else [result]
            self.elements += sum(one.numel() for one in (*given, *made) if isinstance(one, Tensor))
            self.operations += 1
        return result


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most bytes that a call holds at once beyond what there was before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    now = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def milliseconds(seconds: Sequence[float]) -> float:
    """The median, in milliseconds."""
    return 1e3 * statistics.median(seconds)


def in_turns(functions: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds a call of each function, in turns that begin with another one each round."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

    def seconds(function: Callable[[], object], calls: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = clock()
        for _ in range(calls):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (clock() - start) / calls

    calls = {}
    for name, function in functions.items():
        seconds(function, 1)
        calls[name] = max(1, math.ceil(SETTLE / max(seconds(function, 1), 1e-6)))
    names, found = list(functions), {name: [] for name in functions}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            found[name].append(seconds(functions[name], calls[name]))
    return found


def updates(activations: Tensor) -> dict[str, Callable[[], None]]:
    """What the callback does with the inputs of the head in a batch, under each family."""
    count = torch.tensor(float(len(activations)), device=activations.device)

    def update(settings: dict[str, Any]) -> Callable[[], None]:
        statistic = RunningMaximum(width=activations.shape[1], device=activations.device, **settings)
        return lambda: (statistic.add(activations), statistic.finish(count))[1]

    return {name: update(settings) for name, settings in STATISTICS.items()}


def grow(sweep: str, shapes: Sequence[Shape], dtype: str, rounds: int, device: torch.device) -> list[Row]:
    """A row a shape: milliseconds and the most extra memory, in KiB, of each statistic."""
    found = []
    for shape in shapes:
        activations = torch.randn(*shape[:2], device=device).relu().to(DTYPES[dtype])
        functions = updates(activations)
        seconds = in_turns(functions, rounds, device)
        row: Row = {"sweep": sweep, "dtype": dtype, **_sizes(shape)}
        for name, function in functions.items():
            row[f"{name} ms"] = milliseconds(seconds[name])
            row[f"{name} KiB"] = peak_bytes(function, device) / 1024
        found.append(row)
    return found


def _sizes(shape: Shape) -> Row:
    return dict(zip(("rows", "width", "classes"), shape, strict=True))


def slope(rows: Sequence[Row], name: str) -> float | None:
    """The power of the number of activations with which the time grows, by least squares, where they are large."""
    large = [row for row in rows if row["rows"] * row["width"] >= LARGE]
    points = [(math.log(row["rows"] * row["width"]), math.log(row[f"{name} ms"])) for row in large]
    if len({x for x, _ in points}) < 2:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def compare_with_head(shape: Shape, rounds: int, most: float, device: torch.device) -> Row:
    """A row with milliseconds of the head's matmul, in fp32, and of each statistic, measured in turns."""
    rows, width, classes = shape
    part = max(1, min(rows, int(most / (2 * width * classes))))
    rounds = min(rounds, 5) if 2 * part * width * classes > most / 4 else rounds
    activations = torch.randn(rows, width, device=device).relu()
    weight = (torch.randn(classes, width, device=device) / width**0.5).requires_grad_()
    bias = torch.zeros(classes, device=device, requires_grad=True)
    inputs = activations[:part].clone().requires_grad_()
    gradient = torch.randn(part, classes, device=device)

    def forward() -> None:
        with torch.no_grad():
            F.linear(inputs, weight, bias)

    def both() -> None:
        inputs.grad = weight.grad = bias.grad = None
        F.linear(inputs, weight, bias).backward(gradient)

    seconds = in_turns({"forward": forward, "both": both, **updates(activations)}, rounds, device)
    row: Row = {"sweep": "head", "dtype": "float32", **_sizes(shape), "measured_rows": part}
    row.update({f"{name} ms": milliseconds(seconds[name]) for name in STATISTICS})
    row.update({f"{name} ms": rows / part * milliseconds(seconds[name]) for name in ("forward", "both")})
    return row


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    return {
        "device": device_name(device),
        "clock": "CPU time" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall clock",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def growth_lines(rows: Sequence[Row]) -> Iterator[str]:
    """Tables in Markdown, one a sweep and type: median milliseconds and the most memory beyond the activations."""
    for sweep, dtype in dict.fromkeys((row["sweep"], row["dtype"]) for row in rows if row["sweep"] != "head"):
        found = [row for row in rows if (row["sweep"], row["dtype"]) == (sweep, dtype)]
        yield f"| over {sweep}, {dtype} | {' | '.join(_NAMES)} |"
        yield "|---" * (len(_NAMES) + 1) + "|"
        for row in found:
            texts = [f"{row[f'{name} ms']:.2f} ms, {row[f'{name} KiB']:,.0f} KiB" for name in STATISTICS]
            yield f"| {_label(row)} | {' | '.join(texts)} |"
        exponents = [slope(found, name) for name in STATISTICS]
        if any(one is not None for one in exponents):
            yield f"| power of n d | {' | '.join('' if one is None else f'{one:.2f}' for one in exponents)} |"
        yield ""


def head_lines(rows: Sequence[Row]) -> Iterator[str]:
    """A table in Markdown: median milliseconds of a head's matmul, and each statistic's share of it."""
    yield f"| rows x width, classes | forward | with backward | {' | '.join(_NAMES)} |"
    yield "|---" * (len(_NAMES) + 3) + "|"
    for row in rows:
        if row["sweep"] == "head":
            star = "*" if row["measured_rows"] < row["rows"] else ""
            shares = [
                ", ".join(f"{100 * row[f'{name} ms'] / row[f'{of} ms']:.3g} %" for of in ("forward", "both"))
                for name in STATISTICS
            ]
            times = f"{row['forward ms']:,.2f} ms | {row['both ms']:,.2f} ms"
            yield f"| {_label(row)}{star} | {times} | {' | '.join(shares)} |"


_NAMES = [", ".join(f"`{part}`" for part in name.split(", ")) for name in STATISTICS]


def _label(row: Row) -> str:
    return f"{row['rows']:,} x {row['width']:,}, {row['classes']:,}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the arguments, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9, help="timings of each, in turns")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on the CPU")
    parser.add_argument("--slice", type=float, default=4e11, help="most operations of a head that is measured whole")
    parser.add_argument("--scale", type=int, default=1, help="divide all rows, widths and classes by this, for a trial")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)

    def scaled(shapes: Sequence[Shape]) -> list[Shape]:
        return list(dict.fromkeys(tuple(max(2, size // options.scale) for size in shape) for shape in shapes))

    print("; ".join(f"{name} {value}" for name, value in machine(device).items()))
    growth = [
        one
        for sweep, shapes in SWEEPS.items()
        for dtype in (DTYPES if sweep == "rows" else ("float32",))
        for one in grow(sweep, scaled(shapes), dtype, options.rounds, device)
    ]
    print("\n".join(growth_lines(growth)), flush=True)
    heads = [compare_with_head(shape, options.rounds, options.slice, device) for shape in scaled(HEADS)]
    print("fp32, compared with the head's matmul; * scaled from a part of the rows")
    print("\n".join(head_lines(heads)))
    write_summary(options.out, [{**row, **machine(device), "rounds": options.rounds} for row in (*growth, *heads)])


if __name__ == "__main__":
    main()
