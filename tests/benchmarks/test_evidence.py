"""The tables of the pages are what the scripts print, and what is chosen is chosen by validation."""

import sys

import pytest
from helpers import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import compare
    import write_tables

    yield compare, write_tables
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


def row(policy, seed, val, test, task="digits_mlp", diverged=False):
    return {"task": task, "policy": policy, "seed": seed, "val": val, "test": test, "best_val": val, "rate": 0.1,
            "diverged": diverged, "seconds": 1.0}  # fmt: skip


@pytest.mark.parametrize("name", ["../README.md", "evidence.md", "performance.md"])
def test_a_page_has_the_tables_as_they_are_printed(benchmarks, name):
    _, write_tables = benchmarks
    page = (write_tables.DOCS / name).read_text()
    assert write_tables.filled(name, page) == page


def test_a_tuned_rate_is_the_best_by_validation_among_those_that_do_not_diverge(benchmarks):
    compare, _ = benchmarks
    rows = [row("lipschitz", seed, 90.0, 91.0 + seed) for seed in range(2)]
    rows += [row("sgd:0.1", seed, 92.0, 89.0 + seed) for seed in range(2)]
    rows += [row("sgd:0.3", seed, 91.0, 99.0) for seed in range(2)]
    rows += [row("sgd:1", seed, 95.0, 95.0, diverged=seed == 1) for seed in range(2)]
    rows += [row("sgd:0.01", 0, 99.0, 99.0)]  # on fewer seeds than the others
    chosen = compare.summary(rows)["digits_mlp"]
    assert {found["policy"] for found in chosen["SGD, best of grid"]} == {"sgd:0.1"}
    assert "| digits_mlp | lipschitz | 91.5 ± 0.5 | sgd:0.1 | 89.5 ± 0.5 | 2 ± 0 (points) |" in compare.pairs(rows)


def test_a_regret_is_behind_the_best_policy_by_validation_and_a_divergence_is_the_worst(benchmarks):
    compare, _ = benchmarks
    rows = [row("a", 0, 80.0, 70.0), row("b", 0, 70.0, 75.0), row("c", 0, 60.0, 50.0, diverged=True)]
    rows += [row("a", 0, 0.2, 0.4, "diabetes_mlp"), row("b", 0, 0.3, 0.5, "diabetes_mlp")]
    rows += [row("c", 0, 0.3, 0.5, "diabetes_mlp")]
    lines = compare.regrets(rows).splitlines()
    assert lines[2:] == ["| a | 0.0 | 0.0 | 0.0 |", "| b | -5.0 | 25.0 | 25.0 |", "| c | diverged | 25.0 | diverged |"]


def test_the_best_factor_is_told_by_loss_and_by_accuracy(benchmarks):
    import factors

    losses = {factor: 0.2 + 0.1 * abs(factor - 0.25) for factor in factors.FACTORS}
    rows = [
        {"task": "MNIST, 500, 5", "factor": factor, "seed": seed, "test": loss + seed, "accuracy": 90 + factor}
        for factor, loss in losses.items()
        for seed in (0, 1)
    ]
    *_, line = factors.chart(rows).splitlines()
    assert line == "| MNIST, 500, 5 | 0.25 | 0.7 | 0.775 | 10.7 % | 4 | 94.00 | 91.00 | 3.00 | 2 |"
    assert len(factors.chart(rows[2:]).splitlines()) == 2  # a cell that lacks a factor is left out
    (*_, alike) = factors.chart([*rows[:-1], {**rows[0], "seed": 2, "accuracy": 99.0}]).splitlines()
    assert alike == line.replace("0.7 | 0.775", "0.2 | 0.275").replace("10.7 %", "37.5 %").replace("| 2 |", "| 1 |")


def test_a_factor_multiplies_the_rate_and_is_gone_afterwards(benchmarks):
    import factors

    from lit_lipschitz.rules import registry as rules

    seen, settings = rules.Observation(4.0, 16.0, scale=3.0, batch_size=16), {"betas": (0.9, 0.999)}
    plain, state = rules.RULES["observed"](seen, rules.RuleState(), settings)
    with factors.multiplied(0.5):
        assert rules.RULES["observed"](seen, rules.RuleState(), settings) == (0.5 * plain, state)
    assert rules.RULES["observed"] is rules.observed
