"""What is installed: built as a source archive and a wheel from it, and put into an environment of its own."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
from helpers import ROOT

from lit_lipschitz import __version__
from lit_lipschitz.cli.configs import bundled_configs

pytestmark = pytest.mark.slow

KEPT = ("lit_lipschitz", "cli", "configs", "pyproject.toml", "README.md", "LICENSE")


def call(*command, **settings):
    # Not the checkout: a run outside of it finds what is installed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=300, env=environment, **settings
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The wheel and the source archive that it was built from."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("package")
    for name in KEPT:  # a build leaves files in its folder
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    code, out, err = call(sys.executable, "-m", "build", "--no-isolation", folder)
    assert code == 0, out + err
    (wheel,), (archive,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return wheel, archive


@pytest.fixture(scope="session")
def installed(built, tmp_path_factory):
    """The command in an environment that has this one's packages, but the wheel for the project."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    wheel, _ = built
    options = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    code, out, err = call(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel)
    assert code == 0, out + err
    _, purelib, _ = call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    Path(purelib.strip(), "others.pth").write_text(sysconfig.get_path("purelib"))  # .pth files there are not read
    return folder / "bin" / "lit-lipschitz"


@pytest.fixture(scope="session")
def metadata(built) -> Message:
    """What an index shows of the wheel."""
    with zipfile.ZipFile(built[0]) as file:
        (name,) = [name for name in file.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_string(file.read(name).decode())


def test_the_wheel_has_the_code_the_configs_and_the_mark_of_types(built):
    with zipfile.ZipFile(built[0]) as file:
        names = file.namelist()
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lit_lipschitz").rglob("*.py")}
    for folder in ("cli", "configs"):
        paths = [one for kind in ("py", "yaml", "txt") for one in (ROOT / folder).rglob(f"*.{kind}")]
        sources |= {f"lit_lipschitz/{path.relative_to(ROOT).as_posix()}" for path in paths}
    assert {name for name in names if ".dist-info/" not in name} == {*sources, "lit_lipschitz/py.typed"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_source_archive_has_what_the_wheel_is_made_of(built):
    with tarfile.open(built[1]) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    # The archive has the folders where the package has them, not the links to them.
    folders = {"lit_lipschitz/cli/main.py", "lit_lipschitz/configs/digits.yaml"}
    assert {"LICENSE", "README.md", "pyproject.toml", *folders} <= names


def test_what_an_index_shows(metadata):
    assert (metadata["Name"], metadata["Version"]) == ("lit-lipschitz", __version__)
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().startswith("# lit-lipschitz\n")
    assert len(metadata["Summary"]) < 200
    classifiers = metadata.get_all("Classifier")
    assert "Typing :: Typed" in classifiers
    assert not [one for one in classifiers if one.startswith("License ::")], "refused beside an expression"
    # Where the sources are is not known to themselves.
    urls = dict(one.split(", ", 1) for one in metadata.get_all("Project-URL"))
    assert urls == {"Paper": "https://arxiv.org/abs/1902.07399"}
    extras = {"digits", "plots", "completion", "onnx", "joblib", "transformers", "ray", "submitit", "docs", "dev"}
    assert extras == set(metadata.get_all("Provides-Extra"))


def test_the_changelog_has_the_version():
    assert re.search(rf"^## {re.escape(__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.M)


def test_the_installed_command_answers_and_trains(installed, tmp_path):
    code, out, err = call(installed.with_name("python"), "-c", "import lit_lipschitz; print(lit_lipschitz.__file__)")
    assert (code, err) == (0, "")
    assert Path(out.strip()).is_relative_to(installed.parent.parent)
    assert call(installed, "--version") == (0, f"lit-lipschitz {__version__}\n", "")
    code, out, _ = call(installed, "configs", cwd=tmp_path)
    assert (code, len(re.findall(r"^\w+\.yaml ", out, re.M))) == (0, len(bundled_configs()))
    fit = ("fit", "--config", "digits", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--quiet")
    code, out, err = call(installed, *fit, cwd=tmp_path)
    assert (code, err) == (0, "")
    assert re.fullmatch(r"test_loss \S+  test_acc \S+\n", out)
    assert call(installed, "ft")[0] == 2


def test_environment_variables_are_documented():
    read = set()
    for path in [*(ROOT / "lit_lipschitz").rglob("*.py"), *(ROOT / "cli").rglob("*.py")]:
        read |= set(re.findall(r"environ\.get\(\"(\w+)\"", path.read_text()))
    own = read - {"TERM", "LOCAL_RANK"}  # a terminal's, and set by what starts a run on several devices
    assert own == {"LIT_LIPSCHITZ_DATA", "NO_COLOR"}
    page, (_, help_text, _) = (
        (ROOT / "docs" / "guide" / "command.md").read_text(),
        call(sys.executable, "-m", "cli.main", "--help", cwd=ROOT),
    )
    for name in own:
        assert f"`{name}`" in page
        assert name in help_text
