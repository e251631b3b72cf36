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
