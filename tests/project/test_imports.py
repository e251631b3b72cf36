"""What may import what, and what must not be imported to answer at once."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lit_lipschitz

ROOT = Path(lit_lipschitz.__file__).parent
# Each folder or file may import the ones before it, and of other packages those that are named.
ORDER = {
    "errors": set(),
    "bounds": set(),
    "rules": set(),
    "recognition": {"torch"},
    "measurement": {"torch"},
    "optim": {"torch"},
    "control": {"torch"},
    "attachment": {"torch"},
    "suggestion": {"torch"},
    "integrations": {"torch", "transformers"},
    "lightning_api": {"lightning", "pytorch_lightning"},
    "training_pass": {"torch"},
    "audit": {"torch", "rich"},
    "callbacks": {"torch"},
    "models": {"torch"},
    "data": {"torch", "lightning", "torchvision", "sklearn", "numpy"},
    "module": {"torch", "lightning", "torchmetrics"},
    "cli": None,  # any
}
FILES = {
    "bounds/classical.py": {"torch"},
    "models/named.py": {"torch", "torchvision", "timm"},  # whose networks it makes
    "module.py": {"torch", "lightning", "torchmetrics", "jsonargparse"},
}
"""Files that may import more than their folder."""


def imported_names(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("own", ORDER)
def test_imports_point_down(own):
    order = list(ORDER)
    paths = [ROOT / f"{own}.py"] if (ROOT / f"{own}.py").exists() else sorted((ROOT / own).rglob("*.py"))
    checked = 0
    for path in paths:
        allowed = FILES.get(str(path.relative_to(ROOT)), ORDER[own])
        for name in imported_names(path):
            package, *rest = name.split(".")
            if package == "lit_lipschitz" and rest and rest[0] in order:
                assert order.index(rest[0]) <= order.index(own), f"{path} imports {name}"
            elif package not in sys.stdlib_module_names and package != "lit_lipschitz" and allowed is not None:
                assert package in allowed, f"{path} imports {name}"
            checked += 1
    assert checked or own in ("errors",)


@pytest.mark.parametrize(
    "folder", ["bounds", "rules", "recognition", "measurement", "optim", "control", "audit", "models"]
)
def test_ruff_bans_what_lies_above(folder):
    """What the rule of each folder is for: an import of Lightning is an error of `make check`."""
    ruff = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--stdin-filename", f"{ROOT / folder}/new.py"]
    result = subprocess.run([*ruff, "-"], input="import lightning\n", capture_output=True, text=True, timeout=60)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "TID251" in result.stdout


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "arguments",
    [
        ["configs"],
        ["configs", "--json"],
        ["--help"],
        ["--version"],
        ["fit", "--config", "cifr10"],
        ["report", "nothing"],
        ["explain", "--help"],
        ["suggest", "--help"],
        ["explain", "--config", "cifr10"],
        [],
    ],
)
def test_what_needs_no_torch_does_not_import_it(arguments):
    result = run(
        f"import sys\nsys.argv[1:] = {arguments!r}\nfrom lit_lipschitz.cli.main import main\nmain()\n"
        "assert not {'torch', 'lightning', 'numpy'} & set(sys.modules), 'imported'\n"
    )
    assert result.returncode == 0, result.stderr


def test_the_core_does_not_import_lightning():
    result = run(
        "import sys\n"
        "from lit_lipschitz import attachment, audit, bounds, control, measurement, models, optim, recognition, rules\n"
        "from lit_lipschitz import suggestion\n"
        "assert 'lightning' not in sys.modules and 'torchvision' not in sys.modules\n"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", lit_lipschitz.__all__)
def test_public_names_are_there_and_documented(name):
    assert getattr(lit_lipschitz, name).__doc__
    assert name in dir(lit_lipschitz)


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'LipschitzLr'"):
        lit_lipschitz.LipschitzLr  # noqa: B018
