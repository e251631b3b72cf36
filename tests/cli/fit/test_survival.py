"""Runs that are ended, and what they leave: whole checkpoints, one line, the right exit code."""

import ast
import collections
import os
import resource
import signal
import socket
import subprocess
import sys
import zipfile
from datetime import timedelta
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import Classifier, error_line, last, loader, same, trainer

from lit_lipschitz.cli.fit import checkpoints
from lit_lipschitz.cli.fit.checkpoints import WholeCheckpoints, check_checkpoint
from lit_lipschitz.cli.fit.error_messages import explain_error
from lit_lipschitz.errors import LitLipschitzError

FIT = ("fit", "--config", "digits", "--trainer.accelerator", "cpu", "--test_after_fit", "false",
       "--model.network.dropout", "0.2", "--trainer.max_epochs", "3")  # fmt: skip


class Send(L.Callback):
    """Sends this process a signal at the end of a batch's backward, or at the start of a validation."""

    def __init__(self, step: int, number: int = signal.SIGTERM, validating: bool = False) -> None:
        self.step, self.number, self.validating = step, number, validating

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step and not self.validating:
            os.kill(os.getpid(), self.number)

    def on_validation_start(self, trainer, pl_module):
        if trainer.global_step >= self.step and self.validating:
            os.kill(os.getpid(), self.number)


class Die(L.Callback):
    """Ends the run without a word before an optimizer step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step:
            raise OSError(5, "dead")


@pytest.fixture(autouse=True)
def _signals():
    """Lightning leaves SIGINT ignored after an interrupt; a shell in the background has it ignored before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(step, number=signal.SIGTERM, validating=False):
    return (
        "--trainer.callbacks+", "test_survival.Send", "--trainer.callbacks.step", str(step),
        "--trainer.callbacks.number", str(int(number)), "--trainer.callbacks.validating", str(validating).lower(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("number", "code", "extra", "step"),
    [
        (signal.SIGTERM, 143, (), 56),
        (signal.SIGINT, 130, (), 56),
        # The step that is under way is made of batches 55 to 57 of 40 an epoch: the signal waits for the third.
        (signal.SIGTERM, 143, ("--trainer.accumulate_grad_batches", "3"), 19),
    ],
)
def test_a_signal_in_mid_epoch_saves_a_checkpoint_there_and_resuming_ends_in_the_same_weights(
    lit, number, code, extra, step
):  # fmt: skip
    assert lit(*FIT, *extra, "--trainer.default_root_dir", "whole")[0] == 0
    found, _, err = lit(*FIT, *extra, *send(step, number), "--trainer.default_root_dir", "parts")
    assert found == code
    assert f"{signal.Signals(number).name} after step {step + 1}: saved " in err
    assert "Traceback" not in err
    assert last("parts")["global_step"] == step + 1
    assert lit(*FIT, *extra, "--trainer.default_root_dir", "parts", "--ckpt_path", "last")[0] == 0
    whole, parts = last("whole"), last("parts")
    assert whole["global_step"] == parts["global_step"]
    assert same(whole, parts)


@pytest.mark.parametrize(
    ("place", "arguments"),
    [
        ("check_options", FIT),
        ("resolve_configs", FIT),
        ("_run", FIT),
        ("list_configs", ("configs",)),
        ("text", ("fit", "--help")),
    ],
)
def test_sigint_ends_a_command_that_has_not_begun_to_train_with_its_code(lit, monkeypatch, place, arguments):
    monkeypatch.setattr(f"lit_lipschitz.cli.main.{place}", lambda *_: signal.raise_signal(signal.SIGINT))
    code, _, err = lit(*arguments)
    assert (code, err) == (130, "")


def test_a_signal_during_a_validation_ends_the_run_behind_it(lit):
    lit(*FIT, "--trainer.default_root_dir", "whole")
    found, out, _ = lit(*FIT, *send(80, validating=True), "--trainer.default_root_dir", "parts")
    assert found == 143
    assert "\n  2/3 " in out
    assert last("parts")["global_step"] == 81
    lit(*FIT, "--trainer.default_root_dir", "parts", "--ckpt_path", "last")
    assert same(last("whole"), last("parts"))


def test_a_signal_in_the_last_validation_saves_the_end_of_the_run(lit):
    found, _, err = lit(*FIT, *send(120, validating=True), "--checkpoint.every_n_epochs", "5")
    assert found == 143
    assert last(".")["global_step"] == 120
    assert "SIGTERM after step 120: saved " in err


def test_a_run_that_dies_again_and_again_ends_in_the_same_weights(lit):
    lit(*FIT, "--trainer.default_root_dir", "whole")
    # A checkpoint of an epoch's last step, one in the middle of the next epoch, and one of its last step.
    arguments = (*FIT, "--checkpoint.every_n_train_steps", "8", "--trainer.default_root_dir", "parts")
    for step, saved, more in ((43, 40, ()), (51, 48, ("--ckpt_path", "last")), (85, 80, ("--ckpt_path", "last"))):
        die = ("--trainer.callbacks+", "test_survival.Die", "--trainer.callbacks.step", str(step))
        assert lit(*arguments, *die, *more)[0] == 1
        assert last("parts")["global_step"] == saved
    assert lit(*arguments, "--ckpt_path", "last")[0] == 0
    assert same(last("whole"), last("parts"))


# -- checkpoints that can't be written, or read ------------------------------------------------------------------------


def test_a_checkpoint_is_never_a_part_of_one(monkeypatch):
    WholeCheckpoints().save_checkpoint({"weight": torch.ones(3)}, "last.ckpt")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LitLipschitzError, match=r"last.ckpt can't be written: No space left on device"):
        WholeCheckpoints().save_checkpoint({"weight": torch.zeros(3)}, "last.ckpt")
    assert [path.name for path in Path(".").iterdir()] == ["last.ckpt"]
    assert torch.equal(torch.load("last.ckpt", weights_only=True)["weight"], torch.ones(3))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_code_in_a_checkpoint_does_not_run(lit):
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0", "evil": Evil()}, "evil.ckpt")
    code, _, err = lit("fit", "--config", "digits", "--ckpt_path", "evil.ckpt")
    assert code == 1
    assert "not a checkpoint, or only a part of one" in error_line(err)
    with pytest.raises(Exception, match="[Ww]eights"):
        WholeCheckpoints().load_checkpoint("evil.ckpt")
    assert not Path("ran").exists()


