"""Training speed of `lit-lipschitz fit`, compared with a plain PyTorch loop and with a usual Lightning set-up.

    python benchmarks/throughput.py [--networks mnist_cnn,resnet20,...] [--batches 128,512] [--turns 20]

For each network, batch size, precision and eager or compiled, four ways:

    loop      plain PyTorch over tensors on the device, with the same augmentation, optimizer and schedule
    fit       `lit-lipschitz fit`, with everything that it has on by default, LipschitzLR among it
    no rate   the same without LipschitzLR (`--fixed_rate true`)
    workers   the same as that, with torchvision's transforms image by image in the workers of a DataLoader

The second and the third take turns with the first, step by step (on a GPU 20 steps by 20), so that a slow phase of the
machine slows both; the workers, which would keep working in the other's turn, run by themselves. A row is the median
step with quartiles, images a second, and the speed as a share of that of `loop` in the step before (of the workers: of
its median): median and quartiles, in wall time and in CPU time of the training thread, which other processes disturb
less. Rows are kept in results/throughput.csv as soon as they are measured, each with versions
and hardware; `--print` prints the table from there. The images are random; nothing is downloaded.
"""

import argparse
import contextlib
import io
import json
import logging
import platform
import shutil
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import lightning as L
import torch
from figures import device_name, quartiles
from rows import read_summary, write_summary
from torch import nn
from workloads import RandomCIFAR10, RandomMNIST, Turns, plain_loop

import lit_lipschitz
from lit_lipschitz.cli.fit.command import run

RESULTS = Path(__file__).parent / "results" / "throughput.csv"
NETWORKS: dict[str, tuple[str, str]] = {
    "mlp": ("MLP", "mnist"),
    "mnist_cnn": ("MNISTCNN", "mnist"),
    "resnet20": ("ResNetV1", "cifar10"),
    "densenet40": ("DenseNet", "cifar10"),
    "resnet9": ("ResNet9", "cifar10"),
}
"""Name: class, data. The MLP shows the cost of a step beyond the arithmetic."""
WAYS = ("fit", "no rate", "workers")
SKIP = 4 if torch.cuda.is_available() else 5
"""Turns that are not counted: allocations, compilation, and the first updates of the rate."""


def arguments_of(name: str) -> dict[str, Any]:
    """Arguments of a network that differ from its defaults."""
    return {"in_shape": [1, 28, 28]} if name == "mlp" else {}


def one(way: str, name: str, batch_size: int, precision: str, compiled: bool, turns: int, stride: int) -> Turns:
    """Trains a network one way and another in the plain loop, in turns."""
    kind, data = NETWORKS[name]
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    if compiled:
        # Both networks are of one class, and only one has the callback's hook.
        torch._dynamo.config.skip_nnmodule_hook_guards = False
    steps = (turns + SKIP + 1) * stride
    module = (RandomMNIST if data == "mnist" else RandomCIFAR10)(batch_size=batch_size, val_split=0.0)
    network: nn.Module = getattr(lit_lipschitz, kind)(**arguments_of(name))
    alone = way == "workers"
    Turns.partner = repeat(None) if alone else plain_loop(module, network, steps, device, precision, compiled)
    folder = tempfile.mkdtemp()
    try:
        _fit(way, name, batch_size, precision, compiled, steps, stride, folder)
    finally:
        shutil.rmtree(folder)
    assert Turns.last is not None
    return Turns.last


def _fit(
    way: str, name: str, batch_size: int, precision: str, compiled: bool, steps: int, stride: int, folder: str
) -> None:
    """Runs the command in this process, on a config of its own."""
    kind, data = NETWORKS[name]
    random = "workloads.RandomMNIST" if data == "mnist" else "workloads.RandomCIFAR10"
    loader = (
        {"class_path": "workloads.PerImage", "init_args": {"data": data, "batch_size": batch_size}}
        if way == "workers"
        else {"class_path": random, "init_args": {"batch_size": batch_size, "val_split": 0.0}}
    )
    config = {
        "seed_everything": 0,
        "data": loader,
        "model": {
            "class_path": "lit_lipschitz.ImageClassifier",
            "init_args": {
                "network": {"class_path": f"lit_lipschitz.{kind}", "init_args": arguments_of(name)},
                "scheduler": {"class_path": "lit_lipschitz.LinearWarmupDecay"},
                "channels_last": torch.cuda.is_available(),
                "compile": "default" if compiled else None,
            },
        },
        "fixed_rate": way != "fit",
        "test_after_fit": False,
        "trainer": {
            "default_root_dir": folder,
            "max_steps": steps,
            "max_epochs": -1,
            "precision": precision,
            "accelerator": "auto",
            "devices": 1,
            "callbacks": [{"class_path": "workloads.Turns", "init_args": {"skip": SKIP, "stride": stride}}],
        },
    }
    path = Path(folder, "config.yaml")
    path.write_text(json.dumps(config))  # JSON is YAML
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = run(arguments=["fit", "--config", str(path)])
    if code:
        sys.exit(f"lit-lipschitz fit ended with {code}:\n{said.getvalue()}")


