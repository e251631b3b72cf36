"""``attach``: a plain loop has the rates, the metrics and the weights of the Lightning callback, bit for bit."""

import copy
import gc
import inspect
import io
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import CLASSES, WIDTH, Classifier, Steps, loader, trainer, without_address
from helpers.loops import BATCH, BATCHES, EPOCHS, OPTIMIZERS, Loop, network
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint

from lit_lipschitz import ConfigurationError, LipschitzLR, LitLipschitzError, attach

BACKWARD = torch.autograd.backward


@pytest.fixture(autouse=True)
def _restored():
    yield
    gc.collect()
    assert torch.autograd.backward is BACKWARD


def halving(optimizer):
    return LambdaLR(optimizer, lambda step: 0.9**step)


class Logged(Steps):
    """Records the callback's metrics after each step, too."""

    def __init__(self):
        super().__init__()
        self.metrics = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        ours = next(one for one in trainer.callbacks if isinstance(one, LipschitzLR))
        if len(self.metrics) < trainer.global_step:
            self.metrics.append({f"lipschitz/{name}": value for name, value in ours.controllers[0].metrics().items()})


class Scheduled(Classifier):
    def __init__(self, make, scheduler, loss):
        super().__init__(net=network())
        self.make, self.scheduler, self.loss = make, scheduler, loss

    def training_step(self, batch, batch_idx):
        return self.loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = self.make(self.parameters())
        if self.scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": self.scheduler(optimizer), "interval": "step"}]


def by_lightning(make, scheduler=None, loss=F.cross_entropy, settings=None, **trainer_settings):
    module = Scheduled(make, scheduler, loss)
    steps = Logged()
    # The callback's own hooks come first.
    run = trainer(LipschitzLR(**settings or {}), steps, max_epochs=EPOCHS, **trainer_settings)
    run.fit(module, loader(BATCH))
    return steps.rates, steps.metrics, [p.detach().clone() for p in module.net.parameters()]


def assert_same(found, expected):
    (rates, metrics, weights), (other_rates, other_metrics, other_weights) = found, expected
    assert rates == other_rates
    assert metrics == other_metrics
    assert all(torch.equal(one, other) for one, other in zip(weights, other_weights, strict=True))


def squared(outputs, targets):
    return F.mse_loss(outputs, F.one_hot(targets, CLASSES).float())


def masked(outputs, targets):
    """Not recognised, so that its constant is measured."""
    return F.multi_margin_loss(outputs, targets)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("own", "lightnings"),
    [
        ({}, {}),
        ({"k": 4}, {"accumulate_grad_batches": 4}),
        ({"clip": 0.1}, {"gradient_clip_val": 0.1}),
        ({"k": 2, "clip": 0.1}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
        ({"scheduler": halving}, {"scheduler": halving}),
        ({"loss": squared}, {"loss": squared}),
        ({"loss": masked}, {"loss": masked}),
        ({"loss": masked, "k": 2}, {"loss": masked, "accumulate_grad_batches": 2}),
        *[
            ({"settings": settings}, {"settings": settings})
            for settings in (
                {"bound": "smooth"},
                {"bound": "paper"},
                {"norm": "sample"},
                {"update": 5},
                {"loss": "measured"},
                {"schedule": "none", "max_lr": 0.05},
                {"dry_run": True},
            )
        ],
    ],
    ids=without_address,
)
def test_a_plain_loop_has_the_numbers_of_the_callback(optimizer, own, lightnings):
    make = OPTIMIZERS[optimizer]
    expected = by_lightning(make, **lightnings)
    loop = Loop(make, **own)
    found = loop.run()
    assert len(found[0]) == EPOCHS * BATCHES // own.get("k", 1)
    assert found[0][0][0] > 0
    assert_same(found, expected)
    assert loop.control.lr == found[1][-1]["lipschitz/lr"]
    assert loop.control.constant == found[1][-1].get("lipschitz/constant")
    loop.control.detach()


def scaler(init_scale=2.0**10):
    return torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=5)


