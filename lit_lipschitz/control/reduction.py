"""One MAX all-reduce for all statistics that an update needs."""

from collections.abc import Callable, Iterable
from itertools import islice

import torch
from torch import Tensor


class MaxReduction:
    """Joins the slots that are due into one tensor, reduces it, and gives each slot its part back by name.

    ``reduce`` is an element-wise MAX over the ranks; all of them must reduce the same slots in the same order.

    Example:
        >>> reduction = MaxReduction(lambda tensor: tensor, torch.device("cpu"))
        >>> reduction.register("loss", lambda: torch.tensor([0.5]))
        >>> reduction.register("norms", lambda: torch.tensor([1.0, 2.0]), lambda reduced: 2 * reduced)
        >>> reduction.reduce(["norms", "loss"])
        {'norms': [2.0, 4.0], 'loss': [0.5]}
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self._reduce, self._device = reduce, device  # the device of the joined tensor
        self._slots: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]] = {}

    def register(
        self, name: str, pack: Callable[[], Tensor], unpack: Callable[[Tensor], Tensor] = lambda reduced: reduced
    ) -> None:
        """Registers a statistic under a name; one of the same name is replaced.

        ``pack`` makes this rank's contribution, of shape (n,), float32, and the same n on all ranks; ``unpack`` is
        given the MAX over the ranks, and returns what is to be read to the host.
        """
        self._slots[name] = pack, unpack

    def share(self, names: Iterable[str]) -> dict[str, Tensor]:
        """What the ``unpack`` of each named slot returns, without waiting for the device; at least one name."""
        packed = {name: self._slots[name][0]().to(self._device) for name in names}
        parts = torch.split(self._reduce(torch.cat(list(packed.values()))), [len(part) for part in packed.values()])
        return {name: self._slots[name][1](part) for name, part in zip(packed, parts, strict=True)}

    def reduce(self, names: Iterable[str]) -> dict[str, list[float]]:
        """What :meth:`share` returns, read to the host all at once."""
        unpacked = self.share(names)
        values = iter(torch.cat(list(unpacked.values())).tolist())
        return {name: list(islice(values, len(tensor))) for name, tensor in unpacked.items()}
