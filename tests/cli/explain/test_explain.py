"""`lit-lipschitz explain`: its numbers multiply out and are those of fit, and it leaves nothing behind."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import loader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F

from lit_lipschitz import ImageClassifier

DIGITS = ["--config", "digits", "--trainer.accelerator", "cpu"]


@pytest.fixture
def explain(lit):
    """Explains in this process; returns the only optimizer's part of the answer as JSON."""

    def run(*arguments):
        before = {path: path.stat().st_mtime_ns for path in Path(".").rglob("*")}
        code, out, err = lit("explain", *DIGITS, *arguments, "--json")
        assert code == 0, err
        assert {path: path.stat().st_mtime_ns for path in Path(".").rglob("*")} == before
        answer = json.loads(out)
        (one,) = answer["optimizers"]
        return answer, one

    return run


def values(one):
    """The values of the terms by their symbols."""
    assert len({term["symbol"] for term in one["terms"]}) == len(one["terms"])
    return {term["symbol"]: term["value"] for term in one["terms"]}


def recompute(one):
    """L by the formula that is printed, from the numbers that are printed."""
    names = values(one)
    formula = one["formula"].replace("lambda", "weight_decay").replace("^", "**")
    return eval(formula, {"sqrt": math.sqrt}, {**names, "weight_decay": names["lambda"]})


def first_step(folder="lightning_logs"):
    """What fit has logged of the first step of the newest run."""
    newest = max(Path(folder).iterdir(), key=lambda path: int(path.name.partition("_")[2]))
    events = EventAccumulator(str(newest))
    events.Reload()
    return {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}


def terms_of(out, *names):
    """The values of terms in the text."""
    return [float(re.search(rf"^{name} +([\d.e-]+)", out, re.M)[1]) for name in names]


def largest(out, constant, gain):
    """The largest of the constants of the rule `bounded`, with C and c as given and the others as printed."""
    scale, past, descent, printed, c = terms_of(out, "s", "past", "P", "C", "c")
    assert (printed, c) == pytest.approx((constant, gain), rel=1e-4)
    return max(constant / (gain * scale), past, descent)


