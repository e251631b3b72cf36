"""Finds and removes callbacks of a trainer."""

from typing import TypeVar

import lightning as L

from lit_lipschitz.callbacks.trainer_facts import callbacks_of

_Kind = TypeVar("_Kind", bound=L.Callback)


def find_callback(trainer: L.Trainer, kind: type[_Kind]) -> _Kind | None:
    """The trainer's first callback of a class, or None."""
    return next((callback for callback in callbacks_of(trainer) if isinstance(callback, kind)), None)


def remove_callbacks(trainer: L.Trainer, *kinds: type[L.Callback]) -> None:
    """Removes the callbacks of some classes from a trainer."""
    callbacks_of(trainer)[:] = [callback for callback in callbacks_of(trainer) if not isinstance(callback, kinds)]
