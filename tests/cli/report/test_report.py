"""`lit-lipschitz report`: what it finds, shows and writes, and what it says where there is nothing to show."""

import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from helpers import SCRIPT, race
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lit_lipschitz.cli.main import main
from lit_lipschitz.cli.report.event_files import masked_crc
from lit_lipschitz.cli.report.panels import epoch_axis, panels, value_axis
from lit_lipschitz.cli.report.runs import find_runs

FILES = ["report.html", "accuracy.png", "loss.png", "rate.png", "constant.png"]


@pytest.fixture
def report(monkeypatch, capsys):
    """Runs the command in this process; returns its exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lit-lipschitz", "report", *map(str, arguments)])
        code = main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def log(writer, step, **values):
    event = Event(step=step, wall_time=1.7e9 + step)
    for name, value in values.items():
        event.summary.value.add(tag=name.replace("__", "/"), simple_value=value)
    writer.add_event(event)


def constant(epoch):
    return 10 * 1.01**epoch


def write_run(folder, epochs=4, *, lipschitz=True, first=0):
    """A run as Lightning logs it, ten steps an epoch, by TensorBoard's own writer."""
    writer = EventFileWriter(str(folder), filename_suffix=f".{first}")
    for epoch in range(first, epochs):
        for step in (10 * epoch + 4, 10 * epoch + 9):
            if lipschitz:
                rate = (1 - epoch / epochs) / constant(epoch)
                log(writer, step, lipschitz__lr=rate if step % 10 == 9 else 99.0)
                log(writer, step, lipschitz__constant=constant(epoch))
                log(writer, step, lipschitz__activation_norm=4 * constant(epoch), lipschitz__weight_norm=3.0)
            log(writer, step, epoch=epoch)
        log(writer, 10 * epoch + 9, val_loss=2 / (epoch + 1), val_acc=1 - 0.8 / (epoch + 1), epoch=epoch)
        log(writer, 10 * epoch + 9, train_loss=3 / (epoch + 1), train_acc=1 - 0.9 / (epoch + 1), epoch=epoch)
    log(writer, 10 * epochs, test_loss=0.5, test_acc=0.75, epoch=epochs)
    writer.close()
    return Path(folder)


def event_file(folder):
    (file,) = folder.glob("events.*")
    return file


def error_line(err):
    (line,) = err.splitlines()
    assert line.startswith("lit-lipschitz: error: report ")
    return line


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects what a browser would load."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.polylines, self.text = [], [], 0, []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br", "path", "circle", "polyline"):
            self.open.append(tag)
        self.polylines += tag == "polyline"
        self.loads += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")]
        if tag in ("script", "link", "iframe"):
            self.loads.append(tag)

    def handle_endtag(self, tag):
        if self.open[-1:] == [tag]:
            self.open.pop()
        else:
            assert tag in ("path", "circle", "polyline")

    def handle_data(self, data):
        self.text.append(data)


# -- what it shows -----------------------------------------------------------------------------------------------------


def test_runs_are_overlaid_in_a_page_pictures_and_text(report):
    pytest.importorskip("matplotlib")
    for name, epochs in (("version_0", 4), ("version_2", 6), ("version_10", 5)):
        write_run(Path("lightning_logs") / name, epochs)
    code, out, err = report("lightning_logs", "--output", "figures")
    assert (code, err) == (0, "")
    assert out.splitlines()[-5:] == [f"figures/{name}" for name in FILES]
    assert sorted(path.name for path in Path("figures").iterdir()) == sorted(FILES)
    assert all(Path("figures", name).read_bytes().startswith(b"\x89PNG\r\n") for name in FILES[1:])

    # Numbers count, so 10 comes after 2.
    (table,) = re.findall(r"^run +epochs.*\n((?:version.*\n)+)", out, re.M)
    assert [row.split()[:2] for row in table.splitlines()] == [["version_0", "4"], ["version_2", "6"],
                                                               ["version_10", "5"]]  # fmt: skip
    assert table.split("\n")[0].split()[2:] == [
        "0.7500", "0.7750", "0.5000", "0.8000", "0.5000", "0.7500", "0.02426", "10.3", "41.21", "3",
        "0.8000", "(epoch", "4)",
    ]  # fmt: skip
    assert "\x1b" not in out
    assert "lr: learning rate that the optimizer used: 0.0159 to 0.1" in out
    assert re.search(r"^  version_2 val +▂.*█  20 -> 86.7$", out, re.M)

    text = Path("figures/report.html").read_text()
    page = Page(text)
    assert page.loads == []
    assert not re.search(r"https?:|url\(|@import", text)
    assert page.polylines == 3 * (2 + 2 + 4)
    assert "prefers-color-scheme: dark" in text
    for label in ("version_10", "Accuracy (%)", "Loss", "lr: learning rate", "L, the Lipschitz constant", "validation"):
        assert any(label in part for part in page.text)


