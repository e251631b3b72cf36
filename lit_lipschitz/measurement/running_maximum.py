"""Running maximum over batches of a norm of the output layer's inputs, kept on the device."""

import math
from typing import Any

import torch
from torch import Tensor

from lit_lipschitz.bounds.families import Norm
from lit_lipschitz.measurement.norms import fourth_moment_norm, frobenius, sample, spectral

_NORMS = {"frobenius": frobenius, "sample": sample}


class RunningMaximum:
    """Maximum over batches of one norm of the activations, updated in place without a host synchronisation.

    A batch may come in several calls of the output layer: :meth:`add` takes in a call, :meth:`finish` ends the batch,
    whose norm is that of the largest call. A call whose norm is not finite is dropped and counted.

    With ``bias``, a 1 is appended to every row, the input of the layer's bias. With ``mean``, the norm of a batch is
    divided by the square root of the number of examples in the loss, so that batches of different sizes can be compared
    (for ``frobenius`` this is the root mean square norm of a row).
    """

    def __init__(
        self,
        norm: Norm,
        width: int,
        *,
        bias: bool = False,
        mean: bool = False,
        fourth_moment: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.norm, self.bias, self.mean, self.fourth_moment = norm, bias, mean, fourth_moment
        # Largest norm of a batch, largest number of examples, dropped calls, largest fourth-moment norm, and largest
        # norm of the outputs plus that of the targets.
        self.values = torch.zeros(5, dtype=torch.float32, device=device)
        self._max_size, self._max_count, self._dropped, self._max_fourth, self._max_outputs = self.values.unbind()
        # Start vector of the next power iteration.
        self.direction = torch.ones(width + bias if norm == "spectral" else 0, dtype=torch.float32, device=device)
        # The largest call of the batch so far: norm, rows, fourth-moment norm.
        self._batch = torch.zeros(3, dtype=torch.float32, device=device)
        self.size, self.rows, self._fourth = self._batch.unbind()

    @torch.no_grad()
    def add(self, activations: Tensor) -> None:
        """Takes in a call of the layer; activations of shape (rows, width) or (..., width)."""
        if self.norm == "spectral":
            with torch.autocast(activations.device.type, enabled=False):
                value, direction = spectral(activations, self.direction, self.bias)
            usable = torch.isfinite(direction).all() & direction.any()
            self.direction.copy_(torch.where(usable, direction, self.direction))
        else:
            value = _NORMS[self.norm](activations, self.bias)
        torch.maximum(self.size, self._count_dropped(value), out=self.size)
        self.rows.clamp_(min=activations.numel() // activations.shape[-1])
        if self.fourth_moment:
            _raise_to(self._fourth, fourth_moment_norm(activations))

    def _count_dropped(self, value: Tensor) -> Tensor:
        """The value, or -1 if it is not finite, which is counted."""
        # The same few kernels for every batch, so that caches stay warm.
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
        """Ends a batch with the number of examples in the loss, or of rows; has no effect without a call.

        Outputs and targets, each of shape (rows, outputs), are for losses whose constant depends on their norms;
        ``calls`` is how many calls' outputs enter the loss together, and ``weight`` a factor of the batch's norm.
        """
        whole_batch = self.norm in ("frobenius", "spectral")
        if calls > 1 and whole_batch:
            # The norm of the matrix of all calls is at most sqrt(calls) times that of the largest one.
            weight = weight * calls**0.5
        may_be_zero = isinstance(count, Tensor)
        if count is None:
            count = self.rows
        elif isinstance(count, Tensor):
            count = count.float()
        self._finish_size(count, may_be_zero, weight)
        if isinstance(count, Tensor):
            torch.maximum(self._max_count, count, out=self._max_count)
        else:
            self._max_count.clamp_(min=count)
        if self.fourth_moment:
            _raise_to(self._max_fourth, self._fourth * weight**2)
        if outputs:
            total = torch.stack([_NORMS.get(self.norm, frobenius)(part) for part in outputs]).sum()
            if whole_batch:
                # As many rows as the activations have, or are divided by.
                total = total * (1.0 if self.mean else count**0.5) / len(outputs[0]) ** 0.5
            _raise_to(self._max_outputs, total)
        self._batch.zero_()

    def _finish_size(self, count: Any, may_be_zero: bool, weight: float | Tensor) -> None:
        """Raises the maximum to the batch's norm."""
        value = self.size
        if self.mean:
            value = value / count**0.5
        if may_be_zero:  # a batch whose targets are all ignored is left out
            value = torch.nan_to_num(value, nan=0.0, posinf=0.0) if self.mean else value * (count > 0)
        plain = isinstance(weight, float) and weight == 1.0
        if plain and may_be_zero and self.mean:  # finite
            torch.maximum(self._max_size, value, out=self._max_size)
        else:
            _raise_to(self._max_size, value if plain else value * weight)

    def update(self, activations: Tensor) -> None:
        """Takes in a batch of one call."""
        self.add(activations)
        self.finish()

    def discard(self) -> None:
        """Discards the batch so far."""
        self._batch.zero_()

    def pack(self, scale: float, rank: int) -> Tensor:
        """The values, their norm times ``scale``, then rank 0's direction (-inf elsewhere); for a MAX all-reduce."""
        values = self.values.clone()
        values[0] *= scale
        values[3] *= scale**2
        direction = torch.full_like(self.direction, -math.inf) if rank else self.direction
        return torch.cat([values, direction])

    def unpack(self, reduced: Tensor) -> Tensor:
        """Gives all ranks the same values and direction, and returns the values, with the most dropped calls."""
        values = reduced[: len(self.values)]
        for i in (0, 1, 3, 4):  # the number of dropped calls stays each rank's own
            self.values[i].copy_(values[i])
        self.direction.copy_(reduced[len(self.values) :])
        return values

    def reset(self) -> None:
        """Forgets all batches; the vector of the power iteration is kept as a warm start."""
        self.values.zero_()
        self._batch.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors, on the CPU, between batches."""
        return {"values": self.values.cpu().clone(), "direction": self.direction.cpu().clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copies the tensors of :meth:`state_dict` in; those of another layer or another norm are a ValueError."""
        own = {"values": self.values, "direction": self.direction}
        if set(state) != set(own):
            raise ValueError(f"expected {', '.join(own)}, found {', '.join(map(str, state))}")
        for name, tensor in own.items():
            shape = tuple(getattr(state[name], "shape", ()))
            if shape != tuple(tensor.shape):
                raise ValueError(f"{name}: expected shape {tuple(tensor.shape)}, found {shape}")
            tensor.copy_(state[name])


def _raise_to(largest: Tensor, value: Tensor) -> None:
    """Raises a running maximum to a value, unless the value is not finite."""
    torch.maximum(largest, torch.nan_to_num(value, nan=0.0, posinf=0.0), out=largest)
