"""The bundled configs reach what the README says they reach."""

import math
import re
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import SCRIPT

from lit_lipschitz import LipschitzLR


def fit(*arguments):
    """Runs `lit-lipschitz fit`; returns its output and the seconds it took."""
    start = time.monotonic()
    result = subprocess.run([str(SCRIPT), "fit", *arguments], capture_output=True, text=True, timeout=1500)
    assert result.returncode == 0, result.stderr
    return result.stdout, time.monotonic() - start


def column(output, name):
    place = re.search(r"^epoch.*", output, re.M)[0].split().index(name)
    return [float(line.split()[place]) for line in re.findall(r"^ *\d+/\d.*", output, re.M)]


def accuracy(output):
    return float(re.search(r"test_acc (\S+)", output)[1])


def test_digits_reach_97_percent(figure):
    output, seconds = fit("--config", "digits.yaml")
    figure(f"Digits: {accuracy(output):.2%} after {seconds:.0f} s")
    assert len(column(output, "rate")) == 30
    assert accuracy(output) >= 0.97
    assert len(list(Path("lightning_logs").glob("*/events.out.tfevents.*"))) >= 1


@pytest.mark.slow
@pytest.mark.real_data
def test_mnist_reaches_98_5_percent_in_3_epochs(real_data, figure):
    output, seconds = fit("--config", "mnist.yaml", "--data.data_dir", str(real_data))
    figure(f"MNIST: {accuracy(output):.2%} after {seconds:.0f} s; rates {column(output, 'rate')}")
    assert len(column(output, "rate")) == 3
    assert accuracy(output) >= 0.985


@pytest.mark.slow
@pytest.mark.real_data
def test_cifar10_learns_from_10_000_images(real_data, figure):
    output, seconds = fit(
        "--config", "cifar10.yaml", "--data.data_dir", str(real_data), "--data.verify", "false",
        "--data.train_subset", "10000", "--trainer.max_epochs", "2",
    )  # fmt: skip
    losses, rates = column(output, "train_loss"), column(output, "rate")
    figure(f"CIFAR-10: {accuracy(output):.2%} after {seconds:.0f} s; losses {losses}; rates {rates}")
    assert len(rates) == 2
    assert all(math.isfinite(rate) and rate > 0 for rate in rates)
    assert losses[1] < losses[0] < math.log(10)


def classifier():
    """Somebody's module, on batches that are there."""
    from helpers import Classifier, loader

    return Classifier(), [[part.cuda() for part in batch] for batch in loader()]


def bundled(compile):
    """What the configs train: augmented batches, seeds, means of the epoch, a schedule."""
    from lit_lipschitz import ImageClassifier, LinearWarmupDecay, ResNetV1
    from lit_lipschitz.data import DeviceLoader
    from lit_lipschitz.data.augmentation import random_affine, random_crop, random_flip

    def augment(images, generator):
        images = random_flip(random_crop(images.float(), 4, generator), generator)
        return random_affine(images, degrees=15, zoom=0.1, shift=0.1, generator=generator)

    images = torch.randint(256, (160, 3, 32, 32), dtype=torch.uint8, device="cuda")
    labels = torch.randint(10, (160,), device="cuda")
    module = ImageClassifier(ResNetV1(depth=8), scheduler=LinearWarmupDecay, channels_last=True, compile=compile)
    return module, DeviceLoader(images, labels, 16, augment, shuffle=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "made", [classifier, partial(bundled, None), partial(bundled, "default")], ids=["any", "bundled", "compiled"]
)
def test_nothing_synchronises_with_a_gpu_between_updates(made):
    from helpers import trainer

    class Strict(LipschitzLR):
        """Lets only the steps synchronise in which an update is due: in each epoch's last and the first 4."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            due = trainer.current_epoch == 0 or trainer.is_last_batch
            torch.cuda.set_sync_debug_mode("default" if due else "error")
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            torch.cuda.set_sync_debug_mode("default")

    module, batches = made()
    callback = Strict()
    trainer(callback, accelerator="gpu", devices=1, max_epochs=3).fit(module, batches)
    assert callback.rate is not None
