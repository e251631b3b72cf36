"""AveragedWeights: which weights and BatchNorm statistics of Schedule-Free optimizers are evaluated and saved."""

import copy
import warnings
from itertools import islice

import lightning as L
import pytest
import torch
from helpers import CLASSES, WIDTH, Classifier, examples, loader, trainer, two_ranks
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.tuner import Tuner
from schedulefree import AdamWScheduleFree, RAdamScheduleFree, SGDScheduleFree
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

from lit_lipschitz import MLP, AveragedWeights, DigitsDataModule, ImageClassifier, LipschitzLR
from lit_lipschitz.callbacks import averaged_weights
from lit_lipschitz.data import DeviceLoader

KEY = averaged_weights.KEY


class Evaluated(Classifier):
    """Somebody's own module, with a test loop."""

    def test_step(self, batch, batch_idx):
        self.log("test_loss", F.cross_entropy(self.net(batch[0]), batch[1]))


def free(parameters):
    return AdamWScheduleFree(parameters, lr=0.05)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


KINDS = {
    "ImageClassifier": lambda network, optimizer=AdamWScheduleFree: ImageClassifier(network, optimizer=optimizer),
    "own module": lambda network, optimizer=AdamWScheduleFree: Evaluated(optimizer, network),
}
RESUMABLE_DROPOUT = {"ImageClassifier": 0.5, "own module": 0.0}  # the ImageClassifier seeds its random numbers
each_kind = pytest.mark.parametrize("kind", KINDS)


def network_of(module):
    return module.network if isinstance(module, ImageClassifier) else module.net


def load(kind, path, network):
    """A module by load_from_checkpoint, which calls no callbacks."""
    if kind == "ImageClassifier":
        return ImageClassifier.load_from_checkpoint(path, network=network, weights_only=False)
    return Evaluated.load_from_checkpoint(path, net=network, weights_only=False)


@each_kind
def test_the_averaged_weights_are_evaluated_and_saved_and_training_continues_at_its_own(tmp_path, kind):
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    data = DigitsDataModule(batch_size=64, augment=False)
    module = KINDS[kind](MLP(hidden=(16,)))
    keep = ModelCheckpoint(tmp_path, save_last=True)
    run = trainer(LipschitzLR(), keep, max_epochs=2, enable_checkpointing=True)
    run.fit(module, datamodule=data)
    logged = run.callback_metrics["val_loss"].item()
    optimizer = run.optimizers[0]
    averaged = [p.detach().clone() for p in module.parameters()]
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[name], p) for name, p in module.named_parameters())
    optimizer.train()
    z = [optimizer.state[p]["z"] for p in module.parameters()]
    for weight, average, sequence in zip(module.parameters(), averaged, z, strict=True):
        torch.testing.assert_close(weight.detach(), 0.9 * average + 0.1 * sequence)
    optimizer.eval()
    (found,) = trainer(max_epochs=1).validate(module, datamodule=data, ckpt_path=tmp_path / "last.ckpt")
    assert found["val_loss"] == pytest.approx(logged, rel=1e-5)


class Norms(nn.Module):
    """BatchNorm that is slow to follow, and dropout."""

    def __init__(self, dropout=0.5):
        super().__init__()
        self.first, self.norm = nn.Linear(64, 16, bias=False), nn.BatchNorm1d(16, momentum=0.001)
        self.last = nn.Sequential(nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 10))

    def forward(self, images):
        return self.last(self.norm(self.first(images.flatten(1))))


class Seen(L.Callback):
    """BatchNorm's statistics and what they stand for, whenever the network has been evaluated."""

    def __init__(self):
        self.statistics, self.expected = [], []

    def on_validation_end(self, trainer, pl_module):
        if trainer.sanity_checking:
            return
        network = network_of(pl_module)
        self.statistics.append((network.norm.running_mean.clone(), network.norm.running_var.clone()))
        with torch.no_grad():
            inputs = islice(trainer.datamodule.lipschitz_dataloader(), trainer.num_training_batches)
            batches = [network.first(images.flatten(1)) for images, _ in inputs]
        means, variances = zip(*map(moments, batches), strict=True)
        self.expected.append((torch.stack(means).mean(dim=0), torch.stack(variances).mean(dim=0)))


def moments(batch):
    return batch.mean(dim=0), batch.var(dim=0)


