"""Records rates, constants and final weights of short runs, to compare two versions of the code bit for bit.

    cd OLD && python bit_equal.py record OLD.json [--only adamw]
    cd NEW && python bit_equal.py record NEW.json
    python bit_equal.py compare OLD.json NEW.json

The package is that of the working directory, where it has one. Each run has a process of its own, so that it does not
depend on those before it, and only public names are used. Numbers are written as ``float.hex``.
"""

import argparse
import hashlib
import json
import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn
from torch.nn import AdaptiveAvgPool2d, Conv2d, Flatten, Linear, ReLU, Sequential
from torch.nn import functional as F
from torch.optim import SGD, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop, lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, os.getcwd())
import lit_lipschitz
from lit_lipschitz import MLP, LinearWarmupDecay, LipschitzLR, TimeDecay, ZeroStartSGD

Loss = Callable[[Tensor, Tensor], Tensor]
SECOND_MOMENT = "second_moment" if "second_moment" in signature(LipschitzLR).parameters else "squared"
"""The argument for the estimate of the squared constant, which has had two names."""
ROWS, WIDTH, CLASSES, BATCH, EPOCHS = 32, 6, 3, 8, 3
STEPS = EPOCHS * ROWS // BATCH
LOGGED = ("lr", "constant", "activation_norm", "weight_norm")
"""Last parts of the names of the metrics that are recorded."""
SECONDS = 150.0
"""After which a run is given up; more than its ranks wait for each other."""


def data(kind: str) -> TensorDataset:
    """Inputs, and targets of a kind."""
    generator = torch.Generator().manual_seed(0)
    image = kind in ("images", "pixels")
    inputs = torch.randn(ROWS, *((2, 4, 4) if image else (WIDTH,)), generator=generator)
    features = inputs.movedim(1, -1) if kind == "pixels" else inputs.flatten(1)
    noise = torch.randn(*features.shape[:-1], CLASSES, generator=generator)
    real = features @ torch.randn(features.shape[-1], CLASSES, generator=generator) + noise
    classes = real.argmax(dim=-1)
    targets = {"real": real, "noisy": 0.5 * real + 3 * noise, "one": real[..., :1], "soft": real.softmax(dim=-1)}
    targets |= {"binary": (real > 0).float(), "ignored": classes.where(noise[..., 0] > -0.4, -100)}
    return TensorDataset(inputs, targets.get(kind, classes))


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: Sequential(Linear(WIDTH, 8), ReLU(), Linear(8, CLASSES)),
    "one": lambda: Sequential(Linear(WIDTH, 8), ReLU(), Linear(8, 1)),
    "wide": lambda: Sequential(Linear(WIDTH, 32), ReLU(), Linear(32, CLASSES)),
    "generator": lambda: Sequential(Linear(WIDTH, 8), ReLU(), Linear(8, WIDTH)),
    "batch_norm": lambda: Sequential(Linear(WIDTH, 8), nn.BatchNorm1d(8), ReLU(), Linear(8, CLASSES)),
    "layer_norm": lambda: Sequential(Linear(WIDTH, 8), nn.LayerNorm(8), ReLU(), Linear(8, CLASSES)),
    "dropout": lambda: MLP((WIDTH,), (8, 8), CLASSES, dropout=0.2),
    "pixels": lambda: Sequential(Conv2d(2, 4, 3, padding=1), ReLU(), Conv2d(4, CLASSES, 1)),
    "pooled_head": lambda: Sequential(Conv2d(2, 4, 3), ReLU(), Conv2d(4, CLASSES, 1), AdaptiveAvgPool2d(1), Flatten()),
    "pooled_inputs": lambda: Sequential(Conv2d(2, 4, 3), ReLU(), AdaptiveAvgPool2d(1), Flatten(), Linear(4, CLASSES)),
}
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    **{kind.__name__.lower(): partial(kind, lr=0.1) for kind in (SGD, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop)},
    "momentum": partial(SGD, lr=0.1, momentum=0.9),
    "nesterov": partial(SGD, lr=0.1, momentum=0.9, nesterov=True),
    "dampening": partial(SGD, lr=0.1, momentum=0.9, dampening=0.5),
    "zero_start": partial(ZeroStartSGD, lr=0.1, momentum=0.9, dampening=0.9),
    "amsgrad": partial(Adam, lr=0.1, amsgrad=True),
    "rmsprop_momentum": partial(RMSprop, lr=0.1, momentum=0.5),
    "schedule_free": partial(AdamWScheduleFree, lr=0.1),
    "sgd_decay": partial(SGD, lr=0.1, weight_decay=0.01),
    "momentum_decay": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam_decay": partial(Adam, lr=0.1, weight_decay=0.01),
    "adamw_decay": partial(AdamW, lr=0.1, weight_decay=0.1),
    "groups": lambda p: SGD([{"params": p[:2], "lr": 0.1}, {"params": p[2:], "lr": 0.02}], momentum=0.9),
    "groups_head_larger": lambda p: SGD([{"params": p[:2], "lr": 0.1}, {"params": p[2:], "lr": 0.3}], momentum=0.9),
    "groups_adamw": lambda p: AdamW([{"params": p[:2], "lr": 0.1}, {"params": p[2:], "lr": 0.02}]),
}
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
    "one_cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=STEPS),
    "warmup_decay": lambda optimizer: LinearWarmupDecay(optimizer, total_steps=STEPS, warmup=0.3),
    "time_decay": lambda optimizer: TimeDecay(optimizer, decay=0.1),
}


