"""Running maxima of the size of the head's inputs, kept on the device: no host synchronisation per batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_lipschitz.bounds.families import Norm

POWER_ITERATIONS = 3
"""Per batch; the vector is kept from batch to batch, so the estimate goes on improving."""
PART = 2**20
"""Most activations that are copied to fp32 at a time on the CPU, which are 4 MiB."""
PART_OF_DEVICE = 2**23
"""The same on other devices, 32 MiB in fewer kernels."""


def frobenius(activations: Tensor, bias: bool = False) -> Tensor:
    """Frobenius norm of a batch of activations, in fp32.

    Args:
        activations: Shape (rows, width), or with more dimensions in place of the rows; any floating type and layout.
        bias: Whether every row carries an extra 1, the input of the head's bias.

    Returns:
        A scalar of dtype float32.

    Raises:
        ValueError: There are no rows.
    """
    rows = _check_rows(activations)
    norm = _norm(activations, 2)
    return torch.sqrt(norm * norm + rows) if bias else norm


def sample(activations: Tensor, bias: bool = False) -> Tensor:
    """Largest Euclidean norm of a row; arguments, result and errors as for :func:`frobenius`."""
    _check_rows(activations)
    parts = _reduced_in_parts(activations)
    largest = [torch.linalg.vector_norm(_single(part), dim=-1, dtype=torch.float32).max() for part in parts]
    norm = largest[0] if len(largest) == 1 else torch.stack(largest).max()
    return torch.sqrt(norm * norm + 1) if bias else norm


def unit(activations: Tensor, bias: bool = False) -> Tensor:
    """Largest absolute activation; arguments, result and errors as for :func:`frobenius`."""
    _check_rows(activations)
    norm = _norm(activations, float("inf"))
    return norm.clamp(min=1.0) if bias else norm


def squares(activations: Tensor) -> Tensor:
    """Frobenius norm of the matrix of squared activations; arguments, result and errors as for :func:`frobenius`."""
    _check_rows(activations)
    norm = _norm(activations, 4)
    return norm * norm


def spectral(activations: Tensor, direction: Tensor, bias: bool = False) -> tuple[Tensor, Tensor]:
    """Largest singular value of a batch of activations, by power iteration from a given vector.

    Args:
        activations: As for :func:`frobenius`.
        direction: Vector to start from, shape (width + bias,), float32, not 0.
        bias: Whether every row carries an extra 1.

    Returns:
        The singular value (a scalar; from below, since the iteration is cut off) and the unit vector reached.

    Raises:
        ValueError: There are no rows.
    """
    _check_rows(activations)
    width = activations.shape[-1]
    scattered = activations.ndim > 2 and not activations.is_contiguous()
    parts = _parts(activations, copied=scattered or activations.dtype != torch.float32)

    def image_of(matrix: Tensor, vector: Tensor) -> Tensor:
        return torch.addmv(vector[width], matrix, vector[:width]) if bias else matrix @ vector

    for _ in range(POWER_ITERATIONS):
        total: Tensor | None = None
        for part in parts:  # each is read, and made fp32, once for both products
            matrix = _matrix(part)
            image = image_of(matrix, direction)
            back = matrix.T @ image
            if bias:
                back = torch.cat([back, image.sum().reshape(1)])
            total = back if total is None else total.add_(back)
        assert total is not None
        direction = _unit_vector(total)
    lengths = [torch.linalg.vector_norm(image_of(_matrix(part), direction)) for part in parts]
    return lengths[0] if len(lengths) == 1 else torch.linalg.vector_norm(torch.stack(lengths)), direction


def _norm(activations: Tensor, order: float) -> Tensor:
    """Norm of all entries as one vector, in fp32."""
    parts = _reduced_in_parts(activations)
    norms = [torch.linalg.vector_norm(_single(part), order, dtype=torch.float32) for part in parts]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), order)


def _reduced_in_parts(activations: Tensor) -> Sequence[Tensor]:
    """Activations in the parts that a norm is taken of, so that no fp32 copy of all of them is made."""
    # CUDA's reductions read the narrower types as they are; the others, and torch for doubles, make a copy first.
    narrow = (torch.bfloat16, torch.float16) if activations.is_cuda else ()
    return _parts(activations, copied=activations.dtype not in (torch.float32, *narrow))


def _parts(activations: Tensor, copied: bool) -> Sequence[Tensor]:
    """The activations whole, or where they are copied in parts of some rows."""
    if not copied:
        return (activations,)
    limit = PART if activations.device.type == "cpu" else PART_OF_DEVICE
    if activations.numel() <= limit:
        return (activations,)
    if activations.is_contiguous():
        activations = activations.flatten(0, -2)
    return torch.split(activations, max(1, limit * len(activations) // activations.numel()))


def _matrix(part: Tensor) -> Tensor:
    """A part in fp32, shape (rows, width)."""
    return part.float().flatten(0, -2)


def _single(activations: Tensor) -> Tensor:
    """Activations that a norm can be taken of in fp32, which torch does not do for doubles."""
    return activations.float() if activations.dtype == torch.float64 else activations


def _check_rows(activations: Tensor) -> int:
    """How many there are."""
    if activations.ndim < 2 or not activations.numel():
        raise ValueError(f"activations of shape {tuple(activations.shape)}: expected (rows, width) with at least 1 row")
    return activations.numel() // activations.shape[-1]


def _unit_vector(vector: Tensor) -> Tensor:
    """The vector at length 1, or as it is where it is all zeros."""
    tiny = torch.finfo(torch.float32).tiny
    vector = vector / torch.linalg.vector_norm(vector, float("inf")).clamp(min=tiny)  # whose squares may overflow
    return vector / torch.linalg.vector_norm(vector).clamp(min=tiny)


def _raise_to(largest: Tensor, value: Tensor) -> None:
    """Replaces a number by a larger one; by one that is not finite never."""
    torch.maximum(largest, torch.nan_to_num(value, nan=0.0, posinf=0.0), out=largest)


_NORMS = {"frobenius": frobenius, "sample": sample, "unit": unit}


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
