"""``LipschitzAudit``: the callback that checks, on the network that trains, what the papers take for granted."""

import io
import math
import shutil
import statistics
import sys
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_lipschitz.bounds.families import Bound
from lit_lipschitz.callbacks.lipschitz_lr import LipschitzLR
from lit_lipschitz.errors import ConfigurationError

_ROUNDING = 1e-5  # what float32 may add to a gradient that attains the bound
_ROWS = 40


@dataclass(frozen=True)
class LayerSummary:
    """What the audited steps have shown of one layer.

    Attributes:
        name: The layer's name as in ``named_modules()``.
        steps: Audited steps in which it had a gradient.
        nonfinite: Steps in which its gradient was not finite; they count nowhere else.
        median_norm: Median Euclidean norm of its gradient; NaN without a step.
        largest_norm: Largest Euclidean norm.
        largest_entry: Largest absolute entry.
        largest_by_norm: Steps in which no layer's norm was larger.
        largest_by_entry: Steps in which no layer's largest entry was larger.
        compared: Steps in which there was a constant L that bounds gradients.
        largest_ratio: Largest norm / L; None where nothing was compared.
        exceeded: Steps in which the norm was above L, by more than float32 rounds.
    """

    name: str
    steps: int
    nonfinite: int
    median_norm: float
    largest_norm: float
    largest_entry: float
    largest_by_norm: int
    largest_by_entry: int
    compared: int
    largest_ratio: float | None
    exceeded: int


@dataclass(frozen=True)
class AuditSummary:
    """What the audited steps have shown.

    Attributes:
        bound: Family of L.
        steps: Audited steps with finite gradients; all numbers are of these.
        nonfinite: Audited steps in which some gradient was not finite.
        head: Name of the head, or None before it is known.
        layers: The layers that had a gradient, in network order.
        largest_over_head: Largest norm of another layer's gradient over the head's in the same step; above 1 the
            premise is violated. None without a step in which both had one.
        largest_other: Name of that layer.
        compared: Steps in which there was a constant L that bounds gradients.
        bounded: Steps of these in which no layer's norm was above L.
    """

    bound: Bound
    steps: int
    nonfinite: int
    head: str | None
    layers: tuple[LayerSummary, ...]
    largest_over_head: float | None
    largest_other: str
    compared: int
    bounded: int

    @property
    def head_layer(self) -> LayerSummary | None:
        """The head's own row; None where it had no gradient."""
        return next((layer for layer in self.layers if layer.name == self.head and layer.steps), None)

    @property
    def verdicts(self) -> list[str]:
        """The answers in sentences."""
        lost = f"Gradients were not finite in {self.nonfinite} audited steps, which are not counted."
        if not self.steps:
            return ["No gradient was audited.", *([lost] if self.nonfinite else [])]
        head = self.head_layer
        sentences = [self._premise(head)]
        if self.bound == "smooth":
            sentences.append("L was not compared: the constant of bound='smooth' bounds the Hessian, not the gradient.")
        elif not self.compared:
            sentences.append("L was not compared: no audited step's rate came from a constant.")
        else:
            if head is not None and head.compared:
                sentences.append(
                    f"L bounded the head's gradient in {head.compared - head.exceeded} of {head.compared} steps; "
                    f"largest factor {head.largest_ratio:.3g}."
                )
            worst = max(self.layers, key=lambda layer: layer.largest_ratio or 0.0)
            sentences.append(
                f"L bounded every layer's gradient in {self.bounded} of {self.compared} steps; largest factor "
                f"{worst.largest_ratio or 0.0:.3g}, layer {worst.name}."
            )
        return [*sentences, lost] if self.nonfinite else sentences

    def _premise(self, head: LayerSummary | None) -> str:
        if head is None:
            return f"The head{f' {self.head}' if self.head else ''} had no gradient of its own in any audited step."
        sentence = (
            f"The head's gradient was the largest in {head.largest_by_norm} of {head.steps} audited steps (by norm; "
            f"{head.largest_by_entry} by largest entry)"
        )
        if self.largest_over_head is None:
            return f"{sentence}."
        return (
            f"{sentence}; another layer's was up to {self.largest_over_head:.3g} times its norm ({self.largest_other})."
        )


