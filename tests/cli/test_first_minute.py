"""What a new user types first: mistakes, help, the configs, and what is said of each."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT, error_line

from lit_lipschitz import DigitsDataModule, ImageClassifier
from lit_lipschitz.cli.help import COMMANDS, text
from lit_lipschitz.cli.options import known_options

SHORT = ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2",
         "--trainer.enable_model_summary", "false"]  # fmt: skip


def process(*arguments, **environment):
    """Runs the command in a process of its own, which knows this checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-m", "lit_lipschitz", *arguments], capture_output=True, text=True,
                          env=environment, timeout=120)  # fmt: skip


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "digits.yaml"], "fit digits.yaml: expected an option, found a config; write --config digits.yaml"),
        (["test", "digits"], "write --config digits"),
        (["fit", "--config", "digits", "mine.yml"], "write --config mine.yml"),
        (["fit", "--quiet", "digits.yaml"], "write --config digits.yaml"),
        (["fit", "--config=digits", "--model.network.hidden", "64", "32"],
         "fit: expected an option, found '32' after 64; a list is one word, such as [64,32]"),
        (["fit", "--config", "digits", "--lipshitz.bound", "smooth"], "lipshitz.bound: no such option; closest: lips"),
        (["fit", "--config", "digits", "--trainer.max_epoch=3"], "trainer.max_epoch: no such option; closest: train"),
        (["explain", "--config", "digits", "--lipschitz.maxlr", "1"], "closest: lipschitz.max_lr"),
        (["compare", "--config", "digits", "--policy", "lipschitz"], "policy: no such option; closest: policies"),
        (["fit", "--checkpoint.monitr", "x"], "closest: checkpoint.monitor"),
    ],
    ids=str,
)  # fmt: skip
def test_a_mistyped_option_is_told_before_torch_is_imported(arguments, message):
    run = "import sys; from lit_lipschitz.cli.main import main; code = main()"
    probe = f"{run}; print('torch' in sys.modules); sys.exit(code)"
    result = subprocess.run([sys.executable, "-c", probe, *arguments], capture_output=True, text=True, timeout=60,
                            env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert (result.returncode, result.stdout) == (2, "False\n")
    assert message in error_line(result.stderr)


@pytest.mark.parametrize("name", ["fit", "validate", "test", "predict"])
def test_the_options_that_are_known_at_once_are_those_of_the_parser(lit, name):
    _, out, _ = lit(name, "--help_all")
    found = {".".join(key.rstrip("+").split(".")[:2]) for key in re.findall(r"(?:^ +|, )--([\w.+]+)", out, re.M)}
    assert len(found) > 80
    assert (
        found - set(known_options(name)) - {"data.help", "model.help", "optimizer.help", "lr_scheduler.help"} == set()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.optimizer.lr", "abc"], "model.optimizer.lr: expected float, found 'abc'"),
        (["--trainer.precision", "15"], "trainer.precision: expected one of 64, 32, 16, 'transformer-engine'"),
        (["--trainer.precision", "15"], "'bf16' or null, found '15'"),
        (["--model.network.hidden", "64,32"], "model.network.hidden: expected a list such as [1, 2], found '64,32'"),
        (["--model.decayed", "3"], "model.decayed: expected a list such as [1, 2] or null, found '3'"),
        (["--model.optimizer", "Adamw"], "found 'Adamw'; closest: AdamW"),
        (["--model.network", "mlp"], "found 'mlp'; closest: lit_lipschitz.MLP"),
        (["--model.scheduler", "CosineAnnealing"], "closest: CosineAnnealingLR"),
        (["--data", "Digits"], "closest: lit_lipschitz.DigitsDataModule"),
        (["--trainer.logger", "wandb"], "closest: WandbLogger"),
        (["--trainer.callbacks", "EarlyStoping"], "closest: EarlyStopping"),
        (["--lipschitz.update", "abc"], "lipschitz.update: expected 'epoch' or int, found 'abc'"),
        (["--model.compile", "abc"], "expected one of 'default', 'reduce-overhead'"),
        (["--quiet=maybe"], "quiet: expected true or false, found 'maybe'"),
        (["--trainer.max_epochs", "0"], "trainer.max_epochs=0 trains nothing: expected at least 1, or -1"),
        (["--trainer.max_steps", "0"], "trainer.max_steps=0 trains nothing"),
        (["--lipschitz.loss", "msee"], "'mse', 'mae', found 'msee'"),
        (["--model.network", "timm:resnet180"], "timm has no classifier of that name; closest: resnet18"),
        (["--model.network", "torchvision:resnet180"], "torchvision has no classifier of that name; closest: resnet18"),
        (
            ["--model.network", "torchvision:vit_b_16"],
            "takes no images of shape (1, 8, 8), the data's (Wrong image height",
        ),
        (["--model.network", "timm:resnet18", "--model.network.num_classes", "3"], "give lit_lipschitz.named_network"),
        (["--model.mix", "Mixup"], "closest: torchvision.transforms.v2.MixUp"),
        (["--model.mix", "torchvision.transforms.v2.MixUp", "--model.clip_probabilities", "0.1"], "expected 0 or None"),
    ],
    ids=str,
)
def test_a_wrong_value_is_told_with_what_was_expected(lit, arguments, message):
    code, out, err = lit("fit", "--config", "digits", *arguments)
    assert (code, out) == (2, "")
    assert message in error_line(err)
    assert list(Path(".").iterdir()) == []


