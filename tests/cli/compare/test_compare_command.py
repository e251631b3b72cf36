"""`lit-lipschitz compare`: its runs are those of fit, its means those of its file, and a run is made once."""

import csv
import json
import math
import re
import statistics
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import CLASSES, WIDTH, error_line, loader, printed_epochs
from schedulefree import AdamWScheduleFree
from torch import nn
from torch.nn import functional as F

from lit_lipschitz.cli.compare.optimizer_swap import swapped
from lit_lipschitz.cli.compare.policies import fit_options, parse_policies
from lit_lipschitz.cli.compare.results_file import COLUMNS, ResultsFile, Row
from lit_lipschitz.cli.compare.summaries import paired_difference, summarize
from lit_lipschitz.cli.compare.verdict import verdict

DIGITS = ["--config", "digits", "--trainer.accelerator", "cpu", "--data.train_subset", "320", "--trainer.max_epochs",
          "2"]  # fmt: skip


def file_rows(path="compare.csv"):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# -- runs --------------------------------------------------------------------------------------------------------------


def test_two_policies_and_two_seeds_end_to_end_and_nothing_is_made_twice(lit):
    arguments = ["compare", *DIGITS, "--policies", "lipschitz,sgd:0.10", "--seeds", "2"]
    code, out, err = lit(*arguments)
    assert code == 0, err
    assert [path.name for path in Path(".").iterdir()] == ["compare.csv"]
    rows = file_rows()
    assert [(row["policy"], row["seed"]) for row in rows] == [
        ("lipschitz", "0"), ("sgd:0.1", "0"), ("lipschitz", "1"), ("sgd:0.1", "1"),
    ]  # fmt: skip
    assert len({row["config"] for row in rows}) == 2
    assert all(row["metric"] == "acc" and row["epochs"] == "2" and row["diverged"] == "no" for row in rows)
    assert len(re.findall(r"^\[\d/4\] \S+, seed \d: val_acc ", err, re.M)) == 4

    # The means of the table are those of the file.
    for policy in ("lipschitz", "sgd:0.1"):
        own = [row for row in rows if row["policy"] == policy]
        (line,) = [line for line in out.splitlines() if line.startswith(f"{policy} ")]
        for column in ("val", "test"):
            values = [100 * float(row[column]) for row in own]
            error = statistics.stdev(values) / math.sqrt(2)
            assert f"{statistics.mean(values):.2f} +- {error:.2f}" in line
    assert "\x1b" not in out
    assert re.search(
        r"^lipschitz: \S+ \+- \S+ % on the test set; the fixed rate is sgd:0.1 with \S+ \+- \S+ %. The ", out, re.M
    )

    # The same command has nothing to do, and one seed more is one run more of each.
    before = Path("compare.csv").read_bytes()
    code, again, err = lit(*arguments)
    assert (code, again) == (0, out)
    assert err.count("already in compare.csv") == 4
    assert Path("compare.csv").read_bytes() == before
    code, _, err = lit(*arguments[:-1], "3", "--trainer.log_every_n_steps", "7")
    assert code == 0
    assert err.count("already in compare.csv") == 4
    assert [(row["policy"], row["seed"]) for row in file_rows()[4:]] == [("lipschitz", "2"), ("sgd:0.1", "2")]


def test_a_run_is_what_fit_makes_of_the_options_that_are_named(lit):
    policies = "lipschitz,lipschitz-schedulefree,paper,sgd:0.05,adamw:0.002,config:0.2"
    code, out, err = lit("compare", *DIGITS, "--policies", policies, "--json")
    assert code == 0, err
    account = json.loads(out)
    assert [one["policy"] for one in account["policies"]] == policies.split(",")
    for run in account["runs"]:
        code, out, _ = lit("fit", *DIGITS, *account["options"][run["policy"]], "--trainer.logger", "false")
        assert code == 0
        last = printed_epochs(out)[-1]
        assert last["epoch"] == "2/2"
        assert run["val"] == pytest.approx(float(last["val_acc"]), abs=1e-4)
        assert run["test"] == pytest.approx(float(re.search(r"test_acc (\S+)", out)[1]), abs=1e-4)
        if "rate" in last:
            assert run["rate_last"] == pytest.approx(float(last["rate"]), rel=1e-3)
        else:
            assert run["rate_first"] == run["rate_last"] == float(run["policy"].partition(":")[2])


