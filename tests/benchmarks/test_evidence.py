"""The comparison of policies: runs are not repeated, the summary chooses by validation, the pages have its tables."""

import csv
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import compare
    import summary
    import write_tables

    yield compare, summary, write_tables
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


def row(policy, seed, val, test, task="digits_mlp", diverged=False):
    return {"task": task, "policy": policy, "seed": seed, "val": val, "test": test, "rate": 0.1, "diverged": diverged,
            "seconds": 1.0, "torch": "2.14", "lightning": "2.6", "device": "CPU"}  # fmt: skip


@pytest.mark.parametrize("name", ["README.md", "docs/guide/evidence.md", "docs/guide/performance.md"])
def test_a_page_has_the_tables_of_the_summaries(benchmarks, name):
    *_, write_tables = benchmarks
    page = (write_tables.ROOT / name).read_text()
    assert write_tables.filled(name, page) == page


def test_the_summaries_are_small():
    """No single runs: a row for a task and policy, and at most 30 rows for a task; at most 40 in the other files."""
    files = list((BENCHMARKS / "results").glob("*.csv"))
    assert len(files) == 7
    for file in files:
        rows = list(csv.DictReader(file.read_text().splitlines()))
        if "policy" not in rows[0]:
            assert len(rows) <= 40, file
            continue
        cells = Counter((row["task"], row["policy"]) for row in rows)
        assert set(cells.values()) == {1}, file
        assert max(Counter(task for task, _ in cells).values()) <= 30, file


def test_a_tuned_rate_is_the_best_by_validation_among_those_that_do_not_diverge(benchmarks):
    _, summary, _ = benchmarks
    runs = [row("lipschitz", seed, 90.0, 91.0 + seed) for seed in range(2)]
    runs += [row("sgd:0.1", seed, 92.0, 89.0 + seed) for seed in range(2)]
    runs += [row("sgd:0.3", seed, 91.0, 99.0) for seed in range(2)]
    runs += [row("sgd:1", seed, 95.0, 95.0, diverged=seed == 1) for seed in range(2)]
    runs += [row("sgd:0.01", 0, 99.0, 99.0)]  # on fewer seeds than the others
    rows = summary.summarise(runs)
    assert summary.best(rows, "digits_mlp", "sgd")["policy"] == "sgd:0.1"
    assert summary.best(rows, "digits_mlp", "adamw") is None
    (default,) = [one for one in rows if one["policy"] == "lipschitz"]
    assert (default["tuned"], default["difference"], default["difference_error"], default["pairs"]) == (
        "sgd:0.1", 2, 0, 2,
    )  # fmt: skip
    line = "| digits_mlp | lipschitz | 91.5 ± 0.5 | sgd:0.1 | 89.5 ± 0.5 | 2 ± 0 (points) | 2 |"
    assert summary.defaults(rows).splitlines()[2:] == [line]


def test_a_difference_is_over_the_seeds_that_both_have(benchmarks):
    _, summary, _ = benchmarks
    runs = [row("lipschitz", seed, 90.0, test) for seed, test in ((0, 90.0), (1, 92.0), (2, 70.0))]
    runs += [row("sgd:0.1", seed, 92.0, test) for seed, test in ((0, 89.0), (1, 89.0), (3, 10.0))]
    (default, tuned) = summary.summarise(runs)
    assert (default["test"], default["seeds"], default["pairs"]) == (84, 3, 2)
    assert (default["difference"], default["difference_error"]) == (2, 1)
    assert default["test_error"] == pytest.approx(7.0237692)  # sqrt((6^2 + 8^2 + 14^2) / 2 / 3)
    assert [tuned[name] for name in ("tuned", "difference", "pairs")] == [None] * 3


def test_a_regret_is_behind_the_best_policy_by_validation_and_a_divergence_is_the_worst(benchmarks):
    _, summary, _ = benchmarks
    runs = [row("a", 0, 80.0, 70.0), row("b", 0, 70.0, 75.0), row("c", 0, 60.0, 50.0, diverged=True)]
    runs += [row("a", 0, 0.2, 0.4, "diabetes_mlp"), row("b", 0, 0.3, 0.5, "diabetes_mlp")]
    runs += [row("c", 0, 0.3, 0.5, "diabetes_mlp"), row("d", 0, 0.3, 0.5, "diabetes_mlp")]
    lines = summary.regrets(summary.summarise(runs)).splitlines()
    assert lines[2:] == ["| a | 0.0 | 0.0 | 0.0 |", "| b | -5.0 | 25.0 | 25.0 |", "| c | diverged | 25.0 | diverged |"]


def test_runs_that_are_in_the_file_are_not_repeated_and_are_summarised(benchmarks, monkeypatch, tmp_path, capsys):
    compare, summary, _ = benchmarks
    made, path = [], tmp_path / "runs.jsonl"

    def run(task, policy, seed):
        made.append((task, policy, seed))
        return row(policy, seed, 90.0 + seed, 1 / 3, task)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare.py", "--runs", str(path), *arguments])
        compare.main()

    monkeypatch.setattr(compare, "run", run)
    call("--policies", "lipschitz,sgd:0.1", "--tasks", "digits_mlp", "--seeds", "0,1")
    with path.open("a") as file:
        file.write('{"task": "digits_mlp", "pol')  # cut off by a kill
    call("--policies", "lipschitz,sgd:0.1", "--tasks", "digits_mlp,mnist_cnn", "--seeds", "1")
    assert made == [
        *(("digits_mlp", policy, seed) for seed in (0, 1) for policy in ("lipschitz", "sgd:0.1")),
        ("mnist_cnn", "lipschitz", 1),
        ("mnist_cnn", "sgd:0.1", 1),
    ]
    capsys.readouterr()
    call("--summary", str(tmp_path / "summary.csv"))
    rows = compare.read_summary(tmp_path / "summary.csv")
    assert [(one["task"], one["policy"], one["seeds"]) for one in rows] == [
        ("digits_mlp", "lipschitz", 2), ("digits_mlp", "sgd:0.1", 2),
        ("mnist_cnn", "lipschitz", 1), ("mnist_cnn", "sgd:0.1", 1),
    ]  # fmt: skip
    assert rows[0]["test"] == 0.333333
    assert rows[2]["val_error"] is None
    assert (rows[0]["torch"], rows[0]["lightning"], rows[0]["device"]) == (2.14, 2.6, "CPU")
    printed = capsys.readouterr().out
    for table in (summary.defaults, summary.regrets):
        assert table(rows) in printed


