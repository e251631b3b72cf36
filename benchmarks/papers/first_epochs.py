"""The first epochs of the papers' runs: the learning rate of every epoch compared with the authors' records.

Runs bundled paper configs on the real data, one process each, through the command, and prints the rates and accuracies;
then measures ResNet-164 v2 at its initialisation, in inference mode and with batch statistics:

    python benchmarks/papers/first_epochs.py [--epochs 4] [--cifar-epochs 2] [--only mnist_sgd ...] [--data-dir FOLDER]

MNIST and CIFAR-10 are read as by the command, and downloaded if they are missing. On 2 CPU cores an epoch takes
about 1.5 minutes on MNIST and 3 on CIFAR-10.
"""

import argparse
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch

from lit_lipschitz import CIFAR10DataModule, ResNetV2, bounds

COMMAND = Path(sys.executable).with_name("lit-lipschitz")
LINE = re.compile(r"^ *(\d+)/\d+ +(\S+) +(\S+) +\S+ +(\S+)", re.M)  # epoch, rate, lr, train_loss, train_acc
TESTED = re.compile(r"test_acc (\S+)")


@dataclass(frozen=True)
class Curve:
    """A paper config, and the rates that the authors recorded for its first epochs."""

    config: str
    recorded: tuple[float, ...]
    note: str
    expected: tuple[float, float] | None = None  # the recorded range of the rates from the second epoch on


CURVES = {
    "mnist_sgd": Curve(
        "paper_mnist_sgd.yaml",
        (
            *(2.62, 2.22, 2.95, 2.50, 2.39, 2.10, 2.41, 2.04, 2.45, 2.25),
            *(2.19, 2.35, 2.35, 2.19, 1.93, 2.24, 2.29, 2.40, 2.40, 2.34),
        ),
        "recorded range of 20 epochs: 1.93 to 2.95",
        (1.9, 3.0),
    ),
    "mnist_momentum": Curve(
        "paper_mnist_momentum.yaml",
        (0.1, 1.427, 0.806, 0.579, 0.462, 0.391, 0.343, 0.309, 0.284, 0.265),
        "the recorded rates follow to 4 digits from ONE constant, L = 6.106 in all 19 epochs: what the notebook "
        "measured did not change while its network trained",
    ),
    "mnist_adam": Curve(
        "paper_mnist_adam.yaml",
        (0.0384, 0.0345, 0.0282, 0.0246, 0.0226, 0.0215, 0.0207, 0.0202, 0.0199, 0.0199),
        "the recorded run collapsed in epoch 12, from 99.3 to 69.6 %",
    ),
    "cifar10_resnet20_sgd": Curve(
        "paper_cifar10_resnet20_sgd.yaml",
        (0.25, 0.001, 1.56, 2.15, 2.29, 2.33),
        "the second recorded rate was set manually: the authors restarted after an epoch",
    ),
}


@dataclass(frozen=True)
class Run:
    """The figures that the command printed."""

    rates: list[float]
    applied: list[float]
    train: list[float]
    test: float
    seconds: float


def run(curve: Curve, epochs: int, data_dir: str | None, seed: int | None = None) -> Run:
    """Trains a config for some epochs."""
    arguments = [COMMAND, "fit", "--config", curve.config, "--trainer.max_epochs", str(epochs)]
    arguments += ["--seed_everything", str(seed)] if seed is not None else []
    arguments += ["--data.verify", "false"]  # re-packed mirrors of CIFAR have other checksums
    arguments += ["--data.data_dir", str(Path(data_dir).resolve())] if data_dir else []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        root = ["--trainer.default_root_dir", folder]
        process = subprocess.run([*arguments, *root], stdout=subprocess.PIPE, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"{curve.config}: lit-lipschitz ended with code {process.returncode}")
    lines = [match.groups() for match in map(LINE.match, process.stdout.splitlines()) if match]
    tested = TESTED.search(process.stdout)
    return Run(
        rates=[float(line[1]) for line in lines],
        applied=[float(line[2]) for line in lines],
        train=[float(line[3]) for line in lines],
        test=float(tested.group(1)) if tested else float("nan"),
        seconds=time.monotonic() - start,
    )


def rows(name: str, curve: Curve, result: Run) -> list[str]:
    """A row an epoch."""
    lines = [f"{name} ({curve.config}): {curve.note}", f"{'epoch':>7} {'rate':>9} {'recorded':>9} {'train_acc':>10}"]
    for epoch, (rate, accuracy) in enumerate(zip(result.rates, result.train, strict=True)):
        recorded = f"{curve.recorded[epoch]:.4g}" if epoch < len(curve.recorded) else "-"
        lines.append(f"{epoch + 1:>7} {rate:>9.4g} {recorded:>9} {100 * accuracy:>9.2f}%")
    if curve.expected is not None and len(result.rates) > 1:
        low, high = curve.expected
        inside = sum(low <= rate <= high for rate in result.rates[1:])
        lines.append(f"   from {low} to {high} in {inside} of {len(result.rates) - 1} epochs from the second one on")
    return [*lines, f"   test_acc {100 * result.test:.2f} %, {result.seconds:.0f} s"]


def at_initialisation(data_dir: str | None, seeds: int) -> list[str]:
    """1/L of ResNet-164 v2 before any training, on one batch of CIFAR-10, with 100 outputs as in the CIFAR-100 runs."""
    data = CIFAR10DataModule(data_dir, val_split=0.0, preprocessing="papers", verify=False)
    data.prepare_data()
    data.setup("fit")
    images, _ = next(iter(data.lipschitz_dataloader()))
    lines = [
        "ResNet-164 v2 at its initialisation, 1/L on one batch of CIFAR-10 with 100 outputs (recorded, in inference "
        "mode on all of CIFAR-100: 2.3e-08):"
    ]
    for seed in range(seeds):
        L.seed_everything(seed, verbose=False)
        network = ResNetV2(164, num_classes=100)
        rates = []
        for training in (False, True):
            seen: list[float] = []
            handle = network.head.register_forward_pre_hook(
                lambda _, inputs, seen=seen: seen.append(inputs[0].norm().item())
            )
            with torch.no_grad():
                network.train(training)(images)
            handle.remove()
            rates.append(1 / bounds.cross_entropy(seen[0], num_classes=100, batch_size=128, bound="paper"))
        lines.append(f"   seed {seed}: in inference mode {rates[0]:.2g}, with batch statistics {rates[1]:.3g}")
    return lines


def main() -> None:
    """Parses the arguments and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--epochs", type=int, default=4, help="epochs of the MNIST runs")
    parser.add_argument("--cifar-epochs", type=int, default=2, help="epochs of the CIFAR-10 run")
    parser.add_argument("--only", nargs="+", choices=[*CURVES, "initialisation"], help="some of the curves")
    parser.add_argument("--data-dir", help="where the data are")
    parser.add_argument("--seed", type=int, help="instead of that of the configs")
    parser.add_argument("--seeds", type=int, default=3, help="networks to initialise")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, lightning {L.__version__}, Python {platform.python_version()}", flush=True)
    for name, curve in CURVES.items():
        if not arguments.only or name in arguments.only:
            epochs = arguments.cifar_epochs if name.startswith("cifar") else arguments.epochs
            print(*rows(name, curve, run(curve, epochs, arguments.data_dir, arguments.seed)), sep="\n", flush=True)
    if not arguments.only or "initialisation" in arguments.only:
        print(*at_initialisation(arguments.data_dir, arguments.seeds), sep="\n")


if __name__ == "__main__":
    main()
