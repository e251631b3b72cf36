"""ImageClassifier: its metrics, schedulers and predictions, compiled networks, and resuming bit for bit."""

from functools import partial

import lightning as L
import pytest
import torch
from helpers import Steps, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode

from lit_lipschitz import (
    MLP,
    ConfigurationError,
    DigitsDataModule,
    ImageClassifier,
    LinearWarmupDecay,
    LipschitzLR,
    ResNetV1,
)
from lit_lipschitz.control.results import Results
from lit_lipschitz.data import DeviceLoader
from lit_lipschitz.measurement import nonfinite


def test_logged_losses_and_accuracies_are_those_of_the_whole_set():
    module, data = ImageClassifier(MLP()), DigitsDataModule(batch_size=100)
    run = trainer(max_epochs=1)
    run.fit(module, datamodule=data)
    logged = dict(run.callback_metrics)
    (test,) = run.test(module, datamodule=data, verbose=False)
    module.eval()
    for stage, loader, values in (("val", data.val_dataloader(), logged), ("test", data.test_dataloader(), test)):
        images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
        with torch.no_grad():
            logits = module(images)
        assert float(values[f"{stage}_loss"]) == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
        correct = (logits.argmax(1) == labels).double().mean().item()
        assert float(values[f"{stage}_acc"]) == pytest.approx(correct, rel=1e-5)
    assert {"train_loss", "train_acc"} <= set(logged)


def test_training_means_are_those_of_each_epoch_alone():
    data = DigitsDataModule(batch_size=100, val_split=0.0, augment=False)
    module = ImageClassifier(MLP(), optimizer=partial(torch.optim.SGD, lr=0.0))  # all epochs see the same weights
    seen = []

    class Reads(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    # 14 batches an epoch; the third one is cut short by the end of the run.
    trainer(Reads(), max_steps=33, max_epochs=-1).fit(module, datamodule=data)
    expected = []
    for epoch, batches in ((0, 14), (1, 14), (2, 5)):
        loader = data.train_dataloader()
        loader.epoch = lambda epoch=epoch: epoch
        images, labels = (torch.cat(parts) for parts in zip(*list(loader)[:batches], strict=True))
        with torch.no_grad():
            logits = module(images)
        loss, accuracy = F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).double().mean().item()
        expected.append(pytest.approx({"train_loss": loss, "train_acc": accuracy}, rel=1e-5))
    assert seen == expected