@pytest.mark.parametrize("init_scale", [2.0**10, 2.0**127])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_scaled_loss_has_the_numbers_of_the_callback(init_scale, clip):
    """At the larger scale the first steps overflow and are skipped."""
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler(init_scale))
    expected = by_lightning(OPTIMIZERS["AdamW"], plugins=plugin, gradient_clip_val=clip)
    loop = Loop(OPTIMIZERS["AdamW"], scaler=scaler(init_scale), clip=clip)
    rates, _, weights = loop.run()
    assert (len(rates) == EPOCHS * BATCHES) == (init_scale == 2.0**10)
    assert rates == expected[0]
    assert all(torch.equal(one, other) for one, other in zip(weights, expected[2], strict=True))


def test_a_scaler_that_was_not_given_is_an_error_before_the_weights_move():
    loop = Loop(OPTIMIZERS["AdamW"])
    before = [p.detach().clone() for p in loop.net.parameters()]
    loop.scaler = scaler()
    with pytest.raises(ConfigurationError, match=r"found a GradScaler; pass attach\(\.\.\., grad_scaler=scaler\)"):
        loop.run()
    assert all(torch.equal(one, other) for one, other in zip(loop.net.parameters(), before, strict=True))


def test_a_disabled_scaler_is_none():
    off = torch.amp.GradScaler("cpu", enabled=False)
    expected = Loop(OPTIMIZERS["SGD"]).run()
    for given in (None, off):
        loop = Loop(OPTIMIZERS["SGD"], scaler=given)
        loop.scaler = off
        assert_same(loop.run(), expected)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "own", [{}, {"scheduler": halving}, {"k": 2, "loss": squared}, {"loss": masked}], ids=without_address
)
@pytest.mark.parametrize("stop", [1, 6, BATCHES, 2 * BATCHES + 2])
def test_a_resumed_loop_continues_bit_for_bit(optimizer, own, stop):
    stop *= own.get("k", 1) if stop == 1 else 1
    expected = Loop(OPTIMIZERS[optimizer], **own).run()
    first = Loop(OPTIMIZERS[optimizer], **own)
    first.run(last=stop)
    torch.save(first.state(), "state.pt")
    second = Loop(OPTIMIZERS[optimizer], **own)
    second.load(torch.load("state.pt", weights_only=True))
    rates, metrics, weights = second.run(first=stop)
    assert_same((first.rates + rates, first.metrics + metrics, weights), expected)


def test_a_state_of_other_settings_is_refused():
    state = Loop(OPTIMIZERS["SGD"]).control.state_dict()
    other = Loop(OPTIMIZERS["SGD"], settings={"bound": "smooth"}).control
    with pytest.raises(LitLipschitzError, match=r"was saved with bound='strict', and this run has bound='smooth'"):
        other.load_state_dict(state)
    with pytest.raises(LitLipschitzError, match="another version of lit-lipschitz"):
        other.load_state_dict({})


def hooks(loop):
    modules = [hook for module in loop.net.modules() for hook in module._forward_pre_hooks]
    return [*modules, *loop.optimizer._optimizer_step_pre_hooks, *loop.optimizer._optimizer_step_post_hooks]


def test_detaching_leaves_no_hook_and_keeps_the_results():
    loop = Loop(OPTIMIZERS["AdamW"])
    assert torch.autograd.backward is not BACKWARD
    with loop.control as control:
        loop.run(last=20)
        before = control.rate, control.lr, control.constant, control.metrics()
        state = control.state_dict()
    assert torch.autograd.backward is BACKWARD
    assert len(hooks(loop)) == 1  # the test's own
    assert (control.rate, control.lr, control.constant, control.metrics()) == before
    assert control.state_dict().keys() == state.keys()
    assert loop.optimizer.param_groups[0]["lr"] == control.lr
    control.detach()
    loop.run(last=1)
    assert loop.rates[-1] == [control.lr]
    with pytest.raises(ConfigurationError, match="was detached"):
        control.load_state_dict(state)
    held = weakref.ref(loop.net)
    del loop
    gc.collect()
    assert held() is None


def test_what_nobody_holds_is_freed_without_detaching():
    loop = Loop(OPTIMIZERS["SGD"])
    loop.run(last=3)
    network, control = weakref.ref(loop.net), weakref.ref(loop.control)
    del loop
    gc.collect()
    assert network() is None
    assert control() is None
    assert torch.autograd.backward is BACKWARD


