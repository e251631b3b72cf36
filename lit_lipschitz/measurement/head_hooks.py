"""Measures the inputs of a network's head by a forward pre-hook, while it trains."""

from collections.abc import Callable, Container
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_lipschitz.errors import ConfigurationError, LitLipschitzError
from lit_lipschitz.measurement.running_maximum import RunningMaximum
from lit_lipschitz.recognition import heads as inspection
from lit_lipschitz.recognition.affine import same_weight

Mode = Literal["off", "training", "inference", "watching"]
"""What probes do: nothing; measure forwards with gradients, or without; or only tell which of them run."""


class Probe:
    """A pre-hook that measures a module's input, on the device and under torch.compile.

    Args:
        name: The module's name.
        head: The module.
        statistic: Takes in the inputs.
        clock: Counts the calls of all probes, on the device.
    """

    def __init__(self, name: str, head: nn.Module, statistic: RunningMaximum, clock: Tensor) -> None:
        self.name, self.head, self.statistic = name, head, statistic
        self.ran_at = torch.zeros_like(clock)
        self.mode: Mode = "off"
        self.chosen = False  # when it runs matters until then

        def measure(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # A deep copy of the network (a moving average, a teacher) brings the hook along, with another module.
            if self.mode == "off" or module is not head or torch.is_grad_enabled() == (self.mode == "inference"):
                return
            if self.mode != "watching":
                inputs = inspection.head_inputs(module, args[0] if args else kwargs["input"])
                statistic.update(inputs) if self.mode == "inference" else statistic.add(inputs)
            # A compiled network is not compiled anew for what it has to do less.
            if torch.compiler.is_compiling() or not self.chosen:
                self.ran_at.copy_(clock.add_(1))

        self._handle = head.register_forward_pre_hook(measure, with_kwargs=True)

    @property
    def weight(self) -> Tensor:
        """The module's weight."""
        weight: Any = self.head.weight
        return weight

    def remove(self) -> None:
        """Takes the hook off."""
        self._handle.remove()


class Probes:
    """Probes on every module that can be the head, until the first step tells which one is.

    Args:
        root: The network.
        head: The head's name, or ``"auto"``.
        statistic: Makes the statistic for a candidate.
        device: Where the training runs.
        stored: :meth:`state_dict` of the run that is resumed.
        owned: The parameters among which the head's weight must be, or None for any.

    Raises:
        ConfigurationError: There is no candidate.
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
        self._candidates = [
            Probe(name, module, statistic(module), clock)
            for name, module in inspection.head_candidates(root, head, owned).items()
        ]
        self._chosen: Probe | None = None
        self._stored: dict[str, Any] | None = None
        self._restored: Probe | None = None
        if stored is not None:
            self.load_state_dict(stored)

    @property
    def named_weight(self) -> Tensor | None:
        """The weight of the head that was named; None where it is to be found."""
        return None if self._automatic else self._candidates[0].weight

    def drop(self) -> None:
        """Forgets the batch so far."""
        for probe in self._candidates:
            probe.statistic.drop()

    def arm(self, mode: Mode) -> None:
        """Says what to do from now on: what runs between training batches is no training."""
        for probe in self._candidates:
            probe.mode = mode

    def reset(self) -> None:
        """Forgets what was measured."""
        for probe in self._candidates:
            probe.statistic.reset()

    def owns(self, weight: Tensor) -> bool:
        """Whether a weight is that of a candidate."""
        return any(same_weight(probe.weight, weight) for probe in self._candidates)

    @property
    def chosen(self) -> Probe | None:
        """The probe of the head, once it is known."""
        return self._chosen

    def choose(self, weight: Tensor | None, width: int | None = None) -> None:
        """Keeps the probe of the module that owns a weight, or else the last one that ran.

        Args:
            weight: The head's weight, where the loss's graph names it.
            width: Outputs of the head, where it does not.

        Raises:
            ConfigurationError: None has run, or the weight belongs to none of them.
            LitLipschitzError: The state of a resumed run belongs to another head.
        """
        ran = [probe for probe in self._candidates if int(probe.ran_at) > 0]
        if weight is None and width is not None and self._automatic:
            ran = [probe for probe in ran if inspection.head_size(probe.head)[1] == width]
        if not ran:
            names = ", ".join(repr(probe.name) for probe in self._candidates[-3:])
            raise ConfigurationError(
                f"LipschitzLR saw no training forward through {names} before the first backward; pass the head's "
                "name (head=...) if it is another module; a weight that a function uses, and reentrant activation "
                "checkpointing, go past a module's forward, and what torch.compile has compiled before the callback "
                "was there needs torch.compiler.reset() first"
            )
        if any(hasattr(probe.weight, "full_tensor") for probe in ran):
            weight = None  # of a sharded head: the graph knows the whole weight, the module its own part
        owners = [probe for probe in ran if weight is not None and same_weight(probe.weight, weight)]
        if weight is not None and not owners and self._automatic:
            named = self._root.named_parameters()
            owner = next((repr(name) for name, part in named if same_weight(part, weight)), "of no module")
            raise ConfigurationError(
                "LipschitzLR looked for the torch.nn.Linear or 1x1 convolution that makes the logits and found that "
                f"the parameter {owner} of shape {tuple(weight.shape)} makes them; let a torch.nn.Linear make them, or "
                "pass head= with the name of the affine map to measure"
            )
        chosen = owners[-1] if owners else max(ran, key=lambda probe: int(probe.ran_at))
        if self._stored is not None and chosen is not self._restored:
            raise LitLipschitzError(
                f"LipschitzLR's state in the checkpoint is of the head {self._stored['head']!r}, and this run's head "
                f"is {chosen.name!r} or of another width; resume with the network that it was saved with, or start "
                "anew without the checkpoint"
            )
        for probe in self._candidates:
            if probe is not chosen:
                probe.remove()
        chosen.chosen = True
        self._candidates, self._chosen, self._stored = [chosen], chosen, None

    def state_dict(self) -> dict[str, Any] | None:
        """Name of the head and its statistic, in plain values and tensors; None before the first step."""
        if self._chosen is None:
            return self._stored
        statistic = self._chosen.statistic
        return {"head": self._chosen.name, "statistic": statistic.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts a statistic where the next batch adds to it, before it is known whether that is the head again."""
        self._stored = state
        for probe in self._candidates:
            if probe.name == state["head"]:
                with suppress(ValueError):
                    probe.statistic.load_state_dict(state["statistic"])
                    self._restored = probe

    def remove(self) -> None:
        """Takes all hooks off."""
        for probe in self._candidates:
            probe.remove()
