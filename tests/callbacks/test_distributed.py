"""Several ranks: the same rates and weights on all, and the rate of one rank with the same global batch."""

import contextlib
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from datetime import timedelta
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import CLASSES, OPTIMIZERS, SCRIPT, Classifier, Keep, Slices, ranks, trainer, two_ranks
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from schedulefree import AdamWScheduleFree
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lit_lipschitz import MLP, DigitsDataModule, ImageClassifier, LipschitzLR


class Saves(L.Callback):
    """Saves a checkpoint at the end of an epoch, as all ranks do together."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint("stopped.ckpt")


def assert_alike(first, *others):
    for other in others:
        assert first["rates"] == other["rates"]
        assert all(torch.equal(a, b) for a, b in zip(first["weights"], other["weights"], strict=True))


def one_rank(callback, module, batch_size, **settings):
    run = trainer(callback, Keep(), **settings)
    run.fit(module, datamodule=Slices(batch_size))
    return torch.load("rank0.pt")


def model(optimizer="momentum"):
    torch.manual_seed(1)
    return Classifier(OPTIMIZERS[optimizer])


SETTINGS = [
    {"bound": "strict", "norm": "frobenius"},
    {"bound": "strict", "norm": "sample"},
    {"bound": "smooth"},
    {"bound": "paper"},
    {"bound": "paper", "measure": "pass"},
    {"bound": "strict", "update": 4},
]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_ranks_agree_bit_for_bit(settings, count):
    found = ranks(count, LipschitzLR(**settings), model(), 16 // count, max_epochs=3)
    assert len(found[0]["rates"]) == 18
    assert_alike(*found)


@pytest.mark.parametrize(("count", "optimizer"), [(2, "adamw"), (4, "adamw"), (2, "schedule_free")])
def test_ranks_agree_on_the_steps_of_those_that_rescale(count, optimizer):
    found = ranks(count, LipschitzLR(), model(optimizer), 16 // count, max_epochs=6)
    assert len(found[0]["rates"]) == 36
    assert_alike(*found)


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_ranks_agree_on_a_measured_loss(optimizer):
    class Masked(Classifier):
        def training_step(self, batch, batch_idx):
            kept = batch[0][:, 0] > -0.5  # another number of rows on each rank
            return F.cross_entropy(self.net(batch[0])[kept] / 0.5, batch[1][kept])

    torch.manual_seed(1)
    found = two_ranks(LipschitzLR(loss="measured"), Masked(OPTIMIZERS[optimizer]), 8, max_epochs=3)
    assert len(found[0]["rates"]) == 18
    assert all(0 < rate < math.inf for (rate,) in found[0]["rates"][:-1])
    assert_alike(*found)


@pytest.mark.parametrize("name", ["adamw", "schedule_free"])
def test_the_same_global_batch_gives_those_that_rescale_the_same_rates(name):
    sample = {"norm": "sample"}
    whole = one_rank(LipschitzLR(**sample), model(name), 16, max_epochs=1)["rates"]
    parts = two_ranks(LipschitzLR(**sample), model(name), 8, max_epochs=1)[0]["rates"]
    accumulated = {"max_epochs": 1, "accumulate_grad_batches": 4}
    pieces = one_rank(LipschitzLR(**sample), model(name), 4, **accumulated)["rates"]
    for rates in (parts, pieces):
        assert [rate for (rate,) in rates] == pytest.approx([rate for (rate,) in whole], rel=1e-4)


@pytest.mark.parametrize("settings", SETTINGS[:5], ids=str)
def test_the_same_global_batch_gives_the_same_rate_up_to_the_bounds_tightness(settings, figure):
    whole = one_rank(LipschitzLR(**settings), model(), 16, max_epochs=3)["rates"]
    split = {
        "2 x 8": (2, lambda: two_ranks(LipschitzLR(**settings), model(), 8, max_epochs=3)[0]),
        "4 x 4": (4, lambda: ranks(4, LipschitzLR(**settings), model(), 4, max_epochs=3)[0]),
        "4 accumulated": (
            4,
            lambda: one_rank(LipschitzLR(**settings), model(), 4, max_epochs=3, accumulate_grad_batches=4),
        ),
    }
    named = " ".join(map(str, settings.values()))
    for how, (pieces, run) in split.items():
        parts = run()["rates"]
        # The bound takes the largest part's size for all: too large by at most the root of their number, and so is K.
        first = whole[0][0] / parts[0][0]
        every = [a[0] / b[0] for a, b in zip(whole, parts, strict=True)]
        figure(f"{named}: rate of 1 x 16 over {how}: first {first:.4f}, all {min(every):.4f} to {max(every):.4f}")
        loosest = {"smooth": float(pieces)}.get(settings["bound"], math.sqrt(pieces))
        if settings.get("norm") == "sample":
            loosest = 1.0
        assert 1 - 1e-5 <= first <= loosest * (1 + 1e-5)
        assert max(every) < math.sqrt(pieces)


@pytest.mark.filterwarnings("ignore:LipschitzLR. 1 batches had non-finite activations")
def test_a_rank_with_activations_that_are_not_finite_changes_nothing_about_agreement():
    class Poisoned(Classifier):
        def training_step(self, batch, batch_idx):
            if self.global_rank == 1 and batch_idx == 2:
                self.net(batch[0] * math.nan)
            return F.cross_entropy(self.net(batch[0]), batch[1])

    torch.manual_seed(1)
    first, second = two_ranks(LipschitzLR(), Poisoned(), 8, max_epochs=3)
    assert first["rates"] == second["rates"]
    assert all(math.isfinite(rate) for (rate,) in first["rates"])


def test_a_run_resumed_at_an_epochs_end_has_the_same_rates_and_weights_on_both_ranks():
    expected = two_ranks(LipschitzLR(), model(), 8, Saves(epoch=1), max_epochs=4)
    resumed = two_ranks(LipschitzLR(), model(), 8, ckpt_path="stopped.ckpt", max_epochs=4)
    for before, after in zip(expected, resumed, strict=True):
        assert after["rates"] == before["rates"][12:]
        assert all(torch.equal(a, b) for a, b in zip(before["weights"], after["weights"], strict=True))


class Squares(Classifier):
    """A squared error, of targets with much noise, which holds the rate back."""

    def training_step(self, batch, batch_idx):
        targets = F.one_hot(batch[1], CLASSES) + batch[0].sum(dim=1, keepdim=True).mul(1e4).sin()
        return F.mse_loss(self.net(batch[0]), targets)


def squares(optimizer):
    torch.manual_seed(1)
    return Squares(OPTIMIZERS[optimizer])


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_ranks_agree_on_what_a_squared_error_explains_and_on_that_of_one_rank(name):
    one_rank(callback := LipschitzLR(), squares(name), 16, max_epochs=8)
    assert callback.controllers[0].damping < 0.7
    whole = callback.controllers[0].state_dict()["damping"]["fractions"]
    parts = two_ranks(LipschitzLR(), squares(name), 8, Saves(epoch=3), max_epochs=8)
    assert_alike(*parts)
    state = torch.load("stopped.ckpt")["callbacks"]["LipschitzLR"]["optimizers"][0]
    assert state["damping"]["fractions"] == pytest.approx(whole[:5], rel=0.05)
    resumed = two_ranks(LipschitzLR(), squares(name), 8, ckpt_path="stopped.ckpt", max_epochs=8)
    assert resumed[1]["rates"] == parts[1]["rates"][24:]


class Regular(ModelCheckpoint):
    """Saves every few steps, and keeps all."""

    def __init__(self, every):
        super().__init__("all", filename="{step}", every_n_train_steps=every, save_top_k=-1)


class OtherOnOneRank(Classifier):
    """The second rank has a loss that is not recognised from step 5 on, which is not measured as such."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss.exp() if self.global_rank == 1 and self.global_step >= 4 else loss