def with_norms(kind, optimizer=AdamWScheduleFree, dropout=0.5):
    torch.manual_seed(0)
    return KINDS[kind](Norms(dropout), optimizer)


@each_kind
def test_batchnorm_has_the_statistics_of_the_averaged_weights_where_they_are_evaluated_and_kept(tmp_path, kind):
    pytest.importorskip("sklearn")
    module, seen = with_norms(kind), Seen()
    keep = ModelCheckpoint(tmp_path, save_last=True)
    data = DigitsDataModule(batch_size=64)
    run = trainer(LipschitzLR(), seen, keep, max_epochs=3, enable_checkpointing=True)
    run.fit(module, datamodule=data)
    assert len(seen.statistics) == 3
    for found, expected in zip(seen.statistics, seen.expected, strict=True):
        torch.testing.assert_close(found, expected)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    (name,) = (name for name in saved if name.endswith("norm.running_mean"))
    torch.testing.assert_close(saved[name], seen.expected[-1][0])
    (after,) = trainer(max_epochs=1).validate(module, datamodule=data, ckpt_path=tmp_path / "last.ckpt")
    assert after["val_loss"] == pytest.approx(run.callback_metrics["val_loss"].item(), rel=1e-5)
    assert network_of(module).norm.momentum == 0.001


@pytest.mark.parametrize(
    ("kind", "callbacks"),
    [(kind, [callback]) for kind in KINDS for callback in (LipschitzLR, AveragedWeights)] + [("ImageClassifier", [])],
)
def test_a_run_without_validation_keeps_the_statistics_of_the_averaged_weights_too(kind, callbacks):
    """Whoever brings the callback: LipschitzLR, the user, or at a fixed rate the ImageClassifier."""
    pytest.importorskip("sklearn")
    module, seen = with_norms(kind), Seen()
    run = trainer(*(make() for make in callbacks), max_epochs=2, limit_val_batches=0)
    run.fit(module, datamodule=DigitsDataModule(batch_size=64))
    seen.on_validation_end(run, module)
    torch.testing.assert_close(seen.statistics, seen.expected)


@each_kind
def test_batchnorm_is_measured_again_for_averaged_weights_alone(kind):
    pytest.importorskip("sklearn")
    module, seen = with_norms(kind, torch.optim.AdamW), Seen()
    trainer(LipschitzLR(), seen, max_epochs=1).fit(module, datamodule=DigitsDataModule(batch_size=64))
    assert (seen.statistics[-1][1] - seen.expected[-1][1]).abs().max() > 0.1


@each_kind
def test_measuring_batchnorm_leaves_the_training_as_it_is(kind):
    pytest.importorskip("sklearn")
    weights = []
    for often in (1, 3):
        module = with_norms(kind)
        run = trainer(LipschitzLR(), max_epochs=3, check_val_every_n_epoch=often)
        run.fit(module, datamodule=DigitsDataModule(batch_size=64))
        weights.append([p.detach().clone() for p in module.parameters()])
    # Switching the optimizer rounds.
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


@each_kind
def test_batchnorm_is_left_alone_with_a_warning_where_the_training_set_cannot_be_read_again(kind):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([(torch.randn(1, 8, 8), i % 10) for i in range(64)])

    module = with_norms(kind)
    with pytest.warns(UserWarning, match="BatchNorm's statistics are those of .*lipschitz_dataloader"):
        trainer(LipschitzLR(), max_epochs=1).fit(module, DataLoader(Stream(), batch_size=16))


def averaged(module, optimizer):
    """The average of a sequence whose mixture the weights are, by its definition: y = (1 - beta) z + beta x."""
    weights = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    if optimizer.param_groups[0]["train_mode"]:
        for name, parameter in module.named_parameters():
            weights[name] = (weights[name] - 0.1 * optimizer.state[parameter]["z"]) / 0.9
    return weights


@each_kind
def test_validation_after_the_fit_changes_nothing(kind):
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    data = DigitsDataModule(batch_size=64, augment=False)
    module, run = with_norms(kind), trainer(LipschitzLR(), max_epochs=3)
    run.fit(module, datamodule=data)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    first, second = (run.validate(module, datamodule=data, verbose=False) for _ in range(2))
    assert first == second
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    other = KINDS[kind](Norms())
    statistics = network_of(other).norm.running_mean.clone()
    run.validate(other, datamodule=data, verbose=False)
    assert torch.equal(network_of(other).norm.running_mean, statistics)


