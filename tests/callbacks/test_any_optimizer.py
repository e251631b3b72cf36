"""LipschitzLR with optimizers that are not registered: their updates are measured."""

import gc
import pickle
import weakref
from itertools import pairwise

import pytest
import torch
from helpers import (
    CLASSES,
    LINEAR_OPTIMIZERS,
    MEASURED_OPTIMIZERS,
    Classifier,
    Keep,
    Lion,
    OtherAdamW,
    OtherSGD,
    Slices,
    Steps,
    due_steps,
    loader,
    stepping,
    trainer,
    two_ranks,
)
from schedulefree import SGDScheduleFree
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lit_lipschitz import ConfigurationError, LipschitzLR, LitLipschitzError
from lit_lipschitz.measurement import step_lengths


def fit(callback, make, module=None, data=None, **settings):
    """The module, and the rates of the first group in all steps."""
    torch.manual_seed(0)
    module = module or Classifier(make)
    run = trainer(callback, steps := Steps(), **settings)
    run.fit(module, data or loader())
    return module, [rates[0] for rates in steps.rates]


KNOWN = {
    "AdamW": (torch.optim.AdamW, {"lr": 1e-3}),
    "Adam": (torch.optim.Adam, {"lr": 1e-3, "weight_decay": 1e-2}),
    "RAdam": (torch.optim.RAdam, {"lr": 1e-3}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 1e-3}),
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True}),
}


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("name", KNOWN)
def test_a_subclass_with_a_step_of_its_own_has_the_rates_of_its_class(name, scheduled):
    """In every step, from the first one on. Its step calls that of its class, which runs the hooks once more."""
    kind, settings = KNOWN[name]

    def fitted(make):
        class Module(Classifier):
            def configure_optimizers(self):
                optimizer = make(self.parameters(), **settings)
                if not scheduled:
                    return optimizer
                schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
                return [optimizer], [{"scheduler": schedule, "interval": "step"}]

        torch.manual_seed(0)
        callback = LipschitzLR(update=4)
        return fit(callback, make, Module(), max_epochs=8)[1], callback.controllers[0].decision.rule

    (expected, rule), (found, found_rule) = fitted(kind), fitted(stepping(kind))
    assert len(set(expected)) > 4
    assert found[::2] == pytest.approx(expected, rel=0.01)
    assert found_rule == rule


def test_an_optimizer_without_a_state_has_a_rate_from_its_first_step_on():
    callback = LipschitzLR(schedule="none")
    _, (rate, *_) = fit(callback, Lion, max_steps=1)
    terms = {term.symbol: term.value for term in callback.controllers[0].decision.terms}
    assert rate == pytest.approx(1 / max(terms["C"] / (terms["c"] * terms["s"]), terms["past"], terms["P"]))
    assert rate != 1e-3  # the configured one


def digits():
    images, labels = load_digits(return_X_y=True)
    inputs, targets = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    return inputs[order], targets[order]


class Digits(Classifier):
    def __init__(self, make):
        torch.manual_seed(0)
        sizes = (64, 64, 64, 10)
        layers = [part for pair in pairwise(sizes) for part in (nn.Linear(*pair), nn.ReLU())]
        super().__init__(make, nn.Sequential(*layers[:-1]))

    def accuracy(self, inputs, targets):
        return float((self.net(inputs).argmax(dim=1) == targets).float().mean())


def digits_accuracy(callback, module):
    inputs, targets = digits()
    data = DataLoader(TensorDataset(inputs[:1400], targets[:1400]), batch_size=64, shuffle=True)
    fit(callback, None, module, data, max_epochs=10)
    return module.eval().accuracy(inputs[1400:], targets[1400:])


@pytest.mark.parametrize("name", ["AdamW", *MEASURED_OPTIMIZERS])
def test_it_trains(name, figure):
    callback = LipschitzLR()
    accuracy = digits_accuracy(callback, Digits({**MEASURED_OPTIMIZERS, "AdamW": torch.optim.AdamW}[name]))
    figure(f"digits, 10 epochs, {name}: accuracy {accuracy:.4f}, last rate {callback.rate:.3g}")
    assert callback.controllers[0].decision.rule == "bounded"
    assert accuracy > 0.87


