"""What may import what, and what must not be imported to answer at once."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lit_lipschitz

ROOT = Path(lit_lipschitz.__file__).parent
# Each folder or file may import the ones before it.
ORDER = [
    *("errors", "bounds", "rules", "recognition", "measurement", "optim", "control", "training_pass", "audit"),
    *("callbacks", "models", "data", "module", "cli", "__main__"),
]


def test_imports_point_down():
    checked = 0
    for path in [*ROOT.rglob("*.py"), *(ROOT / "cli").rglob("*.py")]:
        own = path.relative_to(ROOT).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text())) if own != "__init__" else ():
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                if name.startswith("lit_lipschitz.") and (other := name.split(".")[1]) in ORDER:
                    checked += 1
                    assert ORDER.index(other) <= ORDER.index(own), f"{path} imports {name}"
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
        "import sys\nfrom lit_lipschitz import audit, bounds, control, measurement, models, optim, recognition, rules\n"
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