def test_a_data_folder_that_is_ignored_is_said(lit):
    code, _, err = lit("fit", "--config", "digits", *SHORT, "--data.data_dir", "foo", "--test_after_fit", "false")
    assert code == 0
    assert "lit-lipschitz: warning: data.data_dir=foo is not used: the digits come with scikit-learn" in err
    assert "data_dir" not in lit("fit", "--config", "digits", *SHORT, "--test_after_fit", "false")[2]


@pytest.mark.parametrize("name", ["ce", "cross_entropy"])
def test_short_names_of_losses_are_taken(lit, name):
    code, out, _ = lit("fit", "--config", "digits", *SHORT, "--lipschitz.loss", name)
    assert code == 0
    assert "test_acc" in out


# -- help --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_help_is_at_most_two_screens(lit, name):
    code, out, _ = lit(name, "--help")
    assert code == 0
    assert out == text(name)
    assert out.startswith(f"usage: lit-lipschitz {name}")
    assert len(out.splitlines()) <= 100
    assert max(map(len, out.splitlines())) <= 120
    assert not re.search(r"``|:\w+:`|^@", out, re.M)


def test_the_options_in_the_help_texts_exist():
    for name in COMMANDS:
        if name in ("configs", "report", "validate-config"):
            continue
        known = set(known_options(name))
        for option in re.findall(r"^ +--([\w.]+)", text(name), re.M):
            first, _, rest = option.partition(".")
            assert option in known or (first in ("data", "model", "checkpoint") and rest), (name, option)


def test_all_options_are_listed_without_markup(lit):
    code, out, _ = lit("fit", "--help_all")
    assert code == 0
    assert "--trainer.max_epochs" in out
    assert "--lipschitz.bound" in out
    assert not re.search(r"``|:\w+:`", out)


# -- configs -----------------------------------------------------------------------------------------------------------


def test_a_config_is_shown_and_copied_and_no_file_is_overwritten(lit):
    content = (ROOT / "configs" / "digits.yaml").read_text()
    assert lit("configs", "show", "digits") == (0, content, "")
    code, out, _ = lit("configs", "copy", "digits.yaml")
    assert (code, out) == (0, "digits.yaml: written; train with lit-lipschitz fit --config digits.yaml\n")
    assert Path("digits.yaml").read_text() == content
    Path("digits.yaml").write_text("mine")
    code, _, err = lit("configs", "copy", "digits")
    assert code == 2
    assert "configs copy: digits.yaml exists and is kept; pass another FILE" in error_line(err)
    assert Path("digits.yaml").read_text() == "mine"
    Path("folder").mkdir()
    assert lit("configs", "copy", "digits", "other.yaml")[0] == lit("configs", "copy", "digits", "folder")[0] == 0
    assert Path("other.yaml").read_text() == Path("folder/digits.yaml").read_text() == content


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "diggits"], "diggits: no bundled config of that name; closest: digits.yaml"),
        (["show"], "configs: the following arguments are required: NAME"),
        (["copy", "digits", "no/such/folder.yaml"], "no/such/folder.yaml: No such file or directory"),
    ],
)
def test_a_mistake_with_configs_is_one_line(lit, arguments, message):
    code, _, err = lit("configs", *arguments)
    assert code in (1, 2)
    assert message in error_line(err)
    assert list(Path(".").iterdir()) == []