@pytest.mark.parametrize("name", LINEAR_OPTIMIZERS)
def test_those_that_sum_up_the_gradients_train_by_the_displacement_of_sgd(name, figure):
    callback = LipschitzLR()
    accuracy = digits_accuracy(callback, Digits(LINEAR_OPTIMIZERS[name]))
    figure(f"digits, 10 epochs, {name}: accuracy {accuracy:.4f}, last rate {callback.rate:.3g}")
    decision = callback.controllers[0].decision
    terms = {term.symbol: term for term in decision.terms}
    assert decision.rule == "bounded"
    assert 0 < terms["C"].value == decision.observed_constant < decision.constant
    assert (terms["n"].value, terms["n"].meaning) == (terms["m"].value, "equal to m")
    assert accuracy > 0.85


class MuonBesideAdamW(Digits):
    """Two optimizers under manual optimization: one of the hidden matrices, one of the rest."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        hidden = [self.net[0].weight, self.net[2].weight]
        rest = [p for p in self.parameters() if all(p is not matrix for matrix in hidden)]
        return torch.optim.Muon(hidden), torch.optim.AdamW(rest)


def test_muon_beside_adamw_needs_no_more_than_their_positions(figure):
    callback = LipschitzLR(optimizers=[0, 1])
    accuracy = digits_accuracy(callback, MuonBesideAdamW(None))
    rates = [one.decision.lr for one in callback.controllers.values()]
    figure(f"digits, 10 epochs, Muon beside AdamW: accuracy {accuracy:.4f}, rates {rates[0]:.3g} and {rates[1]:.3g}")
    assert [one.decision.rule for one in callback.controllers.values()] == ["bounded", "bounded"]
    assert accuracy > 0.95


class SparseBesideAdamW(Classifier):
    """An embedding with sparse gradients has an optimizer of its own."""

    automatic_optimization = False

    def __init__(self):
        super().__init__(net=nn.Linear(8, CLASSES))
        self.table = nn.Embedding(20, 8, sparse=True)

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        rows = (5 * batch[0][:, 0].abs()).long().clamp(max=19)
        self.manual_backward(F.cross_entropy(self.net(self.table(rows)), batch[1]))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SparseAdam(self.table.parameters()), torch.optim.AdamW(self.net.parameters())


def test_sparse_gradients_are_measured():
    callback = LipschitzLR(optimizers=[0, 1])
    fit(callback, None, SparseBesideAdamW(), max_epochs=3)
    assert [one.decision.rule for one in callback.controllers.values()] == ["bounded", "bounded"]
    assert all(0 < one.decision.lr < 1 for one in callback.controllers.values())


@pytest.mark.parametrize("name", ["Lion, weight decay", "LAMB", "a step of its own", "another SGD"])
def test_ranks_agree_bit_for_bit(name):
    make = {**MEASURED_OPTIMIZERS, **LINEAR_OPTIMIZERS}[name]
    torch.manual_seed(1)
    first, second = two_ranks(LipschitzLR(), Classifier(make), 8, max_epochs=4)
    assert len({rate for (rate,) in first["rates"]}) > 4
    assert first["rates"] == second["rates"]
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))


@pytest.mark.parametrize("name", ["Lion", "LAMB"])
def test_the_same_global_batch_has_the_same_rates(name):
    torch.manual_seed(1)
    run = trainer(LipschitzLR(norm="sample"), Keep(), max_epochs=1)
    run.fit(Classifier(MEASURED_OPTIMIZERS[name]), datamodule=Slices(16))
    whole = torch.load("rank0.pt")["rates"]
    torch.manual_seed(1)
    parts, _ = two_ranks(LipschitzLR(norm="sample"), Classifier(MEASURED_OPTIMIZERS[name]), 8, max_epochs=1)
    assert [rate for (rate,) in parts["rates"]] == pytest.approx([rate for (rate,) in whole], rel=1e-3)


@pytest.mark.parametrize("name", MEASURED_OPTIMIZERS)
def test_a_dry_run_changes_nothing(name):
    make = MEASURED_OPTIMIZERS[name]
    plain, dry = (fit(callback, make)[0] for callback in (Steps(), LipschitzLR(dry_run=True)))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), dry.parameters(), strict=True))


def test_a_copy_is_made_in_due_steps_alone(monkeypatch):
    steps, trials = [0], []
    own = step_lengths.trial_step
    monkeypatch.setattr(step_lengths, "trial_step", lambda *a, **k: trials.append(steps[0]) or own(*a, **k))

    class Counting(Lion):
        def __init__(self, parameters):
            super().__init__(parameters)
            self.register_step_post_hook(lambda *_: steps.__setitem__(0, steps[0] + 1))

    fit(LipschitzLR(), Counting, max_epochs=9)
    assert [trial + 1 for trial in trials] == due_steps(54, 6)


class Reluctant(OtherAdamW):
    """No copy of it can step."""

    def __init__(self, parameters, **settings):
        super().__init__(parameters, **settings)
        type(self).only = self

    def update(self, *arguments):
        if self is not self.only:
            raise RuntimeError("not this one")
        return super().update(*arguments)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_where_no_copy_can_step_the_optimizers_own_steps_are_measured(decay, caplog):
    callback = LipschitzLR(schedule="none")
    made = []
    module, rates = fit(callback, lambda p: made.append(Reluctant(p, weight_decay=decay)) or made[-1], max_epochs=20)
    message = "no copy of the optimizer Reluctant can step (RuntimeError: not this one); its updates are measured after"
    assert caplog.text.count(message) == 1
    _, copied = fit(LipschitzLR(schedule="none"), lambda p: OtherAdamW(p, weight_decay=decay), max_epochs=20)
    assert rates[0] == 1e-3  # the configured one
    assert rates[1] == pytest.approx(copied[0], rel=0.4)
    assert rates[-1] == pytest.approx(copied[-1], rel=0.2)
    assert len(made[0]._optimizer_step_post_hooks) == 1  # that of Steps
    assert not made[0]._optimizer_step_pre_hooks
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


def test_there_is_no_rule_of_the_paper_for_what_is_measured_but_for_sgd():
    with pytest.raises(ConfigurationError, match="for the optimizer Lion with bound='paper'; known: SGD"):
        fit(LipschitzLR(bound="paper"), Lion)
    callback = LipschitzLR(bound="paper")
    fit(callback, OtherSGD, max_steps=2)
    assert callback.controllers[0].decision.rule == "adamo"


def test_another_family_is_measured_too():
    callback = LipschitzLR(bound="smooth")
    fit(callback, Lion, max_epochs=2)
    assert callback.controllers[0].decision.rule == "bounded"


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), OtherSGD])
def test_the_steps_of_sgd_are_known_and_no_copy_is_made(make, monkeypatch):
    monkeypatch.setattr(step_lengths, "trial_step", lambda *_, **__: pytest.fail("a copy was made"))
    callback = LipschitzLR(schedule="none")
    fit(callback, make, max_steps=1)
    terms = {term.symbol: term.value for term in callback.controllers[0].decision.terms}
    assert terms["s"] == pytest.approx(0.1, rel=1e-3)


def test_another_schedule_free_optimizer_averages_and_has_a_warm_up_alone(caplog):
    callback = LipschitzLR()
    _, rates = fit(callback, lambda p: SGDScheduleFree(p, lr=1.0), max_epochs=5)
    assert "warm-up over 3 optimizer steps" in caplog.text
    assert rates[-1] == callback.rate


@pytest.mark.filterwarnings("ignore:.*returned `None`, this fit will run with no optimizer")
@pytest.mark.parametrize("returned", [None, []], ids=str)
def test_a_module_without_an_optimizer_is_told_what_to_write(returned):
    class Without(Classifier):
        def configure_optimizers(self):
            return returned

    with pytest.raises(
        ConfigurationError, match="configure_optimizers of Without returned none; end it with: "
    ) as info:
        fit(LipschitzLR(), None, Without())
    advice = str(info.value).partition("end it with: return ")[2]

    class Advised(Classifier):
        def configure_optimizers(self):
            return eval(advice)

    callback = LipschitzLR()
    fit(callback, None, Advised(), max_steps=1)
    assert callback.rate > 0


class Masked(Classifier):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]) / 0.5, batch[1])


@pytest.mark.parametrize("make", [torch.optim.AdamW, Lion, lambda p: torch.optim.SGD(p, lr=0.1), Reluctant])
@pytest.mark.parametrize("kind", [Classifier, Masked])
def test_after_a_fit_the_callback_pickles_and_holds_nothing_of_the_run(make, kind):
    callback = LipschitzLR()
    run = trainer(callback, max_epochs=1)
    module = kind(make)
    run.fit(module, loader())
    before = callback.rate, callback.lr, callback.constant, callback.head_name, callback.controllers[0].metrics()
    state = callback.state_dict()
    held = [weakref.ref(one) for one in (module, run, run.optimizers[0], module.net[0].weight)]
    Reluctant.only = None
    del module, run
    gc.collect()
    assert [one() for one in held] == [None] * 4
    copy = pickle.loads(pickle.dumps(callback))
    for one in (callback, copy):
        assert (one.rate, one.lr, one.constant, one.head_name, one.controllers[0].metrics()) == before
        assert one.state_dict().keys() == state.keys()
        assert one.state_dict()["optimizers"][0].keys() == state["optimizers"][0].keys()
    assert all(value is not None for value in before)
    copy.load_state_dict(state)
    trainer(copy, max_epochs=1).fit(Classifier(torch.optim.AdamW), loader())  # measures again


def test_a_checkpoint_that_is_saved_after_a_fit_has_the_state_of_its_end():
    run = trainer(LipschitzLR(schedule="none"), steps := Steps(), max_epochs=2)
    torch.manual_seed(0)
    run.fit(Classifier(Lion), loader())
    run.save_checkpoint("end.ckpt")
    _, whole = fit(LipschitzLR(schedule="none"), Lion, max_epochs=4)
    rest = trainer(LipschitzLR(schedule="none"), more := Steps(), max_epochs=4)
    rest.fit(Classifier(Lion), loader(), ckpt_path="end.ckpt", weights_only=True)
    assert [rate for (rate,) in steps.rates + more.rates] == whole


def test_the_state_of_another_optimizer_is_refused():
    run = trainer(LipschitzLR(schedule="none"), max_epochs=2)
    run.fit(Classifier(Lion), loader())
    run.save_checkpoint("end.ckpt")
    other = trainer(LipschitzLR(schedule="none"), max_epochs=4)
    with pytest.raises(LitLipschitzError, match="Lion.*this run's.*OtherSGD"):
        other.fit(Classifier(OtherSGD), loader(), ckpt_path="end.ckpt", weights_only=True)


class SharpnessAware(torch.optim.Optimizer):
    """Sharpness-aware minimization: its step has gradients made twice by the closure, and a step of SGD."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})
        self.base = torch.optim.SGD(self.param_groups, lr)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        length = torch.stack([p.grad.norm() for p in trained]).norm()
        moves = [p.grad * 0.05 / length for p in trained]
        for parameter, move in zip(trained, moves, strict=True):
            parameter.add_(move)
        self.zero_grad()
        with torch.enable_grad():
            closure()
        for parameter, move in zip(trained, moves, strict=True):
            parameter.sub_(move)
        self.base.step()


class ByLoss(torch.optim.Optimizer):
    """A step that is proportional to the loss, which a copy can't make without the loss."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    def step(self, closure=None):
        loss = closure()
        (group,) = self.param_groups
        square = sum(p.grad.square().sum() for p in group["params"])
        for parameter in group["params"]:
            parameter.data.sub_(group["lr"] * loss.detach() / square * parameter.grad)
        return loss


def test_an_optimizer_whose_closure_makes_gradients_again_has_a_rate_like_that_of_its_base():
    class Twice(Classifier):
        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            closure()
            optimizer.step(closure)

    rates = []
    for module in (Twice(lambda p: SharpnessAware(p, lr=0.1)), Classifier(lambda p: torch.optim.SGD(p, lr=0.1))):
        torch.manual_seed(0)
        trainer(callback := LipschitzLR(schedule="none"), max_steps=1).fit(module, loader())
        rates.append(callback.rate)
    assert 1 / 3 < rates[0] / rates[1] < 3


def test_an_optimizer_that_steps_by_the_loss_has_a_rate():
    callback = LipschitzLR(schedule="none")
    trainer(callback, max_epochs=2).fit(Classifier(lambda p: ByLoss(p, lr=0.1)), loader())
    assert 0 < callback.rate < 10
