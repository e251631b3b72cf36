"""Entry point of `lit-lipschitz`: answers what needs no torch at once, and leaves the rest to LightningCLI."""

import difflib
import json
import os
import sys
from contextlib import suppress
from typing import Any

from lit_lipschitz import __version__
from lit_lipschitz.cli.configs import bundled_configs, resolve_configs
from lit_lipschitz.errors import ConfigurationError, LitLipschitzError

HELP = """\
usage: lit-lipschitz COMMAND [options]

Trains networks at a learning rate computed from L, the Lipschitz constant of the loss.

commands:
  fit         train a network, and test it at the end
  validate    evaluate a checkpoint on the validation set
  test        evaluate a checkpoint on the test set
  predict     write the classes of the test set and their probabilities to predictions.csv
  configs     list the bundled configs
  explain     make one step of fit in memory, and print how its rate comes about
  compare     fit a config at 1/L and at fixed rates, over seeds: does it help?
  report      show the curves of runs, as a page, as pictures and as text

common options (all: lit-lipschitz fit --help; of a class: lit-lipschitz fit --data.help lit_lipschitz.MNISTDataModule):
  --config NAME               a YAML file, or a bundled config; later ones overlay earlier ones
  --trainer.max_epochs N      length of the run
  --trainer.devices N         devices; with --trainer.strategy ddp a process each
  --data.data_dir FOLDER      where the data are, or are downloaded to (default: $LIT_LIPSCHITZ_DATA, or ./data)
  --data.batch_size N         examples in a batch, on each device
  --lipschitz.bound FAMILY    strict, smooth or paper
  --audit N                   every N steps, compare each layer's gradient with the Lipschitz constant
  --fixed_rate true           train at the optimizer's own rate: a baseline
  --ckpt_path PATH            resume or evaluate a checkpoint; "last" is the newest run's
  --quiet                     show warnings, errors and the final result alone
  --json_lines                print a JSON object an epoch and one at the end, and nothing else on stdout
  --print_config              print the whole configuration and exit
  --version                   print the version and exit

environment:
  LIT_LIPSCHITZ_DATA          folder of the data, where --data.data_dir is not given
  NO_COLOR                    any value: no colours on a terminal

exit codes: 0; 1 after a failure while running, 2 for a mistake in the configuration, 130 and 143 after Ctrl-C, SIGTERM

example: lit-lipschitz fit --config digits.yaml
"""
EXPLAIN_HELP = """\
usage: lit-lipschitz explain --config NAME [options of fit] [--ckpt_path PATH] [--json]

Makes one optimizer step of fit in memory, and prints how its rate comes about: the head and the loss that were found,
what was measured, the formula of L with its numbers, the rule, the schedule's factor and the rate. It writes nothing:
no folder of a run, no checkpoint, no curves. The data are read, and downloaded if they are missing, as in fit.

  --ckpt_path PATH   explain the step that would come next after a checkpoint; "last" is the newest run's
  --json             print the numbers as JSON
  all others         as for fit: lit-lipschitz fit --help

examples:
  lit-lipschitz explain --config cifar10.yaml
  lit-lipschitz explain --config digits.yaml --lipschitz.bound smooth --model.optimizer.weight_decay 1e-4
"""
COMPARE_HELP = """\
usage: lit-lipschitz compare --config NAME [options of fit] [--policies A,B,...] [--seeds N] [--output FILE.csv]
                             [--metric NAME] [--json]

Fits a config under several policies and seeds, one run after another on one device, and prints what they come to:
mean and standard error on the validation and the test set after the last epoch, and the difference to the best of the
fixed rates. That one is chosen by the validation set; the test set is measured once a run, at its end.

  --policies LIST    with commas between them (default: lipschitz,sgd:0.03,sgd:0.1,sgd:0.3,adamw:0.001,adamw:0.003):
      lipschitz        the config as it is, with LipschitzLR
      lipschitz-adamw  the config with AdamW and LipschitzLR
      paper            the papers' literal policy: plain SGD at 1/L with bound=paper, no scheduler
      sgd:RATE         SGD with momentum 0.9 at a fixed rate; adamw:RATE likewise with AdamW
      config:RATE      the config's own optimizer at a fixed rate
                     All but the paper's keep the config's scheduler, which multiplies the rate. SGD and AdamW take the
                     config's weight decay if the config's optimizer is AdamW or not as they are, else torch's default.
  --seeds N          runs of each policy, with the config's seed_everything and the numbers after it (default: 1)
  --output FILE.csv  a line a run (default: ./compare.csv); a run that stands there is not repeated
  --metric NAME      what to compare, val_NAME and test_NAME (default: acc, or else loss)
  --json             print all as JSON
  all others         as for fit: lit-lipschitz fit --help

Checkpoints and curves are written only with --trainer.enable_checkpointing true and --trainer.logger true.

example: lit-lipschitz compare --config digits.yaml --policies lipschitz,sgd:0.03,sgd:0.1,sgd:0.3 --seeds 3
"""
COMMANDS = ("fit", "validate", "test", "predict", "configs", "report", "explain", "compare")
"""What the first argument can be."""


