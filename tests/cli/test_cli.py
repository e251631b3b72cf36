"""The command, in this process where that is the same and in one of its own where it is not."""

import csv
import importlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT, SCRIPT, error_line, write_idx
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from lightning.pytorch.cli import LightningCLI
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_lipschitz import DigitsDataModule
from lit_lipschitz.cli.configs import bundled_configs, find_config, resolve_configs
from lit_lipschitz.cli.fit.error_messages import condense

SHORT = ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "2"]


# -- names of configs --------------------------------------------------------------------------------------------------


def test_configs_lists_the_bundled_configs_with_a_line_each(lit):
    code, out, _ = lit("configs")
    assert code == 0
    everyday, papers = (part.splitlines() for part in out.split("\n\nThe paper's experiments:\n"))
    names = {path.name for path in (ROOT / "configs").glob("*.yaml")}
    papers_names = {name for name in names if name.startswith("paper_")}
    assert [line.split()[0] for line in everyday] == sorted(names - papers_names)
    assert [line.split()[0] for line in papers] == sorted(papers_names)
    assert all(len(line.split()) > 5 for line in everyday + papers)


def test_configs_as_json_are_the_same(lit):
    code, out, _ = lit("configs", "--json")
    assert code == 0
    entries = json.loads(out)
    assert {entry["name"]: entry["description"] for entry in entries} == bundled_configs()
    assert [entry["name"] for entry in entries] == list(bundled_configs())
    assert all(entry["paper"] == entry["name"].startswith("paper_") for entry in entries)
    assert [entry["paper"] for entry in entries] == sorted(entry["paper"] for entry in entries)


def test_a_file_of_the_users_goes_before_a_bundled_one():
    bundled = find_config("digits.yaml")
    assert find_config("digits") == bundled
    assert Path(bundled).is_file()
    Path("digits.yaml").write_text("trainer:\n  max_epochs: 1\n")
    assert find_config("digits.yaml") == "digits.yaml"
    Path("mnist").mkdir()
    assert Path(find_config("mnist")).name == "mnist.yaml"


def test_all_ways_to_write_it_are_resolved_and_nothing_else():
    bundled = find_config("digits.yaml")
    before = ["fit", "--config", "digits", "--config=digits.yaml", "-c", "digits", "--data.data_dir", "digits"]
    assert resolve_configs(before) == [
        "fit", "--config", bundled, f"--config={bundled}", "-c", bundled, "--data.data_dir", "digits",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "--config", "cifr10"], "closest: cifar10.yaml, cifar100.yaml"),
        (["fit", "--config", "nothing/like/it.yaml"], "no such file and no bundled config of that name"),
        (["fit", "--config"], "expected the name of a config"),
        (["ft"], "no such command; closest: fit"),
        (["configs", "sho"], "configs sho: no such subcommand; closest: show; all of them: list, show, copy"),
        (["configs", "all"], "configs all: no such subcommand; closest: list; all of them: list, show, copy"),
        (["configs", "list", "all"], "configs: unrecognized arguments: all; see lit-lipschitz configs --help"),
        (["--config", "digits", "fit"], "expected a command first, as in lit-lipschitz fit --config"),
        (["fit", "--config", "."], "expected a file, found a folder"),
    ],
)
def test_mistakes_that_are_told_at_once(lit, arguments, message):
    code, out, err = lit(*arguments)
    assert (code, out) == (2, "")
    assert message in error_line(err)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer: [1, {", "line 1, column 15: not YAML"),
        ("- 1\n- 2", "expected a mapping"),
        ("# no", "the file is empty"),
    ],
)
def test_a_file_that_is_no_config_is_told_at_once(lit, text, message):
    Path("mine.yaml").write_text(text)
    code, _, err = lit("fit", "--config", "mine.yaml")
    assert code == 2
    assert message in error_line(err)


# -- running -----------------------------------------------------------------------------------------------------------


