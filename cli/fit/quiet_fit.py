"""Fits that print nothing, for the commands that only need their numbers: `explain`, `suggest` and `compare`."""

from typing import Any, ClassVar

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, DeviceStatsMonitor, LearningRateMonitor, ModelSummary

from lit_lipschitz.callbacks.lipschitz_audit import LipschitzAudit
from lit_lipschitz.cli.fit.callbacks import remove_callbacks
from lit_lipschitz.cli.fit.command import Command, silence_lightning
from lit_lipschitz.errors import ConfigurationError


class QuietFit(Command):
    """A fit without a test, an audit, printed output and, unless they are asked for, curves and checkpoints."""

    SETTINGS: ClassVar[dict[str, Any]] = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    """Settings of the trainer."""
    checkpoints = False

    def start(self, arguments: list[str]) -> None:
        """Runs a command line."""
        silence_lightning()
        super().start(arguments)

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parses, and turns off what prints and writes."""
        super().parse_arguments(parser, args)
        config = self.options
        self.lines.mode = "quiet"
        config.test_after_fit, config.audit = False, 0
        self.checkpoints = config.trainer.enable_checkpointing is True
        if config.trainer.logger is None:
            config.trainer.logger = False
        # With False the trainer would refuse the checkpoint callback, which the command always has.
        for key, value in {**self.SETTINGS, "enable_checkpointing": None}.items():
            config.trainer[key] = value

    def output_callbacks(self) -> list[L.Callback]:
        """Nothing is printed."""
        return []

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Builds a trainer without the callbacks that print, need a logger that is off, or write checkpoints."""
        trainer = super().instantiate_trainer(**kwargs)
        remove_callbacks(trainer, ModelSummary)
        if not trainer.loggers:
            remove_callbacks(trainer, LearningRateMonitor, DeviceStatsMonitor)
        if not self.checkpoints:
            remove_callbacks(trainer, Checkpoint)
        return trainer


class DryRun(QuietFit):
    """A fit that writes nothing, for a command whose ``name`` is in the messages."""

    SETTINGS: ClassVar[dict[str, Any]] = {**QuietFit.SETTINGS, "logger": False, "profiler": None}
    name: ClassVar[str]

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parses, and turns off what writes."""
        super().parse_arguments(parser, args)
        config, self.checkpoints = self.options, False
        if config.fixed_rate:
            raise ConfigurationError(
                f"{self.name} --fixed_rate true: the learning rate is the one in the config; leave the option out"
            )
        if str(config.trainer.strategy).endswith(("_spawn", "_fork", "_notebook")):
            raise ConfigurationError(
                f"{self.name} --trainer.strategy {config.trainer.strategy}: expected a strategy that starts each "
                "process by a command; pass --trainer.strategy ddp, which has the same learning rate"
            )

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Builds a trainer without an audit."""
        trainer = super().instantiate_trainer(**kwargs)
        remove_callbacks(trainer, LipschitzAudit)
        return trainer
