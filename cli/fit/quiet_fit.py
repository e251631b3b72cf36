"""A fit that prints nothing, for the commands that only need its numbers: `explain` and `compare`."""

from typing import Any, ClassVar

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, DeviceStatsMonitor, LearningRateMonitor, ModelSummary

from lit_lipschitz.cli.fit.callbacks import remove_callbacks
from lit_lipschitz.cli.fit.command import Command, silence_lightning


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
