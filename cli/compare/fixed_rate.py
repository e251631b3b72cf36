"""A callback that trains at a fixed learning rate, times the scheduler's factor."""

from collections.abc import Sequence
from typing import Literal

import lightning as L
from lightning.pytorch.callbacks import StochasticWeightAveraging

from lit_lipschitz.cli.fit.callbacks import find_callback
from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.optim.lr_writer import LRWriter


class FixedRate(L.Callback):
    """Writes a fixed rate in each step, as LipschitzLR writes a computed one.

    Args:
        rate: The learning rate of the first parameter group at a schedule factor of 1.
        positions: Positions of the optimizers; ``"auto"`` is the only one.
    """

    def __init__(self, rate: float, positions: Literal["auto"] | Sequence[int] = "auto") -> None:
        self._rate, self._positions = rate, positions
        self._writers: list[LRWriter] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Attaches to the optimizers."""
        count = len(trainer.optimizers)
        positions = [0] if self._positions == "auto" else self._positions
        if (self._positions == "auto" and count != 1) or max(map(int, positions)) >= count:
            raise ConfigurationError(
                f"compare: configure_optimizers of {type(pl_module).__name__} returned {count} optimizers; pass "
                "--lipschitz.optimizers with the positions of those that get the fixed rates, counted from 0"
            )
        keep = find_callback(trainer, StochasticWeightAveraging) is not None
        for optimizer in (trainer.optimizers[int(position)] for position in positions):
            own = [one.scheduler for one in trainer.lr_scheduler_configs if one.scheduler.optimizer is optimizer]
            writer = LRWriter(optimizer, own, keep_scheduled=keep)
            if writer.reference == self._rate:
                writer.close()  # the optimizer and its schedulers do the same by themselves, to the last bit
            else:
                self._writers.append(writer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the rate, after a checkpoint has been loaded; the writers keep it in every step."""
        for writer in self._writers:
            writer.write(self._rate)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Removes the hooks."""
        for writer in self._writers:
            writer.close()
        self._writers = []
