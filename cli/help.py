"""The help texts of the command, and a parser for the options of `configs`, `report` and `compare`."""

import argparse
from typing import NoReturn

from lit_lipschitz.errors import ConfigurationError

MAIN = """\
usage: lit-lipschitz COMMAND [options]

Trains networks at a learning rate computed from L, the Lipschitz constant of the loss.

commands (lit-lipschitz COMMAND --help explains one):
  fit               train a network, and test it at the end
  validate          evaluate a checkpoint on the validation set
  test              evaluate a checkpoint on the test set
  predict           write the predicted classes of the test set to predictions.csv
  export            write a checkpoint's network and its preprocessing as a .pt2 or .onnx file
  configs           list, show and copy the bundled configs
  validate-config   check every key of a config, without training
  explain           dry-run one training step and explain the resulting learning rate
  compare           fit a config with computed and with fixed learning rates: does it help?
  report            show the curves of runs, as a web page, as pictures and as text

environment:
  LIT_LIPSCHITZ_DATA   folder of the data, if --data.data_dir is not given
  NO_COLOR             any value: no colours on a terminal

completion in bash, for this shell (pip install argcomplete):
  eval "$(register-python-argcomplete lit-lipschitz)"

exit codes: 0; 1 after a failure while running, 2 for a mistake in the configuration,
130 after Ctrl-C, 143 after SIGTERM

example: lit-lipschitz fit --config digits.yaml

The experiments of the paper (arXiv 1902.07399) are the configs paper_*.yaml.
"""
_RUN = """\
  --config NAME                a YAML file or a bundled config; later ones override earlier ones
  --data CLASS                 a LightningDataModule; --data.ARGUMENT sets its arguments
  --data.data_dir FOLDER       where the data are, or are downloaded to
                               (default: $LIT_LIPSCHITZ_DATA, or ./data)
  --data.batch_size N          batch size on each device
  --model CLASS                a LightningModule; --model.ARGUMENT sets its arguments
  --model.network NAME         a class, or a classifier such as timm:resnet18, torchvision:resnet18
"""
_MORE = """\
  --quiet                      print only warnings, errors and the final result
  --json_lines                 print only JSON on stdout
  --print_config               print the whole configuration and exit
  --help_all                   list every option; --data.help CLASS those of a class

Classes are found by their import path, also in modules of the working folder. So run the
command, and configs that you have not read, only in folders whose code you trust.
"""
_EVALUATE = (
    """\
usage: lit-lipschitz {name} --config NAME --ckpt_path PATH [options]

{what}

options:
  --ckpt_path PATH             the checkpoint; "last" is the newest run's
"""
    + _RUN
    + """\
  --trainer.devices N          number of devices
  --trainer.precision P        such as 32 or bf16-mixed
"""
    + _MORE
    + """
example: lit-lipschitz {name} --config digits.yaml --ckpt_path last
"""
)
COMMANDS = {
    "fit": """\
usage: lit-lipschitz fit --config NAME [options]

Trains a network at the computed learning rate, and tests it at the end.

data and model:
"""
    + _RUN
    + """\
  --model.optimizer CLASS      such as AdamW; --model.optimizer.weight_decay 0.01 sets an argument
  --model.scheduler CLASS      a scheduler, whose factor multiplies the computed rate; or null
  --model.label_smoothing P    probability that is spread over all classes
  --model.mix CLASS            torchvision.transforms.v2.MixUp or CutMix, for training batches

learning rate:
  --lipschitz.bound FAMILY     what L bounds: the gradient (strict) or the Hessian (smooth)
  --lipschitz.max_lr RATE      upper limit of the computed rate; --lipschitz.min_lr the lower one
  --lipschitz.update WHEN      epoch, or the number of optimizer steps between two updates
  --fixed_rate true            train at the optimizer's own learning rate: a baseline
  --audit N                    every N steps, compare each layer's gradient norm with L

training:
  --trainer.max_epochs N       length of the run; or --trainer.max_steps N
  --trainer.devices N          number of devices; with --trainer.strategy ddp a process each
  --trainer.accelerator NAME   cpu, cuda or mps (default: the best that is there)
  --trainer.precision P        32 (default), bf16-mixed, 16-mixed, ...
  --trainer.accumulate_grad_batches N
                               batches in one optimizer step
  --trainer.gradient_clip_val NORM
                               largest norm of the gradient
  --trainer.callbacks+ CLASS   one more callback: EarlyStopping, EMAWeightAveraging, ...
  --seed_everything N          seed of all random numbers
  --test_after_fit false       no test at the end

output:
  --trainer.logger CLASS       TensorBoardLogger (default), CSVLogger, WandbLogger, MLFlowLogger
  --trainer.default_root_dir F folder of lightning_logs (default: the working folder)
  --ckpt_path PATH             resume a checkpoint; "last" is the newest run's
  --checkpoint.ARGUMENT VALUE  arguments of ModelCheckpoint, such as monitor and save_top_k
"""
    + _MORE
    + """
examples:
  lit-lipschitz fit --config digits.yaml
  lit-lipschitz fit --config cifar10.yaml --model.network timm:resnet18 --trainer.max_epochs 5
""",
    "validate": _EVALUATE.format(name="validate", what="Evaluates a checkpoint on the validation set."),
    "test": _EVALUATE.format(name="test", what="Evaluates a checkpoint on the test set."),
    "predict": _EVALUATE.format(
        name="predict",
        what="""\
Writes predictions.csv: the row of the test set, the predicted class, its probability, and the true
class where the data have it. An existing file is kept; the new one is then predictions-v1.csv.""",
    ),
    "export": """\
usage: lit-lipschitz export --ckpt_path PATH [--config NAME] [--output FILE] [--format pt2|onnx]

Writes the network of a checkpoint as one file that needs no code of this project: pixels of 0 to 255,
of shape (batch, channels, height, width), to class probabilities. The preprocessing of the data is in it.

  --ckpt_path PATH   the checkpoint; "last" is the newest run's
  --config NAME      the config of the run (default: the one that fit has saved beside the checkpoint)
  --output FILE      the file (default: the checkpoint's name with .pt2 or .onnx); one that exists is kept
  --format KIND      pt2 (torch.export, the default) or onnx, which needs the packages onnx and onnxscript

example: lit-lipschitz export --ckpt_path last --output digits.pt2
""",
    "configs": """\
usage: lit-lipschitz configs [--json]
       lit-lipschitz configs show NAME
       lit-lipschitz configs copy NAME [FILE]

Lists the bundled configs, one a line: first those for everyday use, then the paper's experiments.
`show` prints one, `copy` writes it to a file that does not exist yet.

  --json             print them as JSON: name, description, and whether it is one of the paper's
""",
    "validate-config": """\
usage: lit-lipschitz validate-config FILE [FILE ...] [options of fit]

Checks every key and value of a config, or of several that override each other, as fit would: classes are
imported and built, network and data are matched. Nothing is downloaded, trained or written.

example: lit-lipschitz validate-config mine.yaml --trainer.max_epochs 5
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
"""The help texts of the commands; --help_all prints LightningCLI's."""


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
