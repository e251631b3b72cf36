"""Watches for losses that are not finite, without waiting for the device."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

KEPT = 64
"""Steps whose losses are kept apart until they are looked at together."""


class LossWatch:
    """Keeps on the device whether a loss was not finite, and in which optimizer step the first one was.

    The ranks agree by a MAX of :meth:`slots`, one number a rank, that rides in a reduction which is made anyway.

    Args:
        rank: Index of this process.
        world_size: Number of processes.
        step: The optimizer step that comes next, the same on all ranks.
        device: Where the losses are.

    Attributes:
        reported: Whether a loss that was not finite has been told of.
    """

    def __init__(self, rank: int, world_size: int, step: int, device: torch.device | None = None) -> None:
        self._rank, self._world_size = rank, world_size
        self.reported = False
        self._kept = torch.zeros(KEPT, device=device)  # a step each: 0, or not-a-number if a loss was not finite
        self._cells = self._kept.unbind()
        self._offsets = torch.arange(KEPT, dtype=torch.float32, device=device)
        self._slot = torch.zeros((), device=device)  # minus the steps from the first one to one that was not; or -inf
        self._agreed: Tensor | None = None
        self._stored: Tensor | None = None  # slots of the run that is resumed
        self.reset(step)

    def reset(self, step: int) -> None:
        """Forgets what was seen before a step; all ranks do so in the same one."""
        self._first = self._begin = step
        self._kept.zero_()
        self._slot.fill_(-math.inf)
        self._agreed = self._stored = None

    @property
    def first(self) -> int:
        """The first step that is watched since the last :meth:`reset`."""
        return self._first

    def see(self, loss: Tensor, step: int) -> None:
        """Takes in a loss of an optimizer step, in one operation on scalars.

        Args:
            loss: The loss that goes backward; shape (). Of one that lies on several devices, each looks at its part.
            step: Optimizer steps before this one.
        """
        if not 0 <= step - self._begin < KEPT:
            self._look()
            self._begin = step
        part: Any = loss.detach()
        if hasattr(part, "to_local"):
            part = part.to_local()  # the ranks agree later, by their slots
        loss = part.to(self._slot.device)
        # 0 times what is not finite is not-a-number, and stays so.
        self._cells[step - self._begin].add_(loss if loss.ndim == 0 else loss.sum(), alpha=0)

    def _look(self) -> None:
        """Takes what is kept together, on the device."""
        before = torch.where(self._kept == 0, -math.inf, float(self._first - self._begin) - self._offsets)
        torch.maximum(self._slot, before.max(), out=self._slot)
        self._kept.zero_()

    def slots(self) -> Tensor:
        """For each rank minus the steps before its first loss that is not finite, or -inf; this rank knows its own."""
        self._look()
        slots = torch.full((self._world_size,), -math.inf, device=self._slot.device)
        slots[self._rank] = self._slot
        return slots

    def take(self, agreed: Tensor) -> None:
        """Keeps the MAX of all ranks' :meth:`slots` until it is read."""
        self._agreed = agreed

    def read(self) -> tuple[int, list[int]] | None:
        """The first step with a loss that was not finite and the ranks that had one in it, or None.

        This waits for the device.
        """
        if self._stored is not None:
            slots = self._stored.tolist()  # earlier than all that was seen since
        else:
            slots = (self.slots() if self._agreed is None else self._agreed).tolist()
        most = max(slots)
        if most == -math.inf:
            return None
        return self._first - int(most), [rank for rank, slot in enumerate(slots) if slot == most]

    def state_dict(self) -> dict[str, Any]:
        """What has been seen and not told of yet, of the ranks that this one knows of; plain values and a tensor."""
        slots = self.slots()
        if self._stored is not None:
            slots = self._stored
        elif self._agreed is not None:
            slots = torch.maximum(self._agreed, slots)
        return {"first": self._first, "slots": slots, "reported": self.reported}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from the state of :meth:`state_dict`; ranks are those of the run that it is of."""
        self.reset(state["first"])
        self.reported = state["reported"]
        if bool((state["slots"] > -math.inf).any()):
            self._stored = state["slots"]


def describe(step: int, ranks: list[int], rate: float | None, of: str = "") -> str:
    """What is said of a loss that was not finite.

    Args:
        step: Optimizer step, counted from 0.
        ranks: Ranks that had it.
        rate: The last rate, or None before the first one.
        of: Whose rate it is, where there are several, such as ``" of optimizer 1"``.
    """
    where = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    last = f"no rate{of} was computed yet" if rate is None else f"the last rate{of} was {rate:.4g}"
    return f"a non-finite loss in step {step} on {where}; {last}"
