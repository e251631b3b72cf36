"""Runs every block of Python and every command of README.md and docs/, and compares the reference with the code."""

import contextlib
import gc
import importlib.metadata
import io
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import ROOT, Classifier, loader, trainer
from torch import nn
from torch.nn import functional as F

from lit_lipschitz import LipschitzLR
from lit_lipschitz.bounds import LOSSES
from lit_lipschitz.cli.compare.command import parse_options
from lit_lipschitz.cli.compare.policies import parse_policies
from lit_lipschitz.cli.main import main
from lit_lipschitz.cli.suggest.command import parse_options as parse_suggest_options
from lit_lipschitz.measurement import optimizer_updates
from lit_lipschitz.rules.registry import RULES

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
HOWTO = sorted((ROOT / "docs" / "howto").glob("*.md"))
STARTS = ("lit-lipschitz", "python", "python3", "pip", "make", "git", "tensorboard", "torchrun", "srun")

NOT_RUN = {
    r"git clone": "needs the repository's address",
    r"python3 -m venv|pip install": "changes the environment; the wheel's installation is tested in test_package.py",
    r"tensorboard ": "a server that does not end; test_tensorboard.py starts one where there is Chromium to look at it",
    r"torchrun|srun": "needs several nodes; what they start is parsed",
    r".*--trainer\.devices 8": "needs 8 devices",
    r".*--config (mnist|cifar10|paper_)": "downloads MNIST or CIFAR-10, and takes minutes; run in test_training.py, "
    "test_distributed.py and test_paper_configs.py with what is there",
    r".*WandbLogger": "needs the package wandb",
    r"make ": "makes an environment of its own; .ci/run runs check, docs, test, train and slow",
    r"python benchmarks/": "takes minutes to hours, and figures are not what a test is for",
    r"python examples/": "run in tests/examples",
    r"python docs/reference/config_page\.py": "writes into the checkout; a test here compares what it would write",
    r"python docs/tensorboard_picture\.py": "needs Chromium; test_tensorboard.py runs it where that is",
    r"python -m pytest": "is tests, which run anyway",
    r"lit-lipschitz (fit|compare|suggest) --config my\.yaml": "the reader's own config",
    r"lit-lipschitz compare .*--seeds": "takes a minute or more; shorter ones in test_compare_command.py",
    r"lit-lipschitz (fit|explain|suggest|test|predict|validate|compare|report)$": "names the command",
    r"lit-lipschitz fit --audit 100$": "names the option; it runs with a config",
}
"""Commands that the tests here do not run, by how they begin, and why. They are parsed all the same."""


@dataclass(frozen=True)
class Block:
    """A block of a page: code, a command, or the output of one."""

    page: str
    line: int
    kind: str
    text: str

    def __str__(self):
        return f"{self.page}:{self.line}"


def blocks(path):
    """The fenced and the indented blocks of a page; the kind of an indented one is empty."""
    lines, found, i = path.read_text().splitlines(), [], 0
    while i < len(lines):
        start = i
        if fence := re.match(r"```(.*)", lines[i]):
            i += 1
            while lines[i] != "```":
                i += 1
            found.append(Block(path.name, start + 1, fence[1], "\n".join(lines[start + 1 : i]) + "\n"))
        elif lines[i].startswith("    ") and i and not lines[i - 1].strip():
            while i + 1 < len(lines) and lines[i + 1].startswith("    "):
                i += 1
            found.append(Block(path.name, start + 1, "", "\n".join(line[4:] for line in lines[start : i + 1]) + "\n"))
        i += 1
    return found


def commands_of(block):
    """The commands of a block, with lines joined that end in a backslash and without comments."""
    if block.kind not in ("", "sh", "bash", "console"):
        return []
    lines = re.sub(r"\\\n\s*", "", block.text).splitlines()
    parts = [part.strip() for line in lines for part in re.split(r" && ", line.split(" # ")[0])]
    return [part for part in parts if re.sub(r"^(\w+=\S+ )+", "", part).split(" ")[0] in STARTS]


def inline_commands(path):
    """The commands in backquotes within sentences."""
    text = re.sub(r"^(```.*?^```|    .*?)$", "", path.read_text(), flags=re.M | re.S)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    return [span for span in spans if span.split(" ")[0] in STARTS and " " in span and "|" not in span]


def every_command():
    found = []
    for path in PAGES:
        for block in blocks(path):
            found += commands_of(block)
        found += inline_commands(path)
    return list(dict.fromkeys(found))


def why_not(command):
    """Why a command is not run here, or None for one that is."""
    return next((reason for start, reason in NOT_RUN.items() if re.match(start, command)), None)


