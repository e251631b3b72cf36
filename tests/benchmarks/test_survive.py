"""The short part of the survival benchmark: writers of one file of which one is killed; the soak is the script."""

import random
import sys
from pathlib import Path

import pytest
from helpers import ROOT


@pytest.fixture
def races(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import races

    yield races
    sys.modules.pop("races", None)


def test_nothing_is_lost_where_writers_race_and_one_is_killed(races, capsys):
    assert races.writers_raced(Path(), 2, random.Random(0), writers=3, rows=10)
    assert "nothing lost" in capsys.readouterr().out


def test_a_row_that_is_lost_is_counted(races, monkeypatch, capsys):
    monkeypatch.setattr(races.ResultsFile, "add", lambda file, row: row)
    assert not races.writers_raced(Path(), 1, random.Random(0), writers=3, rows=10)
    assert "LOST" in capsys.readouterr().out


def rank_faults(races, monkeypatch, codes, states):
    """Whether the faults of one killed rank are as they have to be, if runs end with these codes in these states."""
    codes, states = iter(codes), iter(states)
    monkeypatch.setattr(races, "start_ranks", lambda *arguments: None)
    monkeypatch.setattr(races, "fault", lambda *arguments: [1, 2])
    monkeypatch.setattr(races, "ended", lambda *arguments: next(codes))

    def differences(one, other):
        return [] if one == other else [other]

    functions = (lambda _: [], lambda _: True, lambda _: next(states), differences)
    return races.rank_faults(Path(), 1, *functions, random.Random(0))


def test_a_rank_that_is_killed_when_its_run_is_complete_is_drawn_again(races, monkeypatch, capsys):
    # The undisturbed run, one that was complete, one that was killed and resumed, one that was stopped.
    assert rank_faults(races, monkeypatch, [0, 0, -9, 0, 0], "x" * 4)
    assert capsys.readouterr().out.count("nothing lost") == 2


def test_a_run_that_ends_without_an_error_and_is_another_one_is_lost(races, monkeypatch, capsys):
    assert not rank_faults(races, monkeypatch, [0, 0, 0], "xyyx")
    assert "LOST" in capsys.readouterr().out
