"""Where the time from the shell to the first optimizer step goes, and how much of it is this project's own.

    python benchmarks/startup.py [--rounds 5] [--config mnist.yaml]

Fresh processes, in turns: `lit-lipschitz fit --config mnist.yaml`, and the smallest program with a LightningCLI, one
linear layer and a batch of random numbers. Both are stopped in their first optimizer step. What the first takes beyond
the second, apart from the arithmetic (the sanity check and the first batch), is the project's own. Seconds: medians and
quartiles; results/startup.json keeps them. MNIST's files are looked for in $LIT_LIPSCHITZ_DATA.
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

RESULTS = Path(__file__).parent / "results" / "startup.json"
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
IMPORTS = ("python", "torch", "lightning")


def child(kind: str, arguments: list[str]) -> None:
    """Runs one of the two programs up to its first step, prints the moments, and ends the process."""
    moments = {"start": float(os.environ["STARTED_AT"]), "python": time.time()}
    import torch

    moments["torch"] = time.time()
    import lightning.pytorch.cli

    moments["lightning"] = time.time()
    if kind == "fit":
        from lit_lipschitz.cli.fit.command import run

        moments["ours"] = time.time()
    else:
        moments["ours"] = time.time()

    class Moments(lightning.Callback):
        """Notes when the trainer gets to what."""

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
    options = ["--trainer.callbacks", "moments.Moments", *arguments]
    if kind == "fit":
        sys.exit(run(arguments=["fit", *options]))

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

    lightning.pytorch.cli.LightningCLI(Smallest, args=["fit", *options])


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
    table = {phase: {kind: _spread([run[phase] for run in runs[kind]]) for kind in runs} for phase in PHASES}
    own = [
        sum(fit[phase] - smallest[phase] for phase in PHASES if phase not in (*ARITHMETIC, *IMPORTS))
        for fit, smallest in zip(runs["fit"], runs["smallest"], strict=True)
    ]
    versions = {name: version(name) for name in ("torch", "lightning", "jsonargparse")}
    result = {
        "config": options.config,
        "rounds": options.rounds,
        "phases": table,
        "all": {kind: _spread([sum(run.values()) for run in runs[kind]]) for kind in runs},
        "own": _spread(own),
        "import": _spread([import_time() for _ in range(options.rounds)]),
        "device": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "python": platform.python_version(),
        **versions,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(", ".join(str(result[name]) for name in ("config", "rounds", "device", "python", *versions)))
    print("\n".join(lines(result)))


def read() -> dict[str, Any]:
    """The newest result."""
    result: dict[str, Any] = json.loads(RESULTS.read_text())
    return result


def lines(result: dict[str, Any]) -> Iterator[str]:
    """The table, in Markdown."""
    yield "| seconds, median (quartiles) | `lit-lipschitz fit` | smallest LightningCLI |"
    yield "|---|---|---|"
    for phase, meaning in PHASES.items():
        found = result["phases"][phase]
        yield f"| {meaning} | {_text(found['fit'])} | {_text(found['smallest'])} |"
    yield f"| all | {_text(result['all']['fit'])} | {_text(result['all']['smallest'])} |"
    yield f"| the project's own: all differences but those of imports and arithmetic | {_text(result['own'])} | |"
    yield f"| `import lit_lipschitz` alone | {_text(result['import'])} | |"


def _spread(values: list[float]) -> list[float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return [middle, low, high]


def _text(spread: list[float]) -> str:
    return "{:.3f} ({:.3f} .. {:.3f})".format(*spread)


if __name__ == "__main__":
    if "--child" in sys.argv:
        child(sys.argv[2], sys.argv[3:])
    else:
        main()
