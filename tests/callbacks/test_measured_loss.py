"""``LipschitzLR(loss="measured")``: losses that are not recognised train, with constants that autograd confirms."""

import copy
import logging
import math

import lightning as L
import pytest
import torch
from helpers import CLASSES, WIDTH, Classifier, Keep, Steps, due_steps, examples, loader, trainer
from torch import nn
from torch.nn import functional as F

from lit_lipschitz import ConfigurationError, LipschitzLR
from lit_lipschitz.errors import LitLipschitzError
from lit_lipschitz.measurement.measured_outputs import MeasuredOutputs
from lit_lipschitz.rules import papers

OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


def focal(net, inputs, targets):
    entropy = F.cross_entropy(net(inputs), targets, reduction="none")
    return ((1 - torch.exp(-entropy)) ** 2 * entropy).mean()


def dice(net, inputs, targets):
    probabilities, truth = net(inputs).softmax(1), F.one_hot(targets, CLASSES)
    return 1 - (2 * (probabilities * truth).sum(0) / (probabilities.sum(0) + truth.sum(0) + 1)).mean()


def masked_rows(net, inputs, targets):
    kept = inputs[:, 0] > -0.5
    return F.cross_entropy(net(inputs)[kept] / 0.5, targets[kept])


def distillation(net, inputs, targets):
    teacher = 3 * F.one_hot(targets, CLASSES).float()
    student = F.log_softmax(net(inputs) / 2, 1)
    return F.cross_entropy(net(inputs), targets) + 2 * F.kl_div(student, teacher.softmax(1), reduction="batchmean")


class Own(Classifier):
    """A module whose loss is a function of the network and the batch; keeps each step's loss."""

    def __init__(self, loss=focal, optimizer="adamw"):
        torch.manual_seed(0)
        super().__init__(OPTIMIZERS[optimizer])
        self.loss, self.losses = loss, []

    def training_step(self, batch, batch_idx):
        loss = self.loss(self.net, *batch)
        self.losses.append(loss.item())
        return loss


class Spies(LipschitzLR):
    """Keeps the measurement behind the rate of each step, before the end of an epoch replaces it."""

    def __init__(self):
        super().__init__(loss="measured")
        self.measurements = []

    def on_train_batch_end(self, trainer, *arguments):
        if trainer.global_step > len(self.measurements):
            self.measurements.append(self.controllers[0].measurement)
        super().on_train_batch_end(trainer, *arguments)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("loss", [focal, dice, masked_rows, distillation])
def test_a_loss_that_is_not_recognised_trains(loss, optimizer):
    module, callback, steps = Own(loss, optimizer), LipschitzLR(loss="measured"), Steps()
    trainer(callback, steps, max_epochs=8).fit(module, loader())
    assert all(math.isfinite(rate) and rate > 0 for (rate,) in steps.rates[:-1])
    first, last = sum(module.losses[:6]), sum(module.losses[-6:])
    assert last < 0.8 * first
    assert callback.head_name == "net.2"


def test_it_says_once_where_it_measures(caplog):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(16, CLASSES)))
    module = Own()
    module.net = net
    with caplog.at_level(logging.INFO):
        trainer(LipschitzLR(loss="measured")).fit(module, loader())
    (said,) = [record.getMessage() for record in caplog.records if "first rate" in record.getMessage()]
    assert said.startswith(
        "LipschitzLR: output layers net.2; loss not recognised: measured, an estimate and not a bound, m = 16; first"
    )