@each_kind
def test_a_run_resumed_from_a_validation_ends_as_the_undisturbed_one(tmp_path, kind):
    """In mid-epoch, and at an epoch's end."""
    pytest.importorskip("sklearn")

    def fit(ckpt_path=None, *more):
        module = with_norms(kind, dropout=RESUMABLE_DROPOUT[kind])
        torch.manual_seed(7)
        run = trainer(LipschitzLR(), *more, max_epochs=2, val_check_interval=8, enable_checkpointing=bool(more))
        run.fit(module, datamodule=DigitsDataModule(batch_size=64), ckpt_path=ckpt_path)
        return module

    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, monitor="val_loss", every_n_epochs=1)
    undisturbed = fit(None, keep).state_dict()
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) >= 4
    for path in checkpoints:
        assert KEY not in torch.load(path, weights_only=True)  # which the averaged weights alone are in
        for name, value in fit(path).state_dict().items():
            assert torch.equal(value, undisturbed[name])


@pytest.mark.parametrize("weights_alone", [False, True])
@each_kind
def test_a_checkpoint_between_validations_is_evaluated_with_the_averaged_weights(tmp_path, kind, weights_alone):
    pytest.importorskip("sklearn")

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 25:
                self.weights = averaged(pl_module, trainer.optimizers[0])

    watch, module, data = Watch(), with_norms(kind), DigitsDataModule(batch_size=64)
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=25, save_weights_only=weights_alone)
    trainer(LipschitzLR(), watch, keep, max_epochs=2, enable_checkpointing=True).fit(module, datamodule=data)
    path = tmp_path / "step=25.ckpt"
    saved = torch.load(path, weights_only=True)
    other = KINDS[kind](Norms())
    with warnings.catch_warnings(record=True) as of_validate:
        warnings.simplefilter("always")
        trainer(AveragedWeights()).validate(other, datamodule=data, ckpt_path=path, weights_only=False, verbose=False)
    with warnings.catch_warnings(record=True) as of_loading:
        warnings.simplefilter("always")
        loaded = load(kind, path, Norms())
    for found in (other, loaded):
        for name, value in found.named_parameters():
            torch.testing.assert_close(value.detach(), watch.weights[name], rtol=1e-4, atol=1e-5)
            assert torch.equal(value.detach(), saved["state_dict"][name])
    assert warned(of_validate) is not weights_alone
    assert warned(of_loading) is (not weights_alone and kind == "ImageClassifier")


def warned(caught):
    return any("BatchNorm's statistics of the training weights" in str(one.message) for one in caught)


@each_kind
def test_test_and_predict_from_a_checkpoint_between_validations_use_the_averaged_weights(tmp_path, kind):
    torch.manual_seed(0)
    network = lambda: nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, CLASSES))  # noqa: E731
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3)
    run = trainer(LipschitzLR(), keep, max_steps=3, enable_checkpointing=True)
    run.fit(module := KINDS[kind](network()), loader())  # which ends with the averaged weights of step 3
    path, other = tmp_path / "step=3.ckpt", KINDS[kind](network())
    assert torch.load(path, weights_only=True)[KEY]["training_weights"]
    (found,) = trainer().test(other, loader(), ckpt_path=path, weights_only=False, verbose=False)
    (expected,) = run.test(module, loader(), verbose=False)
    assert found == expected
    other.load_state_dict({name: torch.zeros_like(value) for name, value in other.state_dict().items()})
    inputs = examples().tensors[0]
    rows = DataLoader(TensorDataset(inputs) if kind == "ImageClassifier" else inputs, batch_size=16)
    predicted = trainer().predict(other, rows, ckpt_path=path, weights_only=False)
    expected = trainer().predict(module, rows)
    assert all(torch.equal(*pair) for pair in zip(predicted, expected, strict=True))


@each_kind
@pytest.mark.parametrize("callback", [LipschitzLR, AveragedWeights])
def test_a_checkpoint_between_validations_resumes_where_it_was(tmp_path, kind, callback):
    pytest.importorskip("sklearn")

    def fit(ckpt_path=None, *more):
        module = with_norms(kind, dropout=RESUMABLE_DROPOUT[kind])
        run = trainer(callback(), *more, max_epochs=2, enable_checkpointing=bool(more))
        run.fit(module, datamodule=DigitsDataModule(batch_size=64), ckpt_path=ckpt_path)
        return module

    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=25, save_top_k=-1)
    undisturbed = fit().state_dict()
    for resumed in (fit(None, keep), fit(tmp_path / "step=25.ckpt")):
        for name, value in resumed.state_dict().items():
            assert torch.equal(value, undisturbed[name])


