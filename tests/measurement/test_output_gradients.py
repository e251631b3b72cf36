"""Gradient norms in the logits, compared with autograd's, and the rule that uses them."""

import gc
import math
import weakref

import lightning as L
import pytest
import torch
from helpers import CLASSES, LOSSES, WIDTH, Classifier, adamws_scale, loader, one_hot, trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F

from lit_lipschitz import ConfigurationError, LipschitzLR, LitLipschitzError
from lit_lipschitz.measurement.output_gradients import LogitGradientNorms, grad_norms_of_ranks
from lit_lipschitz.measurement.step_scale import StepScaleEstimator
from lit_lipschitz.recognition.loss_graph import LossGraph


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1.0)


class Watched(Classifier):
    """Keeps the head's inputs and outputs, and the loss before Lightning divides it, of each batch."""

    def __init__(self, loss=F.cross_entropy, net=None, optimizer=adamw, targets=None):
        super().__init__(optimizer, net)
        self.loss, self.targets, self.batches = loss, targets or (lambda classes: classes), []

    def training_step(self, batch, batch_idx):
        inputs = self.net[:-1](batch[0])
        outputs = self.net[-1](inputs)
        loss = self.loss(outputs, self.targets(batch[1]))
        self.batches.append((inputs, outputs, loss))
        return loss

    def norms(self, batch=-1):
        """Of the gradient in the outputs, of the inputs with a 1 for the bias, and of the gradient in the weights."""
        inputs, outputs, loss = self.batches[batch]
        head = self.net[-1]
        grads = torch.autograd.grad(loss, [outputs, head.weight, head.bias], retain_graph=True)
        extended = torch.cat([inputs, torch.ones(*inputs.shape[:-1], 1)], dim=-1)
        return grads[0].norm().item(), extended.norm().item(), math.hypot(*(grad.norm().item() for grad in grads[1:]))


class Once(L.Callback):
    """Looks at the norms while the graph is there."""

    def on_before_backward(self, trainer, pl_module, loss):
        self.norms = pl_module.norms()


def first_step(module, callback=None, **settings):
    callback = callback or LipschitzLR(schedule="none")
    trainer(once := Once(), callback, **{"max_steps": 1, **settings}).fit(module, loader())
    return callback, once.norms


@pytest.mark.parametrize("case", LOSSES.values(), ids=LOSSES)
def test_the_observed_constant_is_the_product_of_the_norms_and_bounds_the_heads_gradient(case):
    callback, (grad_norm, size, gradient) = first_step(Watched(case.function, targets=case.targets))
    decision = callback.controllers[0].decision
    assert decision.observed_constant == pytest.approx(grad_norm * size, rel=1e-4)
    assert gradient <= grad_norm * size
    assert decision.observed_constant <= decision.constant


def grad_norm_of(module, callback=None, data=None, **settings):
    """What was measured in the first step."""
    callback = callback or LipschitzLR(schedule="none")
    trainer(callback, **{"max_steps": 1, **settings}).fit(module, data or loader())
    return callback.controllers[0].measurement.logit_grad_norm


def effective_sample_size(callback):
    """The n of the last decision."""
    (effective,) = (term.value for term in callback.controllers[0].decision.terms if term.symbol == "n")
    return effective


def test_accumulated_batches_have_the_gradient_norms_of_all():
    measured = []
    for data, batches in ((loader(16), 1), (loader(4), 4)):
        torch.manual_seed(0)
        callback = LipschitzLR(schedule="none")
        grad_norm_of(Classifier(adamw), callback, data, accumulate_grad_batches=batches)
        measured.append(callback.controllers[0].measurement)
    assert measured[1].logit_grad_norm == pytest.approx(measured[0].logit_grad_norm, rel=1e-5)
    assert measured[1].mean_logit_grad_norm == pytest.approx(measured[0].mean_logit_grad_norm, rel=1e-5)
    assert measured[1].batch_size == measured[0].batch_size == 16


