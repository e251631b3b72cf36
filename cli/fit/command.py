"""The LightningCLI behind `fit`, `validate`, `test` and `predict`; turns its errors into one line and an exit code."""

import contextlib
import importlib
import io
import logging
import os
import re
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn

import lightning as L
import torch
import yaml
from jsonargparse import ActionYesNo, Namespace, get_loader, set_loader
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden

from lit_lipschitz.callbacks.lipschitz_audit import LipschitzAudit
from lit_lipschitz.callbacks.lipschitz_lr import LipschitzLR
from lit_lipschitz.callbacks.trainer_facts import callbacks_of
from lit_lipschitz.cli.configs import check_value
from lit_lipschitz.cli.fit.callbacks import remove_callbacks
from lit_lipschitz.cli.fit.checkpoints import WholeCheckpoints, check_checkpoint, newest_checkpoint
from lit_lipschitz.cli.fit.epoch_lines import EpochLines, Mode
from lit_lipschitz.cli.fit.error_messages import condense, explain_error, no_room
from lit_lipschitz.cli.fit.first_rank import end_with_first_rank
from lit_lipschitz.cli.fit.predictions import PredictionFile
from lit_lipschitz.cli.fit.progress_bar import RateBar
from lit_lipschitz.cli.fit.run_folders import RunFolders
from lit_lipschitz.cli.fit.signals import CheckpointOnSignal
from lit_lipschitz.cli.fit.tensorboard_summary import TensorBoardSummary
from lit_lipschitz.cli.output import fail, free_path, printable
from lit_lipschitz.data import DigitsDataModule, ImageDataModule
from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.module import ImageClassifier
from lit_lipschitz.processes import check_processes

_LOGGERS = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
_OPTIONS: dict[str, tuple[Any, Any, str]] = {
    "test_after_fit": (bool, True, "Test the final weights at the end of fit."),
    "fixed_rate": (bool, False, "Train at the optimizer's own learning rate, without LipschitzLR, as a baseline."),
    "audit": (int, 0, "Compare the gradient of each layer with L every N optimizer steps of fit; 0 is off."),
    "matmul_precision": (
        Literal["highest", "high", "medium"],
        "highest",
        "Precision of float32 matrix products (torch.set_float32_matmul_precision); high is TF32.",
    ),
}
"""Type, default and meaning."""
_LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "num_sanity_val_steps": -1,
}
"""Settings of the trainer that it takes without a look, with the smallest value that has a meaning."""
_SWITCHES = {
    "quiet": "Print only warnings, errors and the final result.",
    "json_lines": "Print only JSON on stdout: an object for each epoch and one at the end of fit.",
}


def _load_value(text: str) -> Any:
    """Reads a value as the parser does, unless it is made to take much memory or time."""
    check_value(text)
    return _load_yaml(text)


