"""What fit prints: lines and a table, JSON, or the result alone."""

import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import error_line, printed_epochs
from rich.console import Console
from rich.file_proxy import FileProxy

from lit_lipschitz.cli.fit.epoch_lines import Table, format_value, print_stdout
from lit_lipschitz.cli.fit.progress_bar import RateBar
from lit_lipschitz.cli.output import to_json
from lit_lipschitz.cli.report.panels import panels
from lit_lipschitz.cli.report.runs import find_runs

FIT = ("fit", "--config", "digits", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "2")


def test_an_epoch_is_a_row_below_one_header_with_the_limit_that_bound(lit):
    _, out, _ = lit(*FIT, "--lipschitz.rule", "inverse", "--lipschitz.max_lr", "0.09")
    (events,) = find_runs(["lightning_logs"])
    lines = out.splitlines()
    assert lines[1].split() == ["epoch", "rate", "lr", "train_loss", "train_acc", "val_loss", "val_acc", "s"]
    rows = printed_epochs(out)
    assert [row["epoch"] for row in rows] == ["1/2", "2/2"]
    assert lines[3].strip() == "rate limited by max_lr"
    assert [line.strip() for line in lines[4:] if "limited" in line] == ["rate no longer limited"]
    for row, constant in zip(rows, events.curves["lipschitz/constant"].values(), strict=True):
        assert float(row["rate"]) == pytest.approx(min(0.09, 1 / constant), rel=1e-3)
    assert max(map(len, lines[1:5])) <= 80
    assert lines[-3].startswith("test_loss")


def test_the_first_line_and_the_last_ones_say_where_things_are(lit):
    out = lit(*FIT)[1].splitlines()
    assert out[0] == "run: lightning_logs/version_0; checkpoints: lightning_logs/version_0/checkpoints"
    assert out[-2:] == [
        "checkpoint: lightning_logs/version_0/checkpoints/last.ckpt",
        "curves: lit-lipschitz report lightning_logs/version_0",
    ]
    assert Path(out[-2].partition(" ")[2]).is_file()
    out = lit(*FIT, "--trainer.logger", "false", "--trainer.enable_checkpointing", "null")[1].splitlines()
    assert out[0] == "run: no logger; checkpoints: checkpoints"
    assert out[-2:] == ["checkpoint: checkpoints/last.ckpt", "curves: no logger"]


def test_rate_and_lr_have_one_name_everywhere(lit):
    _, out, _ = lit(*FIT, "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", ".")
    printed = printed_epochs(out)[-1]
    (run,) = find_runs(["lightning_logs"])
    for name in ("rate", "lr"):
        assert float(printed[name]) == pytest.approx(run.last(f"lipschitz/{name}"), rel=1e-3)
    assert run.last("lipschitz/lr") < run.last("lipschitz/rate")
    keys = {panel.key: panel for panel in panels([run])}
    assert keys["rate"].title == "rate: learning rate computed from L, before the schedule"
    assert keys["lr"].title == "lr: learning rate that the optimizer used"
    assert [line.tag for key in ("rate", "lr") for line in keys[key].lines] == ["lipschitz/rate", "lipschitz/lr"]


def test_json_lines_are_all_that_is_on_stdout(lit):
    code, out, _ = lit(*FIT, "--json_lines")
    assert code == 0
    first, second, end = [json.loads(line) for line in out.splitlines()]
    assert [(row["event"], row["epoch"], row["step"]) for row in (first, second)] == [
        ("epoch", 1, 40),
        ("epoch", 2, 80),
    ]
    assert end["run"] == "lightning_logs/version_0"
    assert {"rate", "lr", "constant", "activation_norm", "weight_norm", "caps", "train_loss", "train_acc", "val_loss",
            "val_acc", "seconds"} <= set(first)  # fmt: skip
    assert (end["event"], end["status"], end["step"]) == ("end", "finished", 80)
    assert end["test_acc"] > 0.8
    assert end["checkpoint"].endswith("last.ckpt")


