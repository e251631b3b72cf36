"""One run of `lit-lipschitz compare`: a fit under a policy and a seed, and its result."""

import contextlib
import functools
import gc
import math
import sys
import traceback
import warnings
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, DeviceStatsMonitor, LearningRateMonitor, ModelSummary

from lit_lipschitz.cli.compare.fixed_rate import FixedRate
from lit_lipschitz.cli.compare.optimizer_swap import SwapOptimizer
from lit_lipschitz.cli.compare.policies import Policy, needs_swap
from lit_lipschitz.cli.compare.recorder import Recorder, no_validation
from lit_lipschitz.cli.compare.results_file import Row
from lit_lipschitz.cli.fit.callbacks import callbacks_of, remove_callbacks
from lit_lipschitz.cli.fit.command import Command, merge, run, silence_lightning
from lit_lipschitz.errors import ConfigurationError, LitLipschitzError

_SILENT = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
WITHOUT_EFFECT = ("logger", "default_root_dir", "enable_checkpointing", "profiler", "log_every_n_steps", *_SILENT)
"""Settings of the trainer on which no result depends."""


@dataclass
class Trial:
    """A run to make, and its result: a row, or an error's line and exit code, or nothing if it was interrupted."""

    policy: Policy
    seed: int
    config: str
    metric: str | None
    row: Row | None = None
    error: tuple[str, int] | None = None


class Parsed(Exception):
    """Ends a command once its configuration is known."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config


class _Fit(Command):
    """A fit that prints nothing, and writes only what was asked for."""

    checkpoints = False

    def start(self, arguments: list[str]) -> None:
        """Runs a command line."""
        silence_lightning()
        super().start(arguments)

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parses, and turns off what prints and writes."""
        super().parse_arguments(parser, args)
        config = self.options
        if config.ckpt_path:
            raise ConfigurationError(
                f"compare --ckpt_path {config.ckpt_path}: every policy begins with the initial weights; leave it out"
            )
        config.test_after_fit, config.audit = False, 0
        for key, value in _SILENT.items():
            config.trainer[key] = value
        self.checkpoints = config.trainer.enable_checkpointing is True
        # With False the trainer would refuse the checkpoint callback, which the command always has.
        config.trainer.enable_checkpointing = None
        if config.trainer.logger is None:
            config.trainer.logger = False
        if config.trainer.devices == "auto":
            config.trainer.devices = 1
        _check_devices(config.trainer)

    def output_callbacks(self) -> list[L.Callback]:
        """Nothing is printed."""
        return []

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Builds a trainer without the callbacks that print, need a logger that is off, or write checkpoints."""
        trainer = super().instantiate_trainer(**kwargs)
        if trainer.world_size != 1:
            raise ConfigurationError(
                f"compare makes one run after another in one process; found {trainer.world_size}, such as torchrun and "
                "SLURM start: start it alone"
            )
        remove_callbacks(trainer, ModelSummary)
        if not trainer.loggers:
            remove_callbacks(trainer, LearningRateMonitor, DeviceStatsMonitor)
        if not self.checkpoints:
            remove_callbacks(trainer, Checkpoint)
        return trainer


class ParseOnly(_Fit):
    """Parses the configuration and builds nothing."""

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Ends here.

        Raises:
            Parsed: Always.
        """
        super().parse_arguments(parser, args)
        raise Parsed(self.options.as_dict())


class _Run(_Fit):
    """The fit of a trial."""

    recorder: Recorder

    def __init__(self, trial: Trial) -> None:
        super().__init__()
        self.trial = trial

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Builds a trainer with the policy's optimizer and rate."""
        trainer = super().instantiate_trainer(**kwargs)
        policy = self.trial.policy
        self.recorder = Recorder(self.trial.metric, policy.rate)
        if needs_swap(policy, self.options.model.as_dict()):
            callbacks_of(trainer).insert(0, SwapOptimizer(policy))
        if policy.rate is not None:
            positions = self.options.lipschitz.optimizers
            callbacks_of(trainer).append(
                FixedRate(policy.rate, [positions] if isinstance(positions, int) else positions)
            )
        callbacks_of(trainer).append(self.recorder)
        return trainer

    def after_fit(self) -> None:
        """Validates and tests the final weights, once."""
        recorder, trial = self.recorder, self.trial
        validated = self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        metric = recorder.metric
        if metric is None:
            raise no_validation(self.model)
        value = metric.of("val", merge(validated))
        if value is None or recorder.rates is None:
            raise LitLipschitzError(f"compare: the run of {trial.policy.name} made no step, or no value of its metric")
        trial.row = Row(
            trial.policy.name, trial.seed, trial.config, metric.name, value, metric.of("test", self.test_results()),
            recorder.best, recorder.best_epoch, recorder.epochs, *recorder.rates, round(recorder.seconds, 2),
            recorder.diverged or not math.isfinite(value),
        )  # fmt: skip


def _check_devices(trainer: Any) -> None:
    """Refuses settings that start processes, each of which would make the whole comparison."""
    devices, strategy = str(trainer.devices), str(trainer.strategy)
    single = devices.strip() == "1" or (
        not devices.lstrip("-").isdigit() and len(devices.strip("[], ").split(",")) == 1
    )
    if not single or trainer.num_nodes != 1 or strategy.startswith(("ddp", "fsdp", "deepspeed")):
        raise ConfigurationError(
            f"compare makes one run after another on one device; found devices {devices}, num_nodes "
            f"{trainer.num_nodes} and strategy {strategy}: pass --trainer.devices 1 and --trainer.strategy auto"
        )


def run_trial(trial: Trial, arguments: list[str]) -> int:
    """Makes a run and stores its result in the trial; returns the exit code of fit."""

    def note(line: str, code: int) -> int:
        trial.error = (" ".join(line.split()), code)
        return code

    # A swapped optimizer is not the one that its scheduler was made with.
    warnings.filterwarnings("ignore", r".*optimizer\.step\(\)` has been overridden after learning rate scheduler.*")
    try:
        # The output of data and modules is not part of the answer.
        with contextlib.redirect_stdout(sys.stderr):
            return run(functools.partial(_Run, trial), arguments, note)
    except Exception as error:
        traceback.print_exc()
        return note(f"{type(error).__name__}: {error}", 1)
    finally:
        gc.collect()  # the cycles between a trainer and its parts would hold the device's memory
