"""The papers' experiments as configs: each says what was run, and runs for a few steps on data of the right shape."""

import math
import re
import sys
from pathlib import Path

import pytest
import yaml
from helpers import SCRIPT, write_cifar, write_idx
from torchvision import datasets

from lit_lipschitz.cli.configs import bundled_configs, find_config
from lit_lipschitz.cli.main import main

# The published runs: config, batch size, time decay, epochs, optimizer, rate set manually for the first epoch.
PUBLISHED = [
    ("paper_mnist_sgd", 256, 0.0, 20, "SGD", None),
    ("paper_mnist_momentum", 256, 0.0, 20, "SGD", 0.1),
    ("paper_mnist_adam", 256, 0.0, 20, "Adam", None),
    ("paper_cifar10_resnet20_sgd", 128, 1e-3, 300, "SGD", None),
    ("paper_cifar10_resnet20_momentum", 128, 1e-3, 300, "SGD", 1.0),
    ("paper_cifar10_resnet20_rmsprop", 128, 1e-3, 300, "RMSprop", None),
    ("paper_cifar10_densenet_sgd", 128, 1e-4, 300, "SGD", None),
    ("paper_cifar10_densenet_momentum", 128, 1e-4, 300, "SGD", 0.5),
    ("paper_cifar10_densenet_adam", 128, 1e-4, 300, "Adam", None),
    ("paper_cifar100_resnet164_sgd", 128, 1e-4, 300, "SGD", None),
    ("paper_cifar100_resnet164_momentum", 128, 1e-4, 300, "SGD", 0.5),
    ("paper_cifar100_resnet56_sgd", 128, 3e-3, 500, "SGD", None),
    ("paper_cifar100_densenet_sgd", 128, 1e-4, 300, "SGD", None),
    ("paper_cifar100_densenet_momentum", 128, 1e-4, 300, "SGD", 1.0),
]
# Their baselines: config, time decay, fixed rate, optimizer.
BASELINES = [
    ("paper_cifar10_resnet20_sgd_fixed", 1e-3, 0.668, "SGD"),
    ("paper_cifar10_resnet20_sgd_baseline", 1e-3, 0.01, "SGD"),
    ("paper_cifar10_resnet20_momentum_baseline", 1e-3, 0.001, "SGD"),
    ("paper_cifar10_resnet20_rmsprop_baseline", 1e-3, 0.001, "RMSprop"),
    ("paper_cifar10_densenet_sgd_baseline", 1e-4, 0.01, "SGD"),
    ("paper_cifar10_densenet_momentum_baseline", 1e-4, 0.001, "SGD"),
    ("paper_cifar10_densenet_adam_baseline", 1e-4, 0.001, "Adam"),
    ("paper_cifar100_resnet164_sgd_baseline", 1e-4, 0.01, "SGD"),
    ("paper_cifar100_resnet164_momentum_baseline", 1e-4, 0.001, "SGD"),
    ("paper_cifar100_densenet_sgd_baseline", 1e-4, 0.01, "SGD"),
    ("paper_cifar100_densenet_momentum_baseline", 1e-4, 0.001, "SGD"),
]
NAMES = [f"{row[0]}.yaml" for row in (*PUBLISHED, *BASELINES)]
NETWORKS = {
    "mnist": "MNISTCNN",
    "resnet20": "ResNetV1",
    "resnet56": "ResNetV2",
    "resnet164": "ResNetV2",
    "densenet": "DenseNet",
}


def test_every_published_run_is_bundled_and_nothing_else():
    assert sorted(NAMES) == sorted(name for name in bundled_configs() if name.startswith("paper_"))


def config_of(name):
    return yaml.safe_load(Path(find_config(name)).read_text())