@pytest.fixture
def somebody(monkeypatch):
    """A module in the folder of the run, whose import is noticed."""
    Path("somebody.py").write_text("from pathlib import Path\nPath('ran').touch()\nclass X: pass\n")
    monkeypatch.syspath_prepend(".")


@pytest.mark.parametrize("name", ["_class_path", "_instantiator"])
def test_a_class_that_a_checkpoint_names_is_not_imported(lit, somebody, name):
    content = {"state_dict": {}, "pytorch-lightning_version": "2.6.6", "epoch": 0, "global_step": 0, "loops": {}}
    torch.save({**content, "hyper_parameters": {name: "somebody.X"}}, "some.ckpt")
    code, _, err = lit("test", "--config", "digits", "--trainer.accelerator", "cpu", "--ckpt_path", "some.ckpt")
    assert code == 1
    assert "the checkpoint is of another network: Missing key(s)" in error_line(err)
    assert not Path("ran").exists()


@pytest.mark.parametrize("part", ["loops", "optimizer_states", "lr_schedulers", "callbacks"])
def test_a_part_of_a_checkpoint_that_is_of_another_form_is_one_line(part):
    training = trainer()
    training.fit(Classifier(), loader())
    training.save_checkpoint("whole.ckpt")
    content = torch.load("whole.ckpt", weights_only=True)
    torch.save({**content, part: 3}, "odd.ckpt")
    with pytest.raises((AttributeError, TypeError, KeyError)) as caught:
        trainer(max_epochs=3).fit(Classifier(), loader(), ckpt_path="odd.ckpt")
    line, code = explain_error(caught.value, True, ".")
    assert line.startswith("the checkpoint can't be restored (")
    assert code == 1


def archive(pickled, compression=zipfile.ZIP_STORED, tensor=b"0123456789abcdef"):
    """A checkpoint's archive with a pickle of one's own."""
    torch.save({"a": torch.zeros(4)}, "whole.ckpt")
    with zipfile.ZipFile("whole.ckpt") as whole, zipfile.ZipFile("bad.ckpt", "w", compression) as bad:
        for name in whole.namelist():
            kind = name.rpartition("/")[2]
            bad.writestr(name, {"data.pkl": pickled, "0": tensor}.get(kind, whole.read(name)))


def call(function, arguments):
    return b"\x80\x02c" + function.replace(".", "\n").encode() + b"\n" + arguments + b"R."


