"""The policies that `lit-lipschitz compare` knows: from a name to the options of fit that make it."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lit_lipschitz.errors import ConfigurationError

DEFAULT = "lipschitz,sgd:0.03,sgd:0.1,sgd:0.3,adamw:0.001,adamw:0.003"
POLICIES = ("lipschitz", "lipschitz-adamw", "paper", "sgd:RATE", "adamw:RATE", "config:RATE")
"""What a policy can be called."""
_KINDS = {name.partition(":")[0]: name.endswith(":RATE") for name in POLICIES}


@dataclass(frozen=True)
class Policy:
    """How a run's rate is set.

    Attributes:
        kind: The name without the rate.
        rate: The rate at a schedule factor of 1, where it is fixed.
    """

    kind: str
    rate: float | None = None

    @property
    def name(self) -> str:
        """The name, the same for all ways to write the rate."""
        return self.kind if self.rate is None else f"{self.kind}:{self.rate!r}"

    @property
    def adam(self) -> bool:
        """Whether it brings AdamW; others that bring an optimizer bring SGD."""
        return self.kind in ("adamw", "lipschitz-adamw")


def parse_policies(text: str) -> list[Policy]:
    """The policies of a list with commas.

    Args:
        text: Such as ``lipschitz,sgd:0.1``.

    Raises:
        ConfigurationError: A name is unknown, a rate is none, or there are no names.
    """
    found = [_policy(name.strip()) for name in text.split(",") if name.strip()]
    if not found:
        raise ConfigurationError(f"compare --policies {text!r}: expected some of {', '.join(POLICIES)}")
    return list(dict.fromkeys(found))


def _policy(name: str) -> Policy:
    kind, colon, text = name.partition(":")
    if kind not in _KINDS:
        close = difflib.get_close_matches(kind, _KINDS, n=1)
        hint = f"closest: {close[0]}; " if close else ""
        raise ConfigurationError(f"compare --policies: {name}: no such policy; {hint}all: {', '.join(POLICIES)}")
    if not _KINDS[kind]:
        if colon:
            raise ConfigurationError(
                f"compare --policies: {name}: {kind} computes its rate; expected {kind} alone; with a rate there are "
                f"{', '.join(one for one in POLICIES if ':' in one)}"
            )
        return Policy(kind)
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise ConfigurationError(
            f"compare --policies: {name}: expected a rate above 0, as in {kind}:0.1, found {text!r}; all policies: "
            f"{', '.join(POLICIES)}"
        )
    return Policy(kind, rate)


# -- options of fit ----------------------------------------------------------------------------------------------------


def options(policy: Policy, model: Mapping[str, Any]) -> list[str]:
    """The options of fit that make a policy of a config, as they would be typed.

    Args:
        policy: The policy.
        model: The config's ``model``, a class_path and init_args.
    """
    switch = ["--fixed_rate", "false" if policy.rate is None else "true"]
    if policy.kind == "lipschitz":
        return switch
    arguments = model.get("init_args") or {}
    key = _key(arguments, Optimizer, "optimizer")
    if policy.kind == "config":
        own = (arguments.get(key) or {}) if key else {}
        named = isinstance(own, Mapping) and "lr" in (own.get("init_args") or {})
        return [*switch, f"--model.{key}.lr", repr(policy.rate)] if named else switch
    chosen = [*switch, *(_optimizer(policy, key, arguments.get(key)) if key else ())]
    if policy.kind == "paper":
        chosen += [part for name in ("norm", "rule", "second_moment") for part in (f"--lipschitz.{name}", "auto")]
        chosen += ["--lipschitz.bound", "paper"]
        schedule = _key(arguments, LRScheduler, "scheduler")
        chosen += [f"--model.{schedule}", "null"] if schedule else []
    return chosen


def needs_exchange(policy: Policy, model: Mapping[str, Any]) -> bool:
    """Whether a policy brings an optimizer for which the model's config has no place, the module's code having it."""
    return (
        policy.kind not in ("lipschitz", "config")
        and _key(model.get("init_args") or {}, Optimizer, "optimizer") is None
    )


def _optimizer(policy: Policy, key: str, own: Any) -> list[str]:
    """The options for the optimizer; what is not named here is torch's default."""
    adam = policy.adam
    settings: dict[str, Any] = {} if policy.rate is None else {"lr": policy.rate}
    if not adam:
        settings.update(momentum=0.0 if policy.kind == "paper" else 0.9, dampening=0.0, nesterov="false")
    # What is a customary weight decay for one of the two is none for the other, which multiplies it by another rate.
    own = own if isinstance(own, Mapping) else {}
    same = (_class(own.get("class_path")) is torch.optim.AdamW) == adam
    decay = (own.get("init_args") or {}).get("weight_decay") if same else None
    settings["weight_decay"] = decay if decay is not None else 0.01 if adam else 0.0
    name = "torch.optim.AdamW" if adam else "torch.optim.SGD"
    return [f"--model.{key}", name, *(p for k, v in settings.items() for p in (f"--model.{key}.{k}", str(v)))]


def _key(arguments: Mapping[str, Any], base: type, customary: str) -> str | None:
    """The model's argument that names a class of this kind, or that is customary for one."""
    for key, value in arguments.items():
        kind = _class(value.get("class_path")) if isinstance(value, Mapping) else None
        if kind is not None and issubclass(kind, base):
            return key
    return customary if customary in arguments else None


def _class(path: Any) -> type | None:
    module, _, name = str(path).rpartition(".")
    try:
        found = getattr(import_module(module), name, None) if module else None
    except ImportError:
        return None
    return found if isinstance(found, type) else None
