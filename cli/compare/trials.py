"""A run of `lit-lipschitz compare`: a fit under a policy and a seed, and what it comes to."""

import contextlib
import gc
import logging
import sys
import traceback
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, DeviceStatsMonitor, LearningRateMonitor, ModelSummary, ProgressBar
from lightning.pytorch.utilities.model_helpers import is_overridden

from lit_lipschitz.cli.compare.optimizer_swap import ExchangeOptimizer
from lit_lipschitz.cli.compare.policies import Policy, needs_exchange
from lit_lipschitz.cli.compare.recorders import FixedRate, Recorder, no_validation
from lit_lipschitz.cli.compare.results_file import Row, finite
from lit_lipschitz.cli.fit.command import Command, OneLineParser, run
from lit_lipschitz.cli.fit.outputs import PredictionFile, TensorBoardSummary
from lit_lipschitz.cli.fit.progress import EpochLines
from lit_lipschitz.errors import ConfigurationError, LitLipschitzError

_PRINTERS = (EpochLines, PredictionFile, ModelSummary, ProgressBar)
_OF_LOGGERS = (TensorBoardSummary, LearningRateMonitor, DeviceStatsMonitor)
_SILENT = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
IDLE = ("logger", "default_root_dir", "enable_checkpointing", "profiler", "log_every_n_steps", *_SILENT)
"""Settings of the trainer that no result depends on."""


@dataclass
class Trial:
    """A run that is to be made, and what it has come to."""

    policy: Policy
    seed: int
    config: str
    metric: str | None
    row: Row | None = None
    error: tuple[str, int] | None = None


class Planned(Exception):
    """Ends the command once its configuration is known."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__("planned")
        self.config = config


class _Fit(Command):
    """A fit that prints nothing, and writes nothing that was not asked for."""

    checkpoints = False

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parses, and turns off what prints and writes."""
        super().parse_arguments(parser, args)
        config = self.config["fit"]
        if config.ckpt_path:
            raise ConfigurationError(
                f"compare --ckpt_path {config.ckpt_path}: every policy begins with the initial weights; leave it out"
            )
        config.test_after_fit, config.audit = False, 0
        for key, value in _SILENT.items():
            config.trainer[key] = value
        self.checkpoints = config.trainer.enable_checkpointing is True
        # The trainer refuses the checkpoint callback, which always comes along, where checkpoints are switched off.
        config.trainer.enable_checkpointing = None
        if config.trainer.logger is None:
            config.trainer.logger = False
        if config.trainer.devices == "auto":
            config.trainer.devices = 1
        _check_devices(config.trainer)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Builds a trainer without the callbacks that print, and those that need a logger or write checkpoints."""
        logging_too = () if self.config["fit"].trainer.logger else _OF_LOGGERS
        unwanted = (*_PRINTERS, *logging_too, *(() if self.checkpoints else (Checkpoint,)))
        trainer = super().instantiate_trainer(**kwargs)
        if trainer.world_size != 1:
            raise ConfigurationError(
                f"compare makes one run after another in one process; found {trainer.world_size}, such as torchrun and "
                "SLURM start: start it alone"
            )
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks[:] = [callback for callback in callbacks if not isinstance(callback, unwanted)]
        return trainer


class Plan(_Fit):
    """Finds out what the configuration is, without building anything."""

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Ends here.

        Raises:
            Planned: Always.
        """
        super().parse_arguments(parser, args)
        raise Planned(self.config["fit"].as_dict())


class _Run(_Fit):
    """A run of a trial."""

    trial: ClassVar[Trial]
    recorder: Recorder

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Builds a trainer that fixes the rate where the policy does, and records."""
        trainer = super().instantiate_trainer(**kwargs)
        rate = self.trial.policy.rate
        self.recorder = Recorder(self.trial.metric, rate)
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if rate is not None:
            positions = self.config["fit"].lipschitz.optimizers
            callbacks.append(FixedRate(rate, [positions] if isinstance(positions, int) else positions))
        if needs_exchange(self.trial.policy, self.config["fit"].model.as_dict()):
            callbacks.insert(0, ExchangeOptimizer(self.trial.policy))
        callbacks.append(self.recorder)
        return trainer

    def after_fit(self) -> None:
        """Validates and tests the final weights, once."""
        recorder, trial = self.recorder, self.trial
        validated = self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        metric = recorder.metric
        if metric is None:
            raise ConfigurationError(no_validation(self.model))
        value = metric.of("val", _merged(validated))
        if value is None or recorder.rates is None:
            raise LitLipschitzError(f"compare: the run of {trial.policy.name} made no step, or no value of its metric")
        loaders = any(is_overridden("test_dataloader", source) for source in (self.model, self.datamodule))
        test = None
        if loaders and is_overridden("test_step", self.model):
            tested = self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
            test = metric.of("test", _merged(tested))
        trial.row = Row(
            trial.policy.name, trial.seed, trial.config, metric.name, value, test, recorder.best, recorder.best_epoch,
            recorder.epochs, *recorder.rates, round(recorder.seconds, 2),
            recorder.diverged or finite(value) is None,
        )  # fmt: skip


def _merged(results: list[Any]) -> dict[str, float]:
    return {name: value for result in results for name, value in result.items()}


def _check_devices(trainer: Any) -> None:
    """Refuses what starts processes: each would make the whole comparison."""
    devices, strategy = str(trainer.devices), str(trainer.strategy)
    single = devices.strip() == "1" or (
        not devices.lstrip("-").isdigit() and len(devices.strip("[], ").split(",")) == 1
    )
    if not single or trainer.num_nodes != 1 or strategy.startswith(("ddp", "fsdp", "deepspeed")):
        raise ConfigurationError(
            f"compare makes one run after another on one device; found devices {devices}, num_nodes "
            f"{trainer.num_nodes} and strategy {strategy}: pass --trainer.devices 1 and --trainer.strategy auto"
        )


def make(trial: Trial, arguments: list[str]) -> int:
    """Makes a run."""

    def note(line: str, code: int) -> int:
        trial.error = (" ".join(line.split()), code)
        return code

    # A scheduler that is handed over to another optimizer has not seen it made.
    warnings.filterwarnings("ignore", r".*optimizer\.step\(\)` has been overridden after learning rate scheduler.*")
    kind = type("TrialRun", (_Run,), {"trial": trial})
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        # What data and modules print is not part of the answer.
        with contextlib.redirect_stdout(sys.stderr):
            return run(kind, arguments, note)
    except Exception as error:
        traceback.print_exc()
        return note(f"{type(error).__name__}: {error}", 1)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        OneLineParser.made.clear()
        gc.collect()  # a trainer and what it refers to form cycles, which would hold the device's memory
