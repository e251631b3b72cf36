"""The errors that a user can act on: what was expected, what was found, what to do."""


class LitLipschitzError(Exception):
    """Something failed while running; the message is one line and says what to do.

    The command prints it without a traceback and exits with code 1.
    """


class ConfigurationError(LitLipschitzError, ValueError):
    """A value that was configured cannot work; the command exits with code 2."""


class DataError(LitLipschitzError, RuntimeError):
    """A data set is missing, incomplete or not writable; the command exits with code 1."""