@dataclass
class _Tally:
    """What has been counted of one layer."""

    norms: "array[float]" = field(default_factory=lambda: array("d"))
    largest_entry: float = 0.0
    largest_by_norm: int = 0
    largest_by_entry: int = 0
    compared: int = 0
    largest_ratio: float = 0.0
    exceeded: int = 0
    nonfinite: int = 0

    def summary(self, name: str) -> LayerSummary:
        return LayerSummary(
            name=name,
            steps=len(self.norms),
            nonfinite=self.nonfinite,
            median_norm=statistics.median(self.norms) if self.norms else math.nan,
            largest_norm=max(self.norms, default=0.0),
            largest_entry=self.largest_entry,
            largest_by_norm=self.largest_by_norm,
            largest_by_entry=self.largest_by_entry,
            compared=self.compared,
            largest_ratio=self.largest_ratio if self.compared else None,
            exceeded=self.exceeded,
        )


class _Ledger:
    """Counts steps: plain numbers in, a summary out."""

    def __init__(self, bound: Bound = "strict") -> None:
        self.bound: Bound = bound
        self.steps = self.nonfinite = self.compared = self.bounded = 0
        self.over_head: tuple[float, str] | None = None
        self._tallies: dict[str, _Tally] = {}

    def update(self, gradients: Mapping[str, tuple[float, float]], constant: float | None, head: str | None) -> bool:
        """Takes in a step: norm and largest entry by layer. Returns False where they are not finite."""
        lost = [name for name, sizes in gradients.items() if not all(map(math.isfinite, sizes))]
        for name in gradients:
            self._tallies.setdefault(name, _Tally()).nonfinite += name in lost
        if lost:
            self.nonfinite += 1
            return False
        self.steps += 1
        most, most_entry = (max(sizes) for sizes in zip(*gradients.values(), strict=True))
        for name, (norm, entry) in gradients.items():
            tally = self._tallies[name]
            tally.norms.append(norm)
            tally.largest_entry = max(tally.largest_entry, entry)
            tally.largest_by_norm += norm == most
            tally.largest_by_entry += entry == most_entry
            if constant:
                tally.compared += 1
                tally.largest_ratio = max(tally.largest_ratio, norm / constant)
                tally.exceeded += _exceeds(norm, constant)
        if constant:
            self.compared += 1
            self.bounded += not _exceeds(most, constant)
        if head is not None and head in gradients and len(gradients) > 1:
            other = max((name for name in gradients if name != head), key=lambda name: gradients[name][0])
            factor = _over(gradients[other][0], gradients[head][0])
            if self.over_head is None or factor > self.over_head[0]:
                self.over_head = factor, other
        return True

    def summary(self, head: str | None, order: list[str]) -> AuditSummary:
        """The numbers so far, the layers in the order of the names."""
        factor, other = self.over_head or (None, "")
        names = dict.fromkeys([*order, *self._tallies])  # with layers that were removed while training
        return AuditSummary(
            bound=self.bound,
            steps=self.steps,
            nonfinite=self.nonfinite,
            head=head,
            layers=tuple(self._tallies[name].summary(name) for name in names if name in self._tallies),
            largest_over_head=factor,
            largest_other=other,
            compared=self.compared,
            bounded=self.bounded,
        )


def _exceeds(norm: float, constant: float) -> bool:
    return norm > constant * (1 + _ROUNDING)


def _over(norm: float, other: float) -> float:
    if other:
        return norm / other
    return math.inf if norm else 0.0


@dataclass
class _Reading:
    """The gradients of one step, on their device until they are asked for."""

    step: int
    layers: list[str]  # the layer of each gradient
    sizes: Tensor  # norms, then largest entries
    constant: float | None = None

    def by_layer(self) -> dict[str, tuple[float, float]]:
        """Norm and largest entry of each layer, by the one host read of a step."""
        values = self.sizes.tolist()
        norms: dict[str, list[float]] = {}
        entries: dict[str, list[float]] = {}
        for i, name in enumerate(self.layers):
            norms.setdefault(name, []).append(values[i])
            entries.setdefault(name, []).append(values[len(self.layers) + i])
        # max() would pass over a NaN, which the norm has as well.
        return {name: (math.hypot(*norms[name]), max(entries[name])) for name in norms}


def _layers(root: nn.Module) -> dict[str, nn.Module]:
    """The modules that own parameters directly, by name; the root, whose own name is empty, by that of its class."""
    return {
        name.replace("_orig_mod.", "") or type(root).__name__: module
        for name, module in root.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }


def _dense(gradient: Tensor) -> Tensor:
    """A gradient as a tensor with the same norm that the norms know."""
    gradient = gradient.coalesce().values() if gradient.is_sparse else gradient
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient


