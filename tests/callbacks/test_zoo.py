"""Networks and losses of other packages, and of papers, trained by ``LipschitzLR()`` without an argument."""

import itertools
import math
import warnings

import lightning as L
import pytest
import torch
from helpers import trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.models import detection, segmentation

from lit_lipschitz import LipschitzLR


class Model(L.LightningModule):
    """A network with a loss that is a function of it and of a batch."""

    def __init__(self, network, loss):
        super().__init__()
        self.network, self.loss = network, loss

    def training_step(self, batch, batch_idx):
        return self.loss(self.network, batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def gradient_norm(module, layers):
    """Norm of autograd's gradient in the parameters of the named layers, without those of a tied weight."""
    names = [id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False)]
    own = {p for name in layers.split(", ") for p in module.get_submodule(name).parameters(recurse=False)}
    return math.hypot(*(p.grad.norm().item() for p in own if p.grad is not None and names.count(id(p)) == 1))


def rates_of(network, loss, batch):
    """Trains two steps on one batch. In both L bounds the gradient in the output layers, as autograd computes it."""
    callback = LipschitzLR(schedule="none")

    class Rates(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            rates.append(callback.rate)
            constants.append(callback.constant)
            gradients.append(gradient_norm(pl_module, callback.head_name))

    rates, constants, gradients = [], [], []
    loader = DataLoader([batch, batch], batch_size=None)
    trainer(callback, Rates(), max_epochs=1).fit(Model(network, loss), loader)
    assert len(rates) == 2
    assert all(0 < rate < math.inf for rate in rates), rates
    assert all(g <= 1.02 * constant for g, constant in zip(gradients, constants, strict=True)), (gradients, constants)
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    return callback


def train_all(cases, figure, what):
    """Trains each case, made by a function; fails with those that raise."""
    failed, measured = {}, 0.0
    for name, make in cases.items():
        torch.manual_seed(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the packages
                measured += rates_of(*make()).controllers[0].metrics()["measured"]
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"[:300]
    figure(f"{len(cases) - len(failed)} of {len(cases)} {what} train, {measured:g} by a measured constant")
    assert not failed


def images(size=32, count=2):
    return torch.randn(count, 3, size, size), torch.arange(count)


def classifies(network, batch):
    return F.cross_entropy(network(batch[0]), batch[1])


TIMM = [
    "resnet10t", "convnext_atto", "vit_tiny_patch16_224", "deit_tiny_patch16_224", "mobilenetv3_small_050",
    "efficientnet_b0", "regnetx_002", "mixer_s32_224", "swin_tiny_patch4_window7_224", "poolformer_s12", "levit_128s",
    "mobilevit_xxs", "ghostnet_050", "tinynet_e", "resmlp_12_224", "pit_ti_224", "coat_tiny", "crossvit_tiny_240",
    "lcnet_035", "repvgg_a0",
]  # fmt: skip


@pytest.mark.slow
def test_models_of_timm(figure):
    timm = pytest.importorskip("timm")

    def make(name):
        network = timm.create_model(name, num_classes=5)
        return network, classifies, images(network.default_cfg["input_size"][-1])

    train_all({name: lambda name=name: make(name) for name in TIMM}, figure, "models of timm")


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 50, "pad_token_id": 0}
BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 50}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32}
BART |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
VISION = {"image_size": 32, "patch_size": 16}
HEADS = {"num_key_value_heads": 2}
# Class, settings, and what the batch has.
TRANSFORMERS = {
    "BertForMaskedLM": ("Bert", SMALL, "tokens"),
    "BertForSequenceClassification": ("Bert", SMALL, "class"),
    "BertForTokenClassification": ("Bert", SMALL, "tags"),
    "BertForQuestionAnswering": ("Bert", SMALL, "span"),
    "BertForMultipleChoice": ("Bert", SMALL, "choices"),
    "RobertaForMaskedLM": ("Roberta", SMALL | {"max_position_embeddings": 64}, "tokens"),
    "ElectraForPreTraining": ("Electra", SMALL | {"embedding_size": 16}, "tags"),
    "DistilBertForSequenceClassification": (
        "DistilBert", {"dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2, "vocab_size": 50}, "class"
    ),
    "AlbertForMaskedLM": ("Albert", SMALL | {"embedding_size": 16}, "tokens"),
    "GPT2LMHeadModel": ("GPT2", GPT, "tokens"),
    "GPT2ForSequenceClassification": ("GPT2", GPT | {"pad_token_id": 0}, "class"),
    "LlamaForCausalLM": ("Llama", SMALL | HEADS, "tokens"),
    "MistralForCausalLM": ("Mistral", SMALL | HEADS, "tokens"),
    "Qwen2ForCausalLM": ("Qwen2", SMALL | HEADS, "tokens"),
    "OPTForCausalLM": ("OPT", SMALL | {"ffn_dim": 32, "word_embed_proj_dim": 16}, "tokens"),
    "GPTNeoXForCausalLM": ("GPTNeoX", SMALL, "tokens"),
    "T5ForConditionalGeneration": ("T5", T5 | {"decoder_start_token_id": 0}, "tokens"),
    "BartForConditionalGeneration": ("Bart", BART, "tokens"),
    "MarianMTModel": ("Marian", BART, "tokens"),
    "ViTForImageClassification": ("ViT", SMALL | VISION, "image"),
    "DeiTForImageClassification": ("DeiT", SMALL | VISION, "image"),
    "MixtralForCausalLM": ("Mixtral", SMALL | HEADS | {"num_local_experts": 2}, "tokens"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_architectures_of_transformers_with_their_own_loss(figure):
    transformers = pytest.importorskip("transformers")
    tokens = torch.randint(3, 50, (2, 8))
    batches = {
        "tokens": {"input_ids": tokens, "labels": tokens},
        "class": {"input_ids": tokens, "labels": torch.tensor([0, 1])},
        "tags": {"input_ids": tokens, "labels": tokens % 2},
        "span": {"input_ids": tokens, "start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
        "choices": {"input_ids": tokens[:, None].repeat(1, 2, 1), "labels": torch.tensor([0, 1])},
        "image": {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])},
    }

    def make(name):
        family, settings, kind = TRANSFORMERS[name]
        network = getattr(transformers, name)(getattr(transformers, f"{family}Config")(**settings))
        return network.train(), lambda network, batch: network(**batch).loss, batches[kind]

    cases = {name: lambda name=name: make(name) for name in TRANSFORMERS}
    train_all(cases, figure, "architectures of transformers")


DETECTION = ["fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn", "ssdlite320_mobilenet_v3_large",
             "fcos_resnet50_fpn", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"]  # fmt: skip
SEGMENTATION = ["fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_detection_and_segmentation_models_of_torchvision(figure):
    def detect(name):
        target = {
            "boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]),
            "labels": torch.tensor([1]),
            "masks": torch.ones(1, 64, 64, dtype=torch.uint8),
            "keypoints": torch.tensor([[[10.0, 10.0, 1.0]] * 17]),
        }
        network = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=2)
        batch = [torch.rand(3, 64, 64) for _ in range(2)], [target, dict(target)]
        return network, lambda network, batch: sum(network(*batch).values()), batch

    def segment(name):
        network = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=4)
        batch = torch.randn(2, 3, 64, 64), torch.randint(4, (2, 64, 64))
        return network, lambda network, batch: F.cross_entropy(network(batch[0])["out"], batch[1]), batch

    cases = {name: lambda name=name: detect(name) for name in DETECTION}
    cases |= {name: lambda name=name: segment(name) for name in SEGMENTATION}
    train_all(cases, figure, "detection and segmentation models of torchvision")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_graph_networks(figure):
    geometric = pytest.importorskip("torch_geometric.nn")
    edges = torch.randint(20, (2, 60))
    batch = {"x": torch.randn(20, 5), "y": torch.randint(3, (20,)), "edges": edges, "mask": torch.arange(20) % 3 == 0}

    class Network(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.first, self.second = layer(5, 8), layer(8, 3)

        def forward(self, x, edges):
            return self.second(self.first(x, edges).relu(), edges)

    def loss(network, batch):
        return F.cross_entropy(network(batch["x"], batch["edges"])[batch["mask"]], batch["y"][batch["mask"]])

    layers = {name: getattr(geometric, name) for name in ("GCNConv", "SAGEConv", "GATConv", "GraphConv", "TAGConv")}
    cases = {name: lambda layer=layer: (Network(layer), loss, batch) for name, layer in layers.items()}
    train_all(cases, figure, "graph networks of torch_geometric")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_segmentation_networks_with_the_dice_loss(figure):
    smp = pytest.importorskip("segmentation_models_pytorch")
    batch = torch.randn(2, 3, 64, 64), torch.randint(2, (2, 1, 64, 64)).float()

    def make(name):
        network = getattr(smp, name)("resnet18", encoder_weights=None, classes=1)
        dice = smp.losses.DiceLoss("binary")
        return network, lambda network, batch: dice(network(batch[0]), batch[1]), batch

    cases = {name: lambda name=name: make(name) for name in ("Unet", "FPN", "DeepLabV3Plus", "Linknet")}
    train_all(cases, figure, "networks of segmentation_models_pytorch")


def mlp(*sizes):
    layers = [part for pair in itertools.pairwise(sizes) for part in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def pairs():
    """Contrastive pairs of images and texts, as CLIP has them, with a learned temperature."""
    network = nn.ModuleDict({"image": mlp(6, 16, 8), "text": mlp(4, 16, 8)})
    network.scale = nn.Parameter(torch.tensor(2.6))

    def loss(network, batch):
        one, other = (F.normalize(network[name](part), dim=1) for name, part in zip(network, batch, strict=True))
        logits, targets = network.scale.exp() * one @ other.T, torch.arange(len(one))
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2

    return network, loss, (torch.randn(8, 6), torch.randn(8, 4))


def autoencoder():
    """A variational autoencoder: reconstruction and divergence."""
    network = nn.ModuleDict({"encoder": mlp(6, 16, 4), "decoder": mlp(2, 16, 6)})

    def loss(network, batch):
        mean, log_variance = network["encoder"](batch).chunk(2, dim=1)
        outputs = network["decoder"](mean + torch.randn_like(mean) * (log_variance / 2).exp())
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(dim=1).mean()
        return F.mse_loss(outputs, batch, reduction="sum") / len(batch) + divergence

    return network, loss, torch.randn(8, 6)


def actor_critic():
    """The loss of PPO: clipped ratio of policies, value, entropy."""
    network = nn.ModuleDict({"body": mlp(6, 16, 16), "policy": nn.Linear(16, 3), "value": nn.Linear(16, 1)})

    def loss(network, batch):
        states, actions, before, advantage, returns = batch
        hidden = network["body"](states)
        log_policy, value = network["policy"](hidden).log_softmax(1), network["value"](hidden)[:, 0]
        ratio = (log_policy.gather(1, actions[:, None])[:, 0] - before).exp()
        clipped = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
        entropy = -(log_policy.exp() * log_policy).sum(1).mean()
        return -clipped + 0.5 * F.mse_loss(value, returns) - 0.01 * entropy

    states, actions = torch.randn(8, 6), torch.randint(3, (8,))
    return network, loss, (states, actions, torch.full((8,), -1.0), torch.randn(8), torch.randn(8))


def mixture_density():
    """A mixture of Gaussians, whose negative log-likelihood has no bounded gradient."""
    network = mlp(6, 16, 9)

    def loss(network, batch):
        weight, mean, scale = network(batch[0]).chunk(3, dim=1)
        parts = -0.5 * ((batch[1][:, None] - mean) / F.softplus(scale)).square() - F.softplus(scale).log()
        return -torch.logsumexp(weight.log_softmax(1) + parts, dim=1).mean()

    return network, loss, (torch.randn(8, 6), torch.randn(8))


def connectionist():
    """CTC over a recurrent network."""
    network = nn.ModuleDict({"body": nn.LSTM(6, 16, batch_first=True), "head": nn.Linear(16, 5)})

    def loss(network, batch):
        outputs = network["head"](network["body"](batch[0])[0]).log_softmax(2).transpose(0, 1)
        return F.ctc_loss(outputs, batch[1], torch.full((4,), 12), torch.full((4,), 3))

    return network, loss, (torch.randn(4, 12, 6), torch.randint(1, 5, (4, 3)))


def triplets():
    """A triplet margin of embeddings."""
    network = mlp(6, 16, 8)
    return network, lambda n, b: F.triplet_margin_loss(n(b), n(b + 0.1), n(b.flip(0))), torch.randn(8, 6)


def recurrent():
    """The outputs of a recurrent network themselves, without a layer behind it."""
    network = nn.GRU(6, 3, batch_first=True)
    return network, lambda n, b: F.mse_loss(n(b[0])[0], b[1]), (torch.randn(4, 5, 6), torch.randn(4, 5, 3))


def free_parameters():
    """Parameters that no affine map uses."""
    network = nn.ParameterDict({"scale": nn.Parameter(torch.ones(6)), "shift": nn.Parameter(torch.zeros(6))})
    return network, lambda n, b: (n["scale"] * b + n["shift"] - 1).square().mean(), torch.randn(8, 6)


PAPERS = [pairs, autoencoder, actor_critic, mixture_density, connectionist, triplets, recurrent, free_parameters]


@pytest.mark.parametrize("make", PAPERS, ids=lambda make: make.__name__)
def test_losses_of_papers(make):
    torch.manual_seed(0)
    callback = rates_of(*make())
    assert callback.controllers[0].metrics()["measured"] == 1
    assert callback.constant > 0


@pytest.mark.parametrize("generator_first", [True, False])
@pytest.mark.parametrize("loss", ["cross-entropy", "hinge", "Wasserstein"])
def test_adversaries_in_both_orders(generator_first, loss):
    class Adversaries(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.generator, self.critic = mlp(4, 16, 6), mlp(6, 16, 1)

        def configure_optimizers(self):
            return [torch.optim.Adam(part.parameters(), lr=1e-3) for part in (self.generator, self.critic)]

        def losses(self, real, fake):
            """Of the critic."""
            if loss == "cross-entropy":
                ones = torch.ones_like(real)
                return F.binary_cross_entropy_with_logits(real, ones) + F.binary_cross_entropy_with_logits(
                    fake, 0 * ones
                )
            return F.relu(1 - real).mean() + F.relu(1 + fake).mean() if loss == "hinge" else fake.mean() - real.mean()

        def step(self, position, value):
            self.optimizers()[position].zero_grad()
            self.manual_backward(value)
            self.optimizers()[position].step()

        def training_step(self, batch, batch_idx):
            noise = torch.randn(len(batch), 4)
            for position in (0, 1) if generator_first else (1, 0):
                fake = self.generator(noise)
                if position == 0:
                    self.step(0, -self.critic(fake).mean())
                else:
                    self.step(1, self.losses(self.critic(batch), self.critic(fake.detach())))

    torch.manual_seed(0)
    callback = LipschitzLR(optimizers=[0, 1], schedule="none")
    trainer(callback, max_epochs=2).fit(Adversaries(), DataLoader(torch.randn(24, 6), batch_size=8))
    for controller in callback.controllers.values():
        assert 0 < controller.decision.lr < math.inf
        assert controller.decision.constant > 0
