"""``LipschitzCallback`` in a real Trainer: rates, logs, accumulation, checkpoints."""

import json
import os
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from helpers import ROOT  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments  # noqa: E402
from transformers.trainer_callback import TrainerCallback  # noqa: E402

from lit_lipschitz import ConfigurationError, attach  # noqa: E402
from lit_lipschitz.integrations.transformers import LipschitzCallback  # noqa: E402

TOKENS, LENGTH, TEXTS = 32, 8, 32


def language_model():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config)


def texts():
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, TOKENS, (TEXTS, LENGTH), generator=generator)]


class Records(TrainerCallback):
    """Keeps the rate that each step has used."""

    def __init__(self):
        self.rates = []

    def on_train_begin(self, args, state, control, optimizer, **kwargs):
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        handle = optimizer.register_step_post_hook(lambda one, *_: self.rates.append(one.param_groups[0]["lr"]))
        optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)


def train(callback=None, resume=None, model=None, folder="run", **settings):
    defaults = {
        "output_dir": folder,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 3,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "learning_rate": 1.0,
    }
    records = Records()
    callback = callback or LipschitzCallback(notify=lambda message: None)
    run = Trainer(
        model=model or language_model(),
        args=TrainingArguments(**{**defaults, **settings}),
        train_dataset=texts(),
        callbacks=[callback, records],
    )
    run.train(resume_from_checkpoint=resume)
    return run, callback, records.rates


def test_a_trainer_uses_the_rate_and_logs_the_metrics():
    run, callback, rates = train()
    assert len(rates) == 24
    assert all(rate > 0 for rate in rates[:-1])
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["learning_rate"] for entry in logged] == rates
    assert [entry["lipschitz/lr"] for entry in logged] == rates
    assert all(entry["lipschitz/constant"] > 0 for entry in logged)
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert callback.attachment.lr == rates[-1]


def test_a_plain_loop_has_the_same_numbers():
    """The Trainer clips to a norm of 1 and its scheduler decays linearly, as this loop does.

    Up to rounding: it has two groups of parameters, whose norms are added up in another order.
    """
    _, _, expected = train(data_seed=5)
    model = language_model()
    loader = Trainer(
        model, TrainingArguments("run", per_device_train_batch_size=4, use_cpu=True, data_seed=5), train_dataset=texts()
    )
    batches = [batch for epoch in range(3) for batch in epoch_of(loader, epoch)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.0, fused=True)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 0, 24)
    control = attach(model, optimizer, total_steps=24, epoch_steps=8, notify=lambda message: None)
    rates = []
    for batch in batches:
        model(**batch, num_items_in_batch=4 * (LENGTH - 1)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        rates.append(control.lr)
    assert rates == pytest.approx(expected, rel=1e-5)


def epoch_of(trainer, epoch):
    """The batches of an epoch as the Trainer sees them."""
    loader = trainer.get_train_dataloader()
    loader.set_epoch(epoch)
    return list(loader)


def test_accumulated_batches_have_the_rates_of_the_whole_batch():
    """The loss of a micro-batch is its sum over the number of tokens of all of them."""
    whole = train(LipschitzCallback(norm="sample", notify=lambda message: None), per_device_train_batch_size=8)[2]
    parts = train(
        LipschitzCallback(norm="sample", notify=lambda message: None),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )[2]
    assert len(parts) == len(whole) == 12
    assert parts == pytest.approx(whole, rel=1e-3)


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 11


@pytest.mark.parametrize("restores", [False, True])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_resumed_run_continues_bit_for_bit(restores, accumulated):
    settings = {
        "num_train_epochs": 3 * accumulated,
        "gradient_accumulation_steps": accumulated,
        "restore_callback_states_from_checkpoint": restores,
    }
    run, _, expected = train(**settings)
    train(save_strategy="steps", save_steps=7, **settings)
    resumed, _, rates = train(resume="run/checkpoint-7", **settings)
    assert rates == expected[7:]
    for one, other in zip(resumed.model.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_training_twice_starts_again_and_leaves_no_hook():
    before = torch.autograd.backward
    callback = LipschitzCallback(notify=lambda message: None)
    first = train(callback)[2]
    assert torch.autograd.backward is before
    assert train(callback)[2] == first


def test_another_checkpoint_can_be_resumed_from():
    """One of a run without the callback."""
    train(TrainerCallback(), save_strategy="steps", save_steps=4)
    _, callback, rates = train(resume="run/checkpoint-4", save_strategy="steps", save_steps=4)
    assert len(rates) == 20
    assert callback.attachment.rate > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epoch_steps": 3}, r"LipschitzCallback\(epoch_steps=\.\.\.\): expected one of 'notify', 'loss'"),
        ({"max_lr": -1}, r"max_lr=-1"),
        ({"loss": "squared"}, "expected one of 'auto', 'measured'"),
    ],
    ids=str,
)
def test_arguments_are_checked_at_once(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        LipschitzCallback(**settings)


RANKS = """
import json, os, torch
from test_transformers import LipschitzCallback, train
callback = LipschitzCallback(norm="sample", notify=lambda message: None)
settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
rates = train(callback, **settings)[2]
with open(f"rates{os.environ['RANK']}.json", "w") as file:
    json.dump(rates, file)
torch.distributed.destroy_process_group()  # Trainer leaves it, and its threads may end the process with an error
"""


def test_two_ranks_that_accumulate_have_the_rates_of_one(tmp_path):
    """The Trainer multiplies the loss by the number of ranks, over whose tokens the mean is."""
    whole = train(LipschitzCallback(norm="sample", notify=lambda message: None), per_device_train_batch_size=8)[2]
    (tmp_path / "ranks.py").write_text(RANKS)
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "integrations")))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "ranks.py"]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    first, second = (json.loads((tmp_path / f"rates{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first == pytest.approx(whole, rel=1e-3)
