"""Start-up time of `lit-lipschitz fit`, from the shell to the first optimizer step, by phases.

    python benchmarks/startup.py [--rounds 5] [--config mnist.yaml]

Fresh processes, in turns: `lit-lipschitz fit --config mnist.yaml`, and the smallest program with a LightningCLI, one
linear layer and a batch of random numbers. Both are stopped in their first optimizer step. What the first takes beyond
the second, apart from the arithmetic (the sanity check and the first batch), is the project's own. Seconds: medians and
quartiles, kept in results/startup.csv. MNIST's files are looked for in $LIT_LIPSCHITZ_DATA.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rows import read_summary, write_summary

RESULTS = Path(__file__).parent / "results" / "startup.csv"
PHASES = {
    "python": "Python itself",
    "torch": "`import torch`",
    "lightning": "`import lightning.pytorch.cli`",
    "ours": "`import lit_lipschitz.cli.fit.command`",
    "parse": "parser, config, and the trainer with its callbacks",
    "setup": "network and data module made",
    "sanity": "data read, optimizer and checks",
    "train": "sanity check (validation batches)",
    "batch": "to the first training batch",
    "step": "first forward and backward",
}
ARITHMETIC = ("train", "step")
"""Phases in which the network runs."""
TOTALS = {
    "all": "all",
    "own": "overhead of the project: all differences except in imports, sanity check, and first forward and backward",
    "import": "`import lit_lipschitz` alone",
}
IMPORTS = ("python", "torch", "lightning")


def child(kind: str, arguments: list[str]) -> None:
    """Runs one of the two programs up to its first step, prints the times, and ends the process."""
    moments = {"start": float(os.environ["STARTED_AT"]), "python": time.time()}
    import torch  # noqa: F401

    moments["torch"] = time.time()
    import lightning.pytorch.cli

    moments["lightning"] = time.time()
    if kind == "fit":
        from lit_lipschitz.cli.fit.command import run
    moments["ours"] = time.time()
    install_callback(moments)
    options = ["--trainer.callbacks", "moments.Moments", *arguments]
    if kind == "fit":
        sys.exit(run(arguments=["fit", *options]))
    lightning.pytorch.cli.LightningCLI(smallest_module(), args=["fit", *options])


def install_callback(moments: dict[str, float]) -> None:
    """Makes a callback that records when the trainer reaches what, importable as ``moments.Moments``."""
    import lightning

    class Moments(lightning.Callback):
        """Records times, and ends the process in the first optimizer step."""

        def __init__(self) -> None:
            moments["parse"] = time.time()

        def setup(self, *_: object, **__: object) -> None:
            """Network, data and trainer are there."""
            moments.setdefault("setup", time.time())

        def on_sanity_check_start(self, *_: object) -> None:
            """The data are read."""
            moments["sanity"] = time.time()

        def on_train_start(self, *_: object) -> None:
            """The sanity check is done."""
            moments["train"] = time.time()

        def on_train_batch_start(self, *_: object) -> None:
            """The first batch is there."""
            moments["batch"] = time.time()

        def on_before_optimizer_step(self, *_: object) -> None:
            """Forward and backward are done."""
            moments["step"] = time.time()
            print("MOMENTS", json.dumps(moments), flush=True)
            os._exit(0)

    sys.modules["moments"] = module = type(sys)("moments")
    Moments.__module__ = "moments"
    module.Moments = Moments  # type: ignore[attr-defined]


def smallest_module() -> Any:
    """A LightningModule of one layer that brings its data."""
    import lightning
    import torch

    class Smallest(lightning.LightningModule):
        """One layer."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            """Any loss."""
            return self.layer(batch).sum()

        def validation_step(self, batch: torch.Tensor, _: int) -> None:
            """Nothing."""

        def configure_optimizers(self) -> torch.optim.Optimizer:
            """Any."""
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def train_dataloader(self) -> torch.utils.data.DataLoader:
            """One batch."""
            return torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=4)  # type: ignore[arg-type]

        val_dataloader = train_dataloader

    return Smallest


def launch(kind: str, config: str) -> dict[str, float]:
    """Seconds of each phase of one process."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--trainer.default_root_dir", folder]
        if kind == "fit":
            configs = Path(__file__).parents[1] / "configs"
            arguments = ["--config", str(configs / config), "--data.verify", "false", *arguments]
        command = [sys.executable, __file__, "--child", kind, *arguments]
        environment = {**os.environ, "STARTED_AT": str(time.time())}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("MOMENTS ")]
    if not found:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    moments = json.loads(found[0].removeprefix("MOMENTS "))
    before = moments["start"]
    seconds = {}
    for phase in PHASES:
        seconds[phase] = moments[phase] - before
        before = moments[phase]
    return seconds


def import_time() -> float:
    """Seconds that `import lit_lipschitz` takes in a fresh process, beyond Python itself."""
    code = "import time; a = time.perf_counter(); import lit_lipschitz; print(time.perf_counter() - a)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Parses the arguments, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--config", default="mnist.yaml", help="a config that comes with the project")
    options = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {"fit": [], "smallest": []}
    launch("smallest", options.config)  # the files are in memory from here on
    for number in range(options.rounds):
        for kind in sorted(runs, reverse=number % 2 == 1):
            runs[kind].append(launch(kind, options.config))
    differences = [
        sum(fit[phase] - smallest[phase] for phase in PHASES if phase not in (*ARITHMETIC, *IMPORTS))
        for fit, smallest in zip(runs["fit"], runs["smallest"], strict=True)
    ]
    columns = [("fit", runs["fit"]), ("smallest", runs["smallest"])]
    rows = [
        *(
            {"phase": phase, **_spread({name: [one[phase] for one in found] for name, found in columns})}
            for phase in PHASES
        ),
        {"phase": "all", **_spread({name: [sum(one.values()) for one in found] for name, found in columns})},
        {"phase": "own", **_spread({"fit": differences})},
        {"phase": "import", **_spread({"fit": [import_time() for _ in range(options.rounds)]})},
    ]
    versions = {name: version(name) for name in ("torch", "lightning", "jsonargparse")}
    device = f"{platform.machine()}, {os.cpu_count()} CPU cores"
    machine = {"config": options.config, "rounds": options.rounds, "device": device, **versions}
    write_summary(RESULTS, [{**row, **machine, "python": platform.python_version()} for row in rows])
    print("\n".join(lines(read_summary(RESULTS))))


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The table, in Markdown."""
    yield "| seconds, median (quartiles) | `lit-lipschitz fit` | smallest LightningCLI |"
    yield "|---|---|---|"
    for row in rows:
        meaning = {**PHASES, **TOTALS}[row["phase"]]
        yield f"| {meaning} | {_text(row, 'fit')} | {_text(row, 'smallest')} |"


def _spread(columns: dict[str, list[float]]) -> dict[str, float]:
    """Median and quartiles of each column."""
    found = {}
    for name, values in columns.items():
        quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        found[f"{name}_low"], found[name], found[f"{name}_high"] = quartiles
    return found


def _text(row: dict[str, Any], name: str) -> str:
    return "" if row[name] is None else f"{row[name]:.3f} ({row[f'{name}_low']:.3f} .. {row[f'{name}_high']:.3f})"


if __name__ == "__main__":
    if "--child" in sys.argv:
        child(sys.argv[2], sys.argv[3:])
    else:
        main()
