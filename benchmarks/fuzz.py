"""Damages checkpoints, CIFAR and MNIST files at random and reads them: each is read, or refused in one line.

A file is one of a few whole ones with bytes changed, removed, repeated or cut off; of a checkpoint half of the time in
its pickle alone, in an archive that is whole again. Processes read 250 files each. Counted as a fault: another error
than the project's own, a message of several lines, a signal, a file that takes more than 20 s, a process that grows by
more than 1.5 GB, and the import of a module or the start of a program while a file is read.

    python benchmarks/fuzz.py [--files 10000] [--seed 0]

Prints the counts, and exits with 1 if there was a fault.
"""

import argparse
import codecs
import logging
import os
import pickle
import random
import resource
import signal
import struct
import sys
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lit_lipschitz import LipschitzLR, LitLipschitzError
from lit_lipschitz.cli.fit.checkpoints import check_checkpoint
from lit_lipschitz.data.sources import SOURCES

CHUNK = 250  # files that a process reads
FIRST = 40  # files that a process reads before these
SECONDS = 20  # for one file
GROWTH = 1_500_000  # kB of a process
OPCODES = b"\x00\x01\x7f\x80\xff}]()cRbQ0t.BXJKMhqru\x81\x85\x86\x87\x8c\x93\x94\x96"


class Module(L.LightningModule):
    """A small network, whose checkpoint is damaged."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(6, 3)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        """The loss of a batch."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters())


def whole_checkpoint(path: Path) -> bytes:
    """The checkpoint of a short fit with LipschitzLR."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = DataLoader(TensorDataset(torch.randn(32, 6), torch.randint(3, (32,))), batch_size=16)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[LipschitzLR()],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Module(), data)
    trainer.save_checkpoint(path)
    return path.read_bytes()


def whole_batches() -> list[bytes]:
    """Files of CIFAR-10 in each protocol that is read."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3072), dtype=np.uint8)
    batch = {"batch_label": "batch 1", "labels": [0, 1, 2, 3, 9], "data": pixels, "filenames": list("abcde")}
    return [pickle.dumps(batch, protocol=protocol) for protocol in (2, 3, 4, 5)]


def damaged(content: bytes, chance: random.Random) -> bytes:
    """A copy with bytes changed, removed, repeated or cut off at random places."""
    changed = bytearray(content)
    for _ in range(chance.choice([1, 1, 1, 2, 4, 16])):
        if not changed:
            break
        start = chance.randrange(len(changed))
        end = min(len(changed), start + chance.choice([1, 1, 2, 4, 8, 64, 1024]))
        how = chance.randrange(6)
        if how == 0:
            changed[start:end] = chance.randbytes(end - start)
        elif how == 1:
            changed[start] = chance.choice(OPCODES)
        elif how == 2:
            del changed[start:end]
        elif how == 3:
            changed[start:start] = changed[start:end] * chance.choice([1, 2, 100])
        elif how == 4:
            changed[start] ^= 1 << chance.randrange(8)
        elif chance.random() < 0.2:
            del changed[start:]
    return bytes(changed)


def with_damaged_pickle(path: Path, chance: random.Random, target: Path) -> None:
    """Writes a checkpoint's archive with damage in its pickle alone."""
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(target, "w") as archive:
        for name in whole.namelist():
            content = whole.read(name)
            archive.writestr(name, damaged(content, chance) if name.endswith("data.pkl") else content)


