"""Runs the examples with a Trainer and the cells of the notebooks, and checks the result that each prints last."""

import json
import re
import runpy

import pytest
from helpers import ROOT

SCRIPTS = [path for path in sorted((ROOT / "examples").glob("*.py")) if "L.Trainer(" in path.read_text()]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
RESULTS = {
    "gan.py": ("mean distance from the ring", 0, 0.15),
    "image_classifier.py": ("test_acc", 0.9, 1),
    "language_model.py": ("val_loss", 1, 3),
    "optuna_sweep.py": ("test_acc", 0.93, 1),
    "regression.py": ("r2", 0.45, 0.7),
    "segmentation.py": ("val_dice", 0.8, 1),
}
"""For each script the name of the number that it prints last, and the range that the number must be in."""


def run_script(path):
    """Runs a script as `python` does; a package that an extra installs may be missing."""
    try:
        runpy.run_path(str(path), run_name="__main__")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("lit_lipschitz"):
            raise
        pytest.skip(f"{error.name} is not installed")


@pytest.mark.parametrize(
    "path",
    [pytest.param(one, marks=() if one.name == "regression.py" else pytest.mark.slow) for one in SCRIPTS],
    ids=lambda path: path.name,
)
def test_a_script_trains_and_prints_its_result(path, capsys):
    run_script(path)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    name, low, high = RESULTS[path.name]
    found = re.search(rf"{name} (-?\d+\.\d+)", last)
    assert found, last
    assert low <= float(found[1]) <= high, last


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_short(path):
    assert len(path.read_text().splitlines()) < 60


def test_the_documentation_lists_what_is_there():
    page = (ROOT / "docs" / "howto" / "index.md").read_text()
    found = {path.name for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".ipynb")}
    assert found == set(re.findall(r"^\| `([\w.]+)` \|", page, re.M))


def test_every_expected_result_is_of_a_script():
    assert set(RESULTS) == {path.name for path in SCRIPTS}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs(path, capsys, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    names = {}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "kept without outputs"
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)
    plt.close("all")
    assert names["computed"] > max(names["grid"].values()) - 0.03
    assert "learning rate" in capsys.readouterr().out
