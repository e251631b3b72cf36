"""Damages states at random places."""

import copy
import math
import random
from typing import Any

import torch

WRONG = (math.nan, -math.inf, -1.0, -(1 << 70), "text", None, [], {}, {"a": 1}, True, torch.zeros(3),
         torch.tensor(math.nan))  # fmt: skip


def places(state: Any) -> list[tuple[Any, Any]]:
    """All entries of a nested state: their dict or list, and their key."""
    if not isinstance(state, (dict, list)):
        return []
    keys = list(state) if isinstance(state, dict) else list(range(len(state)))
    return [(state, key) for key in keys] + [place for key in keys for place in places(state[key])]


def damaged_state(state: Any, chance: random.Random) -> tuple[Any, str]:
    """A copy with an entry more, an entry less or another value, and what was changed."""
    changed = copy.deepcopy(state)
    holder, key = chance.choice(places(changed))
    how = chance.choice(["less", "more", "other", "other"])
    if how == "less":
        del holder[key]
    elif how == "more":
        if isinstance(holder, dict):
            holder["invented"] = 1.0
        else:
            holder.append(holder[key])
    else:
        holder[key] = chance.choice(WRONG)
        how = f"{holder[key]!r}"
    return changed, f"{key}: {how}"
