"""Writes config.md, the page of all keys of a config, from the signatures and docstrings of the configured classes.

python docs/reference/config_page.py
"""

import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import docstring_parser
import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lit_lipschitz
from lit_lipschitz.cli.fit.command import Command, OneLineParser
from lit_lipschitz.data import ImageDataModule

PAGE = Path(__file__).with_name("config.md")
START = """\
# Every key of a config

The keys of a YAML file for `lit-lipschitz fit`, and their meaning. Each key is also an option of the command:
`bound: smooth` below `lipschitz:` in a file is `--lipschitz.bound smooth` on the command line. The command line
overrides files, and a later file overrides an earlier one. `lit-lipschitz fit --config digits.yaml --print_config`
prints the whole config of a run. Arguments in Python, as in `LipschitzLR(bound="smooth")`, have the same names as the
keys.

`python docs/reference/config_page.py` writes this page from signatures and docstrings; a test compares them.
"""
TOP = """
## The run
"""
TOP_KEYS = {
    "seed_everything": (
        "bool or int",
        "True",
        "Seed of all random numbers; true uses the environment variable `PL_GLOBAL_SEED`, or 0.",
    ),
    "ckpt_path": (
        "str or null",
        "null",
        "Checkpoint to resume from; `last` is the last one of the newest run below `lightning_logs`.",
    ),
}
GROUPS: list[tuple[str, type, str]] = [
    ("lipschitz", lit_lipschitz.LipschitzLR, "The callback: the arguments of `LipschitzLR`."),
    (
        "model",
        lit_lipschitz.ImageClassifier,
        "`model.class_path` is any LightningModule, `model.init_args` its arguments (`--model.width 64` for short). "
        "Below are those of `lit_lipschitz.ImageClassifier`, which the bundled configs train. `optimizer` and "
        "`scheduler` are classes of torch or your own, given by `class_path` and `init_args`; parameters and "
        "optimizer are filled in.",
    ),
    ("model.network", lit_lipschitz.MLP, "With `class_path: lit_lipschitz.MLP`; every `torch.nn.Module` works."),
    ("model.network", lit_lipschitz.MNISTCNN, "With `class_path: lit_lipschitz.MNISTCNN`."),
    ("model.network", lit_lipschitz.ResNetV1, "With `class_path: lit_lipschitz.ResNetV1`."),
    ("model.network", lit_lipschitz.ResNetV2, "With `class_path: lit_lipschitz.ResNetV2`."),
    ("model.network", lit_lipschitz.ResNet9, "With `class_path: lit_lipschitz.ResNet9`."),
    ("model.network", lit_lipschitz.DenseNet, "With `class_path: lit_lipschitz.DenseNet`."),
    ("model.scheduler", lit_lipschitz.LinearWarmupDecay, "With `class_path: lit_lipschitz.LinearWarmupDecay`."),
    ("model.scheduler", lit_lipschitz.TimeDecay, "With `class_path: lit_lipschitz.TimeDecay`."),
    (
        "data",
        ImageDataModule,
        "`data.class_path` is any LightningDataModule; leave it out if the module has its own loaders. "
        "Below are the arguments of the bundled ones: `DigitsDataModule`, `MNISTDataModule`, `FashionMNISTDataModule`, "
        "`CIFAR10DataModule` and `CIFAR100DataModule`, all of `lit_lipschitz`.",
    ),
]
OTHERS: list[tuple[str, type, str]] = [
    (
        "model.optimizer",
        torch.optim.SGD,
        "With `class_path: torch.optim.SGD`; other optimizers of torch are configured in the same way "
        "([documentation](https://docs.pytorch.org/docs/stable/optim.html)). `lit_lipschitz.ZeroStartSGD` has the same "
        "arguments. The callback sets the learning rate, so the size of `lr` has no effect, except with "
        "[`fixed_rate`](#fixed_rate).",
    ),
    (
        "checkpoint",
        ModelCheckpoint,
        "The arguments of [ModelCheckpoint](https://lightning.ai/docs/pytorch/stable/api/"
        "lightning.pytorch.callbacks.ModelCheckpoint.html), where they are explained; `save_last` and `filename` "
        "have the command's own defaults.",
    ),
    (
        "trainer",
        L.Trainer,
        "The arguments of [Trainer](https://lightning.ai/docs/pytorch/stable/api/"
        "lightning.pytorch.trainer.trainer.Trainer.html), where they are explained. "
        "`callbacks` are added to the command's own.",
    ),
]
CHANGED = {"checkpoint.save_last": "true", "checkpoint.filename": '"{epoch}"'}
FILLED_IN = {torch.optim.Optimizer: "params", torch.optim.lr_scheduler.LRScheduler: "optimizer"}


