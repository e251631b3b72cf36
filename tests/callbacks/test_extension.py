"""A rule and an optimizer of another package, each added by one call."""

import pytest
import torch
from helpers import Classifier, Steps, loader, trainer
from torch.optim import Optimizer

from lit_lipschitz import ConfigurationError, LipschitzLR
from lit_lipschitz.measurement import optimizer_updates
from lit_lipschitz.measurement.optimizer_updates import OptimizerInfo, register_optimizer
from lit_lipschitz.rules.base import RuleInfo, RuleResult, Term
from lit_lipschitz.rules.papers import AverageState
from lit_lipschitz.rules.registry import RULES, register_rule


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    """Has what a test registers forgotten after it."""
    monkeypatch.setattr(optimizer_updates, "OPTIMIZERS", list(optimizer_updates.OPTIMIZERS))
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


class SignDescent(Optimizer):
    """Moves every parameter by the sign of its gradient."""

    def __init__(self, parameters, lr=1.0):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(group["lr"] * parameter.grad.sign())
        return loss


def cautious(inputs, state, settings):
    """Half of the inverse of the mean constant."""
    state = state.updated(0.5, inputs.constant)
    mean = state.average / state.weight
    return RuleResult(0.5 / mean, state, (Term("Lmean", mean, "moving average of L"),))


CAUTIOUS = RuleInfo("cautious", cautious, "Half of the inverse: rate = 1 / (2 Lmean).", AverageState)


def fit(callback, make=None, path=None, **settings):
    torch.manual_seed(0)
    run = trainer(callback, steps := Steps(), **settings)
    run.fit(Classifier(make), loader(), ckpt_path=path)
    return run, [rate for (rate,) in steps.rates]


def test_a_rule_from_outside_sets_the_rate_and_resumes():
    with pytest.raises(ConfigurationError, match="rule='cautious'.: expected one of"):
        LipschitzLR(rule="cautious")
    register_rule(CAUTIOUS)
    callback = LipschitzLR(rule="cautious", schedule="none")
    run, rates = fit(callback, max_epochs=2)
    run.save_checkpoint("half.ckpt")
    decision = callback.controllers[0].decision
    assert (decision.rule, decision.terms[-1].symbol) == ("cautious", "Lmean")
    assert rates[-1] == decision.lr == 0.5 / decision.terms[-1].value
    _, whole = fit(LipschitzLR(rule="cautious", schedule="none"), max_epochs=4)
    _, rest = fit(LipschitzLR(rule="cautious", schedule="none"), path="half.ckpt", max_epochs=4)
    assert rates + rest == whole
    assert len(set(whole)) > 2


def test_an_optimizer_from_outside_has_the_rules_that_it_is_registered_with():
    rates_of = {}
    signs = lambda grad, state, group: grad.sign()  # noqa: E731
    register_optimizer(OptimizerInfo(SignDescent, signs, {"strict": "bounded", "smooth": "bounded"}))
    for bound in ("strict", "smooth"):
        callback = LipschitzLR(bound=bound, schedule="none")
        _, rates = fit(callback, SignDescent, max_epochs=1)
        decision = callback.controllers[0].decision
        terms = {term.symbol: term.value for term in decision.terms}
        assert decision.rule == "bounded"
        assert rates[-1] == decision.lr
        assert 0 < terms["s"] < 1  # every entry of the update is 1
        rates_of[bound] = rates
    with pytest.raises(ConfigurationError, match="SignDescent with bound='paper'"):
        fit(LipschitzLR(bound="paper"), SignDescent)
    for update in (None, "not registered"):  # measured
        optimizer_updates.OPTIMIZERS.pop()
        if update is None:
            register_optimizer(OptimizerInfo(SignDescent, None, {"strict": "bounded", "smooth": "bounded"}))
        for bound, rates in rates_of.items():
            _, found = fit(LipschitzLR(bound=bound, schedule="none"), SignDescent, max_epochs=1)
            assert found == pytest.approx(rates, rel=1e-3)


def test_an_optimizer_from_outside_may_have_a_rule_from_outside():
    register_rule(CAUTIOUS)
    register_optimizer(OptimizerInfo(SignDescent, rules={"strict": "cautious"}))
    callback = LipschitzLR(schedule="none")
    _, rates = fit(callback, SignDescent, max_steps=1)
    assert rates == [0.5 / callback.constant]


def test_what_is_registered_again_replaces_what_was_known():
    register_optimizer(OptimizerInfo(torch.optim.SGD, rules={"strict": "inverse"}))
    callback = LipschitzLR(schedule="none")
    _, rates = fit(callback, lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9), max_steps=1)
    assert rates == [1 / callback.constant]