@pytest.mark.parametrize("loss", [focal, masked_rows])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_first_measurement_is_that_of_autograd(loss, accumulated):
    module, callback = Own(loss), Spies()
    before = copy.deepcopy(module.net)
    trainer(callback, max_steps=1, accumulate_grad_batches=accumulated).fit(module, loader(batch_size=16))
    inputs, targets = examples().tensors
    gradients, features = [], []
    for start in range(0, 16 * accumulated, 16):
        part = slice(start, start + 16)
        hidden = before[:2](inputs[part]).detach()
        logits = before[2](hidden).detach().requires_grad_()
        value = loss(lambda _, logits=logits: logits, inputs[part], targets[part]) / accumulated
        gradients.append(torch.autograd.grad(value, logits)[0])
        features.append(F.pad(hidden, (0, 1), value=1.0))
    norms = torch.cat(gradients).norm(dim=1)
    m = int((norms > 0).sum())
    assert (m < 16 * accumulated) == (loss is masked_rows)
    (measured,) = callback.measurements
    assert measured.batch_size == m
    assert measured.activation_norm == pytest.approx(torch.cat(features)[norms > 0].norm().item(), rel=1e-5)
    assert measured.largest_grad_norm == pytest.approx(m * norms.max().item(), rel=1e-5)
    assert measured.logit_grad_norm == pytest.approx(math.sqrt(m) * norms.norm().item(), rel=1e-5)
    assert measured.mean_logit_grad_norm == pytest.approx(norms.sum().item(), rel=1e-5)
    constant = norms.max().item() * math.sqrt(m) * torch.cat(features)[norms > 0].norm().item()
    assert callback.constant == pytest.approx(constant, rel=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_has_the_same_rates(optimizer):
    whole = trainer(LipschitzLR(loss="measured", schedule="none"), Keep(), max_epochs=6)
    whole.fit(Own(focal, optimizer), loader())
    kept = torch.load("rank0.pt")
    part = trainer(LipschitzLR(loss="measured", schedule="none"), max_epochs=3)
    part.fit(Own(focal, optimizer), loader())
    part.save_checkpoint("part.ckpt")
    rest = trainer(LipschitzLR(loss="measured", schedule="none"), Keep(), max_epochs=6)
    rest.fit(Own(focal, optimizer), loader(), ckpt_path="part.ckpt")
    resumed = torch.load("rank0.pt")
    assert resumed["rates"] == kept["rates"][18:]
    assert all(torch.equal(a, b) for a, b in zip(resumed["weights"], kept["weights"], strict=True))


def test_a_run_that_measured_goes_on_measuring_and_no_other_does():
    for before, after in (("measured", "auto"), ("auto", "measured")):
        run = trainer(LipschitzLR(loss=before), max_epochs=1)
        run.fit(Classifier(), loader())
        run.save_checkpoint("other.ckpt")
        resumed = LipschitzLR(loss=after)
        if after == "measured":
            with pytest.raises(LitLipschitzError, match="saved with the head"):
                trainer(resumed).fit(Classifier(), loader(), ckpt_path="other.ckpt")
        else:
            trainer(resumed).fit(Classifier(), loader(), ckpt_path="other.ckpt")
            assert resumed.controllers[0].metrics()["measured"] == 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_only_the_backwards_of_steps_that_are_due_are_watched(optimizer, monkeypatch):
    module, watched, watch = Own(focal, optimizer), [], MeasuredOutputs.watch

    def spy(self, layers, scale):
        watched.append(module.global_step + 1)
        watch(self, layers, scale)

    monkeypatch.setattr(MeasuredOutputs, "watch", spy)
    trainer(LipschitzLR(loss="measured"), max_epochs=8).fit(module, loader())
    assert watched == due_steps(48, 6)


class Adversaries(L.LightningModule):
    """A GAN of two small networks under manual optimization, whose generator's loss goes through the critic."""

    def __init__(self, toggles):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization, self.toggles = False, toggles
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, WIDTH))
        self.critic = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 1))

    def step(self, optimizer, loss_of):
        if self.toggles:
            self.toggle_optimizer(optimizer)
        loss = loss_of()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        if self.toggles:
            self.untoggle_optimizer(optimizer)

    def training_step(self, batch, batch_idx):
        generator, critic = self.optimizers()
        fake = self.generator(torch.randn(len(batch[0]), 4))
        self.step(critic, lambda: self.critic(fake.detach()).exp().mean() + (-self.critic(batch[0])).exp().mean())
        self.step(generator, lambda: -self.critic(self.generator(torch.randn(len(batch[0]), 4))).tanh().mean())

    def configure_optimizers(self):
        parts = self.generator, self.critic
        return [torch.optim.AdamW(part.parameters(), lr=1e-3) for part in parts]


@pytest.mark.parametrize("toggles", [True, False])
def test_several_optimizers_have_output_layers_of_their_own(toggles):
    callback = LipschitzLR(loss="measured", optimizers=[0, 1])
    trainer(callback, max_epochs=2).fit(Adversaries(toggles), loader())
    heads = {i: one.head_name for i, one in callback.controllers.items()}
    assert heads == {0: "generator.2", 1: "critic.2"}
    assert all(0 < one.decision.lr < math.inf for one in callback.controllers.values())
    assert callback.controllers[0].decision.lr != callback.controllers[1].decision.lr


def test_a_recognised_loss_can_be_measured_and_is_no_larger_than_its_bound():
    bound, measured = LipschitzLR(), LipschitzLR(loss="measured")
    for callback in (bound, measured):
        torch.manual_seed(0)
        trainer(callback, max_steps=1).fit(Classifier(), loader())
    assert 0.1 * bound.constant < measured.constant <= bound.constant


REFUSED = {
    "bound": "smooth",
    "norm": "sample",
    "second_moment": "constant",
    "head": "net.2",
    "measure": "pass",
    "weights": "all",
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_argument_without_meaning_is_refused(name):
    with pytest.raises(ConfigurationError) as caught:
        LipschitzLR(loss="measured", **{name: REFUSED[name]})
    for part in (f"{name}={REFUSED[name]!r}", f"expected {name}=", f"leave {name}= out"):
        assert part in str(caught.value)


def test_the_papers_bound_is_refused():
    with pytest.raises(ConfigurationError, match="expected bound='strict'"):
        LipschitzLR(loss="measured", bound="paper", rule="adamo")


@pytest.mark.parametrize("info", papers.RULES, ids=lambda info: info.name)
def test_the_papers_rules_are_refused(info):
    # Those with an estimate of the authors' scripts are refused for it, with any loss.
    scripts = info.second_moment == "scripts"
    with pytest.raises(ConfigurationError, match="second_moment='scripts'" if scripts else "leave rule= out") as caught:
        LipschitzLR(loss="measured", rule=info.name)
    assert scripts or f"rule={info.name!r}" in str(caught.value)


@pytest.mark.parametrize("rule", ["inverse", "bounded"])
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_other_rules_work(rule, optimizer):
    callback = LipschitzLR(loss="measured", rule=rule)
    trainer(callback, max_epochs=1).fit(Own(focal, optimizer), loader())
    assert 0 < callback.rate < math.inf
