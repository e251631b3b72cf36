"""`lit-lipschitz validate-config`: reads a config as fit does, builds everything that it names, and trains nothing."""

from typing import Any

from lit_lipschitz.cli.configs import resolve_configs
from lit_lipschitz.cli.fit.command import run
from lit_lipschitz.cli.fit.quiet_fit import QuietFit
from lit_lipschitz.cli.options import check_options
from lit_lipschitz.errors import ConfigurationError


class BuildOnly(QuietFit):
    """Builds what a config names and runs nothing; on the CPU, since the config may be for another machine."""

    SETTINGS = {**QuietFit.SETTINGS, "accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs nothing."""


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
    trainer, data = command.trainer, command.datamodule
    epochs = f"{trainer.max_epochs} epochs" if (trainer.max_epochs or -1) > 0 else f"{trainer.max_steps} steps"
    print(f"valid: {type(command.model).__name__} on {type(data).__name__ if data else 'its own data'}, {epochs}")
    return 0