@each_kind
def test_a_checkpoint_of_an_epoch_without_validation_has_the_averaged_weights_and_their_statistics(tmp_path, kind):
    pytest.importorskip("sklearn")
    keep, data = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1), DigitsDataModule(batch_size=64)
    run = trainer(LipschitzLR(), keep, enable_checkpointing=True, limit_val_batches=0)
    run.fit(module := with_norms(kind), datamodule=data)
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert KEY not in saved
    module.load_state_dict(saved["state_dict"])
    (seen := Seen()).on_validation_end(run, module)
    torch.testing.assert_close(seen.statistics, seen.expected)


@each_kind
def test_a_run_that_is_resumed_after_its_last_batch_ends_with_the_averaged_weights_and_their_statistics(tmp_path, kind):
    pytest.importorskip("sklearn")

    def fit(*more, ckpt_path=None):
        module = with_norms(kind)
        run = trainer(LipschitzLR(), *more, max_epochs=1, limit_train_batches=5, enable_checkpointing=bool(more))
        run.fit(module, datamodule=DigitsDataModule(batch_size=64), ckpt_path=ckpt_path)
        assert run.global_step == 5
        return module.state_dict()

    undisturbed = fit(ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5))
    resumed = fit(ckpt_path=tmp_path / "step=5.ckpt")
    assert all(torch.equal(value, undisturbed[name]) for name, value in resumed.items())


@each_kind
def test_a_run_cut_off_by_its_steps_ends_with_the_averaged_weights(kind):
    pytest.importorskip("sklearn")
    module = with_norms(kind)
    run = trainer(LipschitzLR(), max_epochs=-1, max_steps=30)
    run.fit(module, datamodule=DigitsDataModule(batch_size=64))
    assert not run.optimizers[0].param_groups[0]["train_mode"]


@each_kind
@pytest.mark.parametrize(
    "optimizer",
    [lambda p: SGDScheduleFree(p, lr=1.0, momentum=0.8), lambda p: RAdamScheduleFree(p, lr=0.01, betas=(0.8, 0.99))],
    ids=["SGD", "RAdam"],
)
def test_a_checkpoint_has_the_average_of_any_schedule_free_optimizer(tmp_path, kind, optimizer):
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    module = KINDS[kind](MLP(hidden=(16,)), optimizer)
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=19)
    data = DigitsDataModule(batch_size=64)
    run = trainer(AveragedWeights(), keep, max_steps=19, enable_checkpointing=True)
    run.fit(module, datamodule=data)
    loaded = load(kind, tmp_path / "step=19.ckpt", MLP(hidden=(16,)))
    state = torch.load(tmp_path / "step=19.ckpt", weights_only=True)
    for (name, found), expected in zip(loaded.named_parameters(), module.parameters(), strict=True):
        assert torch.equal(found, expected)
        z = state["optimizer_states"][0]["state"][list(state["state_dict"]).index(name)]["z"]
        torch.testing.assert_close(state[KEY]["training_weights"][name], 0.8 * found.detach() + 0.2 * z)


class Still(L.Callback):
    """Keeps BatchNorm as it is, the usual way."""

    def on_train_epoch_start(self, trainer, pl_module):
        network_of(pl_module).norm.eval()


@each_kind
def test_a_batchnorm_that_does_not_train_is_left_alone(kind):
    pytest.importorskip("sklearn")
    module = with_norms(kind)
    network_of(module).norm.running_mean.fill_(5.0)
    trainer(LipschitzLR(), Still(), max_epochs=2).fit(module, datamodule=DigitsDataModule(batch_size=64))
    assert torch.equal(network_of(module).norm.running_mean, torch.full((16,), 5.0))


