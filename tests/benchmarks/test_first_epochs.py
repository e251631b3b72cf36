"""The benchmark of the papers' first epochs: the output of the command is parsed, and its failure is reported."""

import importlib.util
import sys

import pytest
from helpers import ROOT

spec = importlib.util.spec_from_file_location(
    "first_epochs_benchmark", ROOT / "benchmarks" / "papers" / "first_epochs.py"
)
first_epochs = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = first_epochs
spec.loader.exec_module(first_epochs)


def test_what_the_command_prints_is_read():
    curve = first_epochs.Curve("digits.yaml", (0.5,), "a note", (0.001, 10.0))
    result = first_epochs.run(curve, 3, None, seed=1)
    assert len(result.rates) == len(result.applied) == len(result.train) == 3
    assert all(0.01 < rate < 1 for rate in result.rates)
    assert 0.5 < result.test <= 1
    lines = first_epochs.rows("digits", curve, result)
    assert lines[0] == "digits (digits.yaml): a note"
    assert lines[2].split()[2:3] == ["0.5"]
    assert lines[3].split()[2] == "-"
    assert lines[5].strip() == "from 0.001 to 10.0 in 2 of 2 epochs from the second one on"


def test_a_failing_command_ends_the_benchmark():
    with pytest.raises(SystemExit, match="nothing.yaml: lit-lipschitz ended with code 2"):
        first_epochs.run(first_epochs.Curve("nothing.yaml", (), ""), 1, None)
