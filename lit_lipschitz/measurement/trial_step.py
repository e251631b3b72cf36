"""Measures an optimizer whose formula is not known, by steps of a copy of it that leave the training untouched."""

import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.measurement.norms import as_real
from lit_lipschitz.measurement.random_state import kept_random_state

_SIZE = 4  # rows and columns of the weight that small copies train
_GRADIENTS = (1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0)  # in their steps, times one; RAdam's first five are linear


class Behaviour(NamedTuple):
    """How the updates of an optimizer depend on the gradients; the defaults are those of an Adam-type optimizer."""

    linear: bool = False  # whether they are sums of gradients, as with SGD
    momentum: float = 0.0  # of a linear optimizer: decay rate of the gradients' weights in that sum
    dampening: float = 0.0  # likewise; a gradient enters with 1 - dampening, as in torch's SGD
    couples_weight_decay: bool = False  # whether the weight decay is added to the gradient


class TrialError(RuntimeError):
    """No copy of an optimizer can step."""


UpdateOf = Callable[[Tensor], Tensor]
"""From a parameter that has a gradient to its update at lr = 1, a real tensor."""


@torch.no_grad()
def trial_step(optimizer: Optimizer, grad_scale: float | Tensor = 1.0, *, keep_decay: bool = False) -> UpdateOf:
    """Makes the step that an optimizer is about to make on a copy of it, of its parameters and of their gradients.

    What the copy moves a parameter by, over its learning rate, is the update at lr = 1. That learning rate is the root
    of the machine epsilon, as for a finite difference, whatever the configured one is. The ``weight_decay`` of its
    groups is 0 unless ``keep_decay``; a decay by another name is part of the update. Random numbers are drawn from a
    copy of the generators' state. Optimizers that take a closure get one that makes the same gradients again. Of a
    Schedule-Free optimizer the update is that of the sequence z. The gradients are divided by ``grad_scale``.

    Raises:
        TrialError: The optimizer can't be copied, or its step fails.
    """
    try:
        return _trial_step(optimizer, grad_scale, keep_decay)
    except Exception as error:  # of any kind, in another package's code
        raise TrialError(f"{type(error).__name__}: {error}") from None


def _trial_step(optimizer: Optimizer, grad_scale: float | Tensor, keep_decay: bool) -> UpdateOf:
    copies: dict[Tensor, Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            copy = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            vars(copy).update(vars(parameter))
            if parameter.grad is not None:
                copy.grad = parameter.grad.detach() / grad_scale
            copies[parameter] = copy
    memo: dict[int, Any] = {id(parameter): copy for parameter, copy in copies.items()}
    for state in optimizer.state.values():  # deepcopy takes 5 times as long for a tensor
        values = state.values() if isinstance(state, dict) else ()
        memo.update({id(value): value.clone() for value in values if type(value) is Tensor})
    clone = _copy_of(optimizer, memo)
    rates: dict[Tensor, float] = {}
    for group, own in zip(clone.param_groups, optimizer.param_groups, strict=True):
        rate = max(math.sqrt(torch.finfo(parameter.dtype).eps) for parameter in own["params"])
        _set(group, rate, group.get("weight_decay") if keep_decay else 0.0)
        rates.update(dict.fromkeys(own["params"], rate))
    _step(clone)

    def update_of(parameter: Tensor) -> Tensor:
        moved = _moved(optimizer, parameter) - _moved(clone, copies[parameter])
        return as_real(moved / rates[parameter])

    has_gradient = any(one.grad is not None and bool(one.grad.any()) for one in copies)
    waits = is_schedule_free(optimizer)  # RAdam's warm-up in the package schedulefree moves nothing at first
    if has_gradient and not waits and not any(bool(update_of(one).any()) for one in copies):
        raise RuntimeError("its step moves no parameter by the gradients that there are")
    return update_of


class AppliedStep:
    """Measures an optimizer by steps that it has made, where no copy of it can step.

    With ``decoupled`` weight decay, that is taken out of what the parameters have moved by. It must be made before
    other hooks are registered that change the learning rate after a step.
    """

    def __init__(self, optimizer: Optimizer, decoupled: bool) -> None:
        self.measured: Tensor | None = None  # what ``measure`` made of the updates of the last step that was watched
        self._optimizer, self._decoupled = optimizer, decoupled
        self._before: dict[Tensor, Tensor] = {}
        self._measure: Callable[[UpdateOf], Tensor]
        if not hasattr(optimizer, "_optimizer_step_post_hooks"):
            raise ConfigurationError(
                f"LipschitzLR expected an optimizer with torch's hooks and found {type(optimizer).__name__}, whose "
                "__init__ does not call that of torch.optim.Optimizer; add super().__init__(params, defaults) there"
            )
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def watch(self, measure: Callable[[UpdateOf], Tensor]) -> None:
        """Has the step measured that the optimizer is about to make; no parameter has moved yet."""
        self._measure = measure
        for group in self._optimizer.param_groups:
            self._before.update({one: _moved(self._optimizer, one).clone() for one in group["params"]})

    def close(self) -> None:
        """Removes the hook."""
        self._handle.remove()

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if not self._before:
            return
        settings = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}

        def update_of(parameter: Tensor) -> Tensor:
            group, before = settings[parameter], self._before[parameter]
            update = (before - _moved(optimizer, parameter)) / group["lr"]
            return as_real(update - group.get("weight_decay", 0.0) * before if self._decoupled else update)

        self.measured, self._before = self._measure(update_of), {}


