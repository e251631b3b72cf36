"""Counts the machine instructions of a training step with and without LipschitzLR, on the CPU.

    python benchmarks/instructions.py

A count hardly depends on what else the machine does, so it shows small costs where times are too noisy. It is not a
time: Python's instructions take longer than those of a matrix product. The network is the MLP 784-100-100-10 of
overhead.py. The steps 62 to 73 are not measured by the callback, and step 75 is. Needs valgrind, and takes a quarter of
an hour, most of it for the imports.
"""

import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import lightning as L
import overhead
import torch

from lit_lipschitz import LipschitzLR

OPTIMIZERS = {"SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9), "AdamW": torch.optim.AdamW}
CALLBACKS = {"none": list, "empty": lambda: [L.Callback()], "LipschitzLR": lambda: [LipschitzLR()]}
QUIET, MEASURED = range(62, 74), range(75, 76)
"""Steps of a run, counted from 1, whose instructions are counted."""
EPOCH, MEASURED_IN_EPOCH = 600, 10
"""Steps of an epoch, and how many of them are measured from the second epoch on."""


class Counter(L.Callback):
    """Has valgrind count the instructions of some steps."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        """Starts before the first of them, and writes the count after the last."""
        for steps in (QUIET, MEASURED):
            if trainer.global_step + 1 == steps.start:
                torch._C._valgrind_toggle()
            if trainer.global_step + 1 == steps.stop:
                torch._C._valgrind_toggle_and_dump_stats()


def train() -> None:
    """Trains once with each optimizer and callback, in a process that valgrind runs."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for optimizer in OPTIMIZERS.values():
        for callbacks in CALLBACKS.values():
            lengths = {"batches": EPOCH, "max_steps": MEASURED.stop + 1}
            overhead.train(
                overhead.WIDE, [Counter(), *callbacks()], torch.device("cpu"), optimizer=optimizer, **lengths
            )


def main() -> None:
    """Runs valgrind, and prints the counts and their ratios."""
    if shutil.which("valgrind") is None:
        sys.exit(
            "instructions.py: expected the program valgrind on the PATH; install it, such as by apt install valgrind"
        )
    with tempfile.TemporaryDirectory() as folder:
        options = ["--tool=callgrind", "--collect-atstart=no", f"--callgrind-out-file={folder}/out"]
        # valgrind does not know AVX-512.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "avx2", "CUDA_VISIBLE_DEVICES": ""}
        command = ["valgrind", "--quiet", *options, sys.executable, __file__, "--train"]
        subprocess.run(command, env=environment, check=True)
        count = 2 * len(OPTIMIZERS) * len(CALLBACKS)
        texts = [Path(folder, f"out.{number}").read_text() for number in range(1, count + 1)]
    totals = iter([int(re.search(r"^totals: (\d+)", text, re.M)[1]) for text in texts])  # type: ignore[index]
    print("thousands of instructions a step, and over those without a callback")
    for optimizer in OPTIMIZERS:
        alone = 0.0
        for callback in CALLBACKS:
            quiet, measured = next(totals) / len(QUIET), next(totals) / len(MEASURED)
            alone = alone or quiet
            epoch = quiet + (measured - quiet) * MEASURED_IN_EPOCH / EPOCH
            print(
                f"{optimizer:6} {callback:12} not measured {quiet / 1e3:8.0f} ({quiet / alone:.3f})   measured "
                f"{measured / 1e3:8.0f} ({measured / alone:.3f})   mean of an epoch ({epoch / alone:.3f})"
            )


if __name__ == "__main__":
    train() if sys.argv[1:] == ["--train"] else main()
