"""Kills runs at random moments, resumes them, and compares where they end; then breaks what they read and write.

A run of digits.yaml with dropout, which writes a checkpoint every 8 optimizer steps, is killed by SIGKILL at a moment
that is uniform over its length (start-up included, as far as a fork has one), resumed with ``--ckpt_path last`` until
it ends, and compared bit for bit: weights, optimizer, scheduler and the callback's state. A run that was killed before
its first checkpoint starts from the beginning, and is counted as such; a kill that came after the end is drawn again.

Then runs are ended by SIGTERM and SIGINT at random moments, which have to give the conventional exit code, and resumed
and compared likewise. Then a finished run goes on with something broken: a full disk (no file may be larger than a part
of a checkpoint, or than a few points of a curve), folders that can't be written, checkpoints that are cut off, of
another network, none at all or with code in them, and data files that are cut off; and with configs and values that
make no sense. Each has to end with one line on stderr and code 1 (of the last ones code 2), and to leave the run's
checkpoints byte for byte as they were. One of two ranks is killed, or stopped for a while, and several writers of one
file race (``races.py``). At last, damaged files are read as ``fuzz.py`` does. A summary of all ends the output.

    python benchmarks/survive.py [--kills 20] [--again 0.5] [--signals 5] [--breaks 5] [--ranks 4] [--races 20]
                               [--epochs 4] [--files 2000] [--seed 0]

``--again`` is the chance that a resumed run is killed as well, and so on; ``--signals`` are of each kind, and
``--breaks`` of each that depends on chance; ``--ranks`` are faults of each kind. Exits with 1 if anything was
otherwise.
"""

import argparse
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from fuzz import fuzz, report

# What every run imports: they are forked from this process, which has it.
from lightning.pytorch.loggers import TensorBoardLogger  # noqa: F401
from races import rank_faults, writers_raced
from sklearn.datasets import load_digits

import lit_lipschitz.cli.fit.command  # noqa: F401
from lit_lipschitz.cli.main import main as lit_lipschitz_main


def arguments(folder: Path, epochs: int) -> list[str]:
    """The command."""
    return [
        "fit", "--config", "digits", "--trainer.accelerator", "cpu", "--model.network.dropout", "0.2",
        "--trainer.max_epochs", str(epochs), "--trainer.enable_progress_bar", "false", "--test_after_fit", "false",
        "--checkpoint.every_n_train_steps", "8", "--trainer.default_root_dir", str(folder),
    ]  # fmt: skip


def start(folder: Path, epochs: int, *more: str, before: Callable[[], object] = int) -> int:
    """Starts the command in a process of its own, after a function has run in it; returns its id."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:  # nothing of the parent's may run here, whatever happens
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        # A shell has what it runs in the background ignore it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["lit-lipschitz", *arguments(folder, epochs), *more]
        before()
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
    return ended_by(process, seconds, signal.SIGKILL) == -signal.SIGKILL


def ended_by(process: int, seconds: float, number: signal.Signals) -> int:
    """Sends a process a signal after so many seconds; its exit code as :func:`end` has it."""
    time.sleep(seconds)
    os.kill(process, number)
    return end(process)


def checkpoints(folder: Path) -> list[Path]:
    """The last checkpoints of all runs in a folder, the newest one last."""
    found = folder.glob("lightning_logs/*/checkpoints/last*.ckpt")
    return sorted(found, key=lambda path: path.stat().st_mtime)


def state(folder: Path) -> dict[str, object]:
    """The part of the last checkpoint that must be equal at the end."""
    content = torch.load(checkpoints(folder)[-1], weights_only=True)
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "seed")
    # Lightning's "epoch" is the epoch that has ended, or, where a run was resumed from its last step, the next one.
    epochs = content["loops"]["fit_loop"]["epoch_progress"]["current"]["ready"]
    same = {"epochs": epochs, "LipschitzLR": content["callbacks"]["LipschitzLR"]}
    return {**{key: content[key] for key in kept}, **same}


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
    moments: list[str] = []
    resume: tuple[str, ...] = ()
    while not moments or chance.random() < options.again:
        moment = chance.uniform(0, length)
        if not killed(start(folder, options.epochs, *resume), moment):
            if moments:
                return ", ".join(moments)
            # The run is repeated, and must not find the checkpoints of this one.
            shutil.rmtree(folder / "lightning_logs")
            continue
        left = checkpoints(folder)
        step = torch.load(left[-1], weights_only=True)["global_step"] if left else None
        counts["kills"] += 1
        counts["before the first checkpoint"] += step is None
        moments.append(f"{moment:.2f} s ({'no checkpoint' if step is None else f'step {step}'})")
        resume = () if step is None else ("--ckpt_path", "last")
    if code := end(start(folder, options.epochs, *resume)):
        counts["ended with an error"] += 1
        print((folder / "log.txt").read_text()[-2000:])
        return f"{', '.join(moments)}: exit code {code}"
    return ", ".join(moments)


def signalled(
    root: Path, options: argparse.Namespace, length: float, expected: dict[str, object], chance: random.Random
) -> bool:
    """Ends runs by SIGTERM and SIGINT, resumes them, and prints; returns whether all was as it has to be."""
    right = True
    for number in (signal.SIGTERM, signal.SIGINT):
        counts: Counter[str] = Counter()
        for i in range(options.signals):
            folder = root / f"{number.name}{i}"
            folder.mkdir()
            code = ended_by(start(folder, options.epochs), chance.uniform(0, length), number)
            while code == 0:  # it had ended before
                shutil.rmtree(folder / "lightning_logs")
                code = ended_by(start(folder, options.epochs), chance.uniform(0, length), number)
            # Before Python has installed its handlers a signal ends it: to a shell that is the same code.
            counts["code"] += code in (128 + number, -number)
            counts["one"] += "Traceback" not in (folder / "log.txt").read_text()
            left = checkpoints(folder)
            counts["saved"] += bool(left)
            resume = ("--ckpt_path", "last") if left else ()
            counts["same"] += end(start(folder, options.epochs, *resume)) == 0 and not differences(
                expected, state(folder)
            )
        print(
            f"{number.name}: {options.signals} runs; {counts['code']} with exit code {128 + number}, {counts['one']} "
            f"without a traceback; {counts['saved']} left a checkpoint, the others restarted from scratch; "
            f"{counts['same']} ended as the undisturbed one, bit for bit",
            flush=True,
        )
        right = right and counts["code"] == counts["one"] == counts["same"] == options.signals
    return right


class Break(NamedTuple):
    """Something that is broken, and how the command meets it."""

    kind: str
    options: tuple[str, ...]
    before: Callable[[], object] = int
    restricted: bool = False  # whether root's right to write anywhere is taken away
    code: int = 1  # the exit code that it must have


class Evil:
    """An object whose unpickling runs code."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return os.mkdir, ("ran",)


