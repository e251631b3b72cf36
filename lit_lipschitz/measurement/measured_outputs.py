"""Measures the constant of any loss: gradient norms in the outputs of its output layers, and norms of their inputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lit_lipschitz.recognition.output_layers import OutputLayer


@dataclass
class _Sums:
    """Sums over the rows of one output layer in an optimizer step, a scalar a call."""

    grad_square: list[Tensor] = field(default_factory=list)
    grad_sum: list[Tensor] = field(default_factory=list)
    grad_max: list[Tensor] = field(default_factory=list)
    count: list[Tensor] = field(default_factory=list)  # rows with a gradient
    input_square: list[Tensor] = field(default_factory=list)  # of these rows

    def totals(self) -> Tensor:
        """The sums over the calls, and the largest gradient norm; shape (5,)."""
        largest = torch.stack(self.grad_max).max()
        square, total, count, inputs = (
            torch.stack(part).sum() for part in (self.grad_square, self.grad_sum, self.count, self.input_square)
        )
        return torch.stack([square, total, largest, count, inputs])


class MeasuredOutputs:
    r"""Measures the constant of a loss that is not recognised, at the weights that are visited.

    For an output layer with inputs A (a 1 appended for the bias) and the gradient G of the step's loss in its outputs,
    one row a row of the outputs, the gradient in the weights is G'A, so its norm is at most
    :math:`O_h = \|G\|_F \|A\|_F` (Cauchy and Schwarz); of all output layers together :math:`O = \sqrt{\sum_h O_h^2}`.
    Rows without a gradient count neither in G nor in A. m is the number of the others, and the largest
    :math:`m \|G_i\|` of the run replaces the largest gradient norm that an example's loss can have. m and the row norms
    are those of the layer with the largest :math:`O_h`, and its A is scaled so that :math:`\|G\|_F \|A\|_F = O`.

    All backwards of an optimizer step count together. Nothing is read to the host.
    """

    mean = True

    def __init__(self, device: torch.device) -> None:
        # Largest norm of the inputs over sqrt(m), m of a batch, three that are not used, m |G_i|, and O.
        self._values = torch.zeros(7, dtype=torch.float32, device=device)
        self._sums: dict[Any, _Sums] = {}
        self._others: dict[Any, _Sums] = {}  # before the last step of another optimizer
        self._new_interval = True  # the next step replaces the maxima; until then those of the last interval hold
        self._last: Tensor | None = None  # mean squared and mean gradient norm of the last step that was measured

    def watch(self, layers: Sequence[OutputLayer], scale: float | Tensor) -> None:
        """Has the backward that is about to begin add the gradients of these calls, divided by ``scale``."""
        for layer in layers:
            layer.node.register_prehook(_hook(self._sums_of(layer), layer, scale))

    def add(self, layer: OutputLayer, grad: Tensor, scale: float | Tensor) -> None:
        """Adds the gradient in the outputs of a call, divided by ``scale``."""
        _hook(self._sums_of(layer), layer, scale)((grad,))

    def _sums_of(self, layer: OutputLayer) -> _Sums:
        return self._sums.setdefault(layer.parameters, _Sums())

    @property
    def watching(self) -> bool:
        """Whether backwards of the coming optimizer step were watched, before another one's step too."""
        return bool(self._sums or self._others)

    def restart(self) -> None:
        """Begins an interval with the coming step."""
        self._new_interval = True

    def discard(self) -> None:
        """Forgets the backwards since the last step."""
        self._sums, self._others = {}, {}

    def on_other_optimizer_step(self) -> None:
        """Another optimizer is about to step: losses so far are its own if more come before the own step."""
        if self._sums:
            self._others, self._sums = self._sums, {}

    def end_step(self, batches: int = 1) -> None:
        """Adds the step that is about to be made, of so many batches, if its backwards were watched."""
        self._last = None
        sums, self._sums, self._others = self._sums or self._others, {}, {}
        if any(one.count for one in sums.values()):
            self._add(list(sums.values()), batches)

    @torch.no_grad()
    def _add(self, sums: Sequence[_Sums], batches: int) -> None:
        """Adds the sums of a step's output layers, of which one has a row at least."""
        layers = [one.totals().to(self._values.device) for one in sums if one.count]
        sums_of_layers = torch.stack(layers)
        products = sums_of_layers[:, 0] * sums_of_layers[:, 4]
        # Indexing by a tensor of no dimension would wait for the device.
        main = sums_of_layers.index_select(0, products.argmax(0, keepdim=True))
        square, total, largest, count, _ = main[0].unbind()
        usable = torch.isfinite(products).all() & (products.max() > 0)
        rows = count.clamp(min=1.0)
        size, unused = (products.sum() / square / rows).sqrt(), torch.zeros_like(rows)
        step = torch.stack([size, rows / batches, unused, unused, unused, rows * largest, products.sum().sqrt()])
        before = self._values.clone()
        if self._new_interval:
            # The largest gradient norm is that of the run: it vanishes with the loss, and the curvature does not, so
            # that the inverse of its current value would grow without bound.
            before[:5].zero_()
            before[6:].zero_()
        step = torch.maximum(before, step)
        self._values.copy_(torch.where(usable, step, self._values))
        self._new_interval = False
        self._last = torch.where(usable, torch.stack([rows * square, total]), -1.0)

    def pack_gradients(self, rank: int, world_size: int, device: torch.device) -> Tensor:
        """Mean squared and mean gradient norm of the examples in the last measured step, once.

        As :meth:`~lit_lipschitz.measurement.output_gradients.LogitGradientNorms.pack`: shape (2, world_size).
        """
        packed, last = torch.full((2, world_size), -1.0, device=device), self._last
        if last is not None:
            packed[:, rank] = last.to(device)
        self._last = None
        return packed

    def finish(self) -> None:
        """Ends a batch without a loss, of which there is nothing to measure."""

    def reset(self) -> None:
        """Ends an interval: its maxima hold until a step of the next one is measured, but O is that of an interval."""
        self._new_interval = True
        self._values[6:].zero_()

    def pack(self, scale: float, rank: int) -> Tensor:
        """This rank's maxima for a MAX all-reduce, without the gradient norm, as of a RunningMaximum; shape (5,)."""
        return self._values[:5].clone()

    def unpack(self, reduced: Tensor) -> Tensor:
        """Gives all ranks the same maxima."""
        self._values[:5].copy_(reduced[:5])
        return reduced[:5]

    def pack_grad_norms(self, measured: bool) -> Tensor:
        """Largest gradient norm of a row times m, 0 unless the constant is ``measured``, and largest O; shape (2,)."""
        packed = self._values[5:].clone()
        if not measured:
            packed[:1].zero_()
        return packed

    def unpack_grad_norms(self, reduced: Tensor) -> Tensor:
        """Gives all ranks the same largest norms."""
        self._values[5:].copy_(torch.maximum(self._values[5:], reduced))
        return reduced

    def state_dict(self) -> dict[str, Any]:
        """The maxima and counters."""
        return {"values": self._values.cpu().clone(), "new_interval": self._new_interval}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads the state of :meth:`state_dict`; values of another shape are a ValueError."""
        if state["values"].shape != self._values.shape:
            raise ValueError(f"expected {len(self._values)} values, found the shape {tuple(state['values'].shape)}")
        self._values.copy_(state["values"])
        self._new_interval = state["new_interval"]


def _hook(sums: _Sums, layer: OutputLayer, scale: float | Tensor) -> Callable[[tuple[Tensor | None, ...]], None]:
    """A hook that adds the gradient of a call; holding the node would keep it from being freed."""
    inputs = None if layer.inputs is None else layer.inputs.detach()
    outputs_dim, has_bias, copies, done = layer.outputs_dim, layer.has_bias, layer.copies, False

    @torch.no_grad()
    def add(grads: tuple[Tensor | None, ...]) -> None:
        nonlocal done, inputs
        grad = grads[0]
        if grad is None or done:  # a retained graph may have more backwards
            return
        done = True
        norms = torch.linalg.vector_norm(_rows(_plain(grad), outputs_dim), dim=1, dtype=torch.float32) / scale
        counted = norms > 0
        count = counted.sum().float()
        sums.grad_square.append(torch.linalg.vector_norm(norms).square())
        sums.grad_sum.append(norms.sum())
        sums.grad_max.append(torch.cat([norms, norms.new_zeros(1)]).max())
        sums.count.append(count)
        sums.input_square.append(_input_square(inputs, counted, outputs_dim) * copies + (count if has_bias else 0.0))
        inputs = None

    return add


def _input_square(inputs: Tensor | None, counted: Tensor, outputs_dim: int | None) -> Tensor:
    """Squared norm of the inputs of the rows that count; of all inputs if their rows are not those of the outputs."""
    if inputs is None:  # one-hot
        return counted.sum().float()
    inputs = _plain(inputs)
    if inputs.numel() == 0:  # a batch without a row
        return counted.sum().float()
    if outputs_dim in (-1, inputs.ndim - 1) and inputs.numel() == len(counted) * inputs.shape[-1]:
        norms = torch.linalg.vector_norm(inputs.reshape(len(counted), -1), dim=1, dtype=torch.float32)
        return (norms * counted).square().sum()
    return torch.linalg.vector_norm(inputs, dtype=torch.float32).square()


def _rows(grad: Tensor, outputs_dim: int | None) -> Tensor:
    """A gradient as (rows, outputs); each entry is a row if the outputs have no dimension."""
    if outputs_dim is None:
        return grad.reshape(1, -1)
    if outputs_dim == grad.ndim:
        return grad.reshape(-1, 1)
    return grad.movedim(outputs_dim, -1).flatten(0, -2) if grad.ndim > 1 else grad[None]


def _plain(values: Any) -> Tensor:
    """A dense real tensor that torch reduces in fp32."""
    values = values.full_tensor() if hasattr(values, "full_tensor") else values
    values = values.to_dense() if values.layout != torch.strided else values
    values = torch.view_as_real(values).flatten(-2) if values.is_complex() else values
    return values.float() if values.dtype == torch.float64 else values