def scalars(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def results(out):
    """The lines of epochs and of the test, without the time."""
    return [re.sub(r" +\S+$", "", line) for line in out.splitlines() if re.match(r" *\d+/\d|test", line)]


def test_fit_prints_rates_writes_curves_and_tests_and_runs_again_in_the_same_folder(lit):
    code, out, _ = lit("fit", "--config", "digits", *SHORT)
    assert code == 0
    epochs = re.findall(r"^ *(\d)/2 +(\S+) +(\S+) +\S+ +\S+ +\S+ +\S+ +\S+$", out, re.M)
    assert [epoch for epoch, _, _ in epochs] == ["1", "2"]
    assert all(0.01 < float(rate) < 1 and float(lr) <= float(rate) for _, rate, lr in epochs)
    test_acc = float(re.search(r"^test_loss \S+  test_acc (\S+)$", out, re.M)[1])
    assert test_acc > 0.8

    (folder,) = Path("lightning_logs").iterdir()
    curves = scalars(folder)
    assert {"lipschitz/lr", "lipschitz/constant", "lipschitz/activation_norm", "lipschitz/weight_norm"} <= set(curves)
    assert [step for step, _ in curves["lipschitz/lr"]] == [39, 49, 79]
    for (_, lr), (_, constant) in zip(curves["lipschitz/lr"], curves["lipschitz/constant"], strict=True):
        assert lr <= 1 / constant * (1 + 1e-6)
    assert float(epochs[1][2]) == pytest.approx(curves["lipschitz/lr"][-1][1], rel=1e-3)

    # The saved configuration makes the same run again, beside the first one.
    code, again, _ = lit("fit", "--config", folder / "config.yaml")
    assert code == 0
    assert results(again) == results(out)
    assert len(list(Path("lightning_logs").iterdir())) == 2

    # The newest checkpoint is found, and evaluates to what fit said.
    code, out, _ = lit("test", "--config", "digits", "--ckpt_path", "last", "--trainer.accelerator", "cpu")
    assert code == 0
    assert float(re.search(r"test_acc (\S+)", out)[1]) == pytest.approx(test_acc, abs=1e-4)

    code, out, _ = lit("predict", "--config", "digits", "--ckpt_path", "last", "--trainer.accelerator", "cpu")
    assert code == 0
    assert Path(re.search(r"^predictions: (.+)$", out, re.M)[1]) == Path("predictions.csv").absolute()
    with open("predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["row"]) for row in rows] == list(range(360))
    assert all(0.1 <= float(row["probability"]) <= 1 for row in rows)

    code, out, _ = lit("validate", "--config", "digits", "--ckpt_path", "last", "--trainer.accelerator", "cpu")
    assert code == 0
    assert "val_acc" in out
    assert len(list(Path("lightning_logs").iterdir())) == 2


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_an_evaluation_without_a_checkpoint_is_refused(lit, command):
    code, out, err = lit(command, "--config", "digits", "--trainer.accelerator", "cpu")
    assert (code, out) == (2, "")
    assert f"{command} expected --ckpt_path and found none; pass last for the newest run" in error_line(err)
    assert list(Path(".").iterdir()) == []


def test_initial_weights_are_evaluated_where_they_are_asked_for(lit):
    code, out, _ = lit("validate", "--config", "digits", "--trainer.accelerator", "cpu", "--ckpt_path", "initial")
    assert code == 0
    assert float(re.search(r"val_loss (\S+)", out)[1]) == pytest.approx(math.log(10), rel=0.1)
    assert list(Path(".").iterdir()) == []


def test_warnings_are_one_line_each(lit):
    result = subprocess.run(
        [sys.executable, "-m", "lit_lipschitz", "fit", "--config", "digits", *SHORT, "--lipschitz.min_lr", "1e9",
         "--quiet", "--trainer.logger", "false"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "non-finite loss" in line]
    assert line.startswith("lit-lipschitz: warning: LipschitzLR: a non-finite loss in step ")
    assert ".py" not in result.stderr
    # Raised as an error, as by python -W error and in these tests, it is one line too.
    code, _, err = lit("fit", "--config", "digits", *SHORT, "--lipschitz.min_lr", "1e9")
    assert code == 1
    assert "a non-finite loss in step" in error_line(err)


def test_checkpoints_can_be_switched_off(lit):
    off = ("--trainer.enable_checkpointing", "false")
    code, out, err = lit("fit", "--config", "digits", *SHORT, *off, "--test_after_fit", "false")
    assert code == 0, err
    assert "checkpoints: none" in out
    assert "checkpoint: none" in out
    assert not list(Path(".").rglob("*.ckpt"))


def test_without_a_logger_no_file_of_the_users_is_overwritten(lit):
    Path("config.yaml").write_text("mine: true\n")
    code, _, _ = lit("fit", "--config", "digits", *SHORT, "--trainer.logger", "false")
    assert code == 0
    assert Path("config.yaml").read_text() == "mine: true\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_the_code_that_shells_expect(number, code):
    arguments = [str(SCRIPT), "fit", "--config", "digits", "--trainer.max_epochs", "10000"]
    # A shell that runs in the background ignores SIGINT and hands that down.
    run = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while not re.match(r" +3/", run.stdout.readline()):
            assert run.poll() is None
        run.send_signal(number)
        out, err = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == code
    assert "Traceback" not in err
    assert "test_acc" not in out
    assert list(Path("lightning_logs").glob("*/checkpoints/last.ckpt"))


def test_configs_overlay_and_the_callback_is_configured_under_lipschitz(lit):
    Path("mine.yaml").write_text("lipschitz:\n  max_lr: 0.03125\ntrainer:\n  max_epochs: 1\n")
    code, out, _ = lit("fit", "--config", "digits", "--config", "mine.yaml", "--trainer.accelerator", "cpu",
                       "--test_after_fit", "false")  # fmt: skip
    assert code == 0
    assert len(re.findall(r"^ +1/1 +0.03125 ", out, re.M)) == 1
    assert "test_acc" not in out


def test_a_run_is_resumed_where_it_ended(lit):
    arguments = ("fit", "--config", "digits", "--trainer.accelerator", "cpu", "--model.scheduler", "null",
                 "--lipschitz.schedule", "none", "--model.network.dropout", "0.2")  # fmt: skip
    whole = lit(*arguments, "--trainer.max_epochs", 3, "--trainer.default_root_dir", "whole")[1]
    lit(*arguments, "--trainer.max_epochs", 1, "--trainer.default_root_dir", "parts")
    code, rest, _ = lit(
        *arguments, "--trainer.max_epochs", 3, "--trainer.default_root_dir", "parts", "--ckpt_path", "last"
    )
    assert code == 0

    assert results(rest) == results(whole)[1:]


OVERLAYS = ("ddp.yaml", "short.yaml")
ONE_CYCLE = "cifar10_fast_onecycle.yaml"  # in test_fast.py


# The papers' own are in test_paper_configs.py.
@pytest.mark.parametrize(
    "name", [name for name in bundled_configs() if name not in (*OVERLAYS, ONE_CYCLE) and not name.startswith("paper_")]
)
def test_every_bundled_config_is_whole(lit, name):
    code, out, _ = lit("fit", "--config", name, "--print_config")
    assert code == 0
    config = yaml.safe_load(out)
    assert config["lipschitz"]["bound"] == "strict"
    assert config["model"]["init_args"]["scheduler"]["init_args"] == {"total_steps": None, "warmup": 0.1}
    assert config["model"]["init_args"]["optimizer"]["init_args"]["momentum"] == 0.9


# -- hostile configs ---------------------------------------------------------------------------------------------------

ANCHORS = "abcdefghij"
BOMBS = {
    "list": "- &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"- &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise(ANCHORS)),
    "itself": "a: &a\n  b: *a\n",
    "deep": "{a: " * 3000 + "1" + "}" * 3000,
    "chain": "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{x: *a{i - 1}}}\n" for i in range(1, 300)),
    "merged": "a0: &a0 {x: 1}\n"
    + "".join(f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12)),
    "long": "a: 1\n" * 100_000,
    "digits": f"a: {'9' * 100_000}\n",
}
BOMBS["mapping"] = "".join(f"{line[3]}: {line[2:]}\n" for line in BOMBS["list"].splitlines())


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.timeout(120)  # the large ones would not end
def test_a_config_that_takes_memory_or_time_is_refused(lit, kind):
    Path("bomb.yaml").write_text(BOMBS[kind])
    code, _, err = lit("fit", "--config", "bomb.yaml")
    assert code == 2
    assert "--config bomb.yaml" in error_line(err)


