"""The errors that a user can act on: what was expected, what was found, what to do."""


class LitLipschitzError(Exception):
    """A failure while running, with a message of one line that says what to do.

    The command prints it without a traceback and exits with code 1.
    """


class ConfigurationError(LitLipschitzError, ValueError):
    """A mistake in the configuration; the command exits with code 2."""


class DataError(LitLipschitzError, RuntimeError):
    """A data set is missing, incomplete or not writable; the command exits with code 1."""
