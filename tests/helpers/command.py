"""The command's script, what it prints, the checkpoints that a run leaves, and processes that race."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

SCRIPT = Path(sys.executable).with_name("lit-lipschitz")


def error_line(err: str) -> str:
    """The one line of an error, below what Lightning says while it starts."""
    lines = [line for line in err.splitlines() if line.startswith("lit-lipschitz: error:")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def printed_epochs(out: str) -> list[dict[str, str]]:
    """The table that fit prints: each row as a mapping from the names in its header."""
    header: list[str] = []
    rows = []
    for line in out.splitlines():
        cells = line.split()
        if cells[:2] in (["epoch", "rate"], ["epoch", "lr"]):
            header = cells
        elif re.match(r" *\d+/\d", line):
            rows.append(dict(zip(header, cells, strict=True)))
    return rows


def last(root: str | Path) -> Any:
    """The content of the newest last checkpoint below a folder."""
    found = sorted(Path(root).glob("lightning_logs/*/checkpoints/last*.ckpt"), key=lambda path: path.stat().st_mtime)
    return torch.load(found[-1], weights_only=True)


def same(first: Any, second: Any) -> bool:
    """Whether two checkpoints have the same weights."""
    return all(torch.equal(first["state_dict"][name], value) for name, value in second["state_dict"].items())


def race(*commands: list[Any], timeout: float = 300) -> list[subprocess.CompletedProcess[str]]:
    """Runs Python processes at the same time, each with the arguments after `python`; returns what they printed."""
    running = [
        subprocess.Popen([sys.executable, *map(str, one)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for one in commands
    ]
    printed = [process.communicate(timeout=timeout) for process in running]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *texts)
        for process, texts in zip(running, printed, strict=True)
    ]