def test_anchors_are_for_use(lit):
    Path("anchors.yaml").write_text("trainer: {max_epochs: &n 1, max_steps: -1}\nlipschitz: {update: *n}\n")
    code, out, _ = lit("fit", "--config", "digits", "--config", "anchors.yaml", "--print_config")
    assert code == 0
    assert "  update: 1\n" in out


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--trainer.max_epochs", "abc"], 2, "trainer.max_epochs: expected int or null, found 'abc'"),
        (["--lipschitz.bund", "strict"], 2, "lipschitz.bund: no such option; closest: lipschitz.bound"),
        (["--lipschitz.bound", "strickt"], 2, "lipschitz.bound: expected one of 'paper', 'strict', 'smooth'"),
        (["--lipschitz.update", "0"], 2, "LipschitzLR(update=0): expected 'epoch' or a number of steps >= 1"),
        (["--data.batch_size", "x"], 2, "data.batch_size: expected int, found 'x'"),
        (["--data.batch_size", "5000"], 2, "the training set has 1293 examples: choose a smaller data.batch_size"),
        (["--data.val_split", "2"], 2, "val_split=2.0: expected a fraction"),
        (["--data", "Nothing"], 2, "data: expected the name or the import path of a class, found 'Nothing'"),
        (["--model.network", "lit_lipschitz.MPL"], 2, "model.network: lit_lipschitz.MPL can't be used"),
        (["--model.scheduler.warmup", "x"], 2, "model.scheduler.warmup: expected float, found 'x'"),
        (["--trainer.accelerator", "tpu"], 2, "this machine has"),
        (
            ["--trainer.accelerator", "cuda", "--trainer.devices", "99"],
            2,
            "change trainer.accelerator or trainer.devices",
        ),
        (["--ckpt_path", "nothing.ckpt"], 2, "--ckpt_path nothing.ckpt: no such file"),
        (["--ckpt_path", "last"], 2, "has saved a checkpoint; pass a path"),
        (["--trainer.max_epoch", "1"], 2, "trainer.max_epoch: no such option; closest: trainer.max_epochs"),
        (
            ["--model.optimizer", "torch.optim.AdamX"],
            2,
            "error: model.optimizer: expected the import path of a class or a function, found 'torch.optim.AdamX'",
        ),
        (["--config", "extra.yaml"], 2, "trainer.max_epoch: no such option; closest: trainer.max_epochs"),
        (["--ckpt_path", "truncated.ckpt"], 1, "not a checkpoint, or only a part of one"),
        (["--ckpt_path", "foreign.ckpt"], 1, "the checkpoint is of another network: Missing key(s)"),
        (
            ["--model.optimizer", "torch.optim.Adagrad", "--lipschitz.bound", "paper"],
            2,
            "no learning-rate rule is known for the optimizer Adagrad",
        ),
        (
            ["--model.network.num_classes", "5"],
            2,
            "outputs of shape (2, 5) from 2 images, and the data have 10 classes",
        ),
        (["--model.network", "lit_lipschitz.MNISTCNN"], 2, "MNISTCNN takes no images of shape (1, 8, 8), the data's"),
        (["--model.network.hiden", "3"], 2, "model.network.hiden: no such option; closest: hidden"),
        (["--model.scheduler.warmup", "3"], 2, "the scheduler can't be made: warmup=3.0: expected a fraction"),
        (["--model.scheduler", "StepLR"], 2, "error: model.scheduler.step_size must be given"),
        (
            ["--trainer.callbacks+", "EarlyStopping"],
            2,
            "error: trainer.callbacks.monitor must be given, for EarlyStopping; "
            "pass --trainer.callbacks.monitor with a value, or monitor: below init_args in a config",
        ),
        (
            [
                "--trainer.callbacks+",
                "EarlyStopping",
                "--trainer.callbacks.monitor",
                "a",
                "--trainer.callbacks+",
                "StochasticWeightAveraging",
            ],
            2,
            "error: trainer.callbacks.swa_lrs must be given, for StochasticWeightAveraging; ",
        ),
        (
            ["--trainer.logger", "CSVLogger"],
            2,
            "error: trainer.logger.save_dir must be given, for CSVLogger; pass --trai",
        ),
        (
            ["--trainer.logger", "[CSVLogger]"],
            2,
            "error: trainer.logger.save_dir must be given, for CSVLogger; pass --tr",
        ),
        (["--model.label_smoothing", "2"], 2, "label_smoothing=2.0: expected a number from 0 to 1"),
        (["--trainer.limit_train_batches", "0"], 2, "found -1 optimizer steps; set trainer.max_epochs"),
        (["--data.batch_size", "0"], 2, "error: batch_size=0: expected at least 1"),
        (["--data.val_split", "0.9999"], 2, "leaves none of 1437 examples to train on"),
        (["--data", "DigitDataModule"], 2, "closest: lit_lipschitz.DigitsDataModule"),
        (["--config", "scalar.yaml"], 2, "model: expected a class_path and init_args of a LightningModule, found '3'"),
        (["--ckpt_path", "best"], 2, "pass last, or a path"),
        (["--ckpt_path", "plain.ckpt"], 1, "not saved by Lightning"),
        (["--ckpt_path", "."], 2, "a folder, not a file"),
        (["--ckpt_path", ""], 2, "--ckpt_path: expected a path, or last, found an empty text"),
        (["--model.optimizer.lr", "-1"], 2, "Invalid learning rate: -1.0; change the value"),
        (["--model.optimizer", "AdamW", "--model.optimizer.betas", "[2,3]"], 2, "Invalid beta parameter"),
        (["--model.network.hidden", "[0]"], 2, "model: expected sizes of at least 1, found (0, 64)"),
        (["--trainer.accumulate_grad_batches", "0"], 2, "trainer.accumulate_grad_batches=0: expected at least 1"),
        (["--trainer.check_val_every_n_epoch", "0"], 2, "trainer.check_val_every_n_epoch=0: expected at least 1"),
        (["--trainer.gradient_clip_val", "-1"], 2, "trainer.gradient_clip_val=-1: expected at least 0"),
        (["--trainer.val_check_interval", "1000000000"], 2, "`val_check_interval` (1000000000) must be less"),
        (["--model", "bomb.yaml"], 2, "expected at most 50000 entries, found more, as anchors repeat them"),
        (["--trainer.callbacks", "[" * 99 + "]" * 99], 2, "expected at most 50 levels"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_bad_input_is_one_line_and_leaves_nothing(lit, arguments, code, message):
    Path("extra.yaml").write_text("trainer:\n  max_epoch: 1\n")
    Path("truncated.ckpt").write_bytes(b"PK\x03\x04 and no more")
    empty = {"callbacks": {}, "loops": {}, "optimizer_states": [], "lr_schedulers": [], "epoch": 0, "global_step": 0}
    checkpoint = {"state_dict": {"net.weight": torch.zeros(2)}, "pytorch-lightning_version": "2.6.6", **empty}
    torch.save(checkpoint, "foreign.ckpt")
    torch.save({"weight": torch.zeros(2)}, "plain.ckpt")
    Path("scalar.yaml").write_text("model: 3\n")
    Path("bomb.yaml").write_text(BOMBS["list"])
    before = sorted(Path(".").rglob("*"))
    defaults = [] if "--trainer.accelerator" in arguments else ["--trainer.accelerator", "cpu"]
    found, _, err = lit("fit", "--config", "digits", *defaults, *arguments)
    assert message in error_line(err)
    assert found == code
    assert sorted(Path(".").rglob("*")) == before


@pytest.fixture
def started(monkeypatch):
    """The names of launchers that would have started processes; they start none."""
    found = []
    for name in ("subprocess_script", "multiprocessing"):
        for kind, launcher in vars(importlib.import_module(f"lightning.pytorch.strategies.launchers.{name}")).items():
            if kind.endswith("Launcher") and "launch" in vars(launcher):
                monkeypatch.setattr(launcher, "launch", lambda *_, kind=kind, **__: found.append(kind))
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    return found


@pytest.mark.parametrize("command", ["fit", "validate-config", "explain", "suggest"])
@pytest.mark.parametrize("devices", ["9", "1000000000000"])
def test_more_processes_than_the_machine_can_hold_are_refused_before_any_starts(lit, started, command, devices):
    given = ["--trainer.accelerator", "cpu", "--trainer.strategy", "ddp", "--trainer.devices", devices]
    code, _, err = lit(command, "--config", "digits", *given)
    assert code == 2
    assert f"trainer.devices={devices}: expected at most 8 processes on this machine of 3 CPU cores" in error_line(err)
    assert not started


def test_more_processes_than_cores_are_admitted(lit, started):
    ranks = ("--trainer.devices", "8", "--trainer.strategy", "ddp", "--test_after_fit", "false")
    lit("fit", "--config", "digits", *SHORT, *ranks)
    assert started == ["_SubprocessScriptLauncher"]
    code, out, _ = lit("validate-config", "digits", *SHORT, "--trainer.devices", "8")
    assert (code, out[:6]) == (0, "valid:")


def test_devices_that_are_no_cpu_processes_are_the_accelerators_matter(lit, started):
    """A config for another machine is valid."""
    given = ["--trainer.accelerator", "gpu", "--trainer.devices", "16"]
    assert lit("validate-config", "digits", *given)[0] == 0
    code, _, err = lit("fit", "--config", "digits", *given)
    assert code == 2
    assert "trainer.accelerator" in error_line(err)


def test_an_error_of_lightning_at_run_time_is_one_line(lit):
    stopping = ("--trainer.callbacks+", "EarlyStopping", "--trainer.callbacks.monitor", "nothing")
    code, _, err = lit("fit", "--config", "digits", "--trainer.max_epochs", "1", *stopping)
    assert code == 1
    assert "Early stopping conditioned on metric `nothing` which is not available" in error_line(err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.scheduler", "StepLR", "--model.scheduler.step_size", "0"], "by zero in lr_scheduler.py; change"),
        (["--checkpoint.filename", "{nope"], "expected '}' before end of string; change the value"),
    ],
)
def test_a_value_that_is_refused_while_the_run_is_made_is_one_line_too(lit, arguments, message):
    code, _, err = lit("fit", "--config", "digits", *SHORT, *arguments)
    assert code == 2
    assert message in error_line(err)


