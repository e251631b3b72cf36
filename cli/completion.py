"""Completes a command line in a shell, by argcomplete, without importing torch."""

import argparse
from typing import Any

from lit_lipschitz.cli.configs import SUBCOMMANDS, bundled_configs
from lit_lipschitz.cli.help import COMMANDS
from lit_lipschitz.cli.options import known_options

_OWN = {"configs": ("json",), "report": ("output", "json", "no-png"), "validate-config": ()}
"""Commands without options of fit."""


def complete() -> None:
    """Answers the shell, which has put the line into the environment, and ends the process."""
    import argcomplete

    parser = argparse.ArgumentParser("lit-lipschitz")
    commands = parser.add_subparsers()
    for name in COMMANDS:
        command: Any = commands.add_parser(name)
        for option in _OWN.get(name, known_options(name)):
            if option != "help":
                command.add_argument(f"--{option}").completer = _configs if option == "config" else None
        if name == "configs":
            command.add_argument("action", choices=SUBCOMMANDS)
        if name in ("configs", "validate-config"):
            command.add_argument("name").completer = _configs
    argcomplete.autocomplete(parser)


def _configs(prefix: str, **_: Any) -> list[str]:
    from argcomplete.completers import FilesCompleter

    return [*bundled_configs(), *FilesCompleter(["yaml"])(prefix)]
