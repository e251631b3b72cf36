"""Facts of a run that a resumed run may have otherwise, such as the number of devices."""

import math
from collections.abc import Mapping

from lit_lipschitz.control.loop_facts import LoopFacts, Target
from lit_lipschitz.control.options import Options

_OF_A_STEP = ("devices", "accumulated batches", "optimizer steps of an epoch")
"""Facts from which the number of examples in an optimizer step follows."""


def run_facts(loop: LoopFacts, options: Options, target: Target) -> dict[str, str]:
    """The facts by their names, as text; known from the first batch on."""
    numbers = {
        "devices": loop.world_size,
        "accumulated batches": loop.accumulated,
        "optimizer steps of an epoch": loop.epoch_steps(),
        "optimizer steps of the run": loop.total_steps(),
        "trained parameters": num_trained(target),
    }
    texts = {name: f"{value:g}" if value < math.inf else "unknown" for name, value in numbers.items()}
    return {**texts, "update": str(options.update)}


def num_trained(target: Target) -> int:
    """Number of parameters of an optimizer that are not frozen, counted as tensors."""
    return sum(parameter.requires_grad for parameter in target.parameters)


def changed_facts(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What has changed, for a message; "" if that is nothing."""
    changed = (name for name in now if name in before and before[name] != now[name])
    return ", ".join(f"{name} {before[name]} -> {now[name]}" for name in changed)


def changes_batches(before: Mapping[str, str], now: Mapping[str, str]) -> bool:
    """Whether an optimizer step may have another number of examples than in the run before."""
    return any(name in before and before[name] != now[name] for name in _OF_A_STEP)