class Failing(DigitsDataModule):
    """Data whose code has a mistake."""

    def augment_pixels(self, images, generator):
        raise ValueError("a mistake")


def test_a_mistake_in_somebodys_code_keeps_its_traceback(lit):
    with pytest.raises(ValueError, match="a mistake"):
        lit("fit", "--config", "digits", *SHORT, "--data", "test_cli.Failing")


NUMBERS = (
    "data.batch_size", "data.val_split", "data.seed", "data.train_subset", "seed_everything",
    "model.optimizer.lr", "model.optimizer.momentum", "model.optimizer.weight_decay", "model.label_smoothing",
    "model.network.dropout", "model.network.hidden", "model.scheduler.warmup", "lipschitz.max_lr", "lipschitz.min_lr",
    "lipschitz.max_growth", "lipschitz.update", "lipschitz.weight_decay", "checkpoint.every_n_train_steps",
    "checkpoint.save_top_k", "checkpoint.every_n_epochs", "trainer.accumulate_grad_batches", "trainer.max_epochs",
    "trainer.max_steps", "trainer.check_val_every_n_epoch", "trainer.val_check_interval", "trainer.gradient_clip_val",
    "trainer.log_every_n_steps", "trainer.overfit_batches", "audit",
)  # fmt: skip
VALUES = st.integers().map(str) | st.sampled_from(
    ["nan", ".nan", ".inf", "-.inf", "0", "-1", "1e308", "-0.0", "null", "true", "", "[]", "[0]", "[-1]", "{}", "1_0",
     "0x10", "\u0661", "\x1b[31m", "*a", "&a", "!!python/name:os.getcwd", "${x}", "2**9", "~"]
)  # fmt: skip


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(option=st.sampled_from(NUMBERS), value=VALUES)
@example(option="lipschitz.min_lr", value="12507421")  # a warning of a loss that is not finite
def test_a_value_is_taken_or_refused_in_one_line(lit, option, value):
    short = ("--trainer.max_time", "00:00:00:02", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches=1")
    quiet = ("--trainer.logger", "false", "--trainer.enable_checkpointing", "null", "--test_after_fit", "false")
    arguments = ("--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", *short, *quiet)
    code, _, err = lit("fit", "--config", "digits", *arguments, f"--{option}={value}")
    assert code in (0, 1, 2)
    if code:
        assert "\x1b" not in error_line(err)


def test_no_data_and_no_network_ends_with_one_line_and_code_1_and_leaves_nothing():
    environment = {"PATH": "/usr/bin:/bin", "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    result = subprocess.run(
        [str(SCRIPT), "fit", "--config", "mnist.yaml", "--data.data_dir", "nowhere"],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    assert result.returncode == 1
    line = error_line(result.stderr)
    for part in ("MNIST/raw/train-images-idx3-ubyte", str(Path("nowhere").absolute()), "downloading failed",
                 "--data.data_dir", "LIT_LIPSCHITZ_DATA"):  # fmt: skip
        assert part in line
    assert list(Path(".").iterdir()) == []


@pytest.mark.parametrize(("victim", "keep"), [("train-images-idx3-ubyte", 1000), ("t10k-labels-idx1-ubyte", 0)])
def test_a_truncated_data_file_is_one_line_with_code_1_and_leaves_nothing(lit, victim, keep):
    file = write_idx(Path("data")) / victim
    file.write_bytes(file.read_bytes()[:keep])
    code, _, err = lit(
        "fit" if "train" in victim else "test",
        "--config",
        "mnist",
        "--data.batch_size",
        "4",
        *SHORT[:2],
        *([] if "train" in victim else ["--ckpt_path", "initial"]),
    )
    assert code == 1
    assert f"{victim} can't be read: it is truncated" in error_line(err)
    assert [path.name for path in Path(".").iterdir()] == ["data"]


def test_the_data_of_a_config_without_a_model_is_asked_for(lit):
    code, _, err = lit("fit")
    assert code == 2
    assert "model must be given; pass a config" in error_line(err)


# -- messages ----------------------------------------------------------------------------------------------------------


def test_an_unknown_message_stays_as_it_is_in_one_line():
    assert condense("something\n  else") == "something else"


@pytest.mark.parametrize("precision", ["high", "highest"])
def test_the_precision_of_matrix_products_is_torchs(lit, precision):
    before = torch.get_float32_matmul_precision()
    try:
        code, _, _ = lit(
            "fit", "--config", "digits", *SHORT, "--trainer.max_epochs", 1, "--matmul_precision", precision
        )
        assert code == 0
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_only_the_parser_that_is_wanted_is_built(lit, monkeypatch):
    built = []
    prepare = LightningCLI._prepare_subcommand_parser

    def noted(self, klass, subcommand, **settings):
        built.append(subcommand)
        return prepare(self, klass, subcommand, **settings)

    monkeypatch.setattr(LightningCLI, "_prepare_subcommand_parser", noted)
    assert lit("fit", "--config", "digits", "--print_config")[0] == 0
    assert built == ["fit"]


# -- audit -------------------------------------------------------------------------------------------------------------


def test_audit_prints_a_table_on_stderr_and_writes_curves(lit):
    code, out, err = lit("fit", "--config", "digits", *SHORT, "--audit", "5", "--test_after_fit", "false")
    assert code == 0
    assert "audited" not in out
    assert "Gradients before clipping, in 16 audited steps (one in 5)" in err
    rows = [line.split()[0] for line in err.splitlines() if line.startswith("network.")]
    assert rows == ["network.features.1", "network.features.4", "network.head"]
    assert len(re.findall(r"^L bounded (?:the head|every layer)'s gradient in \d+ of 16 steps; ", err, re.M)) == 2
    (folder,) = Path("lightning_logs").iterdir()
    curves = scalars(folder)
    for name in ("largest_is_head", *(f"{row}/ratio" for row in rows)):
        assert [step for step, _ in curves[f"audit/{name}"]] == list(range(0, 80, 5))


def test_without_audit_nothing_is_audited(lit):
    code, _, err = lit("fit", "--config", "digits", *SHORT, "--test_after_fit", "false")
    assert code == 0
    assert "audited" not in err
    (folder,) = Path("lightning_logs").iterdir()
    assert not [name for name in scalars(folder) if name.startswith("audit/")]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("-1", "--audit -1: expected a number of optimizer steps, or 0 for none"),
        ("x", "audit: expected int, found 'x'"),
    ],
)
def test_a_bad_audit_is_one_line_and_leaves_nothing(lit, value, message):
    code, _, err = lit("fit", "--config", "digits", "--audit", value)
    assert code == 2
    assert message in error_line(err)
    assert list(Path(".").iterdir()) == []