class Flat(nn.Module):
    """Spectral norm, whose vectors move in training mode, and BatchNorm."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.utils.spectral_norm(nn.Linear(WIDTH, 8)), nn.BatchNorm1d(8)
        self.last = nn.Linear(8, CLASSES)

    def forward(self, rows):
        return self.last(self.norm(self.first(rows)).relu())


class Vector(L.Callback):
    """The vector of the power iteration before and after BatchNorm is measured."""

    def __init__(self):
        self.pairs = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.before = network_of(pl_module).first.weight_u.clone()

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.pairs.append((self.before, network_of(pl_module).first.weight_u.clone()))


@each_kind
def test_only_batchnorm_moves(kind):
    torch.manual_seed(0)
    vector = Vector()
    trainer(LipschitzLR(), vector, max_epochs=2).fit(KINDS[kind](Flat()), loader(), loader())
    assert len(vector.pairs) == 2
    assert all(torch.equal(before, after) for before, after in vector.pairs)


@each_kind
def test_data_that_are_sorted_by_class_are_drawn_from_all_of_them(kind):
    torch.manual_seed(0)
    inputs, labels = examples().tensors
    order = labels.argsort()
    inputs, labels = inputs[order] + 10 * labels[order, None], labels[order]
    network = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, CLASSES))
    rows = DataLoader(TensorDataset(inputs, labels), batch_size=8, shuffle=True)
    trainer(LipschitzLR(), max_epochs=1, limit_train_batches=4).fit(KINDS[kind](network), rows)
    # A third of the rows; the first third is of one class.
    apart = (network[0].running_mean - inputs.mean(dim=0)).abs() / inputs.std(dim=0)
    assert apart.max() < 0.5


@each_kind
@pytest.mark.parametrize("fault", [None, RuntimeError("lost")])
def test_momentum_is_as_it_was(kind, fault):
    class Faulty(Norms):
        calls = 0

        def forward(self, images):
            if self.norm.momentum is None:
                Faulty.calls += 1
                if fault:
                    raise fault
            return super().forward(images)

    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    module = KINDS[kind](Faulty())
    run = trainer(LipschitzLR(), max_epochs=1)
    if fault:
        with pytest.raises(RuntimeError, match="lost"):
            run.fit(module, datamodule=DigitsDataModule(batch_size=64))
    else:
        run.fit(module, datamodule=DigitsDataModule(batch_size=64))
    assert Faulty.calls
    assert network_of(module).norm.momentum == 0.001


@each_kind
def test_the_rows_of_a_sampler_are_the_training_set(kind):
    torch.manual_seed(0)
    inputs, labels = examples().tensors
    inputs = inputs.clone()
    inputs[:48] += 100
    network = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, CLASSES))
    rows = DataLoader(TensorDataset(inputs, labels), batch_size=16, sampler=SubsetRandomSampler(range(48, 96)))
    trainer(LipschitzLR(), max_epochs=1).fit(KINDS[kind](network), rows)
    assert network[0].running_mean.abs().max() < 10


@each_kind
def test_every_validation_between_the_steps_of_an_accumulation_has_its_own_statistics(kind):
    pytest.importorskip("sklearn")
    module, seen = with_norms(kind), Seen()
    run = trainer(
        LipschitzLR(), seen, max_epochs=1, val_check_interval=1, accumulate_grad_batches=3, limit_train_batches=6
    )
    run.fit(module, datamodule=DigitsDataModule(batch_size=64))
    assert len(seen.statistics) == 6
    for found, expected in zip(seen.statistics, seen.expected, strict=True):
        torch.testing.assert_close(found, expected)


@each_kind
@pytest.mark.parametrize("settings", [{}, {"bound": "paper", "measure": "pass"}], ids=str)
def test_a_training_set_without_a_length_is_read_by_a_loader_of_ones_own(kind, settings):
    class Rows(IterableDataset):
        def __iter__(self):
            return zip(*examples().tensors, strict=True)

    class Stream(L.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(Rows(), batch_size=16)

        def lipschitz_dataloader(self):
            return self.train_dataloader()

    torch.manual_seed(0)
    norm = nn.BatchNorm1d(WIDTH)
    optimizer = torch.optim.SGD if settings else AdamWScheduleFree
    module = KINDS[kind](nn.Sequential(norm, nn.Linear(WIDTH, CLASSES)), optimizer)
    trainer(LipschitzLR(**settings), max_epochs=2).fit(module, datamodule=Stream())
    if not settings:
        torch.testing.assert_close(norm.running_mean, examples().tensors[0].mean(dim=0))


class Counted(L.Callback):
    """How many callbacks for averaged weights a trainer has, and where the first one is."""

    def on_validation_start(self, trainer, pl_module):
        self.found = [i for i, one in enumerate(trainer.callbacks) if isinstance(one, AveragedWeights)]


@each_kind
@pytest.mark.parametrize("added", [0, 1, 2])
def test_only_one_of_them_acts_and_before_the_other_callbacks(kind, added, monkeypatch):
    measured = []
    reestimate = averaged_weights.reestimate_batch_norm
    monkeypatch.setattr(
        averaged_weights, "reestimate_batch_norm", lambda *given: measured.append(given) or reestimate(*given)
    )
    module = KINDS[kind](nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, CLASSES)))
    run = trainer(LipschitzLR(), counted := Counted(), *(AveragedWeights() for _ in range(added)), max_epochs=2)
    for fits in (1, 2):
        run.fit_loop.max_epochs = 2 * fits
        run.fit(module, loader(), loader())
        assert counted.found == [0]
        assert len(measured) == 2 * fits  # one an epoch
    run.validate(module, loader(), verbose=False)
    assert counted.found == [0]
    assert len(measured) == 4


class Switching(Classifier):
    """Switches the modes itself, as schedulefree's documentation asks for."""

    def on_train_epoch_start(self):
        self.optimizers().train()

    def on_validation_start(self):
        self.optimizers().eval()

    def on_validation_end(self):
        if not self.trainer.sanity_checking:
            self.optimizers().train()

    def on_train_epoch_end(self):
        self.optimizers().eval()


