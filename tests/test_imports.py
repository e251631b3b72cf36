"""What may import what, and what must not be imported to answer at once."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lit_lipschitz

ROOT = Path(lit_lipschitz.__file__).parent
# Lower ones know nothing of higher ones.
LAYERS = [
    {"errors"},
    {"constants", "rules", "schedules", "optimizers", "invariance", "spikes", "averaging", "progress"},
    {"directions"},
    {"losses"},
    {"decision", "statistics"},
    {"regression", "inspection", "nodes", "writing"},
    {"makers"},
    {"matches"},
    {"graph"},
    {"probing", "inference", "slopes"},
    {"readings", "options", "own_schedule"},
    {"head_and_loss"},
    {"controller"},
    {"callback"},
    {"audit"},
    {"models", "data"},
    {"module"},
]


def layer(module):
    name = module.split(".")[1]
    return next(i for i, names in enumerate(LAYERS) if name in names)


def test_imports_point_down():
    checked = 0
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        if parts[-1] == "__init__":
            continue
        own = layer(".".join(parts))
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                if name.startswith("lit_lipschitz."):
                    checked += 1
                    same_package = name.split(".")[1] == parts[1]
                    assert same_package or layer(name) < own, f"{path} imports {name}"
    assert checked > 10


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
        "import sys\nfrom lit_lipschitz import constants, inspection, models, rules, statistics, writing\n"
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
