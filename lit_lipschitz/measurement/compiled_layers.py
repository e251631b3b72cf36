"""Measures the output layer in compiled code, which the autograd graph shows as one node."""

import math
from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from lit_lipschitz.measurement.head_hooks import NoHook, scripted
from lit_lipschitz.measurement.measured_outputs import MeasuredOutputs
from lit_lipschitz.recognition.output_layers import HiddenLayers, OutputLayer

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ROUNDING = 0.05
"""Relative difference of two gradient norms that may be rounding in bfloat16."""


class CompiledLayers:
    """Keeps the inputs of the affine module that compiled code called last, of which one parameter is ``owned``.

    The hooks must be registered before the first forward, with which they are compiled; other calls are not kept.
    """

    def __init__(self, model: nn.Module, owned: Container[Tensor] | None) -> None:
        self._module: nn.Module | None = None
        self._inputs: Tensor | None = None
        self._handles = [
            module.register_forward_pre_hook(self.keep_call, with_kwargs=True)
            for module in model.modules()
            if isinstance(module, (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED))
            and (owned is None or any(parameter in owned for parameter in module.parameters()))
        ]

    def keep_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keeps the input of a forward with gradients, if it is compiled."""
        if torch.compiler.is_compiling() and torch.is_grad_enabled():
            inputs = [*args, *kwargs.values()]
            plain = len(inputs) == 1 and isinstance(inputs[0], Tensor)
            # Only the last one of a forward becomes an output of the compiled code.
            self._module, self._inputs = module, inputs[0].detach() if plain else None

    keep_call.__wrapped__ = scripted  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the network, or one that is saved, has a hook that does nothing."""
        return NoHook, ()

    def remove(self) -> None:
        """Removes the hooks; compiled code keeps them."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.forget()

    def forget(self) -> None:
        """Forgets the last call."""
        self._module = self._inputs = None

    @property
    def saw_none(self) -> bool:
        """Whether there are modules, and none of them was called in compiled code."""
        return bool(self._handles) and self._module is None

    def last_of(self, code: HiddenLayers) -> nn.Module | None:
        """The module that was called last, if one of its parameters is among those of the compiled code."""
        module = self._module
        known = module is not None and any(p in code.parameters for p in module.parameters())
        return module if known else None

    def _call_again(self) -> Tensor | None:
        """The outputs of the module that was called last, with a graph of their own; None without its inputs."""
        if self._module is None or self._inputs is None:
            return None
        parameters = list(self._module.parameters())
        if any(hasattr(parameter, "full_tensor") for parameter in parameters):  # sharded, and whole in a forward alone
            return None
        inputs = self._inputs.to(parameters[0].dtype)
        with torch.enable_grad(), torch.autocast(inputs.device.type, enabled=False):
            outputs: Tensor = type(self._module).forward(self._module, inputs)
        return outputs

    def contradicts(self, head: Tensor, outputs: Tensor, dim: int | None) -> bool:
        """Whether a module with the weight ``head`` was called last, and compiled code has other outputs than it.

        With a dimension, ``outputs`` is their log-softmax along it. Waits for the device.
        """
        called = None if self._module is None or self._module.weight is not head else self._call_again()
        if called is None:
            return False
        own = called.detach().float()
        if own.shape != outputs.shape:
            return False
        others = outputs.detach().float()
        if dim is not None:  # the log-softmax differs from the outputs by one number for each of its sums
            own, others = (part - part.mean(dim, keepdim=True) for part in (own, others))
        return bool((own - others).norm() > _ROUNDING * torch.minimum(own.norm(), others.norm()))

    def watch(self, code: HiddenLayers, statistic: MeasuredOutputs, scale: float | Tensor) -> None:
        """Has the backward that is about to begin add the gradient in the outputs of compiled code, over ``scale``.

        The module that was called last is called again with its inputs. If both backwards give its weights the same
        gradient, its outputs are those of the code; otherwise the gradient in the outputs is scaled to give them a
        gradient of the same norm. Of code with other outputs, such as a loss, the gradient in the weights counts.
        """
        module, positions, layer, outputs = self.last_of(code), code.parameters, None, None
        if module is not None:
            positions = {p: positions[p] for p in module.parameters() if p in positions}
            outputs = self._call_again()
        if outputs is not None:
            layer = _layer_of(module, tuple(positions), self._inputs, outputs)
        num_outputs = -1 if outputs is None else outputs.numel()
        done = False  # the hook must not hold the node, which would keep it from being freed

        @torch.no_grad()
        def add(grad_inputs: tuple[Tensor | None, ...], grad_outputs: tuple[Tensor | None, ...]) -> None:
            nonlocal done
            if done:  # a retained graph may have more backwards
                return
            done = True
            own = {p: grad for p, i in positions.items() if (grad := grad_inputs[i]) is not None}
            fitting = [grad for grad in grad_outputs if grad is not None and grad.numel() == num_outputs]
            if own and layer is not None and outputs is not None and fitting:
                grad = fitting[0].reshape(outputs.shape)
                expected = torch.autograd.grad(outputs, list(own), grad.to(outputs.dtype), allow_unused=True)
                statistic.add(layer, grad * _ratio(own.values(), expected), scale)
                return
            for parameter, grad in own.items():
                statistic.add(OutputLayer(None, (parameter,), None, None), grad, scale)

        code.node.register_hook(add)


def _layer_of(module: Any, parameters: tuple[Tensor, ...], inputs: Tensor | None, outputs: Tensor) -> OutputLayer:
    """The call of a module as an output layer."""
    outputs_dim, copies = -1, 1
    if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED)):
        outputs_dim = outputs.ndim - 1 - len(module.kernel_size)
        strides = module.stride if isinstance(module, _CONVOLUTIONS) else [1] * len(module.kernel_size)
        copies = math.prod(math.ceil(size / stride) for size, stride in zip(module.kernel_size, strides, strict=True))
    has_bias = getattr(module, "bias", None) is not None
    return OutputLayer(None, parameters, inputs, outputs_dim, copies, has_bias=has_bias)


def _ratio(grads: Iterable[Tensor], expected: Iterable[Tensor | None]) -> Tensor:
    """The norm of some gradients over that of the expected ones; 1 if they hardly differ or none is expected."""
    ratio = get_total_norm(grads) / get_total_norm([grad for grad in expected if grad is not None])
    differs = torch.isfinite(ratio) & ((ratio - 1).abs() > _ROUNDING)
    return torch.where(differs, ratio, 1.0)