def test_a_module_that_is_trained_again_logs_again_and_of_that_run_alone():
    data = DigitsDataModule(batch_size=100, val_split=0.0, augment=False)
    module = ImageClassifier(MLP(), optimizer=partial(torch.optim.SGD, lr=0.0))
    found = []

    class Stops(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("stopped in mid-epoch")

    with pytest.raises(RuntimeError, match="mid-epoch"):
        trainer(Stops(), max_epochs=1).fit(module, datamodule=data)
    for _ in range(2):
        run = trainer(max_epochs=1)
        run.fit(module, datamodule=data)
        found.append({name: float(value) for name, value in run.callback_metrics.items()})
    assert set(found[0]) == {"train_loss", "train_acc"}
    fresh = ImageClassifier(MLP(), optimizer=partial(torch.optim.SGD, lr=0.0))
    fresh.load_state_dict(module.state_dict())
    (run := trainer(max_epochs=1)).fit(fresh, datamodule=data)
    expected = {name: float(value) for name, value in run.callback_metrics.items()}
    assert found == [pytest.approx(expected, rel=1e-6)] * 2


class LastLoss(L.Callback):
    """Keeps the training loss of the last epoch."""

    def on_train_end(self, trainer, pl_module):
        self.loss = float(trainer.callback_metrics["train_loss"])


def random_batches():
    images = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return DeviceLoader(images, torch.arange(64) % 10, 16, lambda batch, _: batch, shuffle=True)


def train_as(**settings):
    torch.manual_seed(0)
    module = ImageClassifier(ResNetV1(depth=8), **settings)
    rates, loss = Steps(), LastLoss()
    trainer(LipschitzLR(schedule="none"), rates, loss, max_epochs=2).fit(module, random_batches())
    return [rate for (rate,) in rates.rates], loss.loss, module.state_dict()


def test_channels_last_is_the_same_training():
    (rates, loss, weights), (other_rates, other_loss, other_weights) = (
        train_as(channels_last=channels_last) for channels_last in (False, True)
    )
    assert other_rates == pytest.approx(rates, rel=1e-3)
    assert other_loss == pytest.approx(loss, rel=1e-3)
    kernels = [tensor for tensor in other_weights.values() if tensor.ndim == 4 and tensor.shape[1] > 1]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    assert weights.keys() == other_weights.keys()


def test_a_network_is_measured_whose_class_was_compiled_before_without_the_callback(monkeypatch, caplog):
    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: torch_compile(function, backend="aot_eager"))
    alone = train_as(compile="default")
    assert "one of its class, has already been run" not in caplog.text
    trainer(max_epochs=1).fit(ImageClassifier(ResNetV1(depth=8), compile="default"), random_batches())
    assert train_as(compile="default")[:2] == alone[:2]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_network_trains_alike_and_its_checkpoints_fit(monkeypatch, backend):
    compiled = []

    def counted(function, **settings):
        compiled.append(settings)
        return torch_compile(function, backend=backend)

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", counted)
    (rates, loss, weights), (other_rates, other_loss, other_weights) = (
        train_as(compile=mode) for mode in (None, "default")
    )
    assert compiled == [{"mode": "default"}]
    assert other_rates == pytest.approx(rates, rel=1e-3)
    assert other_loss == pytest.approx(loss, rel=1e-3)
    assert weights.keys() == other_weights.keys()


