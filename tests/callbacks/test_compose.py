"""The callback beside what Lightning and torch offer: schedulers, precisions, wrappers, other callbacks."""

import copy
import math

import lightning as L
import pytest
import torch
from helpers import CLASSES, SCHEDULERS, WIDTH, Classifier, Curves, Steps, examples, loader, trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.nn import functional as F
from torch.optim import swa_utils
from torch.optim.lr_scheduler import ConstantLR

from lit_lipschitz import ConfigurationError, LipschitzLR

STEPS_AN_EPOCH = 6


class Recorder(Steps):
    """Records the callback's rate behind each step as well."""

    def __init__(self, lipschitz):
        super().__init__()
        self.lipschitz, self.own = lipschitz, []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.own.append(self.lipschitz.rate)


def fit(module=None, *more, lipschitz=None, data=None, **settings):
    """Trains, and returns the module, the rates that the steps used and the callback's own."""
    torch.manual_seed(1)
    module = Classifier() if module is None else module
    lipschitz = lipschitz or LipschitzLR(schedule="none")
    recorder = Recorder(lipschitz)
    run = trainer(lipschitz, recorder, *more, **settings)
    run.fit(module, data or loader(), loader())
    return module, [rate for (rate, *_) in recorder.rates], recorder.own


# -- schedulers --------------------------------------------------------------------------------------------------------


class Scheduled(Classifier):
    def __init__(self, make, interval, monitor=None):
        super().__init__()
        self.make_scheduler, self.interval, self.monitor = make, interval, monitor

    def training_step(self, batch, batch_idx):
        self.log("steady", 1.0)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = {"scheduler": self.make_scheduler(optimizer), "interval": self.interval, "monitor": "steady"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("name", [*SCHEDULERS, "SWALR"])
def test_a_rate_is_the_callbacks_times_the_schedulers_factor(name, interval):
    swa = (lambda optimizer: swa_utils.SWALR(optimizer, swa_lr=0.02, anneal_epochs=4), 0.1)
    make, reference = SCHEDULERS.get(name, swa)
    _, rates, own = fit(Scheduled(make, interval), lipschitz=LipschitzLR(schedule="none", update=2), max_epochs=2)
    alone = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = make(alone)
    expected = []
    for step in range(2 * STEPS_AN_EPOCH):
        expected.append(own[step] * alone.param_groups[0]["lr"] / reference)
        alone.step()
        if interval == "step" or step == STEPS_AN_EPOCH - 1:
            scheduler.step()
    assert len(set(own)) > 4
    assert rates == pytest.approx(expected, rel=1e-12)


def test_a_plateau_is_a_factor():
    def make(optimizer):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)

    _, rates, own = fit(Scheduled(make, "epoch"), max_epochs=3)
    factors = [1.0] * 12 + [0.5] * 6  # of a loss that stays the same, the second value is the first that is no better
    assert rates == pytest.approx([rate * factor for rate, factor in zip(own, factors, strict=True)], rel=1e-12)


# -- precision, accumulation, clipping ---------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-true", "64-true"])
def test_a_precision_gives_the_rate_of_single_precision(precision):
    _, expected, _ = fit()
    _, rates, _ = fit(precision=precision)
    assert rates == pytest.approx(expected, rel=5e-2)


class Overflowing(Classifier):
    """The third batch has a gradient that fp16 does not hold; the schedule halves the rate."""

    def __init__(self, scheduled):
        super().__init__()
        self.scheduled = scheduled

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return ([optimizer], [ConstantLR(optimizer, 0.5, 100)]) if self.scheduled else optimizer

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 2:
            self.net[0].weight.register_hook(lambda gradient: gradient * math.inf)
        elif batch_idx == 3:
            self.net[0].weight._backward_hooks.clear()
        return loss


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_scaler_that_skips_a_step_changes_neither_weights_nor_schedule(scheduled):
    seen = {}

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen[batch_idx] = (copy.deepcopy(pl_module.state_dict()), trainer.optimizers[0].param_groups[0]["lr"])

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    _, rates, own = fit(Overflowing(scheduled), Watch(), plugins=plugin, max_epochs=1)
    assert scaler.get_scale() == 2.0**9
    assert len(rates) == STEPS_AN_EPOCH - 1
    assert all(torch.equal(a, b) for a, b in zip(seen[2][0].values(), seen[3][0].values(), strict=True))
    assert not torch.equal(seen[3][0]["net.0.weight"], seen[4][0]["net.0.weight"])
    if scheduled:
        assert {lr for _, lr in seen.values()} == {0.05}
    factor = 0.5 if scheduled else 1.0
    assert rates == pytest.approx([factor * rate for i, rate in enumerate(own) if i != 2])