def test_the_optimizer_keeps_an_attachment_that_nobody_holds():
    loop = Loop(OPTIMIZERS["SGD"])
    expected = Loop(OPTIMIZERS["SGD"]).run(last=5)[0]
    loop.metrics = None
    loop.control, loop.step = None, lambda: (loop.optimizer.step(), loop.optimizer.zero_grad())
    gc.collect()
    assert loop.run(last=5)[0] == expected


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_closure_gives_the_same_numbers(optimizer):
    class Closures(Loop):
        def backward(self, batch):
            self.batch = batch

        def step(self):
            def closure():
                self.optimizer.zero_grad()
                loss = self.loss(self.net(self.batch[0]), self.batch[1])
                loss.backward()
                return loss

            self.optimizer.step(closure)
            self.metrics.append(self.control.metrics())

    assert_same(Closures(OPTIMIZERS[optimizer]).run(), Loop(OPTIMIZERS[optimizer]).run())


def test_lbfgs_evaluates_its_closure_several_times_in_a_step():
    net = network()
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1, line_search_fn="strong_wolfe")
    with pytest.raises(ConfigurationError, match="LBFGS sets the length of its steps itself"):
        attach(net, optimizer)
    control = attach(net, optimizer, rule="bounded", schedule="none", notify=lambda message: None)
    inputs, targets = next(iter(loader()))
    losses = []

    def closure():
        optimizer.zero_grad()
        losses.append(F.cross_entropy(net(inputs), targets))
        losses[-1].backward()
        return losses[-1]

    for _ in range(3):
        optimizer.step(closure)
        assert optimizer.param_groups[0]["lr"] == control.lr > 0
    assert len(losses) > 30
    assert losses[-1] < losses[0]


# Copies


