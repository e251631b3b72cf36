"""``ImageClassifier``: the LightningModule that the bundled configs train."""

import fnmatch
import functools
import inspect
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import torch
from jsonargparse.typing import restricted_string_type
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torchmetrics import Metric

from lit_lipschitz.callbacks.averaged_weights import AveragedWeights, warn_of_batch_norm
from lit_lipschitz.data.loader import fold
from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.models.named import named_network
from lit_lipschitz.optim.schedules import LinearWarmupDecay

Batch = tuple[Tensor, Tensor]
if TYPE_CHECKING:
    NetworkName = str
else:  # so that a config with another text is refused
    NetworkName = restricted_string_type("NetworkName", r"^(timm|torchvision):.+$")
CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


def momentum_sgd(parameters: Iterable[Any]) -> Optimizer:
    """SGD with momentum 0.9; the callback sets the learning rate."""
    return torch.optim.SGD(parameters, momentum=0.9)


class EpochMean(Metric):
    """Mean over the examples of an epoch, on all ranks.

    It is passed to ``self.log`` once an epoch: in every step that costs more than a small network's forward.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: int, weight: int = 1) -> None:
        """Adds ``count`` examples, whose sum is ``total`` times ``weight``."""
        self.total.add_(total, alpha=weight)
        self.count.add_(count)

    def compute(self) -> Tensor:
        """The mean."""
        return self.total / self.count


class _Factories(tuple[OptimizerCallable, LRSchedulerCallable | None]):
    """What makes optimizer and scheduler, which copies of a module share: the command's cannot be copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Factories":
        return self


