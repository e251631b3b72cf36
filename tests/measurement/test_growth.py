"""The statistic grows linearly, by what it reads and writes; the benchmarks of growth and of communication run."""

import json
import sys

import pytest
import torch
from helpers import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import communication
    import growth

    threads = torch.get_num_threads()
    yield growth, communication
    torch.set_num_threads(threads)
    for name in ("growth", "communication"):
        sys.modules.pop(name, None)


def touched(growth, rows, width, name):
    function = growth.updates(torch.randn(rows, width))[name]
    with growth.Touched() as count:
        function()
    return count


@pytest.mark.parametrize("name", ["paper", "strict", "strict, sample", "smooth"])
def test_what_is_read_and_written_grows_with_the_activations_and_the_operations_do_not(scripts, name):
    growth, _ = scripts
    shapes = [(256, 512), (512, 512), (1024, 512), (256, 1024), (256, 2048)]
    counts = {shape: touched(growth, *shape, name) for shape in shapes}
    assert len({count.operations for count in counts.values()}) == 1
    # Products with the matrix twice in each of 3 iterations and once at the end; the norms read it once.
    passes = 7 if name == "smooth" else 1
    for (rows, width), count in counts.items():
        assert passes * rows * width <= count.elements <= passes * rows * width + 60 * (rows + width) + 200


def test_the_benchmark_of_growth_leaves_what_it_measured(scripts, tmp_path, capsys):
    growth, _ = scripts
    growth.main(
        ["--rounds", "2", "--scale", "64", "--slice", "1e4", "--device", "cpu", "--out", str(tmp_path / "g.json")]
    )
    found = json.loads((tmp_path / "g.json").read_text())
    assert found["machine"]["torch"] == torch.__version__
    assert {row["sweep"] for row in found["growth"]} == {"rows", "width", "classes"}
    assert {row["statistic"] for row in found["growth"]} == set(growth.STATISTICS)
    largest = found["heads"][-1]
    assert (largest["rows"], largest["width"], largest["classes"]) == (128, 64, 781)
    assert largest["measured_rows"] == 1
    assert largest["of_forward"].keys() == largest["statistic_ms"].keys() == growth.STATISTICS.keys()
    assert "128 x 64, 781*" in capsys.readouterr().out


@pytest.mark.parametrize(("power", "size"), [(1.0, 1e-6), (2.0, 1e-9)])
def test_the_slope_is_the_power(scripts, power, size):
    growth, _ = scripts
    of = {"sweep": "rows", "statistic": "strict", "dtype": "float32", "classes": 10, "peak_bytes": 0, "touched": 0}
    rows = [2**i for i in range(4, 14)]
    ms = [size * (n * 1024) ** power for n in rows]
    measured = [growth.Grown(rows=n, width=1024, ms=(t, t, t), **of) for n, t in zip(rows, ms, strict=True)]
    assert growth.slope(measured) == pytest.approx(power)


def test_the_kept_results_are_of_these_shapes(scripts):
    growth, _ = scripts
    kept = json.loads(growth.OUT.read_text())
    assert [(head["rows"], head["width"], head["classes"]) for head in kept["heads"]] == growth.HEADS
    assert all(0.6 < slope < 1.3 for name, slope in kept["slopes"].items())


def test_what_an_update_sends_is_what_the_projection_counts(scripts):
    _, communication = scripts
    for name, width in (("strict, SGD", 0), ("smooth, SGD", communication.WIDTH + 1)):
        calls, other = communication.listen(2, *communication.RUNS[name], 1)
        assert calls == other
        sent = [call for call in calls if call.name == "all_reduce"]
        assert {call.size for call in sent} == {communication.bytes_of_update(2, width)}
        assert [call.step for call in sent] == [0, 1, 3, 7, 15, 31, 40]
        assert len(calls) == 2 * len(sent)  # and a barrier each, which Lightning's reduce makes


def test_a_reading_of_adams_steps_sends_what_the_projection_counts(scripts):
    _, communication = scripts
    calls, _ = communication.listen(2, *communication.RUNS["strict, AdamW"], 2)
    assert [call.step for call in calls if call.size == communication.bytes_of_reading(2)] == [
        0,
        1,
        3,
        7,
        15,
        31,
        47,
        63,
        79,
    ]


def test_a_tree_grows_with_the_logarithm_of_the_ranks(scripts):
    _, communication = scripts
    times = [communication.seconds(ranks, 0, 1e-5, 1e10, ring=False) for ranks in (1, 2, 32, 1024)]
    assert times == pytest.approx([0, 4e-5, 20e-5, 40e-5])
    assert communication.seconds(1024, 0, 1e-5, 1e10, ring=True) == pytest.approx((20 + 2046) * 1e-5)