@pytest.mark.parametrize("policy", ["lipschitz", "sgd:0.1", "lipschitz-adamw"])
def test_a_run_trains_by_its_policy(benchmarks, monkeypatch, policy):
    pytest.importorskip("sklearn")
    compare, *_ = benchmarks
    tasks = sys.modules["tasks"]
    monkeypatch.setitem(tasks.TASKS, "diabetes_mlp", compare.Task(**{**vars(tasks.TASKS["diabetes_mlp"]), "epochs": 2}))
    one, again = (compare.run("diabetes_mlp", policy, 3) for _ in range(2))
    assert {**one, "seconds": 0} == {**again, "seconds": 0}
    assert not one["diverged"]
    assert 0 < one["test"] < 1.5
    assert (one["rate"] == pytest.approx(0.1, rel=0.2)) == (policy == "sgd:0.1")


def test_an_unknown_policy_is_named(benchmarks):
    compare, *_ = benchmarks
    with pytest.raises(SystemExit, match=r"expected a policy of lipschitz, .*, found 'nothing:0.1'"):
        compare.recipe("nothing:0.1")


@pytest.mark.parametrize(
    ("policies", "message"),
    [([], "expected runs in runs.jsonl, and found none"), (["sgd:1"], "found none of 1, such as digits_mlp sgd:2;")],
)
def test_a_summary_of_fewer_runs_does_not_replace_another(benchmarks, monkeypatch, capsys, policies, message):
    compare, summary, _ = benchmarks
    old = Path("old.csv")
    compare.write_summary(old, summary.summarise([row(policy, 0, 1.0, 1.0) for policy in ("sgd:1", "sgd:2")]))
    before = old.read_bytes()
    for policy in policies:
        compare.add_row(Path("runs.jsonl"), row(policy, 0, 2.0, 2.0))
    monkeypatch.setattr(sys, "argv", ["compare.py", "--runs", "runs.jsonl", "--summary", "old.csv"])
    with pytest.raises(SystemExit, match="2"):
        compare.main()
    assert message in capsys.readouterr().err
    assert old.read_bytes() == before
    if policies:
        monkeypatch.setattr(sys, "argv", ["compare.py", "--runs", "runs.jsonl", "--summary", "new.csv"])
        compare.main()
        assert [one["policy"] for one in compare.read_summary(Path("new.csv"))] == policies


def test_the_readmes_everyday_table_marks_differences_beyond_their_standard_error(benchmarks):
    _, summary, _ = benchmarks
    import readme_tables

    grids = summary.summarise(
        [row("sgd:0.1", seed, 90.0, 90.0 + seed) for seed in range(3)]
        + [row("sgd:0.3", seed, 80.0, 99.0) for seed in range(5)]
        + [row("sgd:1", seed, 99.0, 99.0) for seed in range(2)]
        + [row("adamw:0.1", seed, 0.5, 0.5, "diabetes_mlp") for seed in range(3)]
        + [row("schedulefree:0.1", seed, 0.5, 0.5, "diabetes_mlp") for seed in range(3)]
    )
    computed = summary.summarise(
        [row("lipschitz", seed, 91.0, 91.5 + seed) for seed in range(3)]
        + [row("lipschitz-adamw", seed, 0.6, 0.6, "diabetes_mlp") for seed in range(3)]
        + [row("lipschitz-schedulefree", seed, 0.5, 0.5, "diabetes_mlp") for seed in range(3)]
        + [row("lipschitz", seed, 0.5, 0.5, "breast_cancer_mlp") for seed in range(3)]  # no grid
    )
    assert readme_tables.everyday(computed, grids).replace(readme_tables.NO_BREAK, " ").splitlines()[2:] == [
        "| Digits, MLP, accuracy | SGD | 91.00 | 92.50 ▲ | +1.50 ± 0.82 |",
        "| Diabetes, MLP, loss | AdamW | 0.500 | 0.600 ▼ | +0.100 ± 0.000 |",
        "| Diabetes, MLP, loss | Schedule-Free | 0.500 | 0.500 = | +0.000 ± 0.000 |",
    ]
    assert [readme_tables.mark(gain, 1.0) for gain in (1.0, 1.1, -1.1)] == ["=", "▲", "▼"]


def test_the_figure_has_the_points_of_the_summaries(benchmarks, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    import rate_figure

    grids = rate_figure.fixed_rates()
    for task in rate_figure.TASKS:
        found = rate_figure.points(grids, task)
        lowest = [0.003] if task == "mnist_cnn" else []
        assert [rate for rate, _, _ in found] == [*lowest, 0.01, 0.03, 0.1, 0.3, 1.0]
    monkeypatch.setattr(rate_figure, "PICTURE", tmp_path / "rates.png")
    rate_figure.main()
    assert rate_figure.PICTURE.read_bytes()[:4] == b"\x89PNG"
