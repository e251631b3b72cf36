"""The decision without a Trainer: which rule an optimizer has, the constant's terms, and the limits."""

import json
import math
import re
from dataclasses import asdict, replace

import pytest
import torch
from helpers import ROOT

from lit_lipschitz import ConfigurationError, ZeroStartSGD
from lit_lipschitz.bounds.loss_spec import Loss
from lit_lipschitz.control.policy import Decision, Measurement, Policy
from lit_lipschitz.measurement.optimizer_updates import optimizer_info
from lit_lipschitz.rules.base import Stateless
from lit_lipschitz.rules.papers import AverageState
from lit_lipschitz.rules.registry import RULES

MEASURED = Measurement(4.0, 3.0, 16, 0, fourth_moment_norm=2.5, output_norm=7.0, step_scale=0.5)
FAMILIES = [(bound, norm) for bound, norms in {
    "strict": ("frobenius", "sample"), "smooth": ("spectral", "frobenius", "sample"), "paper": ("frobenius", "sample"),
}.items() for norm in norms]  # fmt: skip


def made(kind, *groups, **settings):
    """An optimizer with a parameter group for each of the settings in ``groups``."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2, 2))], **group} for group in groups or ({},)]
    return kind(groups, **{"lr": 0.1, **settings})


def rule_of(optimizer, **settings):
    return Policy(**settings).rule_for(optimizer_info(optimizer), optimizer.param_groups).name


def decide(optimizer, policy=None, measured=MEASURED, state=Stateless(), last=None, **loss):  # noqa: B008
    policy = policy or Policy()
    return policy.decide(
        measured,
        loss=Loss(**{"name": "cross_entropy", **loss}),
        num_outputs=10,
        optimizer=optimizer_info(optimizer),
        groups=optimizer.param_groups,
        state=state,
        last=last,
    )


@pytest.mark.parametrize(
    ("kind", "settings", "bound", "rule"),
    [
        (torch.optim.SGD, {"momentum": 0.9}, "paper", "adamo"),
        (torch.optim.SGD, {"momentum": 0.0}, "paper", "inverse"),
        (torch.optim.SGD, {"momentum": 0.9}, "strict", "bounded"),
        (torch.optim.SGD, {"momentum": 0.9}, "smooth", "bounded"),
        (torch.optim.SGD, {"momentum": 0.0}, "strict", "bounded"),
        (torch.optim.RMSprop, {}, "paper", "rmsprop"),
        (torch.optim.RMSprop, {"momentum": 0.5}, "paper", "rmsprop"),
        (torch.optim.RMSprop, {"momentum": 0.5}, "strict", "bounded"),
        (torch.optim.Adam, {}, "paper", "adam"),
        (torch.optim.AdamW, {}, "paper", "adam"),
        (torch.optim.NAdam, {}, "paper", "adam"),
        (ZeroStartSGD, {"momentum": 0.9}, "paper", "adamo"),
        (ZeroStartSGD, {"momentum": 0.9}, "strict", "bounded"),
        (torch.optim.RAdam, {}, "strict", "bounded"),
        (torch.optim.Adamax, {}, "strict", "bounded"),
        (torch.optim.Adamax, {}, "smooth", "bounded"),
    ],
)
def test_the_rule_follows_the_optimizer_and_the_family(kind, settings, bound, rule):
    assert rule_of(made(kind, **settings), bound=bound) == rule


@pytest.mark.parametrize(
    ("kind", "settings", "bound", "message"),
    [
        (torch.optim.RAdam, {}, "paper", "RAdam with bound=.paper.; known: SGD"),  # its first steps are not normalised
        (torch.optim.Adamax, {}, "paper", "Adamax with bound=.paper.; known: SGD"),
        (
            torch.optim.LBFGS,
            {},
            "paper",
            "LBFGS with bound=.paper.; known: SGD, .* rule= with one of 'bounded', 'inverse'",
        ),
        (
            torch.optim.LBFGS,
            {},
            "strict",
            "LBFGS sets the length of its steps itself; .* LBFGS with bound=.strict.; known: SGD, .*, AdamW",
        ),
        (torch.optim.Rprop, {}, "strict", "Rprop sets the length of its steps itself; "),
        (torch.optim.Rprop, {}, "smooth", "Rprop sets the length of its steps itself; "),
        (torch.optim.Adagrad, {}, "paper", "Adagrad with bound=.paper.; known: SGD, ZeroStartSGD, Adam, AdamW"),
        (torch.optim.RMSprop, {"centered": True}, "paper", "RMSprop with centered=True"),
    ],
)
def test_an_optimizer_without_a_rule_is_refused_with_what_is_known(kind, settings, bound, message):
    with pytest.raises(ConfigurationError, match=message):
        rule_of(made(kind, **settings), bound=bound)


def test_every_optimizer_of_torch_has_a_documented_rule():
    table = (ROOT / "docs" / "reference" / "theory.md").read_text().split("## Optimizers")[1].split("###")[0]
    found = {kind for kind in vars(torch.optim).values() if isinstance(kind, type)} - {torch.optim.Optimizer}
    assert len(found) >= 14
    for kind in found:
        optimizer = made(kind)
        for bound in ("paper", "strict", "smooth"):
            if bound not in optimizer_info(optimizer).rules:
                assert bound == "paper" or kind in (torch.optim.LBFGS, torch.optim.Rprop)
                with pytest.raises(ConfigurationError, match=f"the optimizer {kind.__name__} with bound='{bound}'"):
                    rule_of(optimizer, bound=bound)
                words = 'and `bound="paper"` refuses them: ' if bound == "paper" else "are refused with any `bound`"
                (refused,) = (one for one in table.split("\n\n") if words in one)
                assert f"`{kind.__name__}`" in refused
            else:
                rule = rule_of(optimizer, bound=bound)
                assert any(kind.__name__ in row and f"`{rule}`" in row for row in table.splitlines())


def test_an_optimizer_named_like_torchs_is_told_by_its_module():
    kind = type("AdamW", (torch.optim.Optimizer,), {"__module__": "elsewhere", "step": lambda self: None})
    optimizer = kind([torch.nn.Parameter(torch.ones(1))], {"lr": 0.1})
    assert rule_of(optimizer) == "bounded"
    with pytest.raises(ConfigurationError, match=r"the optimizer elsewhere\.AdamW with bound='paper'; known: .*AdamW"):
        rule_of(optimizer, bound="paper")


def test_a_forced_rule_needs_what_it_uses():
    assert rule_of(made(torch.optim.Adagrad), rule="inverse") == "inverse"
    with pytest.raises(ConfigurationError, match="with the setting 'momentum', found Adagrad; pass rule='inverse'"):
        rule_of(made(torch.optim.Adagrad), rule="adamo")
    assert rule_of(made(torch.optim.SGD), rule="bounded") == "bounded"
    with pytest.raises(ConfigurationError, match="'bounded' needs the same momentum in all parameter groups"):
        rule_of(made(torch.optim.SGD, {"momentum": 0.5}, {"momentum": 0.9}))
    groups = {"momentum": 0.5}, {"momentum": 0.9}
    assert rule_of(made(torch.optim.SGD, *groups), rule="inverse") == "inverse"


def test_a_rule_is_for_the_families_that_it_is_defined_for():
    with pytest.raises(
        ConfigurationError, match=r"rule='bounded'\) is defined for bound='strict', 'smooth', found 'paper'"
    ):
        Policy(bound="paper", rule="bounded")
    for bound in ("strict", "smooth"):
        assert Policy(bound=bound, rule="bounded").rule == "bounded"


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "dampening": 1.0}, "LipschitzLR: dampening=1.0: expected less than 1"),
        (torch.optim.SGD, {"momentum": 1.0}, "LipschitzLR: momentum=1.0: expected 0 <= momentum < 1"),
        (torch.optim.RMSprop, {"momentum": 2.0}, "LipschitzLR: momentum=2.0"),
    ],
)
@pytest.mark.parametrize("bound", ["strict", "smooth"])
def test_settings_without_a_rate_are_refused_before_the_first_step(kind, settings, message, bound):
    with pytest.raises(ConfigurationError, match=message):
        rule_of(made(kind, **settings), bound=bound)


@pytest.mark.parametrize(("bound", "norm"), FAMILIES)
@pytest.mark.parametrize("name", ["cross_entropy", "mean_squared_error"])
def test_the_formula_with_the_terms_is_the_constant(bound, norm, name):
    decision, _ = decide(made(torch.optim.SGD, weight_decay=0.2), Policy(bound, norm), name=name)
    terms = {term.symbol: term.value for term in decision.terms}
    assert len(terms) == len(decision.terms)
    assert (terms["k"], terms["m"], terms["K_z"], terms["W"], terms["lambda"]) == (10, 16, 4.0, 3.0, 0.2)
    names = {"sqrt": math.sqrt, **terms, "lam": terms["lambda"]}
    formula = decision.formula.replace("lambda", "lam").replace("^", "**")
    assert eval(formula, names) == pytest.approx(decision.constant, rel=1e-12)
    assert terms["data"] + terms["l2"] == terms["L"] == decision.constant
    assert ("outputs" in terms) == (name == "mean_squared_error" and bound != "smooth")
    gradient_descent, _ = decide(
        made(torch.optim.SGD, weight_decay=0.2), Policy(bound, norm, rule="inverse"), name=name
    )
    assert (gradient_descent.rule, gradient_descent.lr) == ("inverse", 1 / decision.constant)


@pytest.mark.parametrize(
    ("bound", "symbol", "coefficient"),
    [("strict", "G_max", math.sqrt(2)), ("smooth", "curvature", 1 / 2), ("paper", "estimate", 9 / 10)],
)
def test_the_coefficient_is_that_of_one_example(bound, symbol, coefficient):
    decision, _ = decide(made(torch.optim.SGD), Policy(bound))
    terms = {term.symbol: term.value for term in decision.terms}
    assert terms[symbol] == pytest.approx(coefficient, rel=1e-12)


def test_the_terms_of_the_rule_come_after_the_constant_and_the_limit_is_last():
    optimizer, last = made(torch.optim.SGD, momentum=0.9), Decision(1e-3)
    decision, _ = decide(optimizer, Policy(max_growth=1.5), last=last)
    assert (decision.cap, decision.lr) == ("max_growth", pytest.approx(1.5e-3))
    symbols = [term.symbol for term in decision.terms]
    assert symbols[symbols.index("L") :] == ["L", "b", "s", "C", "n", "c", "K", "past", "P", "max_growth"]
    assert decision.terms[-1].value == decision.lr
    free, _ = decide(optimizer, last=last)
    assert re.search(rf"rate of {free.lr:.6g}$", decision.terms[-1].meaning)
    assert [term.symbol for term in free.terms] == symbols[:-1]


def test_a_decision_is_plain_values_and_comes_back_from_them():
    optimizer = made(torch.optim.AdamW)
    measured = Measurement(4.0, 3.0, 16, 0, step_scale=0.5, logit_grad_norm=0.7, mean_logit_grad_norm=0.5)
    decision, _ = decide(optimizer, measured=measured, state=RULES["bounded"].initial_state())
    assert 0 < decision.observed_constant < decision.constant
    (effective,) = (term.value for term in decision.terms if term.symbol == "n")
    assert effective == pytest.approx(16 * (0.5 / 0.7) ** 2)
    assert Decision.from_dict(asdict(decision)) == decision
    assert Decision.from_dict(json.loads(json.dumps(asdict(decision)))) == decision
    assert Decision.from_dict(asdict(Decision(0.1))) == Decision(0.1)


@pytest.mark.parametrize(
    "broken",
    [
        {"activation_norm": math.nan}, {"activation_norm": math.inf}, {"activation_norm": 0.0}, {"batch_size": 0},
        {"weight_norm": math.nan}, {"output_norm": math.inf}, {"fourth_moment_norm": math.nan}, {"step_scale": 0.0},
    ],
    ids=str,
)  # fmt: skip
def test_a_measurement_without_a_constant_or_a_scale_has_no_rate(broken):
    measured = Measurement(**{**{name: getattr(MEASURED, name) for name in MEASURED.__dataclass_fields__}, **broken})
    assert decide(made(torch.optim.SGD), measured=measured) is None
    assert decide(made(torch.optim.SGD)) is not None


def test_a_momentum_that_is_scheduled_up_from_0_changes_the_rule():
    optimizer = made(torch.optim.SGD)
    plain, state = decide(optimizer, Policy("paper"))
    optimizer.param_groups[0]["momentum"] = 0.9
    heavy, state = decide(optimizer, Policy("paper"), state=state)
    assert (plain.rule, heavy.rule) == ("inverse", "adamo")
    assert heavy.lr == pytest.approx(0.1 * plain.lr)
    assert isinstance(state, AverageState)
    assert RULES["inverse"].restored_state(state._asdict()) == Stateless()


@pytest.mark.parametrize(
    ("kind", "settings", "given", "coefficient"),
    [
        (torch.optim.SGD, {"weight_decay": 0.1}, None, 0.1),
        (torch.optim.SGD, {"weight_decay": 0.1}, 0.3, 0.3),
        (torch.optim.Adam, {"weight_decay": 0.1}, None, 0.1),
        (torch.optim.AdamW, {"weight_decay": 0.1}, None, 0.0),
        (torch.optim.AdamW, {"weight_decay": 0.1}, 0.3, 0.3),
        (torch.optim.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}, None, 0.0),
        (torch.optim.Adagrad, {"weight_decay": 0.1}, None, 0.1),
    ],
)
def test_the_l2_term_is_a_coupled_weight_decay_or_the_given_one(kind, settings, given, coefficient):
    optimizer = made(kind, **settings)
    policy = Policy(weight_decay=given)
    assert policy.l2_coefficient(optimizer_info(optimizer), optimizer.param_groups) == coefficient


def test_the_estimate_of_the_second_moment_is_the_rules_own_or_the_given_one():
    assert Policy("paper", rule="adam_authors").second_moment_estimate == "scripts"
    assert Policy("paper", rule="rmsprop_authors").second_moment_estimate == "scripts"
    assert Policy("paper", rule="adam").second_moment_estimate == "constant"
    assert Policy("paper").second_moment_estimate == "constant"
    assert Policy("paper", rule="adam_authors", second_moment="constant").second_moment_estimate == "constant"
    with pytest.raises(ConfigurationError, match="second_moment='text'"):
        Policy("paper", second_moment="text")


def test_whether_the_rate_decays_later_reaches_the_rule_and_is_in_its_terms():
    """After a constant that was a fifth larger: its root mean square with this one, or itself."""
    rates = []
    for decays in (True, False):
        optimizer = made(torch.optim.SGD)
        first = Measurement(4.8, 3.0, 16, 0, step_scale=0.5, decays=decays)
        before, state = decide(optimizer, measured=first)
        decision, _ = decide(optimizer, measured=replace(first, activation_norm=4.0), state=state)
        (past,) = (term for term in decision.terms if term.symbol == "past")
        assert past.meaning.startswith("root mean square" if decays else "maximum")
        rates.append((before.lr, decision.lr))
    assert rates[0][1] == pytest.approx(rates[0][0] / math.sqrt((1 + 1 / 1.2**2) / 2))
    assert rates[1][1] == rates[1][0] == rates[0][0]


def test_the_descent_that_is_measured_bounds_the_rate():
    free, _ = decide(made(torch.optim.SGD))
    bound, _ = decide(made(torch.optim.SGD), measured=replace(MEASURED, descent=100 / free.lr))
    assert bound.lr == pytest.approx(free.lr / 100)
    assert {term.symbol: term.value for term in bound.terms}["P"] == 100 / free.lr