def test_the_text_names_everything_and_its_numbers_multiply_out(lit):
    code, out, err = lit("explain", *DIGITS, "--model.optimizer.weight_decay", "0.01")
    assert code == 0, err
    assert list(Path(".").iterdir()) == []
    for part in (
        "optimizer step 1, in epoch 1",
        "network.head: Linear, 128 inputs, 10 outputs, with bias; found",
        "cross_entropy: mean; found in the autograd graph",
        "k         10,",
        "m         32, examples that an optimizer step averages over: 32 in a batch x 1 accumulated batch x 1 rank",
        "Frobenius norm of a batch of the head's inputs with a column of ones for the bias",
        "Lipschitz constant of the loss with respect to the head's weights, bound=strict",
        "= G_max * K_z / sqrt(m) + lambda * W",
        "G_max     1.41421, largest possible gradient norm",
        "bounded, for SGD: rate = 1 / max(K, past, P), the inverse of the largest of three constants.",
        "b         0.9, the optimizer's momentum",
        "from LinearWarmupDecay",
    ):
        assert part in out
    number = r"([\d.e+-]+)"
    grad_bound, size, m, decay, weight = map(
        float, re.search(rf"= {number} \* {number} / sqrt\((\d+)\) \+ {number} \* {number}\n", out).groups()
    )
    data, l2 = map(float, re.search(rf"= {number} \+ {number}\n", out).groups())
    (constant,) = re.findall(rf"^ +=? ?= {number}$", out, re.M)
    assert grad_bound * size / math.sqrt(m) == pytest.approx(data, rel=1e-5)
    assert decay * weight == pytest.approx(l2, rel=1e-5)
    assert (grad_bound, decay) == (1.41421, 0.01)
    assert data + l2 == pytest.approx(float(constant), rel=1e-5)
    (rate,) = re.findall(rf"^rate +{number}$", out, re.M)
    (factor,) = re.findall(rf"^factor +{number},", out, re.M)
    (lr,) = re.findall(rf"^lr +{number} =", out, re.M)
    assert float(rate) == pytest.approx(1 / largest(out, float(constant), min(math.sqrt(m / 2), 10)), rel=1e-4)
    assert float(lr) == pytest.approx(float(rate) * float(factor), rel=1e-5)
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize(
    ("bound", "norm"),
    [("strict", "frobenius"), ("strict", "sample"), ("smooth", "spectral"), ("smooth", "frobenius"),
     ("smooth", "sample"), ("paper", "frobenius"), ("paper", "sample")],
)  # fmt: skip
def test_every_family_multiplies_out_and_is_what_fit_uses(explain, lit, bound, norm):
    options = ["--lipschitz.bound", bound, "--lipschitz.norm", norm, "--model.optimizer.weight_decay", "0.001",
               "--model.label_smoothing", "0.1", "--trainer.accumulate_grad_batches", "2",
               "--trainer.max_epochs", "1"]  # fmt: skip
    answer, one = explain(*options)
    assert (answer["step"], answer["epoch"]) == (1, 1)
    terms = values(one)
    assert (one["bound"], one["norm"], terms["k"]) == (bound, norm, 10)
    assert one["loss"]["arguments"]["label_smoothing"] == pytest.approx(0.1)
    assert (terms["m"], one["accumulation"], one["ranks"]) == (64, 2, 1)
    assert recompute(one) == pytest.approx(one["L"], rel=1e-12)
    assert terms["data"] + terms["l2"] == terms["L"] == one["L"]
    assert one["rate"] * one["factor"] == pytest.approx(one["lr"], rel=1e-12)

    assert lit("fit", *DIGITS, *options, "--trainer.log_every_n_steps", "1", "--test_after_fit", "false")[0] == 0
    logged = first_step()
    assert logged["lipschitz/lr"] == pytest.approx(one["lr"], rel=1e-6)
    assert logged["lipschitz/constant"] == pytest.approx(one["L"], rel=1e-6)
    assert logged["lipschitz/activation_norm"] == pytest.approx(terms["K_z"], rel=1e-6)
    assert logged["lipschitz/weight_norm"] == pytest.approx(terms["W"], rel=1e-6)


def test_a_checkpoint_explains_the_step_that_comes_next(explain, lit):
    run = [*DIGITS, "--test_after_fit", "false", "--trainer.log_every_n_steps", "1"]
    assert lit("fit", *run, "--trainer.max_epochs", "2")[0] == 0
    answer, one = explain("--trainer.max_epochs", "3", "--ckpt_path", "last")
    assert (answer["step"], answer["epoch"]) == (81, 3)
    assert recompute(one) == pytest.approx(one["L"], rel=1e-12)
    assert lit("fit", *run, "--trainer.max_epochs", "3", "--ckpt_path", "last")[0] == 0
    logged = first_step()
    assert logged["lipschitz/lr"] == pytest.approx(one["lr"], rel=1e-6)
    assert logged["lipschitz/constant"] == pytest.approx(one["L"], rel=1e-6)


def test_a_checkpoint_at_the_end_of_its_run_has_no_next_step(lit):
    arguments = [*DIGITS, "--trainer.max_epochs", "1"]
    assert lit("fit", *arguments, "--test_after_fit", "false")[0] == 0
    code, out, err = lit("explain", *arguments, "--ckpt_path", "last")
    assert (code, out) == (2, "")
    assert "no optimizer step to make: the run is in epoch 1 of 1 and has made 40 steps; raise --trainer.max_ep" in err


def test_limits_and_fixed_rates_are_named(lit):
    code, out, _ = lit("explain", *DIGITS, "--lipschitz.max_lr", "0.01")
    assert code == 0
    assert re.search(r"^rate +0.01, limited by max_lr$", out, re.M)
    assert re.search(r"^max_lr +0.01, the limit that changed the rate of 0\.[1-9]\d*$", out, re.M)
    code, out, _ = lit("explain", *DIGITS, "--lipschitz.initial_lr", "0.25", "--model.scheduler", "null")
    assert code == 0
    assert "L         not used for this rate\n" in out
    assert "none yet: the first rate is initial_lr" in out
    assert re.search(r"^rate +0.25$", out, re.M)
    assert re.search(r"^factor +0.00\d+, from LipschitzLR's own warm-up and decay$", out, re.M)
    off = ("--lipschitz.initial_lr", "0.25", "--model.scheduler", "null", "--lipschitz.schedule", "none")
    code, out, _ = lit("explain", *DIGITS, *off)
    assert code == 0
    assert re.search(r"^factor +1, without a scheduler$", out, re.M)


