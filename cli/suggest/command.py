"""`lit-lipschitz suggest`: the learning rate and the effective batch of a config before training, in memory."""

import argparse
import contextlib
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L

from lit_lipschitz import suggestion
from lit_lipschitz.callbacks.averaged_weights import AveragedWeights
from lit_lipschitz.callbacks.lipschitz_lr import LipschitzLR
from lit_lipschitz.callbacks.trainer_facts import callbacks_of, targets_of, training_batches, training_loss
from lit_lipschitz.cli.explain.command import end_with_this_batch
from lit_lipschitz.cli.fit.callbacks import remove_callbacks
from lit_lipschitz.cli.fit.command import run
from lit_lipschitz.cli.fit.quiet_fit import DryRun
from lit_lipschitz.cli.help import OptionParser
from lit_lipschitz.cli.output import fail, to_json, write_whole
from lit_lipschitz.cli.suggest.picture import png
from lit_lipschitz.cli.suggest.text import text
from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.measurement.gradient_noise import CONFIDENCE
from lit_lipschitz.suggestion import Suggestion

_NOT_OF_ATTACH = ("optimizers", "restore", "measure", "dry_run")
"""Arguments of LipschitzLR that do not change its first rate, or that are checked here."""


class _Measure(L.Callback):
    """Makes the suggestion when a fit would begin, and ends it."""

    suggestion: Suggestion | None = None

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Model, optimizer and data are on the device by now, as in a fit."""
        if not pl_module.automatic_optimization:
            raise ConfigurationError(
                f"suggest expected automatic optimization and found {type(pl_module).__name__} with manual "
                "optimization, which makes steps itself; use lit-lipschitz explain"
            )
        (target,) = targets_of(trainer, pl_module, "auto")
        clipping = target.optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm
        self.suggestion = suggestion.suggest(
            pl_module,
            target.optimizer,
            ({"batch": batch, "number": number} for number, batch in enumerate(training_batches(trainer))),
            lambda _, batch: training_loss(trainer, batch["batch"], batch["number"]),
            accumulate_grad_batches=trainer.accumulate_grad_batches,
            schedulers=target.schedulers,
            clip=lambda: pl_module.configure_gradient_clipping(*clipping),
            **self._settings,
        )
        end_with_this_batch(trainer)


class _Suggest(DryRun):
    """A fit that writes nothing and ends before its first step."""

    name = "suggest"

    def __init__(self, chosen: argparse.Namespace) -> None:
        super().__init__()
        self._chosen = chosen
        self.suggestion: Suggestion | None = None  # on rank 0, after the fit

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parses, and refuses what is not before training or needs all of the training set."""
        super().parse_arguments(parser, args)
        if self.options.ckpt_path:
            raise ConfigurationError("suggest --ckpt_path: it is for the initial weights; use lit-lipschitz explain")
        if self.options.lipschitz.measure == "pass":
            raise ConfigurationError(
                "suggest --lipschitz.measure pass: it reads all of the training set; use lit-lipschitz explain"
            )

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Builds a trainer whose learning rate nothing sets."""
        trainer = super().instantiate_trainer(**kwargs)
        remove_callbacks(trainer, LipschitzLR)
        AveragedWeights.ensure(trainer)
        settings = {k: v for k, v in self.options.lipschitz.as_dict().items() if k not in _NOT_OF_ATTACH}
        self._measure = _Measure({"num_batches": self._chosen.batches, "curve": self._chosen.curve, **settings})
        callbacks_of(trainer).append(self._measure)
        return trainer

    def after_fit(self) -> None:
        """Keeps the suggestion, on rank 0."""
        if self._measure.suggestion is None:
            raise ConfigurationError("suggest found no batch to train on; check the length of the run and the data")
        self.suggestion = self._measure.suggestion if self.trainer.is_global_zero else None


def suggest(arguments: list[str]) -> int:
    """Runs the command.

    Args:
        arguments: What comes after its name.

    Returns:
        The exit code.
    """
    try:
        chosen, rest = parse_options(arguments)
        command = _Suggest(chosen)
        # What data and modules print is not part of the answer.
        with contextlib.redirect_stdout(sys.stderr) if chosen.json else contextlib.nullcontext():
            code = run(lambda: command, ["fit", *rest])
        if code == 0 and command.suggestion is not None:
            _answer(command.suggestion, chosen)
    except ConfigurationError as error:
        return fail(error, 2)
    return code


def parse_options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Splits the arguments into the options of suggest and those of fit.

    Raises:
        ConfigurationError: There is a mistake in the options of suggest.
    """
    parser = OptionParser("suggest")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--curve", action="store_true")
    parser.add_argument("--png", type=Path)
    parser.add_argument("--json", action="store_true")
    chosen, rest = parser.parse_known_args(arguments)
    chosen.curve |= chosen.png is not None
    if chosen.batches < 1:
        raise ConfigurationError(f"suggest --batches {chosen.batches}: expected the number of batches, at least 1")
    if chosen.png is not None and not find_spec("matplotlib"):
        raise ConfigurationError(
            f"suggest --png {chosen.png}: matplotlib is missing: pip install 'lit-lipschitz[plots]', or pass --curve"
        )
    if chosen.png is not None and (chosen.png.is_dir() or not chosen.png.parent.is_dir()):
        raise ConfigurationError(f"suggest --png {chosen.png}: expected a file in a folder that exists")
    return chosen, rest


def _answer(found: Suggestion, chosen: argparse.Namespace) -> None:
    """Prints a suggestion, and writes its picture."""
    if chosen.png is not None and found.curve is not None:
        try:
            write_whole(chosen.png, png(found.curve))
        except OSError as error:
            raise ConfigurationError(f"suggest --png {chosen.png}: can't be written: {error.strerror}") from None
    if len(found.rates) < chosen.batches:
        print(
            f"lit-lipschitz: warning: suggest: --batches is {chosen.batches} and an epoch has {len(found.rates)} "
            "optimizer steps; all of them are used",
            file=sys.stderr,
        )
    if not chosen.json:
        print(text(found))
        return
    numbers = {"rate": found.rate, "rate_range": found.rate_range, **asdict(found), "confidence": CONFIDENCE}
    renamed = {"constant": "L", "noise": "noise_scale"}
    print(to_json({renamed.get(key, key): value for key, value in numbers.items()}, indent=1))