def test_another_configuration_is_another_run_and_fixed_rates_do_not_depend_on_the_callback(lit):
    arguments = ["compare", *DIGITS, "--policies", "lipschitz,sgd:0.1"]
    assert lit(*arguments)[0] == 0
    code, _, err = lit(*arguments, "--lipschitz.max_lr", "0.01")
    assert code == 0
    assert err.count("already in") == 1
    assert [row["policy"] for row in file_rows()] == ["lipschitz", "sgd:0.1", "lipschitz"]
    assert file_rows()[2]["rate_last"] == "0.01"


def test_a_run_that_diverges_is_a_result(lit):
    code, out, err = lit("compare", *DIGITS, "--policies", "sgd:0.1,sgd:1e8", "--metric", "val_loss", "--json")
    assert code == 0, err
    account = json.loads(out)
    good, bad = account["policies"]
    assert (good["diverged"], bad["diverged"]) == (0, 1)
    assert good["best_fixed_rate_by_validation"]
    assert bad["val"]["mean"] is None
    assert [run["epochs"] for run in account["runs"]] == [2, 1]
    assert "diverged, ended after epoch 1" in err
    code, again, _ = lit("compare", *DIGITS, "--policies", "sgd:0.1,sgd:1e8", "--metric", "val_loss", "--json")
    assert (code, json.loads(again)) == (0, account)


def test_a_policy_that_fails_says_why_and_the_others_go_on(lit):
    policies = ["--policies", "lipschitz,sgd:0.1", "--lipschitz.head", "nowhere", "--seeds", "2"]
    code, out, err = lit("compare", *DIGITS, *policies)
    assert code == 1
    assert err.count("failed: ") == 1
    assert re.search(r"^lipschitz: failed: .*nowhere", out, re.M)
    assert [row["policy"] for row in file_rows()] == ["sgd:0.1", "sgd:0.1"]


class Fixed(L.LightningModule):
    """Somebody's own module: its optimizer is in its code, its schedule has a rate of its own, and it logs a loss."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, width), nn.ReLU(), nn.Linear(width, CLASSES))
        self.rates: list[float] = []

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        if batch_idx == 0 and self.trainer.optimizers and "train_mode" in self.trainer.optimizers[0].param_groups[0]:
            MODES.append(self.trainer.optimizers[0].param_groups[0]["train_mode"])
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader()

    def on_train_start(self):
        optimizer = self.trainer.optimizers[0]
        handle = optimizer.register_step_post_hook(self.after_step)
        optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)

    def after_step(self, optimizer, *_):
        RATES.append(optimizer.param_groups[0]["lr"])
        KINDS.append(type(optimizer))
        MODES.append(optimizer.param_groups[0].get("train_mode"))

    def configure_optimizers(self):
        decayed, others = self.net[0].parameters(), self.net[2].parameters()
        groups = [{"params": decayed}, {"params": others, "lr": 0.246, "weight_decay": 0.0}]
        optimizer = torch.optim.SGD(groups, lr=0.123, weight_decay=0.001, nesterov=True, momentum=0.5)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5.0, total_steps=12)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


RATES: list[float] = []
KINDS: list[type] = []
MODES: list[bool] = []  # of Schedule-Free, in the steps and in the first batch of each validation


def one_cycle(rate):
    """The rates of Fixed's schedule with another peak."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=12)
    rates = []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(rates) < 12:
            schedule.step()
    return rates


def test_the_own_optimizer_of_any_module_at_a_fixed_rate_with_its_schedule(lit):
    for noted in (RATES, KINDS, MODES):
        noted.clear()
    own = ["--model", "test_compare_command.Fixed", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "2",
           "--seed_everything", "5"]  # fmt: skip
    code, out, err = lit("compare", *own, "--policies", "lipschitz,config:0.05")
    assert code == 0, err
    assert len(RATES) == 24
    assert RATES[12:] == pytest.approx(one_cycle(0.05))
    assert [(row["seed"], row["metric"], row["test"]) for row in file_rows()] == [("5", "loss", "")] * 2
    assert "test_loss" not in out
    assert "on the validation set" in out

    # An optimizer that the module's code does not have takes its place, with its schedule, or without for the papers'.
    code, out, err = lit("compare", *own, "--policies", "sgd:0.06,adamw:0.004,paper,lipschitz-schedulefree")
    assert code == 0, err
    assert KINDS[24::12] == [torch.optim.SGD, torch.optim.AdamW, torch.optim.SGD, AdamWScheduleFree]
    assert RATES[24:36] == pytest.approx(one_cycle(0.06))
    assert RATES[36:48] == pytest.approx(one_cycle(0.004))
    (paper,) = [row for row in file_rows() if row["policy"] == "paper"]
    assert [RATES[48], RATES[59]] == pytest.approx([float(paper["rate_first"]), float(paper["rate_last"])])
    # Schedule-Free has no schedule, is in training mode in each step and in evaluation mode in each validation.
    (free,) = [row for row in file_rows() if row["policy"] == "lipschitz-schedulefree"]
    assert [RATES[60], RATES[71]] == pytest.approx([float(free["rate_first"]), float(free["rate_last"])])
    assert MODES[60:] == [True] * 6 + [False] + [True] * 6 + [False] * 2