def test_ranks_that_are_resumed_where_one_has_another_loss_than_any_before_go_on_together():
    settings = {"max_epochs": 3, "enable_checkpointing": True}
    torch.manual_seed(1)
    assert_alike(*two_ranks(LipschitzLR(), OtherOnOneRank(), 8, Regular(4), **settings))
    torch.manual_seed(1)
    found = two_ranks(LipschitzLR(), OtherOnOneRank(), 8, ckpt_path="all/step=4.ckpt", **settings)
    assert_alike(*found)
    assert len(found[0]["rates"]) == 3 * 6 - 4


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_run_resumed_in_mid_epoch_has_the_same_rates_and_weights_on_both_ranks(settings, scheduled):
    class Scheduled(Classifier):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)] if scheduled else []

    torch.manual_seed(1)
    module = Scheduled(OPTIMIZERS["momentum"])
    expected = two_ranks(LipschitzLR(**settings), module, 8, Regular(3), max_epochs=3, enable_checkpointing=True)
    assert_alike(*expected)
    for step in (3, 9, 15):
        torch.manual_seed(2)
        path = f"all/step={step}.ckpt"
        found = two_ranks(
            LipschitzLR(**settings),
            Scheduled(OPTIMIZERS["momentum"]),
            8,
            Regular(3),
            ckpt_path=path,
            max_epochs=3,
            enable_checkpointing=True,
        )
        for before, after in zip(expected, found, strict=True):
            assert after["rates"] == before["rates"][step:]
            assert all(torch.equal(a, b) for a, b in zip(before["weights"], after["weights"], strict=True))


