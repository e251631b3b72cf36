"""The LightningCLI behind `fit`, `validate`, `test` and `predict`, and what becomes of its errors."""

import errno
import logging
import os
import pickle
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn

import lightning as L
import torch
from jsonargparse import ActionYesNo
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden

from lit_lipschitz.callbacks.lipschitz_audit import LipschitzAudit
from lit_lipschitz.callbacks.lipschitz_lr import LipschitzLR
from lit_lipschitz.cli.fit.checkpoints import CheckpointOnSignal, WholeCheckpoints
from lit_lipschitz.cli.fit.outputs import PredictionFile, TensorBoardSummary, hyperparameters
from lit_lipschitz.cli.fit.parser_messages import condense
from lit_lipschitz.cli.fit.progress import EpochLines, Mode, RateBar
from lit_lipschitz.cli.main import fail
from lit_lipschitz.data import ImageDataModule
from lit_lipschitz.errors import ConfigurationError, LitLipschitzError
from lit_lipschitz.module import ImageClassifier

_LOGGERS = ("lightning.pytorch", "lightning.fabric")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line."""

    made: ClassVar[list["OneLineParser"]] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.allow_abbrev = False  # the beginning of an option may be a typing error
        self.made.append(self)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Reports a mistake in the arguments or in a config.

        Raises:
            ConfigurationError: Always.
        """
        known = {option.lstrip("-") for parser in self.made for option in parser._option_string_actions}
        raise ConfigurationError(condense(message, known)) from None


class SaveConfig(SaveConfigCallback):
    """Saves the configuration of a run once it starts, so that one that can't start leaves no folder behind."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Does nothing yet."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves it in the logger's folder; without one there is none that is the run's own."""
        if trainer.logger is not None:
            super().setup(trainer, pl_module, "fit")


