"""The policies of `lit-lipschitz compare`: from a policy's name to the options of fit that implement it."""

import difflib
import importlib.util
import math
import pydoc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lit_lipschitz.errors import ConfigurationError

DEFAULT = "lipschitz,sgd:0.03,sgd:0.1,sgd:0.3,adamw:0.001,adamw:0.003"
POLICIES = (
    "lipschitz", "lipschitz-adamw", "lipschitz-schedulefree", "sgd:RATE", "adamw:RATE", "config:RATE", "paper",
)  # fmt: skip
_HAS_RATE = {name.partition(":")[0]: name.endswith(":RATE") for name in POLICIES}


@dataclass(frozen=True)
class ComparedPolicy:
    """One of the ways to set the learning rate of a run that are compared."""

    kind: str  # the name without the rate
    rate: float | None = None  # the learning rate at a schedule factor of 1, if it is fixed

    @property
    def name(self) -> str:
        """The name, the same for all ways to write the rate."""
        return self.kind if self.rate is None else f"{self.kind}:{self.rate!r}"

    @property
    def adam(self) -> bool:
        """Whether it uses AdamW or Schedule-Free AdamW; the others that change the optimizer use SGD."""
        return self.kind in ("adamw", "lipschitz-adamw", "lipschitz-schedulefree")

    @property
    def averages(self) -> bool:
        """Whether it averages the weights instead of decaying the learning rate."""
        return self.kind == "lipschitz-schedulefree"

    @property
    def unscheduled(self) -> bool:
        """Whether it trains without the config's scheduler."""
        return self.averages or self.kind == "paper"


def parse_policies(text: str) -> list[ComparedPolicy]:
    """The policies in a list with commas, such as ``lipschitz,sgd:0.1``.

    Raises:
        ConfigurationError: A name is unknown, a rate is not a positive number, or there are no names.
    """
    found = [_policy(name.strip()) for name in text.split(",") if name.strip()]
    if not found:
        raise ConfigurationError(f"compare --policies {text!r}: expected some of {', '.join(POLICIES)}")
    return list(dict.fromkeys(found))


def _policy(name: str) -> ComparedPolicy:
    kind, colon, text = name.partition(":")
    where, known = f"compare --policies: {name}:", ", ".join(POLICIES)
    if kind not in _HAS_RATE:
        close = difflib.get_close_matches(kind, _HAS_RATE, n=1)
        hint = f"closest: {close[0]}; " if close else ""
        raise ConfigurationError(f"{where} no such policy; {hint}all: {known}")
    if kind == "lipschitz-schedulefree" and importlib.util.find_spec("schedulefree") is None:
        raise ConfigurationError(f"{where} the package schedulefree is missing: pip install schedulefree")
    if not _HAS_RATE[kind]:
        if colon:
            raise ConfigurationError(
                f"{where} {kind} computes its learning rate; expected {kind} alone; all policies: {known}"
            )
        return ComparedPolicy(kind)
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise ConfigurationError(
            f"{where} expected a rate above 0, as in {kind}:0.1, found {text!r}; all policies: {known}"
        )
    return ComparedPolicy(kind, rate)


def fit_options(policy: ComparedPolicy, model: Mapping[str, Any]) -> list[str]:
    """The options of fit that implement a policy, as they would be typed, for the ``model`` of a config."""
    chosen = ["--fixed_rate", "false" if policy.rate is None else "true"]
    if policy.kind == "lipschitz":
        return chosen
    arguments = model.get("init_args") or {}
    key = _argument(arguments, Optimizer, "optimizer")
    if policy.kind == "config":
        own = (arguments.get(key) or {}) if key else {}
        named = isinstance(own, Mapping) and "lr" in (own.get("init_args") or {})
        return [*chosen, f"--model.{key}.lr", repr(policy.rate)] if named else chosen
    if key:
        chosen += _optimizer_options(policy, key, arguments.get(key))
    if policy.kind == "paper":
        chosen += [part for name in ("norm", "rule", "second_moment") for part in (f"--lipschitz.{name}", "auto")]
        chosen += ["--lipschitz.bound", "paper"]
    if policy.unscheduled:
        schedule = _argument(arguments, LRScheduler, "scheduler")
        chosen += [f"--model.{schedule}", "null"] if schedule else []
    return chosen


def needs_swap(policy: ComparedPolicy, model: Mapping[str, Any]) -> bool:
    """Whether a policy changes an optimizer that is made by the module's code instead of the config."""
    arguments = model.get("init_args") or {}
    return policy.kind not in ("lipschitz", "config") and _argument(arguments, Optimizer, "optimizer") is None


def _optimizer_options(policy: ComparedPolicy, key: str, own: Any) -> list[str]:
    """The options that set the optimizer; everything that is not named is torch's default."""
    adam = policy.adam
    settings: dict[str, Any] = {} if policy.rate is None else {"lr": policy.rate}
    if not adam:
        settings.update(momentum=0.0 if policy.kind == "paper" else 0.9, dampening=0.0, nesterov="false")
    # AdamW's weight decay is decoupled, so its values do not carry over to other optimizers, nor theirs to it.
    own = own if isinstance(own, Mapping) else {}
    same = (_class(own.get("class_path")) is torch.optim.AdamW) == adam
    decay = (own.get("init_args") or {}).get("weight_decay") if same else None
    settings["weight_decay"] = decay if decay is not None else 0.01 if adam else 0.0
    name = "schedulefree.AdamWScheduleFree" if policy.averages else "torch.optim.AdamW" if adam else "torch.optim.SGD"
    return [f"--model.{key}", name, *(p for k, v in settings.items() for p in (f"--model.{key}.{k}", str(v)))]


def _argument(arguments: Mapping[str, Any], base: type, usual: str) -> str | None:
    """The model's argument that holds a class of some kind, or that has the usual name of one."""
    for key, value in arguments.items():
        kind = _class(value.get("class_path")) if isinstance(value, Mapping) else None
        if kind is not None and issubclass(kind, base):
            return key
    return usual if usual in arguments else None


def _class(path: Any) -> type | None:
    found = pydoc.locate(str(path))
    return found if isinstance(found, type) else None
