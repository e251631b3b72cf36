"""The cost of the statistic is linear in the activations; the benchmarks of growth and of communication run."""

import sys

import pytest
import torch
from helpers import ROOT

BENCHMARKS = ROOT / "benchmarks"
EARLY = [0, 1, 2, 3, 4, 6, 8, 11, 14, 18, 23, 29, 37]
"""The measured steps of a first epoch of 40, counted from 0."""


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import communication
    import growth
    from rows import read_summary

    threads = torch.get_num_threads()
    yield growth, communication, read_summary
    torch.set_num_threads(threads)
    for name in ("growth", "communication", "rows", "figures"):
        sys.modules.pop(name, None)


def touched(growth, rows, width, name):
    function = growth.updates(torch.randn(rows, width))[name]
    with growth.Touched() as count:
        function()
    return count


@pytest.mark.parametrize("name", ["paper", "strict", "strict, sample", "smooth"])
def test_what_is_read_and_written_grows_with_the_activations_and_the_operations_do_not(scripts, name):
    growth, *_ = scripts
    shapes = [(256, 512), (512, 512), (1024, 512), (256, 1024), (256, 2048)]
    counts = {shape: touched(growth, *shape, name) for shape in shapes}
    assert len({count.operations for count in counts.values()}) == 1
    # Products with the matrix twice in each of 3 iterations and once at the end; the norms read it once.
    passes = 7 if name == "smooth" else 1
    for (rows, width), count in counts.items():
        assert passes * rows * width <= count.elements <= passes * rows * width + 60 * (rows + width) + 200


def test_the_benchmark_of_growth_writes_its_rows(scripts, tmp_path, capsys):
    growth, _, read_summary = scripts
    growth.main(
        ["--rounds", "2", "--scale", "64", "--slice", "1e4", "--device", "cpu", "--out", str(tmp_path / "g.csv")]
    )
    rows = read_summary(tmp_path / "g.csv")
    assert {row["torch"] for row in rows} == {torch.__version__}
    assert {row["sweep"] for row in rows} == {"rows", "width", "classes", "head"}
    assert all(row[f"{name} ms"] > 0 for row in rows for name in growth.STATISTICS)
    assert all(row[f"{name} KiB"] > 0 for row in rows if row["sweep"] != "head" for name in growth.STATISTICS)
    largest = rows[-1]
    assert (largest["rows"], largest["width"], largest["classes"]) == (128, 64, 781)
    assert largest["measured_rows"] == 1
    assert 0 < largest["forward ms"] < largest["both ms"]
    assert "128 x 64, 781*" in capsys.readouterr().out


@pytest.mark.parametrize(("power", "size"), [(1.0, 1e-6), (2.0, 1e-9)])
def test_the_slope_is_the_power(scripts, power, size):
    growth, *_ = scripts
    rows = [
        {"rows": count, "width": 1024, "strict ms": size * (count * 1024) ** power}
        for count in (2**i for i in range(4, 14))
    ]
    assert growth.slope(rows, "strict") == pytest.approx(power)


def test_the_kept_results_are_of_these_shapes(scripts):
    growth, _, read_summary = scripts
    kept = read_summary(growth.OUT)
    heads = [row for row in kept if row["sweep"] == "head"]
    assert [(head["rows"], head["width"], head["classes"]) for head in heads] == growth.HEADS
    for sweep, dtype in (("rows", "float32"), ("rows", "bfloat16"), ("width", "float32")):
        rows = [row for row in kept if (row["sweep"], row["dtype"]) == (sweep, dtype)]
        assert [(row["rows"], row["width"], row["classes"]) for row in rows] == growth.SWEEPS[sweep]
        assert all(0.6 < growth.slope(rows, name) < 1.3 for name in growth.STATISTICS)


@pytest.mark.parametrize("name", ["strict, SGD", "strict, AdamW", "smooth, SGD"])
def test_what_is_sent_is_what_the_projection_counts(scripts, name):
    _, communication, _ = scripts
    calls, other = communication.listen(2, *communication.RUNS[name], 2)
    assert calls == other
    sent = [call for call in calls if call.name == "all_reduce"]
    is_smooth = name.startswith("smooth")
    update = communication.bytes_of_update(2, communication.WIDTH + 1 if is_smooth else 0)
    norms = communication.BYTES_OF_STEP if is_smooth else communication.bytes_of_norms(2)
    # An update that is due at the same step is part of the same reduction.
    assert [call.step for call in sent if call.size == update + norms] == EARLY
    assert [call.step for call in sent if call.size == update] == [40, 80]
    assert [call.step for call in sent if call.size == norms] == [40, 51, 64]
    # Smooth constants are not measured, so that the ranks need not agree on a loss before the first step.
    agreed = [call.step for call in sent if call.size == communication.BYTES_OF_AGREEMENT and not is_smooth]
    assert agreed == ([] if is_smooth else [0])
    assert len(sent) == len(EARLY) + 2 + 3 + len(agreed)
    assert len(calls) == 2 * len(sent)  # and a barrier each, which Lightning's reduce makes


def test_a_tree_grows_with_the_logarithm_of_the_ranks(scripts):
    _, communication, _ = scripts
    times = [communication.seconds(ranks, 0, 1e-5, 1e10, ring=False) for ranks in (1, 2, 32, 1024)]
    assert times == pytest.approx([0, 4e-5, 20e-5, 40e-5])
    assert communication.seconds(1024, 0, 1e-5, 1e10, ring=True) == pytest.approx((20 + 2046) * 1e-5)
