"""Forward pre-hooks that measure the inputs of the output layer (the head) while the network trains."""

from collections.abc import Callable, Container
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_lipschitz.errors import ConfigurationError, LitLipschitzError
from lit_lipschitz.measurement.running_maximum import RunningMaximum
from lit_lipschitz.recognition.affine import same_weight
from lit_lipschitz.recognition.heads import head_candidates, head_inputs, head_size

Mode = Literal["off", "training", "inference", "watching"]
"""What is measured (nothing, forwards with gradients, or those without); "watching" only records which modules run."""


def scripted(self: Any, input: tuple[Tensor]) -> None:
    """The hook in a network that torch.jit.script compiles."""
    return None


class NoHook:
    """The hooks in a copy of the network."""

    mode: Mode = "off"  # for deepcopy, which copies the method of a HeadHook

    def measure(self, *_: Any) -> None:
        """Does nothing."""

    def keep_call(self, *_: Any) -> None:
        """Does nothing."""

    measure.__wrapped__ = keep_call.__wrapped__ = scripted  # type: ignore[attr-defined]


class HeadHook:
    """A forward pre-hook that measures a module's input, on the device and under torch.compile."""

    def __init__(self, name: str, head: nn.Module, statistic: RunningMaximum, clock: Tensor) -> None:
        self.name, self.head, self.statistic, self._clock = name, head, statistic, clock
        self.last_call = torch.zeros_like(clock)  # value of the clock; 0 before the first call
        self.mode: Mode = "off"
        self.selected = False  # whether the module is the head; its calls are no longer timed then
        self.remove = head.register_forward_pre_hook(self.measure, with_kwargs=True).remove

    def measure(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Measures the input of a forward of the mode."""
        if self.mode == "off" or torch.is_grad_enabled() == (self.mode == "inference") or _is_transformed():
            return
        if self.mode != "watching":
            inputs: Any = args[0] if args else kwargs.get("input")
            if not _is_measurable(inputs, self.head):
                return
            inputs = head_inputs(module, inputs)
            self.statistic.update(inputs) if self.mode == "inference" else self.statistic.add(inputs)
        # A compiled network keeps this line, since recompiling it costs more.
        if torch.compiler.is_compiling() or not self.selected:
            self.last_call.copy_(self._clock.add_(1))

    measure.__wrapped__ = scripted  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the network, or one that is saved, has a hook that does nothing."""
        return NoHook, ()

    @property
    def weight(self) -> Tensor:
        """The module's weight."""
        weight: Any = self.head.weight
        return weight


def _is_transformed() -> bool:
    """Whether a transform of ``torch.func`` runs, such as vmap or jvp, whose tensors must not be kept."""
    return not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None


def _is_measurable(inputs: Any, head: nn.Module) -> bool:
    """Whether a forward's argument is a batch of the head's inputs: plain numbers, at least one row of them."""
    plain = isinstance(inputs, Tensor) and inputs.layout == torch.strided and inputs.is_floating_point()
    return plain and inputs.numel() > 0


class HeadHooks:
    """Hooks on every module that can be the head, until the first step shows which one is.

    The head has a name, or is ``"auto"``; its weight must be among the parameters ``owned``, if given. ``statistic``
    makes the statistic of a candidate, and ``stored`` is the state of a run that is resumed.
    """

    def __init__(
        self,
        root: nn.Module,
        head: str,
        statistic: Callable[[nn.Module], RunningMaximum],
        device: torch.device,
        stored: dict[str, Any] | None = None,
        owned: Container[Tensor] | None = None,
    ) -> None:
        self._root, self._automatic = root, head == "auto"
        clock = torch.zeros((), dtype=torch.int64, device=device)
        candidates = head_candidates(root, head, owned).items()
        self._candidates = [HeadHook(name, module, statistic(module), clock) for name, module in candidates]
        self._stored = stored
        self._restored: HeadHook | None = None
        self.load_state_dict(stored)

    @property
    def named_weight(self) -> Tensor | None:
        """The weight of the head that the user named; None with ``"auto"``."""
        return None if self._automatic else self._candidates[0].weight

    def set_mode(self, mode: Mode) -> None:
        """Sets the mode of all hooks; forwards between training batches are not training."""
        for hook in self._candidates:
            hook.mode = mode

    def discard(self) -> None:
        """Discards the batch so far."""
        for hook in self._candidates:
            hook.statistic.discard()

    def reset(self) -> None:
        """Forgets all measurements."""
        for hook in self._candidates:
            hook.statistic.reset()

    def owns(self, weight: Tensor) -> bool:
        """Whether a weight belongs to a candidate."""
        return any(same_weight(hook.weight, weight) for hook in self._candidates)

    def select(self, weight: Tensor | None, width: int | None = None) -> HeadHook:
        """Selects the module that owns a weight, or else the last of a width that ran, and removes the other hooks."""
        ran = [hook for hook in self._candidates if int(hook.last_call) > 0]
        if weight is None and width is not None and self._automatic:
            ran = [hook for hook in ran if head_size(hook.head)[1] == width]
        if not ran:
            names = ", ".join(repr(hook.name) for hook in self._candidates[-3:])
            raise ConfigurationError(
                f"LipschitzLR saw no forward pass through {names} before the first backward pass; pass head= with the "
                "name of the module that computes the logits, call this module itself and not a function with its "
                "weight, use activation checkpointing with use_reentrant=False, or call torch.compiler.reset() before "
                "fit if the compiled network has already been run"
            )
        if any(hasattr(hook.weight, "full_tensor") for hook in ran):
            weight = None  # of a sharded head the graph has the whole weight, and the module its shard
        owners = [hook for hook in ran if weight is not None and same_weight(hook.weight, weight)]
        if weight is not None and not owners and self._automatic:
            raise ConfigurationError(self._no_owner(weight))
        selected = owners[-1] if owners else max(ran, key=lambda hook: int(hook.last_call))
        if self._stored is not None and selected is not self._restored:
            raise LitLipschitzError(
                f"LipschitzLR's state in the checkpoint was saved with the head {self._stored['head']!r}, and the head "
                f"of this run is {selected.name!r} or has another width; resume with the network that it was saved "
                "with, or start without the checkpoint"
            )
        for hook in self._candidates:
            if hook is not selected:
                hook.remove()
        selected.selected = True
        self._candidates, self._stored = [selected], None
        return selected

    def _no_owner(self, weight: Tensor) -> str:
        """The message for a weight that belongs to no candidate."""
        named = self._root.named_parameters()
        owner = next((f"the parameter {name!r}" for name, own in named if same_weight(own, weight)), "a tensor")
        return (
            "LipschitzLR looked for the torch.nn.Linear or 1x1 convolution that computes the logits and found that "
            f"they are computed with {owner} of shape {tuple(weight.shape)}, which belongs to no such layer; use a "
            "torch.nn.Linear, or pass head= with the name of the layer to measure"
        )

    def state_dict(self) -> dict[str, Any] | None:
        """Name of the head and its statistic, in plain values and tensors; None before the first step."""
        hook = self._candidates[0]
        return {"head": hook.name, "statistic": hook.statistic.state_dict()} if hook.selected else self._stored

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Loads a statistic, before it is known whether its module is the head again."""
        self._stored = state
        for hook in self._candidates:
            if state is not None and hook.name == state["head"]:
                with suppress(ValueError):
                    hook.statistic.load_state_dict(state["statistic"])
                    self._restored = hook

    def remove(self) -> None:
        """Removes all hooks."""
        for hook in self._candidates:
            hook.remove()