def measure(
    name: str, batch_size: int, precision: str, compiled: bool, ways: list[str], turns: int, stride: int
) -> list[dict[str, Any]]:
    """The rows of one network and setting; that of `loop` is over all turns with the others."""
    setting = {"network": name, "batch_size": batch_size, "precision": precision, "compiled": compiled}
    rows, loop_seconds = [], list[float]()
    for way in ways:
        run = one(way, name, batch_size, precision, compiled, turns, stride)
        seconds = run.seconds()
        if way != "workers":
            loop_seconds += seconds["wall loop"]
        row = {**setting, "way": way, **_sizes(seconds["wall trainer"], batch_size), "end_ms": 1e3 * run.end}
        for clock, label in (("wall", "speed"), ("cpu", "cpu_speed")):
            loop, trainer = seconds[f"{clock} loop"], seconds[f"{clock} trainer"]
            if way == "workers":
                if clock == "cpu" or not loop_seconds:
                    continue
                loop = [statistics.median(loop_seconds)] * len(trainer)
            row.update(_spread(label, [one / other for one, other in zip(loop, trainer, strict=True)]))
        rows.append({**row, "turns": len(run.turns), "stride": stride})
    return [{**setting, "way": "loop", **_sizes(loop_seconds, batch_size)}, *rows]


def _sizes(seconds: list[float], batch_size: int) -> dict[str, Any]:
    found = _spread("ms", [1e3 * one for one in seconds])
    return {**found, "images_per_second": 1e3 * batch_size / found["ms"]}


def _spread(name: str, values: list[float]) -> dict[str, float]:
    low, middle, high = quartiles(values)
    return {name: middle, f"{name}_low": low, f"{name}_high": high}


def hardware() -> dict[str, str]:
    """Where it runs."""
    device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    versions = {"torch": torch.__version__, "lightning": L.__version__, "python": platform.python_version()}
    return {"device": device, **versions}


def read() -> list[dict[str, Any]]:
    """The rows of the file."""
    rows = read_summary(RESULTS) if RESULTS.exists() else []
    order = {name: i for i, name in enumerate(NETWORKS)}
    return sorted(rows, key=lambda row: (row["device"], order[row["network"]], row["batch_size"], row["compiled"]))


def keep(rows: list[dict[str, Any]]) -> None:
    """Puts rows into the file, which replace older ones of the same setting and device."""
    key = ("network", "batch_size", "precision", "compiled", "way", "device")
    new = {tuple(row[name] for name in key) for row in rows}
    write_summary(RESULTS, [*(row for row in read() if tuple(row[name] for name in key) not in new), *rows])


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The table, in Markdown."""
    yield "| network | batch | | way | ms a step (quartiles) | images/s | speed, `loop` = 1 (quartiles) | by CPU time |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in rows:
        speeds = [_ratio(row, "speed"), _ratio(row, "cpu_speed")]
        kind = f"{row['precision']}{', compiled' if row['compiled'] else ''}"
        yield (
            f"| {row['network']} | {row['batch_size']} | {kind} | {row['way']} | {row['ms']:.4g} "
            f"({row['ms_low']:.4g} .. {row['ms_high']:.4g}) | {row['images_per_second']:.4g} | {' | '.join(speeds)} |"
        )


def _ratio(row: dict[str, Any], name: str) -> str:
    if row.get(name) is None:
        return "1" if row["way"] == "loop" else ""
    return f"{row[name]:.3f} ({row[f'{name}_low']:.3f} .. {row[f'{name}_high']:.3f})"


def main() -> None:
    """Parses the arguments, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--networks", default="mlp,mnist_cnn,resnet20,densenet40,resnet9")
    parser.add_argument("--batches", default="128,512")
    parser.add_argument("--ways", default=",".join(WAYS))
    half = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    parser.add_argument("--precisions", default="32-true,bf16-mixed" if half else "32-true")
    parser.add_argument("--compiled", default="no,yes", help="no, yes or both")
    parser.add_argument("--turns", type=int, default=20, help="of each two that are compared")
    parser.add_argument("--print", action="store_true", help="print the table of the results and measure nothing")
    options = parser.parse_args()
    if options.print:
        print("\n".join(lines(read())))
        return
    warnings.filterwarnings("ignore")
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    stride = 20 if torch.cuda.is_available() else 1
    where = hardware()
    print(", ".join(where.values()), flush=True)
    print("\n".join(list(lines([]))), flush=True)
    for name in options.networks.split(","):
        for batch_size in map(int, options.batches.split(",")):
            for precision in options.precisions.split(","):
                for compiled in options.compiled.split(","):
                    setting = (name, batch_size, precision, compiled == "yes")
                    rows = measure(*setting, options.ways.split(","), options.turns, stride)
                    keep([{**row, **where} for row in rows])
                    print("\n".join(list(lines(rows))[2:]), flush=True)


if __name__ == "__main__":
    main()
