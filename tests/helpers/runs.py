"""Runs on several ranks, and recorders of what a run logs and of its weights."""

from datetime import timedelta
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy

from helpers.task import Steps, examples, trainer
from lit_lipschitz.data import DeviceLoader


class Curves(Logger):
    """Keeps what is logged, by step, and of it that of the audit."""

    name, version = "curves", 0

    def __init__(self) -> None:
        super().__init__()
        self.points: list[Any] = []
        self.everything: list[Any] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.everything.append((step, metrics))
        if any(name.startswith("audit/") for name in metrics):
            self.points.append((step, metrics))


class Slices(L.LightningDataModule):
    """The project's own loader over somebody's module: R ranks of B see the global batches of one rank of R B."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DeviceLoader:
        return DeviceLoader(
            *examples().tensors,
            self.batch_size,
            lambda batch, _: batch,
            shuffle=True,
            epoch=lambda: self.trainer.current_epoch,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )

    def lipschitz_dataloader(self) -> DeviceLoader:
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        tensors = examples().tensors
        return DeviceLoader(*tensors, self.batch_size, lambda batch, _: batch, rank=rank, world_size=world_size)


class Keep(Steps):
    """Leaves each rank's rates and weights in a file."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        weights = [p.detach().clone() for p in pl_module.parameters()]
        torch.save({"rates": self.rates, "weights": weights}, f"rank{trainer.global_rank}.pt")


def ranks(
    count: int,
    callback: L.Callback,
    module: L.LightningModule,
    batch_size: int,
    *more: L.Callback,
    ckpt_path: str | None = None,
    ddp: dict[str, Any] | None = None,
    data: L.LightningDataModule | None = None,
    **settings: Any,
) -> list[Any]:
    """Trains on several processes; returns the rates and weights of each."""
    settings.setdefault(
        "strategy",
        DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60), **(ddp or {})),
    )
    run = trainer(callback, Keep(), *more, devices=count, **settings)
    run.fit(module, datamodule=data or Slices(batch_size), ckpt_path=ckpt_path)
    return [torch.load(f"rank{rank}.pt") for rank in range(count)]


def two_ranks(*arguments: Any, **settings: Any) -> list[Any]:
    return ranks(2, *arguments, **settings)