def limit(size: int) -> None:
    """Has this process write no file beyond a size, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def write_mnist(folder: Path) -> list[Path]:
    """Files in MNIST's format; what is in them is random."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    chance = random.Random(0)
    for part, count in (("train", 60), ("t10k", 20)):
        images = struct.pack(">4i", 2051, count, 28, 28) + chance.randbytes(count * 28 * 28)
        labels = struct.pack(">2i", 2049, count) + bytes(chance.randrange(10) for _ in range(count))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    return sorted(raw.iterdir())


def breaks(folder: Path, count: int, chance: random.Random) -> Iterator[Break]:
    """All broken things; each is made when its turn comes."""
    (last,) = checkpoints(folder)
    content = last.read_bytes()
    resume = ("--ckpt_path", "last")
    longer = ("--trainer.max_epochs", "2")
    for _ in range(count):
        size = chance.randrange(len(content) // 3, len(content))
        yield Break("disk full for checkpoints", (*resume, *longer), before=lambda size=size: limit(size))
    rare = ("--checkpoint.every_n_train_steps", "1000", "--trainer.log_every_n_steps", "2",
            "--trainer.enable_model_summary", "false")  # fmt: skip
    for _ in range(count):
        size = chance.randrange(1500, 3000)  # the log is a file too
        yield Break("disk full for curves", (*longer, *rare), before=lambda size=size: limit(size))
    locked = folder / "locked"
    locked.mkdir(mode=0o555)
    yield Break("folder of runs that can't be written", ("--trainer.default_root_dir", str(locked)), restricted=True)
    inside = str(locked / "checkpoints")
    yield Break("folder of checkpoints that can't be written", ("--checkpoint.dirpath", inside), restricted=True)
    bad = folder / "bad.ckpt"
    for _ in range(count):
        bad.write_bytes(content[: chance.randrange(len(content))])
        yield Break("truncated checkpoint", ("--ckpt_path", str(bad), *longer))
    torch.save({**torch.load(last, weights_only=True), "state_dict": {"net.weight": torch.zeros(2)}}, bad)
    yield Break("checkpoint of another network", ("--ckpt_path", str(bad), *longer))
    torch.save({"weight": torch.zeros(2)}, bad)
    yield Break("file of tensors that is no checkpoint", ("--ckpt_path", str(bad), *longer))
    bad.write_text("no archive")
    yield Break("text instead of a checkpoint", ("--ckpt_path", str(bad), *longer))
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0", "evil": Evil()}, bad)
    yield Break("checkpoint with code in it", ("--ckpt_path", str(bad), *longer))
    for i in range(count):
        files = write_mnist(folder / f"data{i}")
        victim = chance.choice([file for file in files if file.name.startswith("train")])
        victim.write_bytes(victim.read_bytes()[: chance.randrange(victim.stat().st_size)])
        data = ("--data", "lit_lipschitz.MNISTDataModule", "--data.data_dir", str(folder / f"data{i}"))
        yield Break("truncated data file", (*data, "--data.batch_size", "4", "--model.network.in_shape", "[1,28,28]"))


BAD_CONFIGS = {
    "anchors that multiply": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)),
    "one that contains itself": "a: &a\n  b: *a\n",
    "one that is 3,000 deep": "{a: " * 3000 + "1" + "}" * 3000,
    "no YAML": "a: [",
    "a list": "- a\n- b\n",
}
BAD_VALUES = (
    ("model.optimizer.lr", "-1"), ("model.optimizer.lr", "x"), ("trainer.accumulate_grad_batches", "0"),
    ("trainer.gradient_clip_val", "-1"), ("trainer.val_check_interval", "1000000000"), ("trainer.max_epochs", "-7"),
    ("data.batch_size", "0"), ("model.network.hidden", "[0]"), ("lipschitz.max_lr", "-1"), ("ckpt_path", ""),
    ("seed_everything", "-1"), ("no_such_option", "1"),
)  # fmt: skip