def arguments_of(command):
    """What comes after `lit-lipschitz`, whatever starts it."""
    words = shlex.split(command)
    return words[words.index("lit-lipschitz") + 1 :]


COMMANDS = every_command()
OURS = [command for command in COMMANDS if re.search(r"(^|\s)lit-lipschitz [a-z-]", command)]


@pytest.fixture
def lit(monkeypatch):
    """Runs the command in this process, with this folder's modules in reach; returns its exit code and its stdout."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lit-lipschitz", *arguments])
        with contextlib.redirect_stdout(io.StringIO()) as out:
            try:
                code = main()
            except SystemExit as end:  # after --help and --print_config
                code = end.code or 0
        return code, out.getvalue()

    return run


def close(shown, printed):
    """Whether a line is what was printed, with numbers within a tenth, or 2 where they count steps; times are free."""
    number = r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?(?![\w.]*[a-z])"
    shown, printed = (re.sub(r"\d\S* s\b", "# s", " ".join(line.split())) for line in (shown, printed))
    if re.sub(number, "#", shown) != re.sub(number, "#", printed):
        return False
    pairs = zip(re.findall(number, shown), re.findall(number, printed), strict=True)
    return all(
        abs(float(a) - float(b)) <= max(0.1 * abs(float(a)), 2 if a.isdigit() else 5 * 10 ** -len(a)) for a, b in pairs
    )


def check_shown(block, printed):
    lines = [line for line in printed.splitlines() if line.strip()]
    for line in block.text.splitlines():
        assert any(close(line, other) for other in lines), f"{block}: {line!r} is not in\n{printed}"


def names_of(paths):
    return [path.name for path in paths]


def test_the_pages_have_the_blocks_that_are_looked_for():
    found = {path.name: blocks(path) for path in PAGES}
    assert len([one for one in found["README.md"] if one.kind == "python"]) == 1
    assert len([one for one in found["start.md"] if one.kind == "python"]) == 2
    assert len([one for one in found["tutorial.md"] if one.kind == "python"]) >= 10
    for page, some in found.items():
        for block in some:
            assert block.kind in ("", "python", "yaml", "text", "{toctree}", "{eval-rst}") or block.kind.startswith(
                "{include} ../"
            ), block
            if page not in (
                "README.md",
                "start.md",
                "tutorial.md",
                "extending.md",
                "schedules.md",
                "any_loop.md",
                "suggest.md",
                *names_of(HOWTO),
            ):
                assert block.kind not in ("python", "yaml"), f"{block}: nothing runs this; say here how"
    assert len(OURS) > 25


@pytest.mark.parametrize("page", ["README.md", "docs/guide/start.md"])
def test_the_first_pages_python_runs(monkeypatch, page):
    original = L.Trainer.__init__

    def quiet(self, **settings):
        original(self, accelerator="cpu", enable_progress_bar=False, **{**settings, "max_epochs": 1})

    monkeypatch.setattr(L.Trainer, "__init__", quiet)
    names = {"your_module": Classifier(), "your_data": loader()}
    for block in blocks(ROOT / page):
        if block.kind == "python":
            exec(compile(block.text, str(block), "exec"), names)
    trainer = names["trainer"]
    if trainer.global_step == 0:
        trainer.fit(Classifier(), loader())
    ours = next(callback for callback in trainer.callbacks if type(callback).__name__ == "LipschitzLR")
    assert ours.constant > 0
    assert trainer.global_step == len(loader())


class MyModule(Classifier):
    """The reader's own module in the how-to pages."""

    def __init__(self):
        super().__init__()


@pytest.mark.parametrize("page", [*HOWTO, ROOT / "docs" / "guide" / "schedules.md"], ids=lambda page: page.stem)
def test_a_howtos_python_runs(page):
    """Each page in a namespace of its own, with the names that the index of the pages says."""
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    names = {
        "L": L, "torch": torch, "nn": nn, "F": F, "LipschitzLR": LipschitzLR, "MyModule": MyModule,
        "train_loader": loader(), "val_loader": loader(), "settings": settings,
    }  # fmt: skip
    if "schedulefree" in page.read_text() and page.stem == "schedule_free":
        pytest.importorskip("schedulefree")
    for block in blocks(page):
        if block.kind == "python":
            exec(compile(block.text, str(block), "exec"), names)
            ours = (
                [one for one in names["trainer"].callbacks if isinstance(one, LipschitzLR)]
                if "trainer" in names
                else []
            )
            assert all(one.rate > 0 for one in ours)
    if page.stem in ("index", "fsdp"):
        assert not any(block.kind == "python" for block in blocks(page))
    elif page.stem == "gans":
        assert all(controller.decision.lr > 0 for controller in names["callback"].controllers.values())
    else:
        assert "trainer" in names


