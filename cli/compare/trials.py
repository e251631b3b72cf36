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

from lit_lipschitz.callbacks.averaged_weights import AveragedWeights
from lit_lipschitz.callbacks.trainer_facts import callbacks_of
from lit_lipschitz.cli.compare.fixed_rate import FixedRate
from lit_lipschitz.cli.compare.optimizer_swap import SwapOptimizer
from lit_lipschitz.cli.compare.policies import ComparedPolicy, needs_swap
from lit_lipschitz.cli.compare.recorder import Recorder, no_validation
from lit_lipschitz.cli.compare.results_file import Row
from lit_lipschitz.cli.fit.command import merge, run
from lit_lipschitz.cli.fit.quiet_fit import QuietFit
from lit_lipschitz.errors import ConfigurationError, LitLipschitzError

WITHOUT_EFFECT = ("logger", "default_root_dir", "enable_checkpointing", "profiler", "log_every_n_steps",
                  *QuietFit.SETTINGS)  # fmt: skip
"""Settings of the trainer on which no result depends."""


@dataclass
class Trial:
    """A run to make, and its result: a row, or an error's line and exit code, or nothing if it was interrupted."""

    number: int  # from 1
    policy: ComparedPolicy
    seed: int
    config: str
    metric: str | None
    arguments: list[str]  # of the command
    row: Row | None = None
    error: tuple[str, int] | None = None
    code: int = 0  # the exit code of fit

    @property
    def key(self) -> tuple[str, int, str]:
        """What identifies the run in the file."""
        return self.policy.name, self.seed, self.config


class Parsed(Exception):
    """Ends a command once its configuration is known."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config


class _Fit(QuietFit):
    """A fit in this process alone that begins with the initial weights."""

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parses."""
        super().parse_arguments(parser, args)
        config = self.options
        if config.ckpt_path:
            raise ConfigurationError(
                f"compare --ckpt_path {config.ckpt_path}: every policy begins with the initial weights; leave it out"
            )
        if config.trainer.devices == "auto":
            config.trainer.devices = 1

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Builds a trainer.

        Raises:
            ConfigurationError: It would start other processes, each of which would make the whole comparison.
        """
        trainer = super().instantiate_trainer(**kwargs)
        if trainer.world_size != 1 or trainer.strategy.launcher is not None:
            raise ConfigurationError(
                f"compare makes each run on one device; found devices {trainer.world_size} and strategy "
                f"{type(trainer.strategy).__name__}: pass --trainer.devices 1 and --trainer.strategy auto, and start "
                "it without torchrun or SLURM"
            )
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
            callbacks_of(trainer).extend([AveragedWeights()] if policy.averages else [])
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
            raise LitLipschitzError(
                f"compare: the run of {trial.policy.name} made no optimizer step, or did not log its metric"
            )
        trial.row = Row(
            trial.policy.name, trial.seed, trial.config, metric.name, value, metric.of("test", self.test_results()),
            recorder.best, recorder.best_epoch, recorder.epochs, *recorder.rates, round(recorder.seconds, 2),
            recorder.diverged or not math.isfinite(value),
        )  # fmt: skip


def run_trial(trial: Trial) -> Trial:
    """Makes a run, in this process; returns the trial with its result."""

    def note(line: str, code: int) -> int:
        trial.error = (" ".join(line.split()), code)
        return code

    # A swapped optimizer is not the one that its scheduler was made with.
    warnings.filterwarnings("ignore", r".*optimizer\.step\(\)` has been overridden after learning rate scheduler.*")
    try:
        # The output of data and modules is not part of the answer.
        with contextlib.redirect_stdout(sys.stderr):
            trial.code = run(functools.partial(_Run, trial), trial.arguments, note)
    except Exception as error:
        traceback.print_exc()
        trial.code = note(f"{type(error).__name__}: {error}", 1)
    finally:
        gc.collect()  # the cycles between a trainer and its parts would hold the device's memory
    return trial
