"""Tells observers of every backward pass in the process, in loops that have no hook for it."""

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class BackwardObserver(Protocol):
    """What is told of backward passes."""

    def before_backward(self, losses: Sequence[Tensor], inputs: Sequence[Tensor] | None) -> bool:
        """A backward of these tensors is about to begin, in ``inputs`` alone if given; whether it is of interest."""

    def after_backward(self) -> None:
        """A backward of interest has ended."""


_observers: list[weakref.ref[Any]] = []
_original: Callable[..., Any] | None = None  # torch.autograd.backward while there are observers


def add_observer(observer: BackwardObserver) -> None:
    """Tells an observer of backward passes until it is removed or freed; the process keeps no reference to it.

    ``torch.autograd.backward``, which ``Tensor.backward`` calls, is replaced while there are observers.
    """
    _observers.append(weakref.ref(observer, lambda _: _drop()))
    _install()


def remove_observer(observer: BackwardObserver) -> None:
    """Tells an observer no more; the last one restores ``torch.autograd.backward``."""
    _observers[:] = [one for one in _observers if one() is not observer]
    _drop()


def _drop() -> None:
    global _original
    _observers[:] = [one for one in _observers if one() is not None]
    # Other code may have replaced the function in the meantime; then it stays, and calls the original.
    if not _observers and _original is not None and torch.autograd.backward is _observed_backward:
        torch.autograd.backward, _original = _original, None


def _install() -> None:
    global _original
    if _original is None:
        _original = torch.autograd.backward
        functools.update_wrapper(_observed_backward, _original)
        torch.autograd.backward = _observed_backward


def _observed_backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
    assert _original is not None
    # Activation checkpointing and custom functions begin backwards within another one, in any of its threads.
    if torch._C._current_graph_task_id() >= 0:
        return _original(tensors, *args, **kwargs)
    losses, inputs = _tensors(tensors), kwargs.get("inputs", args[4] if len(args) > 4 else None)
    limited = None if inputs is None else _tensors(inputs)
    observers = [observer for one in _observers if (observer := one()) is not None]
    interested = [observer for observer in observers if observer.before_backward(losses, limited)]
    result = _original(tensors, *args, **kwargs)
    for observer in interested:
        observer.after_backward()
    return result


def _tensors(tensors: Any) -> list[Tensor]:
    """The tensors among one or several tensors, edges of a graph, or a dict of them."""
    if isinstance(tensors, Tensor):
        return [tensors]
    values = list(tensors.values()) if isinstance(tensors, dict) else tensors
    return [one for one in values if isinstance(one, Tensor)] if isinstance(values, (list, tuple)) else []
