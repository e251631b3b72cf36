"""Writes a learning rate into an optimizer's parameter groups, composed with its schedulers."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from lit_lipschitz.errors import ConfigurationError


class LRWriter:
    """Keeps the learning rates of an optimizer at ``rate * (group's lr / reference)``.

    The reference is the configured lr of the first group. So the ratios between the groups are kept, and a scheduler's
    value over the reference is a factor. A scheduler computes its next value from the one in the group; with a
    scheduler the written rate therefore stands there only while the optimizer steps, without one it stays.

    Without a scheduler, the lr of a group that is added during training, or of a later group that other code changes,
    is relative to the first group's lr at that time.

    The optimizer is as configured: neither stepped nor restored from a checkpoint. ``stored`` are the
    ``references``, the configured lr of each group, of the run that is resumed, for groups that were added during
    training. ``keep_scheduled`` treats the optimizer as one with schedulers, which will be added during training.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedulers: Sequence[Any] = (),
        stored: Sequence[float] = (),
        keep_scheduled: bool = False,
    ) -> None:
        self.optimizer = optimizer
        self.steps = 0  # optimizer steps since the writer was made
        schedulers, groups = list(_flatten(schedulers)), optimizer.param_groups
        self.scheduled = keep_scheduled or bool(schedulers) or any("initial_lr" in group for group in groups)
        self.references = [_configured_lr(group, i, schedulers) for i, group in enumerate(groups)]
        self.reference = self.references[0]  # the learning rate that is a factor of 1
        self._stored = list(stored)
        if self.reference <= 0:
            raise ConfigurationError(
                "LipschitzLR scales the optimizer's configured learning rates; the first parameter group's is "
                f"{self.reference}, expected a positive number (only the ratios between the groups matter)"
            )
        self._rate: float | None = None
        self._scheduled_lrs: list[float] | None = None  # while the optimizer steps
        self._written: list[float] = []  # by the last write
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @property
    def ratios(self) -> list[float]:
        """Each group's current learning rate over the first group's, or the configured ratios if that is 0."""
        rates = self.rates(1.0)
        rates = rates if rates[0] else self.references
        return [rate / rates[0] for rate in rates]

    def write(self, rate: float | None) -> list[float]:
        """Sets the learning rate of the current or next optimizer step, and returns that of each group.

        ``rate`` is that of the first group at a schedule factor of 1; None leaves the groups unchanged.
        """
        self._sync_groups()
        self._rate = rate
        # With a GradScaler the closure runs before the optimizer's step, which may be skipped; otherwise within it.
        if self.scheduled and self._scheduled_lrs is None:
            return self.rates(rate)
        self._set(self.rates(rate))
        self._written = self._current()
        return self._written

    def close(self) -> None:
        """Removes the hooks, and restores the scheduled rates if a step was interrupted."""
        for handle in self._handles:
            handle.remove()
        self._restore()

    def rates(self, rate: float | None) -> list[float]:
        """The groups' learning rates now, for a rate of the first group at a factor of 1; None leaves them as is."""
        scheduled = self._scheduled_lrs or self._current()
        if rate is None:
            return scheduled
        return [rate * (lr / self.reference) for lr in (scheduled if self.scheduled else self.references)]

    def _current(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def _sync_groups(self) -> None:
        """Takes over groups that were added, or given another lr, since the last step."""
        current = self._current()
        if self._rate is not None and not self.scheduled and self._written[:1] == current[:1]:
            for i, written in enumerate(self._written):
                if current[i] != written:
                    self.references[i] = current[i] * self.reference / self._rate
        for i, lr in enumerate(current[len(self.references) :], len(self.references)):
            if i < len(self._stored):
                lr = self._stored[i]
            elif self._rate is not None and not self.scheduled:
                # Code that adds a group chooses its lr relative to the written one.
                lr *= self.reference / self._rate
            self.references.append(lr)

    def _before_step(self, *_: Any) -> None:
        # A subclass that calls super().step() runs the hooks again within its own step.
        if self.scheduled and self._scheduled_lrs is None:
            self._scheduled_lrs = self._current()
            self._set(self.rates(self._rate))

    def _after_step(self, *_: Any) -> None:
        self.steps += 1
        self._restore()

    def _restore(self) -> None:
        if self._scheduled_lrs is not None:
            self._set(self._scheduled_lrs)
            self._scheduled_lrs = None

    def _set(self, lrs: Sequence[float]) -> None:
        for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr


def _flatten(schedulers: Sequence[Any]) -> Iterator[Any]:
    """The schedulers, and those within SequentialLR and ChainedScheduler."""
    for scheduler in schedulers:
        yield scheduler
        yield from _flatten(getattr(scheduler, "_schedulers", ()))


def _configured_lr(group: dict[str, Any], index: int, schedulers: Sequence[Any]) -> float:
    """The configured lr of a group: initial_lr of most schedulers, the maximum of cyclic ones."""
    for scheduler in schedulers:
        if isinstance(scheduler, OneCycleLR):
            return float(group["max_lr"])
        if isinstance(scheduler, CyclicLR):
            return float(scheduler.max_lrs[index])
    return float(group.get("initial_lr", group["lr"]))