def resumable():
    """A loader that a run in mid-epoch is resumed with."""
    return DeviceLoader(*examples().tensors, 16, lambda batch, _: batch)


def switching(*callbacks, **settings):
    torch.manual_seed(0)
    module = Switching(free)
    trainer(*callbacks, **settings).fit(module, resumable(), loader())
    return module.state_dict()


@pytest.mark.parametrize("settings", [{}, {"val_check_interval": 2}], ids=str)
def test_a_module_that_switches_the_modes_itself_trains_as_without_the_callback(settings):
    alone, together = switching(**settings), switching(AveragedWeights(), **settings)
    assert all(torch.equal(value, together[name]) for name, value in alone.items())


def test_a_checkpoint_between_validations_is_resumed_without_the_callback_too(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8)

    class Resuming(Switching):
        def on_train_start(self):
            self.optimizers().train()

    undisturbed = switching(AveragedWeights(), keep, enable_checkpointing=True)
    torch.manual_seed(0)
    module = Resuming(free)
    trainer().fit(module, resumable(), loader(), ckpt_path=tmp_path / "step=8.ckpt")
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, undisturbed[name], rtol=1e-4, atol=1e-5)


class Two(Classifier):
    """Two networks, each with an optimizer of its own, under manual optimization."""

    def __init__(self, *factories):
        super().__init__(net=nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES)))
        self.automatic_optimization, self.factories = False, factories
        self.other = nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))

    def training_step(self, batch, batch_idx):
        for optimizer, network in zip(self.optimizers(), (self.net, self.other), strict=True):
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(network(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        return [make(part.parameters()) for make, part in zip(self.factories, (self.net, self.other), strict=True)]


@pytest.mark.parametrize("factories", [(free, free), (free, sgd), (sgd, free)])
def test_of_several_optimizers_the_schedule_free_ones_average(tmp_path, factories):
    class Modes(L.Callback):
        def on_validation_start(self, trainer, pl_module):
            self.evaluated = modes(trainer)

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.trained = modes(trainer)

    def modes(trainer):
        return [one.param_groups[0].get("train_mode") for one in trainer.optimizers]

    def fit(ckpt_path=None, *more):
        torch.manual_seed(0)
        module, seen = Two(*factories), Modes()
        module.lipschitz_dataloader = loader
        run = trainer(AveragedWeights(), seen, *more, enable_checkpointing=bool(more))
        run.fit(module, resumable(), loader(), ckpt_path=ckpt_path)
        assert seen.evaluated == [False if make is free else None for make in factories]
        assert seen.trained == [True if make is free else None for make in factories]
        return module

    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=16, save_top_k=-1)  # of both optimizers
    undisturbed = fit(None, keep)
    saved = torch.load(tmp_path / "step=16.ckpt", weights_only=True)
    assert saved[KEY]["optimizers"] == [i for i, make in enumerate(factories) if make is free]
    parts = {name.split(".")[0] for name in saved[KEY]["training_weights"]}
    assert parts == {part for part, make in zip(("net", "other"), factories, strict=True) if make is free}
    for name, value in fit(tmp_path / "step=16.ckpt").state_dict().items():
        assert torch.equal(value, undisturbed.state_dict()[name])


def test_a_layer_that_forward_does_not_use_keeps_its_statistics():
    torch.manual_seed(0)
    module, plain = Two(free, sgd), Two(sgd, sgd)
    plain.load_state_dict(module.state_dict())
    for one in (module, plain):
        trainer(AveragedWeights()).fit(one, loader())
    assert not torch.equal(module.net[1].running_mean, plain.net[1].running_mean)
    assert torch.equal(module.other[1].running_mean, plain.other[1].running_mean)
    assert torch.equal(module.other[1].num_batches_tracked, plain.other[1].num_batches_tracked)


class Pair(Classifier):
    """Takes inputs and targets."""

    def forward(self, inputs, targets):
        return F.cross_entropy(self.net(inputs), targets)


class Stepping(L.LightningModule):
    """Has no forward."""

    def __init__(self, optimizer, net):
        super().__init__()
        self.make, self.net = optimizer, net

    training_step, configure_optimizers = Classifier.training_step, Classifier.configure_optimizers


class Later(Classifier):
    """Can't be called with the third batch of a pass in inference mode."""

    def forward(self, inputs):
        if not self.training and self.net[0].num_batches_tracked == 2:
            raise KeyError("inputs")
        return self.net(inputs)


@pytest.mark.parametrize("kind", [Pair, Stepping, Later])
def test_statistics_stay_with_a_warning_where_forward_takes_something_else(kind):
    states = []
    for optimizer in (AdamWScheduleFree, lambda p: torch.optim.SGD(p, lr=0.0)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, CLASSES))
        run, module = trainer(AveragedWeights(), max_epochs=1), kind(optimizer, net)
        if optimizer is AdamWScheduleFree:
            with pytest.warns(UserWarning, match=f"statistics are those of .*{kind.__name__} can't be called"):
                run.fit(module, loader())
        else:
            run.fit(module, loader())
        states.append(net[0].state_dict())
        assert net[0].momentum == 0.1
    # The first layer sees the same batches with any weights.
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(states[0][name], states[1][name])


