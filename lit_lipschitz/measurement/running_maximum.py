"""Running maxima of the size of the head's inputs, kept on the device: no host synchronisation per batch."""

import torch
from torch import Tensor

from lit_lipschitz.bounds.families import Norm
from lit_lipschitz.measurement.norms import frobenius, sample, spectral, squares


def _raise_to(largest: Tensor, value: Tensor) -> None:
    """Replaces a number by a larger one; by one that is not finite never."""
    torch.maximum(largest, torch.nan_to_num(value, nan=0.0, posinf=0.0), out=largest)


_NORMS = {"frobenius": frobenius, "sample": sample}


class RunningMaximum:
    """Maximum over batches of one norm of the activations, as tensors on the device that are updated in place.

    A batch may come in several calls of the head: :meth:`add` takes in a call, :meth:`finish` ends the batch, which has
    the size of the largest one. A call whose size is not finite is left out of the maximum and counted.

    Args:
        norm: Which norm is taken of each batch.
        width: Features of one activation, d.
        bias: Whether the head has a bias, whose input is a 1 appended to every row.
        mean: Divide the norm of a batch by the root of the number of examples in the loss, which makes batches of
            different sizes comparable (for ``frobenius`` the root mean square norm of a row).
        squares: Whether to keep the largest :func:`squares` as well.
        device: Where the tensors live.

    Attributes:
        values: Largest norm of a batch, most examples, calls left out, largest :func:`squares`, and largest norm of
            the outputs plus that of the targets; shape (5,), float32.
        direction: Where the next power iteration starts, for ``spectral``.
    """

    def __init__(
        self,
        norm: Norm,
        width: int,
        *,
        bias: bool = False,
        mean: bool = False,
        squares: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.norm = norm
        self.bias = bias
        self.mean = mean
        self.squares = squares
        self.values = torch.zeros(5, dtype=torch.float32, device=device)
        self.direction = torch.ones(width + bias if norm == "spectral" else 0, dtype=torch.float32, device=device)
        # Of the batch so far, the largest call: size, rows, squares.
        self._batch = torch.zeros(3, dtype=torch.float32, device=device)
        self._size, self._rows, self._squares = self._batch.unbind()
        self._largest, self._most, self._dropped, self._most_squares, self._most_outputs = self.values.unbind()

    @torch.no_grad()
    def add(self, activations: Tensor) -> None:
        """Take in a call of the head, activations of shape (rows, width) or (..., width).

        Raises:
            ValueError: There are no rows.
        """
        if self.norm == "spectral":
            with torch.autocast(activations.device.type, enabled=False):
                value, direction = spectral(activations, self.direction, self.bias)
            usable = torch.isfinite(direction).all() & direction.any()
            self.direction.copy_(torch.where(usable, direction, self.direction))
        else:
            value = _NORMS[self.norm](activations, self.bias)
        torch.maximum(self._size, self._count_dropped(value), out=self._size)
        self._rows.clamp_(min=activations.numel() // activations.shape[-1])
        if self.squares:
            _raise_to(self._squares, squares(activations))

    def _count_dropped(self, value: Tensor) -> Tensor:
        """The value, or -1 where it is not finite, which is counted."""
        # The same few operations everywhere, which the caches hold then.
        value = torch.nan_to_num(value, nan=-1.0, posinf=-1.0)
        self._dropped.sub_(value.clamp(max=0.0))
        return value

    @torch.no_grad()
    def finish(
        self,
        count: int | Tensor | None = None,
        outputs: tuple[Tensor, ...] = (),
        calls: int = 1,
        weight: float | Tensor = 1.0,
    ) -> None:
        """End a batch; without a call there is nothing to end.

        Args:
            count: Examples that the loss averages over; None is the number of rows.
            outputs: The head's outputs and the targets, shape (rows, outputs), for losses that depend on their sizes.
            calls: Calls whose outputs the loss is taken of together; none is larger than the largest, so the norm of a
                matrix of them all is at most the root of ``calls`` times that.
            weight: A factor of the batch's norm.
        """
        of_matrix = self.norm in ("frobenius", "spectral")
        if calls > 1 and of_matrix:
            weight = weight * calls**0.5
        given = isinstance(count, Tensor)
        if count is None:
            count = self._rows
        elif isinstance(count, Tensor):
            count = count.float()
        value = self._size / count**0.5 if self.mean else self._size
        if given and self.mean:  # not finite for a count of 0
            value = self._count_dropped(value)
        elif given:
            self._dropped.add_(count == 0)
        plain = isinstance(weight, float) and weight == 1.0
        if plain and given and self.mean:  # it is finite, or -1
            torch.maximum(self._largest, value, out=self._largest)
        else:
            _raise_to(self._largest, value if plain else value * weight)
        if isinstance(count, Tensor):
            torch.maximum(self._most, count, out=self._most)
        else:
            self._most.clamp_(min=count)
        if self.squares:
            _raise_to(self._most_squares, self._squares * weight**2)
        if outputs:
            total = torch.stack([_NORMS.get(self.norm, frobenius)(part) for part in outputs]).sum()
            if of_matrix:
                # As many rows as the activations have, or are divided by.
                total = total * (1.0 if self.mean else count**0.5) / len(outputs[0]) ** 0.5
            _raise_to(self._most_outputs, total)
        self._batch.zero_()

    def update(self, activations: Tensor) -> None:
        """Take in a batch of one call, activations of shape (rows, width).

        Raises:
            ValueError: There are no rows.
        """
        self.add(activations)
        self.finish()

    def drop(self) -> None:
        """Forget the batch so far."""
        self._batch.zero_()

    @property
    def rows(self) -> Tensor:
        """Rows of the largest call of the batch so far, on the device."""
        return self._rows

    @property
    def size(self) -> Tensor:
        """Norm of the largest call of the batch so far, on the device."""
        return self._size

    def merge(self, other: "RunningMaximum") -> None:
        """Take in what another statistic has seen."""
        self.values.copy_(torch.maximum(self.values, other.values))

    def reset(self) -> None:
        """Forget the batches; the direction of the power iteration stays, to start the next one warm."""
        self.values.zero_()
        self._batch.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors, on the CPU, between batches."""
        return {"values": self.values.cpu().clone(), "direction": self.direction.cpu().clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy the tensors of :meth:`state_dict` in.

        Raises:
            ValueError: They belong to another head or another norm.
        """
        for name, own in (("values", self.values), ("direction", self.direction)):
            if state[name].shape != own.shape:
                raise ValueError(f"{name}: expected shape {tuple(own.shape)}, found {tuple(state[name].shape)}")
            own.copy_(state[name])