def test_the_page_of_metrics_has_every_metric():
    """Those of three optimizers and losses together, with a limit; and no other."""
    page = (ROOT / "docs" / "reference" / "metrics.md").read_text()
    found = set()
    regression = Classifier()
    regression.training_step = lambda batch, batch_idx: F.mse_loss(
        regression.net(batch[0]), F.one_hot(batch[1], 3).float()
    )
    for module in (Classifier(), Classifier(torch.optim.AdamW), regression):
        run = trainer(LipschitzLR(max_lr=100.0))
        run.fit(module, loader())
        found |= {name for name in run.callback_metrics if name.startswith("lipschitz/")}
    assert found == set(re.findall(r"^\| `(lipschitz/\w+)` \|", page, re.M))


@pytest.fixture
def _registries(monkeypatch):
    """Forgets after a test what it has registered."""
    monkeypatch.setattr(optimizer_updates, "OPTIMIZERS", list(optimizer_updates.OPTIMIZERS))
    before = [(registry, dict(registry)) for registry in (LOSSES, RULES)]
    yield
    for registry, known in before:
        registry.clear()
        registry.update(known)


@pytest.mark.usefixtures("_registries")
def test_the_page_on_extending_runs_and_prints_what_it_shows():
    names, printed, shown = {}, "", 0
    for block in blocks(ROOT / "docs" / "guide" / "extending.md"):
        if block.kind == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(block.text, str(block), "exec"), names)
            printed = out.getvalue()
        else:
            check_shown(block, printed)
            shown += 1
    assert shown == 3  # a loss, a rule, an optimizer


def test_the_page_on_any_loop_runs():
    pytest.importorskip("transformers")
    before, names = torch.autograd.backward, {}
    for block in blocks(ROOT / "docs" / "guide" / "any_loop.md"):
        if block.kind == "python":
            exec(compile(block.text, str(block), "exec"), names)
    names.clear()
    gc.collect()
    assert torch.autograd.backward is before


def test_the_page_on_suggest_runs_and_prints_what_it_shows(lit):
    names, printed = {}, ""
    for block in blocks(ROOT / "docs" / "guide" / "suggest.md"):
        if block.kind == "python":
            exec(compile(block.text, str(block), "exec"), names)
        elif block.kind == "text":
            check_shown(block, printed)
        for command in commands_of(block):
            code, printed = lit(*arguments_of(command), "--trainer.accelerator", "cpu")
            assert code == 0, command
    assert names["found"].rate > 0


@pytest.mark.slow
def test_the_tutorial_runs_and_prints_what_it_shows(monkeypatch, lit):
    """All but `compare`, which is below."""
    monkeypatch.syspath_prepend(os.getcwd())
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    names, printed = {}, ""
    for block in blocks(ROOT / "docs" / "guide" / "tutorial.md"):
        if file := re.match(r"# (mine\.\w+)\n", block.text):
            Path(file[1]).write_text(block.text)
        elif block.kind == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(block.text, str(block), "exec"), names)
            printed = out.getvalue()
        elif block.kind == "text":
            check_shown(block, printed)
        else:
            for command in commands_of(block):
                if why_not(command) is None:
                    code, printed = lit(*arguments_of(command))
                    assert code == 0, command
    assert Path("report/report.html").is_file()
    monkeypatch.delitem(sys.modules, "mine", raising=False)


@pytest.mark.slow
def test_the_tutorials_comparison_runs(monkeypatch, lit):
    monkeypatch.syspath_prepend(os.getcwd())
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    for block in blocks(ROOT / "docs" / "guide" / "tutorial.md"):
        if file := re.match(r"# (mine\.\w+)\n", block.text):
            Path(file[1]).write_text(block.text)
    (command,) = [one for one in OURS if one.startswith("lit-lipschitz compare --config mine.yaml")]
    code, out = lit(*arguments_of(command))
    assert code == 0
    assert re.search(r"^lipschitz: .* on the test set; the best of the 4 fixed rates", out, re.M)
    monkeypatch.delitem(sys.modules, "mine", raising=False)


