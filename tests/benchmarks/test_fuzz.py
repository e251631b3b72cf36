"""The readers of checkpoints and data files, given damaged ones; and that the fuzzer sees what it has to."""

import os
import sys

import pytest
from helpers import ROOT, without_address

from lit_lipschitz import DataError


@pytest.fixture
def fuzz(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import fuzz

    yield fuzz
    sys.modules.pop("fuzz", None)


def test_damaged_files_are_read_or_refused(fuzz, figure):
    counts = fuzz.fuzz(200, seed=0)
    assert counts.total() == 200
    assert fuzz.report(counts, 0), counts
    assert sum(count for text, count in counts.items() if text.endswith("refused")) > 100


@pytest.mark.slow
@pytest.mark.parametrize("seed", [int(os.environ.get("FUZZ_SEED", 1))])
def test_ten_thousand_damaged_files_are_read_or_refused(fuzz, seed):
    counts = fuzz.fuzz(10_000, seed)
    assert counts.total() == 10_000
    assert fuzz.report(counts, seed), counts


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        (lambda *_: os.kill(os.getpid(), 11), "the process ended with -11"),
        (lambda *_: {}["a"], "KeyError"),
        (lambda *_: os.system("true"), "os.system"),
        (lambda *_: __import__("antigravity_of_nobody"), "import antigravity_of_nobody"),
        (lambda *_: (_ for _ in ()).throw(DataError("a\nb")), "several lines"),
        (lambda *_: len(bytearray(1 << 28)), "MB"),
    ],
    ids=without_address,
)
def test_a_fault_of_a_reader_is_counted(fuzz, monkeypatch, fails, message):
    monkeypatch.setattr(fuzz.Files, "next", lambda files, chance: ("file", fails))
    for name, value in {"CHUNK": 1, "FIRST": 0, "GROWTH": 100_000}.items():
        monkeypatch.setattr(fuzz, name, value)
    counts = fuzz.fuzz(2, seed=0)
    assert not fuzz.report(counts, 0)
    assert all(message in text for text in counts), counts
