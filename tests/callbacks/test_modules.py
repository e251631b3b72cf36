"""Modules as people write them, with `LipschitzLR()` added: sequences, pixels, tied weights, GANs, transformers."""

import math

import lightning as L
import pytest
import torch
import transformers
from helpers import Steps, trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lit_lipschitz import ConfigurationError, LipschitzAudit, LipschitzLR

TOKENS, VOCABULARY, WIDTH = 9, 11, 8


class Heads(L.Callback):
    """Records the inputs of one module in every training forward, apart from LipschitzLR."""

    def __init__(self, name):
        self.name, self.inputs = name, []

    def on_fit_start(self, trainer, pl_module):
        def record(module, args):
            if torch.is_grad_enabled():
                self.inputs.append(args[0].detach().clone())

        pl_module.get_submodule(self.name).register_forward_pre_hook(record)


def first_constant(module, data, head, batch_size=4, **settings):
    """Trains one step; returns the constant, and the mean square norm of a row at the head with a 1 for a bias."""
    callback, seen = LipschitzLR(**settings), Heads(head)
    trainer(callback, seen, max_steps=1).fit(module, DataLoader(data, batch_size=batch_size))
    assert callback.head_name == head
    inputs = seen.inputs[0]
    rows = inputs.movedim(1, -1) if isinstance(module.get_submodule(head), nn.Conv2d) else inputs
    rows = rows.flatten(0, -2)
    bias = module.get_submodule(head).bias is not None
    return callback.constant, rows.square().sum(dim=1) + bias


class Plain(L.LightningModule):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


TEXT = TensorDataset(torch.arange(8 * TOKENS).reshape(8, TOKENS) % VOCABULARY)


class LanguageModel(Plain):
    """Next tokens, with the logits flattened as most tutorials do; perhaps with the embedding as the head's weight."""

    def __init__(self, tied=False, shift="inputs"):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.body = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight
        self.shift = shift

    def training_step(self, batch, batch_idx):
        (tokens,) = batch
        if self.shift == "inputs":
            logits = self.head(self.body(self.embedding(tokens[:, :-1]))[0])
            return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:])
        logits = self.head(self.body(self.embedding(tokens))[0])
        if self.shift == "logits":
            return F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1))
        labels = F.pad(tokens[:, 1:], (0, 1), value=-100)
        return F.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shift", ["inputs", "logits", "labels"])
def test_a_language_model_counts_tokens(tied, shift):
    constant, rows = first_constant(LanguageModel(tied, shift), TEXT, "head")
    # The logits that are cut off or ignored are measured all the same, and do not count.
    assert constant == pytest.approx(math.sqrt(2 * rows.sum() / (4 * (TOKENS - 1))), rel=1e-5)


class Segmentation(Plain):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 1))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1], ignore_index=4)


def test_dense_predictions_count_pixels():
    labels = torch.arange(8 * 7 * 6).reshape(8, 7, 6) % 5
    constant, rows = first_constant(Segmentation(), TensorDataset(torch.randn(8, 3, 7, 6), labels), "net.2")
    count = (labels[:4] != 4).sum()
    assert constant == pytest.approx(math.sqrt(2 * rows.sum() / count), rel=1e-5)


class TwoViews(Plain):
    """The head is called twice a step: on two views whose logits are joined, or with the first for show."""

    def __init__(self, joined):
        super().__init__()
        self.body, self.head, self.joined = nn.Linear(5, 8), nn.Linear(8, 3), joined

    def training_step(self, batch, batch_idx):
        views = [self.head(self.body(part)) for part in (batch[0], batch[0] + 1)]
        if not self.joined:
            return F.cross_entropy(views[1], batch[1])
        return F.cross_entropy(torch.cat(views), torch.cat([batch[1], batch[1]]))


@pytest.mark.parametrize("joined", [True, False])
def test_a_head_that_is_called_twice_has_the_larger_call(joined):
    data = TensorDataset(torch.randn(8, 5), torch.arange(8) % 3)
    callback, seen = LipschitzLR(), Heads("head")
    trainer(callback, seen, max_steps=1).fit(TwoViews(joined), DataLoader(data, batch_size=4))
    largest = max((part.square().sum(dim=1) + 1).mean() for part in seen.inputs)
    assert callback.constant == pytest.approx(math.sqrt(2 * largest), rel=1e-5)
    both = torch.cat(seen.inputs)
    assert callback.constant >= math.sqrt(2 * (both.square().sum(dim=1) + 1).mean()) * (1 - 1e-6)