def test_a_report_that_is_replaced_is_named(report):
    pytest.importorskip("matplotlib")
    folder = write_run("lightning_logs/version_3")
    code, out, _ = report(folder, "--no-png")
    assert (code, out.splitlines()[-1]) == (0, "report/report.html")
    code, out, _ = report(folder)
    new = ["report/report.html (replaces an earlier file)", *(f"report/{name}" for name in FILES[1:])]
    assert (code, out.splitlines()[-5:]) == (0, new)
    code, out, _ = report(folder, "--json")
    answer = json.loads(out)
    assert answer["files"] == answer["replaced"] == [f"report/{name}" for name in FILES]


def test_json_has_the_curves_and_the_final_figures(report):
    folder = write_run("lightning_logs/version_3")
    code, out, _ = report(folder, "--json", "--no-png")
    assert code == 0
    answer = json.loads(out)
    assert (answer["files"], answer["replaced"]) == (["report/report.html"], [])
    (run,) = answer["runs"]
    assert (run["name"], run["folder"], run["epochs"]) == ("version_3", "lightning_logs/version_3", 4)
    assert run["series"]["lipschitz/constant"] == {
        "epoch": [1, 2, 3, 4], "value": pytest.approx([constant(epoch) for epoch in range(4)], rel=1e-6),
    }  # fmt: skip
    # The last value of an epoch is the epoch's.
    assert run["series"]["lipschitz/lr"]["value"] == pytest.approx(
        [(1 - epoch / 4) / constant(epoch) for epoch in range(4)], rel=1e-6
    )
    assert run["final"]["val_acc"] == pytest.approx(0.8)
    assert run["final"]["test_acc"] == 0.75


def test_what_is_not_finite_is_no_number_in_json_and_no_point_in_a_figure(report):
    writer = EventFileWriter("run")
    for epoch, value in enumerate((1.0, math.nan, math.inf, 2.0)):
        log(writer, epoch, epoch=epoch, train_loss=value)
    writer.close()
    code, out, _ = report("run", "--json", "--no-png")
    assert code == 0
    run = json.loads(out, parse_constant=pytest.fail)["runs"][0]
    assert run["series"]["train_loss"]["value"] == [1.0, None, None, 2.0]
    assert "nan" not in Path("report/report.html").read_text().lower()