class Task(L.LightningModule):
    """A network with a loss, an optimizer and maybe a scheduler."""

    def __init__(self, run: "Run") -> None:
        super().__init__()
        self.run, self.net = run, NETS[run.net]()

    def forward(self, inputs: Tensor) -> Tensor:
        """The network's outputs."""
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """The loss."""
        return self.run.loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """The optimizer, and the scheduler if there is one."""
        optimizer = OPTIMIZERS[self.run.optimizer](list(self.parameters()))
        if not self.run.scheduler:
            return optimizer
        scheduler = {"scheduler": SCHEDULERS[self.run.scheduler](optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_train_epoch_start(self) -> None:
        """Turns an optimizer that averages the weights to training."""
        getattr(self.trainer.optimizers[0], "train", tuple)()

    def on_train_epoch_end(self) -> None:
        """Turns it back."""
        getattr(self.trainer.optimizers[0], "eval", tuple)()


class NonFinite(Task):
    """The tenth batch has a loss that is not finite, with its gradients, or inputs that are not, without gradients."""

    def __init__(self, run: "Run", inputs: bool) -> None:
        super().__init__(run)
        self.inputs = inputs

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """The loss."""
        number = float("nan") if self.global_step == 9 else 0.0
        inputs = batch[0] + number if self.inputs else batch[0]
        return super().training_step([inputs, batch[1]], batch_idx) + number

    def on_after_backward(self) -> None:
        """Leaves no gradient that is not finite."""
        for parameter in self.parameters():
            parameter.grad.nan_to_num_(0.0, 0.0, 0.0)  # type: ignore[union-attr]


class ByHand(Task):
    """Manual optimization, in which every optimizer steps after so many batches."""

    def __init__(self, run: "Run", accumulated: int = 1) -> None:
        super().__init__(run)
        self.automatic_optimization, self.accumulated = False, accumulated

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """A backward of each, and maybe a step."""
        made: Any = self.optimizers()
        for optimizer, loss in zip(made if isinstance(made, list) else [made], self._losses(*batch), strict=True):
            if batch_idx % self.accumulated == 0:
                optimizer.zero_grad()
            self.manual_backward(loss)
            if (batch_idx + 1) % self.accumulated == 0:
                optimizer.step()

    def _losses(self, inputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        yield self.run.loss(self(inputs), targets)


class Gan(ByHand):
    """The same with two: a generator that has to fool a discriminator, or to come close to the data, and that one."""

    def __init__(self, run: "Run", fool: bool = False) -> None:
        super().__init__(run)
        self.net, self.discriminator, self.fool = NETS["generator"](), NETS["one"](), fool

    def _losses(self, inputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        ones, made = torch.ones(len(inputs), 1), self.net(inputs.flip(1).sin())
        yield logistic(self.discriminator(made), ones) if self.fool else F.mse_loss(made, inputs)
        both = torch.cat([self.discriminator(inputs), self.discriminator(made.detach())])
        yield logistic(both, torch.cat([ones, 0 * ones]))

    def configure_optimizers(self) -> Any:
        """One each."""
        return [OPTIMIZERS[self.run.optimizer](list(part.parameters())) for part in (self.net, self.discriminator)]


@dataclass(frozen=True)
class Run:
    """Arguments of the callback, and what is trained; ``saved`` are those of a ``ModelCheckpoint`` to go on from."""

    ours: dict[str, Any]
    optimizer: str
    loss: Loss = F.cross_entropy
    data: str = "classes"
    net: str = "plain"
    scheduler: str = ""
    trainer: dict[str, Any] = field(default_factory=dict)
    module: Callable[["Run"], L.LightningModule] = Task
    ranks: int = 1
    saved: dict[str, Any] = field(default_factory=dict)
    shuffle: bool = False


RUNS: dict[str, Run] = {}
cross_entropy, logistic, log_softmax = F.cross_entropy, F.binary_cross_entropy_with_logits, F.log_softmax
LOSSES: dict[str, dict[str, Any]] = {
    "cross_entropy": {},
    "smoothed": {"loss": partial(cross_entropy, label_smoothing=0.2)},
    "class_weights": {"loss": partial(cross_entropy, weight=torch.tensor([1.0, 2.0, 4.0]))},
    "soft_targets": {"data": "soft"},
    "summed": {"loss": partial(cross_entropy, reduction="sum")},
    "by_hand": {"loss": lambda z, y: cross_entropy(z, y, reduction="none").mean()},
    "ignored": {"data": "ignored"},
    "pixels": {"data": "pixels", "net": "pixels"},
    "nll": {"loss": lambda z, y: F.nll_loss(log_softmax(z, dim=1), y)},
    "mixup": {"loss": lambda z, y: 0.3 * cross_entropy(z, y) + 0.7 * cross_entropy(z, y.flip(0))},
    "factor": {"loss": lambda z, y: 0.3 * cross_entropy(z, y)},
    "logistic": {"loss": logistic, "data": "binary"},
    "pos_weight": {"loss": partial(logistic, pos_weight=torch.tensor([0.5, 3.0, 1.0])), "data": "binary"},
    "sigmoid": {"loss": lambda z, y: F.binary_cross_entropy(z.sigmoid(), y), "data": "binary"},
    "mse": {"loss": F.mse_loss, "data": "real"},
    "mse_of_one": {"loss": F.mse_loss, "data": "one", "net": "one"},
    "l1": {"loss": F.l1_loss, "data": "real"},
    "huber": {"loss": partial(F.huber_loss, delta=0.7), "data": "real"},
    "smooth_l1": {"loss": partial(F.smooth_l1_loss, beta=0.7), "data": "real"},
}
NORMS = {"paper": "frobenius sample", "strict": "frobenius sample", "smooth": "frobenius sample spectral"}
RULES = {"momentum": "inverse bounded adamo", "dampening": "bounded adamo", "zero_start": "adamo adamo_authors"}
RULES |= {"adam": "adam adam_authors bounded", "amsgrad": "adam", "adamw": "inverse bounded", "nadam": "adam"}
RULES |= {"rmsprop": "rmsprop rmsprop_authors bounded", "rmsprop_momentum": "rmsprop bounded"}
RULES |= {"schedule_free": "bounded"}
"""Rules that are forced, by the optimizer."""
ARGUMENTS: list[tuple[str, Any]] = [("update", 1), ("update", 3), ("update", "epoch"), ("schedule", "none")]
ARGUMENTS += [("weight_decay", 0.05), ("min_lr", 0.2), ("max_lr", 0.02), ("initial_lr", 0.03), ("dry_run", True)]
ARGUMENTS += [("schedule", "auto"), ("head", "net.2"), ("measure", "pass")]


def penalized(loss: Loss) -> Loss:
    """A sum of two losses, of which one has no constant."""
    return lambda outputs, targets: loss(outputs, targets) + 0.01 * outputs.exp().mean()


def add(name: str, optimizers: str, ours: dict[str, Any] | None = None, **settings: Any) -> None:
    """Adds a run with each of the optimizers."""
    for optimizer in optimizers.split():
        RUNS[f"{name}/{optimizer}"] = Run(ours or {}, optimizer, **settings)


def add_losses() -> None:
    """Every loss in every family, with a rule that measures gradient norms in the logits, and losses that are named."""
    for name, settings in LOSSES.items():
        add(f"loss/{name}/strict", "momentum adamw", **settings)
        for bound in ("paper", "smooth") if name != "l1" else ("paper",):
            add(f"loss/{name}/{bound}", "momentum", {"bound": bound}, **settings)
    named = {"huber": F.huber_loss, "mean_absolute_error": F.l1_loss, "mean_squared_error": F.mse_loss}
    for name, loss in named.items():
        add(f"loss/named/{name}", "momentum adamw", {"loss": name}, loss=penalized(loss), data="real")
    add("loss/named/cross_entropy", "momentum adamw", {"loss": "cross_entropy"}, loss=penalized(cross_entropy))


def add_rules() -> None:
    """Every optimizer with the rule that it has, every rule that is forced, every family and norm."""
    add("optimizer/strict", " ".join(OPTIMIZERS))
    add("optimizer/smooth", "nadam radam adamax rmsprop schedule_free sgd_decay adamw_decay", {"bound": "smooth"})
    papers = "momentum nesterov zero_start adam amsgrad adamw nadam rmsprop rmsprop_momentum"
    add("optimizer/paper", papers, {"bound": "paper"})
    for optimizer, rule in ((optimizer, rule) for optimizer, rules in RULES.items() for rule in rules.split()):
        bounds = ("strict", "smooth") if rule == "bounded" else ("strict", "paper")
        for bound in ("paper",) if rule.endswith("_authors") else bounds:
            add(f"rule/{rule}/{bound}", optimizer, {"rule": rule, "bound": bound, "update": 2})
    for bound, norm in ((bound, norm) for bound, norms in NORMS.items() for norm in norms.split()):
        ours = {"bound": bound, "norm": norm}
        add(f"norm/{bound}/{norm}", "sgd momentum adamw", ours)
        add(f"norm/{bound}/{norm}/mse", "momentum", ours, loss=F.mse_loss, data="real")
    for estimate in ("constant", "scripts"):
        for rule, optimizer in {"adam_authors": "adam", "adam": "adam", "rmsprop": "rmsprop"}.items():
            ours = {"bound": "paper", "rule": rule, "update": 1, SECOND_MOMENT: estimate}
            add(f"second_moment/{estimate}/{rule}", optimizer, ours)


def add_settings() -> None:
    """Arguments of the callback and of the trainer, and schedulers."""
    for name, value in ARGUMENTS:
        add(f"argument/{name}={value}", "momentum adamw", {name: value})
    add("argument/max_growth", "momentum adamw", {"max_growth": 1.01, "update": 1})
    add("argument/pass_paper", "momentum adamw", {"measure": "pass", "bound": "paper"})
    add("argument/pass_initial_lr", "momentum adamw", {"measure": "pass", "initial_lr": 0.03})
    ours = {"rule": "adamo_authors", "bound": "paper", "initial_lr": 0.03, "update": 2}
    add("argument/initial_lr/adamo_authors", "zero_start", ours)
    for name in SCHEDULERS:
        add(f"scheduler/{name}", "momentum adamw zero_start groups", {"update": 3}, scheduler=name)
    add("scheduler/lambda/dry_run", "momentum", {"dry_run": True}, scheduler="lambda")
    for name, value in (("accumulate_grad_batches", 2), ("gradient_clip_val", 0.1), ("precision", "64-true")):
        add(f"trainer/{name}", "sgd momentum adamw", trainer={name: value})
    add("trainer/bf16", "sgd momentum adamw", trainer={"precision": "bf16-mixed"})


def add_tasks() -> None:
    """Networks, noise, manual optimization, what is not finite, runs that go on, and several ranks."""
    every, longer = "momentum adamw schedule_free", {"max_epochs": 5}
    long = {"loss": F.mse_loss, "data": "noisy", "net": "wide", "trainer": {"max_epochs": 10}}
    for net in ("batch_norm", "layer_norm", "dropout"):
        add(f"net/{net}", every, net=net, shuffle=True)
    for net in ("pooled_head", "pooled_inputs"):
        add(f"net/{net}", every, net=net, data="images", shuffle=True)
    add("manual/one", "momentum adamw", {"optimizers": 0}, module=ByHand)
    add("manual/accumulated", "momentum adamw", {"optimizers": 0}, module=partial(ByHand, accumulated=2))
    add("manual/two", "momentum adamw", {"optimizers": [0, 1]}, module=Gan)
    add("manual/second_of_gan", "momentum adamw", {"optimizers": 1}, module=partial(Gan, fool=True))
    for where, inputs in (("loss", False), ("inputs", True)):
        add(
            f"nonfinite/{where}",
            every,
            {"on_nonfinite": "keep"},
            module=partial(NonFinite, inputs=inputs),
            trainer=longer,
        )
    add("noise", every, **long)
    add("noise/update_3", every, {"update": 3}, **long)
    for where, saved in (("middle", {"every_n_train_steps": 5}), ("end", {"every_n_epochs": 1})):
        add(f"resumed/{where}", every, saved=saved)
        add(f"resumed/{where}/noise", every, {"update": 3}, saved={n: 5 * k for n, k in saved.items()}, **long)
    add("ranks/strict", "momentum adamw", ranks=2)
    add("ranks/sample", "momentum", {"norm": "sample"}, ranks=2)
    add("ranks/spectral", "momentum", {"bound": "smooth", "norm": "spectral"}, ranks=2)
    add("ranks/resumed", "momentum", ranks=2, saved={"every_n_train_steps": 21}, **long)


for part in (add_losses, add_rules, add_settings, add_tasks):
    part()


class Memory(DummyLogger):
    """Keeps metrics by the last part of their names, with the optimizer's position where it is before that."""

    def __init__(self) -> None:
        super().__init__()
        self.series: dict[str, dict[str, str]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        """Keeps those of :data:`LOGGED`."""
        for name, value in metrics.items():
            *before, last = name.split("/")
            if before and last in LOGGED:
                key = "/".join([*filter(str.isdigit, before), last])
                self.series.setdefault(key, {})[f"step {step}"] = float(value).hex()


class Recorder(L.Callback):
    """Records every optimizer step of a run, and its end, into a file of each rank."""

    def __init__(self, ours: LipschitzLR, memory: Memory) -> None:
        self.ours, self.memory = ours, memory
        self.steps: list[dict[str, Any]] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks at the steps, before anything else that comes after them."""
        for position, optimizer in enumerate(trainer.optimizers):
            handle: Any = optimizer.register_step_post_hook(partial(self._record, position))
            optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)

    def _record(self, position: int, optimizer: Any, *_: Any) -> None:
        seen = {name: getattr(self.ours, name) for name in ("rate", "lr", "constant")}
        step: dict[str, Any] = {name: None if value is None else float(value).hex() for name, value in seen.items()}
        rates = [float(group["lr"]).hex() for group in optimizer.param_groups]
        self.steps.append({"optimizer": position, "rates": rates, **step})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the file."""
        digest = hashlib.sha256()
        for tensor in pl_module.state_dict().values():
            digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        end = {"logged": self.memory.series, "head": self.ours.head_name, "weights": digest.hexdigest()}
        Path(f"rank{trainer.global_rank}.json").write_text(json.dumps({"steps": self.steps, **end}))


def fit(run: Run, *more: L.Callback, checkpoint: str | None = None) -> None:
    """Trains, from a checkpoint if there is one."""
    torch.manual_seed(1)
    callback, memory = LipschitzLR(**run.ours), Memory()
    settings: dict[str, Any] = {"max_epochs": EPOCHS, "accelerator": "cpu", "devices": run.ranks, "logger": memory}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": bool(more)}
    if run.ranks > 1:
        wait = timedelta(seconds=60)
        settings["strategy"] = DDPStrategy(process_group_backend="gloo", start_method="fork", timeout=wait)
    callbacks = [callback, Recorder(callback, memory), *more]
    trainer = L.Trainer(callbacks=callbacks, log_every_n_steps=1, **{**settings, **run.trainer})
    loader = DataLoader(data(run.data), batch_size=BATCH // run.ranks, shuffle=run.shuffle)
    trainer.fit(run.module(run), loader, ckpt_path=checkpoint)


def child(run: Run, folder: str) -> None:
    """Trains a run in this process; its ranks leave their records in a folder, or it leaves its error."""
    os.chdir(folder)
    output = os.open("output", os.O_CREAT | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(output, stream)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        if run.saved:
            fit(run, ModelCheckpoint("saved", "{step:03d}", save_top_k=-1, **run.saved))
        fit(run, checkpoint=str(min(Path("saved").iterdir())) if run.saved else None)
    except Exception as error:
        first = next(filter(None, str(error).splitlines()), "")
        Path("error").write_text(f"{type(error).__name__}: {first}")


def record_one(run: Run) -> dict[str, Any]:
    """The record of a run, made in a process of its own."""
    with TemporaryDirectory() as folder:
        process: Any = multiprocessing.get_context("fork").Process(target=child, args=(run, folder))
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            return {"error": f"TimeoutError: no end after {SECONDS:g} s"}
        error, files = Path(folder, "error"), sorted(Path(folder).glob("rank*.json"))
        if error.exists() or len(files) < run.ranks:
            return {"error": error.read_text() if error.exists() else f"RuntimeError: exit code {process.exitcode}"}
        return {file.stem: json.loads(file.read_text()) for file in files}


def record(path: Path, only: str) -> None:
    """Records the runs that have a text in their names."""
    print(f"lit_lipschitz of {Path(lit_lipschitz.__file__).parent}", flush=True)
    begin, records = time.monotonic(), dict[str, Any]()
    for name in (name for name in RUNS if only in name):
        records[name] = record_one(RUNS[name])
        if "error" in records[name]:
            print(f"{name}: {records[name]['error']}", flush=True)
    path.write_text(json.dumps(records, indent=1) + "\n")
    errors = sum("error" in one for one in records.values())
    print(f"{len(records)} runs, {errors} errors, {time.monotonic() - begin:.0f} s")


def places(value: Any, *before: str) -> Iterator[tuple[str, Any]]:
    """Every value of a record, with where it stands."""
    if isinstance(value, dict | list):
        for name, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(one, *before, "step" if name == "steps" else str(name))
    else:
        yield " ".join(before), value


def number(value: Any) -> float | None:
    """The number that a value stands for, if it is one."""
    return float.fromhex(value) if "0x" in str(value) or value in ("nan", "inf", "-inf") else None


def difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    """The first difference of two records, or nothing; a metric that one of them has not logged is none."""
    left, right = dict(places(one)), dict(places(other))
    for place in sorted({**left, **right}, key=lambda place: place != "error"):
        pair = left.get(place, "missing"), right.get(place, "missing")
        if pair[0] == pair[1] or ("logged" in place and "missing" in pair):
            continue
        a, b = map(number, pair)
        if a is None or b is None:
            return f"{place}: {pair[0] if a is None else a} and {pair[1] if b is None else b}"
        return f"{place}: {a!r} and {b!r}, relative {abs(a - b) / (max(abs(a), abs(b)) or 1.0):.3g}"
    return ""


def compare(left: Path, right: Path) -> bool:
    """Prints the differences; returns whether there are any among the runs of both files, or none of these."""
    one, other = (json.loads(path.read_text()) for path in (left, right))
    found = {name: difference(one[name], other[name]) for name in one if name in other}
    for name, text in found.items():
        print(f"differs  {name}: {text}" if text else f"equal    {name}")
    for path, names in ((left, one.keys() - other.keys()), (right, other.keys() - one.keys())):
        for name in sorted(names):
            print(f"only in {path}: {name}")
    equal = sum(not text for text in found.values())
    print(f"{equal} of {len(found)} runs equal bit for bit")
    return equal < len(found) or not found


def main() -> None:
    """Parses the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="train, and write what was seen")
    recording.add_argument("path", type=Path)
    recording.add_argument("--only", default="", help="a text that the names of the runs have in them")
    comparing = commands.add_parser("compare", help="print the first difference of every run")
    comparing.add_argument("paths", type=Path, nargs=2)
    options = parser.parse_args()
    if options.command == "record":
        record(options.path, options.only)
    else:
        sys.exit(compare(*options.paths))


if __name__ == "__main__":
    main()
