"""Entry point of `lit-lipschitz`: help, configs and report run without importing torch, the rest by LightningCLI."""

import difflib
import importlib
import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from lit_lipschitz import __version__
from lit_lipschitz.cli.configs import list_configs, resolve_configs
from lit_lipschitz.cli.help import COMMANDS, text
from lit_lipschitz.cli.options import check_options
from lit_lipschitz.cli.output import fail
from lit_lipschitz.errors import ConfigurationError, LitLipschitzError

_HOMES = {"validate-config": "check_config", "explain": "explain.command", "suggest": "suggest.command",
          "compare": "compare.command", "export": "export"}  # fmt: skip
"""Modules of the commands that are functions of their own."""


def main() -> int:
    """Runs the command line in ``sys.argv``.

    Returns:
        The exit code: 0, 1 for a failure at run time, 2 for a mistake in the configuration, 130 and 143 for a run that
        was ended by SIGINT and SIGTERM.
    """
    if "_ARGCOMPLETE" in os.environ:
        from lit_lipschitz.cli.completion import complete

        complete()
    _open_standard_streams()
    try:
        code = _answer(sys.argv[1:] or ["--help"])
        sys.stdout.flush()
        if code == 0:
            _leave_process_group()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _discard_output()  # the reader, such as head, has seen enough
        return 1
    except OSError as error:
        if error.filename is None:
            _discard_output()
        return fail(f"{error.filename or 'stdout'}: {error.strerror or error}")


def _open_standard_streams() -> None:
    """Has stdout and stderr write to nowhere if they are closed, and write names that are not Unicode in escapes."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which a file of the run would take
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace", closefd=False))
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _leave_process_group() -> None:
    """Leaves the process group of a distributed run, whose threads can abort a process that ends before them."""
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _discard_output() -> None:
    """Redirects stdout to nowhere, so that Python does not fail to flush it when it ends."""
    with suppress(OSError, ValueError):  # where stdout is not a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _answer(arguments: list[str]) -> int:
    """Runs what needs no torch, or checks the command and its configs before torch is imported."""
    name, *options = arguments
    help_wanted = bool({"-h", "--help"} & set(options))
    try:
        if name in ("-h", "--help"):
            print(text("main"), end="")
            return 0
        if name == "--version":
            print(f"lit-lipschitz {__version__}")
            return 0
        if name in COMMANDS and help_wanted:
            print(text(name), end="")
            return 0
        if name == "configs":
            return list_configs(options)
        if name == "report":
            from lit_lipschitz.cli.report.command import report

            return report(options)
        _check_command(name)
        # As Python has it for a script, and last: a file there replaces no installed module.
        sys.path.append(os.getcwd())
        if name == "validate-config":
            return _run(name)
        check_options(name, options)
        arguments = ["--help" if argument == "--help_all" else argument for argument in arguments]
        # Other ranks are started with sys.argv, so the paths have to be in there.
        sys.argv[1:] = resolve_configs(arguments)
        return _run(name)
    except LitLipschitzError as error:
        return fail(error)


def _run(name: str) -> int:
    """Runs a command that needs torch, which takes seconds to import: a terminal shows that meanwhile."""
    silent = {"--quiet", "--json_lines", "--json"} & set(sys.argv) or "LOCAL_RANK" in os.environ
    waits = sys.stderr.isatty() and "torch" not in sys.modules and not silent
    if waits:
        print("lit-lipschitz: loading torch and Lightning ...", end="", file=sys.stderr, flush=True)
    try:
        import lightning.pytorch  # noqa: F401
        import torch  # noqa: F401
        import torchmetrics  # noqa: F401
    except FileNotFoundError as error:
        return fail(f"torch can't be loaded: {error.strerror or error}; make room there or set TMPDIR")
    finally:
        if waits:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
    if name in _HOMES:
        function: Callable[[list[str]], int] = getattr(
            importlib.import_module(f"lit_lipschitz.cli.{_HOMES[name]}"), name.replace("-", "_")
        )
        return function(sys.argv[2:])
    from lit_lipschitz.cli.fit.command import run

    return run()


def _check_command(name: str) -> None:
    if name.startswith("-"):
        raise ConfigurationError(f"{name}: expected a command first, as in lit-lipschitz fit {name} ...")
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)
        raise ConfigurationError(f"{name}: no such command; closest: {close[0]}; all of them: {', '.join(COMMANDS)}")


if __name__ == "__main__":
    sys.exit(main())