def is_schedule_free(optimizer: Any) -> bool:
    """Whether an optimizer averages the weights and has two modes, as those of the package schedulefree."""
    modes = all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))
    return modes and all("train_mode" in group for group in optimizer.param_groups)


@torch.no_grad()
def behaviour_of(optimizer: Optimizer) -> Behaviour:
    """How the updates of an optimizer that has not stepped yet depend on the gradients.

    Copies with one small weight a parameter group make some steps with given gradients, the same on all ranks. An
    optimizer counts as linear if its updates are those of SGD with some momentum, in all groups, and double with the
    gradient. If no copy can step, the defaults are returned.
    """
    gradient = torch.arange(float(_SIZE**2)).cos().reshape(_SIZE, _SIZE)
    try:
        updates = _small_updates(optimizer, gradient)
        doubled = _small_updates(optimizer, 2 * gradient)
        decayed = _small_updates(optimizer, gradient, weight_decay=0.5)
        coupled = _close(decayed, _small_updates(optimizer, gradient, l2=0.5))
    except Exception:  # of any kind, in another package's code
        return Behaviour()
    factors = (updates * gradient).mean(dim=(1, 2, 3)) / gradient.square().mean()  # of the gradient, step by step
    first, second, third, fourth, fifth, *_ = (factors * factors[0].sign()).tolist()
    # What is left of the first gradient falls by the momentum; the other gradient enters in the fourth and fifth.
    momentum = round(third / second, 4) if second > 1e-3 * first else 0.0
    new, old = fourth - momentum * third, fifth - momentum**2 * third
    dampening = round(1 - (1 - momentum) * new - old, 4) + 0.0
    sums_up = 0 <= momentum < 1 and dampening < 1 and (momentum > 0 or abs(dampening) < 1e-3)
    parallel = _close(updates, factors.reshape(-1, 1, 1, 1) * gradient) and _close(doubled, 2 * updates)
    if first > 0 and sums_up and parallel:
        return Behaviour(True, momentum, dampening if momentum else 0.0, coupled)
    return Behaviour(couples_weight_decay=coupled)


def _close(first: Tensor, second: Tensor) -> bool:
    return torch.allclose(first, second, rtol=1e-2, atol=1e-3)