def test_300_epochs_are_answered_without_torch_lightning_or_matplotlib():
    write_run("lightning_logs/version_0", 300)
    code = (
        "import sys\nsys.argv[1:] = ['report', 'lightning_logs/version_0', '--no-png']\n"
        "from lit_lipschitz.cli.main import main\nassert main() == 0\n"
        "assert not {'torch', 'lightning', 'matplotlib', 'numpy'} & set(sys.modules), 'imported'\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "L, the Lipschitz constant: 10 to 196, logarithmic" in result.stdout
    assert re.search(r"^version_0 +300 ", result.stdout, re.M)
    text = Path("report/report.html").read_text()
    assert len(re.search(r'<polyline points="([^"]+)"', text)[1].split()) == 300


def test_without_matplotlib_there_is_the_page_and_the_extra_is_named(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    write_run("run")
    code, out, err = report("run")
    assert code == 0
    assert out.splitlines()[-1] == "report/report.html"
    assert "pip install 'lit-lipschitz[plots]'" in err
    assert [path.name for path in Path("report").iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_colours_are_for_terminals_that_want_them(report, monkeypatch, environment, coloured):
    write_run("run")
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert ("\x1b[38;5;" in report("run", "--no-png")[1]) == coloured


def test_a_terminal_without_unicode_has_its_curves_too():
    write_run("run")
    result = subprocess.run(
        [sys.executable, "-m", "lit_lipschitz.cli.main", "report", "run", "--no-png"],
        capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        timeout=60,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert re.search(rb"^  run train +_\+\*#", result.stdout, re.M)


def test_a_baseline_without_the_callback_has_accuracies_and_its_monitored_rate(report):
    write_run("logs/lipschitz")
    write_run("logs/baseline", lipschitz=False)
    writer = EventFileWriter("logs/baseline", filename_suffix=".lr")
    log(writer, 9, **{"lr-SGD": 0.1})
    writer.close()
    drawn = {panel.key: panel for panel in panels(find_runs(["logs"]))}
    assert [(line.run, line.tag) for line in drawn["lr"].lines] == [(0, "lr-SGD"), (1, "lipschitz/lr")]
    assert [line.run for line in drawn["constant"].lines] == [1]
    assert report("logs", "--no-png")[0] == 0


def test_each_epochs_number_is_below_the_pointer(report):
    write_run("run")
    assert report("run", "--no-png")[0] == 0
    page = Path("report/report.html").read_text()
    (run,) = find_runs(["run"])
    for epoch, value in run.curves["val_loss"].items():
        assert f"<title>run, val_loss, epoch {epoch}: {value:.4g}</title>" in page


def test_accuracies_are_never_on_a_logarithmic_axis():
    for folder, tag in (("one", "val_acc"), ("two", "val_loss")):
        Path(folder).mkdir()
        Path(folder, "metrics.csv").write_text(f"epoch,step,{tag}\n0,5,0.001\n1,10,0.9\n")
    drawn = {panel.key: panel for panel in panels(find_runs(["one", "two"]))}
    assert (drawn["accuracy"].y.log, drawn["loss"].y.log) == (False, True)


def config(folder, optimizer, lr, **others):
    """A run's folder with its saved configuration."""
    write_run(folder)
    init_args = {"optimizer": {"class_path": optimizer, "init_args": {"lr": lr}}}
    model = {"class_path": "lit_lipschitz.ImageClassifier", "init_args": init_args}
    Path(folder, "config.yaml").write_text(yaml.safe_dump({"model": model, "trainer": {"logger": folder}, **others}))


def test_runs_are_named_by_the_settings_that_differ():
    config("logs/version_0", "torch.optim.SGD", 0.1)
    config("logs/version_1", "torch.optim.AdamW", 0.1)
    config("logs/version_2", "torch.optim.AdamW", 0.2)
    names = [run.name for run in find_runs(["logs"])]
    assert names == ["optimizer=SGD lr=0.1", "optimizer=AdamW lr=0.1", "optimizer=AdamW lr=0.2"]
    # Where they do not tell all runs apart, or one has none, the folders do.
    config("logs/version_3", "torch.optim.AdamW", 0.2)
    assert [run.name for run in find_runs(["logs"])] == [f"version_{i}" for i in range(4)]
    Path("logs/version_3/config.yaml").write_text("model: [")
    assert [run.name for run in find_runs(["logs"])] == [f"version_{i}" for i in range(4)]


def test_arguments_of_a_class_that_differs_are_left_out_where_they_follow_from_it():
    config("logs/version_0", "torch.optim.SGD", 0.1)
    config("logs/version_1", "torch.optim.AdamW", 0.001)
    assert [run.name for run in find_runs(["logs"])] == ["optimizer=SGD", "optimizer=AdamW"]
    config("logs/version_2", "torch.optim.AdamW", 0.002)
    assert [run.name for run in find_runs(["logs"])] == [
        "optimizer=SGD lr=0.1", "optimizer=AdamW lr=0.001", "optimizer=AdamW lr=0.002"
    ]  # fmt: skip


def test_settings_whose_keys_end_alike_have_all_of_their_keys():
    for i in range(2):
        config(f"logs/version_{i}", "torch.optim.SGD", i, data={"init_args": {"lr": 5 + i}})
    assert [run.name for run in find_runs(["logs"])] == [f"data.lr={5 + i} model.optimizer.lr={i}" for i in range(2)]


# -- what it reads -----------------------------------------------------------------------------------------------------


def test_the_checksum_is_that_of_tensorboard():
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    for length in (0, 24, 2**40 + 7):
        header = struct.pack("<Q", length)
        assert masked_crc(header) == masked_crc32c(header)


@pytest.mark.parametrize("cut", [1, 5, 13, 40, 200])
def test_a_run_in_progress_shows_what_is_whole(report, cut):
    folder = write_run("run")
    whole = json.loads(report(folder, "--json", "--no-png")[1])["runs"][0]
    file = event_file(folder)
    file.write_bytes(file.read_bytes()[:-cut])
    code, out, err = report(folder, "--json", "--no-png")
    assert (code, err) == (0, "")
    run = json.loads(out)["runs"][0]
    for tag, series in run["series"].items():
        assert series["value"] == whole["series"][tag]["value"][: len(series["value"])]
    assert len(run["series"]["val_acc"]["value"]) >= 3


def test_damage_is_noted_and_what_comes_before_it_is_shown(report):
    folder = write_run("run", 20)
    file = event_file(folder)
    content = bytearray(file.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)  # as after a power failure
    file.write_bytes(content)
    code, out, err = report(folder, "--json", "--no-png")
    assert code == 0
    assert 5 < json.loads(out)["runs"][0]["epochs"] < 15
    assert re.search(r"warning: run: events\S+ is damaged: what comes after \d+ of its \d+ bytes is left out", err)


def test_a_resumed_run_in_the_same_folder_is_one_run():
    write_run("run", 3)
    time.sleep(1.1)  # the name of the second file has a later time
    write_run("run", 6, first=2)
    (run,) = find_runs(["run"])
    assert list(run.curves["val_acc"]) == [1, 2, 3, 4, 5, 6]
    assert run.epochs == 6


def test_metrics_csv_is_read_up_to_its_last_whole_line(report):
    Path("version_1").mkdir()
    rows = ["epoch,lipschitz/lr,step,val_acc", "0,0.5,4,", "0,,9,0.25", "1,0.25,14,", "1,,19,0.5", "2,0.12"]
    Path("version_1/metrics.csv").write_text("\n".join(rows))
    code, out, _ = report("version_1", "--json", "--no-png")
    assert code == 0
    series = json.loads(out)["runs"][0]["series"]
    assert series == {
        "lipschitz/lr": {"epoch": [1, 2], "value": [0.5, 0.25]},
        "val_acc": {"epoch": [1, 2], "value": [0.25, 0.5]},
    }


def test_curves_of_other_modules_go_by_their_own_names_and_without_epochs():
    writer = EventFileWriter("run")
    for i, step in enumerate((99, 199)):
        log(writer, step, **{"valid/accuracy": 0.5 + i / 10, "train_loss_epoch": 1.0 - i / 10, "audit/margin": 7.0})
    log(writer, 150, lipschitz__lr=0.1)
    writer.close()
    (run,) = find_runs(["run"])
    assert set(run.curves) == {"val_acc", "train_loss", "audit/margin", "lipschitz/lr"}
    assert list(run.curves["val_acc"]) == [1, 2]
    assert run.curves["lipschitz/lr"] == {2: pytest.approx(0.1)}


def test_names_tell_runs_apart_and_no_run_is_there_twice():
    for name in ("a/lightning_logs/version_0", "b/lightning_logs/version_0"):
        write_run(name)
    assert [run.name for run in find_runs(["."])] == ["a/version_0", "b/version_0"]
    assert [run.name for run in find_runs(["a", "a/lightning_logs/version_0", "b"])] == ["a/version_0", "b/version_0"]
    assert [run.name for run in find_runs(["a"])] == ["version_0"]


# -- axes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "log", "ticks"),
    [
        ([0.2, 0.9], False, [0.2, 0.4, 0.6, 0.8]),
        ([0.01, 0.09], False, [0.02, 0.04, 0.06, 0.08]),
        ([0.01, 0.2], True, [0.01, 0.02, 0.05, 0.1, 0.2]),
        ([1e-5, 2.0], True, [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]),
        ([-1.0, 100.0], False, [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]),
        ([0.0, 100.0], False, [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]),
        ([3.0], False, [2.7, 2.8, 2.9, 3.0, 3.1, 3.2, 3.3]),
        ([0.0], False, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    ],
)
def test_an_axis_is_logarithmic_where_it_spans_more_than_a_decade(values, log, ticks):
    axis = value_axis(values)
    assert axis.log == log
    assert axis.ticks == pytest.approx(ticks)
    assert all(-1e-9 <= axis.share(value) <= 1 + 1e-9 for value in [*values, *axis.ticks])


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([1234.51, 1234.54], ["1234.51", "1234.52", "1234.53", "1234.54"]),
        ([0.2, 0.9], ["0.2", "0.4", "0.6", "0.8"]),
        ([1e-6, 5e-6], ["1e-6", "2e-6", "3e-6", "4e-6", "5e-6"]),
        ([0.003, 0.5], ["0.003", "0.01", "0.03", "0.1", "0.3"]),
        ([45.0, 45.000001], ["42", "44", "46", "48"]),
    ],
)
def test_labels_of_ticks_differ(values, labels):
    axis = value_axis(values)
    assert [axis.label(tick) for tick in axis.ticks] == labels


def test_a_run_of_one_epoch_is_drawn_as_points(report):
    write_run("run", 1)
    assert report("run", "--no-png")[0] == 0
    text = Path("report/report.html").read_text()
    figures = text[text.index("<figure>") :]
    assert figures.count("<circle") == figures.count("<polyline") == 8


@pytest.mark.parametrize(
    ("last", "ticks"),
    [(1, [1]), (2, [1, 2]), (6, [1, 2, 3, 4, 5, 6]), (30, [1, 5, 10, 15, 20, 25, 30]),
     (300, [1, 50, 100, 150, 200, 250, 300])],
)  # fmt: skip
def test_epochs_count_from_1(last, ticks):
    assert epoch_axis(last).ticks == ticks


# -- what is missing ---------------------------------------------------------------------------------------------------


def nothing():
    pass


def empty():
    Path("there").mkdir()


def other():
    for name in ("there/checkpoints", "there/src"):
        Path(name).mkdir(parents=True)
    Path("there/config.yaml").write_text("a: 1")


def a_file():
    Path("there").write_text("no folder")


def no_curves():
    writer = EventFileWriter("there/version_0")
    writer.close()


def damaged():
    Path("there").mkdir()
    Path("there/events.out.tfevents.1.host").write_bytes(b"no event file at all")


@pytest.mark.parametrize(
    ("prepare", "messages"),
    [
        (nothing, ["looked for events.out.tfevents.*", "metrics.csv", "found no such folder", "pass a run's folder"]),
        (empty, ["there and below", "found an empty folder", "lightning_logs/version_0"]),
        (other, ["found 3 other entries (checkpoints/, config.yaml, src/)", "pass a run's folder"]),
        (a_file, ["found a file, not a folder"]),
        (no_curves, ["event files without any in there/version_0", "nothing has been logged there yet", "wait for"]),
        (damaged, ["is damaged: what comes after 0 of its 20 bytes is left out", "pass another run"]),
    ],
)
def test_a_folder_that_is_no_run_is_told_in_one_line_and_nothing_is_written(report, prepare, messages):
    prepare()
    before = sorted(Path(".").rglob("*"))
    code, out, err = report("there")
    assert (code, out) == (2, "")
    line = error_line(err)
    for message in messages:
        assert message in line
    assert sorted(Path(".").rglob("*")) == before


def test_a_run_without_curves_beside_others_is_left_out_with_a_warning(report):
    write_run("logs/version_0")
    EventFileWriter("logs/version_1").close()
    code, out, err = report("logs", "--no-png")
    assert code == 0
    assert err == "lit-lipschitz: warning: logs/version_1: no curves yet: left out\n"
    assert "version_1" not in out


def test_a_file_that_cannot_be_read_is_one_line_with_code_1(report):
    write_run("run")
    Path("run/events.out.tfevents.9.host").symlink_to("gone")
    code, out, err = report("run")
    assert (code, out) == (1, "")
    assert err == (
        "lit-lipschitz: error: report: run/events.out.tfevents.9.host: can't be read: No such file or directory\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: RUN"),
        (["run", "--outpt", "x"], "unrecognized arguments: --outpt x"),
        (["run", "--output"], "argument --output: expected one argument"),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["lit-lipschitz", "report", *arguments])
    assert main() == 2
    err = capsys.readouterr().err
    assert message in err
    assert "report --help" in err
    assert len(err.splitlines()) == 1


def test_an_output_that_cannot_be_written_is_one_line_with_code_1_and_leaves_no_part(report):
    write_run("run")
    Path("taken").write_text("a file")
    code, out, err = report("run", "--output", "taken", "--no-png")
    assert (code, out) == (1, "")
    assert "report --output taken: can't be written: File exists; pass another folder" in error_line(err)
    Path("half/report.html").mkdir(parents=True)
    code, _, err = report("run", "--output", "half", "--no-png")
    assert code == 1
    assert "can't be written" in error_line(err)
    assert [path.name for path in Path("half").iterdir()] == ["report.html"]


def test_help_says_what_it_is_and_has_an_example(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lit-lipschitz", "report", "--help"])
    assert main() == 0
    out = capsys.readouterr().out
    for part in ("usage: lit-lipschitz report", "--output FOLDER", "--json", "lightning_logs/version_3"):
        assert part in out


# -- odd and hostile files ---------------------------------------------------------------------------------------------

NAMES = ["a<script>alert(1)</script>", "</title><h1>", '" onload="x', "$\\frac{", "_hidden", "\x1b[31mred", "%s{0}",
         "&amp;", "\u202eabc", "\u4e2d\U0001f600", os.fsdecode(b"no\xffutf8"), "²3", "-->", "]]>",
         "a" * 200]  # fmt: skip


class Elements(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self):
        super().__init__()
        self.found, self.text, self.open = set(), [], []

    def handle_starttag(self, tag, attrs):
        self.found |= {(tag, name) for name, _ in [*attrs, ("", "")]}
        if tag not in ("meta", "br", "path", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found |= {(tag, name) for name, _ in [*attrs, ("", "")]}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def elements(page):
    parser = Elements()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_names_and_tags_of_any_kind_stay_text(report):
    for name in ("plain", "plain too"):
        write_run(Path("plain", name))
    assert report("plain", "--no-png", "--output", "first")[0] == 0
    plain = elements(Path("first/report.html").read_text())
    for name in NAMES:
        if "/" not in name:
            write_run(Path("runs/new"))
            Path("runs/new").rename(Path("runs", name))
    write_run(Path("runs/plain"))
    writer = EventFileWriter("runs/plain", filename_suffix=".tags")
    for tag in NAMES:
        log(writer, 1, **{f"lr-{tag.encode(errors='replace').decode()}": 0.1, "val_loss": 0.5})
    writer.close()
    code, out, err = report("runs", "--output", "second")
    assert code == 0
    assert "\x1b" not in out + err
    hostile = elements(Path("second/report.html").read_text(encoding="utf-8"))
    assert hostile.found <= plain.found
    text = "".join(hostile.text)
    for name in (
        "$\\frac{",
        "_hidden",
        r"\x1b[31mred",
        "%s{0}",
        "&amp;",
        r"\u202eabc",
        "\u4e2d",
        r"no\udcffutf8",
        "²3",
        "]]>",
    ):
        assert name in text
    assert all(Path("second", name).is_file() for name in FILES)


@pytest.mark.parametrize(
    "rows",
    [
        "nan,1,0.5", "1,inf,0.5", "0,0,1e308\n1,1,-1.7e308", "0,0,1e307\n1,1,1.5e308", "0,0,1.0\n1,1,5e-324",
        "-5,0,0.1\n-4,1,0.2", "1e300,1,0.5", "0,1e300,0.5", "0,0,0.5\n1,1,1e-310\n2,2,1e150", "0,0,0\n1,1,5e-324",
        "0,0,\x00", '0,0,"', "0,0,0.5,9,9,9", "\u0661,1,0.5", "0,0,nan\n1,1,inf", "1e15,0,0.5",
    ],
)  # fmt: skip
def test_odd_numbers_in_a_csv_file_are_drawn_or_noted(report, rows):
    Path("run").mkdir()
    Path("run/metrics.csv").write_text(f"epoch,step,val_loss\n{rows}\n")
    code, _, err = report("run")
    assert code in (0, 2)
    assert (code == 0) == Path("report/report.html").is_file()
    if any(word in rows for word in ("nan,1", "inf,0", "-5", "1e300,")):
        assert "whose epoch or step is not finite or is negative: left out" in err


def test_a_long_cell_is_read_over(report):
    Path("run").mkdir()
    Path("run/metrics.csv").write_text(f"epoch,step,val_loss,text\n0,0,0.5,{'x' * 140_000}\n1,1,0.25,\n")
    code, out, _ = report("run", "--no-png", "--json")
    assert code == 0
    assert json.loads(out)["runs"][0]["series"]["val_loss"] == {"epoch": [1, 2], "value": [0.5, 0.25]}


def test_a_fifo_is_left_out_and_not_waited_for(report):
    write_run(Path("run"))
    os.mkfifo("run/events.out.tfevents.9.fifo")
    os.mkfifo("run/metrics.csv")
    code, _, err = report("run", "--no-png")
    assert code == 0
    assert "events.out.tfevents.9.fifo is no regular file: left out" in err


@pytest.mark.parametrize("epoch", [math.nan, math.inf, -1.0, 1e30])
def test_an_epoch_that_is_none_in_an_event_file_is_noted(report, epoch):
    writer = EventFileWriter("run")
    log(writer, 0, epoch=0.0, val_loss=1.0)
    log(writer, 5, epoch=epoch, val_loss=0.5)
    writer.close()
    code, _, err = report("run", "--no-png")
    assert code == 0
    assert "1 points whose epoch or step is not finite or is negative: left out" in err


EVENTS = st.lists(
    st.tuples(
        st.integers(-(2**63), 2**63 - 1) | st.integers(0, 9),
        st.sampled_from(["epoch", "val_loss", "train_loss", "lipschitz/lr", "lipschitz/1/lr", "lr-AdamW"]) | st.text(),
        st.floats(width=32),
    ),
    max_size=20,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=EVENTS, start=st.integers(0, 400), length=st.integers(0, 40), damage=st.none() | st.binary(max_size=40))
def test_any_event_file_is_drawn_or_told_in_one_line(report, events, start, length, damage):
    shutil.rmtree("run", ignore_errors=True)
    writer = EventFileWriter("run")
    for step, tag, value in events:
        log(writer, step, **{tag.encode(errors="replace").decode(): value})
    writer.close()
    (file,) = Path("run").iterdir()
    content = file.read_bytes()
    if damage is not None:
        file.write_bytes(content[:start] + damage + content[start + length :])
    code, out, err = report("run", "--no-png", "--json")
    assert code in (0, 2)
    if code:
        error_line(err)
    else:
        json.loads(out, parse_constant=pytest.fail)
        elements(Path("report/report.html").read_text(encoding="utf-8"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.lists(st.floats().map(str) | st.text(), max_size=5), max_size=8))
def test_any_csv_file_is_drawn_or_told_in_one_line(report, rows):
    Path("run").mkdir(exist_ok=True)
    text = "epoch,step,val_loss,train_acc\n" + "".join(f"{','.join(row)}\n" for row in rows)
    Path("run/metrics.csv").write_bytes(text.encode(errors="surrogatepass"))
    code, _, err = report("run", "--no-png")
    assert code in (0, 2)
    if code:
        error_line(err)


@pytest.mark.parametrize("arguments", [["--version"], ["configs"], ["report", "run", "--no-png"], ["nonsense"]])
def test_closed_streams_change_no_exit_code(arguments):
    write_run(Path("run"))
    code = 2 if arguments == ["nonsense"] else 0
    for closing in (">&-", "2>&-", "<&- >&- 2>&-"):
        done = subprocess.run(
            ["bash", "-c", f'"$0" "$@" {closing}', SCRIPT, *arguments], capture_output=True, text=True
        )
        assert done.returncode == code
        assert "Traceback" not in done.stderr


# -- two reports at once -----------------------------------------------------------------------------------------------


REPORTS = """
import sys
from pathlib import Path
from lit_lipschitz.cli.report.command import report
Path(f"ready{sys.argv[1]}").touch()
while len(list(Path(".").glob("ready*"))) < 2:
    pass
for _ in range(4):
    report([sys.argv[1], "--output", "both"])
"""


def test_of_two_reports_into_one_folder_page_and_pictures_are_of_the_same_runs(lit):
    for name, scale in (("first", 1.0), ("second", 7.0)):
        Path(name).mkdir()
        lines = [f"{epoch},{epoch},{scale / (epoch + 1)},{0.1 * epoch}" for epoch in range(8)]
        Path(name, "metrics.csv").write_text("\n".join(["epoch,step,val_loss,val_acc", *lines, ""]))
        assert lit("report", name, "--output", f"{name}_alone")[0] == 0
    for run in race(*(["-c", REPORTS, name] for name in ("first", "second"))):
        assert run.returncode == 0, run.stderr
    found, *alone = ({path.name: path.read_bytes() for path in Path(folder).iterdir()}
                     for folder in ("both", "first_alone", "second_alone"))  # fmt: skip
    assert set(found) == {"report.html", "accuracy.png", "loss.png"}
    assert found in alone
