"""`lit-lipschitz export`: a checkpoint's network and its preprocessing as one file."""

import contextlib
import sys
from pathlib import Path

import torch

from lit_lipschitz.cli.check_config import BuildOnly
from lit_lipschitz.cli.configs import resolve_configs
from lit_lipschitz.cli.fit.checkpoints import check_checkpoint, newest_checkpoint
from lit_lipschitz.cli.fit.command import run
from lit_lipschitz.cli.help import OptionParser
from lit_lipschitz.cli.output import locked, write_whole
from lit_lipschitz.data import ImageDataModule
from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.models.exported import Classifier, Format, exported
from lit_lipschitz.module import ImageClassifier


class _Load(BuildOnly):
    """Builds what a config names, with the weights of a checkpoint."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def _run_subcommand(self, subcommand: str) -> None:
        if not isinstance(self.model, ImageClassifier) or not isinstance(self.datamodule, ImageDataModule):
            raise ConfigurationError("export: expected ImageClassifier and bundled data; use torch.export for others")
        state = torch.load(self.path, weights_only=True, map_location="cpu")["state_dict"]
        self.model.load_state_dict(state)
        self.classifier = Classifier(self.model.network, *self.datamodule.normalisation())


def export(arguments: list[str]) -> int:
    """Runs the command with the arguments after its name.

    Returns:
        The exit code.

    Raises:
        ConfigurationError: The config does not fit, or the file exists.
    """
    parser = OptionParser("export")
    parser.add_argument("--ckpt_path", required=True)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--format", choices=["pt2", "onnx"])
    options, rest = parser.parse_known_args(arguments)
    path = newest_checkpoint(Path()) if options.ckpt_path == "last" else Path(options.ckpt_path)
    check_checkpoint(path)
    suffix = options.output.suffix.lstrip(".") if options.output else ""
    kind: Format = options.format or ("onnx" if suffix == "onnx" else "pt2")
    target = options.output or Path(f"{path.stem}.{kind}")
    if target.exists():
        raise ConfigurationError(f"export: {target} exists and is kept; pass another --output")
    if not any(one.split("=")[0] in ("--config", "-c") for one in rest):
        rest = ["--config", _saved_config(path), *rest]
    command = _Load(path)
    code = run(lambda: command, ["fit", *resolve_configs(rest)])
    if code:
        return code
    with contextlib.redirect_stdout(sys.stderr):  # the exporter's own words
        content = exported(command.classifier, command.datamodule.image_shape, kind)
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target):
        write_whole(target, content)
    print(f"{target}: uint8 pixels of shape (batch, {', '.join(map(str, command.datamodule.image_shape))}) to "
          f"probabilities of {command.datamodule.num_classes} classes")  # fmt: skip
    return 0


def _saved_config(path: Path) -> str:
    """The config that fit has saved in the folder of the run."""
    found = sorted(path.absolute().parent.parent.glob("config*.yaml"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise ConfigurationError(f"export --ckpt_path {path}: there is no config.yaml beside it; pass --config")
    return str(found[-1])
