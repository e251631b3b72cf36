"""Networks by name, averaged weights, mixed batches and loggers, each by a line of a config; and export."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import error_line
from lightning.pytorch.loggers import Logger

from lit_lipschitz import ConfigurationError, DigitsDataModule, ImageClassifier, named_network

SHORT = ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3",
         "--trainer.limit_val_batches", "1", "--trainer.enable_model_summary", "false", "--test_after_fit",
         "false"]  # fmt: skip


def saved():
    return yaml.safe_load(Path("lightning_logs/version_0/config.yaml").read_text())


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18"])
def test_a_network_by_name_has_the_channels_and_classes_of_the_data(lit, name):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    Path("mine.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"network": name}}}))
    code, out, _ = lit("fit", "--config", "digits", "--config", "mine.yaml", *SHORT)
    assert code == 0
    network = saved()["model"]["init_args"]["network"]
    assert network == {
        "class_path": "lit_lipschitz.named_network",
        "init_args": {"name": name, "num_classes": 10, "in_channels": 1, "pretrained": False},
    }
    weights = torch.load("lightning_logs/version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert weights["network.fc.weight"].shape[0] == 10
    assert weights["network.conv1.weight"].shape[1] == 1
    # The saved configuration makes the same run.
    code, again, _ = lit("fit", "--config", "lightning_logs/version_0/config.yaml")
    assert (code, again.splitlines()[2][:70]) == (0, out.splitlines()[2][:70])


def test_its_arguments_are_set_as_those_of_other_networks(lit):
    network = ["--model.network", "lit_lipschitz.named_network", "--model.network.name", "torchvision:squeezenet1_1"]
    code, out, _ = lit("validate-config", "digits", *network, "--model.network.num_classes", "12", "--data",
                       "lit_lipschitz.CIFAR10DataModule")  # fmt: skip
    assert (code, out) == (0, "valid: ImageClassifier on CIFAR10DataModule, 30 epochs\n")


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "googlenet", "vit_b_16", "densenet121", "convnext_tiny"])
def test_any_classifier_of_torchvision_has_its_head(name):
    with torch.device("meta"):
        network = named_network(f"torchvision:{name}", num_classes=7, in_channels=1)
        assert network(torch.zeros(2, 1, 224, 224)).shape == (2, 7)


def test_in_python_a_name_is_enough():
    module = ImageClassifier("torchvision:squeezenet1_1")
    assert module(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    with pytest.raises(ConfigurationError, match="expected timm:NAME or torchvision:NAME"):
        ImageClassifier("resnet18")


def test_a_package_that_is_missing_is_named(lit, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    code, _, err = lit("fit", "--config", "digits", "--model.network", "timm:resnet18")
    assert code == 2
    assert "timm:resnet18 needs the package timm: pip install timm" in error_line(err)


def test_averaged_weights_by_lightnings_callback(lit):
    ema = ["--trainer.callbacks+", "EMAWeightAveraging", "--trainer.callbacks.decay", "0.5"]
    code, out, _ = lit("fit", "--config", "digits", *SHORT, *ema)
    assert code == 0
    content = torch.load("lightning_logs/version_0/checkpoints/last.ckpt", weights_only=True)
    averaged, current = content["state_dict"], content["current_model_state"]
    assert not torch.equal(averaged["network.head.weight"], current["network.head.weight"])
    assert float(out.splitlines()[2].split()[1]) > 0


@pytest.mark.parametrize("kind", ["MixUp", "CutMix"])
def test_batches_are_mixed(lit, kind):
    mix = ["--model.mix", f"torchvision.transforms.v2.{kind}"]
    code, out, err = lit("fit", "--config", "digits", *SHORT, *mix, "--trainer.limit_train_batches", "1.0")
    assert code == 0
    assert "warning" not in err
    assert saved()["model"]["init_args"]["mix"]["init_args"]["num_classes"] == 10
    row = dict(zip(out.splitlines()[1].split(), out.splitlines()[2].split(), strict=True))
    assert float(row["val_acc"]) > float(row["train_acc"]) > 0.2  # the training labels are mixed


class Keeps(Logger):
    """A logger without a folder of its own, as W&B's and MLflow's are."""

    def __init__(self, project: str = "project") -> None:
        super().__init__()
        self.project, self.metrics = project, {}

    @property
    def name(self):
        return self.project

    @property
    def version(self):
        return "run1"

    @property
    def save_dir(self):
        return "kept"

    def log_metrics(self, metrics, step=None):
        Path("kept").mkdir(exist_ok=True)
        with Path("kept/metrics.txt").open("a") as file:
            file.writelines(f"{name}\n" for name in metrics)

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def test_a_logger_without_a_folder_has_its_config_beside_the_checkpoints(lit):
    code, out, _ = lit("fit", "--config", "digits", *SHORT, "--trainer.logger", "test_classifiers.Keeps")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "run: Keeps; checkpoints: kept/project"
    assert lines[-2:] == ["checkpoint: kept/project/run1/checkpoints/last.ckpt", "curves: Keeps"]
    assert Path("kept/project/run1/config.yaml").is_file()
    assert sorted(path.name for path in Path(".").iterdir()) == ["kept"]
    assert {"lipschitz/rate", "lipschitz/lr", "val_loss"} <= set(Path("kept/metrics.txt").read_text().split())


@pytest.mark.parametrize("name", ["WandbLogger", "MLFlowLogger"])
def test_a_logger_whose_package_is_missing_is_told(lit, name):
    try:
        __import__({"WandbLogger": "wandb", "MLFlowLogger": "mlflow"}[name])
    except ImportError:
        code, _, err = lit("fit", "--config", "digits", "--trainer.logger", name)
        assert code == 2
        assert f"{name} can't be used: " in error_line(err)
        assert "pip install" in err
    else:
        pytest.skip("it is installed")


# -- export ------------------------------------------------------------------------------------------------------------


def trained(lit, *arguments):
    assert lit("fit", "--config", "digits", *SHORT, *arguments)[0] == 0


@pytest.mark.parametrize("preprocessing", ["standard", "papers"])
def test_an_exported_network_predicts_as_the_checkpoint_does(lit, preprocessing):
    trained(lit, "--data.preprocessing", preprocessing)
    code, out, _ = lit("export", "--ckpt_path", "last", "--output", "digits.pt2")
    assert code == 0
    assert out == "digits.pt2: uint8 pixels of shape (batch, 1, 8, 8) to probabilities of 10 classes\n"
    data = DigitsDataModule()
    data.setup("predict")
    pixels, _ = data.splits["test"]
    probabilities = torch.export.load("digits.pt2").module()(pixels)
    code, _, _ = lit("predict", "--config", "lightning_logs/version_0/config.yaml", "--ckpt_path", "last")
    rows = [line.split(",") for line in Path("predictions.csv").read_text().split()[1:]]
    expected = torch.tensor([float(row[2]) for row in rows])
    torch.testing.assert_close(probabilities.max(dim=1).values, expected, rtol=0, atol=2e-6)
    assert probabilities.argmax(dim=1).tolist() == [int(row[1]) for row in rows]


def test_onnx_where_it_is_installed_and_else_what_to_install(lit):
    trained(lit)
    code, _, err = lit("export", "--ckpt_path", "last", "--output", "digits.onnx")
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError:
        assert code == 2
        assert "pip install onnx onnxscript, or use pt2" in error_line(err)
        assert not Path("digits.onnx").exists()
    else:
        assert code == 0
        onnx.checker.check_model(onnx.load("digits.onnx"))


def test_export_keeps_files_and_says_what_is_missing(lit):
    trained(lit)
    Path("there.pt2").write_text("mine")
    for arguments, message in (
        (
            ["--ckpt_path", "last", "--output", "there.pt2"],
            "export: there.pt2 exists and is kept; pass another",
        ),
        ([], "export: the following arguments are required: --ckpt_path"),
        (["--ckpt_path", "none.ckpt"], "--ckpt_path none.ckpt: no such file"),
        (["--ckpt_path", "last", "--config", "digits", "--model.network.hidden", "[3]"], "is of another network"),
        (["--ckpt_path", "alone/last.ckpt"], "there is no config.yaml beside it; pass --config"),
    ):
        Path("alone").mkdir(exist_ok=True)
        Path("alone/last.ckpt").write_bytes(Path("lightning_logs/version_0/checkpoints/last.ckpt").read_bytes())
        code, out, err = lit("export", *arguments)
        assert code in (1, 2)
        assert out == ""
        assert message in error_line(err)
    assert Path("there.pt2").read_text() == "mine"
    assert not list(Path(".").glob("*.onnx"))