def test_json_has_no_nan():
    content = {
        "val_loss": math.nan,
        "rate": math.inf,
        "lr": 0.5,
        "runs": [{"acc": -math.inf}],
        "rates": (0.1, math.nan),
    }
    assert json.loads(to_json(content), parse_constant=pytest.fail) == {
        "val_loss": None, "rate": None, "lr": 0.5, "runs": [{"acc": None}], "rates": [0.1, None],
    }  # fmt: skip


def test_quiet_leaves_the_result(lit):
    code, out, err = lit(*FIT, "--quiet")
    assert code == 0
    assert re.fullmatch(r"test_loss \S+  test_acc \S+\n", out)
    assert err == ""
    _, out, _ = lit(*FIT, "--quiet", "--test_after_fit", "false")
    assert [row["epoch"] for row in printed_epochs(out)] == ["2/2"]
    assert len(out.splitlines()) == 2


def test_both_modes_are_refused(lit):
    code, _, err = lit(*FIT, "--quiet", "--json_lines")
    assert code == 2
    assert "--quiet and --json_lines: expected one of them" in error_line(err)


def test_lines_go_to_stdout_while_the_bar_has_stderr(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(sys, "stdout", FileProxy(Console(file=io.StringIO()), file))
    print_stdout("epoch 1/2")
    assert file.getvalue() == "epoch 1/2\n"


def test_values_are_readable():
    assert [format_value("rate", value) for value in (0.0412345, 1.23456e-5)] == ["0.04123", "1.235e-05"]
    assert format_value("val_acc", 0.98765) == "0.9877"
    assert RateBar()._console_kwargs == {"stderr": True}


def test_a_column_that_is_new_comes_with_a_new_header_and_one_that_is_missing_is_a_dash():
    table = Table()
    first = {"epoch": 1, "step": 5, "caps": [], "lr": 0.1, "mine": 2.0, "seconds": 1.0}
    second = {"epoch": 2, "step": 9, "caps": [], "lr": 0.1, "seconds": 120.4}
    third = {**second, "epoch": 3, "val_acc": 0.5, "caps": ["max_lr"]}
    assert [line.split() for line in table.lines(first, 9)] == [
        ["epoch", "lr", "mine", "s"],
        ["1/9", "0.1", "2", "1.0"],
    ]
    assert [line.split() for line in table.lines(second, 9)] == [["2/9", "0.1", "-", "120"]]
    assert [line.split() for line in table.lines(third, 9)] == [
        ["epoch", "lr", "val_acc", "mine", "s"],
        ["3/9", "0.1", "0.5000", "-", "120"],
        ["rate", "limited", "by", "max_lr"],
    ]
    assert table.lines({**third, "caps": []}, 9)[-1].strip() == "rate no longer limited"


def test_more_metrics_than_fit_are_left_out():
    row = {
        "epoch": 1000,
        "caps": [],
        "seconds": 1.0,
        "rate": 0.1,
        "lr": 2.38412e-05,
        "train_loss": 1.0,
        "val_loss": 9e9,
    }
    lines = Table().lines({**row, **{f"metric_{i}": 1.0 for i in range(20)}}, 1000)
    assert [len(line) <= 80 for line in lines] == [True, True]
    assert {"rate", "lr", "train_loss", "val_loss", "metric_0"} <= set(lines[0].split())


@pytest.mark.parametrize("arguments", [["configs"], ["--help"], ["configs", "--json"], ["report", "."]])
@pytest.mark.parametrize("buffered", ["", "1"])
def test_who_reads_may_stop_and_a_full_disk_is_one_line(arguments, buffered):
    Path("metrics.csv").write_text("epoch,step,val_loss\n0,5,0.5\n1,10,0.25\n")
    command = [sys.executable, "-m", "lit_lipschitz", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": buffered}
    reading, writing = os.pipe()
    os.close(reading)
    gone = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment, timeout=60)
    os.close(writing)
    assert (gone.returncode, gone.stderr) == (1, "")
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, timeout=60)
    assert (ended.returncode, ended.stderr) == (1, "lit-lipschitz: error: stdout: No space left on device\n")
