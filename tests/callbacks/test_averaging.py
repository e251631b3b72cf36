"""ImageClassifier with an optimizer that averages the weights: which weights are evaluated and saved, and BatchNorm."""

from itertools import islice

import lightning as L
import pytest
import torch
from helpers import CLASSES, WIDTH, examples, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from schedulefree import AdamWScheduleFree, SGDScheduleFree
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

from lit_lipschitz import MLP, DigitsDataModule, ImageClassifier, LipschitzLR


def test_image_classifiers_evaluate_and_keep_the_averaged_weights_and_train_on_at_their_own(tmp_path):
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    data = DigitsDataModule(batch_size=64, augment=False)
    module = ImageClassifier(MLP(hidden=(16,)), optimizer=AdamWScheduleFree)
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

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(64, 16, bias=False), nn.BatchNorm1d(16, momentum=0.001)
        self.last = nn.Sequential(nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 10))

    def forward(self, images):
        return self.last(self.norm(self.first(images.flatten(1))))


class Seen(L.Callback):
    """BatchNorm's statistics and what they stand for, whenever the network has been evaluated."""

    def __init__(self):
        self.statistics, self.expected = [], []

    def on_validation_end(self, trainer, pl_module):
        if trainer.sanity_checking:
            return
        network = pl_module.network
        self.statistics.append((network.norm.running_mean.clone(), network.norm.running_var.clone()))
        with torch.no_grad():
            inputs = islice(trainer.datamodule.lipschitz_dataloader(), trainer.num_training_batches)
            batches = [network.first(images.flatten(1)) for images, _ in inputs]
        means, variances = zip(*map(moments, batches), strict=True)
        self.expected.append((torch.stack(means).mean(dim=0), torch.stack(variances).mean(dim=0)))


def moments(batch):
    return batch.mean(dim=0), batch.var(dim=0)


def classifier_with_norms(optimizer=AdamWScheduleFree):
    torch.manual_seed(0)
    return ImageClassifier(Norms(), optimizer=optimizer)


def test_batchnorm_has_the_statistics_of_the_averaged_weights_where_they_are_evaluated_and_kept(tmp_path):
    pytest.importorskip("sklearn")
    module, seen = classifier_with_norms(), Seen()
    keep = ModelCheckpoint(tmp_path, save_last=True)
    data = DigitsDataModule(batch_size=64)
    run = trainer(LipschitzLR(), seen, keep, max_epochs=3, enable_checkpointing=True)
    run.fit(module, datamodule=data)
    assert len(seen.statistics) == 3
    for found, expected in zip(seen.statistics, seen.expected, strict=True):
        torch.testing.assert_close(found, expected)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close(saved["network.norm.running_mean"], seen.expected[-1][0])
    (after,) = trainer(max_epochs=1).validate(module, datamodule=data, ckpt_path=tmp_path / "last.ckpt")
    assert after["val_loss"] == pytest.approx(run.callback_metrics["val_loss"].item(), rel=1e-5)
    assert module.network.norm.momentum == 0.001


def test_a_run_without_validation_keeps_the_statistics_of_the_averaged_weights_too():
    pytest.importorskip("sklearn")
    module, seen = classifier_with_norms(), Seen()
    run = trainer(LipschitzLR(), max_epochs=2, limit_val_batches=0)
    run.fit(module, datamodule=DigitsDataModule(batch_size=64))
    seen.on_validation_end(run, module)
    torch.testing.assert_close(seen.statistics, seen.expected)


def test_batchnorm_is_measured_anew_for_averaged_weights_alone():
    pytest.importorskip("sklearn")
    module, seen = classifier_with_norms(torch.optim.AdamW), Seen()
    trainer(LipschitzLR(), seen, max_epochs=1).fit(module, datamodule=DigitsDataModule(batch_size=64))
    assert (seen.statistics[-1][1] - seen.expected[-1][1]).abs().max() > 0.1


def test_measuring_batchnorm_leaves_the_training_as_it_is():
    pytest.importorskip("sklearn")
    weights = []
    for often in (1, 3):
        module = classifier_with_norms()
        run = trainer(LipschitzLR(), max_epochs=3, check_val_every_n_epoch=often)
        run.fit(module, datamodule=DigitsDataModule(batch_size=64))
        weights.append([p.detach().clone() for p in module.parameters()])
    # Turning the optimizer rounds.
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


