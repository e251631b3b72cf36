"""Learning rates computed, not tuned: 1 over the Lipschitz constant of the loss, for PyTorch Lightning and any loop."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_lipschitz.attachment import Attachment, attach
    from lit_lipschitz.callbacks.averaged_weights import AveragedWeights
    from lit_lipschitz.callbacks.lipschitz_audit import LipschitzAudit
    from lit_lipschitz.callbacks.lipschitz_lr import LipschitzLR
    from lit_lipschitz.data import (
        CIFAR10DataModule,
        CIFAR100DataModule,
        DigitsDataModule,
        FashionMNISTDataModule,
        MNISTDataModule,
    )
    from lit_lipschitz.errors import ConfigurationError, DataError, LitLipschitzError
    from lit_lipschitz.models import MLP, MNISTCNN, DenseNet, ResNet9, ResNetV1, ResNetV2, named_network
    from lit_lipschitz.module import ImageClassifier
    from lit_lipschitz.optim.schedules import LinearWarmupDecay, TimeDecay
    from lit_lipschitz.optim.zero_start_sgd import ZeroStartSGD
    from lit_lipschitz.suggestion import Suggestion, suggest

__version__ = "0.1.0"
__all__ = [
    "MLP",
    "MNISTCNN",
    "Attachment",
    "AveragedWeights",
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "ConfigurationError",
    "DataError",
    "DenseNet",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "ImageClassifier",
    "LinearWarmupDecay",
    "LipschitzAudit",
    "LipschitzLR",
    "LitLipschitzError",
    "MNISTDataModule",
    "ResNet9",
    "ResNetV1",
    "ResNetV2",
    "Suggestion",
    "TimeDecay",
    "ZeroStartSGD",
    "attach",
    "named_network",
    "suggest",
]

_HOMES = {
    **dict.fromkeys(["ConfigurationError", "DataError", "LitLipschitzError"], "errors"),
    **dict.fromkeys(["DenseNet", "MLP", "MNISTCNN", "ResNet9", "ResNetV1", "ResNetV2", "named_network"], "models"),
    **{name: "data" for name in __all__ if name.endswith("DataModule")},
    "ImageClassifier": "module",
    **dict.fromkeys(["LinearWarmupDecay", "TimeDecay"], "optim.schedules"),
    "ZeroStartSGD": "optim.zero_start_sgd",
    **dict.fromkeys(["Attachment", "attach"], "attachment"),
    "AveragedWeights": "callbacks.averaged_weights",
    "LipschitzAudit": "callbacks.lipschitz_audit",
    "LipschitzLR": "callbacks.lipschitz_lr",
    **dict.fromkeys(["Suggestion", "suggest"], "suggestion"),
}


def __getattr__(name: str) -> Any:
    """Imports public names on first use: the command answers `configs` and `--help` without importing torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"lit_lipschitz.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