def test_a_swapped_optimizer_keeps_groups_and_their_ratios():
    module = Fixed()
    (old,), _ = module.configure_optimizers()
    names = ("sgd:0.1", "adamw:0.1", "paper", "lipschitz-schedulefree")
    sgd, adamw, paper, free = (swapped(old, *parse_policies(name)) for name in names)
    for new in (sgd, adamw, paper, free):
        assert [group["params"] for group in new.param_groups] == [group["params"] for group in old.param_groups]
        assert new.param_groups[1]["max_lr"] == old.param_groups[1]["max_lr"]
    assert [group["weight_decay"] for group in sgd.param_groups] == [0.001, 0.0]
    for decoupled in (adamw, free):
        assert [group["weight_decay"] for group in decoupled.param_groups] == [0.01, 0.0]
    assert [group["momentum"] for group in sgd.param_groups] == [0.9, 0.9]
    assert [group["momentum"] for group in paper.param_groups] == [0.0, 0.0]
    assert not sgd.param_groups[0]["nesterov"]


# -- what is said ------------------------------------------------------------------------------------------------------


def row(policy, seed, val, test, **others):
    values = {"config": "c", "metric": "acc", "best_val": val, "best_epoch": 1, "epochs": 1, "rate_first": 0.1,
              "rate_last": 0.1, "seconds": 1.0, "diverged": False, **others}  # fmt: skip
    return Row(policy=policy, seed=seed, val=val, test=test, **values)


def test_the_difference_is_to_the_best_fixed_rate_by_validation_not_by_test():
    policies = parse_policies("lipschitz,sgd:0.1,sgd:0.3,adamw:0.003")
    values = {
        "lipschitz": (0.97, 0.970),
        "sgd:0.1": (0.96, 0.990),
        "sgd:0.3": (0.98, 0.960),
        "adamw:0.003": (0.95, 0.95),
    }
    noise = {"lipschitz": (0, 0.0012, 0.0018), "sgd:0.3": (0, 0.0006, 0.0024)}
    rows = [row(name, seed, val + extra, test + extra)
            for name, (val, test) in values.items()
            for seed, extra in enumerate(noise.get(name, (0, 0.001, 0.002)))]  # fmt: skip
    found = {one.policy.name: one for one in summarize(rows, policies)}
    assert [name for name, one in found.items() if one.best_fixed_rate_by_validation] == ["sgd:0.3"]
    assert found["lipschitz"].difference.mean == pytest.approx(0.01)
    # The seeds are shared: the error is that of the differences, which are 0.01, 0.0106 and 0.0094.
    error = statistics.stdev([0.01, 0.0106, 0.0094]) / math.sqrt(3)
    assert found["lipschitz"].difference.standard_error == pytest.approx(error)
    said = verdict(list(found.values()))
    assert (
        "lipschitz: 97.10 +- 0.05 % on the test set; the best of the 3 fixed rates by validation is sgd:0.3 with 96.10"
        in said
    )
    interval = "the 95 % confidence interval of +- 0.15 (3 seeds, paired)."
    assert f"+1.00 +- 0.03, is an improvement outside {interval}" in said
    assert "sgd:0.3 is the largest sgd rate that was tried" in said