def test_the_steps_of_adamw_are_explained_and_multiply_out_later_on_too(lit):
    arguments = [*DIGITS, "--model.optimizer", "torch.optim.AdamW", "--model.scheduler", "null"]
    assert lit("fit", *arguments, "--trainer.max_epochs", "1", "--test_after_fit", "false")[0] == 0
    (path,) = Path(".").rglob("last.ckpt")
    for more in ([], ["--trainer.max_epochs", "2", "--ckpt_path", path]):
        code, out, err = lit("explain", *arguments, *more)
        assert code == 0, err
        assert re.search(r"^rule +bounded, for AdamW: ", out, re.M)
        assert max(map(len, out.splitlines())) <= 120
        seen, count, scale, past, rate = terms_of(out, "C", "n", "s", "past", "rate")
        constant = float(re.findall(r"^ += ([\d.]+)$", out, re.M)[-1])
        assert 0.01 * constant <= seen < constant
        assert 1 <= count <= 32
        assert rate == pytest.approx(1 / largest(out, seen, math.sqrt(count / 2)), rel=1e-4)
    assert count < 32
    assert math.sqrt(2 / count) * seen / scale != pytest.approx(past, rel=1e-3)


def test_scale_invariant_weights_are_counted(lit, monkeypatch):
    monkeypatch.syspath_prepend(".")
    Path("normalised.py").write_text(
        "from torch import nn\n"
        "class Network(nn.Sequential):\n"
        "    def __init__(self, num_classes: int = 10) -> None:\n"
        "        super().__init__(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3),\n"
        "                         nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, num_classes))\n"
    )
    arguments = ("explain", "--config", "digits", "--model.optimizer", "AdamW")
    normalised = (*arguments, "--model.network", "normalised.Network")
    code, out, err = lit(*normalised)
    assert code == 0, err
    assert re.search(r"^invariant +2 scale-invariant weights", out, re.M)
    assert json.loads(lit(*normalised, "--json")[1])["optimizers"][0]["num_scale_invariant"] == 2
    assert "scale-invariant" not in lit(*arguments)[1]


def test_the_steps_of_adam_with_the_smooth_family_multiply_out(lit):
    arguments = [*DIGITS, "--model.optimizer", "torch.optim.Adam", "--model.scheduler", "null", "--lipschitz.bound"]
    code, out, err = lit("explain", *arguments, "smooth")
    assert code == 0, err
    assert re.search(r"^rule +bounded, for Adam: ", out, re.M)
    assert not re.search(r"^n +", out, re.M)
    constant = float(re.findall(r"^ += ([\d.]+)$", out, re.M)[-1])
    (rate,) = terms_of(out, "rate")
    assert rate == pytest.approx(1 / largest(out, constant, 10), rel=1e-4)


def test_the_steps_of_schedule_free_are_explained_and_multiply_out(lit):
    arguments = [*DIGITS, "--model.optimizer", "schedulefree.AdamWScheduleFree", "--model.scheduler", "null"]
    code, out, err = lit("explain", *arguments)
    assert code == 0, err
    assert re.search(r"^rule +bounded, for AdamWScheduleFree: ", out, re.M)
    assert re.search(r"^factor +0.0\d+, from LipschitzLR's own warm-up$", out, re.M)
    seen, count, rate = terms_of(out, "C", "n", "rate")
    constant = float(re.findall(r"^ += ([\d.]+)$", out, re.M)[-1])
    assert 0.01 * constant < seen < constant
    assert rate == pytest.approx(1 / largest(out, seen, min(math.sqrt(count / 2), 10)), rel=1e-4)
    code, out, err = lit("explain", *arguments, "--lipschitz.bound", "smooth")
    assert code == 0, err
    constant = float(re.findall(r"^ += ([\d.]+)$", out, re.M)[-1])
    (rate,) = terms_of(out, "rate")
    assert rate == pytest.approx(1 / largest(out, constant, 10), rel=1e-4)