_load_yaml = get_loader("yaml")
set_loader("yaml", _load_value, (yaml.YAMLError,))
# The name of a network is a string of a type of its own.
yaml.SafeDumper.add_multi_representer(str, yaml.representer.SafeRepresenter.represent_str)


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line."""

    made: ClassVar["weakref.WeakSet[OneLineParser]"] = weakref.WeakSet()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.allow_abbrev = False  # an abbreviation may be a typing error
        self.made.add(self)

    def format_help(self, *formatter: Any) -> str:
        """The help text with the docstrings' markup removed."""
        return re.sub(r":\w+:`~?([^`]*)`", r"\1", super().format_help(*formatter)).replace("``", "'")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Reports a mistake in the arguments or in a config.

        Raises:
            ConfigurationError: Always.
        """
        options = {"config", "print_config", "help"}
        options.update(*(parser.get_defaults(skip_validation=True).keys() for parser in self.made))
        raise ConfigurationError(condense(message, options)) from None


class SaveConfig(SaveConfigCallback):
    """Saves the configuration when the run starts, so that a run that can't start leaves no folder behind."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Does nothing yet."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves it in the run's folder, beside that of an earlier run; without a logger a run has no folder."""
        checkpoints: Any = trainer.checkpoint_callback
        folder = trainer.logger.log_dir if trainer.logger is not None else None
        if trainer.logger is not None and folder is None and checkpoints is not None and checkpoints.dirpath:
            folder = str(Path(checkpoints.dirpath).parent)  # of a logger that keeps its own files elsewhere
        # Lightning's own method knows no other folder than that of the logger.
        if folder is not None and trainer.is_global_zero:
            Path(folder).mkdir(parents=True, exist_ok=True)
            path = str(free_path(Path(folder, self.config_filename)).absolute())
            self.parser.save(self.config, path, skip_none=False, overwrite=self.overwrite, multifile=self.multifile)


class Command(LightningCLI):
    """LightningCLI with LipschitzLR under ``lipschitz``, checkpoints under ``checkpoint``, and a test after fit.

    LightningCLI parses, builds and runs everything in its constructor; here :meth:`start` does.
    """

    lines: EpochLines

    def __init__(self) -> None:
        self.running = False  # whether the configuration has been accepted
        self.folders = RunFolders()
        self._subcommand = ""

    def start(self, arguments: list[str]) -> None:
        """Runs a command line."""
        self._subcommand = arguments[0] if arguments else ""
        super().__init__(
            model_class=L.LightningModule,
            datamodule_class=None,  # any, or none for a module with loaders of its own
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_kwargs={"prog": "lit-lipschitz"},
            parser_class=OneLineParser,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"callbacks": []},
            auto_configure_optimizers=False,
            args=arguments,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the subcommand of the command line, so that the parsers of the others are not built."""
        known = LightningCLI.subcommands()
        return {self._subcommand: known[self._subcommand]} if self._subcommand in known else known

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the options that LightningCLI does not have."""
        parser.add_lightning_class_args(LipschitzLR, "lipschitz")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.filename": "{epoch}"})
        for name, (kind, default, meaning) in _OPTIONS.items():
            parser.add_argument(f"--{name}", type=kind, default=default, help=meaning)
        for name, meaning in _SWITCHES.items():
            parser.add_argument(f"--{name}", action=ActionYesNo, nargs="?", default=False, help=meaning)

    @property
    def options(self) -> Any:
        """The parsed configuration of the subcommand."""
        return self.config[self.config["subcommand"]]

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses, and finds and checks the checkpoint before anything opens it."""
        super().parse_arguments(parser, args)
        config = self.options
        _check_ranges(config, fits=self.config["subcommand"] == "fit")
        self.lines = EpochLines(_mode(config))
        path = config.get("ckpt_path")
        if path == "":
            raise ConfigurationError("--ckpt_path: expected a path, or last, found an empty text")
        if path == "last":
            config["ckpt_path"] = path = str(newest_checkpoint(Path(config.trainer.default_root_dir or ".")))
        if self.config["subcommand"] != "fit":
            if not path:
                raise ConfigurationError(
                    f"{self.config['subcommand']} expected --ckpt_path and found none; pass last for the newest run, "
                    "the path of a checkpoint, or initial for the weights before training"
                )
            if path == "initial":
                config["ckpt_path"] = path = None
            if config.trainer.logger is None:
                config.trainer.logger = False  # an evaluation has no curves
        if path == "best":
            raise ConfigurationError("--ckpt_path best: this process has trained nothing yet; pass last, or a path")
        if path and path not in ("hpc", "registry"):
            check_checkpoint(Path(path))

    def before_instantiate_classes(self) -> None:
        """Gives a network that is named, and the mixing of batches, the classes and the channels of the data."""
        config = self.options
        model, data = config.get("model"), _class_of(config.get("data"))
        arguments = model.get("init_args") if model else None
        if not arguments or data is None:
            return
        if isinstance(name := arguments.get("network"), str):
            own = Namespace(name=str(name), num_classes=None, in_channels=None, pretrained=False)  # type: ignore[no-untyped-call]
            arguments.network = Namespace(class_path="lit_lipschitz.named_network", init_args=own)  # type: ignore[no-untyped-call]
        channels, classes = getattr(data, "image_shape", (None,))[0], getattr(data, "num_classes", None)
        known = {"num_classes": classes, "in_channels": channels}
        for key in ("network", "mix"):
            for inner, value in known.items():
                given = getattr(arguments.get(key), "init_args", {})
                if inner in given and given[inner] is None:
                    given[inner] = value

    def _parse_ckpt_path(self) -> None:
        """Does nothing: a class and its arguments come from configs and command line, never from a checkpoint."""

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Builds the trainer.

        Raises:
            ConfigurationError: It can't be built as configured on this machine.
        """
        torch.set_float32_matmul_precision(self.options.matmul_precision)
        self.trainer_defaults = {**self.trainer_defaults, "callbacks": self.output_callbacks()}
        kwargs = {"enable_progress_bar": self._shows_bar(), **kwargs}
        if self.options.trainer.enable_checkpointing is False:
            kwargs["enable_checkpointing"] = None  # the trainer would refuse the command's ModelCheckpoint
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ImportError, ValueError, TypeError, RuntimeError) as error:
            cause = " ".join(str(error).split()).rstrip(".!")
            hint = "change the key that is named"
            if any(word in cause.lower() for word in ("device", "accelerator", "backend", "xla", "not available")):
                hint = (
                    f"this machine has {torch.cuda.device_count()} CUDA devices and {os.cpu_count()} CPU cores: change "
                    "trainer.accelerator or trainer.devices"
                )
            raise ConfigurationError(f"trainer: {cause}; {hint}") from error
        # Some strategies write checkpoints in pieces, with a plugin of their own.
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpoints()
        if self.options.fixed_rate:
            remove_callbacks(trainer, LipschitzLR)
        if self.options.trainer.enable_checkpointing is False:
            remove_callbacks(trainer, ModelCheckpoint)
        if self.options.audit:
            callbacks_of(trainer).append(LipschitzAudit(self.options.audit))
        if self.config["subcommand"] == "fit":
            callbacks_of(trainer).extend([TensorBoardSummary(self.options.as_dict()), CheckpointOnSignal()])
        return trainer

    def output_callbacks(self) -> list[L.Callback]:
        """The callbacks that print and write, as the options have it."""
        config = self._get(self.config_init, "trainer")
        given = config.callbacks if isinstance(config.callbacks, list) else [config.callbacks]
        output: list[L.Callback] = [self.lines, PredictionFile()]
        if self._shows_bar() and not any(isinstance(one, ProgressBar) for one in given):
            output.append(RateBar())
        if config.enable_model_summary is not False and not any(isinstance(one, ModelSummary) for one in given):
            output.append(ModelSummary())
        return output

    def _shows_bar(self) -> bool:
        """Whether there is a bar: on a terminal, if the configuration, which may be a saved one, leaves it open."""
        wanted = self._get(self.config_init, "trainer").enable_progress_bar
        return sys.stderr.isatty() if wanted is None else bool(wanted)

    def after_instantiate_classes(self) -> None:
        """Checks that network and data fit together; errors after this are errors at run time."""
        if isinstance(self.model, ImageClassifier) and isinstance(self.datamodule, ImageDataModule):
            self.model.check(self.datamodule.image_shape, self.datamodule.num_classes)
        for name, parameter in self.model.named_parameters():
            if not torch.nn.parameter.is_lazy(parameter) and not parameter.numel():
                raise ConfigurationError(
                    f"model: expected sizes of at least 1, found {tuple(parameter.shape)} for the parameter {name!r}"
                )
        settings = (self.options.get("data") or {}).get("init_args", {})
        if isinstance(self.datamodule, DigitsDataModule) and settings.get("data_dir") is not None:
            ignored = f"data.data_dir={settings['data_dir']} is not used: the digits come with scikit-learn"
            print(f"lit-lipschitz: warning: {ignored}", file=sys.stderr)
        self.running = True

    def before_fit(self) -> None:
        """Reserves the folders that the run writes into."""
        if self.trainer.is_global_zero:
            fits = self.config["subcommand"] == "fit"
            self.folders.claim(self.trainer, checkpoints=fits)
            if fits:
                self.lines.print_start(self.trainer)

    before_validate = before_test = before_predict = before_fit

    def after_fit(self) -> None:
        """Tests the final weights."""
        results = self.test_results() if self.options.test_after_fit and not self.trainer.interrupted else {}
        if self.trainer.is_global_zero:
            self.lines.print_result(self.trainer, results)

    def after_validate(self) -> None:
        """Prints the metrics, as fit does."""
        if self.trainer.is_global_zero:
            metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
            self.lines.print_result(self.trainer, metrics)

    after_test = after_validate

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Lightning's arguments, without the table that it prints."""
        silent = {"verbose": False} if subcommand in ("validate", "test") else {}
        return {**super()._prepare_subcommand_kwargs(subcommand), **silent}

    def test_results(self) -> dict[str, float]:
        """The metrics on the test set; empty where module or data have no test."""
        loaders = any(is_overridden("test_dataloader", source) for source in (self.model, self.datamodule))
        if not loaders or not is_overridden("test_step", self.model):
            return {}
        return merge(self.trainer.test(self.model, datamodule=self.datamodule, verbose=False))