@pytest.mark.parametrize("how", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copied", "pickled"])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_a_copy_has_the_results_and_is_detached(how, steps, kind):
    net = network()
    optimizer = OPTIMIZERS[kind](net.parameters())
    control = attach(net, optimizer, notify=lambda message: None)
    batches = list(loader())
    for inputs, targets in batches[:steps]:
        F.cross_entropy(net(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    other = how(control)
    assert (other.lr, other.rate, other.constant, other.head_name) == (
        control.lr, control.rate, control.constant, control.head_name
    )  # fmt: skip
    assert other.metrics() == control.metrics()
    assert other.state_dict().keys() == control.state_dict().keys()
    assert other.state_dict()["step"] == steps
    with pytest.raises(ConfigurationError, match="was detached"):
        other.load_state_dict(control.state_dict())
    before = control.state_dict()["step"]
    other.detach()  # of which the first one knows nothing
    F.cross_entropy(net(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    assert control.state_dict()["step"] == before + 1


def test_a_network_with_an_optimizer_that_is_attached_can_be_saved():
    net = network()
    optimizer = OPTIMIZERS["AdamW"](net.parameters())
    control = attach(net, optimizer, notify=lambda message: None)
    inputs, targets = next(iter(loader()))
    for _ in range(2):
        F.cross_entropy(net(inputs), targets).backward()
        torch.save({"net": net, "optimizer": optimizer, "control": control}, file := io.BytesIO())
        file.seek(0)
        saved = torch.load(file, weights_only=False)
        assert torch.equal(saved["net"](inputs), net(inputs))
        assert saved["control"].lr == control.lr
        optimizer.step()
    assert control.lr > 0


# What is not as described


def test_more_backwards_than_described_are_an_error_in_the_first_step():
    loop = Loop(OPTIMIZERS["SGD"])
    for batch in loader(BATCH):
        loop.backward(batch)
        break
    loop.backward(batch)
    before = [p.detach().clone() for p in loop.net.parameters()]
    with pytest.raises(ConfigurationError, match="and found 2; pass accumulate_grad_batches= with"):
        loop.step()
    assert all(torch.equal(one, other) for one, other in zip(loop.net.parameters(), before, strict=True))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("backwards", [1, 3])
def test_gradients_that_were_set_to_zero_do_not_count(set_to_none, backwards):
    """As where a loop skips a batch, or looks for adversarial inputs."""
    loop, batches = Loop(OPTIMIZERS["AdamW"]), list(loader(BATCH))
    other = Loop(OPTIMIZERS["AdamW"])
    for _ in range(backwards):
        loop.backward(batches[0])
    loop.optimizer.zero_grad(set_to_none=set_to_none)
    for one in (loop, other):
        one.backward(batches[1])
        one.step()
    assert loop.control.constant == other.control.constant
    assert loop.control.state_dict()["step"] == 1
    assert loop.control.rate == pytest.approx(other.control.rate, rel=1e-6)


def test_what_could_not_attach_leaves_the_optimizer_as_it_was():
    net = nn.Sequential(nn.Unflatten(1, (WIDTH, 1)), nn.Conv1d(WIDTH, CLASSES, 3, padding=1), nn.Flatten())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    with pytest.raises(ConfigurationError, match="looked for a head"):
        attach(net, optimizer, bound="smooth")
    inputs, targets = next(iter(loader()))
    F.cross_entropy(net(inputs), targets).backward()
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    with attach(net, optimizer, notify=lambda message: None) as control:
        optimizer.zero_grad()
        F.cross_entropy(net(inputs), targets).backward()
        optimizer.step()
        assert control.metrics()["lipschitz/measured"] == 1


def test_a_scheduler_after_attach_is_an_error():
    loop = Loop(OPTIMIZERS["SGD"])
    halving(loop.optimizer)
    with pytest.raises(ConfigurationError, match="create the scheduler of an optimizer before attach"):
        loop.run()


def test_a_backward_that_was_not_seen_is_an_error():
    net = network()
    inputs, targets = next(iter(loader()))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    F.cross_entropy(net(inputs), targets).backward()
    with attach(net, optimizer, notify=lambda message: None):
        with pytest.raises(ConfigurationError, match=r"call attach before the first loss\.backward\(\)"):
            optimizer.step()
        optimizer.zero_grad()
        optimizer.step()  # without a gradient nothing moves


@pytest.mark.parametrize("name", ["total_steps", "epoch_steps", "accumulate_grad_batches"])
@pytest.mark.parametrize("value", [0, 1.5, "3"])
def test_numbers_of_steps_are_checked(name, value):
    net = network()
    with pytest.raises(ConfigurationError, match=rf"attach\({name}=.*expected a number of at least 1"):
        attach(net, torch.optim.SGD(net.parameters()), **{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bound": "strict", "norm": "spectral"}, "spectral"),
        ({"loss": "measured", "bound": "smooth"}, r"loss='measured', bound='smooth'"),
        ({"initial_lr": 1.0, "max_lr": 0.1}, r"initial_lr=1\.0"),
        ({"update": 0}, r"update=0"),
    ],
    ids=without_address,
)
def test_arguments_are_checked_as_those_of_the_callback(settings, message):
    net = network()
    with pytest.raises(ConfigurationError, match=message) as ours:
        attach(net, torch.optim.SGD(net.parameters()), **settings)
    with pytest.raises(ConfigurationError) as theirs:
        LipschitzLR(**settings)
    assert str(ours.value) == str(theirs.value)


def test_arguments_and_their_defaults_are_those_of_the_callback():
    callback, own = (inspect.signature(one).parameters for one in (LipschitzLR, attach))
    missing = set(callback) - set(own)
    assert missing == {"optimizers", "restore", "measure"}  # which belong to a Trainer, its checkpoints and its loader
    for name in set(callback) & set(own):
        assert callback[name].default == own[name].default


# Several optimizers


class Split(Classifier):
    """One loss, and an optimizer each for the hidden layer and for the head."""

    def __init__(self):
        super().__init__(net=network())
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self):
        return split_optimizers(self.net)


def split_optimizers(net):
    return [OPTIMIZERS["AdamW"](net[0].parameters()), OPTIMIZERS["SGD"](net[2].parameters())]


def test_two_optimizers_of_one_loss_have_the_numbers_of_the_callback():
    callback = LipschitzLR(optimizers=[0, 1], schedule="none")
    module = Split()
    trainer(callback, max_epochs=EPOCHS).fit(module, loader(BATCH))
    net = network()
    optimizers = split_optimizers(net)
    controls = [
        attach(
            net,
            optimizer,
            others=[other for other in optimizers if other is not optimizer],
            schedule="none",
            epoch_steps=BATCHES,
            name=str(i),
            notify=lambda message: None,
        )
        for i, optimizer in enumerate(optimizers)
    ]
    for _ in range(EPOCHS):
        for inputs, targets in loader(BATCH):
            for optimizer in optimizers:
                optimizer.zero_grad()
            F.cross_entropy(net(inputs), targets).backward()
            for optimizer in optimizers:
                optimizer.step()
    for i, control in enumerate(controls):
        assert control.metrics() == {
            f"lipschitz/{i}/{name}": value for name, value in callback.controllers[i].metrics().items()
        }
    for one, other in zip(net.parameters(), module.net.parameters(), strict=True):
        assert torch.equal(one, other)


class Adversary(Classifier):
    """A generator whose loss goes through a discriminator."""

    def __init__(self):
        super().__init__(net=networks())
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        adversarial_step(*self.net, *self.optimizers(), batch[0], self.manual_backward)

    def configure_optimizers(self):
        return [OPTIMIZERS["AdamW"](part.parameters()) for part in self.net]


def networks():
    torch.manual_seed(2)
    generator = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, WIDTH))
    return nn.ModuleList([generator, nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 1))])