def test_clipping_leaves_the_rate_alone():
    _, expected, _ = fit(max_steps=1)
    _, rates, _ = fit(max_steps=1, gradient_clip_val=1e-3)
    assert rates == expected


def test_accumulation_that_changes_while_training():
    schedule = GradientAccumulationScheduler({0: 1, 1: 3})
    _, rates, _ = fit(None, schedule, lipschitz=LipschitzLR(schedule="none", norm="sample"), max_epochs=3)
    assert len(rates) == 6 + 2 + 2


# -- wrappers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["module", "body", "head", "network"])
def test_compiled_networks_have_the_rate_of_eager_ones(part):
    _, expected, _ = fit(max_epochs=1)
    torch.manual_seed(1)
    module = Classifier()
    if part == "network":
        module.net = torch.compile(module.net, backend="aot_eager")
    elif part == "module":
        module = torch.compile(module, backend="aot_eager")
    else:
        i = 0 if part == "body" else 2
        module.net[i] = torch.compile(module.net[i], backend="aot_eager")
    lipschitz = LipschitzLR(schedule="none")
    if part == "module":  # the loss is made inside
        with pytest.raises(ConfigurationError, match="a compiled function, which hides it"):
            fit(module, lipschitz=LipschitzLR(schedule="none", norm="sample"))
        lipschitz = LipschitzLR(schedule="none", loss="cross_entropy")
    _, rates, _ = fit(module, lipschitz=lipschitz, max_epochs=1)
    assert rates == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("checkpointed", ["body", "all"])
def test_activation_checkpointing_measures_once(checkpointed):
    class Checkpointed(Classifier):
        def training_step(self, batch, batch_idx):
            part = self.net if checkpointed == "all" else self.net[:-1]
            outputs = torch.utils.checkpoint.checkpoint(part, batch[0], use_reentrant=False)
            return F.cross_entropy(outputs if checkpointed == "all" else self.net[-1](outputs), batch[1])

    _, expected, _ = fit()
    torch.manual_seed(1)
    assert fit(Checkpointed())[1] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("first", [True, False])
def test_a_monitor_of_the_rate_in_either_order(first):
    lipschitz, monitor, curves = LipschitzLR(schedule="none"), LearningRateMonitor("step"), Curves()
    torch.manual_seed(1)
    callbacks = [monitor, lipschitz] if first else [lipschitz, monitor]
    trainer(*callbacks, logger=curves, log_every_n_steps=1).fit(Classifier(), loader())
    seen = [row["lr-SGD"] for _, row in curves.everything if "lr-SGD" in row]
    assert len(seen) == 12
    # It logs before a step, so it shows what the step before has left.
    own = [row["lipschitz/lr"] for _, row in curves.everything if "lipschitz/lr" in row]
    assert seen[1:] == pytest.approx(own[:-1])


@pytest.mark.parametrize("make", [EMAWeightAveraging, WeightAveraging])
def test_averaged_weights_do_not_disturb(make):
    _, expected, _ = fit()
    _, rates, _ = fit(None, make())
    assert rates == expected


@pytest.mark.parametrize("interval", [None, "epoch"])
def test_stochastic_weight_averagings_rates_are_relative_to_the_configured_one(interval, caplog):
    module = Classifier() if interval is None else Scheduled(SCHEDULERS["ConstantLR"][0], interval)
    averaging = StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=2, annealing_epochs=2)
    with caplog.at_level("INFO"):
        _, rates, own = fit(module, averaging, lipschitz=LipschitzLR(), max_epochs=5)
    assert ("StochasticWeightAveraging changes the learning rate itself" in caplog.text) == (interval is None)
    factors = [rate / base for rate, base in zip(rates, own, strict=True)]
    before = [1.0 if interval is None else 0.3] * 6
    assert factors[:6] == pytest.approx(before)
    assert len(factors) == 5 * STEPS_AN_EPOCH
    assert factors[-1] == pytest.approx(0.2)
    assert sorted(factors[12:], reverse=True) == pytest.approx(factors[12:])


def test_a_search_for_a_rate_is_refused():
    with pytest.raises(ConfigurationError, match="LearningRateFinder .* remove one of the two"):
        fit(None, LearningRateFinder())
    run = trainer(LipschitzLR(schedule="none"))
    module = Classifier()
    module.lr = 0.1
    with pytest.raises(ConfigurationError, match="LearningRateFinder"):
        Tuner(run).lr_find(module, loader())


