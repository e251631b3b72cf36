"""Each example of a loop of its own runs as a reader would run it, is short, and learns (others: test_scripts.py)."""

import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT

# The package that each needs beyond Lightning's, and arguments that make it short.
EXAMPLES = {
    "plain_loop.py": ("sklearn", ["--epochs", "2"]),
    "fabric.py": ("sklearn", ["--epochs", "2", "--devices", "2", "--accelerator", "cpu"]),
    "timm_loop.py": ("timm", ["--epochs", "2"]),
    "huggingface.py": ("accelerate", ["--epochs", "2"]),
}


def test_every_example_is_run_here():
    scripts = (ROOT / "examples").glob("*.py")
    assert {path.name for path in scripts if "L.Trainer(" not in path.read_text()} == set(EXAMPLES)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "plain_loop.py" else pytest.mark.slow) for name in EXAMPLES]
)
def test_an_example_runs_and_learns(name):
    needed, arguments = EXAMPLES[name]
    pytest.importorskip(needed)
    path = ROOT / "examples" / name
    assert len(path.read_text().splitlines()) < 60
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, path, *arguments], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "first rate" in run.stdout
    losses = [float(loss) for loss in re.findall(r"\bloss'?:? '?([\d.]+)", run.stdout)]
    assert losses[-1] < losses[0], run.stdout
