"""`lit-lipschitz suggest`: the rate of explain, a text and a picture with its numbers, and nothing left behind."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import error_line, loader
from torch import nn
from torch.nn import functional as F

from lit_lipschitz import ResNetV1
from lit_lipschitz.cli.suggest.text import effective_batch, plot, text
from lit_lipschitz.measurement.gradient_noise import NoiseScale
from lit_lipschitz.suggestion import LossCurve, Suggestion

DIGITS = ["--config", "digits", "--trainer.accelerator", "cpu"]


@pytest.fixture
def suggested(lit):
    """Makes a suggestion in this process; returns the answer as JSON."""

    def run(*arguments):
        before = set(Path(".").rglob("*"))
        code, out, err = lit("suggest", *arguments, "--json")
        assert code == 0, err
        assert set(Path(".").rglob("*")) == before
        return json.loads(out)

    return run


def explained_rate(lit, *arguments):
    code, out, err = lit("explain", *arguments, "--json")
    assert code == 0, err
    (one,) = json.loads(out)["optimizers"]
    return one["rate"], one["L"]


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--model.optimizer", "AdamW", "--model.scheduler", "null"],
        ["--trainer.accumulate_grad_batches", "2", "--trainer.gradient_clip_val", "0.05"],
        ["--lipschitz.bound", "smooth", "--lipschitz.max_lr", "0.01"],
        ["--lipschitz.loss", "measured"],
        ["--lipschitz.bound", "paper", "--model.optimizer.momentum", "0"],
    ],
)
def test_the_rate_is_that_of_explain(suggested, lit, more):
    answer = suggested(*DIGITS, *more, "--batches", "3")
    assert (answer["rate"], answer["L"]) == explained_rate(lit, *DIGITS, *more)
    assert answer["rates"][0] == answer["rate"]
    assert answer["rate_range"] == [min(answer["rates"]), max(answer["rates"])]
    assert len(answer["rates"]) == 3
    assert answer["output_layers"] == "network.head"
    assert answer["kind"] == ("measured" if "measured" in more else "estimate" if "paper" in more else "bound")
    assert answer["batch_size"] == (64 if "--trainer.accumulate_grad_batches" in more else 32)
    noise = answer["noise_scale"]
    assert noise["value"] == pytest.approx(noise["covariance_trace"] / noise["grad_square"])
    assert noise["low"] < noise["value"]
    assert answer["curve"] is None


class Own(L.LightningModule):
    """Somebody's own: logs in its step, takes the batch alone, returns a dict, and prepares its batches."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.2), nn.Linear(16, 3))

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {"inputs": batch[0], "targets": batch[1]}

    def training_step(self, batch):
        loss = F.cross_entropy(self.net(batch["inputs"]), batch["targets"])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        print("a line of the module's own")
        return {"loss": loss}

    def train_dataloader(self):
        return loader()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


class Manual(Own):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


@pytest.fixture
def own(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    name = "test_suggest"
    Path("own.yaml").write_text(
        f"seed_everything: 0\nmodel:\n  class_path: {name}.Own\ntrainer:\n  accelerator: cpu\n  max_epochs: 2\n"
    )
    return ["--config", "own.yaml"]


def test_a_module_of_somebodys_own(suggested, own):
    answer = suggested(*own, "--batches", "2", "--curve")
    assert answer["loss"] == "cross_entropy"
    assert answer["output_layers"] == "net.2"
    assert answer["batch_size"] == 16
    assert len(answer["curve"]["rates"]) == len(answer["curve"]["losses"]) == 17
    assert answer["curve"]["rates"][8] == answer["rate"]


def test_no_more_batches_than_an_epoch_has(lit):
    code, out, err = lit("suggest", *DIGITS, "--batches", "3", "--trainer.limit_train_batches", "3", "--json")
    assert code == 0, err
    assert len(json.loads(out)["rates"]) == 3
    assert "warning" not in err
    code, out, err = lit("suggest", *DIGITS, "--trainer.limit_train_batches", "3", "--batches", "1000", "--json")
    assert code == 0, err
    assert len(json.loads(out)["rates"]) == 3
    assert "warning: suggest: --batches is 1000 and an epoch has 3 optimizer steps; all of them are used" in err


def test_text_and_picture(lit):
    pytest.importorskip("matplotlib")
    code, out, err = lit("suggest", *DIGITS, "--png", "curve.png")
    assert code == 0, err
    assert [path.name for path in Path(".").iterdir()] == ["curve.png"]
    assert Path("curve.png").read_bytes().startswith(b"\x89PNG")
    joined = " ".join(out.split())
    for part in (
        "the learning rate of the first step, before the schedule's factor;",
        "over 8 batches",
        "Lipschitz constant of the loss with respect to the head's weights, a proven bound",
        "cross_entropy, of the output of network.head",
        "32 examples in an optimizer step; the gradient noise scale is about",
        "batch sizes above it save few steps",
        "loss of a held-out batch after one step at each learning rate;",
        "O: the suggested rate",
    ):
        assert part in joined
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "0"], "suggest --batches 0: expected the number of batches, at least 1"),
        (["--batches", "many"], "argument --batches: invalid int value: 'many'"),
        (["--fixed_rate", "true"], "suggest --fixed_rate true"),
        (["--ckpt_path", "hpc"], "suggest --ckpt_path: it is for the initial weights"),
        (["--lipschitz.bound", "paper", "--lipschitz.measure", "pass"], "it reads all of the training set"),
        (["--lipschitz.initial_lr", "0.1"], "initial_lr=...): it is the first learning rate"),
        (["--trainer.strategy", "ddp_spawn"], "pass --trainer.strategy ddp"),
        (["--trainer.limit_train_batches", "0", "--model.scheduler", "null"], "suggest found no batch to train on"),
        (["--batches", "4", "--trainer.accumulate_grad_batches", "1000"], "expected at least 1000 batches"),
        (["--png", "nowhere/curve.png"], "expected a file in a folder that exists"),
        (["--png"], "argument --png: expected one argument"),
        (["--model.network.class_path", "lit_lipschitz.Nothing"], "Nothing"),
    ],
)
def test_a_mistake_is_one_line_with_code_2(lit, arguments, message):
    code, out, err = lit("suggest", *DIGITS, *arguments)
    assert message in error_line(err)
    assert (code, out) == (2, "")
    assert list(Path(".").iterdir()) == []


