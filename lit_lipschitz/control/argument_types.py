"""Checks the types of the arguments of ``LipschitzLR`` where they are given, and prints those that were given."""

import inspect
import numbers
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lit_lipschitz.errors import ConfigurationError

_KINDS: dict[Any, tuple[type, str]] = {
    float: (numbers.Real, "a number"),
    int: (numbers.Integral, "a whole number"),
    bool: (bool, "True or False"),
    str: (str, "a text"),
    type(None): (type(None), "None"),
}


def check_types(arguments: Any) -> None:
    """Checks the fields of a dataclass whose types are numbers, texts, truth values or None.

    A field with a ``Literal`` is left to its own check, which lists the choices.

    Args:
        arguments: An instance of a dataclass whose fields are arguments of ``LipschitzLR``.

    Raises:
        ConfigurationError: A value is of another type.
    """
    for name, hint in get_type_hints(type(arguments)).items():
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if any(get_origin(kind) is Literal for kind in kinds):
            continue
        check_type(name, getattr(arguments, name), *kinds)


def check_type(name: str, value: Any, *kinds: Any) -> None:
    """Checks an argument of ``LipschitzLR``.

    Raises:
        ConfigurationError: It is of none of the types; a truth value is no number.
    """
    for kind in kinds:
        if isinstance(value, _KINDS[kind][0]) and (kind is bool or not isinstance(value, bool)):
            return
    expected = " or ".join(_KINDS[kind][1] for kind in kinds)
    raise ConfigurationError(f"LipschitzLR({name}={value!r}): expected {expected}, found {type(value).__name__}")


def describe_call(instance: Any, values: Mapping[str, Any]) -> str:
    """The call that makes an instance: its class, and the arguments that differ from their defaults."""
    parameters = inspect.signature(type(instance).__init__).parameters
    given = {
        name: values[name]
        for name, parameter in parameters.items()
        if name in values and values[name] != parameter.default
    }
    return f"{type(instance).__name__}({', '.join(f'{name}={value!r}' for name, value in given.items())})"