def main() -> int:
    """Runs the command line in ``sys.argv``.

    Returns:
        The exit code: 0, 1 for a failure at run time, 2 for a mistake in the configuration, 130 and 143 for a run that
        was ended by SIGINT and SIGTERM.
    """
    try:
        code = _answer(sys.argv[1:])
        sys.stdout.flush()
        if code == 0:
            _leave_group()
        return code
    except BrokenPipeError:
        _discard_output()  # who reads it, such as head, has what it wants
        return 1
    except OSError as error:
        if error.filename is None:
            _discard_output()
        return fail(f"{error.filename or 'stdout'}: {error.strerror or error}", 1)


def _leave_group() -> None:
    """Ends the process group that a run has left, whose threads now and then abort a process that ends before them."""
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _discard_output() -> None:
    """Has Python not write what is left when it ends."""
    with suppress(OSError, ValueError):  # where stdout is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _answer(arguments: list[str]) -> int:
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(HELP, end="")
            return 0
        if arguments[0] == "--version":
            print(f"lit-lipschitz {__version__}")
            return 0
        if arguments[0] == "configs":
            return list_configs(arguments[1:])
        if arguments[0] == "report":
            from lit_lipschitz.cli.report.command import report

            return report(arguments[1:])
        if arguments[0] == "explain" and {"-h", "--help"} & set(arguments):
            print(EXPLAIN_HELP, end="")
            return 0
        if arguments[0] == "compare" and {"-h", "--help"} & set(arguments):
            print(COMPARE_HELP, end="")
            return 0
        check_command(arguments[0])
        # ddp starts the other ranks with sys.argv, so the paths go in there.
        sys.argv[1:] = resolve_configs(arguments)
    except LitLipschitzError as error:
        return fail(error, 2 if isinstance(error, ConfigurationError) else 1)
    try:
        try:
            import torch  # noqa: F401
            import torchmetrics  # noqa: F401
        except FileNotFoundError as error:
            return fail(f"torch can't be loaded: {error.strerror or error}; make room there or set TMPDIR", 1)
        if arguments[0] == "explain":
            from lit_lipschitz.cli.explain.command import explain

            return explain(sys.argv[2:])
        if arguments[0] == "compare":
            from lit_lipschitz.cli.compare.command import compare

            return compare(sys.argv[2:])
        from lit_lipschitz.cli.fit.command import run

        return run()
    except KeyboardInterrupt:
        return 130


def check_command(name: str) -> None:
    """Refuses a command that does not exist.

    Raises:
        ConfigurationError: It names the closest one.
    """
    if name.startswith("-"):
        raise ConfigurationError(f"{name}: expected a command first, as in lit-lipschitz fit {name} ...")
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)
        raise ConfigurationError(f"{name}: no such command; closest: {close[0]}; all of them: {', '.join(COMMANDS)}")


def list_configs(arguments: list[str]) -> int:
    """Prints the bundled configs, a line each, or as JSON."""
    if arguments in (["-h"], ["--help"]):
        print("usage: lit-lipschitz configs [--json]\n\nLists the bundled configs, a line each, or as JSON.")
        return 0
    known = bundled_configs()
    if arguments == ["--json"]:
        print(json.dumps([{"name": name, "description": known[name]} for name in known], indent=1))
        return 0
    if arguments:
        raise ConfigurationError(f"configs takes no arguments but --json, found {' '.join(arguments)}")
    width = max(map(len, known))
    for name, description in known.items():
        print(f"{name:{width}}  {description}")
    return 0


def fail(error: object, code: int) -> int:
    """Prints an error in one line on stderr; returns the exit code."""
    print(f"lit-lipschitz: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