def _read(root: nn.Module, optimizer: Optimizer, step: int) -> _Reading | None:
    """The gradients that an optimizer is about to use; None where there are none."""
    stepped = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    names: list[str] = []
    gradients: list[Tensor] = []
    for name, module in _layers(root).items():
        for parameter in module.parameters(recurse=False):
            gradient = parameter.grad
            # What no optimizer steps keeps adding up its gradients.
            if gradient is not None and gradient.numel() and parameter.requires_grad and parameter in stepped:
                names.append(name)
                gradients.append(_dense(gradient.detach()))
    if not gradients:
        return None
    dtype = torch.float64 if any(gradient.dtype == torch.float64 for gradient in gradients) else torch.float32
    sizes = [size for order in (2, math.inf) for size in torch._foreach_norm(gradients, order, dtype=dtype)]
    return _Reading(step, names, torch.stack([size.to(sizes[0].device) for size in sizes]))


class LipschitzAudit(Callback):
    """Audits the premise of the papers while a network trains beside :class:`~lit_lipschitz.LipschitzLR`.

    Is the gradient of the last layer the largest, and does L bound the gradients, in how many steps, by what factor?
    The first optimizer step and every ``every``-th after it are audited: for each layer (a module that owns trainable
    parameters directly), the Euclidean norm of its gradient over all of these and its largest absolute entry, against
    the constant L that this very step's rate comes from. It costs one host read an audited step, and none on others.

    Every logger of the trainer gets ``audit/<layer>/ratio`` (norm / L) and ``audit/largest_is_head`` (1 or 0, by norm),
    and ``audit/largest_layer``, the place of the largest one among the layers that have a row in the table, from 0.
    Where a step has no L, or one that bounds the Hessian (``bound="smooth"``), it is ``audit/<layer>/gradient``, the
    norm. A table of the layers and the verdicts are printed on stderr at the end of fit; :meth:`summary` has the
    numbers.

    - Gradients are read as the optimizer's step begins: accumulated, unscaled, averaged over the ranks, before
      clipping.
    - Coupled weight decay is added by the optimizer inside its step: it is in L and not in the gradients.
    - A layer without a gradient in a step, as a frozen one, does not count in it. A step with gradients that are not
      finite is counted as such and nowhere else. Parameters that two layers share count in both.
    - Nothing is kept in checkpoints: a resumed run audits anew.

    Args:
        every: Optimizer steps from one audited step to the next.

    Raises:
        ConfigurationError: ``every`` is no number of steps; when the fit begins, the trainer has no LipschitzLR or its
            strategy shards the gradients.

    Example:
        >>> import lightning as L
        >>> from lit_lipschitz.callbacks.lipschitz_lr import LipschitzLR
        >>> trainer = L.Trainer(callbacks=[LipschitzLR(), LipschitzAudit()], logger=False, enable_checkpointing=False)

    References:
        R. Yedida, S. Saha: A novel adaptive learning rate scheduler for deep neural networks, arXiv 1902.07399, 2019,
        equation 1.
    """

    def __init__(self, every: int = 100) -> None:
        super().__init__()
        if type(every) is not int or every < 1:
            raise ConfigurationError(f"LipschitzAudit(every={every!r}): expected a number of steps >= 1")
        self.every = every
        self._lipschitz: LipschitzLR | None = None
        self._forget()

    def _forget(self) -> None:
        """The state before any run."""
        self._steps = 0  # optimizer steps
        self._behind = False  # whether LipschitzLR's hooks run before these
        self._reading: _Reading | None = None
        self._order: list[str] = []
        self._ledger = _Ledger()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the LipschitzLR and starts afresh."""
        if stage != "fit":
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        lipschitz = next((callback for callback in callbacks if isinstance(callback, LipschitzLR)), None)
        if lipschitz is None:
            raise ConfigurationError(
                "LipschitzAudit compares gradients with LipschitzLR's constant and found no LipschitzLR in "
                "trainer.callbacks: add one"
            )
        if isinstance(trainer.strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)):
            raise ConfigurationError(
                f"LipschitzAudit needs the whole gradients on each rank, and {type(trainer.strategy).__name__} shards "
                "them; use ddp or one device, or remove the callback"
            )
        self._forget()
        self._lipschitz = lipschitz
        self._behind = callbacks.index(lipschitz) < callbacks.index(self)
        self._ledger = _Ledger(lipschitz.policy.bound)
        if lipschitz.policy.bound == "smooth":
            rank_zero_info(
                "LipschitzAudit: the constant of bound='smooth' bounds the Hessian, not the gradient; gradients are "
                "logged as they are, not as ratios"
            )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Reads the gradients, on their device, where the step is due."""
        assert self._lipschitz is not None
        if not self._lipschitz.controls(optimizer):
            return
        # A batch that makes several steps (by hand) comes here with the last one's reading.
        self._finish(trainer)
        self._steps += 1
        if (self._steps - 1) % self.every:
            return
        self._order = list(_layers(pl_module))
        self._reading = _read(pl_module, optimizer, trainer.global_step)
        if self._behind and self._reading is not None:
            self._reading.constant = self._lipschitz.constant

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts and logs a step that was read."""
        self._finish(trainer)

    def _finish(self, trainer: Trainer) -> None:
        reading, self._reading = self._reading, None
        if reading is None:
            return
        assert self._lipschitz is not None
        # In front of LipschitzLR, this is the first hook after it has set the constant of the step that was read.
        constant = reading.constant if self._behind else self._lipschitz.constant
        constant = None if self._ledger.bound == "smooth" else constant
        head = self._lipschitz.head_name
        gradients = reading.by_layer()
        if not self._ledger.update(gradients, constant, head):
            return
        if constant:
            metrics = {f"audit/{name}/ratio": norm / constant for name, (norm, _) in gradients.items()}
        else:
            metrics = {f"audit/{name}/gradient": norm for name, (norm, _) in gradients.items()}
        largest = max(norm for norm, _ in gradients.values())
        metrics["audit/largest_layer"] = float([norm for norm, _ in gradients.values()].index(largest))
        if head is not None and head in gradients:
            metrics["audit/largest_is_head"] = float(gradients[head][0] == largest)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=reading.step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the table and the verdicts, on rank 0."""
        if trainer.is_global_zero:
            _show(self.summary(), self.every)

    def summary(self) -> AuditSummary:
        """What the audited steps of the last fit have shown so far."""
        head = self._lipschitz.head_name if self._lipschitz is not None else None
        return self._ledger.summary(head, self._order)