def test_a_pass_over_the_training_set_is_explained_too(explain):
    _, one = explain("--lipschitz.measure", "pass", "--lipschitz.bound", "paper")
    assert one["measure"] == "pass"
    assert one["rule"] == "adamo"
    assert recompute(one) == pytest.approx(one["L"], rel=1e-12)


class Pair(L.LightningModule):
    """Somebody's own module with loaders of its own: two heads, two losses, two optimizers stepped manually."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 1, bias=False)

    def training_step(self, batch, batch_idx):
        inputs, classes = batch
        losses = (F.cross_entropy(self.first(inputs), classes),
                  F.mse_loss(self.second(inputs), classes[:, None].float()))  # fmt: skip
        for optimizer, loss in zip(self.optimizers(), losses, strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def train_dataloader(self):
        return loader()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.first, self.second)]


class Noisy(L.LightningModule):
    """Somebody's own regression, of classes as numbers and noise."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch[0]), batch[1][:, None] + (1e4 * batch[0][:, :1]).sin())

    def train_dataloader(self):
        return loader()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def test_what_a_squared_error_has_left_is_explained(lit):
    arguments = ["--model", "test_explain.Noisy", "--trainer.accelerator", "cpu"]
    assert lit("fit", *arguments, "--trainer.max_epochs", "8", "--checkpoint.save_last", "true")[0] == 0
    code, out, err = lit("explain", *arguments, "--trainer.max_epochs", "10", "--ckpt_path", "last")
    assert code == 0, err
    seen, unexplained, rate, factor, lr = terms_of(out, "C", "u", "rate", "factor", "lr")
    assert rate == pytest.approx(1 / largest(out, seen, math.sqrt(16 / 2)), rel=1e-4)
    damping = float(re.search(r"last epoch; it damps the factor by ([\d.e-]+)$", out, re.M)[1])
    assert 0.2 < unexplained < 1
    assert factor == pytest.approx(damping * (60 - 48) / 54, rel=1e-4)  # after a warm-up of 6 steps
    assert lr == pytest.approx(rate * factor, rel=1e-5)
    assert max(map(len, out.splitlines())) <= 120


def test_several_optimizers_each_have_their_part(lit):
    arguments = ["explain", "--model", "test_explain.Pair", "--trainer.accelerator", "cpu", "--lipschitz.optimizers",
                 "[0, 1]"]  # fmt: skip
    code, out, err = lit(*arguments, "--json")
    assert code == 0, err
    first, second = json.loads(out)["optimizers"]
    assert (first["head"]["name"], first["loss"]["name"]) == ("first", "cross_entropy")
    assert (second["head"]["name"], second["loss"]["name"]) == ("second", "mean_squared_error")
    for one in (first, second):
        assert recompute(one) == pytest.approx(one["L"], rel=1e-12)
    assert values(second)["outputs"] > 0
    assert "outputs" not in values(first)
    _, out, _ = lit(*arguments)
    assert "optimizer SGD, number 1" in out
    assert re.search(r"^outputs +\S+, norm of outputs and targets", out, re.M)


def test_what_callbacks_of_fit_would_write_is_not_written(lit):
    Path("mine.yaml").write_text(
        "trainer:\n  profiler: simple\n  callbacks:\n"
        "  - class_path: lightning.pytorch.callbacks.LearningRateMonitor\n"
        "  - class_path: lightning.pytorch.callbacks.ModelCheckpoint\n    init_args: {every_n_train_steps: 1}\n"
        "  - class_path: lightning.pytorch.callbacks.StochasticWeightAveraging\n    init_args: {swa_lrs: 0.1}\n"
    )
    code, out, err = lit("explain", *DIGITS, "--config", "mine.yaml", "--audit", "1")
    assert code == 0, err
    assert "cross_entropy" in out
    assert [path.name for path in Path(".").iterdir()] == ["mine.yaml"]


class Writes(L.Callback):
    """Writes a file at the end of an epoch, a validation, training, and where training fails."""

    def write(self, *_):
        Path("written").touch()

    on_train_epoch_end = on_validation_start = on_train_end = on_exception = write