def adversarial_step(generator, discriminator, by_generator, by_discriminator, inputs, backward):
    by_discriminator.zero_grad()
    fakes = generator(inputs.flip(0))
    judged = [discriminator(inputs), discriminator(fakes.detach())]
    real, fake = torch.ones_like(judged[0]), torch.zeros_like(judged[0])
    backward(F.binary_cross_entropy_with_logits(judged[0], real))
    backward(F.binary_cross_entropy_with_logits(judged[1], fake))
    by_discriminator.step()
    by_generator.zero_grad()
    backward(F.binary_cross_entropy_with_logits(discriminator(fakes), real))
    by_generator.step()


def test_a_generator_and_a_discriminator_have_the_numbers_of_the_callback():
    callback = LipschitzLR(optimizers=[0, 1], schedule="none")
    module = Adversary()
    trainer(callback, max_epochs=EPOCHS).fit(module, loader(BATCH))
    nets = networks()
    optimizers = [OPTIMIZERS["AdamW"](net.parameters()) for net in nets]
    controls = [
        attach(net, own, others=[other], schedule="none", epoch_steps=BATCHES, notify=lambda message: None)
        for net, own, other in zip(nets, optimizers, reversed(optimizers), strict=True)
    ]
    for _ in range(EPOCHS):
        for inputs, _ in loader(BATCH):
            adversarial_step(*nets, *optimizers, inputs, torch.Tensor.backward)
    for i, control in enumerate(controls):
        assert control.rate > 0
        assert control.controller.metrics() == callback.controllers[i].metrics()


def test_a_loss_of_two_networks_needs_the_other_optimizer():
    generator, discriminator = networks()
    control = attach(generator, OPTIMIZERS["AdamW"](generator.parameters()), notify=lambda message: None)
    loss = discriminator(generator(torch.ones(4, WIDTH))).square().mean()
    with pytest.raises(ConfigurationError, match="pass others= with the other optimizers of the loop"):
        loss.backward()
    control.detach()


def test_losses_of_other_networks_are_passed_over():
    alone = Loop(OPTIMIZERS["AdamW"]).run()
    loop, other = Loop(OPTIMIZERS["AdamW"]), network()
    backward = loop.backward

    def both(batch):
        F.cross_entropy(other(batch[0]), batch[1]).backward()
        backward(batch)
        inputs = batch[0].clone().requires_grad_()
        loss = F.cross_entropy(loop.net(inputs), batch[1])
        torch.autograd.grad(loss, list(loop.net.parameters()), retain_graph=True)
        torch.autograd.backward([loss], inputs=[inputs])

    loop.backward = both
    assert loop.run()[0] == alone[0]