def test_differences_are_of_runs_with_the_same_seed():
    policies = parse_policies("lipschitz,sgd:0.1")
    rows = [row("lipschitz", seed, 0.5, 0.5 + 0.1 * seed) for seed in (0, 1, 2)]
    others = [row("sgd:0.1", seed, 0.4, 0.4 + 0.1 * seed + 0.01 * (seed == 3)) for seed in (3, 2, 1, 0)]
    ours = summarize([*rows, *others], policies)[0]
    assert ours.difference.count == 3
    assert ours.difference.mean == pytest.approx(0.1)
    assert ours.difference.standard_error == pytest.approx(0, abs=1e-12)
    # On the validation set unless both have a test, and nothing without a seed in common.
    assert paired_difference([row("lipschitz", 0, 0.7, None)], others).mean == pytest.approx(0.3)
    assert paired_difference(rows[:1], others[:1]) is None
    # A lower common level of one seed is no noise of the difference.
    levels = {"lipschitz": (0.91, 0.52, 0.73), "sgd:0.1": (0.90, 0.50, 0.72)}
    shared = [row(name, seed, value, value) for name, values in levels.items() for seed, value in enumerate(values)]
    difference = summarize(shared, policies)[0].difference
    assert difference.standard_error < 0.01 < statistics.stdev([0.90, 0.50, 0.72]) / math.sqrt(3)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("errors", [0.0, 0.5, 1.9, 2.0, 2.1, 3.0, 9.0, 12.6, 12.8, 50.0, -9.0])
def test_the_verdict_follows_the_number_of_standard_errors(seeds, errors):
    policies = parse_policies("lipschitz,sgd:0.1")
    spread = [0.001 * (seed - (seeds - 1) / 2) for seed in range(seeds)]
    mean = errors * statistics.stdev(spread) / math.sqrt(seeds)
    rows = [row("sgd:0.1", seed, 0.5, 0.5) for seed in range(seeds)]
    rows += [row("lipschitz", seed, 0.5, 0.5 + mean + extra) for seed, extra in enumerate(spread)]
    said = verdict(summarize(rows, policies))
    student = {2: 12.71, 3: 4.30, 5: 2.78}[seeds]
    kind = "an improvement" if errors > 0 else "a deterioration"
    if abs(errors) < 1.96:
        assert "is within the noise, inside the 95 % confidence interval" in said
    elif abs(errors) > student:
        assert f"is {kind} outside the 95 % confidence interval" in said
    else:
        assert f"is {kind} of {abs(errors):.1f} standard errors, but inside the 95 % confidence interval of" in said
        assert "too few seeds to tell; pass more --seeds." in said
    assert ("within the noise" in said) == (abs(errors) < 1.96)


def test_equal_differences_are_no_measure_of_the_noise():
    policies = parse_policies("lipschitz,sgd:0.1")
    rows = [row(name, seed, value + 0.1 * seed, value + 0.1 * seed)
            for name, value in (("lipschitz", 0.52), ("sgd:0.1", 0.51)) for seed in (0, 1, 2)]  # fmt: skip
    said = verdict(summarize(rows, policies))
    assert "is the same with each of the 3 seeds, so its noise is not known; pass more --seeds." in said
    same = [row(name, seed, 0.5, 0.5) for name in ("lipschitz", "sgd:0.1") for seed in (0, 1)]
    assert "+0.00 +- 0.00, is within the noise" in verdict(summarize(same, policies))


def test_it_is_honest_about_noise_and_about_one_seed():
    policies = parse_policies("lipschitz,sgd:0.1")
    values = {"lipschitz": (0.96, 0.99), "sgd:0.1": (0.95, 0.99)}
    noisy = [row(name, seed, test, test) for name, tests in values.items() for seed, test in enumerate(tests)]
    assert "within the noise" in verdict(summarize(noisy, policies))
    single = verdict(summarize([one for one in noisy if one.seed == 0], policies))
    assert "+-" not in single
    assert "the noise" not in single
    assert "The difference, +1.00, is from a single seed." in single
    assert "One seed has no standard error" in single
    alone = verdict(summarize(noisy[:2], policies))
    assert alone == "lipschitz: 97.50 +- 1.50 % on the test set; there is no fixed rate to compare it with."
    losses = [row(name, seed, loss, loss + slope * seed, metric="loss")
              for name, loss, slope in (("lipschitz", 0.5, 0.002), ("sgd:0.1", 0.4, 0.001))
              for seed in (0, 1)]  # fmt: skip
    assert "+0.1005 +- 0.0005, is a deterioration outside" in verdict(summarize(losses, policies))


# -- the file ----------------------------------------------------------------------------------------------------------