def _small_updates(optimizer: Optimizer, gradient: Tensor, weight_decay: float = 0.0, l2: float = 0.0) -> Tensor:
    """The updates at lr = 1 of a copy that trains one small weight a group; shape (steps, groups, rows, columns).

    ``l2`` times the weight is added to the gradient.
    """
    copies: dict[Tensor, Any] = {}
    state: dict[Tensor, Any] = defaultdict(dict)
    for group in optimizer.param_groups:
        like = group["params"][0]
        device = "cpu" if like.is_meta else like.device
        small = nn.Parameter(torch.linspace(0.5, 1.5, _SIZE**2, device=device).reshape(_SIZE, _SIZE))
        copies.update(dict.fromkeys(group["params"], small))
        if like in optimizer.state:
            state[small] = {name: _small_state(value, like) for name, value in optimizer.state[like].items()}
    memo = {id(parameter): small for parameter, small in copies.items()}
    clone = _copy_of(optimizer, {**memo, id(optimizer.state): state})
    for group in clone.param_groups:
        del group["params"][1:]
        _set(group, 1.0, weight_decay)
    weights = [group["params"][0] for group in clone.param_groups]
    moved = []
    for factor in _GRADIENTS:
        before = [_moved(clone, weight).clone() for weight in weights]
        for weight in weights:
            weight.grad = factor * gradient.to(weight.device) + l2 * weight
        _step(clone)
        moved.append(torch.stack([(b - _moved(clone, w)).cpu() for b, w in zip(before, weights, strict=True)]))
    return torch.stack(moved)


def _small_state(value: Any, parameter: Tensor) -> Any:
    """A part of the initial state of a parameter, for a small weight: the same number everywhere."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return deepcopy(value)
    first = value.flatten()[:1].float()
    return first.expand(_SIZE, _SIZE).clone() if len(first) else first.new_zeros(_SIZE, _SIZE)


def _copy_of(optimizer: Any, memo: dict[int, Any]) -> Any:
    """A copy without hooks; ``memo`` has the copies of parameters and other objects by their id, as in ``deepcopy``.

    torch copies no more of an optimizer than its groups and its state. What can't be copied, such as a group of
    processes, is shared.
    """
    clone = memo[id(optimizer)] = object.__new__(type(optimizer))
    for value in vars(optimizer).values():
        for inner in value if isinstance(value, list | tuple) else (value,):
            if isinstance(inner, Optimizer) and id(inner) not in memo:
                _copy_of(inner, memo)
    for name, value in vars(optimizer).items():
        if name == "step":  # a scheduler's wrapper, which counts steps
            continue
        if name.endswith("_hooks"):
            value = OrderedDict()
        else:
            with suppress(Exception):  # of any kind, in another package's code
                value = deepcopy(value, memo)
        vars(clone)[name] = value
    return clone


def _set(group: dict[str, Any], rate: float, weight_decay: Any) -> None:
    group["lr"] = torch.full_like(group["lr"], rate) if isinstance(group["lr"], Tensor) else rate
    if "weight_decay" in group:
        group["weight_decay"] = weight_decay


def _step(optimizer: Any) -> None:
    """Makes a step with the gradients that there are."""
    step = type(optimizer).step
    closure = {"closure": _closure(optimizer)} if "closure" in signature(step).parameters else {}
    with kept_random_state(parameter.device for group in optimizer.param_groups for parameter in group["params"]):
        step(optimizer, **closure)


def _closure(optimizer: Any) -> Callable[[], Tensor]:
    """A closure that makes the same gradients again, as for the second step of SAM."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [None if parameter.grad is None else parameter.grad.clone() for parameter in parameters]

    def restore() -> Tensor:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        return torch.zeros(())

    return restore


def _moved(optimizer: Any, parameter: Tensor) -> Tensor:
    """What the updates of an optimizer move: the parameter, or of a Schedule-Free optimizer the sequence z."""
    state = optimizer.state.get(parameter, {}) if is_schedule_free(optimizer) else {}
    moved: Tensor = state.get("z", parameter)
    return moved.detach()