def test_several_attachments_share_the_observed_backward():
    loops = [Loop(OPTIMIZERS["AdamW"]) for _ in range(3)]
    expected = Loop(OPTIMIZERS["AdamW"]).run()
    for loop in loops:
        assert loop.run()[0] == expected[0]
    for loop in loops[:2]:
        loop.control.detach()
    assert torch.autograd.backward is not BACKWARD
    loops[2].control.detach()


def test_threads_that_train_do_not_disturb_each_other():
    expected = Loop(OPTIMIZERS["AdamW"]).run()
    loops = [Loop(OPTIMIZERS["AdamW"]) for _ in range(8)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(Loop.run, loops))
    assert [one[0] for one in found] == [expected[0]] * 8


def test_a_one_cycle_scheduler_has_to_be_passed():
    for passed in (True, False):
        net = network()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)
        control = attach(net, optimizer, schedulers=[scheduler] if passed else [], notify=lambda message: None)
        inputs, targets = next(iter(loader(BATCH)))
        F.cross_entropy(net(inputs), targets).backward()
        if passed:
            optimizer.step()
            assert control.lr == pytest.approx(control.rate / 25)
        else:
            with pytest.raises(ConfigurationError, match=r"pass attach\(\.\.\., schedulers=\[scheduler\]\)"):
                optimizer.step()


@pytest.mark.parametrize("loss", [F.cross_entropy, lambda *batch: F.cross_entropy(*batch) + batch[0].square().mean()])
def test_two_optimizers_of_one_loss_step_in_any_order(loss):
    rates = []
    for order in ((0, 1), (1, 0)):
        net = network()
        first, rest = [net[0].weight], [net[0].bias, *net[2].parameters()]
        both = torch.optim.SGD(first, lr=0.1), torch.optim.AdamW(rest)
        controls = [
            attach(net, one, others=[other], name=name, total_steps=40, notify=lambda message: None)
            for one, other, name in ((*both, "matrices"), (*both[::-1], "rest"))
        ]
        for inputs, targets in loader(BATCH):
            for optimizer in both:
                optimizer.zero_grad()
            loss(net(inputs), targets).backward()
            for i in order:
                both[i].step()
        rates.append([control.rate for control in controls])
        assert all(0 < rate < 10 for rate in rates[-1])
    assert rates[0] == pytest.approx(rates[1], rel=1e-5)


def test_a_compiled_network_has_the_numbers_of_the_compiled_one_in_lightning():
    class Compiled(Scheduled):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.compiled = torch.compile(self.net, backend="aot_eager")

        def training_step(self, batch, batch_idx):
            return self.loss(self.compiled(batch[0]), batch[1])

    steps = Logged()
    trainer(LipschitzLR(), steps, max_epochs=EPOCHS).fit(
        Compiled(OPTIMIZERS["AdamW"], None, F.cross_entropy), loader(BATCH)
    )
    torch.compiler.reset()
    loop = Loop(OPTIMIZERS["AdamW"])
    compiled = torch.compile(loop.net, backend="aot_eager")
    loop.control.detach()
    loop.control = attach(
        compiled, loop.optimizer, total_steps=EPOCHS * BATCHES, epoch_steps=BATCHES, notify=lambda message: None
    )
    loop.net = compiled
    rates, metrics, _ = loop.run()
    assert loop.control.controller.head_name == "2"
    assert rates == steps.rates
    assert metrics == steps.metrics