def bad_inputs(folder: Path) -> Iterator[Break]:
    """Configs and values that make no sense; each is made when its turn comes."""
    for kind, content in BAD_CONFIGS.items():
        (folder / "bad.yaml").write_text(content)
        yield Break(f"bad input: config with {kind}", ("--config", str(folder / "bad.yaml")), code=2)
    for key, value in BAD_VALUES:
        yield Break("bad input: value", (f"--{key}={value}",), code=2)


def run_broken(folder: Path, broken: Break) -> int:
    """Runs the command with something broken; returns its exit code."""
    if not broken.restricted or os.geteuid():
        return end(start(folder, 1, *broken.options, before=broken.before))
    code = "import sys; from lit_lipschitz.cli.main import main; sys.exit(main())"
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    with (folder / "log.txt").open("a") as log:
        command = [*drop, sys.executable, "-c", code, *arguments(folder, 1), *broken.options]
        return subprocess.run(command, stdout=log, stderr=log, check=False).returncode


def break_all(root: Path, count: int, chance: random.Random) -> bool:
    """Breaks one thing after another and prints; returns whether all was as it has to be."""
    folder = root / "broken"
    folder.mkdir()
    if end(start(folder, 1)):
        sys.exit((folder / "log.txt").read_text())
    whole = {path: path.read_bytes() for path in folder.rglob("*.ckpt")}
    counts: dict[str, Counter[str]] = {}
    for broken in chain(breaks(folder, count, chance), bad_inputs(folder)):
        log = folder / "log.txt"
        log.write_text("")
        code = run_broken(folder, broken)
        lines = [line for line in log.read_text().splitlines() if "error" in line.lower() or "Traceback" in line]
        one = len(lines) == 1 and lines[0].startswith("lit-lipschitz: error: ")
        kept = all(path.read_bytes() == content for path, content in whole.items())
        clean = not [*folder.rglob("*.part")] and not (folder / "ran").exists() and not Path("ran").exists()
        counts.setdefault(broken.kind, Counter()).update(
            tries=1, right=int(right := code == broken.code and one and kept and clean)
        )
        if not right:
            print(f"{broken.kind}: code {code}, {lines}, earlier checkpoints {'whole' if kept else 'damaged'}")
    for kind, found in counts.items():
        code = 2 if kind.startswith("bad input") else 1
        ended = f"{found['right']} of {found['tries']} ended with one line and code {code}"
        print(f"{kind}: {ended}, nothing lost: earlier checkpoints whole")
    return all(found["right"] == found["tries"] for found in counts.values())


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
        moments = trial(folder, options, length, counts, chance)
        found = differences(expected, state(folder))
        counts["the same, bit for bit"] += not found
        print(f"killed at {moments}: {'DIFFERENT: ' + ', '.join(found[:4]) if found else 'the same'}", flush=True)
    print(
        f"{counts['kills']} kills in {counts['runs']} runs; {counts['before the first checkpoint']} kills came before "
        f"the first checkpoint (restarted from scratch); {counts['ended with an error']} runs ended with an error; "
        f"{counts['the same, bit for bit']} of {counts['runs']} runs ended as the undisturbed one, bit for bit"
    )
    results = {f"{counts['kills']} kills resumed": counts["the same, bit for bit"] == counts["runs"]}
    results[f"{2 * options.signals} signals resumed"] = signalled(
        root, options, length, expected, random.Random(options.seed)
    )
    results["broken surroundings and bad inputs refused"] = break_all(root, options.breaks, random.Random(options.seed))
    results[f"{2 * options.ranks} rank faults survived"] = rank_faults(
        root,
        options.ranks,
        lambda folder: arguments(folder, options.epochs),
        lambda folder: bool(checkpoints(folder)),
        state,
        differences,
        random.Random(options.seed),
    )
    results[f"{options.races} races of writers"] = writers_raced(root, options.races, random.Random(options.seed))
    results[f"{options.files} files fuzzed"] = report(fuzz(options.files, options.seed), options.seed)
    for what, right in results.items():
        print(f"{what}: {'nothing lost' if right else 'LOST'}", flush=True)
    return int(not all(results.values()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--again", type=float, default=0.5)
    parser.add_argument("--signals", type=int, default=5)
    parser.add_argument("--breaks", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--races", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    with tempfile.TemporaryDirectory() as root:
        sys.exit(measure(parser.parse_args(), Path(root)))
