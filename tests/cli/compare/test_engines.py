"""The runs of `compare`, spread over processes and over several commands: each is made once, and is a row as before."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import error_line, race
from test_compare_command import DIGITS, RATES, Fixed, row

from lit_lipschitz.cli.compare import engines
from lit_lipschitz.cli.compare.policies import parse_policies
from lit_lipschitz.cli.compare.results_file import ResultsFile
from lit_lipschitz.cli.compare.runs import Runs
from lit_lipschitz.cli.compare.trials import Trial
from lit_lipschitz.errors import ConfigurationError

COMPARE = ["compare", *DIGITS, "--policies", "lipschitz,sgd:0.1", "--seeds", "2"]


def results(path):
    """The rows without their time."""
    with open(path, newline="") as file:
        return sorted(tuple(cell for name, cell in one.items() if name != "seconds") for one in csv.DictReader(file))


def files():
    return sorted(path.name for path in Path(".").iterdir())


def trials(count):
    (policy,) = parse_policies("sgd:0.1")
    return [Trial(number, policy, number, "c", None, []) for number in range(1, count + 1)]


# -- engines -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["joblib", "ray", "submitit"])
def test_an_engine_makes_the_rows_that_one_process_makes(lit, engine):
    pytest.importorskip(engine)
    assert lit(*COMPARE, "--output", "one.csv", "--seeds", "1")[0] == 0
    (whole,) = race(["-m", "lit_lipschitz", *COMPARE, "--output", "many.csv", "--engine", engine, "--jobs", "2"])
    assert whole.returncode == 0, whole.stderr
    assert len(results("many.csv")) == 4
    assert results("one.csv") == [one for one in results("many.csv") if one[1] == "0"]
    assert sorted(re.findall(r"^\[(\d)/4\] \S+, seed \d: val_acc ", whole.stderr, re.M)) == ["1", "2", "3", "4"]
    assert files() == ["many.csv", "one.csv"]

    # The rest is made by one process, and the other way around.
    code, out, err = lit(*COMPARE, "--output", "many.csv")
    assert (code, out) == (0, whole.stdout)
    assert err.count("already in many.csv") == 4
    (rest,) = race(["-m", "lit_lipschitz", *COMPARE, "--output", "one.csv", "--engine", engine, "--jobs", "2"])
    assert rest.stderr.count("already in one.csv") == 2
    assert results("one.csv") == results("many.csv")


@pytest.mark.parametrize("more", [["--jobs", "9"], ["--engine", "joblib", "--engine_options", '{"n_jobs": 9}']])
def test_more_processes_than_the_machine_can_hold_are_refused(lit, monkeypatch, more):
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    monkeypatch.setattr("joblib.Parallel.__call__", lambda *_: pytest.fail("would start them"))
    code, _, err = lit(*COMPARE, *more)
    assert code == 2
    assert "compare --jobs=9: expected at most 8 processes on this machine of 3 CPU cores" in error_line(err)
    assert not files()


@pytest.mark.parametrize(("cluster", "jobs", "at_a_time"), [("local", None, 3), ("local", 2, 2), ("slurm", None, 30)])
def test_a_machine_without_slurm_gets_no_more_jobs_at_a_time_than_cores(monkeypatch, cluster, jobs, at_a_time):
    running, most = [], []

    class Job:
        def __init__(self, trial):
            self.trial, self.result, self.done = trial, lambda: trial, lambda: True

    class Executor:
        def __init__(self, folder):
            self.cluster = cluster

        def update_parameters(self, **_):
            pass

        def submit(self, _, trial):
            running.append(trial)
            most.append(len(running))
            return Job(trial)

    def as_completed(handles, poll_frequency):
        running.remove(handles[0].trial)
        yield handles[0]

    package = SimpleNamespace(AutoExecutor=Executor, helpers=SimpleNamespace(as_completed=as_completed))
    monkeypatch.setitem(sys.modules, "submitit", package)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    engine = engines.find_engine("submitit", engines.Spread(jobs, 0, {}, Path(".")))
    assert len(list(engine(trials(30)))) == 30
    assert max(most) == at_a_time
    if cluster == "local":
        engine = engines.find_engine("submitit", engines.Spread(9, 0, {}, Path(".")))
        with pytest.raises(ConfigurationError, match="compare --jobs=9: expected at most 8 processes"):
            list(engine(trials(30)))


def test_a_policy_that_fails_in_another_process_says_why(lit):
    code, out, err = lit(*COMPARE, "--jobs", "2", "--lipschitz.head", "nowhere")
    assert code == 1
    assert err.count("failed: ") == 1
    assert re.search(r"^lipschitz: failed: .*nowhere", out, re.M)
    assert [one[0] for one in results("compare.csv")] == ["sgd:0.1", "sgd:0.1"]
    assert files() == ["compare.csv"]


class Killed(Fixed):
    """A module whose process is killed after two steps at a learning rate of 0.5."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 2 and RATES[-1] > 0.4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return super().configure_optimizers()[0]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["joblib", "submitit"])
