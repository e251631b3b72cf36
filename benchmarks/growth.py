"""How the callback's statistic grows with the batch, the head's width and the number of classes, beside the head.

Measures the time and the most extra memory of what the callback does with a batch, under each norm, over rows, width
and classes, and fits the slope in log-log coordinates; then puts it beside the head's own matmul, forward alone and
forward with backward, in turns in one process. Prints tables and writes a JSON file:

    python benchmarks/growth.py [--rounds 9] [--device cpu] [--threads 1] [--out benchmarks/results/growth.json]

A head whose matmul would take more than ``--slice`` floating-point operations is measured on as many of its rows as
fit, and its time is multiplied by the rest; the tables mark it with a star. The statistic is always measured on all
rows. With one thread a time is the process's own on the CPU, which others on the machine do not add to.
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from figures import device_name, quartiles
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from lit_lipschitz.measurement.running_maximum import RunningMaximum

OUT = Path(__file__).parent / "results" / "growth.json"
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


@dataclass(frozen=True)
class Grown:
    """A measurement of the statistic: quartiles of milliseconds, and elements read and written (:class:`Touched`)."""

    sweep: str
    statistic: str
    dtype: str
    rows: int
    width: int
    classes: int
    ms: tuple[float, float, float]
    peak_bytes: int
    touched: int


@dataclass(frozen=True)
class Beside:
    """The statistic beside the head: milliseconds (quartiles), and the medians' ratios."""

    rows: int
    width: int
    classes: int
    measured_rows: int  # of the head; its time is multiplied by rows / measured_rows
    forward_ms: tuple[float, float, float]
    both_ms: tuple[float, float, float]
    statistic_ms: dict[str, tuple[float, float, float]]
    of_forward: dict[str, float]
    of_both: dict[str, float]


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


def milliseconds(seconds: Sequence[float], times: float = 1.0) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    low, median, high = quartiles([1e3 * one * times for one in seconds])
    return low, median, high


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


def grow(sweep: str, shapes: Sequence[Shape], dtype: str, rounds: int, device: torch.device) -> list[Grown]:
    """The statistic over shapes."""
    found = []
    for rows, width, classes in shapes:
        activations = torch.randn(rows, width, device=device).relu().to(DTYPES[dtype])
        functions = updates(activations)
        seconds = in_turns(functions, rounds, device)
        for name, function in functions.items():
            with Touched() as touched:
                function()
            peak = peak_bytes(function, device)
            ms = milliseconds(seconds[name])
            found.append(Grown(sweep, name, dtype, rows, width, classes, ms, peak, touched.elements))
    return found


def slope(measured: Sequence[Grown]) -> float | None:
    """The power of the number of activations with which the time grows, by least squares, where they are large."""
    points = [(math.log(g.rows * g.width), math.log(g.ms[1])) for g in measured if g.rows * g.width >= LARGE]
    if len({x for x, _ in points}) < 2:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def beside(shape: Shape, rounds: int, most: float, device: torch.device) -> Beside:
    """The statistic beside the head's matmul, in fp32."""
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
    own = {name: milliseconds(seconds[name]) for name in STATISTICS}
    heads = {name: milliseconds(seconds[name], rows / part) for name in ("forward", "both")}
    ratios = [{name: ms[1] / heads[of][1] for name, ms in own.items()} for of in ("forward", "both")]
    return Beside(rows, width, classes, part, heads["forward"], heads["both"], own, *ratios)


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    return {
        "device": device_name(device),
        "clock": "CPU time" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall clock",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def read() -> dict[str, Any]:
    """The newest results."""
    results: dict[str, Any] = json.loads(OUT.read_text())
    return {
        **results,
        "growth": [Grown(**{**one, "ms": tuple(one["ms"])}) for one in results["growth"]],
        "heads": [Beside(**one) for one in results["heads"]],
    }


def growth_lines(results: dict[str, Any]) -> Iterator[str]:
    """Tables in Markdown, one a sweep and type: median milliseconds and the most memory beyond the activations."""
    measured: list[Grown] = results["growth"]
    for sweep, dtype in dict.fromkeys((g.sweep, g.dtype) for g in measured):
        rows = [g for g in measured if (g.sweep, g.dtype) == (sweep, dtype)]
        yield f"| over {sweep}, {dtype} | {' | '.join(_NAMES)} |"
        yield "|---" * (len(_NAMES) + 1) + "|"
        for shape in dict.fromkeys((g.rows, g.width, g.classes) for g in rows):
            cells = [g for g in rows if (g.rows, g.width, g.classes) == shape]
            texts = [f"{g.ms[1]:.2f} ms, {g.peak_bytes / 1024:,.0f} KiB" for g in cells]
            yield f"| {_label(*shape)} | {' | '.join(texts)} |"
        slopes = [slope([g for g in rows if g.statistic == name]) for name in STATISTICS]
        if any(found is not None for found in slopes):
            yield f"| power of n d | {' | '.join('' if found is None else f'{found:.2f}' for found in slopes)} |"
        yield ""


def head_lines(results: dict[str, Any]) -> Iterator[str]:
    """A table in Markdown: median milliseconds of a head's matmul, and each statistic's share of it."""
    yield f"| rows x width, classes | forward | with backward | {' | '.join(_NAMES)} |"
    yield "|---" * (len(_NAMES) + 3) + "|"
    for head in results["heads"]:
        star = "*" if head.measured_rows < head.rows else ""
        shares = [f"{100 * head.of_forward[name]:.3g} %, {100 * head.of_both[name]:.3g} %" for name in STATISTICS]
        times = f"{head.forward_ms[1]:,.2f} ms | {head.both_ms[1]:,.2f} ms"
        yield f"| {_label(head.rows, head.width, head.classes)}{star} | {times} | {' | '.join(shares)} |"


_NAMES = [", ".join(f"`{part}`" for part in name.split(", ")) for name in STATISTICS]


def _label(rows: int, width: int, classes: int) -> str:
    return f"{rows:,} x {width:,}, {classes:,}"


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
    print("\n".join(growth_lines({"growth": growth})), flush=True)
    heads = [beside(shape, options.rounds, options.slice, device) for shape in scaled(HEADS)]
    print("fp32, beside the head's matmul; * scaled from a part of the rows")
    print("\n".join(head_lines({"heads": heads})))
    slopes = {
        f"{sweep}, {dtype}, {name}": found
        for sweep, dtype, name in dict.fromkeys((g.sweep, g.dtype, g.statistic) for g in growth)
        if (found := slope([g for g in growth if (g.sweep, g.dtype, g.statistic) == (sweep, dtype, name)])) is not None
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results = {
        "machine": machine(device),
        "rounds": options.rounds,
        "slopes": slopes,
        "growth": [asdict(one) for one in growth],
        "heads": [asdict(one) for one in heads],
    }
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