class Command(LightningCLI):
    """LightningCLI with the callback under ``lipschitz``, checkpoints under ``checkpoint``, and a test after fit."""

    running = False
    wanted: ClassVar[str | None] = None
    """The subcommand, where it is known before the command line is parsed: the parsers of the others are not built."""
    lines: EpochLines

    @classmethod
    def subcommands(cls) -> dict[str, set[str]]:  # type: ignore[override]
        """The subcommand that is wanted, or all of them."""
        known = LightningCLI.subcommands()
        return {cls.wanted: known[cls.wanted]} if cls.wanted in known else known

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what the command has beyond LightningCLI."""
        parser.add_lightning_class_args(LipschitzLR, "lipschitz")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.filename": "{epoch}"})
        parser.add_argument(
            "--test_after_fit", type=bool, default=True, help="Test the final weights at the end of fit."
        )
        parser.add_argument(
            "--fixed_rate",
            type=bool,
            default=False,
            help="Train at the optimizer's own rate, without LipschitzLR: for baselines.",
        )
        parser.add_argument(
            "--audit", type=int, default=0, help="Audit the gradients every so many optimizer steps of fit; 0 is off."
        )
        parser.add_argument(
            "--matmul_precision",
            type=Literal["highest", "high", "medium"],
            default="highest",
            help="Precision of float32 matrix products, as torch.set_float32_matmul_precision has it: high is TF32.",
        )
        modes = {
            "quiet": "Show warnings, errors and the final result alone.",
            "json_lines": "Print a JSON object an epoch and one at the end of fit on stdout, and nothing else there.",
        }
        for name, meaning in modes.items():
            parser.add_argument(f"--{name}", action=ActionYesNo, nargs="?", default=False, help=meaning)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses, finds the checkpoint, and makes sure that it is one before anybody opens it."""
        super().parse_arguments(parser, args)
        config = self.config[self.config["subcommand"]]
        if config["audit"] < 0:
            raise ConfigurationError(f"--audit {config['audit']}: expected a number of optimizer steps, or 0 for none")
        self.lines = EpochLines(_mode(config))
        path = config.get("ckpt_path")
        if path == "last":
            config["ckpt_path"] = path = str(_newest_checkpoint(Path(config.trainer.default_root_dir or ".")))
        if path == "best":
            raise ConfigurationError("--ckpt_path best: no run of this process has found one; pass last, or a path")
        if path and path not in ("hpc", "registry"):
            check_checkpoint(Path(path))
        if self.config["subcommand"] != "fit":
            if not path:
                print("lit-lipschitz: warning: no --ckpt_path: these are the initial weights", file=sys.stderr)
            if config.trainer.logger is None:
                config.trainer.logger = False  # an evaluation has no curves

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Builds the trainer.

        Raises:
            ConfigurationError: It can't be had as configured, on this machine.
        """
        torch.set_float32_matmul_precision(self._get(self.config, "matmul_precision"))
        self.trainer_defaults = {**self.trainer_defaults, "callbacks": self._output()}
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ImportError, ValueError, TypeError, RuntimeError) as error:
            cause = _sentence(error)
            hint = "change the key that is named"
            if any(word in cause.lower() for word in ("device", "accelerator", "backend", "xla", "not available")):
                hint = (
                    f"this machine has {torch.cuda.device_count()} CUDA devices and {os.cpu_count()} CPU cores: change "
                    "trainer.accelerator or trainer.devices"
                )
            raise ConfigurationError(f"trainer: {cause}; {hint}") from error
        # Some strategies write checkpoints in pieces, by means of their own.
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpoints()
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if self._get(self.config, "fixed_rate"):
            callbacks[:] = [callback for callback in callbacks if not isinstance(callback, LipschitzLR)]
        if every := self._get(self.config, "audit"):
            callbacks.append(LipschitzAudit(every))
        if self.config["subcommand"] == "fit":
            callbacks.append(TensorBoardSummary(hyperparameters(self.config["fit"].as_dict())))
            callbacks.append(CheckpointOnSignal())
        return trainer

    def _output(self) -> list[L.Callback]:
        """What prints and writes, as the options have it; messages go to stderr."""
        config = self._get(self.config_init, "trainer")
        given = config.callbacks if isinstance(config.callbacks, list) else [config.callbacks]
        output: list[L.Callback] = [self.lines, PredictionFile()]
        if config.enable_progress_bar and not any(isinstance(one, ProgressBar) for one in given):
            output.append(RateBar())
        if config.enable_model_summary is not False and not any(isinstance(one, ModelSummary) for one in given):
            output.append(ModelSummary())
        return output

    def after_instantiate_classes(self) -> None:
        """Makes sure that network and data fit; what fails from here on fails at run time."""
        if isinstance(self.model, ImageClassifier) and isinstance(self.datamodule, ImageDataModule):
            self.model.check(self.datamodule.image_shape, self.datamodule.num_classes)
        self.running = True

    def after_fit(self) -> None:
        """Prints the table of the epochs, and tests the final weights on the test set."""
        if self.trainer.is_global_zero:
            self.lines.print_table()
        wanted = self._get(self.config, "test_after_fit") and not self.trainer.interrupted
        loaders = any(is_overridden("test_dataloader", source) for source in (self.model, self.datamodule))
        results: dict[str, float] = {}
        if wanted and loaders and is_overridden("test_step", self.model):
            for found in self.trainer.test(self.model, datamodule=self.datamodule, verbose=False):
                results.update(found)
        if self.trainer.is_global_zero:
            self.lines.print_result(self.trainer, results)


def _mode(config: Any) -> Mode:
    """How much a command prints; has Lightning print no more than that."""
    if config["quiet"] and config["json_lines"]:
        raise ConfigurationError("--quiet and --json_lines: expected one of them")
    if not (config["quiet"] or config["json_lines"]):
        return "lines"
    config.trainer.enable_progress_bar = False
    if config.trainer.enable_model_summary is None:
        config.trainer.enable_model_summary = False
    if config["json_lines"]:
        return "json"
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    return "quiet"


def _newest_checkpoint(root: Path) -> Path:
    found = sorted(root.glob("lightning_logs/*/checkpoints/last*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ConfigurationError(
            f"--ckpt_path last: no run below {root.absolute() / 'lightning_logs'} has left a checkpoint; pass a path"
        )
    return found[-1]


def check_checkpoint(path: Path) -> None:
    """Makes sure that a file is there and is a whole archive, as torch.save writes it.

    Raises:
        ConfigurationError: There is no such file.
        LitLipschitzError: It is something else, or a part.
    """
    if not path.is_file():
        raise ConfigurationError(f"--ckpt_path {path}: {'a folder, not a' if path.is_dir() else 'no such'} file")
    try:
        content = (
            torch.load(path, weights_only=True, map_location="cpu", mmap=True) if zipfile.is_zipfile(path) else None
        )
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError):
        content = None
    if content is None:
        raise LitLipschitzError(f"--ckpt_path {path}: not a checkpoint, or only a part of one; pass another")
    if not isinstance(content, dict) or not {"state_dict", "pytorch-lightning_version"} <= set(content):
        raise LitLipschitzError(f"--ckpt_path {path}: not saved by Lightning; pass a checkpoint of `lit-lipschitz fit`")


def run(
    kind: type[Command] = Command, arguments: list[str] | None = None, report: Callable[[str, int], int] = fail
) -> int:
    """Runs a command line.

    Args:
        kind: The command.
        arguments: The command line; None is that in ``sys.argv``.
        report: Is told the line of an error and the exit code, and returns the exit code.

    Returns:
        The exit code.
    """
    _quieten()
    given = sys.argv[1:] if arguments is None else arguments
    kind = type(kind.__name__, (kind,), {"wanted": given[0] if given else None})
    # LightningCLI runs the command in its constructor; what it has built so far is needed when that fails.
    command = kind.__new__(kind)
    started = time.time()
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    unwritten: list[OSError] = []
    hook = threading.excepthook
    threading.excepthook = lambda found: _take_unwritten(found, unwritten, hook)
    try:
        command.__init__(  # type: ignore[misc]
            model_class=L.LightningModule,
            datamodule_class=None,  # any, or none for a module with loaders of its own
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=OneLineParser,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "callbacks": [],
                "enable_progress_bar": sys.stderr.isatty(),
            },
            auto_configure_optimizers=False,
            args=arguments,
        )
    except SIGTERMException:
        return 143
    except SystemExit as end:
        # Lightning ends a run that SIGINT has interrupted by exit(1).
        interrupted = getattr(getattr(command, "trainer", None), "interrupted", False)
        return 130 if interrupted and end.code == 1 else end.code if isinstance(end.code, int) else 0
    except Exception as error:
        _discard_run(command, started)
        answer = _explain(error, command)
        if answer is None:
            raise
        line, code = answer
        rank = int(os.environ.get("LOCAL_RANK", 0))
        if rank == 0:
            return report(line, code)
        # Every rank finds the same mistake in the configuration; at run time this one may be alone.
        return code if code == 2 else fail(f"[rank {rank}] {line}", code)
    finally:
        threading.excepthook = hook
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
    # TensorBoard's thread writes after the last time that it is asked.
    return report(_no_room(unwritten[0], command), 1) if unwritten else 0


def _take_unwritten(found: Any, unwritten: list[OSError], otherwise: Callable[[Any], object]) -> None:
    """Keeps quiet of what TensorBoard's thread could not write: the next one who writes to it has the same error."""
    if isinstance(found.exc_value, OSError) and type(found.thread).__module__.startswith("tensorboard."):
        unwritten.append(found.exc_value)
    else:
        otherwise(found)


