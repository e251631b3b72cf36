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
from helpers import error_line
from rich.console import Console
from rich.file_proxy import FileProxy

from lit_lipschitz.cli.fit.epoch_lines import format_value, print_stdout, table
from lit_lipschitz.cli.fit.progress_bar import RateBar
from lit_lipschitz.cli.output import to_json

FIT = ("fit", "--config", "digits", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "2")


def test_fit_ends_with_a_table_that_has_the_limit_that_bound(lit):
    _, out, _ = lit(*FIT, "--lipschitz.rule", "inverse", "--lipschitz.max_lr", "0.09")
    lines = out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split()[:1] == ["epoch"] and "K_z" in line)
    assert lines[head].split() == ["epoch", "rate", "lr", "L", "K_z", "W", "train_loss", "train_acc", "val_loss",
                                   "val_acc", "s", "cap"]  # fmt: skip
    rows = [line.split() for line in lines[head + 1 : head + 3]]
    assert [row[0] for row in rows] == ["1", "2"]
    assert rows[0][-1] == "max_lr"
    for row in rows:
        assert float(row[1]) == pytest.approx(min(0.09, 1 / float(row[3])), rel=1e-3)
        assert f"val_loss {row[8]}" in out
    assert lines[-1].startswith("test_loss")


def test_json_lines_are_all_that_is_on_stdout(lit):
    code, out, _ = lit(*FIT, "--json_lines")
    assert code == 0
    first, second, end = [json.loads(line) for line in out.splitlines()]
    assert [(row["event"], row["epoch"], row["step"]) for row in (first, second)] == [
        ("epoch", 1, 40),
        ("epoch", 2, 80),
    ]
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
    assert re.fullmatch(r"epoch 2/2 .*\n", out)


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


def test_a_table_leaves_out_what_is_not_there():
    rows = [{"epoch": 1, "step": 5, "caps": [], "lr": 0.1, "mine": 2.0, "seconds": 1.0},
            {"epoch": 2, "step": 9, "caps": [], "lr": 0.1, "seconds": 1.0}]  # fmt: skip
    assert [line.split() for line in table(rows)] == [
        ["epoch", "lr", "mine", "s"], ["1", "0.1", "2", "1.0"], ["2", "0.1", "-", "1.0"]
    ]  # fmt: skip


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