def _class_of(config: Any) -> Any:
    """The class that a part of the configuration names, or None."""
    module, _, name = (config or {}).get("class_path", "").rpartition(".")
    return getattr(importlib.import_module(module), name, None) if module else None


def _check_ranges(config: Any, fits: bool) -> None:
    """Refuses numbers that Lightning takes without a look."""
    if config["audit"] < 0:
        raise ConfigurationError(f"--audit {config['audit']}: expected a number of optimizer steps, or 0 for none")
    for name, least in _LEAST.items():
        value = config.trainer.get(name)
        if isinstance(value, (int, float)) and not value >= least:
            raise ConfigurationError(f"trainer.{name}={value}: expected at least {least}")
    # Lightning would start them all.
    devices = str(config.trainer.get("devices")).strip()
    if devices.isdecimal() and _uses_cpu(config.trainer.get("accelerator")):
        check_processes("trainer.devices", int(devices))
    for name in ("max_epochs", "max_steps"):
        if fits and config.trainer.get(name) == 0:
            raise ConfigurationError(f"trainer.{name}=0 trains nothing: expected at least 1, or -1 for no limit")


def _uses_cpu(accelerator: Any) -> bool:
    """Whether the trainer runs on the CPU, where it starts as many processes as it has devices."""
    others = torch.cuda.is_available() or torch.backends.mps.is_available()
    return accelerator == "cpu" or (accelerator == "auto" and not others)


