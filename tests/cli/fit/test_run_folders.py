"""Two runs in one folder: none takes the other's files, and a failed one removes what it made itself, no more."""

import csv
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import Curves, error_line, race

from lit_lipschitz.cli.output import locked

FIT = ["fit", "--config", "digits", "--trainer.accelerator", "cpu", "--data.train_subset", "320",
       "--trainer.max_epochs", "1", "--test_after_fit", "false"]  # fmt: skip
SEVEN = ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", ".", "--trainer.logger.name", "my",
         "--trainer.logger.version", "7"]  # fmt: skip
CURVES = ["--trainer.logger", "CSVLogger", *SEVEN[2:]]
PREDICT = ["predict", "--config", "digits", "--trainer.accelerator", "cpu", "--ckpt_path", "initial"]


def content(folder):
    """Every file below a folder, and every folder as None."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(Path(folder).rglob("*"))}


def fails_in_training(*_):
    raise OSError(5, "Input/output error", "data.bin")


@pytest.mark.parametrize(
    "mistake",
    [
        ["--lipschitz.head", "nowhere"],
        ["--data.train_subset", "0"],
        ["--checkpoint.monitor", "nothing", "--checkpoint.save_top_k", "2", "--trainer.callbacks", "nowhere.Nothing"],
        "training",
    ],
    ids=str,
)
def test_a_failed_fit_leaves_an_earlier_run_in_the_same_folder_as_it_was(lit, monkeypatch, mistake):
    assert lit(*FIT, *SEVEN)[0] == 0
    before = content(".")
    assert "my/version_7/config.yaml" in before
    if mistake == "training":
        monkeypatch.setattr("lit_lipschitz.ImageClassifier.training_step", fails_in_training)
        mistake = []
    code, _, err = lit(*FIT, *SEVEN, *mistake)
    assert code in (1, 2)
    error_line(err)
    assert content(".") == before


def test_a_failed_fit_removes_what_it_made_and_no_folder_or_file_of_others(lit, monkeypatch):
    def fails_beside_somebody(*_):
        Path("my/version_7/events.txt").write_text("somebody's notes")
        fails_in_training()

    monkeypatch.setattr("lit_lipschitz.ImageClassifier.training_step", fails_in_training)
    assert lit(*FIT, *SEVEN)[0] == 1
    assert content(".") == {}
    Path("my").mkdir()
    assert lit(*FIT, *SEVEN)[0] == 1
    assert content(".") == {"my": None}
    Path("my/version_7").mkdir()
    Path("my/version_7/config.yaml").write_text("of somebody else")
    before = content(".")
    assert lit(*FIT, *SEVEN)[0] == 1
    assert content(".") == before


def test_a_second_fit_in_a_folder_keeps_the_first_ones_configuration_curves_and_checkpoints(lit):
    assert lit(*FIT, *CURVES)[0] == 0
    first = {name: data for name, data in content("my").items() if data is not None}
    code, _, err = lit(*FIT, *CURVES, "--seed_everything", "5")
    assert code == 0
    assert "my/version_7/metrics.csv is of an earlier run, and is now my/version_7/metrics-v1.csv" in err
    second = content("my")
    assert set(first.values()) <= set(second.values())
    assert "seed_everything: 5" in Path("my/version_7/config-v1.yaml").read_text()


# Starts when all three have imported what they need.
TOGETHER = """
import sys, time
from pathlib import Path
import lit_lipschitz.cli.fit.command, sklearn.datasets
from lit_lipschitz.cli.main import main
Path(f"ready{sys.argv[-1]}").touch()
while len(list(Path(".").glob("ready*"))) < 3:
    time.sleep(0.001)