# -- validate-config ---------------------------------------------------------------------------------------------------


class Untouched(DigitsDataModule):
    """Data that must not be read."""

    def prepare_data(self):
        raise AssertionError

    def setup(self, stage):
        raise AssertionError


def test_a_valid_config_is_checked_and_nothing_is_read_or_written(lit):
    code, out, _ = lit("validate-config", "digits", "--data", "test_first_minute.Untouched")
    assert (code, out) == (0, "valid: ImageClassifier on Untouched, 30 epochs\n")
    # It may be for another machine.
    code, out, _ = lit("validate-config", "digits", "ddp", "--trainer.accelerator", "cuda", "--trainer.max_epochs=4")
    assert (code, out) == (0, "valid: ImageClassifier on DigitsDataModule, 4 epochs\n")
    assert list(Path(".").iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("trainer: {max_epoch: 3}", "trainer.max_epoch: no such option; closest: trainer.max_epochs"),
        (
            "model: {init_args: {network: {init_args: {hiden: 3}}}}",
            "model.network.hiden: no such option; closest: hid",
        ),
        ("lipschitz: {max_lr: -1}", "LipschitzLR(max_lr=-1.0): expected a positive number"),
        ("model: {init_args: {network: {init_args: {num_classes: 3}}}}", "and the data have 10 classes"),
        ("data: {init_args: {val_split: 2}}", "val_split=2.0: expected a fraction"),
        ("trainer: {callbacks: [{class_path: EarlyStopping}]}", "monitor"),
    ],
)
def test_an_invalid_config_is_one_line(lit, content, message):
    Path("mine.yaml").write_text(content)
    code, out, err = lit("validate-config", "digits", "mine.yaml")
    assert (code, out) == (2, "")
    assert message in error_line(err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model.optimizer.lr", "-1"), "Invalid learning rate: -1.0"),
        (
            ("--model.optimizer", "AdamW", "--model.optimizer.betas", "[2,0.9]"),
            "Invalid beta parameter at index 0: 2.0",
        ),
        (
            ("--model.optimizer", "torch.optim.SGD", "--model.optimizer.weight_decay", "-1"),
            "Invalid weight_decay value",
        ),
        (("--model.decayed", "[nothing]"), "no parameter of MLP fits 'nothing'"),
        (("--model.scheduler", "StepLR", "--model.scheduler.step_size", "0"), "modulo by zero"),
        (
            ("--model.scheduler", "OneCycleLR", "--model.scheduler.max_lr", "1", "--model.scheduler.pct_start", "7"),
            "pct",
        ),
    ],
)
def test_a_value_that_a_class_refuses_when_it_is_made_is_refused_as_by_fit(lit, options, message):
    found = [
        lit(*command, *options) for command in (("validate-config", "digits"), ("fit", "--config", "digits", *SHORT))
    ]
    assert [code for code, _, _ in found] == [2, 2]
    lines = [error_line(err) for _, _, err in found]
    assert message in lines[0]
    assert lines[0] == lines[1]


