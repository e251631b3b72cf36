"""Limit for the number of processes that a run starts on one machine."""

import os

from lit_lipschitz.errors import ConfigurationError


def check_processes(name: str, count: int) -> None:
    """Refuses a number of processes that would use up a machine's memory before any of them does any work.

    More processes than cores are slow but of use in a test of several ranks, so up to 8, or twice the cores, pass.

    Args:
        name: The setting, for the message.
        count: Its value.

    Raises:
        ConfigurationError: There are more.
    """
    cores = os.cpu_count() or 1
    if count > (limit := max(8, 2 * cores)):
        raise ConfigurationError(
            f"{name}={count}: expected at most {limit} processes on this machine of {cores} CPU cores; pass a smaller "
            "number"
        )