# 1 << 31 bytes or numbers each, of a file of 2 kB.
BOMBS = {
    "bytearray": call("builtins.bytearray", b"J\x00\x00\x00\x7f\x85"),
    "bytearray of Python 2": call("__builtin__.bytearray", b"J\x00\x00\x00\x7f\x85"),
    "tensor": call("torch.FloatTensor", b"J\x00\x00\x00\x7f\x85"),
    "codecs": call("_codecs.encode", b"X\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86"),
    "expanded": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQK\x00J\x00\x00\x00\x7f\x85K\x00\x85\x89"
        b"ccollections\nOrderedDict\n)RtR."
    ),
    "repeated": (
        b"\x80\x02cbuiltins\nset\nq\x00X\x00\x00\x01\x00" + bytes(1 << 16) + b"\x85q\x01" + b"h\x00h\x01R" * 9999 + b"."
    ),
    "many": b"\x80\x02" + b"}" * (1 << 22) + b".",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_checkpoint_that_makes_much_of_little_is_refused(kind):
    archive(BOMBS[kind])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LitLipschitzError, match="not a checkpoint, or only a part of one"):
        check_checkpoint(Path("bad.ckpt"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


class _EarlierReader:
    """torch's reader of archives before 2.13."""

    def __init__(self, path):
        reader = torch._C.PyTorchFileReader(path)
        self.get_all_records, self.get_record = reader.get_all_records, reader.get_record


@pytest.mark.parametrize("torch_tells_sizes", [True, False])
def test_a_compressed_checkpoint_is_refused(torch_tells_sizes, monkeypatch):
    if not torch_tells_sizes:
        monkeypatch.setattr(checkpoints, "PyTorchFileReader", _EarlierReader)
    torch.save({"state_dict": {"a": torch.zeros(4)}, "pytorch-lightning_version": "2.6.6"}, "whole.ckpt")
    check_checkpoint(Path("whole.ckpt"))
    with zipfile.ZipFile("whole.ckpt") as whole, zipfile.ZipFile("bad.ckpt", "w", zipfile.ZIP_DEFLATED) as bad:
        for name in whole.namelist():
            bad.writestr(name, bytes(1 << 28) if name.endswith("/0") else whole.read(name))
    with pytest.raises(LitLipschitzError, match="not a checkpoint, or only a part of one"):
        check_checkpoint(Path("bad.ckpt"))


@pytest.mark.parametrize(
    "value",
    [torch.arange(6.0).view(2, 3).T, torch.zeros(1).expand(1000), torch.nn.Parameter(torch.ones(2)), torch.Size([2]),
     b"bytes", bytearray(b"more"), {1, 2}, 1 + 2j, torch.zeros(2, dtype=torch.uint16), torch.eye(2).to_sparse(),
     {(1, "a"): torch.device("cpu")}, torch.zeros(0), collections.Counter("aab"), 1 << 70],
    ids=str,
)  # fmt: skip
def test_what_torch_saves_is_a_checkpoint(value):
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6", "value": value}, "whole.ckpt")
    check_checkpoint(Path("whole.ckpt"))


# A file may be no larger than this: a disk that is full for checkpoints (of 60 kB), which leaves room for curves.
LIMITED = """
import resource, signal, sys
size = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
sys.argv = ["lit-lipschitz", *sys.argv[1:]]
from lit_lipschitz.cli.main import main
sys.exit(main())
"""


def test_a_full_disk_is_one_line_and_leaves_earlier_checkpoints_whole(lit):
    lit(*FIT[:-1], "1")
    before = last(".")
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, "40000", *FIT, "--ckpt_path", "last"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 1
    line = error_line(run.stderr)
    for part in ("last.ckpt can't be written: File too large", "--checkpoint.dirpath", "--ckpt_path last"):
        assert part.replace("last.ckpt", ".ckpt") in line
    assert same(before, last("."))
    assert not list(Path("lightning_logs").rglob("*.part"))


@pytest.mark.parametrize("size", [500, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_for_curves_is_one_line(lit, size):
    """The checkpoints are in another folder, and none is due before the end."""
    lit(*FIT[:-1], "1")
    before = last(".")
    rare = ("--checkpoint.every_n_epochs", "50", "--trainer.log_every_n_steps", "2")
    command = [sys.executable, "-c", LIMITED, str(size), *FIT, *rare]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    line = error_line(run.stderr)
    for part in ("lightning_logs/version_1: can't be written: File too large", "make room", "default_root_dir"):
        assert part in line
    assert same(before, last("."))


def test_no_room_for_temporary_files_is_one_line():
    """As torch needs them."""
    command = [sys.executable, "-c", LIMITED, "0", *FIT]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert "No usable temporary directory found" in error_line(run.stderr)
    assert "TMPDIR" in error_line(run.stderr)


def test_a_folder_without_write_permission_is_one_line(lit):
    lit(*FIT[:-1], "1")
    before = last(".")
    Path("locked").mkdir(mode=0o555)
    # Root may write anywhere, unless it gives up that capability.
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    for more in (
        ("--trainer.default_root_dir", "locked"),
        ("--checkpoint.dirpath", "locked/checkpoints", "--ckpt_path", "last"),
    ):
        command = [*drop, sys.executable, "-m", "lit_lipschitz", *FIT, *more]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert run.returncode == 1
        assert "locked" in error_line(run.stderr)
        assert "Permission denied" in error_line(run.stderr)
    assert list(Path("locked").iterdir()) == []
    assert same(before, last("."))


def test_a_truncated_checkpoint_is_one_line_and_leaves_earlier_ones_whole(lit):
    lit(*FIT[:-1], "1")
    (whole,) = Path("lightning_logs").rglob("last.ckpt")
    content = whole.read_bytes()
    for share in (0.0, 0.3, 0.6, 0.99):
        Path("part.ckpt").write_bytes(content[: int(share * len(content))])
        code, _, err = lit(*FIT, "--ckpt_path", "part.ckpt")
        assert code == 1
        assert "part.ckpt: not a checkpoint, or only a part of one" in error_line(err)
        assert whole.read_bytes() == content


def test_a_folder_that_can_not_be_written_is_one_line(lit):
    Path("taken").write_text("a file where the folder of runs would be")
    code, _, err = lit(*FIT, "--trainer.default_root_dir", "taken")
    assert code == 1
    assert "taken" in error_line(err)
    assert Path("taken").read_text().startswith("a file")
    code, _, err = lit(*FIT, "--checkpoint.dirpath", "taken/checkpoints")
    assert code == 1
    assert "taken" in error_line(err)


@pytest.mark.parametrize("length", [("--trainer.max_epochs", "3"), ("--trainer.max_steps", "50")], ids=str)
def test_the_last_checkpoint_is_of_the_last_step(lit, length):
    """Of a run whose checkpoints are between others, and of one that ends in mid-epoch."""
    more = ("--checkpoint.every_n_train_steps", "16") if "epochs" in length[0] else ()
    code, out, _ = lit(*FIT, *more, *length, "--test_after_fit", "true")
    assert code == 0
    (last,) = Path("lightning_logs").rglob("last.ckpt")
    made = torch.load(last, weights_only=True)
    assert made["global_step"] == (50 if "steps" in length[0] else 3 * 40)
    tested = out.splitlines()[-3]
    assert tested.startswith("test_loss")
    code, out, _ = lit("test", *FIT[1:-2], "--ckpt_path", str(last))
    assert code == 0
    assert out.splitlines() == [tested]


# -- ranks -------------------------------------------------------------------------------------------------------------


def meet_and_part(rank, port):
    """Two ranks meet, and the second one ends; prints the line of the first one's error."""
    store = torch.distributed.TCPStore("127.0.0.1", port, 2, is_master=rank == 0, timeout=timedelta(seconds=20))
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.distributed.barrier()
    if rank == 0:
        with pytest.raises(RuntimeError) as caught:
            [torch.distributed.all_reduce(torch.ones(1)) for _ in range(1000)]
        Path("line").write_text(str(explain_error(caught.value, True, ".")))
    os._exit(0)


def test_the_end_of_another_rank_is_one_line():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    torch.multiprocessing.start_processes(meet_and_part, (port,), nprocs=2, start_method="fork")
    line, code = ast.literal_eval(Path("line").read_text())
    assert line.startswith("the connection to another rank is lost, or that rank is late (")
    assert "\n" not in line
    assert "/gloo/transport/" not in line
    assert code == 1


def test_a_rank_that_does_not_come_in_time_is_one_line():
    with socket.socket() as server:  # which listens to nobody
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        with pytest.raises(RuntimeError) as caught:
            torch.distributed.TCPStore("127.0.0.1", port, 2, is_master=False, timeout=timedelta(seconds=1))
    line, code = explain_error(caught.value, True, ".")
    assert "the connection to another rank is lost, or that rank is late (" in line
    assert code == 1


def test_a_rank_that_is_late_is_one_line():
    error = RuntimeError("Application timeout caused pair closure")  # of gloo
    assert "(Application timeout caused pair closure)" in explain_error(error, True, ".")[0]
