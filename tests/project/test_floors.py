"""The lowest versions of torch and Lightning, which run no code from checkpoints, and what SECURITY.md says."""

import re

import pytest
from helpers import ROOT

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
    assert "| YAML configs, and options on the command line | **They are code.**" in text
    assert "| checkpoints (`--ckpt_path`, and those that a run finds itself) | They are data." in text
    assert "SECURITY.md" in (ROOT / "README.md").read_text()