def test_batchnorm_is_left_alone_with_a_word_where_the_training_set_cannot_be_read_again():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([(torch.randn(1, 8, 8), i % 10) for i in range(64)])

    module = classifier_with_norms()
    with pytest.warns(UserWarning, match="BatchNorm's statistics are those of .*lipschitz_dataloader"):
        trainer(LipschitzLR(), max_epochs=1).fit(module, DataLoader(Stream(), batch_size=16))


def averaged(module, optimizer):
    """The average of a sequence whose mixture the weights are, by its definition: y = (1 - beta) z + beta x."""
    weights = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    if optimizer.param_groups[0]["train_mode"]:
        for name, parameter in module.named_parameters():
            weights[name] = (weights[name] - 0.1 * optimizer.state[parameter]["z"]) / 0.9
    return weights


@pytest.fixture
def trained():
    """A module of Digits after three epochs, its trainer and its data."""
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    data = DigitsDataModule(batch_size=64, augment=False)
    module, run = classifier_with_norms(), trainer(LipschitzLR(), max_epochs=3)
    run.fit(module, datamodule=data)
    return module, run, data


def test_validation_after_the_fit_changes_nothing(trained):
    module, run, data = trained
    before = {name: value.clone() for name, value in module.state_dict().items()}
    first, second = (run.validate(module, datamodule=data, verbose=False) for _ in range(2))
    assert first == second
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    other = ImageClassifier(Norms())
    statistics = other.network.norm.running_mean.clone()
    run.validate(other, datamodule=data, verbose=False)
    assert torch.equal(other.network.norm.running_mean, statistics)


def test_a_run_resumed_from_a_validation_in_mid_epoch_ends_as_the_undisturbed_one(tmp_path):
    pytest.importorskip("sklearn")

    def fit(ckpt_path=None, *more):
        module = classifier_with_norms()
        torch.manual_seed(7)
        run = trainer(LipschitzLR(), *more, max_epochs=2, val_check_interval=8, enable_checkpointing=bool(more))
        run.fit(module, datamodule=DigitsDataModule(batch_size=64), ckpt_path=ckpt_path)
        return module

    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, monitor="val_loss", every_n_epochs=1)
    undisturbed = fit(None, keep).state_dict()
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) >= 4
    for path in checkpoints:
        for name, value in fit(path).state_dict().items():
            torch.testing.assert_close(value, undisturbed[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights_alone", [False, True])
def test_a_checkpoint_between_validations_is_evaluated_with_the_averaged_weights(tmp_path, weights_alone):
    pytest.importorskip("sklearn")

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 25:
                self.weights = averaged(pl_module, trainer.optimizers[0])

    watch, module, data = Watch(), classifier_with_norms(), DigitsDataModule(batch_size=64)
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=25, save_weights_only=weights_alone)
    trainer(LipschitzLR(), watch, keep, max_epochs=2, enable_checkpointing=True).fit(module, datamodule=data)
    path = tmp_path / "step=25.ckpt"
    other = ImageClassifier(Norms(), optimizer=AdamWScheduleFree)
    if weights_alone:
        trainer().validate(other, datamodule=data, ckpt_path=path, weights_only=False, verbose=False)
    else:
        with pytest.warns(UserWarning, match="BatchNorm's statistics of those that were trained"):
            trainer().validate(other, datamodule=data, ckpt_path=path, weights_only=False, verbose=False)
    loaded = ImageClassifier.load_from_checkpoint(path, network=Norms(), weights_only=False)
    for found in (other, loaded):
        for name, value in found.named_parameters():
            torch.testing.assert_close(value.detach(), watch.weights[name], rtol=1e-4, atol=1e-5)


def test_a_checkpoint_between_validations_resumes_where_it_was(tmp_path):
    pytest.importorskip("sklearn")

    def fit(ckpt_path=None, *more):
        module = classifier_with_norms()
        run = trainer(LipschitzLR(), *more, max_epochs=2, enable_checkpointing=bool(more))
        run.fit(module, datamodule=DigitsDataModule(batch_size=64), ckpt_path=ckpt_path)
        return module

    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=25, save_top_k=-1)
    undisturbed = fit(None, keep).state_dict()
    for name, value in fit(tmp_path / "step=25.ckpt").state_dict().items():
        assert torch.equal(value, undisturbed[name])


def test_a_run_cut_off_by_its_steps_ends_with_the_averaged_weights():
    pytest.importorskip("sklearn")
    module = classifier_with_norms()
    run = trainer(LipschitzLR(), max_epochs=-1, max_steps=30)
    run.fit(module, datamodule=DigitsDataModule(batch_size=64))
    assert not run.optimizers[0].param_groups[0]["train_mode"]


