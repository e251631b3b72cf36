"""The script of the full-length runs, made small: a run in pieces equals the run in one go."""

import csv
import fcntl
import json
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from helpers import ROOT, last, same, write_cifar

from lit_lipschitz.cli.configs import bundled_configs
from lit_lipschitz.cli.main import main

SCRIPT = ROOT / "benchmarks" / "full_size.py"
MORE = 75


@pytest.fixture
def full_size(monkeypatch):
    """The script, whose runs are in this process; and the arguments of those it has made so far."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import full_size

    calls = []

    def launch(arguments, log, seconds):
        calls.append(arguments)
        with log.open("a") as file, redirect_stdout(file), redirect_stderr(file):
            monkeypatch.setattr(sys, "argv", ["lit-lipschitz", *arguments])
            return main()

    monkeypatch.setattr(full_size, "launch", launch)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield full_size, calls
    for number, handler in before.items():
        signal.signal(number, handler)
    for name in ("full_size", "rows", "recorders"):
        sys.modules.pop(name, None)


@pytest.fixture
def small():
    """Options of the command for a few steps on 30 images of noise."""
    write_cifar(Path("data"))
    return [
        *("--data.data_dir", "data", "--data.download", "false", "--data.batch_size", "6"),
        *("--trainer.accelerator", "cpu", "--trainer.max_epochs", "3", "--model.network.depth", "8"),
    ]


def results(folder):
    return [json.loads(line) for line in Path(folder, "full_size.jsonl").read_text().splitlines()]


def curve(folder, name):
    with next(Path(folder, "full_size").glob(f"{name}-*.csv")).open() as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def test_a_run_in_pieces_ends_as_the_run_in_one_go(full_size, small, capsys):
    script, calls = full_size

    def go(folder, *options):
        return script.main(["--only", "default_resnet20_30", "paper_resnet20_sgd", "--work", f"{folder}-work",
                            "--output", folder, *options, "--", *small])  # fmt: skip

    assert go("whole") == 0
    codes = [go("parts", "--steps", "6")]
    while codes[-1] == MORE and len(codes) < 9:
        codes.append(go("parts", "--steps", "6"))
    # 12 and 15 steps, at most 6 in a piece; the second piece of the first run is told to stop in its last step.
    assert codes == [MORE, MORE, MORE, MORE, 0]
    whole, parts = results("whole"), results("parts")
    assert [row["run"].rsplit("-", 1)[0] for row in whole] == ["default_resnet20_30", "paper_resnet20_sgd"]
    for one, other in zip(whole, parts, strict=True):
        assert one["pieces"] == 1 < other["pieces"] <= 3
        assert {key: one[key] for key in one if key not in ("pieces", "seconds")} == {
            key: other[key] for key in other if key not in ("pieces", "seconds")
        }
        name = one["run"].rsplit("-", 1)[0]
        rows = curve("whole", name)
        assert rows == curve("parts", name)
        assert [row["epoch"] for row in rows] == ["1", "2", "3"]
        assert one["final_test_acc"] == float(rows[-1]["test_acc"])
        assert one["best_test_acc"] == max(float(row["test_acc"]) for row in rows)
        folders = [next(Path(f"{place}-work").glob(f"{name}-*")) for place in ("whole", "parts")]
        assert same(*map(last, folders))
    # Nothing is left to do.
    done = len(calls)
    capsys.readouterr()
    assert go("parts") == 0
    assert len(calls) == done
    assert "2 of 2 done, about 0.0 min left" in capsys.readouterr().out


def test_recording_the_curve_changes_nothing_and_its_figures_are_the_commands(full_size, small, lit, capsys):
    script, _ = full_size
    script.main(["--only", "default_resnet20_30", "--work", "work", "--output", "out", "--", *small])
    capsys.readouterr()
    plain = ["fit", "--config", "cifar10", *small, "--data.verify", "false", "--trainer.default_root_dir", "plain"]
    code, out, err = lit(*plain, "--json_lines")
    assert code == 0, err
    *epochs, end = map(json.loads, out.splitlines())
    assert same(last(next(Path("work").glob("default_*"))), last("plain"))
    rows = curve("out", "default_resnet20_30")
    for row, epoch in zip(rows, epochs, strict=True):
        for name in ("rate", "lr", "train_loss"):
            assert float(row[name]) == pytest.approx(epoch[name], rel=1e-5)
    assert float(rows[-1]["test_acc"]) == pytest.approx(end["test_acc"])
    assert float(rows[-1]["test_loss"]) == pytest.approx(end["test_loss"], rel=1e-5)


def test_the_plan_is_printed_and_a_call_without_time_begins_nothing(full_size, capsys):
    script, calls = full_size
    where = ["--work", "work", "--output", "out"]
    assert script.main(["--dry-run", *where]) == MORE
    plan = capsys.readouterr().out.splitlines()
    assert len(plan) == 2 + len(script.RUNS)
    assert [line.split()[0] for line in plan if line.endswith("next")] == ["default_resnet20_30"]
    assert "0 of 15 done" in plan[-1]
    assert "guesses" in plan[-1]
    assert not Path("work").exists()
    assert script.main(["--minutes", "0.1", *where]) == MORE
    assert not calls
    with pytest.raises(SystemExit) as end:
        script.main(["--only", "nothing", *where])
    assert end.value.code == 2


def test_the_runs_are_those_that_theory_and_configs_have(full_size):
    script, _ = full_size
    names = {run.name for run in script.RUNS}
    assert {f"default_{network}_{epochs}" for network in ("resnet20", "densenet") for epochs in (30, 100, 300)} < names
    for run in script.RUNS:
        name = run.options[1]
        assert name in bundled_configs()
        text = bundled_configs()[name]
        if run.recorded:  # the first line of a paper's config has what was recorded
            final, best = run.recorded
            assert f"recorded {best:.2f} % at best, {final:.2f} % at the end" in text
        elif name.startswith("paper_"):
            assert "recorded" not in text


def test_a_failure_ends_the_call_and_two_calls_do_not_share_a_folder(full_size, capsys):
    script, calls = full_size
    options = ["--only", "default_resnet20_30", "--work", "work", "--output", "out", "--", "--data.batch_size", "0"]
    assert script.main(options) == 1
    assert "ended with code 2" in capsys.readouterr().err
    with Path("work/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit):
            script.main(options)
    assert "another call is using it" in capsys.readouterr().err
    assert len(calls) == 1


@pytest.mark.slow
def test_time_that_is_up_leaves_a_checkpoint_from_which_the_next_call_goes_on(small):
    # Enough epochs not to end before the time is up, which starts with the imports.
    arguments = ["--only", "default_resnet20_30", "--work", "work", "--output", "out", "--minutes"]
    small = [*small, "--trainer.max_epochs", "100000", "--checkpoint.every_n_epochs", "100000"]
    steps = []
    for _ in range(2):
        command = [sys.executable, str(SCRIPT), *arguments, "1.5", "--", *small]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert result.returncode == MORE, result.stderr
        steps.append(last(next(Path("work").glob("default_*")))["global_step"])
    assert 0 < steps[0] < steps[1]
    pieces = [json.loads(line)["step"] for line in next(Path("out/full_size").glob("*.jsonl")).read_text().splitlines()]
    assert pieces == [0, steps[0]]