def test_the_file_gives_back_what_it_was_given():
    file = ResultsFile(Path("runs.csv"))
    rows = [row("sgd:0.1", 0, 0.1 + 0.2, None), row("lipschitz", 1, math.inf, 1 / 3, diverged=True)]
    for one in rows:
        file.add(one)
    assert list(ResultsFile(Path("runs.csv")).rows().values()) == rows
    assert [path.name for path in Path(".").iterdir()] == ["runs.csv"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"a,b\n1,2\n",
            "was not written by `lit-lipschitz compare` (its first line would be policy,seed,config,metric,...)",
        ),
        (b"", "was not written by"),
        (b"\xff\xfe", "was not written by"),
        ((",".join(COLUMNS) + "\nsgd:0.1,0,c\n").encode(), "line 2: not a run as `lit-lipschitz compare` writes it"),
    ],
)
def test_a_foreign_file_is_refused_and_left_as_it_is(lit, content, message):
    Path("compare.csv").write_bytes(content)
    code, out, err = lit("compare", *DIGITS)
    assert (code, out) == (2, "")
    assert message in error_line(err)
    assert Path("compare.csv").read_bytes() == content


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "lipshitz"], "lipshitz: no such policy; closest: lipschitz; all: lipschitz, lipschitz-"),
        (["--policies", "sgd:fast"], "sgd:fast: expected a rate above 0, as in sgd:0.1, found 'fast'"),
        (["--policies", "sgd"], "sgd: expected a rate above 0"),
        (["--policies", "adamw:-1"], "expected a rate above 0"),
        (["--policies", "sgd:inf"], "expected a rate above 0"),
        (["--policies", "paper:0.1"], "paper computes its learning rate; expected paper alone"),
        (["--policies", ","], "expected some of lipschitz"),
        (["--seeds", "0"], "compare --seeds 0: expected the number of seeds, at least 1"),
        (["--seeds", "x"], "argument --seeds: invalid int value: 'x'"),
        (["--output", "nowhere/compare.csv"], "expected the name of a file, found no folder"),
        (["--output", "."], "found a folder of that name"),
        (["--lipschitz.bund", "strict"], "lipschitz.bund: no such option; closest: lipschitz.bound"),
        (["--ckpt_path", "last"], "has saved a checkpoint"),
        (["--trainer.devices", "2", "--trainer.strategy", "ddp"], "on one device; found devices 2"),
        (["--trainer.devices", "2"], "pass --trainer.devices 1 and --trainer.strategy auto"),
        (["--jobs", "0"], "compare --jobs 0: expected the number of runs at a time, at least 1"),
        (["--engine", "dask"], "argument --engine: invalid choice: 'dask'"),
        (["--engine_options", "a=1"], "compare --engine_options a=1: expected JSON such as '{\"num_cpus\": 2}'"),
        (["--engine_options", "[1]"], "compare --engine_options [1]: expected JSON"),
        (["--data.val_split", "2"], "val_split=2.0: expected a fraction"),
        (["--data.val_split", "0", "--trainer.max_epochs", "1"], "compare chooses by the validation set"),
        (["--metric", "f1", "--trainer.max_epochs", "1"], "the validation logs val_loss, val_acc, and no val_f1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_a_mistake_is_one_line_and_leaves_nothing(lit, arguments, message):
    code, out, err = lit("compare", *DIGITS, "--policies", "lipschitz,sgd:0.1", *arguments)
    assert message in error_line(err)
    assert (code, out) == (2, "")
    assert list(Path(".").iterdir()) == []


def test_weight_decay_goes_with_the_optimizer_that_it_was_chosen_for():
    def decay(policy, own, value):
        model = {"class_path": "lit_lipschitz.ImageClassifier",
                 "init_args": {"optimizer": {"class_path": own, "init_args": {"weight_decay": value}}}}  # fmt: skip
        typed = fit_options(*parse_policies(policy), model)
        return typed[typed.index("--model.optimizer.weight_decay") + 1]

    assert decay("sgd:0.1", "torch.optim.SGD", 5e-4) == "0.0005"
    assert decay("adamw:0.1", "torch.optim.SGD", 5e-4) == "0.01"
    assert decay("adamw:0.1", "torch.optim.AdamW", 0.05) == "0.05"
    assert decay("sgd:0.1", "torch.optim.AdamW", 0.05) == "0.0"
    assert decay("lipschitz-schedulefree", "torch.optim.AdamW", 0.05) == "0.05"
    assert decay("lipschitz-schedulefree", "torch.optim.SGD", 0.05) == "0.01"


def test_schedule_free_needs_its_package(lit, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = lit("compare", *DIGITS, "--policies", "lipschitz-schedulefree")
    assert code == 2
    assert "the package schedulefree is missing: pip install schedulefree" in error_line(err)


def test_help_says_what_it_is(lit):
    code, out, _ = lit("compare", "--help")
    assert code == 0
    for part in (
        "usage: lit-lipschitz compare",
        "--policies",
        "--seeds",
        "lipschitz-adamw",
        "chosen on the validation",
    ):
        assert part in out
