"""ControllerState: what a checkpoint gives back, and the states that it refuses."""

import math
from dataclasses import asdict, fields
from typing import NamedTuple

import pytest
import torch
from helpers import damaged_state
from hypothesis import event, given, settings
from hypothesis import strategies as st

from lit_lipschitz import LitLipschitzError
from lit_lipschitz.control.noise_damping import NoiseDamping
from lit_lipschitz.control.policy import Decision, Measurement
from lit_lipschitz.control.state import ControllerState
from lit_lipschitz.rules.base import Term


class Memory(NamedTuple):
    """The state of an invented rule."""

    mean: float = 0.0
    count: int = 0


def filled():
    """A state in which no field has its default."""
    return ControllerState(
        rule="invented",
        rule_state=Memory(0.25, 3),
        decision=Decision(0.1, 2.0, 3.0, 4.0, 5.0, "max_lr", "invented", "L = K_z", (Term("K_z", 3.0, "a norm"),)),
        measurement=Measurement(3.0, 4.0, 16, 1, step_scale=0.5),
        steps=7,
        intervals=2,
        epoch=5,
        last_pass_epoch=4,
        accumulated=6,
        damped_epochs=8,
        losses=["cross_entropy"],
        warned=True,
        damping=NoiseDamping([1.0, 9.0], [0.9, 0.4], 12, 0.2, 0.03, 0.05),
        references=[0.1, 0.01],
        written=[0.3, 0.03],
        step_scale={"ratios": torch.tensor([2.0])},
        due={"steps": 3},
        optimizer="SGD",
        nonfinite={"steps": [3]},
        residuals={"count": torch.tensor(16.0)},
        head={"head": "net.2", "statistic": {"values": torch.tensor(3.0)}, "gradients": {"values": torch.tensor(2.0)}},
        ranks=[{}, {"accumulated": 5}],
        run={"devices": "2"},
    )


def saved_and_loaded(state):
    torch.save(state, "state.ckpt")
    return torch.load("state.ckpt", weights_only=True)


def test_a_checkpoint_gives_every_field_back():
    given = filled()
    back = ControllerState.from_dict(saved_and_loaded(given.to_dict()))
    assert Memory(**back.rule_state) == given.rule_state
    default = ControllerState("", Memory())
    for name in {field.name for field in fields(ControllerState)} - {"rule_state"}:
        assert getattr(given, name) != getattr(default, name)
        assert type(getattr(back, name)) is type(getattr(given, name))
        assert getattr(back, name) == getattr(given, name)


def test_a_state_before_the_first_step_has_neither_decision_nor_measurement():
    back = ControllerState.from_dict(saved_and_loaded(ControllerState("invented", Memory()).to_dict()))
    assert back == ControllerState("invented", {"mean": 0.0, "count": 0})


def test_a_run_that_goes_on_leaves_the_loaded_state_as_it_was():
    loaded = filled().to_dict()
    ControllerState.from_dict(loaded).damping.fractions.append(0.3)
    assert loaded["damping"]["fractions"] == [0.9, 0.4]


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    "change",
    [
        lambda state: without(state, "epoch"),
        lambda state: {**state, "invented": 1},
        lambda state: {**state, "decision": without(state["decision"], "lr")},
        lambda state: {**state, "decision": without(state["decision"], "terms")},
        lambda state: {**state, "decision": {**state["decision"], "invented": 1}},
        lambda state: {**state, "measurement": {**state["measurement"], "invented": 1}},
        lambda state: {**state, "damping": {**state["damping"], "invented": 1}},
        lambda state: {**state, "damping": {**state["damping"], "fractions": [0.9]}},
        lambda state: {**state, "decision": {**state["decision"], "lr": math.nan}},
        lambda state: {**state, "decision": {**state["decision"], "lr": math.inf}},
        lambda state: {**state, "decision": {**state["decision"], "lr": -0.1}},
        lambda state: {**state, "references": [0.1, -0.01]},
        lambda state: {**state, "written": [math.nan]},
        lambda state: {**state, "steps": -1},
        lambda state: {**state, "steps": 1.0},
        lambda state: {**state, "warned": 1},
        lambda state: {**state, "accumulated": 0},
        lambda state: {**state, "measurement": {**state["measurement"], "ranks": 0}},
        lambda state: {**state, "head": {"head": "net.2"}},
        lambda state: {**state, "head": without(state["head"], "gradients")},
        lambda state: {**state, "head": {**state["head"], "statistic": {"values": torch.tensor(math.nan)}}},
        lambda state: {**state, "head": {**state["head"], "gradients": {"values": torch.tensor(math.nan)}}},
    ],
)
def test_the_state_of_another_version_is_refused(change):
    with pytest.raises(LitLipschitzError, match="state in the checkpoint is of another version of lit-lipschitz"):
        ControllerState.from_dict(change(filled().to_dict()))


@settings(max_examples=400, deadline=None)
@given(st.randoms(use_true_random=False))
def test_a_damaged_state_is_refused_or_taken_whole(chance):
    state, what = damaged_state(filled().to_dict(), chance)
    event(what.partition(":")[0])
    try:
        back = ControllerState.from_dict(state)
    except LitLipschitzError:
        return
    assert repr({**asdict(back), "rule_state": back.rule_state}) == repr(state)  # tensors have no truth value
    assert all(0 <= rate < math.inf for rate in [back.decision.lr if back.decision else 0.0, *back.written])
