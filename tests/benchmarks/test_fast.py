"""The fast configs, and the benchmark that runs them."""

import io
import json
import math
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, write_cifar

from lit_lipschitz.cli.configs import find_config
from lit_lipschitz.cli.main import main

BENCHMARKS = ROOT / "benchmarks"
NAMES = ["cifar10_fast.yaml", "cifar10_fast_onecycle.yaml"]


@pytest.fixture
def small():
    """Options for a few steps on 30 images of noise."""
    write_cifar(Path("data"))
    return [
        *("--data.data_dir", "data", "--data.verify", "false", "--data.download", "false", "--data.batch_size", "6"),
        *("--model.network.width", "8", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "2"),
    ]


def test_the_two_configs_differ_in_the_rate_and_its_warm_up_alone():
    ours, theirs = (yaml.safe_load(Path(find_config(name)).read_text()) for name in NAMES)
    assert theirs.pop("fixed_rate") is True
    assert ours.pop("lipschitz") == {"bound": "strict"}
    models = [config["model"]["init_args"] for config in (ours, theirs)]
    assert [model["scheduler"]["init_args"].pop("warmup") for model in models] == [0.1, 0.2]
    assert models[1]["optimizer"]["init_args"].pop("lr") == 0.4
    assert ours == theirs
    assert models[0]["optimizer"]["init_args"]["nesterov"] is True


@pytest.mark.parametrize("name", NAMES)
def test_a_fast_config_trains_and_is_tested(lit, small, name):
    code, out, err = lit("fit", "--config", name, *small, "--json_lines")
    assert code == 0, err
    first, second, end = map(json.loads, out.splitlines())
    assert (first["step"], second["step"], end["status"]) == (5, 10, "finished")
    assert all(math.isfinite(row["train_loss"]) for row in (first, second))
    assert 0 <= end["test_acc"] <= 1
    assert "val_acc" not in second
    assert ("rate" in second) == (name == NAMES[0])
    if name == NAMES[1]:  # the sixth of 10 steps comes next, and 3 of 8 steps down are over
        assert first["lr"] == pytest.approx(0.4 * 5 / 8)
    assert Path(end["checkpoint"]).is_file()  # although the run is shorter than the interval of checkpoints


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_an_option_of_the_command(lit, small, name):
    code, _, err = lit("fit", "--config", name, *small, "--config", "short", "--trainer.precision", "bf16-mixed")
    assert code == 0, err


@pytest.fixture
def fast(monkeypatch):
    """The benchmark, whose runs are in this process; and what it has run so far."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import fast

    calls = []

    def command(arguments):
        calls.append(arguments)
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            monkeypatch.setattr(sys, "argv", ["lit-lipschitz", *arguments])
            code = main()
        return code, out.getvalue(), err.getvalue()

    monkeypatch.setattr(fast, "command", command)
    yield fast, calls
    for name in ("fast", "rows", "recorders"):
        sys.modules.pop(name, None)


def test_the_benchmark_chooses_a_peak_runs_both_and_repeats_nothing(fast, small, capsys):
    benchmark, calls = fast
    options = ["--seeds", "2", "--output", "fast.jsonl", "--precision", "32-true"]
    assert benchmark.main([*options, "--peaks", "1e-9", "0.2", "--", *small]) == 0
    rows = [json.loads(line) for line in Path("fast.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["config"], row["seed"]) for row in rows] == [
        *[("tuning", NAMES[1], 1000)] * 2,
        *[("test", name, seed) for seed in (0, 1) for name in NAMES],
    ]
    tuned = max(rows[:2], key=lambda row: row["val_acc"])["peak"]
    assert [row["peak"] for row in rows[2:]] == [None, tuned] * 2
    for row in rows:
        assert 0 < row["first_step_seconds"] < row["train_seconds"] <= row["seconds"]
        assert row["steps"] == (8 if row["stage"] == "tuning" else 10)  # 27 and 30 images in batches of 6
        assert row["torch"]
        assert row["device"]
    assert all(row["test_acc"] is None for row in rows[:2])  # the test set does not choose
    capsys.readouterr()
    # A line that a kill has cut off is ignored.
    with Path("fast.jsonl").open("a") as file:
        file.write('{"config": "cifar10_f')
    assert benchmark.main([*options, "--peaks", "1e-9", "0.2", "--", *small]) == 0
    assert len(calls) == 6
    table = capsys.readouterr().out
    for name in NAMES:
        own = [row for row in rows[2:] if row["config"] == name]
        middle = 100 * (own[0]["test_acc"] + own[1]["test_acc"]) / 2
        error = 100 * abs(own[0]["test_acc"] - own[1]["test_acc"]) / 2
        assert f"| {middle:.2f} ± {error:.2f} |" in next(line for line in table.splitlines() if f"| {name} " in line)
    assert benchmark.main(["--table", *options[2:], "--", *small]) == 0
    assert capsys.readouterr().out == table


def test_a_run_that_fails_ends_the_benchmark_and_leaves_no_row(fast):
    benchmark, _ = fast
    with pytest.raises(SystemExit, match="lit-lipschitz ended with code 2: .*batch_size=0"):
        benchmark.main(["--seeds", "1", "--peaks", "0.1", "--output", "fast.jsonl", "--", "--data.batch_size", "0"])
    assert not Path("fast.jsonl").exists()