class Waits(TorchDispatchMode):
    """Counts the operations for whose result the host has to wait for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and not isinstance(args[0], torch.Tensor):
            return args[0]  # a number of the host
        self.count += func.__name__.partition(".")[0] in ("_local_scalar_dense", "nonzero", "equal", "masked_select")
        return func(*args, **(kwargs or {}))


def test_no_step_between_updates_waits_for_the_device(monkeypatch):
    monkeypatch.setattr(nonfinite, "is_on_host", lambda _: False)
    waits, per_step = Waits(), []
    tolist = torch.Tensor.tolist  # which is no operation on a CPU

    def counted(tensor):
        waits.count += 1
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)

    class Count(L.Callback):
        def on_train_batch_start(self, *_):
            self.before = waits.count

        def on_train_batch_end(self, *_):
            per_step.append(waits.count - self.before)

    data = DigitsDataModule(batch_size=100, val_split=0.0)
    module = ImageClassifier(MLP(dropout=0.1), scheduler=LinearWarmupDecay)
    with waits:
        trainer(LipschitzLR(), Count(), max_epochs=3).fit(module, datamodule=data)
    assert len(per_step) == 3 * 14
    assert per_step[0] > 0
    # Steps 15 and 29 are the first of an epoch, 19, 24 and 37 are due, and 28 and 42 end an epoch.
    waiting = [step for step, count in enumerate(per_step, start=1) if count]
    assert [step for step in waiting if step > 14] == [15, 19, 24, 28, 29, 37, 42]


@pytest.mark.parametrize(
    ("scheduler", "total_steps"),
    [
        (LinearWarmupDecay, 20),
        (partial(LinearWarmupDecay, warmup=0.5), 20),
        (partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=None), 20),
        (partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=80), 80),
        (partial(lr_scheduler.StepLR, step_size=1), None),
    ],
)
def test_a_scheduler_that_lacks_the_length_of_the_run_is_given_it(scheduler, total_steps):
    module = ImageClassifier(MLP(), scheduler=scheduler)
    run = trainer(callback := LipschitzLR(), max_epochs=2)
    run.fit(module, datamodule=DigitsDataModule(batch_size=128))
    (config,) = run.lr_scheduler_configs
    assert config.interval == ("step" if total_steps else "epoch")
    assert config.scheduler.last_epoch == (run.global_step if total_steps else 2)
    assert getattr(config.scheduler, "total_steps", None) in (total_steps, None)
    assert (callback.lr <= 0.1 * callback.rate) == (total_steps == 20 or total_steps is None)


def test_predictions_are_probabilities():
    module = ImageClassifier(MLP())
    batches = trainer().predict(module, datamodule=DigitsDataModule(batch_size=128))
    assert [len(batch) for batch in batches] == [128, 128, 104]
    torch.testing.assert_close(torch.cat(batches).sum(dim=1), torch.ones(360))


def test_label_smoothing_is_part_of_the_training_loss_only():
    smooth, plain = (trainer(max_epochs=1, limit_train_batches=1) for _ in range(2))
    network = MLP()
    for run, smoothing in ((smooth, 0.3), (plain, 0.0)):
        copy = MLP()
        copy.load_state_dict(network.state_dict())
        module = ImageClassifier(copy, partial(torch.optim.SGD, lr=0.0), label_smoothing=smoothing)
        run.fit(module, datamodule=DigitsDataModule())
    assert smooth.callback_metrics["train_loss"] != plain.callback_metrics["train_loss"]
    assert smooth.callback_metrics["val_loss"] == plain.callback_metrics["val_loss"]


@pytest.mark.parametrize("stop", [1, 2])
def test_dropout_and_augmentation_resume_bit_for_bit(stop):
    def run(max_epochs, more=(), **settings):
        torch.manual_seed(7)
        module = ImageClassifier(MLP(dropout=0.3), scheduler=partial(lr_scheduler.ExponentialLR, gamma=0.9))
        run = trainer(LipschitzLR(), steps := Steps(), *more, max_epochs=max_epochs)
        run.fit(module, datamodule=DigitsDataModule(batch_size=64), **settings)
        return run, steps.rates, [p.detach().clone() for p in module.parameters()]

    _, all_rates, expected = run(3)
    stopped, _, _ = run(stop)
    stopped.save_checkpoint("stopped.ckpt")
    torch.manual_seed(99)
    _, rates, weights = run(3, ckpt_path="stopped.ckpt", weights_only=True)
    assert rates == all_rates[20 * stop :]
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def test_a_checkpoint_from_mid_epoch_resumes_bit_for_bit():
    def run(max_steps, **settings):
        torch.manual_seed(7)
        module = ImageClassifier(MLP(dropout=0.3), scheduler=partial(lr_scheduler.ExponentialLR, gamma=0.9))
        save = ModelCheckpoint(".", filename=f"at{max_steps}", every_n_train_steps=max_steps, save_top_k=-1)
        run = trainer(LipschitzLR(), steps := Steps(), save, enable_checkpointing=True, max_epochs=-1,
                      max_steps=max_steps)  # fmt: skip
        run.fit(module, datamodule=DigitsDataModule(batch_size=64), **settings)
        return steps.rates, [p.detach().clone() for p in module.parameters()]

    all_rates, expected = run(50)
    for stopped in (13, 33):
        run(stopped)
        rates, weights = run(50, ckpt_path=f"at{stopped}.ckpt", weights_only=True)
        assert rates == all_rates[stopped:]
        assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (MLP(num_classes=5), r"outputs of shape \(2, 5\) from 2 images, and the data have 10 classes"),
        (MLP((3, 8, 8)), r"takes no images of shape \(1, 8, 8\)"),
        (nn.Identity(), "expected \\(2, 10\\)"),
    ],
)
def test_a_network_that_does_not_fit_the_data_is_refused(network, message):
    with pytest.raises(ConfigurationError, match=message):
        ImageClassifier(network).check((1, 8, 8), 10)


def test_checking_a_network_changes_nothing():
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(), nn.Linear(64, 12))
    network[1].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    ImageClassifier(network).check((1, 8, 8), 10)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in network.modules()] == [True, True, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_any_network_and_optimizer():
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
    network(torch.randn(1, 1, 8, 8))
    module = ImageClassifier(network, partial(torch.optim.SGD, lr=1.0, momentum=0.9, nesterov=True))
    run = trainer(LipschitzLR(), max_epochs=3)
    run.fit(module, datamodule=DigitsDataModule(batch_size=32))
    assert run.callback_metrics["val_acc"] > 0.8


def test_weight_decay_for_the_parameters_that_are_named():
    module = ImageClassifier(
        MLP(hidden=(4,)), partial(torch.optim.SGD, lr=0.5, weight_decay=0.1), decayed=["features.1.*", "*head.weight"]
    )
    run = trainer(Steps(), max_epochs=1, limit_train_batches=1)
    before = {name: p.detach().clone() for name, p in module.network.named_parameters()}
    gradients = {}
    module.on_before_optimizer_step = lambda _: gradients.update(
        {name: p.grad.clone() for name, p in module.network.named_parameters()}
    )
    run.fit(module, datamodule=DigitsDataModule())
    for name, parameter in module.network.named_parameters():
        decay = 0.0 if name == "head.bias" else 0.1
        torch.testing.assert_close(parameter, before[name] - 0.5 * (gradients[name] + decay * before[name]))


def test_a_pattern_that_fits_no_parameter_is_refused():
    module = ImageClassifier(MLP(), decayed=["*conv*.weight"])
    with pytest.raises(
        ConfigurationError, match=r"no parameter of MLP fits '\*conv\*\.weight'; they are called features"
    ):
        trainer().fit(module, datamodule=DigitsDataModule())


def test_clipped_probabilities_are_keras_loss():
    """By Keras' definition: the clipped probability's negative logarithm, so no gradient beyond."""
    images, labels = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 4, 5])
    network = MLP(hidden=())
    with torch.no_grad():
        network.head.weight.mul_(400)  # sure of itself, mostly wrong
    module = ImageClassifier(network, clip_probabilities=1e-3)
    module.log_dict = lambda *_, **__: None
    loss = module.training_step((images, labels), 0)
    logits = network(images).detach().requires_grad_()
    reference = -logits.softmax(dim=1).clamp(1e-3, 1 - 1e-3)[range(6), labels].log().mean()
    torch.testing.assert_close(loss, reference)
    loss.backward()
    (slope,) = torch.autograd.grad(reference, logits)
    torch.testing.assert_close(network.head.weight.grad, slope.T @ images.flatten(1))
    assert (slope == 0).all(dim=1).any()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"clip_probabilities": 0.5}, "clip_probabilities=0.5: expected a number from 0 to below 0.5"),
        ({"clip_probabilities": -1e-7}, "clip_probabilities=-1e-07"),
        ({"clip_probabilities": 1e-7, "label_smoothing": 0.1}, "expected one of them to be 0"),
    ],
)
def test_clipping_out_of_its_range_is_named(settings, named):
    with pytest.raises(ConfigurationError, match=named):
        ImageClassifier(MLP(), **settings)


def test_a_complete_run_that_is_resumed_with_more_epochs_goes_on_by_the_new_length():
    factors = []

    class Watch(L.Callback):
        def on_train_batch_end(self, *_):
            factors.append(Results.of(callback.controllers[0]).factor)

    data = DigitsDataModule(batch_size=100, val_split=0.0, augment=False)
    for epochs, path in ((2, None), (6, "complete.ckpt")):
        factors.clear()
        callback = LipschitzLR()
        run = trainer(callback, Watch(), max_epochs=epochs)
        run.fit(ImageClassifier(MLP(), scheduler=LinearWarmupDecay), datamodule=data, ckpt_path=path)
        run.save_checkpoint("complete.ckpt")
    # 28 of 84 steps are made, and 8.4 are the warm-up.
    assert factors == pytest.approx([(84 - step) / (84 - 8.4) for step in range(28, 84)])