def test_examples_that_are_learned_do_not_count():
    """Fifteen of sixteen have a grad_norm of nearly 0, the last one is wrong: the noise is that of one example."""

    class Learned(Classifier):
        def training_step(self, batch, batch_idx):
            inputs = 30 * one_hot(torch.zeros(16, dtype=torch.int64))
            return F.cross_entropy(self.net(inputs), torch.tensor([0] * 15 + [1]))

    net = nn.Sequential(nn.Identity(), nn.Linear(CLASSES, CLASSES))
    with torch.no_grad():
        net[1].weight.copy_(torch.eye(CLASSES))
        net[1].bias.zero_()
    callback = LipschitzLR(schedule="none")
    grad_norm = grad_norm_of(Learned(adamw, net), callback)
    assert grad_norm == pytest.approx(math.sqrt(2 / 16), rel=1e-4)
    assert effective_sample_size(callback) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_the_scale_of_a_gradscaler_does_not_enter(fused):
    grad_norms = []
    for plugins in ([], [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))]):
        torch.manual_seed(0)
        grad_norms.append(
            grad_norm_of(Classifier(lambda p: torch.optim.AdamW(p, lr=1.0, fused=fused)), plugins=plugins)
        )
    assert grad_norms[1] == pytest.approx(grad_norms[0], rel=1e-2)  # half precision


class Shaped(Classifier):
    """Any way from the inputs to the loss, which says what the outputs are and how many examples count."""

    def __init__(self, way, net=None):
        super().__init__(adamw, net)
        self.way = way

    def training_step(self, batch, batch_idx):
        loss, self.outputs, self.count = self.way(self.net, *batch)
        return loss


class ByHand(L.Callback):
    """The grad_norms of the first batch from autograd: m times each example's part of the gradient in the outputs."""

    def on_before_backward(self, trainer, pl_module, loss):
        (grad,) = torch.autograd.grad(loss, pl_module.outputs, retain_graph=True)
        grad_norms = pl_module.count * (grad.abs() if grad.ndim == 1 else grad.norm(dim=-1)).flatten()
        self.mean = grad_norms.sum().item() / pl_module.count
        self.root_mean_square = math.sqrt(grad_norms.square().sum().item() / pl_module.count)


def ignoring(net, inputs, classes):
    outputs = net(inputs)
    return F.cross_entropy(outputs, classes, ignore_index=1), outputs, (classes != 1).sum().item()


def tokens(net, inputs, classes):
    outputs = net(inputs.reshape(2, 8, WIDTH))
    return F.cross_entropy(outputs.transpose(1, 2), classes.reshape(2, 8)), outputs, 16


def calls(net, inputs, classes):
    outputs = torch.cat([net(part) for part in inputs.chunk(2)])
    return F.cross_entropy(outputs, classes), outputs, 16


def squeezed(net, inputs, classes):
    outputs = net(inputs).squeeze(1)
    return F.binary_cross_entropy_with_logits(outputs, (classes == 1).float()), outputs, 16


def pooled(net, inputs, classes):
    outputs = net(inputs[:, :, None, None].expand(-1, -1, 2, 2)).mean(dim=(2, 3))
    return F.cross_entropy(outputs, classes), outputs, 16


def halves(net, inputs, classes):
    """The logits are the second of two results of one node."""
    _, outputs = net(inputs).split(CLASSES, dim=1)
    return F.cross_entropy(outputs, classes), outputs, 16


WAYS = {
    "ignored targets": (ignoring, None),
    "tokens": (tokens, None),
    "several calls": (calls, None),
    "one output": (squeezed, lambda: nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, 1))),
    "pooled": (pooled, lambda: nn.Sequential(nn.Conv2d(WIDTH, 4, 1), nn.Tanh(), nn.Conv2d(4, CLASSES, 1))),
    "one of two results": (halves, lambda: nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, 2 * CLASSES))),
}


