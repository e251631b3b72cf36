"""The options of fit that are known without importing torch, so that a mistyped one is told at once."""

import ast
import difflib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from lit_lipschitz.cli.configs import is_config
from lit_lipschitz.errors import ConfigurationError

_CLASSES = {
    "trainer": ("lightning", "pytorch/trainer/trainer.py", "Trainer"),
    "checkpoint": ("lightning", "pytorch/callbacks/model_checkpoint.py", "ModelCheckpoint"),
    "lipschitz": ("lit_lipschitz", "callbacks/lipschitz_lr.py", "LipschitzLR"),
}
"""Package, file and class whose arguments are the options below a name."""
_SWITCHES = ("quiet", "json_lines", "json", "curve")
_FIT = ("config", "print_config", "help", "help_all", "seed_everything", "model", "data", *_CLASSES, "optimizer",
        "lr_scheduler", "ckpt_path", "weights_only", "test_after_fit", "fixed_rate", "audit", "matmul_precision",
        "quiet", "json_lines", "no_quiet", "no_json_lines")  # fmt: skip
_MORE = {
    "validate": ("verbose",),
    "test": ("verbose",),
    "predict": ("return_predictions", "output"),
    "explain": ("json",),
    "suggest": ("batches", "curve", "png", "json"),
    "export": ("output", "format"),
    "compare": ("policies", "seeds", "output", "metric", "jobs", "engine", "engine_options", "json"),
}
"""The options of each command beside those of fit."""


@cache
def _arguments(name: str) -> tuple[str, ...]:
    """The arguments of the class behind a name, read from its source; empty if it is not found."""
    package, file, class_name = _CLASSES[name]
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder, file)
        classes = ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else []
        found = [node for node in classes if isinstance(node, ast.ClassDef) and node.name == class_name]
        for node in (part for one in found for part in one.body):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                return tuple(one.arg for one in (*node.args.args[1:], *node.args.kwonlyargs))
    return ()


def known_options(command: str) -> Iterator[str]:
    """The names of a command's options, without those of the classes of data and model."""
    for name in (*_FIT, *_MORE.get(command, ())):
        yield name
        if name in _CLASSES:
            yield from (f"{name}.{argument}" for argument in _arguments(name))


def check_options(command: str, arguments: list[str]) -> None:
    """Refuses an option that is mistyped, and a value without an option.

    Raises:
        ConfigurationError: There is one.
    """
    known = set(known_options(command))
    previous = ""
    for argument in arguments:
        if argument.startswith("--"):
            key = argument[2:].partition("=")[0].rstrip("+")
            name, _, rest = key.partition(".")
            first = rest.partition(".")[0].rstrip("+")
            if name not in known or (name in _CLASSES and _arguments(name) and rest and f"{name}.{first}" not in known
                                     and first != "help"):  # fmt: skip
                raise ConfigurationError(no_such_option(key, known))
        elif not _takes(previous, argument):
            raise ConfigurationError(_without_option(command, argument, previous))
        previous = argument


def _takes(option: str, value: str) -> bool:
    """Whether a word belongs to the one before it."""
    if value.startswith("-") and not value[1:2].isdigit() and value != "-":
        return True  # a short option
    switch = option.removeprefix("--") in _SWITCHES
    return option.startswith("-") and "=" not in option and (not switch or value in ("true", "false", "yes", "no"))


def _without_option(command: str, value: str, previous: str) -> str:
    if is_config(value) or value.endswith((".yaml", ".yml")):
        return f"{command} {value}: expected an option, found a config; write --config {value}"
    after = f" after {previous}" if previous else ""
    return f"{command}: expected an option, found {value!r}{after}; a list is one word, such as [64,32]"


def no_such_option(key: str, known: Iterable[str]) -> str:
    """What is wrong with an option that does not exist."""
    # Names that end in + append to a list.
    close = difflib.get_close_matches(key, [name for name in known if not name.endswith("+")], n=2, cutoff=0.6)
    hint = f"closest: {', '.join(close)}" if close else "lit-lipschitz fit --help_all lists all"
    return f"{key}: no such option; {hint}"
