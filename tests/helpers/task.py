"""A small task, a trainer that prints nothing, a recorder of learning rates."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from sklearn.metrics import r2_score
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parent.parent.parent
EXAMPLES, WIDTH, CLASSES = 96, 6, 3
# One thread a process, and in those it starts: OpenMP's threads do not survive a fork, so a rank that is forked after
# they have started waits for them for ever.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# A process whose first backward is one of torch.compile has started autograd's threads, and no rank can be forked then.
torch.zeros((), requires_grad=True).backward()


class Classifier(L.LightningModule):
    """Somebody's own module: no part of this project, plain cross-entropy, a plain optimizer."""

    def __init__(self, optimizer: Callable[[Any], Any] | None = None, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, CLASSES))
        self.make = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def examples(seed: int = 0, count: int = EXAMPLES) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, WIDTH, generator=generator)
    return TensorDataset(inputs, (inputs @ torch.randn(WIDTH, CLASSES, generator=generator)).argmax(dim=1))


def loader(batch_size: int = 16, count: int = EXAMPLES) -> DataLoader[Any]:
    return DataLoader(examples(count=count), batch_size=batch_size)


def trainer(*callbacks: L.Callback, **settings: Any) -> L.Trainer:
    defaults = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(callbacks=list(callbacks), **{**defaults, **settings})


class Steps(L.Callback):
    """Records what every optimizer step used: the rates of the groups while it ran, and how far the weights moved."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        optimizer = trainer.optimizers[0]
        handle = optimizer.register_step_post_hook(self._record)
        optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)

    def _record(self, optimizer: Any, *_: Any) -> None:
        self.rates.append([float(group["lr"]) for group in optimizer.param_groups])


def due_steps(count: int, interval: int, every: int = 61) -> list[int]:
    """The optimizer steps that are measured, of so many, with updates every so many steps."""
    due = [1]
    for step in range(2, count + 1):
        if step >= 1.25 * due[-1] or step == due[-1] + every or (step - 1) % interval == 0:
            due.append(step)
    return due


def length(parts: Iterable[Tensor]) -> float:
    """Euclidean norm of several tensors together."""
    return sum((part.double() ** 2).sum().item() for part in parts) ** 0.5


def adamws_scale(optimizer: Any, gradients: list[Tensor]) -> tuple[float, float]:
    """Length of the gradient over that of AdamW's update at a rate of 1, from torch's own state after the step.

    Of all parameters together, and the mean of that of the matrices.
    """
    updates = []
    for parameter in optimizer.param_groups[0]["params"]:
        state = optimizer.state[parameter]
        t = state["step"].item()
        updates.append((state["exp_avg"] / (1 - 0.9**t)) / ((state["exp_avg_sq"] / (1 - 0.999**t)) ** 0.5 + 1e-8))
    return length(gradients) / length(updates), mean_of_matrices(gradients, updates)


def mean_of_matrices(gradients: list[Tensor], updates: list[Tensor]) -> float:
    """Mean over the matrices of how long the gradient is beside the update."""
    ratios = [length([g]) / length([u]) for g, u in zip(gradients, updates, strict=True) if g.dim() == 2]
    return sum(ratios) / len(ratios)


def explained(outputs: Tensor, targets: Tensor) -> float:
    """R^2 by scikit-learn, of the variance of all outputs together."""
    return float(r2_score(targets.double(), outputs.double(), multioutput="variance_weighted"))