@pytest.mark.parametrize("name", WAYS)
def test_the_gradient_norm_of_outputs_of_every_shape_is_that_of_autograd(name):
    way, net = WAYS[name]
    callback, by_hand = LipschitzLR(schedule="none"), ByHand()
    trainer(by_hand, callback, max_steps=1).fit(Shaped(way, net and net()), loader())
    measured, effective = callback.controllers[0].measurement, effective_sample_size(callback)
    assert measured.logit_grad_norm == pytest.approx(by_hand.root_mean_square, rel=1e-4)
    assert measured.mean_logit_grad_norm == pytest.approx(by_hand.mean, rel=1e-4)
    count = 16 if name != "ignored targets" else measured.batch_size
    assert effective == pytest.approx(count * (by_hand.mean / by_hand.root_mean_square) ** 2, rel=1e-4)
    assert 1 <= effective < count


@pytest.mark.parametrize("norm", ["frobenius", "sample"])
def test_the_noise_of_a_pooled_heads_batch_is_that_of_its_images_not_of_their_places(norm):
    """All places of an image are alike, so that it is the same network as without them."""
    momentum = lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9)  # noqa: E731
    rates = []
    for places in (1, 7):

        class Maps(Classifier):
            def training_step(self, batch, batch_idx, places=places):
                outputs = self.net(batch[0][:, :, None, None].expand(-1, -1, places, places))
                return F.cross_entropy(outputs.mean(dim=(2, 3)), batch[1])

        torch.manual_seed(0)
        module = Maps(momentum, nn.Sequential(nn.Conv2d(WIDTH, 4, 1), nn.Tanh(), nn.Conv2d(4, CLASSES, 1)))
        callback = LipschitzLR(norm=norm, schedule="none")
        trainer(callback, max_steps=1).fit(module, loader())
        rates.append(callback.rate)
        assert callback.rate == pytest.approx(0.1 * math.sqrt(16 / 2) / callback.constant)
    assert rates[1] == pytest.approx(rates[0], rel=1e-4)


@pytest.mark.parametrize("norm", ["frobenius", "sample"])
def test_the_noise_of_an_enlarged_map_is_that_of_the_places_it_was_made_from(norm):
    class Enlarged(Classifier):
        def training_step(self, batch, batch_idx):
            outputs = self.net(batch[0].reshape(4, WIDTH, 2, 2))
            targets = batch[1].reshape(4, 2, 2).repeat_interleave(5, dim=1).repeat_interleave(5, dim=2)
            return F.cross_entropy(F.interpolate(outputs, scale_factor=5), targets)

    net = nn.Sequential(nn.Conv2d(WIDTH, 4, 1), nn.Tanh(), nn.Conv2d(4, CLASSES, 1))
    callback = LipschitzLR(norm=norm, schedule="none")
    module = Enlarged(lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9), net)
    trainer(callback, max_steps=1).fit(module, loader())
    assert callback.controllers[0].measurement.batch_size == 16
    assert callback.rate == pytest.approx(0.1 * math.sqrt(16 / 2) / callback.constant)