def common(name, decay, optimizer):
    """What a run and its baseline share; returns the rest."""
    config = config_of(name)
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    parts = name.split("_")
    assert config["data"]["class_path"] == f"lit_lipschitz.{parts[1].upper()}DataModule"
    assert (data["val_split"], data["preprocessing"]) == (0.0, "papers")
    network = model["network"]
    assert network["class_path"] == f"lit_lipschitz.{NETWORKS[parts[1 if parts[1] == 'mnist' else 2]]}"
    assert network["init_args"]["num_classes"] == (100 if parts[1] == "cifar100" else 10)
    depth = next((int(part[6:]) for part in parts if part.startswith("resnet")), 40 if "densenet" in parts else None)
    assert network["init_args"].get("depth") == depth
    own = "lit_lipschitz.ZeroStartSGD" if "momentum" in name else f"torch.optim.{optimizer}"
    assert model["optimizer"]["class_path"] == own
    settings = model["optimizer"]["init_args"]
    if "momentum" in name:
        assert (settings["momentum"], settings["dampening"]) == (0.9, 0.9)
    # Keras' l2(1e-4) has the gradient 2e-4 w, on kernels of convolutions; MNIST has none.
    assert float(settings.get("weight_decay", 0.0)) == (0.0 if parts[1] == "mnist" else 2e-4)
    assert float(model["clip_probabilities"]) == 1e-7
    assert ("decayed" in model) == (parts[1] != "mnist")
    scheduler = model.get("scheduler")
    assert (float(scheduler["init_args"]["decay"]) if scheduler else 0.0) == decay
    assert not scheduler or (scheduler["class_path"], model["scheduler_interval"]) == (
        "lit_lipschitz.TimeDecay",
        "step",
    )
    return config, settings


@pytest.mark.parametrize(("name", "batch_size", "decay", "epochs", "optimizer", "first"), PUBLISHED)
def test_a_config_is_the_published_run(name, batch_size, decay, epochs, optimizer, first):
    config, _ = common(name, decay, optimizer)
    lipschitz = config["lipschitz"]
    assert (lipschitz["bound"], lipschitz["measure"]) == ("paper", "pass")
    assert float(lipschitz["weight_decay"]) == decay  # the scripts use one number for both
    assert lipschitz.get("weights", "all") == "all"
    rule = {"momentum": "adamo_authors", "rmsprop": "rmsprop_authors", "adam": "adam_authors"}.get(name.split("_")[-1])
    assert lipschitz.get("rule") == rule
    assert lipschitz.get("initial_lr") == first
    assert config["data"]["init_args"]["batch_size"] == batch_size
    assert config["trainer"]["max_epochs"] == epochs


@pytest.mark.parametrize(("name", "decay", "rate", "optimizer"), BASELINES)
def test_a_baseline_is_the_run_at_a_fixed_rate(name, decay, rate, optimizer):
    config, settings = common(name, decay, optimizer)
    assert config["fixed_rate"] is True
    assert settings["lr"] == rate
    assert "lipschitz" not in config
    own = config_of(name.removesuffix("_baseline").removesuffix("_fixed"))
    assert own["model"]["init_args"]["network"] == config["model"]["init_args"]["network"]
    assert own["data"] == config["data"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Data sets of the right shapes, with 30 images each."""
    folder = tmp_path_factory.mktemp("data")
    write_idx(folder)
    write_cifar(folder)
    write_cifar(folder, datasets.CIFAR100, key="fine_labels")
    return folder


def is_large(name):
    return "densenet" in name or "164" in name or "baseline" in name


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if is_large(n) else []) for n in NAMES])
def test_every_config_trains_a_few_steps_under_the_short_overlay(name, data, monkeypatch, capsys):
    arguments = ["fit", "--config", name, "--config", "short", "--data.batch_size", "6", "--trainer.logger", "false"]
    arguments += ["--data.data_dir", str(data), "--data.verify", "false", "--data.download", "false"]
    arguments += ["--trainer.accelerator", "cpu"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    assert main() == 0, capsys.readouterr().err
    header, *lines = [line.split() for line in capsys.readouterr().out.splitlines() if re.match(r"epoch| *\d/", line)]
    assert len(lines) == 2
    rates = [float(line[header.index("lr")]) for line in lines]
    assert all(0 < rate < math.inf for rate in rates)
    assert ("rate" in header) == ("baseline" not in name and "fixed" not in name)
