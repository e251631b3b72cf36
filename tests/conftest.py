"""Fixtures of all tests."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import SCRIPT

from lit_lipschitz.cli.main import main

# A fit on several ranks leaves them in the environment, where the next would take them for a cluster's.
LIGHTNING_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
REAL_DATA = os.environ.get("LIT_LIPSCHITZ_DATA")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Each test runs in an empty folder, with a seed and without the caller's data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIT_LIPSCHITZ_DATA", raising=False)
    for name in LIGHTNING_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    torch.manual_seed(0)
    levels = {name: logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # what is compiled is kept by class, not by network


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of MNIST and CIFAR-10."""
    if not REAL_DATA:
        pytest.skip("LIT_LIPSCHITZ_DATA is not set: no real MNIST and CIFAR-10 here")
    return Path(REAL_DATA)


@pytest.fixture
def figure(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Prints a measured figure where people see it, whether or not the test passes."""

    def show(text: str) -> None:
        with capsys.disabled():
            print(f"\n    {text}", end="")

    return show


@pytest.fixture
def lit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str | int | None, str, str]]:
    """Runs the command in this process; returns its exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[str | int | None, str, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        code: str | int | None
        try:
            code = main()
        except SystemExit as end:  # argparse ends so after --help and --print_config
            code = end.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
