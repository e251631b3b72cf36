"""Writes a learning rate into an optimizer's parameter groups, together with whatever schedulers do to them."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from lit_lipschitz.errors import ConfigurationError


class RateWriter:
    """Keeps an optimizer's rates at ``rate * (group's rate / reference)``.

    The reference is the first group's configured rate, so the ratios between groups are kept, and a scheduler's value
    over it is a factor. A scheduler computes its next value from the one in the group, so with one the rate stands
    there only while the optimizer steps; without one it stays.

    Without a scheduler, a group that is added while training, and a later group that something else gives another rate,
    count relative to the first group's rate at that time.

    Args:
        optimizer: The optimizer, as configured: neither stepped nor restored.
        schedulers: Its learning-rate schedulers.
        stored: :attr:`references` of the run that is resumed, for the groups that were added in it.
        keep_nominal: Treat the optimizer as one with schedulers, since some will come while it trains.

    Raises:
        ConfigurationError: The reference is 0.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedulers: Sequence[Any] = (),
        stored: Sequence[float] = (),
        keep_nominal: bool = False,
    ) -> None:
        self.optimizer = optimizer
        self.steps = 0
        schedulers = list(_flat(schedulers))
        self.scheduled = (
            keep_nominal or bool(schedulers) or any("initial_lr" in group for group in optimizer.param_groups)
        )
        self._references = [_reference(group, i, schedulers) for i, group in enumerate(optimizer.param_groups)]
        self._stored = list(stored)
        if self._references[0] <= 0:
            raise ConfigurationError(
                "LipschitzLR scales the optimizer's configured rates; the first parameter group's is "
                f"{self._references[0]}, expected a positive number (its size does not matter, ratios do)"
            )
        self._rate: float | None = None
        self._nominal: list[float] | None = None
        self._written: list[float] = []  # what stands in the groups since the last write
        self._stepping = False
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @property
    def reference(self) -> float:
        """The rate that counts as a factor of 1."""
        return self._references[0]

    @property
    def references(self) -> list[float]:
        """The configured rate of every group."""
        return list(self._references)

    @property
    def ratios(self) -> list[float]:
        """Every group's rate over the first one's, now, or as they are configured where that is 0."""
        rates = self.rates(1.0)
        if not rates[0]:
            rates = self._references
        return [rate / rates[0] for rate in rates]

    def write(self, rate: float | None) -> list[float]:
        """Sets the rate for the step that is under way or comes next.

        Args:
            rate: Rate of the first group at a factor of 1, or None to leave the groups as they are.

        Returns:
            The rates that the step uses, one a group.
        """
        self._look_at_groups()
        self._rate = rate
        # A GradScaler runs the closure before the optimizer's step, and perhaps no step at all; else it runs inside.
        if self._stepping or not self.scheduled:
            self._apply()
            return [float(group["lr"]) for group in self.optimizer.param_groups]
        return self.rates(rate)

    def close(self) -> None:
        """Takes the hooks off the optimizer, and restores what a step that broke off has left."""
        for handle in self._handles:
            handle.remove()
        self._restore()

    def rates(self, rate: float | None) -> list[float]:
        """What the groups' rates are, now, for a rate of the first group at a factor of 1; None leaves them."""
        groups = self.optimizer.param_groups
        nominal = self._nominal or [float(group["lr"]) for group in groups]
        if rate is None:
            return nominal
        if not self.scheduled:
            nominal = self._references
        return [rate * (lr / self.reference) for lr in nominal]

    def _look_at_groups(self) -> None:
        """Takes in groups that were added, or given another rate, since the last step."""
        groups = self.optimizer.param_groups
        if self._rate is not None and not self.scheduled and self._written[:1] == [float(groups[0]["lr"])]:
            for i, written in enumerate(self._written):
                if float(groups[i]["lr"]) != written:
                    self._references[i] = float(groups[i]["lr"]) * self.reference / self._rate
        for i in range(len(self._references), len(groups)):
            lr = float(groups[i]["lr"])
            if i < len(self._stored):
                lr = self._stored[i]
            elif self._rate is not None and not self.scheduled:
                # Whoever adds a group sees the written rate in the first one, and measures by it.
                lr *= self.reference / self._rate
            self._references.append(lr)

    def _apply(self) -> None:
        for group, lr in zip(self.optimizer.param_groups, self.rates(self._rate), strict=True):
            _set(group, lr)
        self._written = [float(group["lr"]) for group in self.optimizer.param_groups]

    def _before_step(self, *_: Any) -> None:
        self._stepping = True
        if self.scheduled:
            self._nominal = [float(group["lr"]) for group in self.optimizer.param_groups]
            self._apply()

    def _after_step(self, *_: Any) -> None:
        self._stepping = False
        self.steps += 1
        self._restore()

    def _restore(self) -> None:
        if self._nominal is not None:
            for group, lr in zip(self.optimizer.param_groups, self._nominal, strict=True):
                _set(group, lr)
            self._nominal = None


def _flat(schedulers: Sequence[Any]) -> Iterator[Any]:
    """The schedulers, with those that SequentialLR and ChainedScheduler hold."""
    for scheduler in schedulers:
        yield scheduler
        yield from _flat(getattr(scheduler, "_schedulers", ()))


def _reference(group: dict[str, Any], index: int, schedulers: Sequence[Any]) -> float:
    """The configured rate of a group, which most schedulers keep as initial_lr and cyclic ones as their maximum."""
    for scheduler in schedulers:
        if isinstance(scheduler, OneCycleLR):
            return float(group["max_lr"])
        if isinstance(scheduler, CyclicLR):
            return float(scheduler.max_lrs[index])
    return float(group.get("initial_lr", group["lr"]))


def _set(group: dict[str, Any], lr: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr
