"""The benchmark of the training speed: the ways take turns on the same work, and rows are kept by setting."""

import sys

import pytest
from helpers import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def throughput(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import throughput
    import workloads

    monkeypatch.setattr(workloads, "EXAMPLES", 256)
    monkeypatch.setattr(throughput, "RESULTS", tmp_path / "throughput.csv")
    yield throughput
    for name in ("throughput", "workloads"):
        sys.modules.pop(name, None)


def test_the_loop_and_the_command_take_turns(throughput, monkeypatch):
    steps = []
    plain_loop = throughput.plain_loop

    def noted(*arguments):
        for step in plain_loop(*arguments):
            steps.append("loop")
            yield step

    monkeypatch.setattr(throughput, "plain_loop", noted)
    rows = throughput.measure("mlp", 32, "32-true", False, ["fit", "no rate"], 4, 1)
    assert len(steps) == 2 * (4 + throughput.SKIP + 1)
    assert [row["way"] for row in rows] == ["loop", "fit", "no rate"]
    assert [row.get("turns") for row in rows] == [None, 4, 4]
    for row in rows:
        assert 0 < row["ms_low"] <= row["ms"] <= row["ms_high"]
        assert row["images_per_second"] == pytest.approx(32e3 / row["ms"])


def test_rows_take_the_place_of_those_of_the_same_setting_and_machine(throughput):
    def row(way, ms, device="a"):
        return {"network": "mlp", "batch_size": 32, "precision": "32-true", "compiled": False, "way": way, "ms": ms,
                "ms_low": ms, "ms_high": ms, "images_per_second": 1.0, "device": device}  # fmt: skip

    throughput.keep([row("loop", 1.0), row("fit", 2.0)])
    throughput.keep([row("fit", 3.0), row("fit", 4.0, "b")])
    kept = throughput.read_summary(throughput.RESULTS)
    assert [(one["way"], one["ms"], one["device"]) for one in kept] == [
        ("loop", 1, "a"),
        ("fit", 3, "a"),
        ("fit", 4, "b"),
    ]
    table = list(throughput.lines(throughput.read()))
    assert table[2].startswith("| mlp | 32 | 32-true | loop | 1 (1 .. 1) |")
    assert len(table) == 5
