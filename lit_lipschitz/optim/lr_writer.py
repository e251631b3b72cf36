"""Writes a learning rate into an optimizer's parameter groups, composed with its schedulers."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer
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
    training, and ``written`` its lrs of the last step. ``keep_scheduled`` treats the optimizer as one with schedulers,
    which will be added during training.

    ``before_step`` is called once in each step, when its gradients are final and no parameter has moved: as the step
    begins, or after the first call of its closure; it may :meth:`write` the rate, and without it the last one is kept.
    ``after_step`` is called at the end of the step. A step of an optimizer that this one wraps, with the same parameter
    groups, counts as well.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedulers: Sequence[Any] = (),
        stored: Sequence[float] = (),
        written: Sequence[float] = (),
        keep_scheduled: bool = False,
        before_step: Callable[[], None] | None = None,
        after_step: Callable[[], None] | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.overwritten = False  # whether a rate that other code had set was overwritten
        schedulers, groups = list(_flatten(schedulers)), optimizer.param_groups
        self.scheduled = keep_scheduled or bool(schedulers) or any("initial_lr" in group for group in groups)
        self.references = [_configured_lr(group, i, schedulers) for i, group in enumerate(groups)]
        self.reference = self.references[0]  # the learning rate that is a factor of 1
        if self.reference <= 0:
            raise ConfigurationError(
                "LipschitzLR scales the optimizer's configured learning rates; the first parameter group's is "
                f"{self.reference}, expected a positive number (only the ratios between the groups matter)"
            )
        self.restore(stored, written)
        self._scheduled_lrs: list[float] | None = None  # while the optimizer steps
        self._before_step, self._after_step = before_step, after_step
        self._depth = 0  # steps that contain each other and have begun
        self._begun = False  # whether their gradients are final
        self._handles = [
            handle
            for one in (optimizer, *_wrapped(optimizer))
            for handle in (one.register_step_pre_hook(self._enter), one.register_step_post_hook(self._leave))
        ]

    def restore(self, stored: Sequence[float], written: Sequence[float]) -> None:
        """Continues the run that is resumed."""
        self._stored = list(stored)
        self._rate: float | None = written[0] if written else None
        self._written = list(written)  # by the last write

    @property
    def written(self) -> list[float]:
        """The learning rates of the last step, for the state; empty before the first one and with schedulers."""
        return list(self._written)

    @property
    def is_stepping(self) -> bool:
        """Whether a step has begun and not ended."""
        return self._depth > 0

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
        if self.scheduled and self._scheduled_lrs is None:
            return self.rates(rate)
        self._written = self._set(self.rates(rate))
        return self._written

    def close(self) -> None:
        """Removes the hooks, and restores the scheduled rates if a step was interrupted."""
        for handle in self._handles:
            handle.remove()
        self._restore()

    def rates(self, rate: float | None) -> list[float]:
        """The groups' learning rates now, for a rate of the first group at a factor of 1; None leaves them as is."""
        if rate is not None and not self.scheduled:
            return [rate * (lr / self.reference) for lr in self.references]
        scheduled = self._scheduled_lrs or self._current()
        return scheduled if rate is None else [rate * (lr / self.reference) for lr in scheduled]

    def _current(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def _sync_groups(self) -> None:
        """Takes over groups that were added, or given another lr, since the last step."""
        current = self._current()
        if current == self._written and len(current) == len(self.references):
            return
        self.references += self._stored[len(self.references) : len(current)]
        if self._written and self._rate is not None and not self.scheduled:
            self.overwritten |= self._written[0] != current[0]
            kept = self._written[0] == current[0] and self._rate
            for i, (lr, written) in enumerate(zip(current, self._written if kept else (), strict=False)):
                if lr != written:
                    self.references[i] = lr * self.reference / self._rate
        for lr in current[len(self.references) :]:
            if self._rate and not self.scheduled:
                # Code that adds a group chooses its lr relative to the written one.
                lr *= self.reference / self._rate
            self.references.append(lr)

    def _enter(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # A wrapper's step contains that of another optimizer, and a subclass's may contain super().step().
        self._depth += 1
        # Its own arguments begin with the optimizer.
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._begin()
            return None
        results: list[Any] = []
        if isinstance(optimizer, LBFGS):  # it reads the rate, then calls the closure
            with torch.enable_grad():
                results.append(closure())
            self._begin()

        def closure_then_begin() -> Any:
            result = results.pop() if results else closure()
            self._begin()
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure_then_begin}
        return (args[0], closure_then_begin, *args[2:]), kwargs

    def _begin(self) -> None:
        """The gradients of a step are final."""
        if self._begun:
            return
        self._begun = True
        if self.scheduled:
            self._scheduled_lrs = self._current()
        if self._before_step is None:
            self.write(self._rate)
        else:
            self._before_step()

    def _leave(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        has_begun = self._begun
        self.end_step()
        if has_begun and self._after_step is not None:
            self._after_step()

    def end_step(self) -> None:
        """Ends a step, which an error may have interrupted."""
        self._depth, self._begun = 0, False
        if self._scheduled_lrs is not None:
            self._restore()

    def _restore(self) -> None:
        if self._scheduled_lrs is not None:
            self._set(self._scheduled_lrs)
            self._scheduled_lrs = None

    def _set(self, lrs: list[float]) -> list[float]:
        """Sets the learning rates; returns them as the groups hold them."""
        is_tensor = False
        for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
                is_tensor = True
            else:
                group["lr"] = lr
        return self._current() if is_tensor else lrs


def _wrapped(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers that one holds and that have its parameter groups, as sharpness-aware minimization does."""
    held = (one for one in vars(optimizer).values() if isinstance(one, Optimizer) and one is not optimizer)
    return [one for one in held if one.param_groups[0] is optimizer.param_groups[0]]


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