def test_what_a_squared_error_explains_goes_on_in_mid_epoch_on_both_ranks():
    settings = {"max_epochs": 8, "enable_checkpointing": True}
    expected = two_ranks(LipschitzLR(), squares("momentum"), 8, Regular(3), **settings)
    found = two_ranks(LipschitzLR(), squares("momentum"), 8, Regular(3), ckpt_path="all/step=27.ckpt", **settings)
    assert_alike(*found)
    assert found[1]["rates"] == expected[1]["rates"][27:]


def test_parameters_that_are_not_used():
    class Partly(Classifier):
        def __init__(self):
            super().__init__()
            self.spare = torch.nn.Linear(3, 2)

    torch.manual_seed(1)
    assert_alike(*two_ranks(LipschitzLR(), Partly(), 8, ddp={"find_unused_parameters": True}, max_epochs=2))


def test_no_collective_outside_of_training_steps():
    class Guard(L.Callback):
        """Marks the time of a training step, and what is reduced outside of it."""

        def setup(self, trainer, pl_module, stage):
            self.inside, self.outside, self.seen = False, 0, 0
            reduce = trainer.strategy.reduce

            def watched(tensor, *arguments, **settings):
                # Lightning reduces a number at the end of an epoch: whether to stop.
                self.outside += not self.inside and tensor.numel() > 1
                self.seen += tensor.numel() > 1
                return reduce(tensor, *arguments, **settings)

            trainer.strategy.reduce = watched

        def on_train_batch_start(self, *_):
            self.inside = True

        def on_validation_start(self, *_):
            self.inside = False

        def on_train_epoch_end(self, trainer, pl_module):
            self.inside = False
            trainer.save_checkpoint("now.ckpt")

        def on_train_end(self, trainer, pl_module):
            Path(f"outside{trainer.global_rank}").write_text(f"{self.outside} of {self.seen}")

    two_ranks(LipschitzLR(), model(), 8, Guard(), max_epochs=2)
    assert [Path(f"outside{rank}").read_text() for rank in range(2)] == ["0 of 10", "0 of 10"]


