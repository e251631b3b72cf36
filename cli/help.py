"""The help texts of the command, and a parser for the options of `configs`, `report` and `compare`."""

import argparse
from typing import NoReturn

from lit_lipschitz.errors import ConfigurationError

MAIN = """\
usage: lit-lipschitz COMMAND [options]

Trains networks at a learning rate computed from L, the Lipschitz constant of the loss.

commands:
  fit         train a network, and test it at the end
  validate    evaluate a checkpoint on the validation set
  test        evaluate a checkpoint on the test set
  predict     write the predicted classes of the test set and their probabilities to a new predictions.csv
  configs     list the bundled configs
  explain     dry-run one training step and explain the resulting learning rate
  compare     fit a config with computed and with fixed learning rates, over seeds: does it help?
  report      show the curves of runs, as a web page, as pictures and as text

common options (all: lit-lipschitz fit --help; of a class: lit-lipschitz fit --data.help lit_lipschitz.MNISTDataModule):
  --config NAME               a YAML file or a bundled config; later ones override earlier ones
  --trainer.max_epochs N      length of the run
  --trainer.devices N         number of devices; with --trainer.strategy ddp one process each
  --data.data_dir FOLDER      where the data are, or are downloaded to (default: $LIT_LIPSCHITZ_DATA, or ./data)
  --data.batch_size N         batch size on each device
  --lipschitz.bound FAMILY    what L bounds: the gradient (strict) or the Hessian (smooth)
  --audit N                   every N steps, compare each layer's gradient norm with L
  --fixed_rate true           train at the optimizer's own learning rate: a baseline
  --ckpt_path PATH            resume or evaluate a checkpoint; "last" is the newest run's
  --quiet                     show only warnings, errors and the final result
  --json_lines                print only JSON on stdout: one object an epoch and one at the end
  --print_config              print the whole configuration and exit
  --version                   print the version and exit

environment:
  LIT_LIPSCHITZ_DATA          folder of the data, if --data.data_dir is not given
  NO_COLOR                    any value: no colours on a terminal

exit codes: 0; 1 after a failure while running, 2 for a mistake in the configuration, 130 and 143 after Ctrl-C, SIGTERM

example: lit-lipschitz fit --config digits.yaml

The experiments of the paper (arXiv 1902.07399) are the configs paper_*.yaml; --lipschitz.bound paper is its method.
"""
COMMANDS = {
    "configs": """\
usage: lit-lipschitz configs [--json]

Lists the bundled configs, one a line: first those for everyday use, then the paper's experiments.

  --json             print them as JSON: name, description, and whether it is one of the paper's
""",
    "explain": """\
usage: lit-lipschitz explain --config NAME [options of fit] [--ckpt_path PATH] [--json]

Dry-runs one optimizer step of fit and explains the resulting learning rate: the output layer and the loss that were
found, what was measured, the formula of L with its numbers, the rule, the schedule's factor and the learning rate.
It writes nothing: no folder of a run, no checkpoint, no curves. The data are read, and downloaded if they are missing.

  --ckpt_path PATH   explain the first step after a checkpoint; "last" is the newest run's
  --json             print the numbers as JSON
  all others         as for fit: lit-lipschitz fit --help

examples:
  lit-lipschitz explain --config cifar10.yaml
  lit-lipschitz explain --config digits.yaml --lipschitz.bound smooth --model.optimizer.weight_decay 1e-4
""",
    "compare": """\
usage: lit-lipschitz compare --config NAME [options of fit] [--policies A,B,...] [--seeds N] [--output FILE.csv]
                             [--metric NAME] [--jobs N] [--engine NAME] [--engine_options JSON] [--json]

Fits a config under several policies and seeds, each run on one device, and prints the results: mean and standard
error on the validation and the test set after the last epoch, and the difference to the best fixed rate, paired by
seed. The best fixed rate is chosen by the validation set; the test set is measured once a run, at its end.

  --policies LIST    separated by commas (default: lipschitz,sgd:0.03,sgd:0.1,sgd:0.3,adamw:0.001,adamw:0.003):
      lipschitz        the config as it is, with LipschitzLR
      lipschitz-adamw  the config with AdamW and LipschitzLR
      lipschitz-schedulefree
                       the config with Schedule-Free AdamW (package schedulefree) and LipschitzLR, no scheduler
      sgd:RATE         SGD with momentum 0.9 at a fixed learning rate; adamw:RATE the same with AdamW
      config:RATE      the config's own optimizer at a fixed learning rate
      paper            the paper's method: plain SGD at 1/L with bound=paper, no scheduler
                     The others keep the config's scheduler, which multiplies the rate. The config's weight decay is
                     kept if both its optimizer and the policy's are AdamW, or neither is; otherwise torch's default
                     is used (Schedule-Free AdamW: as AdamW).
  --seeds N          number of runs of each policy; the seeds count up from the config's seed_everything (default: 1)
  --output FILE.csv  one line a run (default: ./compare.csv); a run that is in the file is not repeated, and of several
                     commands with one file each makes what no other makes
  --metric NAME      compare val_NAME and test_NAME (default: acc, or else loss)
  --jobs N           number of runs at a time (default: 1; with --engine joblib one for each GPU or CPU core, with the
                     others as many as the engine has room for); alone it means --engine joblib
  --engine NAME      what spreads the runs: joblib (processes of this machine, a GPU each), ray (a cluster at
                     RAY_ADDRESS, or this machine) or submitit (Slurm, or this machine); each is an extra of that name.
                     On several machines config, data and code have to be at the same paths
  --engine_options J keyword arguments as JSON: of joblib.Parallel, of a Ray task, of submitit's update_parameters
  --json             print everything as JSON
  all others         as for fit: lit-lipschitz fit --help

Checkpoints and curves are written only with --trainer.enable_checkpointing true and --trainer.logger true.

example: lit-lipschitz compare --config digits.yaml --policies lipschitz,sgd:0.03,sgd:0.1,sgd:0.3 --seeds 3 --jobs 2
""",
    "report": """\
usage: lit-lipschitz report RUN [RUN ...] [--output FOLDER] [--json] [--no-png]

Shows the curves of one or several runs: accuracy and loss, the learning rate, L and its parts, one value an epoch.
Writes a self-contained page, report.html, and, with matplotlib, PNG files; prints the same as text.

  RUN                a run's folder, or a folder that contains some
  --output FOLDER    where the files are written (default: ./report)
  --json             print the curves, the final values and the names of the files as JSON
  --no-png           write only the page, which does not need matplotlib

examples:
  lit-lipschitz report lightning_logs/version_3               # one run
  lit-lipschitz report lightning_logs --output figures        # all runs below a folder, overlaid
  lit-lipschitz report lightning_logs/version_3 --json | jq '.runs[0].final.val_acc'

NO_COLOR=1 turns off the colours, which only a terminal gets.
""",
}
"""The commands that have a help text of their own; that of the others is LightningCLI's."""


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
