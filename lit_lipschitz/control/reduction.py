"""One MAX all-reduce for all statistics that an update needs."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Element-wise MAX over all ranks; the identity on one device."""


class Slot(NamedTuple):
    """A statistic's part of the all-reduce.

    Attributes:
        pack: Makes this rank's contribution: one dimension, float32, of the same length on all ranks.
        unpack: Takes the MAX over the ranks, and returns what is to be read to the host.
    """

    pack: Callable[[], Tensor]
    unpack: Callable[[Tensor], Tensor]


class MaxReduction:
    """Joins the slots that are due into one tensor, reduces it, and gives each slot its part back by name.

    All ranks must reduce the same slots in the same order.

    Args:
        reduce: Element-wise MAX over the ranks.
        device: Device of the joined tensor.

    Example:
        >>> reduction = MaxReduction(lambda tensor: tensor, torch.device("cpu"))
        >>> reduction.register("loss", lambda: torch.tensor([0.5]), lambda reduced: reduced)
        >>> reduction.register("norms", lambda: torch.tensor([1.0, 2.0]), lambda reduced: reduced)
        >>> reduction.reduce(["norms", "loss"])
        {'norms': [1.0, 2.0], 'loss': [0.5]}
    """

    def __init__(self, reduce: Reduce, device: torch.device) -> None:
        self._reduce, self._device = reduce, device
        self._slots: dict[str, Slot] = {}

    def register(self, name: str, pack: Callable[[], Tensor], unpack: Callable[[Tensor], Tensor]) -> None:
        """Registers a statistic under a name; a statistic of the same name is replaced."""
        self._slots[name] = Slot(pack, unpack)

    def share(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Reduces the named slots, without waiting for the device.

        Returns:
            What each slot's ``unpack`` returns.
        """
        slots = {name: self._slots[name] for name in names}
        packed = [slot.pack().to(self._device) for slot in slots.values()]
        if not packed:
            return {}
        parts = torch.split(self._reduce(torch.cat(packed)), [len(part) for part in packed])
        return {name: slot.unpack(part) for (name, slot), part in zip(slots.items(), parts, strict=True)}

    def reduce(self, names: Iterable[str]) -> dict[str, list[float]]:
        """Reduces the named slots and reads what their ``unpack`` returns to the host, all at once."""
        unpacked = self.share(names)
        if not unpacked:
            return {}
        values = torch.cat(list(unpacked.values())).tolist()
        read, start = {}, 0
        for name, tensor in unpacked.items():
            read[name] = values[start : start + len(tensor)]
            start += len(tensor)
        return read
