"""Norm and largest entry of each layer's gradient in one optimizer step, with one host read."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class GradientSnapshot:
    """The size of each parameter's gradient in one optimizer step, kept on the device until :meth:`by_layer`."""

    step: int  # its number, for loggers
    layers: list[str]  # of each of P parameters
    sizes: Tensor  # Euclidean norms of the parameters' gradients, and their largest absolute entries, shape (2, P)

    def by_layer(self) -> dict[str, tuple[float, float]]:
        """Euclidean norm and largest absolute entry of each layer's gradient; synchronises with the device."""
        norms: dict[str, list[float]] = {}
        entries: dict[str, list[float]] = {}
        for name, norm, entry in zip(self.layers, *self.sizes.tolist(), strict=True):
            norms.setdefault(name, []).append(norm)
            entries.setdefault(name, []).append(entry)
        # max() may drop a NaN entry, but then the norm is NaN as well.
        return {name: (math.hypot(*norms[name]), max(entries[name])) for name in norms}


def layers_with_parameters(root: nn.Module) -> dict[str, nn.Module]:
    """The modules that own parameters directly, by name as in ``named_modules()``.

    The root, whose name there is empty, is called by its class; ``torch.compile``'s prefixes are left out.

    Example:
        >>> list(layers_with_parameters(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))))
        ['0', '2']
    """
    return {
        name.replace("_orig_mod.", "") or type(root).__name__: module
        for name, module in root.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }


def read_gradients(root: nn.Module, optimizer: Optimizer, step: int) -> GradientSnapshot | None:
    """Measures the gradients that an optimizer is about to use, if any, without synchronising with the device.

    Other parameters of the network are left out: they accumulate gradients that nothing resets.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> net(torch.tensor([[3.0, -4.0]])).sum().backward()
        >>> read_gradients(net, torch.optim.SGD(net.parameters()), step=0).by_layer()
        {'0': (5.0, 4.0)}
    """
    stepped = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    names: list[str] = []
    gradients: list[Tensor] = []
    for name, module in layers_with_parameters(root).items():
        for parameter in module.parameters(recurse=False):
            gradient = parameter.grad
            if gradient is not None and gradient.numel() and parameter.requires_grad and parameter in stepped:
                names.append(name)
                gradients.append(_dense(gradient.detach()))
    if not gradients:
        return None
    dtype = torch.float64 if any(gradient.dtype == torch.float64 for gradient in gradients) else torch.float32
    sizes = [size for order in (2, math.inf) for size in torch._foreach_norm(gradients, order, dtype=dtype)]
    stacked = torch.stack([size.to(sizes[0].device) for size in sizes])
    return GradientSnapshot(step, names, stacked.reshape(2, -1))


def _dense(gradient: Tensor) -> Tensor:
    """A dense real tensor with the norm of a sparse or complex gradient."""
    gradient = gradient.coalesce().values() if gradient.is_sparse else gradient
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient
