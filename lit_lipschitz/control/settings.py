"""The arguments that ``LipschitzLR`` and ``attach`` share: how they are checked, and compared with a saved state."""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lit_lipschitz import bounds
from lit_lipschitz.control.argument_types import check_type
from lit_lipschitz.control.measured_finder import check_measured
from lit_lipschitz.control.options import Options
from lit_lipschitz.control.policy import Policy
from lit_lipschitz.control.state import OTHER_VERSION
from lit_lipschitz.errors import ConfigurationError, LitLipschitzError

# What a resumed run must have in common with the saved one.
_SAVED = ("bound", "norm", "rule", "second_moment", "weight_decay", "measure", "weights")


def make_settings(arguments: Mapping[str, Any]) -> tuple[Policy, Options]:
    """The policy and the options that the arguments of ``LipschitzLR`` make; others among them are passed over.

    Raises:
        ConfigurationError: An argument is out of its range.
    """
    bound, initial_lr = arguments["bound"], arguments["initial_lr"]
    min_lr, max_lr = arguments["min_lr"], arguments["max_lr"]
    for name in ("bound", "norm"):
        check_type(name, arguments[name], str)
    try:
        norm = bounds.resolve_norm(bound, arguments["norm"])
    except ValueError as error:
        raise ConfigurationError(f"LipschitzLR: {error}") from None
    of_policy, of_options = (
        {field.name: arguments[field.name] for field in fields(kind) if field.name in arguments}
        for kind in (Policy, Options)
    )
    policy, options = Policy(**{**of_policy, "norm": norm}), Options(**of_options)
    if options.measured:
        check_measured(policy, options)
    if initial_lr is not None and not min_lr <= initial_lr <= (max_lr or math.inf):
        raise ConfigurationError(
            f"LipschitzLR(initial_lr={initial_lr}): expected a rate from min_lr={min_lr} to max_lr={max_lr}"
        )
    return policy, options


def saved_settings(policy: Policy, options: Options) -> dict[str, Any]:
    """The settings that a state is saved with."""
    values = {**vars(policy), **vars(options)}
    return {name: values[name] for name in _SAVED}


def check_saved(state: Mapping[str, Any], policy: Policy, options: Options) -> None:
    """Checks that a state was saved with the settings of this run.

    Raises:
        LitLipschitzError: It was saved with others, or by another version.
    """
    settings = saved_settings(policy, options)
    if set(state.get("settings", ())) != set(settings) or "optimizers" not in state:
        raise LitLipschitzError(OTHER_VERSION)
    for name, value in state["settings"].items():
        if value != settings[name]:
            raise LitLipschitzError(
                f"LipschitzLR's state in the checkpoint was saved with {name}={value!r}, and this run has "
                f"{name}={settings[name]!r}; resume with the settings that it was saved with, pass restore=False to "
                "measure again, or start without the checkpoint"
            )