def merge(results: list[Any]) -> dict[str, float]:
    """The metrics of all loaders."""
    return {name: value for result in results for name, value in result.items()}


def _mode(config: Any) -> Mode:
    """How much a command prints; turns down Lightning's own messages to that."""
    if config["quiet"] and config["json_lines"]:
        raise ConfigurationError("--quiet and --json_lines: expected one of them")
    if not (config["quiet"] or config["json_lines"]):
        return "lines"
    config.trainer.enable_progress_bar = False
    if config.trainer.enable_model_summary is None:
        config.trainer.enable_model_summary = False
    if config["json_lines"]:
        return "json"
    silence_lightning()
    return "quiet"


def silence_lightning() -> None:
    """Hides Lightning's messages below warnings."""
    for logger in _LOGGERS:
        logger.setLevel(logging.WARNING)


def run(
    kind: Callable[[], Command] = Command,
    arguments: list[str] | None = None,
    report: Callable[[str, int], int] = fail,
) -> int:
    """Runs a command line.

    Args:
        kind: Makes the command.
        arguments: The command line; None is that in ``sys.argv``.
        report: Called with the line of an error and the exit code; returns the exit code.

    Returns:
        The exit code.
    """
    end_with_first_rank()
    command = kind()
    unwritten: list[OSError] = []
    with _filtered_messages(), _failures_of_tensorboard(unwritten):
        try:
            command.start(sys.argv[1:] if arguments is None else arguments)
        except SIGTERMException:
            return 143
        except SystemExit as end:
            # Lightning ends a run that SIGINT has interrupted by exit(1).
            trainer = _trainer(command)
            interrupted = trainer is not None and trainer.interrupted and end.code == 1
            return 130 if interrupted else end.code if isinstance(end.code, int) else 0
        except Exception as error:
            if not getattr(_trainer(command), "global_step", 0):
                command.folders.undo()
            answer = explain_error(error, command.running, _folder(command))
            if answer is None:
                raise
            line, code = answer
            rank = int(os.environ.get("LOCAL_RANK", 0))
            if rank == 0:
                return report(line, code)
            # Every rank finds a mistake in the configuration; at run time this one may be alone.
            return code if code == 2 else fail(f"[rank {rank}] {line}", code)
        finally:
            command.folders.release()
    return report(no_room(unwritten[0], _folder(command)), 1) if unwritten else 0


