"""The LightningCLI behind `fit`, `validate`, `test` and `predict`, and what becomes of its errors."""

import os
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from lit_lipschitz.callback import LipschitzLR
from lit_lipschitz.cli.main import fail
from lit_lipschitz.cli.reporting import EpochLines, PredictionFile
from lit_lipschitz.errors import ConfigurationError, LitLipschitzError


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line that ends with what to do."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exits with code 2.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(message) from None


class Command(LightningCLI):
    """LightningCLI with the callback under ``lipschitz``, checkpoints under ``checkpoint``, and a test after fit."""

    running = False

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what the command has beyond LightningCLI."""
        parser.add_lightning_class_args(LipschitzLR, "lipschitz")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.filename": "{epoch}"})
        parser.add_argument("--test_after_fit", type=bool, default=True, help="Test the final weights at the end of fit.")

    def before_instantiate_classes(self) -> None:
        """Finds the checkpoint, and makes sure that it is one."""
        config = self.config[self.subcommand]
        path = config.get("ckpt_path")
        if path == "last":
            config["ckpt_path"] = path = str(_newest_checkpoint(Path(config.trainer.default_root_dir or ".")))
        if path and path != "best":
            check_checkpoint(Path(path))

    def after_instantiate_classes(self) -> None:
        """What fails from here on fails at run time."""
        self.running = True

    def after_fit(self) -> None:
        """Tests the final weights on the test set."""
        wanted = self._get(self.config, "test_after_fit") and not self.trainer.interrupted
        possible = is_overridden("test_step", self.model) and is_overridden("test_dataloader", self.datamodule)
        if not (wanted and possible):
            return
        results = self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        if self.trainer.is_global_zero:
            for result in results:
                print("  ".join(f"{name} {value:.4f}" for name, value in result.items()), flush=True)


def _newest_checkpoint(root: Path) -> Path:
    found = sorted(root.glob("lightning_logs/*/checkpoints/last*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ConfigurationError(
            f"--ckpt_path last: no run below {root.absolute() / 'lightning_logs'} has left a checkpoint; pass a path"
        )
    return found[-1]


def check_checkpoint(path: Path) -> None:
    """Makes sure that a file is there and is a whole archive, as torch.save writes it.

    Raises:
        ConfigurationError: There is no such file.
        LitLipschitzError: It is something else, or a part.
    """
    if not path.is_file():
        raise ConfigurationError(f"--ckpt_path {path}: no such file")
    if not zipfile.is_zipfile(path):
        raise LitLipschitzError(f"--ckpt_path {path}: not a checkpoint, or only a part of one; pass another")


def run() -> int:
    """Runs the command line in ``sys.argv``; returns the exit code."""
    _quieten()
    command = Command.__new__(Command)
    try:
        command.__init__(  # type: ignore[misc]
            model_class=L.LightningModule,
            datamodule_class=L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=OneLineParser,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "callbacks": [EpochLines(), PredictionFile()],
                "enable_progress_bar": sys.stderr.isatty(),
            },
            auto_configure_optimizers=False,
        )
    except ConfigurationError as error:
        return fail(error, 2)
    except LitLipschitzError as error:
        return fail(error, 1)
    except (MisconfigurationException, ValueError, TypeError) as error:
        if command.running and not isinstance(error, MisconfigurationException):
            raise
        return fail(error, 1 if command.running else 2)
    except OSError as error:
        return fail(f"{error.filename or ''}: {error.strerror or error}".lstrip(": "), 1)
    except RuntimeError as error:
        if "Error(s) in loading state_dict" not in str(error):
            raise
        return fail(_foreign_checkpoint(error), 1)
    return 0


def _foreign_checkpoint(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[1] if len(lines) > 1 else lines[0]
    return f"the checkpoint is of another network: {first[:300]} Pass the config that it was trained with."


def _quieten() -> None:
    """Silences what Lightning says of its own insides."""
    for message in (".*LeafSpec.*", ".*instantiate_classes.*", ".*smaller than the logging interval.*"):
        warnings.filterwarnings("ignore", message)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*exists and is not empty.*")
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