class Two(nn.Module):
    """Outputs of a network and something beside them, which has a gradient too."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, 8), nn.Linear(8, CLASSES)

    def forward(self, inputs):
        hidden = self.body(inputs).tanh()
        return hidden, self.head(hidden)


def test_a_compiled_networks_gradient_norm_is_that_of_its_outputs():
    class Both(Classifier):
        def training_step(self, batch, batch_idx):
            hidden, outputs = self.net(batch[0])
            return F.cross_entropy(outputs, batch[1]) + 10 * hidden.square().mean()

    eager = Both(adamw, Two())
    compiled = Both(adamw, Two())
    compiled.load_state_dict(eager.state_dict())
    compiled.net = torch.compile(compiled.net, backend="aot_eager")
    grad_norms = [grad_norm_of(one, LipschitzLR(loss="cross_entropy", schedule="none")) for one in (eager, compiled)]
    assert grad_norms[1] == pytest.approx(grad_norms[0], rel=1e-5)
    assert 0 < grad_norms[0] < math.sqrt(2)


def test_a_manual_loss_has_the_gradient_norm_of_its_own_batch():
    class ByHandOptimized(Classifier):
        def __init__(self):
            super().__init__(adamw)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
            optimizer.step()

    torch.manual_seed(0)
    expected = grad_norm_of(Classifier(adamw))
    torch.manual_seed(0)
    assert grad_norm_of(ByHandOptimized(), LipschitzLR(optimizers=0, schedule="none")) == pytest.approx(expected)


class Pair(L.LightningModule):
    """Two heads with losses of one kind, each with an optimizer, stepped manually; the second one is far steeper."""

    def __init__(self, toggle):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.parts = nn.ModuleList([nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, CLASSES)])
        self.toggle = toggle

    def training_step(self, batch, batch_idx):
        for i in (1, 1, 0):  # the second one twice
            optimizer = self.optimizers()[i]
            if self.toggle:
                self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self.parts[i]((1 + 30 * i) * batch[0]), batch[1]))
            optimizer.step()
            if self.toggle:
                self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return [torch.optim.AdamW(part.parameters(), lr=1e-3) for part in self.parts]


@pytest.mark.parametrize("toggle", [False, True])
def test_the_losses_of_other_heads_do_not_enter(toggle):
    class Alone(Pair):
        def training_step(self, batch, batch_idx):
            self.optimizers()[0].zero_grad()
            self.manual_backward(F.cross_entropy(self.parts[0](batch[0]), batch[1]))
            self.optimizers()[0].step()

    measured = []
    for module in (Alone(False), Pair(toggle)):
        callback = LipschitzLR(optimizers=0, dry_run=True, schedule="none")
        trainer(callback, max_epochs=3).fit(module, loader())
        measured.append(callback.controllers[0].measurement)
    assert measured[1].logit_grad_norm == pytest.approx(measured[0].logit_grad_norm, rel=1e-5)
    assert measured[1].mean_logit_grad_norm == pytest.approx(measured[0].mean_logit_grad_norm, rel=1e-5)


@pytest.mark.parametrize(("thaw", "measured"), [(18, 18), (20, 23)])
def test_after_parameters_thaw_the_next_due_step_is_measured(thaw, measured):
    """They thaw right before a step, which is the first of an epoch, or between two of those that are due."""

    class Thawing(Classifier):
        def on_before_optimizer_step(self, optimizer):
            self.net[0].requires_grad_(self.global_step >= thaw)

    class Look(L.Callback):
        def __init__(self):
            self.seen, self.trained = [], []

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.seen.append(callback.controllers[0].decision.observed_constant)
            self.trained.append(callback.controllers[0].state_dict()["step_scale"]["num_trained"])

    callback = LipschitzLR(schedule="none")
    module = Thawing(adamw)
    module.net[0].requires_grad_(False)
    trainer(callback, look := Look(), max_epochs=5).fit(module, loader())
    assert look.trained == [2] * measured + [4] * (30 - measured)
    assert look.seen[measured] != look.seen[measured - 1]
    assert all(seen > 0 for seen in look.seen)


MOVED = {
    "maps": (lambda z: z.permute(0, 2, 3, 1), lambda: nn.Conv2d(WIDTH, CLASSES, 1), (4, WIDTH, 2, 2)),
    "tokens": (lambda z: z.transpose(1, 2), lambda: nn.Linear(WIDTH, CLASSES), (4, 4, WIDTH)),
}


@pytest.mark.parametrize("name", MOVED)
def test_outputs_that_are_moved_before_an_elementwise_loss_have_the_same_examples(name):
    move, head, shape = MOVED[name]

    class Moved(Classifier):
        def training_step(self, batch, batch_idx, moved=True):
            outputs = self.net(batch[0].reshape(shape))
            outputs = move(outputs) if self.moved else outputs
            targets = torch.zeros_like(outputs)
            targets[0] = 9.0  # so that the examples are not alike
            return F.mse_loss(outputs, targets)

    measured = []
    for moved in (False, True):
        torch.manual_seed(0)
        module = Moved(adamw, nn.Sequential(head()))
        module.moved = moved
        grad_norm_of(module, callback := LipschitzLR(schedule="none"))
        measured.append(callback.controllers[0].measurement)
    assert measured[1].mean_logit_grad_norm == pytest.approx(measured[0].mean_logit_grad_norm, rel=1e-5)
    assert measured[0].mean_logit_grad_norm < 0.95 * measured[0].logit_grad_norm


def test_a_loss_without_a_run_of_the_pooled_head_is_no_accident():
    class Sometimes(Pair):
        def __init__(self):
            super().__init__(False)
            self.parts = nn.ModuleList([nn.Conv2d(WIDTH, 1, 1), nn.Conv2d(WIDTH, 1, 1)])

        def training_step(self, batch, batch_idx):
            for i in (0, 1):
                self.optimizers()[i].zero_grad()
                outputs = self.parts[i](batch[0][:, :, None, None].expand(-1, -1, 3, 3)).mean(dim=(2, 3))
                self.manual_backward(F.binary_cross_entropy_with_logits(outputs, (batch[1] == 1).float()[:, None]))
                self.optimizers()[i].step()

    callback = LipschitzLR(optimizers=[0, 1], on_nonfinite="raise", schedule="none")
    trainer(callback, max_epochs=2).fit(Sometimes(), loader())
    assert [one.measurement.dropped for one in callback.controllers.values()] == [0, 0]


def test_a_second_backward_of_one_graph_counts_once():
    class Twice(Classifier):
        def __init__(self):
            super().__init__(adamw)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.optimizers().zero_grad()
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.manual_backward(loss, retain_graph=True)
            self.manual_backward(loss)
            self.optimizers().step()

    torch.manual_seed(0)
    expected = grad_norm_of(Classifier(adamw))
    torch.manual_seed(0)
    assert grad_norm_of(Twice(), LipschitzLR(optimizers=0, schedule="none")) == pytest.approx(expected)


def test_a_pass_over_the_training_set_has_the_gradient_norm_of_the_training_batch():
    torch.manual_seed(0)
    expected = grad_norm_of(Classifier(adamw))
    torch.manual_seed(0)
    callback = LipschitzLR(measure="pass", schedule="none")
    assert grad_norm_of(Classifier(adamw), callback) == pytest.approx(expected)
    decision = callback.controllers[0].decision
    assert decision.observed_constant == pytest.approx(decision.constant * expected / math.sqrt(2), rel=1e-5)


def test_without_a_measured_gradient_norm_the_largest_one_is_used():
    """A loss that its user has named, in words that the graph does not tell."""

    class Own(Classifier):
        def training_step(self, batch, batch_idx):
            outputs = self.net(batch[0])
            return (outputs.exp().sum(dim=1).log() - outputs.gather(1, batch[1][:, None])[:, 0]).square().sqrt().mean()

    class Look(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.gradients = [p.grad.clone() for p in pl_module.parameters()]

        def on_train_batch_end(self, trainer, pl_module, *_):
            _, self.scale = adamws_scale(trainer.optimizers[0], self.gradients)

    callback = LipschitzLR(loss="cross_entropy", schedule="none")
    trainer(callback, look := Look(), max_steps=1).fit(Own(adamw), loader())
    # The norm of the displacement is sqrt(1.9 / 0.1) times that of an update.
    expected = math.sqrt(16 / 2) * look.scale / math.sqrt(1.9 / 0.1) / callback.constant
    assert callback.rate == pytest.approx(expected, rel=1e-4)
    assert callback.controllers[0].decision.observed_constant == 0


def test_a_batch_without_a_backward_leaves_the_gradient_norm_unchanged():
    estimator = StepScaleEstimator(adamw([nn.Parameter(torch.ones(2, 2))]), nn.Identity(), needs_logit_grads=True)

    def updated(ratio, norm, mean):
        """After one rank's numbers: norms, their product, no loss, mean square and mean of the examples' norms."""
        estimator.update([ratio, 1.0, ratio, 0.0, norm**2, mean])
        scale = estimator.scale
        return scale.logit_grad_norm, scale.mean_logit_grad_norm, scale.value * math.sqrt(1.9 / 0.1)

    assert updated(0.5, 0.5, 0.4) == pytest.approx((0.5, 0.4, 0.5))
    assert updated(0.7, 2.0, 1.6) == pytest.approx((2.0, 1.6, 0.7))
    for norms in ((0.0, 0.0), (math.inf, 1.0), (1.0, math.inf)):
        assert updated(4.5, *norms) == pytest.approx((2.0, 1.6, 4.5))
    before = estimator.scale
    updated(math.inf, 0.7, 0.7)
    assert estimator.scale == before


# -- the rate ----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_version_is_refused():
    run = trainer(LipschitzLR(schedule="none"), max_epochs=1)
    run.fit(Classifier(adamw), loader())
    run.save_checkpoint("new.ckpt")
    checkpoint = torch.load("new.ckpt")
    del checkpoint["callbacks"]["LipschitzLR"]["optimizers"][0]["step_scale"]
    torch.save(checkpoint, "old.ckpt")
    with pytest.raises(LitLipschitzError, match="another version of lit-lipschitz.*restore=False"):
        trainer(LipschitzLR(schedule="none"), max_epochs=2).fit(Classifier(adamw), loader(), ckpt_path="old.ckpt")
    fresh = LipschitzLR(restore=False, schedule="none")
    trainer(fresh, max_epochs=2).fit(Classifier(adamw), loader(), ckpt_path="old.ckpt")
    assert fresh.rate > 0


def test_the_observed_constant_is_logged():
    callback, _ = first_step(Watched())
    controller = callback.controllers[0]
    assert controller.metrics()["observed_constant"] == controller.decision.observed_constant > 0
    trainer(callback := LipschitzLR(schedule="none", bound="smooth"), max_steps=1).fit(Classifier(), loader())
    assert "observed_constant" not in callback.controllers[0].metrics()


def test_a_rank_whose_examples_are_learned_counts_in_the_mean():
    one, other = LogitGradientNorms(), LogitGradientNorms()
    for norms, logits in ((one, [[200.0, 0.0, 0.0]]), (other, [[0.0, 0.0, 0.0]])):
        outputs = torch.tensor(logits, requires_grad=True) * 1.0
        loss = F.cross_entropy(outputs, torch.tensor([0]))
        graph = LossGraph(loss)
        batch, edges = graph.batch("cross_entropy", 3), graph.edges("cross_entropy")
        assert len(edges) == 1
        norms.watch(batch, edges, "mean", lambda rows, _: rows)
        loss.backward()
    packed = [norms.pack(rank, 3, torch.device("cpu")) for rank, norms in enumerate((one, other))]
    packed.append(LogitGradientNorms().pack(2, 3, torch.device("cpu")))  # has captured none
    root, mean = grad_norms_of_ranks(torch.stack(packed).amax(dim=0).flatten().tolist())
    steep = math.sqrt(4 / 9 + 1 / 9 + 1 / 9)  # of the other one, computed manually: (1/3 - 1, 1/3, 1/3)
    assert root == pytest.approx(steep / math.sqrt(2))
    assert mean == pytest.approx(steep / 2)


def test_a_loss_that_is_not_recognised_keeps_no_batch():
    class Second(L.LightningModule):
        """Two optimizers, the first one's loss of a kind that is not known."""

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.parts, self.outputs = nn.ModuleList([nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, 1)]), []

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            outputs = self.parts[1](batch[0])
            self.outputs.append(weakref.ref(outputs))
            self.manual_backward(outputs.pow(3).mean())
            second.step()
            second.zero_grad()
            self.manual_backward(F.cross_entropy(self.parts[0](batch[0]), batch[1]))
            first.step()
            first.zero_grad()

        def configure_optimizers(self):
            return [torch.optim.AdamW(part.parameters(), lr=1e-3) for part in self.parts]

    class Alive(L.Callback):
        def on_train_end(self, trainer, pl_module):
            gc.collect()
            self.outputs = [reference() for reference in pl_module.outputs]

    alive = Alive()
    trainer(LipschitzLR(optimizers=0), alive, max_epochs=1).fit(Second(), loader(16))
    assert alive.outputs == [None] * 6


