"""Kills runs at random moments, resumes them, and compares where they end with the run that nobody disturbed.

A run of digits.yaml with dropout, which writes a checkpoint every 8 optimizer steps, is killed by SIGKILL at a moment
that is uniform over its length (start-up included, as far as a fork has one), resumed with ``--ckpt_path last`` until
it ends, and compared bit for bit: weights, optimizer, scheduler and the callback's state. A run that was killed before
its first checkpoint starts anew, and is counted as such; a kill that came after the end is drawn again.

    python benchmarks/survive.py [--kills 20] [--again 0.5] [--epochs 4] [--seed 0]

``--again`` is the chance that a resumed run is killed as well, and so on. Exits with 1 if a run ended elsewhere.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

# What every run imports: they are forked from this process, which has it.
from lightning.pytorch.loggers import TensorBoardLogger  # noqa: F401
from sklearn.datasets import load_digits

import lit_lipschitz.cli.command  # noqa: F401
from lit_lipschitz.cli.main import main as lit_lipschitz_main


def start(folder: Path, epochs: int, *more: str) -> int:
    """Starts the command in a process of its own; returns its id."""
    process = os.fork()
    if process:
        return process
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    sys.argv = [
        "lit-lipschitz", "fit", "--config", "digits", "--trainer.accelerator", "cpu", "--model.network.dropout", "0.2",
        "--trainer.max_epochs", str(epochs), "--trainer.enable_progress_bar", "false", "--test_after_fit", "false",
        "--checkpoint.every_n_train_steps", "8", "--trainer.default_root_dir", str(folder), *more,
    ]  # fmt: skip
    code = 70
    try:
        code = lit_lipschitz_main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 70
    finally:
        os._exit(code)


def end(process: int) -> int:
    """Waits for a process; its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def killed(process: int, seconds: float) -> bool:
    """Kills a process after so many seconds; False if it has ended before that."""
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    return end(process) == -signal.SIGKILL


def checkpoints(folder: Path) -> list[Path]:
    """The last checkpoints of all runs in a folder, the newest one last."""
    found = folder.glob("lightning_logs/*/checkpoints/last*.ckpt")
    return sorted(found, key=lambda path: path.stat().st_mtime)


def state(folder: Path) -> dict[str, object]:
    """What has to be the same at the end."""
    content = torch.load(checkpoints(folder)[-1], weights_only=True)
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "seed")
    return {**{key: content[key] for key in kept}, "LipschitzLR": content["callbacks"]["LipschitzLR"]}


def differences(first: object, second: object, path: str = "") -> list[str]:
    """Where two states differ, tensors bit for bit."""
    if isinstance(first, dict) and isinstance(second, dict):
        keys = {*first, *second}
        return [
            where for key in keys for where in differences(first.get(key), second.get(key), f"{path}.{key}".lstrip("."))
        ]
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)) and len(first) == len(second):
        pairs = zip(first, second, strict=True)
        return [where for i, (one, other) in enumerate(pairs) for where in differences(one, other, f"{path}.{i}")]
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        equal = first.dtype == second.dtype and first.shape == second.shape
        return (
            [] if equal and torch.equal(first.view(-1).view(torch.uint8), second.view(-1).view(torch.uint8)) else [path]
        )
    return [] if first == second else [path]


def trial(folder: Path, options: argparse.Namespace, length: float, counts: Counter[str], chance: random.Random) -> str:
    """One run, killed and resumed until its end; what happened, for a line."""
    told: list[str] = []
    resume: tuple[str, ...] = ()
    while not told or chance.random() < options.again:
        moment = chance.uniform(0, length)
        if not killed(start(folder, options.epochs, *resume), moment):
            if told:
                return ", ".join(told)
            # Another run in its place, which must not find the checkpoints of this one.
            shutil.rmtree(folder / "lightning_logs")
            continue
        left = checkpoints(folder)
        step = torch.load(left[-1], weights_only=True)["global_step"] if left else None
        counts["kills"] += 1
        counts["before the first checkpoint"] += step is None
        told.append(f"{moment:.2f} s ({'no checkpoint' if step is None else f'step {step}'})")
        resume = () if step is None else ("--ckpt_path", "last")
    if code := end(start(folder, options.epochs, *resume)):
        counts["ended with an error"] += 1
        print((folder / "log.txt").read_text()[-2000:])
        return f"{', '.join(told)}: exit code {code}"
    return ", ".join(told)


def measure(options: argparse.Namespace, root: Path) -> int:
    """Makes all runs and prints; returns the exit code."""
    load_digits()
    counts: Counter[str] = Counter()
    chance = random.Random(options.seed)
    whole = root / "whole"
    whole.mkdir()
    began = time.monotonic()
    if end(start(whole, options.epochs)):
        sys.exit((whole / "log.txt").read_text())
    length = time.monotonic() - began
    expected = state(whole)
    print(f"undisturbed: {expected['global_step']} steps in {length:.1f} s, a checkpoint every 8", flush=True)
    while counts["kills"] < options.kills:
        folder = root / f"run{counts['runs']}"
        folder.mkdir()
        counts["runs"] += 1
        told = trial(folder, options, length, counts, chance)
        found = differences(expected, state(folder))
        counts["the same, bit for bit"] += not found
        print(f"killed at {told}: {'DIFFERENT: ' + ', '.join(found[:4]) if found else 'the same'}", flush=True)
    print(
        f"{counts['kills']} kills in {counts['runs']} runs; {counts['before the first checkpoint']} kills came before "
        f"the first checkpoint (begun anew); {counts['ended with an error']} runs ended with an error; "
        f"{counts['the same, bit for bit']} of {counts['runs']} runs ended as the undisturbed one, bit for bit"
    )
    return int(counts["the same, bit for bit"] < counts["runs"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--again", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    with tempfile.TemporaryDirectory() as root:
        sys.exit(measure(parser.parse_args(), Path(root)))