sys.exit(main())
"""


@pytest.mark.slow
def test_fits_that_start_at_the_same_time_get_a_folder_each():
    runs = race(*(["-c", TOGETHER, *FIT, "--seed_everything", seed] for seed in (1, 2, 3)))
    assert [run.returncode for run in runs] == [0, 0, 0], [run.stderr for run in runs]
    folders = sorted(Path("lightning_logs").iterdir())
    assert [folder.name for folder in folders] == ["version_0", "version_1", "version_2"]
    seeds = [re.search(r"^seed_everything: (\d)", (one / "config.yaml").read_text(), re.M)[1] for one in folders]
    assert sorted(seeds) == ["1", "2", "3"]
    for folder in folders:
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["epoch=0.ckpt", "last.ckpt"]
        assert len(list(folder.glob("events.*"))) == 1


def wait_for(path, process):
    end = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("option", ["--trainer.logger.version", "--checkpoint.dirpath"])
def test_a_folder_that_a_running_fit_writes_into_is_refused_until_it_ends_or_is_killed(lit, option):
    options = [*SEVEN, "--trainer.max_epochs", "100000"] if "version" in option else [
        "--trainer.logger", "false", "--checkpoint.dirpath", "my/version_7", "--trainer.max_epochs", "100000",
    ]  # fmt: skip
    running = subprocess.Popen(
        [sys.executable, "-m", "lit_lipschitz", *FIT, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(Path("my/version_7/.run.lock"), running)
        code, _, err = lit(*FIT, *options)
        assert code == 1
        assert f"version_7: another run writes there now; wait for its end, or pass another {option}" in error_line(err)
    finally:
        running.kill()
        running.wait()
    assert Path("my/version_7/.run.lock").exists()
    code, _, err = lit(*FIT, *options, "--trainer.max_epochs", "1")
    assert code == 0, err
    assert not list(Path(".").rglob("*.lock"))


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.fast_dev_run", "true"],
        ["--trainer.logger", "false"],
        ["--trainer.logger", "test_run_folders.Elsewhere"],
    ],
    ids=str,
)
def test_a_run_without_curves_in_a_folder_waits_for_none(lit, options):
    Path("lightning_logs").mkdir()
    with locked(Path("lightning_logs/run")):
        assert lit(*FIT, *options)[0] == 0
        assert os.listdir("lightning_logs") == [".run.lock"]


class Elsewhere(Curves):
    """A logger that writes no files."""

    name = "curves"


# -- predictions -------------------------------------------------------------------------------------------------------


def test_predictions_do_not_replace_earlier_ones(lit):
    Path("predictions.csv").write_text("of last week")
    printed = [lit(*PREDICT, "--seed_everything", seed)[1] for seed in (1, 2)]
    assert [Path(re.search(r"^predictions: (.+)$", out, re.M)[1]).name for out in printed] == [
        "predictions-v1.csv (predictions.csv exists and is kept)",
        "predictions-v2.csv (predictions.csv exists and is kept)",
    ]
    assert Path("predictions.csv").read_text() == "of last week"
    assert Path("predictions-v1.csv").read_bytes() != Path("predictions-v2.csv").read_bytes()
    assert len(os.listdir(".")) == 3


PREDICTIONS = """
import sys
from types import SimpleNamespace
import torch
from lit_lipschitz.cli.fit.predictions import PredictionFile
trainer = SimpleNamespace(world_size=1, global_rank=0, default_root_dir=".")
for _ in range(10):
    PredictionFile().write_on_epoch_end(trainer, None, [torch.full((500, 2), float(sys.argv[1]))], [])
"""


def test_two_predictions_at_the_same_time_are_two_whole_files():
    for run in race(*(["-c", PREDICTIONS, value] for value in (0.25, 0.75))):
        assert run.returncode == 0, run.stderr
    tables = []
    for path in Path(".").iterdir():
        with path.open(newline="") as file:
            tables.append(list(csv.reader(file))[1:])
    assert sorted(table[0][2] for table in tables) == ["0.250000"] * 10 + ["0.750000"] * 10
    assert {len(table) for table in tables} == {500}
    assert all(len({row[2] for row in table}) == 1 for table in tables)