class Adversaries(L.LightningModule):
    """A generator that does not move, and a discriminator, so that the latter's training is the same without its steps.

    Args:
        generates: Whether the generator makes its steps.
        first: Whether it makes them before the discriminator's.
        factor: Of the discriminator's loss.
    """

    def __init__(self, generates, first=False, factor=1):
        super().__init__()
        self.automatic_optimization, self.generates, self.first, self.factor = False, generates, first, factor
        torch.manual_seed(0)
        self.generator = nn.Linear(WIDTH, WIDTH)
        self.discriminator = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        generator, discriminator = self.optimizers()
        if self.generates and self.first:
            self.generate(generator, batch[0])
        outputs = self.discriminator(torch.cat([batch[0] + 1, self.generator(batch[0]).detach()]))
        targets = torch.cat([torch.ones(len(batch[0]), 1), torch.zeros(len(batch[0]), 1)])
        discriminator.zero_grad()
        self.manual_backward(self.factor * F.binary_cross_entropy_with_logits(outputs, targets))
        discriminator.step()
        if self.generates and not self.first:
            self.generate(generator, batch[0])

    def generate(self, optimizer, rows):
        outputs = self.discriminator(self.generator(rows))
        optimizer.zero_grad()
        self.manual_backward(F.binary_cross_entropy_with_logits(outputs, torch.ones(len(rows), 1)))
        optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.generator.parameters(), lr=0.0), adamw(self.discriminator.parameters())]


