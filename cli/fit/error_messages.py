"""Condenses the errors of the parser, the trainer and the file system to one line each."""

import difflib
import errno
import re
import traceback
from collections.abc import Iterable
from pathlib import Path

import torch
from lightning.pytorch import callbacks, loggers
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lit_lipschitz
from lit_lipschitz.cli.options import no_such_option
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
    if isinstance(error, Warning):  # of python -W error
        return str(error), 1
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
    if isinstance(error, RuntimeError) and _frames(error)[-1:] and "/lightning/pytorch/" in _frames(error)[-1][0]:
        return " ".join(str(error).split()), 1
    if _is_lost_connection(error):
        cause = " ".join(str(error).split())
        cause = re.sub(r"^\[[^\]]*\] |\. This is typically.*", "", cause)
        return (
            f"the connection to another rank is lost, or that rank is late ({cause:.120}); look for its error above, "
            "and start the run again, with --ckpt_path last if it has saved"
        ), 1
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


def _is_lost_connection(error: Exception) -> bool:
    """Whether a rank is not there any more, or has not come in time."""
    lost = getattr(torch.distributed, "DistError", ())  # torch may have been built without ranks
    return isinstance(error, lost) or (
        isinstance(error, RuntimeError) and re.search("/gloo/transport/|pair closure", str(error)) is not None
    )


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
        return no_such_option(match[1], known)
    if match := re.search(r"Option '([^']+)' is not accepted", text):
        return no_such_option(f"{path}.{match[1]}".lstrip("."), known)
    if match := re.search(r"argument --(\w+).*: invalid _boolean_type value: '(.*)'", text):
        return f"{match[1]}: expected true or false, found {match[2]!r}"
    if scalars := _scalar_types(text):
        found = re.search(r"Given value: (.+)$", text)
        return f"{path}: expected {scalars}, found {found[1] if found else ''!r}"
    if path and (match := re.search(r"- ([\w.]+)(?: and [\w. ]+)? must be given", text)):
        return _missing(path, match[1], text)
    for pattern, cause in _CAUSES:
        if match := re.search(pattern, text):
            return f"{path}: {cause.format(_readable(match[1]), match[2])}".lstrip(": ")
    for branch in re.split(r"\n\s*- ", message)[1:]:
        reason = " ".join(branch.partition("Given value")[0].split())
        if not reason.startswith(("Expected a", "Does not validate", "Not of type NetworkName")):
            # The keys of inner errors are in the path already.
            reason = re.sub(r'^(?:Parser key "[^"]+": )+', "", reason)
            return f"{path}.{reason}" if path else reason
    if match := re.search(r"Expected a dot import path string: (\S+)", text):
        return f"{path}: expected the name or the import path of a class, found {match[1]!r}{_closest_class(match[1])}"
    if match := re.search(r"following arguments are required: (.+)$", text):
        keys = [re.sub(r"^(fit|validate|test|predict)\.", "", key.strip()) for key in match[1].split(",")]
        config = "; pass a config, such as --config digits.yaml" if keys[0] in ("data", "model") else ""
        return f"{' and '.join(keys)} must be given{config}"
    return text


def _missing(path: str, key: str, text: str) -> str:
    """What to do about a class without an argument that it needs; of several classes, the first that has it as null."""
    classes = re.findall(r"class_path='(?:\w+\.)*(\w+)', init_args=Namespace\((.*?)(?=class_path=|$)", text)
    owner = next((f", for {name}" for name, given in classes if re.search(rf"\b{re.escape(key)}=None", given)), "")
    return f"{path}.{key} must be given{owner}; pass --{path}.{key} with a value, or {key}: below init_args in a config"


_LIST = "a list such as [1, 2]"
_SCALARS = {"float", "int", "str", "bool", "null", _LIST}


def _scalar_types(text: str) -> str:
    """The types of a union that is about numbers, texts and choices, as people write them; empty for another."""
    match = re.search(r"Subtypes: \[(.+?)\] Errors:", text)
    if not match or "NestedArg(" in text:
        return ""
    choices = ", ".join(re.findall(r"typing\.Literal\[(.+?)\]", match[1]))
    classes = [
        _readable(kind) for kind in re.findall(r"<class '[\w.]+'>|\b(?:list|tuple)(?=\[(?:str|int|float))", match[1])
    ]
    kinds = [kind for kind in classes if kind in _SCALARS]
    # A class may also be given where a number may, but for a wrong number nobody has meant one.
    if not choices and {"float", "int", _LIST}.isdisjoint(kinds):
        return ""
    return " or ".join(
        [*([f"one of {choices}" if ", " in choices else choices] if choices else []), *dict.fromkeys(kinds)]
    )


def _closest_class(name: str) -> str:
    """A hint at the classes of this project, torch and Lightning that are called almost like that."""
    if ":" in name:
        return "; for arguments of a named network give lit_lipschitz.named_network, with its argument name"
    ours = [f"lit_lipschitz.{one}" for one in lit_lipschitz.__all__]
    ours += ["torchvision.transforms.v2.MixUp", "torchvision.transforms.v2.CutMix"]
    others = [one for module in (torch.optim, torch.optim.lr_scheduler, callbacks, loggers) for one in vars(module)]
    known = {one.rpartition(".")[2].lower(): one for one in (*others, *ours) if one[0].isupper() or one in ours}
    close = difflib.get_close_matches(name.lower(), known, n=2, cutoff=0.6)
    close = close or [one for one in known if name.lower() in one][:2]
    return f"; closest: {', '.join(known[one] for one in close)}" if close else ""


def _readable(kind: str) -> str:
    """A type as it is written in YAML."""
    if literal := re.match(r"typing\.Literal\[(.+)\]", kind):
        return "one of " + literal[1]
    name = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", kind)
    return {"NoneType": "null", "tuple": _LIST, "list": _LIST}.get(name, name)