def _no_room(error: OSError, command: Command) -> str:
    trainer = getattr(command, "trainer", None)
    folder = trainer and ((trainer.logger and trainer.logger.log_dir) or trainer.default_root_dir)
    return (
        f"{folder or os.getcwd()}: can't be written: {error.strerror}; make room there or pass another "
        "--trainer.default_root_dir, and go on with --ckpt_path"
    )


def _explain(error: Exception, command: Command) -> tuple[str, int] | None:
    """The line to print and the exit code, or None for what only a traceback can explain."""
    running = command.running
    if isinstance(error, LitLipschitzError):
        return condense(str(error)), 2 if isinstance(error, ConfigurationError) else 1
    if isinstance(error, MisconfigurationException):
        return str(error), 1 if running else 2
    if isinstance(error, (ValueError, TypeError)) and not running:
        return condense(str(error)), 2
    if isinstance(error, OSError) and error.filename is None and error.errno in _NO_ROOM:
        return _no_room(error, command), 1
    if isinstance(error, OSError):
        return f"{error.filename or ''}: {error.strerror or error}".lstrip(": "), 1
    if isinstance(error, RuntimeError) and "Error(s) in loading state_dict" in str(error):
        return _foreign_checkpoint(error), 1
    return None


def _discard_run(command: Command, started: float) -> None:
    """Removes what a run that failed before its first step has left in its folder."""
    trainer = getattr(command, "trainer", None)
    if trainer is None or not trainer.is_global_zero or trainer.global_step or not trainer.logger:
        return
    folder = Path(trainer.logger.log_dir or "")
    if not trainer.logger.log_dir or not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.name.startswith(("events.", "hparams.yaml", "config.yaml")) and path.stat().st_mtime >= started:
            path.unlink()
    for path in (folder, folder.parent):
        with suppress(OSError):
            path.rmdir()


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".!")


def _foreign_checkpoint(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = (lines[1] if len(lines) > 1 else lines[0]).split(", ")[0].rstrip(". ")
    return f"the checkpoint is of another network: {first} and so on; pass the config that it was trained with"


def _quieten() -> None:
    """Silences what Lightning says of its own insides."""
    for message in (
        ".*LeafSpec.*",
        ".*instantiate_classes.*",
        ".*smaller than the logging interval.*",
        ".*does not have many workers.*",
        ".*exists and is not empty.*",
        ".*Total length of `list` across ranks is zero.*",
        ".*The dirpath has changed.*",
        ".*Couldn't infer the batch indices.*",
        ".*args parameter is intended to run from within Python.*",
    ):
        warnings.filterwarnings("ignore", message)
    # Lightning advertises and lists what is absent; errors of one line are to be seen.
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(
            lambda record: (
                not record.getMessage().startswith(
                    (
                        "💡",
                        "TPU available: False",
                        "GPU available: False",
                        "Trainer already configured with model summary",
                    )
                )
            )
        )
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
