"""The command's script, its one line of an error, and the checkpoints that a run leaves."""

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


def last(root: str | Path) -> Any:
    """The content of the newest last checkpoint below a folder."""
    found = sorted(Path(root).glob("lightning_logs/*/checkpoints/last*.ckpt"), key=lambda path: path.stat().st_mtime)
    return torch.load(found[-1], weights_only=True)


def same(first: Any, second: Any) -> bool:
    """Whether two checkpoints have the same weights."""
    return all(torch.equal(first["state_dict"][name], value) for name, value in second["state_dict"].items())