def test_reentrant_checkpointing_makes_backwards_within_the_backward_of_the_loss():
    class Checkpointed(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.parts, self.reentrant = network(), reentrant

        def forward(self, inputs):
            hidden = checkpoint(self.parts[:2], inputs.requires_grad_(), use_reentrant=self.reentrant)
            return self.parts[2](hidden)

    rates = []
    for reentrant in (False, True):
        net = Checkpointed(reentrant)
        optimizer = OPTIMIZERS["AdamW"](net.parameters())
        with attach(net, optimizer, epoch_steps=6, notify=lambda message: None) as control:
            for inputs, targets in loader():
                optimizer.zero_grad()
                F.cross_entropy(net(inputs), targets).backward()
                optimizer.step()
            rates.append((control.lr, control.metrics()))
    assert rates[0] == rates[1]


def small(optimizer=torch.optim.SGD):
    torch.manual_seed(0)
    net = network()
    return net, optimizer(net.parameters(), lr=1.0)


def train_steps(net, optimizer, count, accumulated=1):
    for batch, targets in list(loader(BATCH, count=BATCH * accumulated))[:1] * count:
        optimizer.zero_grad()
        for part, labels in zip(batch.chunk(accumulated), targets.chunk(accumulated), strict=True):
            F.cross_entropy(net(part), labels).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("made", "told"), [([2] * 4, 1), ([3, 3, 2, 3, 2, 3], 0), ([2, 2, 3, 2, 2], 1), ([2, 1, 2, 1], 0)]
)
def test_fewer_backward_passes_than_accumulated_are_reported(made, told):
    net, optimizer = small()
    messages = []
    control = attach(net, optimizer, accumulate_grad_batches=3, notify=messages.append)
    for accumulated in made:
        train_steps(net, optimizer, 1, accumulated)
    found = [message for message in messages if "found 2 twice in a row" in message]
    assert len(found) == told
    assert all("pass accumulate_grad_batches=2 if" in message for message in found)
    control.detach()


def test_steps_beyond_the_length_are_reported_once():
    net, optimizer = small()
    messages = []
    control = attach(net, optimizer, total_steps=3, notify=messages.append)
    train_steps(net, optimizer, 3)
    assert not any("total_steps=3" in message for message in messages)
    train_steps(net, optimizer, 4)
    (message,) = (one for one in messages if "total_steps=3" in one)
    assert "such as epochs * len(loader)" in message
    control.detach()


@pytest.mark.parametrize("saved", [2, 5])
def test_a_run_that_is_resumed_beyond_its_length_reports_it(saved):
    net, optimizer = small()
    with attach(net, optimizer, total_steps=10, notify=lambda message: None) as control:
        train_steps(net, optimizer, saved)
        state = control.state_dict()
    messages = []
    with attach(net, optimizer, total_steps=3, notify=messages.append) as control:
        control.load_state_dict(state)
        train_steps(net, optimizer, 1)
    assert any("the run makes more" in message for message in messages) == (saved == 5)


def test_without_a_decay_more_steps_are_no_mistake():
    net, optimizer = small()
    messages = []
    with attach(net, optimizer, total_steps=3, schedule="none", notify=messages.append):
        train_steps(net, optimizer, 5)
    assert not any("total_steps" in message for message in messages)


def test_a_frozen_model_may_have_other_parameters_trained():
    net, _ = small()
    net.requires_grad_(False)
    prompt = nn.Parameter(torch.zeros(WIDTH))
    optimizer = torch.optim.SGD([prompt], lr=1.0)
    with attach(net, optimizer, notify=lambda message: None) as control:
        (batch, targets), *_ = loader(BATCH)
        F.cross_entropy(net(batch + prompt), targets).backward()
        optimizer.step()
    assert control.rate > 0


def test_a_model_that_the_optimizer_does_not_train_is_refused():
    _, optimizer = small()
    with pytest.raises(ConfigurationError, match="found none of them in this Linear"):
        attach(nn.Linear(WIDTH, CLASSES), optimizer)


def test_a_single_scheduler_is_a_list_of_one():
    rates = []
    for wrapped in (False, True):
        net, optimizer = small()
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=10)
        schedulers = [scheduler] if wrapped else scheduler
        with attach(net, optimizer, schedulers=schedulers, notify=lambda message: None) as control:
            train_steps(net, optimizer, 1)
            rates.append(control.lr)
    assert rates[0] == rates[1] > 0


def test_what_is_no_gradscaler_is_refused():
    net, optimizer = small()
    with pytest.raises(ConfigurationError, match=r"attach\(grad_scaler=True\) expected the torch.amp.GradScaler"):
        attach(net, optimizer, grad_scaler=True)


def test_a_model_that_is_its_own_output_layer_has_a_name():
    torch.manual_seed(0)
    net = nn.Linear(WIDTH, CLASSES)
    optimizer, messages = torch.optim.SGD(net.parameters(), lr=1.0), []
    with attach(net, optimizer, notify=messages.append):
        train_steps(net, optimizer, 1)
    assert any("output layers the model itself; cross_entropy" in message for message in messages)
