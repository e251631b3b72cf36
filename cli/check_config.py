"""`lit-lipschitz validate-config`: reads a config as fit does, builds everything that it names, and trains nothing."""

import warnings
from typing import Any

from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lit_lipschitz.cli.configs import resolve_configs
from lit_lipschitz.cli.fit.command import run
from lit_lipschitz.cli.fit.quiet_fit import QuietFit
from lit_lipschitz.cli.options import check_options
from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.module import ImageClassifier


class BuildOnly(QuietFit):
    """Builds what a config names and runs nothing; on the CPU, since the config may be for another machine."""

    SETTINGS = {**QuietFit.SETTINGS, "accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}

    def after_instantiate_classes(self) -> None:
        """Also makes the optimizers and the schedulers, which refuse values that their options admit."""
        super().after_instantiate_classes()
        module, epochs = self.model, self.trainer.max_epochs
        self.length = f"{epochs} epochs" if (epochs or -1) > 0 else f"{self.trainer.max_steps} steps"
        # What a module's setup makes may be needed, and it may read data.
        if is_overridden("setup", module) and not isinstance(module, ImageClassifier):
            return
        module.trainer, loop = self.trainer, self.trainer.fit_loop
        # The length of a run by epochs is that of its data, which are not read.
        steps = loop.max_steps if (loop.max_steps or 0) > 0 else 1000
        loop.max_epochs, loop.epoch_loop.max_steps = -1, steps
        try:
            _step_once(module.configure_optimizers())
        except (ConfigurationError, ValueError, TypeError, ZeroDivisionError):
            raise
        except Exception:  # of a module that needs its data or its trainer for this
            return

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs nothing."""


def _step_once(configured: Any) -> None:
    """Steps the scheduler that a module returns beside its optimizer, since some refuse a value then."""
    entry = configured.get("lr_scheduler") if isinstance(configured, dict) else None
    scheduler = entry.get("scheduler") if isinstance(entry, dict) else entry
    if isinstance(scheduler, LRScheduler) and not isinstance(scheduler, ReduceLROnPlateau):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the optimizer has made no step
            scheduler.step()


def validate_config(arguments: list[str]) -> int:
    """Runs the command.

    Args:
        arguments: What comes after its name: files or bundled configs, and options of fit.

    Returns:
        The exit code.

    Raises:
        ConfigurationError: There is no file, or an option is mistyped.
    """
    count = next((i for i, argument in enumerate(arguments) if argument.startswith("-")), len(arguments))
    files: list[Any] = [part for name in arguments[:count] for part in ("--config", name)]
    options = [*files, *arguments[count:]]
    if not any(one.split("=")[0] in ("--config", "-c") for one in options):
        raise ConfigurationError("validate-config: expected a FILE, or the name of a bundled config")
    check_options("fit", options)
    command = BuildOnly()
    if code := run(lambda: command, ["fit", *resolve_configs(options)]):
        return code
    data, length = command.datamodule, command.length
    print(f"valid: {type(command.model).__name__} on {type(data).__name__ if data else 'its own data'}, {length}")
    return 0
