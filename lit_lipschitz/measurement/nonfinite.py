"""Detects losses that are not finite, on the device, without a host synchronisation per step."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

WINDOW = 64
"""Steps whose losses are recorded separately before they are evaluated together."""


def is_on_host(loss: Tensor) -> bool:
    """Whether a loss is one number that can be read without waiting for a device."""
    return type(loss) is Tensor and loss.is_cpu and loss.ndim == 0


class NonfiniteLosses:
    """Records on the device which optimizer step was the first with a loss that was not finite, on which ranks."""

    def __init__(self, rank: int, world_size: int, step: int, device: torch.device | None = None) -> None:
        self._rank, self._world_size = rank, world_size
        self.reported = False  # whether a non-finite loss has been reported to the user
        self._window = torch.zeros(WINDOW, device=device)  # one entry a step: 0, or NaN if a loss was not finite
        self._entries = self._window.unbind()
        self._offsets = torch.arange(WINDOW, dtype=torch.float32, device=device)
        self._latest = torch.zeros((), device=device)  # minus the steps before the first non-finite loss, or -inf
        self.reset(step)

    def reset(self, step: int) -> None:
        """Forgets all steps before ``step``; all ranks reset at the same step."""
        self.first_step = self._window_start = step
        self._window.zero_()
        self._latest.fill_(-math.inf)
        self._reduced: Tensor | None = None
        self._restored: Tensor | None = None  # of the run that is resumed

    def update(self, loss: Tensor, step: int) -> None:
        """Records a loss of an optimizer step, in one scalar operation; each rank its part of a sharded loss."""
        if is_on_host(loss) and math.isfinite(loss.item()):
            return
        if not 0 <= step - self._window_start < WINDOW:
            self._evaluate()
            self._window_start = step
        part: Any = loss.detach()
        if hasattr(part, "to_local"):
            part = part.to_local()
        loss = part.to(self._latest.device)
        # 0 times a non-finite number is NaN, and NaN persists in a sum.
        self._entries[step - self._window_start].add_(loss if loss.ndim == 0 else loss.sum(), alpha=0)

    def _evaluate(self) -> None:
        """Evaluates the window, on the device."""
        finite = self._window == 0
        before = torch.where(finite, -math.inf, float(self.first_step - self._window_start) - self._offsets)
        torch.maximum(self._latest, before.max(), out=self._latest)
        self._window.zero_()

    def pack(self) -> Tensor:
        """Minus the steps before this rank's first non-finite loss in its entry, -inf in the others; (world_size,)."""
        self._evaluate()
        packed = torch.full((self._world_size,), -math.inf, device=self._latest.device)
        packed[self._rank] = self._latest
        return packed

    def unpack(self, reduced: Tensor) -> Tensor:
        """Keeps the MAX over the ranks of :meth:`pack` until :meth:`first_nonfinite` reads it; returns no values."""
        self._reduced = reduced
        return reduced[:0]

    def first_nonfinite(self) -> tuple[int, list[int]] | None:
        """The first step with a non-finite loss and the ranks that had it; waits for the device. None without one."""
        entries = self._known().tolist()
        latest = max(entries)
        if latest == -math.inf:
            return None
        return self.first_step - int(latest), [rank for rank, entry in enumerate(entries) if entry == latest]

    def state_dict(self) -> dict[str, Any]:
        """Non-finite losses of all known ranks that are not reported yet; plain values and a tensor."""
        return {"first_step": self.first_step, "ranks": self._known(), "reported": self.reported}

    def _known(self) -> Tensor:
        """The entries of :meth:`pack` of all ranks that this one knows of."""
        if self._restored is not None:
            return self._restored  # earlier than all steps since
        return self.pack() if self._reduced is None else torch.maximum(self._reduced, self.pack())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads the state of :meth:`state_dict`; ranks are those of the run that saved it."""
        self.reset(state["first_step"])
        self.reported = state["reported"]
        if bool((state["ranks"] > -math.inf).any()):
            self._restored = state["ranks"]