class Saving(Evaluated):
    """Has an on_save_checkpoint of its own."""

    def on_save_checkpoint(self, checkpoint):
        checkpoint["mine"] = self.global_step


@pytest.mark.parametrize("instance", [False, True])
@pytest.mark.parametrize("weights_alone", [False, True])
def test_a_modules_own_on_save_checkpoint_is_called_and_is_the_same_afterwards(tmp_path, instance, weights_alone):
    module = Saving(AdamWScheduleFree)
    if instance:
        module.on_save_checkpoint = own = lambda checkpoint: checkpoint.update(mine=-1)
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_weights_only=weights_alone)
    trainer(AveragedWeights(), keep, enable_checkpointing=True, max_epochs=1).fit(module, loader())
    assert torch.load(tmp_path / "step=4.ckpt", weights_only=True)["mine"] == (-1 if instance else 4)
    assert vars(module).get("on_save_checkpoint") is (own if instance else None)


@each_kind
@pytest.mark.parametrize("added", [False, True])
def test_a_fit_with_other_optimizers_has_no_callback_that_the_user_has_not_added(kind, added):
    class Training(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            self.found = sum(isinstance(one, AveragedWeights) for one in trainer.callbacks)

    run = trainer(LipschitzLR(), training := Training(), *([AveragedWeights()] if added else []), max_epochs=1)
    for optimizer, expected in ((sgd, int(added)), (free, 1), (sgd, int(added))):
        run.fit(KINDS[kind](nn.Linear(WIDTH, CLASSES), optimizer), loader())
        run.fit_loop.max_epochs += 1
        assert training.found == expected


class Verbose(torch.optim.SGD):
    """Has methods of the same names for something else."""

    def train(self):
        raise AssertionError("called")

    eval = train


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, Verbose])
def test_other_optimizers_leave_the_module_as_it_is(optimizer):
    class Looks(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            assert "on_save_checkpoint" not in vars(pl_module)

    trainer(AveragedWeights(), Looks()).fit(Saving(lambda p: optimizer(p, lr=0.1)), loader(), loader())


@pytest.mark.parametrize("weights_alone", [False, True])
def test_a_run_that_fails_saves_the_averaged_weights_and_another_one_can_follow(tmp_path, weights_alone):
    class Failing(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 4:
                self.weights = averaged(pl_module, trainer.optimizers[0])
                raise RuntimeError("lost")

    torch.manual_seed(0)
    module = Saving(free)
    keep = ModelCheckpoint(tmp_path, filename="{step}", save_on_exception=True, save_weights_only=weights_alone)
    failed = trainer(failing := Failing(), AveragedWeights(), keep, enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="lost"):
        failed.fit(module, loader())
    saved = torch.load(next(tmp_path.glob("*.ckpt")), weights_only=True)
    assert saved["mine"] == 4
    for name, value in failing.weights.items():
        torch.testing.assert_close(saved["state_dict"][name], value, rtol=1e-4, atol=1e-5)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    failed.validate(module, loader(), verbose=False)  # of the training weights, as BatchNorm's statistics would be
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    run = trainer(AveragedWeights(), max_epochs=1)
    run.fit(module, loader())
    assert not run.optimizers[0].param_groups[0]["train_mode"]
    assert "on_save_checkpoint" not in vars(module)


def test_a_copy_that_is_made_during_the_fit_saves_its_own_weights(tmp_path):
    class Copies(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            self.copy = copy.deepcopy(pl_module)

    trainer(AveragedWeights(), copies := Copies(), max_epochs=1).fit(Saving(free), loader())
    run = trainer(max_epochs=0)
    run.fit(copies.copy, loader())
    run.save_checkpoint(tmp_path / "copy.ckpt")
    saved = torch.load(tmp_path / "copy.ckpt", weights_only=True)
    assert saved["mine"] == 0
    assert all(torch.equal(saved["state_dict"][name], p) for name, p in copies.copy.named_parameters())


def test_weights_that_are_tied_are_saved_under_both_names(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.second.weight = self.first.weight
            self.last = nn.Linear(WIDTH, CLASSES)

        def forward(self, inputs):
            return self.last(self.second(self.first(inputs).relu()).relu())

    torch.manual_seed(0)
    module = Classifier(free, Tied())
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6)
    trainer(AveragedWeights(), keep, enable_checkpointing=True, max_epochs=1).fit(module, loader())
    saved = torch.load(tmp_path / "step=6.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[name], value) for name, value in module.state_dict().items())


def test_the_trial_run_of_a_tuner_works_without_callbacks(tmp_path):
    torch.manual_seed(0)
    module, run = Classifier(AdamWScheduleFree), trainer(AveragedWeights(), default_root_dir=tmp_path)
    assert len(Tuner(run).lr_find(module, loader(), num_training=5, update_attr=False).results["loss"]) == 5


class KeepNorm(L.Callback):
    """Leaves each rank's first layer and what it has measured in a file."""

    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.net.state_dict(), f"norm{trainer.global_rank}.pt")


def test_ranks_share_the_mean_of_their_statistics():
    torch.manual_seed(0)
    module = Classifier(free, nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES)))
    two_ranks(AveragedWeights(), module, 8, KeepNorm())
    states = [torch.load(f"norm{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    with torch.no_grad():
        outputs = examples().tensors[0] @ states[0]["0.weight"].T + states[0]["0.bias"]
    batches = outputs.unflatten(0, (-1, 8, 2)).movedim(2, 1).flatten(0, 1)  # a rank has every second row
    means, variances = zip(*map(moments, batches), strict=True)
    torch.testing.assert_close(states[0]["1.running_mean"], torch.stack(means).mean(dim=0))
    torch.testing.assert_close(states[0]["1.running_var"], torch.stack(variances).mean(dim=0))


class Sharded(Classifier):
    """Has its weights as tensors of which each rank holds a part."""

    def configure_model(self):
        if not hasattr(self.net[0].weight, "full_tensor"):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def test_a_checkpoint_of_a_sharded_network_between_validations_gives_a_warning(tmp_path):
    torch.manual_seed(0)
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1, process_group_backend="gloo")
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4)
    run = trainer(AveragedWeights(), keep, devices=1, strategy=strategy, enable_checkpointing=True, max_epochs=1)
    try:
        with pytest.warns(UserWarning, match="holds the training weights, not their average"):
            run.fit(Sharded(free), loader())
    finally:
        torch.distributed.destroy_process_group()
    assert not run.optimizers[0].param_groups[0]["train_mode"]
