"""All rules: what they refuse, what they return, and that their state is made of plain numbers."""

import json
import math
import re
import subprocess
import sys

import pytest

from lit_lipschitz import ConfigurationError
from lit_lipschitz.control.policy import Policy
from lit_lipschitz.rules.base import RuleInfo, RuleInput, Stateless
from lit_lipschitz.rules.bounded import inverse
from lit_lipschitz.rules.registry import RULES, register_rule

SETTINGS = {"momentum": 0.9, "alpha": 0.9, "betas": (0.9, 0.99), "eps": 0.0}


@pytest.mark.parametrize(
    ("rule", "settings", "named"),
    [
        ("adamo", {"momentum": 1.0}, "momentum=1.0: expected 0 <= momentum < 1"),
        ("adamo", {"momentum": 0.9, "dampening": 1.0}, "dampening=1.0"),
        ("adamo_authors", {"momentum": -0.1}, "momentum=-0.1"),
        ("rmsprop", {"alpha": 1.0, "eps": 0.0}, "alpha=1.0: expected 0 <= alpha < 1"),
        ("adam", {"betas": (0.9, 1.0), "eps": 0.0}, "betas=1.0"),
        ("bounded", {"momentum": 1.0}, "momentum=1.0: expected 0 <= momentum < 1"),
        ("bounded", {"momentum": -0.5}, "momentum=-0.5"),
        ("bounded", {"betas": (1.0, 0.9)}, "betas=1.0"),
    ],
)
def test_settings_without_a_rate_are_refused(rule, settings, named):
    with pytest.raises(ValueError, match=named):
        RULES[rule].function(RuleInput(1.0, 1.0), RULES[rule].initial_state(), settings)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["constant", "second_moment", "activation_norm", "step_scale", "batch_size"])
def test_an_input_without_an_inverse_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}="):
        RuleInput(**{"constant": 1.0, "second_moment": 1.0, name: value})


@pytest.mark.parametrize(("seen", "count"), [(math.nan, 4), (math.inf, 4), (-1.0, 4), (1.0, 0), (1.0, math.nan)])
def test_an_observed_constant_is_a_positive_number_or_refused(seen, count):
    with pytest.raises(ValueError, match="observed_constant=.*expected positive finite"):
        RuleInput(4.0, 16.0, observed_constant=seen, effective_sample_size=count)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_goes_on_from_its_state_as_plain_numbers(name):
    info = RULES[name]
    inputs = [
        RuleInput(4.0, 16.0, 3.0, 2.0, 8.0),
        RuleInput(2.0, 5.0, 3.0, 1.0, 8.0, observed_constant=1.0, effective_sample_size=6.0),
        RuleInput(3.0, 9.0, 3.0, 4.0, 8.0, observed_constant=2.0, effective_sample_size=4.0, descent=7.0),
    ]
    state = restored = info.initial_state()
    for one in inputs:
        rate, state, _ = info.function(one, state, SETTINGS)
        again, restored, terms = info.function(one, restored, SETTINGS)
        assert again == rate > 0
        restored = info.restored_state(json.loads(json.dumps(restored._asdict())))
        assert restored == state
        assert isinstance(restored, info.state_type)
        assert all(term.symbol and term.meaning and math.isfinite(term.value) for term in terms)
        assert len({term.symbol for term in terms}) == len(terms)


@pytest.mark.parametrize("name", RULES)
def test_the_terms_are_the_symbols_of_the_description(name):
    """Those of the constant and of the optimizer's settings aside."""
    info = RULES[name]
    formula = info.description.partition("rate = ")[2]
    symbols = set(re.findall(r"[A-Za-z_]\w*", formula)) & {"b", "c", "s", "C", "K", "K1", "K2", "P", "past"}
    inputs = RuleInput(4.0, 16.0, observed_constant=1.0, effective_sample_size=1.0)
    _, _, terms = info.function(inputs, info.initial_state(), SETTINGS)
    assert symbols <= {term.symbol for term in terms}


def test_the_values_of_the_terms_make_the_rate():
    inputs = RuleInput(4.0, 16.0, 3.0, 2.0, 8.0, observed_constant=1.5, effective_sample_size=6.0, descent=7.0)

    def terms(name):
        rate, _, terms = RULES[name].function(inputs, RULES[name].initial_state(), SETTINGS)
        return rate, {term.symbol: term.value for term in terms}

    rate, of = terms("bounded")
    assert of["K"] == of["past"] == pytest.approx(of["C"] / (of["c"] * of["s"]), rel=1e-12)
    assert rate == pytest.approx(1 / max(of["K"], of["past"], of["P"]), rel=1e-12)
    assert (of["C"], of["n"], of["s"], of["P"]) == (1.5, 6.0, 2.0, 7.0)
    rate, of = terms("adamo")
    assert rate == pytest.approx((1 - of["b"]) / of["K1"], rel=1e-12)
    rate, of = terms("adam")
    assert rate == pytest.approx(math.sqrt(of["K2"]) / of["K1"], rel=1e-12)
    rate, of = terms("rmsprop_authors")
    assert rate == pytest.approx(0.1 * math.sqrt(of["K2"]) / 3.0, rel=1e-12)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'inverse' is registered already"):
        register_rule(RuleInfo("inverse", inverse, "another one", Stateless))
    assert RULES["inverse"].function is inverse
    assert RULES["inverse"].initial_state() == Stateless()


def test_an_unknown_rule_is_refused():
    with pytest.raises(
        ConfigurationError, match="rule='invented'.: expected one of 'auto', 'bounded', 'inverse', 'adamo'"
    ):
        Policy(rule="invented")


def test_a_registered_rule_is_a_choice_of_the_signature():
    code = (
        "import inspect, typing\n"
        "from lit_lipschitz.rules.base import RuleInfo, Stateless\n"
        "from lit_lipschitz.rules.registry import RULES, register_rule\n"
        "register_rule(RuleInfo('half', print, 'Half.', Stateless))\n"
        "from lit_lipschitz import LipschitzLR\n"
        "print(*typing.get_args(inspect.signature(LipschitzLR).parameters['rule'].annotation))\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert printed.stdout.split() == ["auto", *RULES, "half"]
