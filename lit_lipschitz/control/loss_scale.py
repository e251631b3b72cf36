"""The factors that a training loop and its GradScaler have on the loss and on the gradients."""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def loss_scale(scaler: Any, accumulated: int) -> float | Tensor:
    """Factor of the loss in its backward: that of the GradScaler, if any, over the number of accumulated batches.

    On the device of the GradScaler, so that reading it does not wait.
    """
    if scaler is None:
        return 1.0 / accumulated
    scale = getattr(scaler, "_scale", None)
    value: float | Tensor = scaler.get_scale() if scale is None else scale
    return value / accumulated


def grad_scale(scaler: Any, optimizer: Optimizer) -> float | Tensor:
    """A fused optimizer divides by the GradScaler's scale within its step; other gradients are unscaled before."""
    fused = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
    scale: float = scaler.get_scale() if fused else 1.0
    return scale