# -- several optimizers ------------------------------------------------------------------------------------------------


class GAN(L.LightningModule):
    """Generator and discriminator as Lightning's own examples write them: optimizer 0 and 1."""

    def __init__(self, toggle, second_loss=False):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6))
        self.discriminator = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
        self.toggle = toggle

    def configure_optimizers(self):
        make = lambda part, lr: torch.optim.SGD(part.parameters(), lr=lr)  # noqa: E731
        return make(self.generator, 0.01), make(self.discriminator, 0.02)

    def training_step(self, batch, batch_idx):
        (real,) = batch
        first, second = self.optimizers()
        noise = torch.linspace(-1, 1, len(real) * 4).reshape(len(real), 4)
        if self.toggle:
            self.toggle_optimizer(first)
        fooled = F.binary_cross_entropy_with_logits(self.discriminator(self.generator(noise)), torch.ones(len(real), 1))
        first.zero_grad()
        self.manual_backward(fooled)
        first.step()
        if self.toggle:
            self.untoggle_optimizer(first)
            self.toggle_optimizer(second)
        both = torch.cat([self.discriminator(real), self.discriminator(self.generator(noise).detach())])
        labels = torch.cat([torch.ones(len(real), 1), torch.zeros(len(real), 1)])
        second.zero_grad()
        self.manual_backward(F.binary_cross_entropy_with_logits(both, labels))
        second.step()
        if self.toggle:
            self.untoggle_optimizer(second)


class Rates(L.Callback):
    def on_fit_start(self, trainer, pl_module):
        self.rates = [[] for _ in trainer.optimizers]
        for rates, optimizer in zip(self.rates, trainer.optimizers, strict=True):
            handle = optimizer.register_step_post_hook(lambda o, *_, rates=rates: rates.append(o.param_groups[0]["lr"]))
            optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)


@pytest.mark.parametrize("toggle", [True, False])
def test_one_of_two_optimizers_is_controlled_and_the_other_left_alone(toggle):
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(12, 6)), batch_size=4)
    callback, seen, inputs = LipschitzLR(optimizers=1), Rates(), Heads("discriminator.2")
    trainer(callback, seen, inputs, max_epochs=2).fit(GAN(toggle), data)
    assert callback.head_name == "discriminator.2"
    assert seen.rates[0] == [0.01] * 6
    assert len(seen.rates[1]) == 6
    sizes = [(part.square().sum(dim=1) + 1).mean().sqrt() for part in inputs.inputs[:3]]
    assert 1 / seen.rates[1][0] == pytest.approx(max(sizes).item(), rel=1e-5)


def test_an_audit_is_of_the_optimizer_that_is_controlled():
    data = DataLoader(TensorDataset(torch.randn(12, 6)), batch_size=4)
    audit = LipschitzAudit(every=1)
    trainer(LipschitzLR(optimizers=1), audit, max_epochs=2).fit(GAN(True), data)
    summary = audit.summary()
    assert summary.steps == 6
    assert {layer.name for layer in summary.layers} == {"discriminator.0", "discriminator.2"}
    assert summary.head_layer.exceeded == 0


class TwoClassifiers(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = nn.Linear(5, 3), nn.Linear(5, 4)

    def configure_optimizers(self):
        first = torch.optim.SGD(self.first.parameters(), lr=0.01)
        second = torch.optim.SGD(self.second.parameters(), lr=0.02)
        return [first, second], [torch.optim.lr_scheduler.ConstantLR(second, 0.5, 100)]

    def training_step(self, batch, batch_idx):
        for part, optimizer, scale in zip((self.first, self.second), self.optimizers(), (1, 10), strict=True):
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(part(batch[0] * scale), batch[1]))
            optimizer.step()


