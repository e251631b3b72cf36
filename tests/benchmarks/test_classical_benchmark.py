"""The benchmark of the papers' classical models: many seeds at once against one seed at a time by autograd."""

import importlib.util
import itertools
import math
import sys

import pytest
import torch
from helpers import ROOT
from torch.nn import functional as F

spec = importlib.util.spec_from_file_location("classical_benchmark", ROOT / "benchmarks" / "papers" / "classical.py")
classical = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = classical
spec.loader.exec_module(classical)


def loss_of(features, targets, weights):
    logits = features @ weights.T
    if len(weights) == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], targets.double())
    return F.cross_entropy(logits, targets)


def slow_descent(features, targets, weights, rate, threshold, cap):
    """One seed by autograd: epochs, last loss, share of rises, last weights."""
    losses = []
    while True:
        weights = weights.clone().requires_grad_()
        loss = loss_of(features, targets, weights)
        losses.append(loss.item())
        if losses[-1] < threshold or len(losses) == cap:
            rises = sum(b > a for a, b in itertools.pairwise(losses)) / max(len(losses) - 1, 1)
            return len(losses) if losses[-1] < threshold else cap + 1, losses[-1], rises, weights.detach()
        weights = weights.detach() - rate * torch.autograd.grad(loss, weights)[0]


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("at_once", [1, 200_000])
def test_seeds_together_are_as_seeds_one_by_one(outputs, at_once, monkeypatch):
    monkeypatch.setattr(classical, "LOGITS_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(20, 4, generator=generator, dtype=torch.float64) * 3
    targets = (features[:, 0] > 0).long() + (features[:, 1] > 2).long() * (outputs > 1)
    start = classical.Draw(
        torch.rand(5, 20, generator=generator) < 0.7,
        torch.randn(5, outputs, 4, generator=generator, dtype=torch.float64),
    )
    rates = torch.tensor([0.5, 2.0, 0.001, 4.0, 0.1], dtype=torch.float64)
    runs = classical.descend(features, targets, start, rates, threshold=0.3, cap=50)
    for i in range(5):
        rows = start.training[i]
        epochs, loss, rises, weights = slow_descent(features[rows], targets[rows], start.weights[i], rates[i], 0.3, 50)
        logits = features @ weights.T
        predictions = (logits[:, 0] >= 0).long() if outputs == 1 else logits.argmax(dim=1)
        correct = (predictions == targets).double()
        assert runs.epochs[i] == epochs
        assert runs.losses[i].item() == pytest.approx(loss, rel=1e-9)
        assert runs.rises[i].item() == pytest.approx(rises)
        assert runs.train[i].item() == pytest.approx(correct[rows].mean().item())
        assert runs.test[i].item() == pytest.approx(correct[~rows].mean().item())
    assert runs.epochs.max() == 51  # one seed was too slow
    assert runs.epochs.min() < 51


def test_the_notebooks_softmax_leaves_its_loop_by_a_loss_that_is_no_number():
    features = torch.tensor([[1.0], [1.0]], dtype=torch.float64)
    targets = torch.tensor([0, 1])
    start = classical.Draw(torch.ones(1, 2, dtype=torch.bool), torch.tensor([[[800.0], [0.0]]], dtype=torch.float64))
    ((epochs, loss),) = classical.unguarded(features, targets, start, torch.ones(1), 0.2)
    assert epochs == 1
    assert math.isnan(loss)
    runs = classical.descend(features, targets, start, torch.ones(1).double(), threshold=0.2, cap=1)
    assert runs.losses[0].item() == 400  # by log_softmax


def test_what_was_not_reached_is_printed_as_such():
    assert classical.ranged(torch.tensor([3, 5, 11]), cap=10) == "5 (3 .. >10)"
    assert classical.ranged(torch.tensor([11, 11]), cap=10) == ">10"
    assert classical.ranged(torch.tensor([4280.227, 4280.227], dtype=torch.float64)) == "4,280.23"
    assert classical.percent(torch.tensor([math.nan])) == "-"


@pytest.mark.slow
def test_three_seeds_repeat_the_papers_rates(capsys):
    pytest.importorskip("sklearn")
    iris, digits, cancer = classical.report(3)
    printed = capsys.readouterr().out
    assert printed.count("Digits ") == 4 + 5
    assert "3 of 3 seeds leave the loop at 1/L by a NaN loss, in epoch 2" in printed
    for comparison in (iris, digits, cancer):
        for runs in (*comparison.to_threshold.values(), *comparison.in_budget.values()):
            assert torch.isfinite(runs.losses).all()
            assert torch.isfinite(runs.train).all()
        assert comparison.to_threshold["smooth"].rises.max() == 0  # what this family promises
        assert comparison.in_budget["smooth"].rises.max() == 0
        assert (comparison.to_threshold["strict"].epochs <= comparison.problem.cap).all()
        for name in ("paper", classical.BASELINE):
            assert (comparison.to_threshold[name].epochs <= comparison.problem.cap).all()

    def between(values, low, high):
        return low <= values.min().item() and values.max().item() <= high

    assert between(iris.to_threshold["paper"].rates, 1.88, 1.99)
    assert between(digits.to_threshold["paper"].rates, 0.63, 0.64)
    assert between(cancer.to_threshold["paper"].rates, 4280.22, 4280.24)
    # One run of the papers each: 413 and 49, 337 and (stable) about 137, 37,008 and 2 epochs.
    assert between(iris.to_threshold[classical.BASELINE].epochs, 200, 800)
    assert between(iris.to_threshold["paper"].epochs, 10, 150)
    assert between(digits.to_threshold[classical.BASELINE].epochs, 200, 600)
    assert between(digits.to_threshold["paper"].epochs, 70, 250)
    assert between(cancer.to_threshold[classical.BASELINE].epochs, 5_000, 80_000)
    assert between(cancer.to_threshold["paper"].epochs, 2, 3)
    assert between(cancer.untrained, 0.69, 0.70)