def test_manual_optimization_is_refused(lit, own):
    code, _, err = lit("suggest", *own, "--model", "test_suggest.Manual")
    assert code == 2
    assert "found Manual with manual optimization" in error_line(err)


def test_a_picture_needs_matplotlib(lit, monkeypatch):
    monkeypatch.setattr(
        "lit_lipschitz.cli.suggest.command.find_spec", lambda name: None if name == "matplotlib" else find_spec(name)
    )
    code, _, err = lit("suggest", *DIGITS, "--png", "curve.png")
    assert code == 2
    assert "pip install 'lit-lipschitz[plots]'" in error_line(err)


def found(noise, curve=None):
    return Suggestion(
        0.1, (0.1, 0.2, 0.1), 10.0, "bound", "Lipschitz constant", "cross_entropy", "head", 32, noise, curve
    )


@pytest.mark.parametrize(
    ("noise", "sentence"),
    [
        (
            NoiseScale(1234.0, 876.0, 2345.0, 1.0, 1234.0),
            "the gradient noise scale is about 1,200 (95 % interval from 3 batches: 880 to 2,300) and grows during "
            "training; batch sizes above it save few steps",
        ),
        (
            NoiseScale(1234.0, 876.0, math.inf, 1.0, 1234.0),
            "the gradient noise scale is about 1,200 (95 % interval from 3 batches: 880 or more; use more batches "
            "for a narrower one) and grows during training; batch sizes above it save few steps",
        ),
        (
            NoiseScale(None, 876.0, math.inf, -1.0, 1234.0),
            "the gradient noise scale is at least 880: larger batches save steps up to there. 3 batches are too few to "
            "estimate it",
        ),
        (None, "the gradient noise scale needs at least 2 batches"),
    ],
)
def test_the_sentence_says_how_certain_the_noise_scale_is(noise, sentence):
    assert effective_batch(found(noise)) == sentence
    assert sentence in " ".join(text(found(noise)).split())


RATES = tuple(0.1 * 10 ** (i / 4) for i in range(-8, 9))


@pytest.mark.parametrize(
    "losses",
    [
        [2.0] * 8 + [1.5, 1.0, 1.2, 2.5, 1e9, math.inf, math.nan, math.nan, math.nan],
        [2.0] * 17,
        [0.0] * 17,
        [math.nan] * 17,
        [2.0 + i for i in range(17)],
    ],
)
def test_the_plot_shows_every_loss_in_80_columns(losses):
    curve = LossCurve(RATES, tuple(losses), losses[0] if math.isfinite(losses[0]) else 2.0)
    lines = plot(curve)
    assert max(map(len, lines)) <= 80
    drawn = "".join(line[11:] for line in lines[1:12])
    assert sum(drawn.count(mark) for mark in "*^O") == 17
    assert drawn.count("O") == 1
    assert ("^: off scale" in lines[-1]) == ("^" in drawn)
    assert all(line.strip() for line in [lines[0], *lines[-3:]])
    assert text(found(None, curve)).endswith("\n".join(lines))


def test_the_plot_falls_where_the_loss_falls():
    losses = [3.0 - i / 8 for i in range(17)]
    rows = [line[11:] for line in plot(replace(LossCurve(RATES, tuple(losses), 3.0)))[1:12]]
    heights = [next(i for i, row in enumerate(rows) if len(row) > 3 * j and row[3 * j] in "*O") for j in range(17)]
    assert heights == sorted(heights)
    assert (heights[0], heights[-1]) == (0, 10)


def test_help_says_what_it_is(lit):
    code, out, _ = lit("suggest", "--help")
    assert code == 0
    for part in ("usage: lit-lipschitz suggest", "--batches", "--curve", "--png", "--json"):
        assert part in out


@pytest.mark.slow
def test_ranks_are_counted():
    command = [sys.executable, "-m", "lit_lipschitz.cli.main", "suggest", *DIGITS, "--batches", "4", "--json"]
    result = subprocess.run(
        [*command, "--trainer.devices", "2", "--trainer.strategy", "ddp"], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["batch_size"] == 64
    assert answer["noise_scale"]["covariance_trace"] > 0
    assert list(Path(".").iterdir()) == []


@pytest.mark.real_data
def test_resnet20_on_cifar10_takes_a_forward_pass_a_batch(suggested, real_data, monkeypatch):
    sizes, forward = [], ResNetV1.forward

    def counted(self, images):
        sizes.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(ResNetV1, "forward", counted)
    answer = suggested("--config", "cifar10", "--trainer.accelerator", "cpu", "--data.data_dir", str(real_data),
                       "--data.verify", "false")  # fmt: skip
    assert len(answer["rates"]) == 8
    assert sizes == [2, *8 * [128]]  # two images to check the shapes