@pytest.mark.parametrize(
    ("settings", "optimizer"),
    [
        pytest.param({}, "momentum", marks=pytest.mark.slow),
        pytest.param({"bound": "smooth"}, "momentum", marks=pytest.mark.slow),
        ({}, "adamw"),
    ],
    ids=str,
)
def test_a_sharded_network_has_the_rate_of_a_whole_one(settings, optimizer):
    expected = two_ranks(LipschitzLR(**settings), model(optimizer), 8, max_epochs=2)[0]["rates"]
    code = Path(__file__).with_name("sharded_run.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    done = subprocess.run(
        [*command, str(code), repr(settings), optimizer], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [torch.load(f"rank{rank}.pt")["rates"] for rank in range(2)]
    assert found[0] == found[1]
    assert [rate for (rate,) in found[0]] == pytest.approx([rate for (rate,) in expected], rel=1e-4)


def test_one_reduction_an_update_and_none_between(monkeypatch):
    class Count(L.Callback):
        def setup(self, trainer, pl_module, stage):
            self.reductions = []
            reduce = trainer.strategy.reduce
            trainer.strategy.reduce = lambda t, *a, **k: (self.reductions.append(t.numel()), reduce(t, *a, **k))[1]

        def on_train_end(self, trainer, pl_module):
            Path(f"reductions{trainer.global_rank}").write_text(repr(self.reductions))

    two_ranks(LipschitzLR(), model(), 8, Count(), max_epochs=3)
    # In steps 1 to 5 and at the end of each epoch; nine numbers, and one a rank. Of the step four, and two a rank, in
    # steps 1 to 5 and 12 and alone in steps 7, 9, 13 and 17. Four before the first step: whether the ranks have found
    # the same loss.
    for rank in range(2):
        reductions = Counter(eval(Path(f"reductions{rank}").read_text()))
        assert [reductions[size] for size in (9 + 2 + 8, 9 + 2, 8, 4)] == [6, 2, 4, 1]
    two_ranks(LipschitzLR(), squares("momentum"), 8, Count(), max_epochs=3)
    for rank in range(2):  # and eleven more a rank, and the mean of each output
        reductions = Counter(eval(Path(f"reductions{rank}").read_text()))
        update = 9 + 2 + 11 * 2 + CLASSES
        assert [reductions[size] for size in (update + 8, update, 8, 4)] == [6, 2, 4, 1]


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def command(*arguments, **environment):
    return [str(SCRIPT), *arguments], {**os.environ, "OMP_NUM_THREADS": "1", **environment}


FIT = ("fit", "--config", "digits.yaml", "--data.augment", "false", "--trainer.max_epochs", "2")


def epoch_lines(output):
    """The rate and the metrics of every epoch, without the time."""
    return [line.rpartition("  ")[0] for line in output.splitlines() if re.match(r" *\d+/\d", line)]


def two_nodes(*arguments):
    """What the command prints on two nodes under torchrun, and on stderr; the last line has the command's exit code.

    torchrun's agents meet a last time when the command has ended, in a store that the first of them takes along when it
    leaves; now and then the other one waits there for minutes. So the command's end is waited for, not the agents'.
    """
    port = str(free_port())
    arguments, environment = command(*arguments)
    environment["PYTHONFAULTHANDLER"] = "1"
    report = ["bash", "-c", '"$@"; code=$?; echo "exit code $code"; exit $code', "--", *arguments]
    nodes = []
    for rank in range(2):
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes",
            "2",
            "--nproc-per-node",
            "1",
            "--no-python",
        ]
        launch += ["--node-rank", str(rank), "--master-addr", "127.0.0.1", "--master-port", port]
        with open(f"stdout{rank}", "w") as stdout, open(f"stderr{rank}", "w") as stderr:
            nodes.append(subprocess.Popen([*launch, *report], env=environment, stdout=stdout, stderr=stderr))
    outputs = [Path(f"stdout{rank}") for rank in range(2)]
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and not all("exit code" in output.read_text() for output in outputs):
        if any(node.poll() for node in nodes):
            break
        time.sleep(0.2)
    else:
        for node in nodes:
            for shell in children_of(node):  # Their stacks say where a command hangs.
                subprocess.run(["pkill", "-ABRT", "--parent", str(shell)])
    for node in nodes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            node.wait(20)
        node.kill()
    return [[Path(f"{name}{rank}").read_text() for rank in range(2)] for name in ("stdout", "stderr")]