class Own(ImageClassifier):
    """A module that needs its data to make an optimizer."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1 / self.trainer.datamodule.size)


def test_a_module_that_needs_its_data_to_make_an_optimizer_is_valid(lit):
    code, out, err = lit("validate-config", "digits", "--model", "test_first_minute.Own")
    assert (code, err) == (0, "")
    assert out == "valid: Own on DigitsDataModule, 30 epochs\n"


def test_without_a_file_it_is_asked_for(lit):
    code, _, err = lit("validate-config")
    assert code == 2
    assert "validate-config: expected a FILE, or the name of a bundled config" in error_line(err)
    code, _, err = lit("validate-config", "short")
    assert code == 2
    assert "model must be given" in error_line(err)


# -- the rest ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["validate", "test"])
def test_an_evaluation_prints_as_fit_does(lit, command):
    assert lit("fit", "--config", "digits", *SHORT, "--test_after_fit", "false")[0] == 0
    stage = "val" if command == "validate" else "test"
    code, out, _ = lit(command, "--config", "digits", "--ckpt_path", "last", "--trainer.accelerator", "cpu")
    assert code == 0
    assert re.fullmatch(rf"{stage}_loss \d\.\d{{4}}  {stage}_acc \d\.\d{{4}}\n", out)


def test_a_config_saved_from_a_pipe_leaves_the_bar_to_the_terminal(lit):
    assert lit("fit", "--config", "digits", *SHORT, "--test_after_fit", "false")[0] == 0
    saved = yaml.safe_load(Path("lightning_logs/version_0/config.yaml").read_text())
    assert saved["trainer"]["enable_progress_bar"] is None


def test_predictions_have_the_true_class_and_never_replace_a_file(lit):
    arguments = ("predict", "--config", "digits", "--trainer.accelerator", "cpu", "--ckpt_path", "initial")
    code, out, _ = lit(*arguments)
    assert code == 0
    header, *rows = Path("predictions.csv").read_text().split()
    assert header == "row,class,probability,true_class"
    data = DigitsDataModule()
    data.setup("predict")
    assert [int(row.rpartition(",")[2]) for row in rows] == data.splits["test"][1].tolist()
    before = Path("predictions.csv").read_bytes()
    code, out, _ = lit(*arguments)
    assert re.fullmatch(r"predictions: .*predictions-v1\.csv \(predictions\.csv exists and is kept\)\n", out)
    assert Path("predictions.csv").read_bytes() == before == Path("predictions-v1.csv").read_bytes()


def test_a_module_of_the_working_folder_is_found_after_all_installed_ones():
    Path("mine.py").write_text("from lit_lipschitz import DigitsDataModule\nclass Mine(DigitsDataModule): pass\n")
    Path("sklearn.py").write_text("raise AssertionError\n")
    command = [Path(sys.executable).with_name("lit-lipschitz"), "validate-config", "digits", "--data", "mine.Mine"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (result.returncode, result.stdout) == (0, "valid: ImageClassifier on Mine, 30 epochs\n"), result.stderr
    assert "folders whose code you trust" in " ".join(text("fit").split())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["fit", "--help"], ["configs", "show", "digits"]])
def test_an_answer_that_needs_no_torch_does_not_import_it(arguments):
    probe = (
        "import sys; from lit_lipschitz.cli.main import main; code = main(); sys.exit(code or 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", probe, *arguments], capture_output=True, text=True, timeout=60,
                            env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout


def complete(line):
    pytest.importorskip("argcomplete")
    read, write = os.pipe()
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    shell = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    environment = {**os.environ, **shell, "PYTHONPATH": path, "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
    # argcomplete writes to file descriptor 8.
    subprocess.run(["bash", "-c", f'"$0" -m lit_lipschitz 8>&{write} 9>/dev/null', sys.executable], env=environment,
                   pass_fds=[write], timeout=60, check=True)  # fmt: skip
    os.close(write)
    with os.fdopen(read) as answer:
        return answer.read().split()


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("lit-lipschitz va", ["validate", "validate-config"]),
        ("lit-lipschitz fit --trainer.max_ep", ["--trainer.max_epochs"]),
        ("lit-lipschitz fit --lipschitz.max", ["--lipschitz.max_lr", "--lipschitz.max_growth"]),
        ("lit-lipschitz fit --config dig", ["digits.yaml"]),
        ("lit-lipschitz configs show dig", ["digits.yaml"]),
        ("lit-lipschitz configs l", ["list"]),
        ("lit-lipschitz fit --config my", ["my.yaml"]),
    ],
)
def test_a_shell_completes_commands_options_and_configs(line, answer):
    Path("my.yaml").touch()
    assert complete(line) == answer
