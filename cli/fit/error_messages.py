"""Condenses the errors of the parser, the trainer and the file system to one line each."""

import difflib
import errno
import re
import traceback
from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lit_lipschitz
from lit_lipschitz.errors import ConfigurationError, LitLipschitzError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CAUSES = (
    (r"Problem with given class_path '([^']+)': (.+?)(?: - Expected| Given value|$)", "{0} can't be used: {1}"),
    (
        r"expects a function or a callable class: (.+)\. Got value: (\S+)",
        "expected the import path of a class or a function, found {1!r}: {0}",
    ),
    (r"Expected an? ([^-]+?)\. Got value: (.+?)(?: - | Given value|$)", "expected {0}, found {1!r}"),
    (
        r"Not a valid subclass of (\w+).*?Given value: (.+)$",
        "expected a class_path and init_args of a {0}, found {1!r}",
    ),
)
"""Patterns in a message of jsonargparse, and what is said of the key instead."""


def explain_error(error: Exception, running: bool, folder: str) -> tuple[str, int] | None:
    """The line to print for an exception and the exit code, or None if it needs a traceback.

    Args:
        error: The exception.
        running: Whether the configuration had been accepted.
        folder: Where the run writes.
    """
    if isinstance(error, LitLipschitzError):
        return condense(str(error)), 2 if isinstance(error, ConfigurationError) else 1
    if isinstance(error, MisconfigurationException):
        return str(error), 1 if running else 2
    if isinstance(error, OSError) and error.filename is None and error.errno in _NO_ROOM:
        return no_room(error, folder), 1
    if isinstance(error, OSError):
        return f"{error.filename or ''}: {error.strerror or error}".lstrip(": "), 1
    if isinstance(error, RuntimeError) and "Error(s) in loading state_dict" in str(error):
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        first = lines[:2][-1].split(", ")[0].rstrip(". ")
        return f"the checkpoint is of another network: {first} ...; pass the config that it was trained with", 1
    if _is_of_checkpoint(error):
        cause = " ".join(str(error).split())
        return f"the checkpoint can't be restored ({type(error).__name__}: {cause:.200}); pass another --ckpt_path", 1
    if isinstance(error, (ValueError, TypeError, ZeroDivisionError)) and (not running or _is_refusal(error)):
        where = f" in {Path(_frames(error)[-1][0]).name}" if isinstance(error, ZeroDivisionError) else ""
        return f"{condense(str(error))}{where}; change the value in the config or on the command line", 2
    return None


def _frames(error: Exception) -> list[tuple[str, str]]:
    """File and function of the calls in a traceback, the innermost one last."""
    return [(Path(frame.filename).as_posix(), frame.name) for frame in traceback.extract_tb(error.__traceback__)]


def _is_refusal(error: Exception) -> bool:
    """Whether Lightning, an optimizer or a scheduler has refused a value, and no code of a module has failed."""
    frames = _frames(error)
    if any(name == "configure_optimizers" for _, name in frames):
        return True
    # What a module gives to torch's functions is the module's matter; its optimizers and schedulers are not.
    outer = [file for file, _ in frames if "/torch/" not in file or "/torch/optim/" in file]
    return bool(outer) and any(package in outer[-1] for package in ("/torch/optim/", "/lightning/", "/lightning_"))


def _is_of_checkpoint(error: Exception) -> bool:
    """Whether an error has come while a checkpoint was restored."""
    return any(
        file.endswith("/checkpoint_connector.py") and ("restore" in name or name == "resume_start")
        for file, name in _frames(error)
    )


def no_room(error: OSError, folder: str) -> str:
    """What to do about a full disk."""
    return (
        f"{folder}: can't be written: {error.strerror}; make room there or pass another --trainer.default_root_dir, "
        "and resume with --ckpt_path"
    )


def condense(message: str, known: Iterable[str] = ()) -> str:
    """The cause in an error of jsonargparse, which lists every branch of a union that it tried.

    Errors in a class's arguments pass through here first, and come back as one of the branches.

    Args:
        message: The parser's message, of any number of lines.
        known: Options of the parser, for hints.

    Returns:
        One line.
    """
    text = " ".join(message.split())
    path = ".".join(re.findall(r'Parser key "([^"]+)"', text))
    if match := re.search(r"(?:accept option|unrecognized arguments:) '?-{0,2}([\w.]+)", text):
        return _no_such_option(match[1], known)
    if match := re.search(r"Option '([^']+)' is not accepted", text):
        return _no_such_option(f"{path}.{match[1]}".lstrip("."), known)
    for pattern, cause in _CAUSES:
        if match := re.search(pattern, text):
            return f"{path}: {cause.format(_readable(match[1]), match[2])}"
    for branch in re.split(r"\n\s*- ", message)[1:]:
        reason = " ".join(branch.partition("Given value")[0].split())
        if not reason.startswith(("Expected a", "Does not validate")):
            # The keys of inner errors are in the path already.
            reason = re.sub(r'^(?:Parser key "[^"]+": )+', "", reason)
            return f"{path}.{reason}" if path else reason
    if match := re.search(r"Expected a dot import path string: (\S+)", text):
        close = difflib.get_close_matches(match[1], lit_lipschitz.__all__, n=2)
        hint = f"; closest: {', '.join(f'lit_lipschitz.{name}' for name in close)}" if close else ""
        return f"{path}: expected the name or the import path of a class, found {match[1]!r}{hint}"
    types = [_readable(kind) for kind in re.findall(r"Expected an? (<class '[\w.]+'>)", text)]
    if types and (match := re.search(r"Given value: (.+)$", text)):
        return f"{path}: expected {' or '.join(dict.fromkeys(types))}, found {match[1]!r}"
    if match := re.search(r"following arguments are required: (.+)$", text):
        keys = [re.sub(r"^(fit|validate|test|predict)\.", "", key.strip()) for key in match[1].split(",")]
        config = "; pass a config, such as --config digits.yaml" if keys[0] in ("data", "model") else ""
        return f"{' and '.join(keys)} must be given{config}"
    return text


def _no_such_option(key: str, known: Iterable[str]) -> str:
    # Names that end in + append to a list.
    close = difflib.get_close_matches(key, [name for name in known if not name.endswith("+")], n=2, cutoff=0.6)
    hint = f"closest: {', '.join(close)}" if close else "lit-lipschitz fit --help lists all"
    return f"{key}: no such option; {hint}"


def _readable(kind: str) -> str:
    """A type as it is written in YAML."""
    if literal := re.match(r"typing\.Literal\[(.+)\]", kind):
        return "one of " + literal[1]
    name = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", kind)
    return {"NoneType": "null"}.get(name, name)