@pytest.mark.parametrize("first", [False, True])
def test_another_optimizers_loss_through_the_head_is_not_its_own(first):
    grad_norms = []
    for generates in (False, True):
        callback = LipschitzLR(optimizers=1, dry_run=True)
        trainer(callback, max_epochs=4).fit(Adversaries(generates, first), loader(16))
        grad_norms.append(callback.controllers[1].measurement.logit_grad_norm)
    assert grad_norms[0] > 0
    assert grad_norms[1] == pytest.approx(grad_norms[0], rel=1e-5)


def test_a_loss_whose_gradients_two_optimizers_step_by_is_seen_by_both():
    class Both(L.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.automatic_optimization = False
            self.body, self.head = nn.Linear(WIDTH, 8), nn.Linear(8, CLASSES)

        def training_step(self, batch, batch_idx):
            optimizers = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self.head(self.body(batch[0]).relu()), batch[1]))
            for optimizer in optimizers:
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.body.parameters(), lr=0.01), adamw(self.head.parameters())]

    callback = LipschitzLR(optimizers=1)
    trainer(callback, max_epochs=1).fit(Both(), loader(16))
    assert callback.controllers[1].measurement.logit_grad_norm > 0


@pytest.mark.parametrize("first", [False, True])
def test_a_loss_is_refused_whether_or_not_anothers_went_through_the_head_before(first):
    with pytest.raises(ConfigurationError, match="weighted by 100"):
        trainer(LipschitzLR(optimizers=1, norm="sample"), max_epochs=1).fit(
            Adversaries(True, first, factor=100), loader(16)
        )