def test_a_search_for_a_batch_size_comes_before():
    class Sized(Classifier):
        batch_size = 4

        def train_dataloader(self):
            return loader(self.batch_size)

        def val_dataloader(self):
            return loader(self.batch_size)

    rates = []
    for search in ([BatchSizeFinder(max_trials=2, steps_per_trial=2)], []):
        torch.manual_seed(1)
        module, steps = Sized(), Steps()
        trainer(LipschitzLR(schedule="none"), steps, *search).fit(module)
        assert module.batch_size == 4
        rates.append(steps.rates[-48:])
    assert rates[0] == rates[1]


def test_early_stopping_and_checkpoints_do_their_work(tmp_path):
    stop = EarlyStopping("val_loss", patience=1, min_delta=10.0)
    keep = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=1)
    lipschitz = LipschitzLR(schedule="none")
    _, rates, _ = fit(None, stop, keep, lipschitz=lipschitz, max_epochs=9, enable_checkpointing=True)
    assert len(rates) == 2 * STEPS_AN_EPOCH
    assert (tmp_path / keep.best_model_path).is_file()


def test_pruning_does_not_disturb():
    _, rates, own = fit(None, ModelPruning("l1_unstructured", amount=0.2), max_epochs=2)
    assert rates == own


class Finetuned(Classifier):
    """A backbone that is frozen at first, and a head."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU()), nn.Linear(16, CLASSES)
        self.net = nn.Sequential(self.backbone, self.head)

    def configure_optimizers(self):
        return torch.optim.SGD((p for p in self.head.parameters()), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("bound", ["strict", "paper"])
def test_a_backbone_that_thaws_keeps_its_ratio(bound):
    lipschitz = LipschitzLR(schedule="none", bound=bound)
    steps = Steps()
    # Twice as fast each epoch from a hundredth of the head's rate on, up to that.
    thaw = BackboneFinetuning(1, lambda epoch: 2.0, backbone_initial_ratio_lr=0.01, should_align=True)
    torch.manual_seed(1)
    trainer(lipschitz, steps, thaw, max_epochs=4).fit(Finetuned(), loader())
    groups = [len(rates) for rates in steps.rates]
    assert groups == [1] * 6 + [2] * 18
    # It goes by the head's rate when it thaws, the one that the step before has left, and doubles that.
    at_the_thaw = steps.rates[5][0]
    for step, factor in ((6, 0.01), (12, 0.02), (18, 0.04)):
        head, backbone = steps.rates[step]
        assert backbone / head == pytest.approx(factor * at_the_thaw / steps.rates[step - 1][0])


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_backbone_that_thaws_goes_on_thawing_after_a_resume(epochs):
    def run(max_epochs, ckpt_path=None):
        torch.manual_seed(1)
        thaw = BackboneFinetuning(1, lambda epoch: 2.0, backbone_initial_ratio_lr=0.01)
        fitted = trainer(LipschitzLR(schedule="none"), steps := Steps(), thaw, max_epochs=max_epochs)
        fitted.fit(Finetuned(), loader(), ckpt_path=ckpt_path)
        return fitted, [rates[-1] / rates[0] for rates in steps.rates]  # of the backbone over the head

    _, whole = run(4)
    fitted, _ = run(epochs)
    fitted.save_checkpoint("part.ckpt")
    _, rest = run(4, "part.ckpt")
    assert rest == pytest.approx(whole[6 * epochs :])


# -- measure only ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"bound": "smooth"}, {"bound": "paper", "measure": "pass"}], ids=str)
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_dry_run_trains_as_without_the_callback(settings, scheduled):
    class Dropping(Classifier):
        def __init__(self):
            super().__init__(net=nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, CLASSES)))

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
            return ([optimizer], [cosine]) if scheduled else optimizer

    lipschitz = LipschitzLR(schedule="none", dry_run=True, **{"rule": "inverse", **settings})
    weights = []
    for callbacks in ([], [lipschitz]):
        torch.manual_seed(1)
        module, steps = Dropping(), Steps()
        trainer(*callbacks, steps, max_epochs=3, gradient_clip_val=0.5).fit(module, loader(), loader())
        weights.append(copy.deepcopy(module.state_dict()))
        assert steps.rates[0] == [0.05]
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values(), strict=True))
    assert lipschitz.rate == pytest.approx(1 / lipschitz.constant)
    assert lipschitz.lr != 0.05


def test_the_examples_are_those_of_the_other_tests():
    assert len(examples()) // 16 == STEPS_AN_EPOCH
