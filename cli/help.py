"""The help texts of the command, and a parser for the options of `configs`, `report` and `compare`."""

import argparse
import re
from importlib import resources
from typing import NoReturn

from lit_lipschitz.errors import ConfigurationError

COMMANDS = (
    "fit", "validate", "test", "predict", "export", "configs", "validate-config", "explain", "suggest", "compare",
    "report"
)  # fmt: skip
_TEXTS = resources.files("lit_lipschitz.cli") / "help_texts"


def text(name: str) -> str:
    """The help text of a command, or that of all with the name ``main``; a line @NAME stands for another text."""
    content = (_TEXTS / f"{name}.txt").read_text(encoding="utf-8")
    return re.sub(r"^@(\w+)\n", lambda match: text(f"_{match[1]}"), content, flags=re.MULTILINE)


class OptionParser(argparse.ArgumentParser):
    """Parses the options of a command that are not options of fit; its errors point to the command's help text.

    Args:
        command: Name of the command.
    """

    def __init__(self, command: str) -> None:
        super().__init__(command, add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Reports a mistake in the options.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(f"{self.prog}: {message}; see lit-lipschitz {self.prog} --help")