def test_a_run_whose_process_is_killed_is_an_error_and_the_finished_rows_stay(lit, monkeypatch, engine):
    pytest.importorskip(engine)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(Path(__file__).parent), *sys.path])))
    own = ["compare", "--model", "test_engines.Killed", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "1"]
    assert lit(*own, "--policies", "config:0.1")[0] == 0
    before = results("compare.csv")
    (run,) = race(["-m", "lit_lipschitz", *own, "--policies", "config:0.1,config:0.5", "--engine", engine])
    assert run.returncode == 1
    if engine == "joblib":  # which ends all of its processes
        assert "the runs that ended are saved, and the same command continues" in error_line(run.stderr)
    else:
        assert "config:0.5, seed 0: failed: " in run.stderr
    assert results("compare.csv") == before
    assert files() == ["compare.csv"]


def test_a_package_that_is_missing_is_named(lit, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = lit(*COMPARE, "--engine", "ray")
    assert code == 2
    assert "the package ray can't be imported" in error_line(err)
    assert "pip install 'lit-lipschitz[ray]'" in err
    assert files() == []


def test_at_most_so_many_runs_go_on_at_a_time_and_a_lost_one_is_an_error():
    going, most = set(), 0

    def submit(trial):
        nonlocal most
        going.add(trial.number)
        most = max(most, len(going))
        return trial

    def result(trial):
        if trial.number == 3:
            raise RuntimeError("its process was killed\nsomewhere")
        trial.row = row("sgd:0.1", trial.number, 0.5, None)
        return trial

    def first(handles):
        done = handles[-1]  # in another order than they were submitted
        going.remove(done.number)
        return done

    made = list(engines._as_they_end(trials(7), 3, _hashable(submit), first, result))
    assert most == 3
    assert sorted(one.number for one in made) == [1, 2, 3, 4, 5, 6, 7]
    assert [one.number for one in made] != sorted(one.number for one in made)
    assert {one.number: one.error for one in made if one.error} == {3: ("RuntimeError: its process was killed", 1)}


def _hashable(submit):
    class Handle:
        def __init__(self, trial):
            self.trial = trial

        def __getattr__(self, name):
            return getattr(self.trial, name)

        def __setattr__(self, name, value):
            vars(self)[name] = value

    return lambda trial: Handle(submit(trial))


def test_each_run_of_this_machine_has_a_gpu_of_its_own(monkeypatch):
    going, shared = set(), []

    def run_trial(trial):
        device = trial.arguments[-1]
        shared.append(device in going)
        going.add(device)
        time.sleep(0.02)
        going.remove(device)
        return trial

    monkeypatch.setattr(engines, "run_trial", run_trial)
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda trial: engines._run_on_free_gpu(trial, Path("."), 3, 3), trials(12)))
    assert {tuple(one.arguments) for one in made} == {("--trainer.devices", f"[{i}]") for i in range(3)}
    assert not any(shared)
    assert files() == []


# -- several commands --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_commands_that_share_a_file_make_each_run_once():
    runs = race(*[["-m", "lit_lipschitz", *COMPARE]] * 3)
    assert [run.returncode for run in runs] == [0, 0, 0], [run.stderr for run in runs]
    made = [title for run in runs for title in re.findall(r"^(\[\d/4\] \S+, seed \d): val_acc ", run.stderr, re.M)]
    assert len(made) == len(set(made)) == 4
    assert len(results("compare.csv")) == 4
    assert len({run.stdout for run in runs}) == 1
    assert files() == ["compare.csv"]


def test_a_run_that_another_process_makes_is_left_to_it_unless_that_is_killed():
    (first, second) = trials(2)
    file = ResultsFile(Path("compare.csv"))
    hold = (
        "import sys, time\nfrom pathlib import Path\nfrom lit_lipschitz.cli.compare.results_file import ResultsFile\n"
        f"with ResultsFile(Path('compare.csv')).claim({first.key!r}, False):\n"
        "    print('held', flush=True)\n    time.sleep(600)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    order = []

    def engine(claimed):
        for trial in claimed:
            order.append(trial.number)
            holder.kill()  # so the other one goes on after this
            trial.row = row("sgd:0.1", trial.seed, 0.5, None)
            yield trial

    assert Runs([first, second], file).make(engine) == 0
    holder.wait()
    holder.stdout.close()
    assert order == [2, 1]
    assert [key[1] for key in file.rows()] == [2, 1]
    assert files() == ["compare.csv"]


ROWS = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parents[1])]
from test_compare_command import row
from lit_lipschitz.cli.compare.results_file import ResultsFile
Path(f"ready{sys.argv[2]}").touch()
while len(list(Path(".").glob("ready*"))) < 3:
    pass
for seed in range(60):
    ResultsFile(Path("link.csv" if sys.argv[2] == "2" else "runs.csv")).add(row(sys.argv[2], seed, 0.5, None))
    ResultsFile(Path("runs.csv")).add(row("shared", seed, float(sys.argv[2]), None))
"""


@pytest.mark.slow
def test_rows_of_several_processes_are_all_there_and_none_replaces_another():
    Path("link.csv").symlink_to("runs.csv")
    folder = Path(__file__).parent
    for run in race(*(["-c", ROWS, folder, number] for number in range(3))):
        assert run.returncode == 0, run.stderr
    rows = ResultsFile(Path("runs.csv")).rows()
    assert len(rows) == 240
    ours = ResultsFile(Path("runs.csv")).add(row("shared", 0, 0.123, None))
    assert ours == rows[("shared", 0, "c")]
    assert Path("link.csv").is_symlink()
    assert [name for name in files() if not name.startswith("ready")] == ["link.csv", "runs.csv"]