@pytest.mark.parametrize("command", OURS)
def test_every_command_of_ours_parses(command, lit):
    name, *rest = arguments_of(command)
    for file in ("my.yaml", "mine.yaml"):  # of the reader
        Path(file).write_text(
            "seed_everything: 0\nmodel:\n  class_path: lightning.pytorch.demos.boring_classes.BoringModel\n"
        )
    if not rest:
        assert lit(name, "--help")[0] == 0
        return
    if name == "compare" and "--help" not in rest:
        chosen, rest = parse_options(rest)
        assert parse_policies(chosen.policies)
    if name == "suggest":
        _, rest = parse_suggest_options(rest)
    if name in ("fit", "validate", "test", "predict", "explain", "suggest", "compare") and "--help" not in rest:
        ends = any(word.endswith(".help") or word == "--print_config" for word in rest)
        name = "fit" if name in ("explain", "suggest", "compare") else name
        code, out = lit(name, *rest, *([] if ends else ["--print_config"]))
        assert code == 0
        assert len(out.splitlines()) > 5
    elif name == "export":
        assert lit("fit", "--config", "digits.yaml", "--trainer.max_steps", "2", "--quiet")[0] == 0
        assert lit(name, *rest)[0] == 0
    elif name == "report":
        assert all(word.startswith(("lightning_logs", "...")) for word in rest), "make what it is to report on"
    else:
        assert name in ("configs", "validate-config") or "--help" in rest, f"{command}: nothing here parses it"
        if rest[0] == "copy":
            Path(rest[-1]).unlink()
        assert lit(name, *rest)[0] == 0


@pytest.mark.slow
def test_the_commands_of_the_readme_and_theory_run_in_their_order(lit):
    ran = []
    for path in PAGES:
        in_page = [one for block in blocks(path) for one in commands_of(block)] + inline_commands(path)
        for command in dict.fromkeys(in_page):
            if path.name == "tutorial.md" or command not in OURS or why_not(command) is not None:
                continue
            if command in ran:
                continue
            arguments = arguments_of(command)
            if command.startswith("lit-lipschitz fit") and "--trainer.accelerator" not in command:
                arguments += ["--trainer.accelerator", "cpu"] if ".help" not in command else []
            assert lit(*arguments)[0] == 0, f"{path.name}: {command}"
            ran.append(command)
    assert len(ran) > 10


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in OURS])
def test_every_other_command_names_what_is_there(command):
    assert why_not(command), f"{command}: run it here, or say in NOT_RUN why not"
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
        assert words[1] in targets
    if words[:2] == ["pip", "install"]:
        extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)
        dev = re.search(r"^dev = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)[1]
        named = re.search(r"\[([\w,]+)\]", command)
        assert (
            set(named[1].split(",")) <= set(extras)
            if named
            else words[2] in ("torch", "wandb", "mlflow") or words[2] in dev
        )
    if words[0] == "python" and words[1] != "-m":
        source = (ROOT / words[1]).read_text()
        assert all(f'"{word}"' in source for word in words if word.startswith("--"))
    for word in words:
        if word.startswith("tests/"):
            assert (ROOT / word).is_file()


def test_config_page_is_what_signatures_and_docstrings_say(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "reference"))
    import config_page

    pinned = dict(re.findall(r"^(lightning|torch)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M))
    same = all(importlib.metadata.version(name).startswith(version) for name, version in pinned.items())
    assert config_page.PAGE.read_text().startswith(config_page.page(others=same)), (
        "run python docs/reference/config_page.py"
    )


def test_every_key_that_a_bundled_config_sets_is_in_the_page():
    import yaml

    page = (ROOT / "docs" / "reference" / "config.md").read_text()

    def keys(node, prefix):
        for key, value in node.items():
            if key == "init_args":
                yield from keys(value, prefix)
            elif key != "class_path":
                yield f"{prefix}{key}"
                if isinstance(value, dict):
                    yield from keys(value, f"{prefix}{key}.")

    for config in (ROOT / "configs").glob("*.yaml"):
        for key in keys(yaml.safe_load(config.read_text()), ""):
            missing = not re.search(rf"`{re.escape(key)}(`| \()", page)
            assert not missing or key.startswith("model.optimizer."), f"{config.name}: {key}"


@pytest.mark.slow
def test_the_pages_build_without_a_warning():
    pytest.importorskip("sphinx")
    arguments = [
        "--quiet",
        "--fail-on-warning",
        "--keep-going",
        "-b",
        "html",
        "-d",
        "trees",
        str(ROOT / "docs"),
        "html",
    ]
    built = subprocess.run([sys.executable, "-m", "sphinx", *arguments], capture_output=True, text=True, timeout=300)
    assert (built.returncode, built.stderr) == (0, "")
    assert "lit_lipschitz.LipschitzLR" in Path("html/reference/api.html").read_text()