@pytest.mark.slow
def test_the_command_on_two_processes_and_on_two_nodes_is_the_same_run():
    arguments, environment = command(*FIT, "--config", "ddp.yaml")
    ddp = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)
    assert ddp.returncode == 0, ddp.stderr
    lines = epoch_lines(ddp.stdout)
    assert len(lines) == 2

    outputs, errors = two_nodes(*FIT, "--trainer.strategy", "ddp", "--trainer.num_nodes", "2", "--trainer.devices", "1")
    assert [output.splitlines()[-1:] for output in outputs] == [["exit code 0"], ["exit code 0"]], errors
    assert epoch_lines(outputs[0]) == lines


@pytest.mark.slow
def test_ranks_that_are_spawned_agree_with_those_that_are_forked():
    expected = two_ranks(LipschitzLR(), model(), 8, max_epochs=2)
    strategy = DDPStrategy(start_method="spawn", process_group_backend="gloo", timeout=timedelta(seconds=60))
    found = two_ranks(LipschitzLR(), model(), 8, strategy=strategy, max_epochs=2)
    assert_alike(*found)
    assert_alike(expected[0], found[0])


LONG = ("fit", "--config", "digits.yaml", "--config", "ddp.yaml", "--trainer.max_epochs", "2000")


def children_of(process):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def start(arguments):
    """Starts the command as the leader of a group of its own, and waits for its first epoch."""
    full, environment = command(*arguments)
    process = subprocess.Popen(
        full, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not re.match(r" *1/", process.stdout.readline()):
        assert process.poll() is None, process.stderr.read()
    return process


@pytest.mark.parametrize("victim", ["rank 1", "rank 0"])
def test_a_run_that_dies_on_one_rank_ends_on_the_other(victim):
    process = start(LONG)
    (child,) = [pid for pid in children_of(process) if b"lit-lipschitz" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(child if victim == "rank 1" else process.pid, signal.SIGKILL)
    try:
        _, stderr = process.communicate(timeout=60)
        assert process.returncode != 0
        if victim == "rank 1":
            assert "Child process with PID" in stderr or "the connection to another rank is lost" in stderr
        assert "Traceback" not in stderr
        deadline = time.monotonic() + 60
        while Path(f"/proc/{child}").exists() and state_of(child) != "Z":
            assert time.monotonic() < deadline, "rank 1 goes on without rank 0"
            time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def state_of(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


KILLED = ("fit", "--config", "digits.yaml", "--trainer.max_epochs", "6", "--test_after_fit", "false")
KILLED += ("--checkpoint.every_n_train_steps", "5", "--checkpoint.save_last", "true")


def last_checkpoint(folder):
    return max(Path(folder).rglob("last*.ckpt"), key=lambda path: path.stat().st_mtime)


def run_to_the_end(devices, *more, folder):
    """Runs the command; returns the weights of the last checkpoint."""
    overlay = ("--config", "ddp.yaml") if devices == 2 else ()
    full, environment = command(*KILLED, *overlay, *more)
    done = subprocess.run(full, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    checkpoint = torch.load(last_checkpoint(folder), weights_only=True)
    assert checkpoint["epoch"] == 5
    return checkpoint["state_dict"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return {devices: run_to_the_end(devices, folder=tmp_path_factory.mktemp("whole")) for devices in (1, 2)}


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_killed_between_checkpoints_resumes_to_the_same_weights(devices, how, undisturbed):
    overlay = ("--config", "ddp.yaml") if devices == 2 else ()
    process = start((*KILLED, *overlay))
    (os.killpg if how == signal.SIGKILL else os.kill)(process.pid, how)
    process.communicate(timeout=60)
    found = run_to_the_end(devices, "--ckpt_path", "last", folder=".")
    assert all(torch.equal(value, found[name]) for name, value in undisturbed[devices].items())


@pytest.mark.slow
@pytest.mark.parametrize("receivers", ["rank 0", "rank 1", "both"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_a_rank_ends_both_with_one_line_and_a_checkpoint_of_that_step(number, code, receivers, undisturbed):
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell has what it runs in the background ignore it
    process = start((*KILLED, "--config", "ddp.yaml"))
    signal.signal(signal.SIGINT, before)
    (child,) = [pid for pid in children_of(process) if b"lit-lipschitz" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    for pid in {"rank 0": [process.pid], "rank 1": [child], "both": [process.pid, child]}[receivers]:
        os.kill(pid, number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert stderr.count(f"lit-lipschitz: {number.name} after step ") == 1
    assert "error" not in stderr
    assert state_of(child) == "Z"
    assert torch.load(last_checkpoint("."), weights_only=True)["global_step"] % 16 == 0
    found = run_to_the_end(2, "--ckpt_path", "last", folder=".")
    assert all(torch.equal(value, found[name]) for name, value in undisturbed[2].items())


class Means(L.Callback):
    """Leaves what a rank logged in a file."""

    def on_train_epoch_end(self, trainer, pl_module):
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        torch.save(values, f"means{trainer.global_rank}.pt")


def test_epoch_means_are_those_of_all_ranks():
    torch.manual_seed(0)
    data = DigitsDataModule(batch_size=50, val_split=0.5, augment=False)
    module = ImageClassifier(MLP(), optimizer=partial(torch.optim.SGD, lr=0.0))
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60))
    trainer(Means(), devices=2, strategy=strategy, max_epochs=1).fit(module, datamodule=data)
    first, second = (torch.load(f"means{rank}.pt") for rank in range(2))
    assert first == second
    data.setup("fit")
    data.batch_size = 100  # the global batch
    for stage, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
        with torch.no_grad():
            logits = module(images)
        assert first[f"{stage}_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
        assert first[f"{stage}_acc"] == pytest.approx((logits.argmax(1) == labels).double().mean().item(), rel=1e-5)


class KeepsNorms(L.Callback):
    """Leaves each rank's weights and statistics in a file."""

    def on_train_end(self, trainer, pl_module):
        torch.save({name: value.clone() for name, value in pl_module.state_dict().items()}, f"{trainer.global_rank}.pt")


def test_batchnorm_of_averaged_weights_is_that_of_all_ranks():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 10))
    module = ImageClassifier(network, optimizer=AdamWScheduleFree)
    data = DigitsDataModule(batch_size=32)
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60))
    trainer(LipschitzLR(), KeepsNorms(), devices=2, strategy=strategy, max_epochs=2).fit(module, datamodule=data)
    first, second = (torch.load(f"{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    data.setup("fit")
    data.batch_size = 64  # the global batch
    images = torch.cat([images for images, _ in data.lipschitz_dataloader()])[: 64 * len(data.train_dataloader())]
    expected = (images.flatten(1) @ first["network.1.weight"].T).mean(dim=0)
    torch.testing.assert_close(first["network.2.running_mean"], expected, rtol=1e-4, atol=1e-4)


def test_batchnorm_of_averaged_weights_has_as_many_batches_on_each_rank():
    """35 rows on 2 ranks in batches of 4: a rank's own share would leave one row, of which there is no variance."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 10))
    module = ImageClassifier(network, optimizer=AdamWScheduleFree)
    rows = DataLoader(TensorDataset(torch.randn(35, 8), torch.arange(35) % 10), batch_size=4)
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60))
    trainer(LipschitzLR(), KeepsNorms(), devices=2, strategy=strategy, max_epochs=1).fit(module, rows)
    first, second = (torch.load(f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["network.0.running_mean"].any()