def _trainer(command: Command) -> L.Trainer | None:
    """The trainer of a command, which may have failed before it was built."""
    return getattr(command, "trainer", None)


def _folder(command: Command) -> str:
    """Where a command writes."""
    trainer = _trainer(command)
    logged = trainer.logger.log_dir if trainer and trainer.logger else None
    return logged or (trainer.default_root_dir if trainer else os.getcwd())


@contextlib.contextmanager
def _failures_of_tensorboard(unwritten: list[OSError]) -> Iterator[None]:
    """Collects the errors of TensorBoard's writing thread, which otherwise prints a traceback.

    They surface in the main thread at its next write, or, after the last one, never.
    """
    hook = threading.excepthook

    def collect(failure: Any) -> None:
        if isinstance(failure.exc_value, OSError) and type(failure.thread).__module__.startswith("tensorboard."):
            unwritten.append(failure.exc_value)
        else:
            hook(failure)

    threading.excepthook = collect
    try:
        yield
    finally:
        threading.excepthook = hook


@contextlib.contextmanager
def _filtered_messages() -> Iterator[None]:
    """Hides messages of Lightning that are about its own internals, and restores the levels of its loggers."""
    for message in (
        "LeafSpec",
        "instantiate_classes",
        "smaller than the logging interval",
        "does not have many workers",
        "exists and is not empty",
        "Total length of `list` across ranks is zero",
        "The dirpath has changed",
        "Couldn't infer the batch indices",
        "args parameter is intended to run from within Python",
    ):
        warnings.filterwarnings("ignore", f".*{message}.*")
    with_place = warnings.formatwarning
    warnings.formatwarning = _one_line  # type: ignore[assignment]
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_is_of_use)
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    levels = [logger.level for logger in _LOGGERS]
    handlers = [one for logger in _LOGGERS for one in logger.handlers if type(one) is logging.StreamHandler]
    streams = [handler.setStream(_CurrentStderr()) for handler in handlers]
    try:
        yield
    finally:
        warnings.formatwarning = with_place
        for handler, stream in zip(handlers, streams, strict=True):
            handler.setStream(stream or sys.stderr)
        for logger, level in zip(_LOGGERS, levels, strict=True):
            logger.setLevel(level)


def _one_line(message: Warning | str, *_: Any) -> str:
    """A warning as the command prints it, without the place in the code where it was raised."""
    return f"lit-lipschitz: warning: {printable(' '.join(str(message).split()))}\n"


class _CurrentStderr(io.TextIOBase):
    """What ``sys.stderr`` is now: while a progress bar is shown, rich's, which writes above it."""

    def write(self, text: str) -> int:
        """Writes there."""
        return sys.stderr.write(text)


def _is_of_use(record: logging.LogRecord) -> bool:
    """Whether a log message is neither an advertisement nor about devices that are absent."""
    useless = ("💡", "TPU available: False", "GPU available: False", "Trainer already configured with model summary",
               "Loading `train_dataloader`", "`weights_only` was not set")  # fmt: skip
    return not record.getMessage().startswith(useless)