class Files:
    """Writes damaged files, each of its seed, and reads them."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._checkpoint = folder, folder / "whole.ckpt"
        self._content, self._batches = whole_checkpoint(self._checkpoint), whole_batches()
        self._images = struct.pack(">4I", 2051, 5, 28, 28) + bytes(5 * 784)
        self._labels = struct.pack(">2I", 2049, 5) + bytes(range(5))

    def next(self, chance: random.Random) -> tuple[str, Callable[[], object]]:
        """What the next file is, and what reads it; writes it."""
        kind = chance.choice(["checkpoint", "pickle of a checkpoint", "CIFAR", "MNIST"])
        path, other = self._folder / "file", self._folder / "labels"
        if kind == "pickle of a checkpoint":
            with_damaged_pickle(self._checkpoint, chance, path)
        elif kind == "checkpoint":
            path.write_bytes(damaged(self._content, chance))
        elif kind == "CIFAR":
            path.write_bytes(damaged(chance.choice(self._batches), chance))
        else:
            first, second = damaged(self._images, chance), damaged(self._labels, chance)
            path.write_bytes(first if chance.random() < 0.7 else self._images)
            other.write_bytes(second if chance.random() < 0.7 else self._labels)
        read = {
            "CIFAR": partial(SOURCES["CIFAR10"].read, (path,)),
            "MNIST": partial(SOURCES["MNIST"].read, (path, other)),
        }
        return kind, read.get(kind, partial(check_checkpoint, path))


def read_one(kind: str, read: Callable[[], object], events: list[str]) -> str:
    """Reads a file; what became of it."""
    events.clear()
    try:
        read()
        outcome = f"{kind}: read"
    except LitLipschitzError as error:
        outcome = f"{kind}: refused" if "\n" not in str(error) else f"FAULT {kind}: several lines"
    except BaseException as error:
        outcome = f"FAULT {kind}: {type(error).__name__}: {error}"
    return f"FAULT {kind}: {events[0]}" if events else outcome


def read_chunk(files: Files, seeds: range, output: int) -> None:
    """Reads the files of some seeds, and writes a line each."""
    warnings.simplefilter("ignore")
    events: list[str] = []

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event in ("os.system", "subprocess.Popen", "os.exec", "os.mkdir", "os.remove", "socket.connect") or (
            event == "import" and arguments[0] not in sys.modules
        ):
            events.append(f"{event} {arguments[0]}")

    codecs.lookup("raw-unicode-escape")  # pickletools decodes an opcode's text, which is then refused
    for seed in range(-FIRST, 0):  # what is imported with the first files is no fault
        read_one(*files.next(random.Random(seed)), events)
    sys.addaudithook(watch)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in seeds:
        signal.alarm(SECONDS)
        os.write(output, f"{seed} ".encode())
        made = files.next(random.Random(seed))
        line = read_one(*made, events)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        if grown > GROWTH:
            line, before = f"FAULT {made[0]}: {grown >> 10} MB", before + grown
        os.write(output, f"{' '.join(line.split())}\n".encode(errors="replace"))


def fuzz(files: int, seed: int) -> Counter[str]:
    """Reads damaged files of consecutive seeds in other processes; the outcomes, and faults with the file's seed."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        made = Files(Path(folder))
        seeds = list(range(seed * 1_000_000, seed * 1_000_000 + files))
        while seeds:
            log = Path(folder, "log")
            log.write_bytes(b"")
            process = os.fork()
            if not process:
                code = 1
                try:
                    read_chunk(made, range(seeds[0], min(seeds[-1] + 1, seeds[0] + CHUNK)), os.open(log, os.O_WRONLY))
                    code = 0
                finally:
                    os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            lines = log.read_text().splitlines()
            done = [line.partition(" ") for line in lines]
            if code and not done:
                raise RuntimeError(f"a process ended with {code} before its first file")
            if code:
                done[-1] = (done[-1][0], " ", f"FAULT: the process ended with {code}")
            counts.update(f"{text} (seed {number})" if "FAULT" in text else text for number, _, text in done)
            seeds = seeds[len(done) :]
    return counts


def report(counts: Counter[str], seed: int) -> bool:
    """Prints the counts; returns whether there was no fault."""
    faults = {text for text in counts if text.startswith("FAULT")}
    for text in sorted(counts):
        if text not in faults:
            print(f"{text}: {counts[text]}")
    for text in sorted(faults):
        print(text)
    print(f"{counts.total()} files fuzzed (seed {seed}): {len(faults) or 'no'} faults")
    return not faults


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.exit(not report(fuzz(options.files, options.seed), options.seed))
