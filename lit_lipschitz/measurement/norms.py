"""Norms of the output layer's inputs and of the weights, in fp32 and on the device."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

PART = 2**20
"""Largest number of activations that are copied to fp32 at a time on the CPU (4 MiB)."""
PART_OF_DEVICE = 2**23
"""The same on other devices (32 MiB), in fewer kernels."""
POWER_ITERATIONS = 3
"""Power iterations per batch. The vector is kept from batch to batch, so the estimate improves further."""


def frobenius(activations: Tensor, bias: bool = False) -> Tensor:
    """Frobenius norm of activations of shape (rows, width) or (..., width), a scalar of dtype float32.

    With ``bias``, every row carries an extra 1, the input of the head's bias. Activations without rows are refused.
    """
    norm = _norm(activations, 2)
    return torch.sqrt(norm * norm + activations.numel() // activations.shape[-1]) if bias else norm


def sample(activations: Tensor, bias: bool = False) -> Tensor:
    """Largest Euclidean norm of a row; otherwise like :func:`frobenius`."""
    parts = _reduced_in_parts(activations)
    largest = [torch.linalg.vector_norm(_single(part), dim=-1, dtype=torch.float32).max() for part in parts]
    norm = _combined(largest, math.inf)
    return torch.sqrt(norm * norm + 1) if bias else norm


def fourth_moment_norm(activations: Tensor) -> Tensor:
    """Frobenius norm of the matrix of squared activations; otherwise like :func:`frobenius`."""
    norm = _norm(activations, 4)
    return norm * norm


def spectral(activations: Tensor, direction: Tensor, bias: bool = False) -> tuple[Tensor, Tensor]:
    """Largest singular value of activations, by power iteration from a start vector; otherwise like :func:`frobenius`.

    The value is a lower bound, since the number of iterations is fixed. The start vector, which is not 0, and the last
    unit vector, which is returned too, have shape (width + bias,) and dtype float32.
    """
    width = activations.shape[-1]
    scattered = activations.ndim > 2 and not activations.is_contiguous()
    parts = _parts(activations, copied=scattered or activations.dtype != torch.float32)

    def image_of(matrix: Tensor, vector: Tensor) -> Tensor:
        return torch.addmv(vector[width], matrix, vector[:width]) if bias else matrix @ vector

    def product_of(part: Tensor, vector: Tensor) -> Tensor:
        matrix = part.float().flatten(0, -2)  # converted to fp32 once for both products
        image = image_of(matrix, vector)
        product = matrix.T @ image
        return torch.cat([product, image.sum().reshape(1)]) if bias else product

    for _ in range(POWER_ITERATIONS):
        total = product_of(parts[0], direction)
        for part in parts[1:]:
            total.add_(product_of(part, direction))
        direction = _unit_vector(total)
    norms = [torch.linalg.vector_norm(image_of(part.float().flatten(0, -2), direction)) for part in parts]
    return _combined(norms, 2), direction


def _norm(activations: Tensor, order: float) -> Tensor:
    """Norm of all entries as one vector, in fp32."""
    parts = _reduced_in_parts(activations)
    return _combined([torch.linalg.vector_norm(_single(part), order, dtype=torch.float32) for part in parts], order)


def _combined(norms: list[Tensor], order: float) -> Tensor:
    """The norm of a vector, from the norms of its parts."""
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), order)


def _reduced_in_parts(activations: Tensor) -> Sequence[Tensor]:
    """Activations in parts, so that no fp32 copy of all of them is made at once."""
    # CUDA reduces bf16 and fp16 without a copy; other devices, and torch for float64, copy first.
    narrow = (torch.bfloat16, torch.float16) if activations.is_cuda else ()
    return _parts(activations, copied=activations.dtype not in (torch.float32, *narrow))


def _parts(activations: Tensor, copied: bool) -> Sequence[Tensor]:
    """The activations as one part, or in parts of some rows if they are copied."""
    if activations.ndim < 2 or not activations.numel():
        raise ValueError(f"activations of shape {tuple(activations.shape)}: expected (rows, width) with at least 1 row")
    limit = PART if activations.device.type == "cpu" else PART_OF_DEVICE
    if not copied or activations.numel() <= limit:
        return (activations,)
    if activations.is_contiguous():
        activations = activations.flatten(0, -2)
    return torch.split(activations, max(1, limit * len(activations) // activations.numel()))


def _single(activations: Tensor) -> Tensor:
    """Activations in a type that torch reduces in fp32, which float64 is not."""
    return activations.float() if activations.dtype == torch.float64 else activations


def _unit_vector(vector: Tensor) -> Tensor:
    """The normalised vector; a vector of zeros is returned unchanged."""
    tiny = torch.finfo(torch.float32).tiny
    vector = vector / torch.linalg.vector_norm(vector, float("inf")).clamp(min=tiny)  # its squares may overflow
    return vector / torch.linalg.vector_norm(vector).clamp(min=tiny)


Weights = Literal["decayed", "parameters", "all"]


def weight_norm(optimizer: torch.optim.Optimizer, module: nn.Module, which: Weights = "decayed") -> Tensor:
    """Largest Euclidean norm of a weight tensor, W in the L2 term; a scalar of dtype float32.

    ``"decayed"``: of parameters in groups with weight decay, or of all parameters if no group has any;
    ``"parameters"``: of all parameters of the optimizer; ``"all"``: of every floating-point tensor of the module,
    including BatchNorm's moving statistics, as in the scripts of the paper's authors.
    """
    groups = optimizer.param_groups
    if which == "decayed":
        groups = [group for group in groups if group.get("weight_decay", 0)] or groups
    tensors = [as_real(p.detach()) for group in groups for p in group["params"]]
    if which == "all":
        tensors = [t.detach() for t in module.state_dict().values() if t.is_floating_point()]
    return norms(tensors).max()


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of gradients together, dense, sparse, complex or sharded; a scalar of dtype float32."""
    if not grads:
        return torch.zeros(())
    return norms(
        [as_real(grad.detach().to_dense() if grad.layout != torch.strided else grad.detach()) for grad in grads]
    ).norm()


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norms of real tensors, whole or sharded; shape (n,), dtype float32, on the device of the first one."""
    found = {i: norm(one) for i, one in enumerate(tensors) if hasattr(one, "full_tensor")}
    local = [i for i in range(len(tensors)) if i not in found]
    if local:
        # torch computes no norm in a narrower type than the tensor's.
        double = any(tensors[i].dtype == torch.float64 for i in local)
        values = torch._foreach_norm([tensors[i] for i in local], dtype=torch.float64 if double else torch.float32)
        found.update(zip(local, values, strict=True))
    device = found[0].device if found else None
    return torch.stack([found[i].to(device, torch.float32) for i in range(len(tensors))]) if found else torch.zeros(0)


def on_device(numbers: Sequence[float], device: torch.device) -> Tensor:
    """Numbers of the host as a tensor of dtype float32, without waiting for the device."""
    return torch.tensor(numbers, dtype=torch.float32).to(device, non_blocking=True)


def inner_product(first: Tensor, second: Tensor) -> Tensor:
    """Inner product of two real tensors of one shape, whole or sharded; a scalar of dtype float32 or float64."""
    first, second = wide(first), wide(second)
    if hasattr(first, "full_tensor") or not (first.is_contiguous() and second.is_contiguous()):
        return whole((first * second).sum())
    return torch.dot(first.view(-1), second.view(-1))


def norm(values: Tensor) -> Tensor:
    """Euclidean norm of a real tensor, whole or sharded, in single precision, or double for double tensors."""
    return whole(torch.linalg.vector_norm(wide(values)))


def wide(values: Tensor) -> Tensor:
    """A tensor in single precision, or double for double tensors."""
    return values if values.dtype == torch.float64 else values.float()


def whole(values: Any) -> Tensor:
    """A tensor that may be sharded, combined over all ranks."""
    return values.full_tensor() if hasattr(values, "full_tensor") else values


def as_real(values: Any) -> Any:
    """A complex tensor as one of its real and imaginary parts, which optimizers step by; anything else as it is."""
    return torch.view_as_real(values) if isinstance(values, Tensor) and values.is_complex() else values