def test_several_optimizers_have_a_head_and_a_rate_each(tmp_path):
    inputs = torch.randn(8, 5)
    data = DataLoader(TensorDataset(inputs, torch.arange(8) % 3), batch_size=8)
    callback, seen = LipschitzLR(optimizers=[0, 1]), Rates()
    run = trainer(callback, seen, max_epochs=3)
    run.fit(TwoClassifiers(), data)
    expected = [1 / math.sqrt(2 * ((inputs * s).square().sum(dim=1) + 1).mean()) for s in (1, 10)]
    assert seen.rates[0] == pytest.approx([expected[0]] * 3, rel=1e-5)
    assert seen.rates[1] == pytest.approx([0.5 * expected[1]] * 3, rel=1e-5)
    assert float(run.callback_metrics["lipschitz/0/lr"]) == pytest.approx(expected[0], rel=1e-5)
    assert float(run.callback_metrics["lipschitz/1/lr"]) == pytest.approx(0.5 * expected[1], rel=1e-5)
    run.save_checkpoint(tmp_path / "two.ckpt")
    again, more = LipschitzLR(optimizers=[0, 1]), Rates()
    trainer(again, more, max_epochs=4).fit(TwoClassifiers(), data, ckpt_path=tmp_path / "two.ckpt")
    assert more.rates == [seen.rates[0][-1:], seen.rates[1][-1:]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "returned 2 under manual optimization: pass optimizers="),
        ({"optimizers": 2}, "positions from 0 to 1, since configure_optimizers of GAN returned 2"),
        ({"optimizers": 0, "norm": "sample"}, "which was not called with a loss of the optimizer's head"),
        ({"optimizers": [0, 1], "head": "discriminator.2"}, "each optimizer has a head of its own"),
        ({"optimizers": -1}, "expected 'auto', a position from 0"),
        ({"optimizers": []}, "expected 'auto', a position from 0"),
    ],
)
def test_what_can_not_be_controlled_in_a_gan_is_said(settings, message):
    data = DataLoader(TensorDataset(torch.randn(12, 6)), batch_size=4)
    with pytest.raises(ConfigurationError, match=message):
        trainer(LipschitzLR(**settings)).fit(GAN(True), data)


# -- transformers ------------------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def causal():
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config), "lm_head", torch.arange(4 * 6).reshape(4, 6)


def classifier():
    config = transformers.BertConfig(**SMALL, num_labels=3)
    return transformers.BertForSequenceClassification(config), "classifier", torch.tensor([0, 1, 2, 0])


def regressor():
    config = transformers.BertConfig(**SMALL, num_labels=1)
    return transformers.BertForSequenceClassification(config), "classifier", torch.tensor([0.0, 1, 2, 0])


def tagger():
    labels = torch.arange(4 * 6).reshape(4, 6) % 3
    labels[:, 4:] = -100
    config = transformers.BertConfig(**SMALL, num_labels=3)
    return transformers.BertForTokenClassification(config), "classifier", labels


def masked():
    labels = torch.full((4, 6), -100)
    labels[:, 2] = 7
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)), "cls.predictions.decoder", labels


def llama():
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config), "lm_head", torch.arange(4 * 6).reshape(4, 6)


def vision():
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config), "classifier", torch.tensor([0, 1, 2, 0])


class WithLoss(Plain):
    """A model that returns an output object with the loss in it."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.kept = None

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        named = {"pixel_values": inputs} if inputs.ndim == 4 else {"input_ids": inputs}
        return self.model(**named, labels=labels).loss


@pytest.mark.parametrize("make", [causal, classifier, regressor, tagger, masked, llama, vision])
def test_a_transformer_that_returns_its_loss(make):
    model, head, labels = make()
    inputs = torch.randn(4, 3, 8, 8) if make is vision else torch.arange(4 * 6).reshape(4, 6)
    module = WithLoss(model)
    callback, seen, steps = LipschitzLR(), Heads(f"model.{head}"), Steps()
    data = DataLoader(TensorDataset(inputs, labels), batch_size=4)
    trainer(callback, seen, steps, max_steps=1).fit(module, data)
    assert callback.head_name == f"model.{head}"
    rows = seen.inputs[0].flatten(0, -2)
    total = (rows.square().sum(dim=1) + (model.get_submodule(head).bias is not None)).sum()
    count = {causal: 20, tagger: 16, masked: 4, llama: 20}.get(make, 4)
    if make is not regressor:
        assert callback.constant == pytest.approx(math.sqrt(2 * total / count), rel=1e-4)
    assert 0 < steps.rates[0][0] < math.inf
    trainer(LipschitzLR(), max_steps=3).fit(module, DataLoader(TensorDataset(inputs, labels), batch_size=2))