class NeedsEpochs(ImageClassifier):
    """Needs metrics of a whole epoch, which one step does not give."""

    def on_train_epoch_end(self):
        assert "val_loss" in self.trainer.callback_metrics

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


def test_the_ends_of_epoch_and_training_are_not_reached(lit):
    Path("mine.yaml").write_text(
        f"model:\n  class_path: {NeedsEpochs.__module__}.NeedsEpochs\n"
        "  init_args: {network: {class_path: lit_lipschitz.MLP}}\n"
        "data: {class_path: lit_lipschitz.DigitsDataModule}\n"
        f"trainer:\n  max_epochs: 3\n  min_epochs: 2\n  accelerator: cpu\n  callbacks:\n"
        f"  - class_path: {Writes.__module__}.Writes\n"
        "  - class_path: lightning.pytorch.callbacks.EarlyStopping\n    init_args: {monitor: val_loss}\n"
    )
    code, out, err = lit("explain", "--config", "mine.yaml")
    assert (code, err) == (0, "")
    assert "from ReduceLROnPlateau" in out
    assert [path.name for path in Path(".").iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--config", "cifr10"], 2, "closest: cifar10.yaml"),
        ([], 2, "model must be given; pass a config"),
        ([*DIGITS, "--lipschitz.bund", "strict"], 2, "lipschitz.bund: no such option; closest: lipschitz.bound"),
        ([*DIGITS, "--fixed_rate", "true"], 2, "the learning rate is the one in the config"),
        ([*DIGITS, "--ckpt_path", "last"], 2, "has saved a checkpoint; pass a path"),
        (
            [*DIGITS, "--model.optimizer", "torch.optim.Adagrad", "--lipschitz.bound", "paper"],
            2,
            "no learning-rate rule is known",
        ),
        ([*DIGITS, "--trainer.strategy", "ddp_spawn"], 2, "pass --trainer.strategy ddp"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(lit, arguments, code, message):
    found, out, err = lit("explain", *arguments)
    (line,) = [line for line in err.splitlines() if line.startswith("lit-lipschitz: error:")]
    assert message in line
    assert (found, out) == (code, "")
    assert list(Path(".").iterdir()) == []


@pytest.mark.slow
def test_ranks_are_counted():
    result = subprocess.run(
        [sys.executable, "-m", "lit_lipschitz.cli.main", "explain", *DIGITS, "--trainer.devices", "2",
         "--trainer.strategy", "ddp"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("optimizer step 1, in epoch 1") == 1
    assert "32 in a batch x 1 accumulated batch x 2 ranks" in result.stdout
    assert list(Path(".").iterdir()) == []


def test_help_says_what_it_is(lit):
    code, out, _ = lit("explain", "--help")
    assert code == 0
    for part in ("usage: lit-lipschitz explain", "--ckpt_path", "--json", "Nothing is written"):
        assert part in out


def test_a_measured_loss_names_its_layers_and_its_numbers_multiply_out(explain, lit):
    _, one = explain("--lipschitz.loss", "measured")
    terms = values(one)
    assert one["loss"]["name"] == "measured"
    assert one["head"]["name"] == "network.head"
    assert "k" not in terms
    assert recompute(one) == pytest.approx(one["L"], rel=1e-6)
    code, out, err = lit("explain", *DIGITS, "--lipschitz.loss", "measured", "--model.optimizer", "AdamW")
    assert code == 0, err
    for part in (
        "layers    network.head, found in the autograd graph",
        "loss      not recognised: measured",
        "m         32, rows of the outputs that have a gradient: 32 in a batch x 1 accumulated batch x 1 rank",
        "norm of the output layers' inputs in these rows",
        "times m; measured, not a bound",
        "L         measured constant of the loss with respect to the output layers' weights, an estimate\n",
        "effective number of examples in a step (Kish)",
    ):
        assert part in out


def test_a_measured_loss_with_another_family_is_one_line(lit):
    code, out, err = lit("explain", *DIGITS, "--lipschitz.loss", "measured", "--lipschitz.bound", "smooth")
    assert (code, out) == (2, "")
    assert "loss='measured', bound='smooth'" in err