class ImageClassifier(L.LightningModule):
    """Trains any network with the mean softmax cross-entropy.

    Logs train_loss, train_acc, val_loss, val_acc, test_loss and test_acc once an epoch, the same on all ranks. Random
    numbers in the network (dropout) depend on the seed, the epoch, the batch and the rank, so that a resumed run draws
    the same numbers as an uninterrupted one. With a Schedule-Free optimizer, the module adds the callback
    :class:`~lit_lipschitz.AveragedWeights`, which evaluates and saves the averaged weights.

    Args:
        network: Maps images of shape (batch, channels, height, width) to logits of shape (batch, classes). In a config
            it can be the name of a classifier, ``timm:NAME`` or ``torchvision:NAME``
            (:func:`~lit_lipschitz.named_network`), which gets the channels and classes of the data.
        optimizer: Makes the optimizer from the parameters.
        scheduler: Makes the learning-rate scheduler from the optimizer. If it has an argument ``total_steps`` that is
            not set, this is set to the number of optimizer steps of the run.
        scheduler_interval: When the scheduler is stepped; ``"auto"`` is every optimizer step if it has an argument
            ``total_steps``, otherwise every epoch.
        monitor: The logged metric that ReduceLROnPlateau uses.
        label_smoothing: Label smoothing of the training loss, in [0, 1].
        clip_probabilities: Clip the probabilities p in the training loss to [c, 1 - c], with c this number. Outside
            this range the gradient is 0, as in Keras' loss with c = 1e-7. 0 turns clipping off. Can't be combined with
            label smoothing.
        decayed: Shell patterns, such as ``*conv*.weight``, of the names of the parameters that the weight decay applies
            to; None is all parameters.
        mix: Applied to the images and labels of a training batch, such as ``torchvision.transforms.v2.MixUp`` or
            ``CutMix``, which make labels into probabilities. Can't be combined with ``clip_probabilities``.
        channels_last: Keep images and convolutions in the channels-last order, which is faster on most GPUs.
        compile: Mode of ``torch.compile``; ``"reduce-overhead"`` uses CUDA graphs. None does not compile.

    Raises:
        ConfigurationError: An argument is out of its range.
    """

    def __init__(
        self,
        network: nn.Module | NetworkName,
        optimizer: OptimizerCallable = momentum_sgd,
        scheduler: LRSchedulerCallable | None = None,
        scheduler_interval: Literal["auto", "step", "epoch"] = "auto",
        monitor: str = "val_loss",
        label_smoothing: float = 0.0,
        clip_probabilities: float = 0.0,
        decayed: list[str] | None = None,
        mix: nn.Module | None = None,
        channels_last: bool = False,
        compile: CompileMode | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise ConfigurationError(f"label_smoothing={label_smoothing}: expected a number from 0 to 1")
        if not 0 <= clip_probabilities < 0.5:
            raise ConfigurationError(f"clip_probabilities={clip_probabilities}: expected a number from 0 to below 0.5")
        if clip_probabilities and label_smoothing:
            raise ConfigurationError(
                f"clip_probabilities={clip_probabilities} and label_smoothing={label_smoothing}: expected one of them "
                "to be 0"
            )
        if clip_probabilities and mix is not None:
            raise ConfigurationError(
                f"clip_probabilities={clip_probabilities} and mix={mix}: expected 0 or None for one of them"
            )
        self.network = named_network(network) if isinstance(network, str) else network
        self.mix = mix
        self.label_smoothing = label_smoothing
        self.clip_probabilities = clip_probabilities
        self.decayed = decayed
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.compile_mode = compile
        self._factories = _Factories((optimizer, scheduler))
        self._interval, self._monitor = scheduler_interval, monitor
        self._seed: int | None = None
        self._means: dict[str, dict[str, EpochMean]] = {}
        self._logged_epoch: int | None = None  # the last epoch whose training means were passed to self.log

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute; the one that Lightning sets 50 times a step skips the checks of nn.Module."""
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, classes)."""
        if self.memory_format == torch.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.network(images)

    def setup(self, stage: str) -> None:
        """Adds the callback for averaged weights, sets the memory format, and marks the network for compilation."""
        AveragedWeights.ensure(self.trainer)
        if self.memory_format == torch.channels_last:
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.compile_mode is not None and self.network._compiled_call_impl is None:
            # Compiled code is cached by class, with the hooks of an earlier network of this process.
            torch.compiler.reset()
            # In place, so that parameters keep their names and checkpoints fit with and without.
            self.network.compile(mode=self.compile_mode)

    def check(self, image_shape: tuple[int, ...], num_classes: int) -> None:
        """Raises a ConfigurationError unless the network takes images of a shape and has an output for each class."""
        modes = [(module, module.training) for module in self.network.modules()]
        try:
            with torch.no_grad():
                outputs = self.network.eval()(torch.zeros(2, *image_shape))
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
            raise ConfigurationError(
                f"the network {type(self.network).__name__} takes no images of shape {image_shape}, the data's "
                f"({str(error).splitlines()[0]}); choose another model.network or other data"
            ) from None
        finally:
            for module, training in modes:
                module.training = training
        if outputs.ndim != 2 or outputs.shape[1] < num_classes:
            raise ConfigurationError(
                f"the network {type(self.network).__name__} makes outputs of shape {tuple(outputs.shape)} from 2 "
                f"images, and the data have {num_classes} classes: expected (2, {num_classes}); change model.network"
            )

    def configure_optimizers(self) -> Any:
        """One optimizer over all parameters, and its scheduler, if any.

        Raises:
            ConfigurationError: The scheduler can't be made, or a pattern in ``decayed`` matches no parameter.
        """
        make_optimizer, make_scheduler = self._factories
        optimizer = make_optimizer(self.parameters() if self.decayed is None else self._groups(self.decayed))
        if make_scheduler is None:
            return optimizer
        stepwise, given = _total_steps_of(make_scheduler)
        length = {} if given or not stepwise else {"total_steps": self._total_steps()}
        try:
            scheduler = make_scheduler(optimizer, **length)
        except (ValueError, TypeError) as error:
            raise ConfigurationError(f"the scheduler can't be made: {error}") from None
        interval = self._interval if self._interval != "auto" else "step" if stepwise else "epoch"
        config = {"scheduler": scheduler, "interval": interval, "monitor": self._monitor}
        return {"optimizer": optimizer, "lr_scheduler": config}

    def _groups(self, patterns: list[str]) -> list[dict[str, Any]]:
        """Parameter groups with and without weight decay."""
        parameters = dict(self.network.named_parameters())
        chosen: set[str] = set()
        for pattern in patterns:
            names = fnmatch.filter(parameters, pattern)
            if not names:
                raise ConfigurationError(
                    f"decayed: no parameter of {type(self.network).__name__} fits {pattern!r}; they are called "
                    f"{', '.join(list(parameters)[:3])} and so on"
                )
            chosen.update(names)
        decayed = [parameter for name, parameter in parameters.items() if name in chosen]
        others = [parameter for name, parameter in parameters.items() if name not in chosen]
        return [{"params": decayed}, {"params": others, "weight_decay": 0.0}]

    def _total_steps(self) -> int:
        steps = self.trainer.estimated_stepping_batches
        if not 1 <= steps < math.inf:
            raise ConfigurationError(
                f"the scheduler needs the length of the run, found {steps} optimizer steps; set trainer.max_epochs or "
                "trainer.max_steps, and trainer.limit_train_batches above 0"
            )
        return int(steps)

    def on_train_start(self) -> None:
        """Continues a schedule over the run's length by the length that this run has, where it is resumed with more.

        The learning rate in a checkpoint is that of the old length: 0 where that run was complete.
        """
        for config in self.trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            if not isinstance(scheduler, LinearWarmupDecay):
                continue
            factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
            for group, lr, factor in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, factors, strict=False):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(lr * factor)
                else:
                    group["lr"] = lr * factor

    def on_fit_start(self) -> None:
        """Sets the seed of the run, unless it was loaded from a checkpoint."""
        self._seed = torch.initial_seed() % 2**32 if self._seed is None else self._seed
        self._logged_epoch = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves the seed."""
        checkpoint["seed"] = self._seed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Loads the seed."""
        self._seed = checkpoint.get("seed")
        if self._trainer is None:  # in load_from_checkpoint, without callbacks
            warn_of_batch_norm(checkpoint, self)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seeds the random numbers of this batch."""
        assert self._seed is not None
        seed_device(fold(self._seed, self.current_epoch, batch_idx, self.global_rank), self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one batch."""
        images, labels = batch if self.mix is None else self.mix(*batch)
        logits = self(images)
        if self.clip_probabilities:
            least, most = math.log(self.clip_probabilities), math.log1p(-self.clip_probabilities)
            loss = F.nll_loss(F.log_softmax(logits, dim=1).clamp(least, most), labels)
        else:
            loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        # A run that is resumed within an epoch logs the rest of the epoch.
        self._log("train", loss, logits, labels, first=self._logged_epoch != self.current_epoch)
        self._logged_epoch = self.current_epoch
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and accuracy of one batch."""
        self._evaluate("val", batch, first=batch_idx == 0)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and accuracy of one batch."""
        self._evaluate("test", batch, first=batch_idx == 0)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Class probabilities of shape (batch, classes)."""
        return self(batch[0]).softmax(dim=1)

    def _evaluate(self, stage: str, batch: Batch, first: bool) -> None:
        images, labels = batch
        logits = self(images)
        self._log(stage, F.cross_entropy(logits, labels), logits, labels, first)

    def _log(self, stage: str, loss: Tensor, logits: Tensor, labels: Tensor, first: bool) -> None:
        """Adds a batch to the means of the epoch, which the first batch passes to Lightning's logging."""
        if stage not in self._means:
            self._means[stage] = {f"{stage}_loss": EpochMean(), f"{stage}_acc": EpochMean()}
        means = self._means[stage]
        if first:
            for name, mean in means.items():
                mean.to(self.device).reset()  # Lightning moves its results to the CPU at an epoch's end
                self.log(name, mean, on_step=False, on_epoch=True, prog_bar=True, metric_attribute=name)
        count = len(labels)
        with torch.no_grad():
            classes = labels if labels.ndim == 1 else labels.argmax(dim=1)
            correct = (logits.argmax(dim=1) == classes).sum()
            for mean, total, weight in zip(means.values(), (loss.detach(), correct), (count, 1), strict=True):
                mean.update(total, count, weight)


def seed_device(seed: int, device: torch.device) -> None:
    """Seeds the generators of the CPU and of a device; ``torch.manual_seed`` costs 0.3 ms where there is no GPU."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    elif device.type == "cuda":
        torch.default_generator.manual_seed(seed)
        torch.cuda.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def _total_steps_of(factory: Callable[..., Any]) -> tuple[bool, bool]:
    """Whether a factory's product has an argument total_steps, and whether the factory sets it."""
    given = False
    while isinstance(factory, functools.partial):
        given = given or factory.keywords.get("total_steps") is not None
        # jsonargparse's factories pass the class as an argument.
        factory = next((part for part in factory.args if isinstance(part, type)), factory.func)
    return "total_steps" in inspect.signature(factory).parameters, given
