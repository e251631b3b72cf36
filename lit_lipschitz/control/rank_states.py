"""The states of all ranks in one checkpoint: what they have measured since their last all-reduce differs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_lipschitz.control.state import refuse_other_versions

_OF_A_RANK = ("accumulated", "losses", "residuals", "head")
"""Fields of a state that may differ from rank to rank; losses that are not finite are reported by all ranks alike."""


def unknown_ranks(world_size: int) -> list[dict[str, Any] | None]:
    """The field ``ranks`` of the state of one rank, which knows nothing of the others."""
    return [{}, *[None] * (world_size - 1)]


def gather_states(states: Any, world_size: int) -> Any:
    """States by the position of their optimizer, each joined with those of the other ranks, which all call this.

    They are returned as they are where ``torch.distributed`` does not connect so many ranks.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if world_size == 1 or not distributed or torch.distributed.get_world_size() != world_size:
        return states
    gathered: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(gathered, states)
    return {position: join_ranks([of_rank[position] for of_rank in gathered]) for position in states}


def join_ranks(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state of a checkpoint from those of all ranks in their order: the first one's, and what differs in others."""
    ranks = [{}, *({name: state[name] for name in _OF_A_RANK} for state in states[1:])]
    return {**states[0], "ranks": ranks, "nonfinite": _merge_nonfinite([state["nonfinite"] for state in states])}


def state_of_rank(state: Mapping[str, Any], rank: int, world_size: int, notify: Callable[[str], None]) -> Any:
    """The state with which a rank of a resumed run begins.

    It is the rank's own. If the saved run had another number of ranks, each begins with the maxima of all of them and
    its share of their sums.

    Args:
        state: The state of :func:`join_ranks`, or of one rank.
        rank: The rank.
        world_size: Number of ranks of the resumed run.
        notify: Called with a message if the run does not go on exactly as it was.

    Raises:
        LitLipschitzError: The state is of another version.
    """
    with refuse_other_versions():
        ranks = state["ranks"]
        if type(ranks) is not list or not ranks or ranks[0] != {}:
            raise ValueError("ranks")
        if any(one is not None and (type(one) is not dict or set(one) != set(_OF_A_RANK)) for one in ranks[1:]):
            raise ValueError("fields of a rank")
        known = [{**state, **one} for one in ranks if one is not None]
        if len(known) < len(ranks):
            notify(
                f"LipschitzLR: the checkpoint was saved by one of {len(ranks)} ranks alone, so what the others had "
                "measured since the last update is missing, and the resumed run differs a little from the one that "
                "was not stopped"
            )
        if len(ranks) == world_size and ranks[rank] is not None:
            return {**state, **ranks[rank], "ranks": unknown_ranks(world_size)}
        return {**_merge(known, world_size), "ranks": unknown_ranks(world_size)}


def _merge(states: Sequence[Mapping[str, Any]], world_size: int) -> dict[str, Any]:
    """One state for all of so many ranks."""
    first = states[0]
    merged = {
        "accumulated": max(state["accumulated"] for state in states),
        "losses": list(dict.fromkeys(name for state in states for name in state["losses"])),
    }
    sums = [state["residuals"]["values"] for state in states]
    if all(one.shape == sums[0].shape for one in sums):
        merged["residuals"] = {**first["residuals"], "values": torch.stack(sums).sum(dim=0) / world_size}
    heads = [state["head"] for state in states]
    if first["head"] is not None and all(head is not None and head["head"] == first["head"]["head"] for head in heads):
        parts = {name: [head[name] for head in heads] for name in ("statistic", "gradients")}
        merged["head"] = {**first["head"], **{name: _maxima(part) for name, part in parts.items()}}
    return {**first, **merged}


def _maxima(statistics: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The first of some states of a statistic, with the largest values of all of them."""
    first = statistics[0]
    values = [one["values"] for one in statistics if one is not None]
    if first is None or any(one.shape != values[0].shape for one in values):
        return first
    return {**first, "values": torch.stack(values).amax(dim=0)}


def _merge_nonfinite(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The non-finite losses that any rank knows of."""
    known: list[Tensor] = [state["ranks"] for state in states]
    return {**states[0], "ranks": torch.stack(known).amax(dim=0)}