def _show(summary: AuditSummary, every: int) -> None:
    """Prints a summary on stderr."""
    text = io.StringIO()
    # Where nobody looks on, no width cuts a line.
    width = shutil.get_terminal_size().columns if sys.stderr.isatty() else None
    console = Console(file=text, width=width or 240, highlight=False)
    if summary.layers:
        rows = sorted(summary.layers, key=lambda layer: (layer.largest_ratio or 0.0, layer.largest_norm), reverse=True)
        title = f"Gradients before clipping, in {summary.steps} audited steps (one in {every})"
        if len(rows) > _ROWS:
            what = "ratios to L" if summary.compared else "gradients"
            title += f"; the {_ROWS} of {len(rows)} layers with the largest {what}, largest first"
        console.print(Text(title))
        console.print(_table(summary, rows[:_ROWS] if len(rows) > _ROWS else list(summary.layers)))
    for sentence in summary.verdicts:
        console.print(Text(sentence), soft_wrap=width is None)
    # By print, which a progress bar that is still drawn makes room for; a console of rich would write over it.
    print("\n".join(line.rstrip() for line in text.getvalue().splitlines()), file=sys.stderr, flush=True)


def _table(summary: AuditSummary, layers: list[LayerSummary]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("\nlayer", overflow="fold")
    headings = ["median\nnorm", "largest\nnorm", "largest\nentry", "largest\nby norm", "largest\nby entry"]
    headings += ["largest\nnorm / L", "norm\nabove L"] if summary.compared else []
    headings += ["not\nfinite"] if summary.nonfinite else []
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in layers:
        cells = [f"{layer.median_norm:.3g}", f"{layer.largest_norm:.3g}", f"{layer.largest_entry:.3g}"]
        cells += [f"{count}/{layer.steps}" for count in (layer.largest_by_norm, layer.largest_by_entry)]
        if summary.compared:
            ratio = "-" if layer.largest_ratio is None else f"{layer.largest_ratio:.3g}"
            cells += [ratio, f"{layer.exceeded}/{layer.compared}"]
        cells += [str(layer.nonfinite)] if summary.nonfinite else []
        name = f"{layer.name} (head)" if layer.name == summary.head else layer.name
        table.add_row(Text(name), *cells)
    return table
