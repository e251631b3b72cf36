"""The lowest versions, which the workflow tests and which run no code from checkpoints, and what SECURITY.md says."""

import re

import pytest
from helpers import ROOT

from lit_lipschitz import __version__

# torch.load(weights_only=True) ran code before 2.6.0 (CVE-2025-32434) and damaged memory before 2.10.0
# (CVE-2026-24747); Lightning before 2.6.6 ran code from checkpoints.
FLOORS = {"torch": (2, 10), "lightning": (2, 6, 6)}


def numbers(version):
    return tuple(map(int, re.findall(r"\d+", version)))


@pytest.mark.parametrize("name", FLOORS)
def test_versions_that_run_code_from_checkpoints_are_not_admitted(name):
    text = (ROOT / "pyproject.toml").read_text()
    (found,) = re.findall(rf'^ +"{name}>=([\d.]+),<3",$', text, re.MULTILINE)
    assert numbers(found) >= FLOORS[name]
    (pinned,) = re.findall(rf"^{name}==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert numbers(pinned) >= numbers(found)


def test_security_says_what_is_code_and_what_is_not():
    text = (ROOT / "SECURITY.md").read_text()
    assert "| YAML configs, and options on the command line | **Code.**" in text
    assert "| checkpoints (`--ckpt_path`, also `last`) | Data." in text
    assert "SECURITY.md" in (ROOT / "README.md").read_text()


def test_the_workflow_tests_the_lowest_versions():
    dependencies = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)[1]
    floors = dict(re.findall(r'"([\w-]+)(?:\[\w+\])?>=([\d.]+)', dependencies))
    lowest = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / ".github" / "lowest.txt").read_text(), re.M))
    assert lowest.pop("pytorch-lightning") == lowest["lightning"]
    assert set(lowest) == set(floors)
    for name, version in lowest.items():
        width = len(numbers(floors[name]))
        assert numbers(version)[:width] == numbers(floors[name])
        assert not any(numbers(version)[width:]), f"{name}: a later version than the lowest one"
    workflow = (ROOT / ".github" / "workflows" / "checks.yml").read_text()
    (oldest,) = re.findall(r'^requires-python = ">=([\d.]+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert f'{{ python: "{oldest}", versions: lowest }}' in workflow
    assert "--constraint .github/lowest.txt" in workflow


def test_what_github_and_pre_commit_read_is_whole():
    import yaml

    for path in [*(ROOT / ".github" / "workflows").glob("*.yml"), ROOT / ".pre-commit-config.yaml"]:
        assert yaml.safe_load(path.read_text())
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        assert set(re.findall(r"run: make (\w+)", path.read_text())) <= set(targets)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (__version__, "MIT")


def test_training_installs_no_tools():
    recipe = re.search(r"^\$\(BASE\):.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)[1]
    assert re.findall(r'--editable "\.\[([\w,]+)\]"', recipe) == ["digits"]
    assert re.search(r"^train: \$\(BASE\)", (ROOT / "Makefile").read_text(), re.M)