def _plain(text: str) -> str:
    """A docstring's text as Markdown: no roles, no double backquotes, in one paragraph."""
    text = re.sub(r":math:`([^`]*)`", r"`\1`", text)
    text = re.sub(r":\w+:`~?(?:lit_lipschitz\.)?([^`]*)`", r"`\1`", text)
    text = re.sub(r"\bNone\b", "null", text.replace("``", "`"))
    return " ".join(text.split())


def _kind(annotation: Any) -> str:
    if isinstance(annotation, type):
        return annotation.__name__
    choices = [choice for choice in get_args(annotation) if isinstance(choice, str)]
    if choices and len(choices) == len(get_args(annotation)):
        return ", ".join(f"`{choice}`" for choice in choices)
    text = re.sub(
        r"\b(?:typing|torch\.nn\.modules\.module|collections\.abc|torch\.optim\.optimizer)\.", "", str(annotation)
    )
    if "Callable" in text:
        return "a class by `class_path` and `init_args`" + (" or null" if text.endswith("None") else "")
    text = re.sub(r"Optional\[(.*)\]$", r"\1 | None", text).replace("jsonargparse.NetworkName", "str")
    text = re.sub(r"Union\[(.*)\]$", lambda match: match[1].replace(", ", " | "), text)
    parts = re.sub(r"Literal\[([^\]]*)\]", lambda match: match[1].replace(", ", " | "), text).split(" | ")
    return " or ".join("null" if part == "None" else part.strip("'") for part in parts)


def _default(parameter: inspect.Parameter) -> str:
    if parameter.default is inspect.Parameter.empty:
        return "none, it is required"
    if callable(parameter.default):
        return _plain((parameter.default.__doc__ or parameter.default.__name__).splitlines()[0]).rstrip(".")
    names = {None: "null", True: "true", False: "false"}
    value = parameter.default
    return f"`{names[value] if value is None or isinstance(value, bool) else value}`"


def _parameters(kind: type) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(kind.__init__).parameters
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        parameters = {**inspect.signature(kind.__mro__[1].__init__).parameters, **parameters}  # type: ignore[misc]
    left_out = {"self", *(name for base, name in FILLED_IN.items() if issubclass(kind, base))}
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {name: one for name, one in parameters.items() if name not in left_out and one.kind not in variable}


def _section(key: str, kind: str, default: str, meaning: str) -> str:
    if meaning[1:2] != ",":  # which follows a symbol
        meaning = meaning[:1].upper() + meaning[1:]
    return f"\n### `{key}`\n\n{_fill(meaning)}\n\n{_fill(f'Value: {kind}. Default: {default}.')}\n"


def _fill(text: str) -> str:
    return textwrap.fill(text, 128, break_long_words=False, break_on_hyphens=False)


def _group(prefix: str, kind: type, introduction: str, repeated: bool) -> Iterator[str]:
    yield f"\n## `{prefix}`{': ' + kind.__name__ if repeated else ''}\n\n{_fill(introduction)}\n"
    meanings: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        parsed = docstring_parser.parse(inspect.cleandoc(base.__doc__ or "")).params if base is not object else []
        meanings.update({one.arg_name: _plain(one.description or "") for one in parsed})
    for name, parameter in _parameters(kind).items():
        if name not in meanings:
            raise KeyError(f"the docstring of {kind.__name__} says nothing of {name}")
        key = f"{prefix}.{name}" + (f" ({kind.__name__})" if repeated else "")
        yield _section(key, _kind(parameter.annotation), _default(parameter), meanings[name])


def _top() -> Iterator[str]:
    yield TOP
    for key, (kind, default, meaning) in TOP_KEYS.items():
        yield _section(key, kind, f"`{default.lower()}`", meaning)
    parser = OneLineParser()
    Command.add_arguments_to_parser(Command.__new__(Command), parser)
    for action in parser._actions:
        if "." not in action.dest and action.dest not in ("help", "lipschitz", "checkpoint", "config"):
            yield _section(
                action.dest, type(action.default).__name__, f"`{str(action.default).lower()}`", str(action.help)
            )


def _table(prefix: str, kind: type, introduction: str) -> Iterator[str]:
    yield f"\n## `{prefix}`\n\n{_fill(introduction)}\n\n| key | default |\n|---|---|\n"
    for name, parameter in _parameters(kind).items():
        key = f"{prefix}.{name}"
        default = f"`{CHANGED[key]}`" if key in CHANGED else _default(parameter)
        yield f"| `{key}` | {default} |\n"


def page(others: bool = True) -> str:
    """The page.

    Args:
        others: With the tables of torch's and Lightning's own keys, which depend on their versions.
    """
    parts = [START, *_top()]
    prefixes = [prefix for prefix, _, _ in GROUPS]
    for prefix, kind, introduction in GROUPS:
        parts += _group(prefix, kind, introduction, prefixes.count(prefix) > 1)
    for prefix, kind, introduction in OTHERS if others else []:
        parts += _table(prefix, kind, introduction)
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