def test_sgds_average_is_put_in_by_its_momentum(tmp_path):
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    module = ImageClassifier(MLP(hidden=(16,)), optimizer=lambda p: SGDScheduleFree(p, lr=1.0, momentum=0.8))
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=19)
    data = DigitsDataModule(batch_size=64)
    run = trainer(keep, max_steps=19, enable_checkpointing=True)
    run.fit(module, datamodule=data)
    loaded = ImageClassifier.load_from_checkpoint(
        tmp_path / "step=19.ckpt", network=MLP(hidden=(16,)), weights_only=False
    )
    for found, expected in zip(loaded.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-4, atol=1e-5)


class Still(L.Callback):
    """Keeps BatchNorm as it is, the usual way."""

    def on_train_epoch_start(self, trainer, pl_module):
        pl_module.network.norm.eval()


def test_a_batchnorm_that_does_not_train_is_left_alone():
    pytest.importorskip("sklearn")
    module = classifier_with_norms()
    module.network.norm.running_mean.fill_(5.0)
    trainer(LipschitzLR(), Still(), max_epochs=2).fit(module, datamodule=DigitsDataModule(batch_size=64))
    assert torch.equal(module.network.norm.running_mean, torch.full((16,), 5.0))


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
        self.before = pl_module.network.first.weight_u.clone()

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.pairs.append((self.before, pl_module.network.first.weight_u.clone()))


def test_only_batchnorm_moves():
    torch.manual_seed(0)
    vector = Vector()
    module = ImageClassifier(Flat(), optimizer=AdamWScheduleFree)
    loader = DataLoader(examples(), batch_size=16)
    trainer(LipschitzLR(), vector, max_epochs=2).fit(module, loader, loader)
    assert len(vector.pairs) == 2
    assert all(torch.equal(before, after) for before, after in vector.pairs)


def test_data_that_are_sorted_by_class_are_drawn_from_all_of_them():
    torch.manual_seed(0)
    inputs, labels = examples().tensors
    order = labels.argsort()
    inputs, labels = inputs[order] + 10 * labels[order, None], labels[order]
    network = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, CLASSES))
    module = ImageClassifier(network, optimizer=AdamWScheduleFree)
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=8, shuffle=True)
    trainer(LipschitzLR(), max_epochs=1, limit_train_batches=4).fit(module, loader)
    # A third of the rows; the first third is of one class.
    apart = (network[0].running_mean - inputs.mean(dim=0)).abs() / inputs.std(dim=0)
    assert apart.max() < 0.5


@pytest.mark.parametrize("fault", [None, RuntimeError("lost")])
def test_momentum_is_as_it_was(fault):
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
    module = ImageClassifier(Faulty(), optimizer=AdamWScheduleFree)
    run = trainer(LipschitzLR(), max_epochs=1)
    if fault:
        with pytest.raises(RuntimeError, match="lost"):
            run.fit(module, datamodule=DigitsDataModule(batch_size=64))
    else:
        run.fit(module, datamodule=DigitsDataModule(batch_size=64))
    assert Faulty.calls
    assert module.network.norm.momentum == 0.001


def test_the_rows_of_a_sampler_are_the_training_set():
    torch.manual_seed(0)
    inputs, labels = examples().tensors
    inputs = inputs.clone()
    inputs[:48] += 100
    network = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, CLASSES))
    module = ImageClassifier(network, optimizer=AdamWScheduleFree)
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=16, sampler=SubsetRandomSampler(range(48, 96)))
    trainer(LipschitzLR(), max_epochs=1).fit(module, loader)
    assert network[0].running_mean.abs().max() < 10


def test_every_validation_between_the_steps_of_an_accumulation_has_its_own_statistics():
    pytest.importorskip("sklearn")
    module, seen = classifier_with_norms(), Seen()
    run = trainer(
        LipschitzLR(), seen, max_epochs=1, val_check_interval=1, accumulate_grad_batches=3, limit_train_batches=6
    )
    run.fit(module, datamodule=DigitsDataModule(batch_size=64))
    assert len(seen.statistics) == 6
    for found, expected in zip(seen.statistics, seen.expected, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("settings", [{}, {"bound": "paper", "measure": "pass"}], ids=str)
def test_a_training_set_without_a_length_is_read_by_a_loader_of_ones_own(settings):
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
    module = ImageClassifier(nn.Sequential(norm, nn.Linear(WIDTH, CLASSES)), optimizer=optimizer)
    trainer(LipschitzLR(**settings), max_epochs=2).fit(module, datamodule=Stream())
    if not settings:
        torch.testing.assert_close(norm.running_mean, examples().tensors[0].mean(dim=0))
