"""Classifiers of torchvision and timm by their name, with an output for each class."""

import difflib
from collections.abc import Iterable

from torch import nn

from lit_lipschitz.errors import ConfigurationError


def named_network(
    name: str, num_classes: int | None = None, in_channels: int | None = None, pretrained: bool = False
) -> nn.Module:
    """A classifier of timm or torchvision.

    Args:
        name: ``timm:resnet18``, ``torchvision:resnet18`` and so on; the part before the colon is the package.
        num_classes: Number of outputs; None uses that of the data in a config, and 10 in Python.
        in_channels: Channels of the images; None uses that of the data in a config, and 3 in Python.
        pretrained: Download the package's default weights; layers of another shape, such as the output layer, are
            initialised at random.

    Raises:
        ConfigurationError: There is no such network, or the package is not installed.

    Example:
        >>> import torch
        >>> named_network("torchvision:squeezenet1_1", num_classes=3)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 3])
    """
    package, _, model = name.partition(":")
    num_classes, in_channels = num_classes or 10, in_channels or 3
    if package == "timm":
        try:
            import timm
        except ImportError:
            raise ConfigurationError(f"{name} needs the package timm: pip install timm") from None
        _check(name, model.partition(".")[0], timm.list_models())
        return timm.create_model(model, num_classes=num_classes, in_chans=in_channels, pretrained=pretrained)
    if package != "torchvision":
        raise ConfigurationError(f"{name}: expected timm:NAME or torchvision:NAME")
    return _torchvision(name, num_classes, in_channels, pretrained)


def _check(name: str, model: str, known: Iterable[str]) -> None:
    known = list(known)
    if model not in known:
        close = difflib.get_close_matches(model, known, n=3, cutoff=0.5)
        hint = f"; closest: {', '.join(close)}" if close else ""
        raise ConfigurationError(f"{name}: {name.partition(':')[0]} has no classifier of that name{hint}")


def _torchvision(name: str, num_classes: int, in_channels: int, pretrained: bool) -> nn.Module:
    from torchvision import models  # noqa: TID251, the package whose network is wanted

    model = name.partition(":")[2]
    _check(name, model, models.list_models(module=models))
    # These two have outputs in several layers, unless they are told not to.
    plain = {"aux_logits": False, "init_weights": True} if model in ("googlenet", "inception_v3") else {}
    network: nn.Module = models.get_model(model, num_classes=num_classes, **plain)
    if in_channels != 3:
        _replace_first_convolution(network, in_channels)
    if pretrained:
        own = network.state_dict()
        weights = models.get_model_weights(model).DEFAULT.get_state_dict(progress=False)
        fitting = {key: value for key, value in weights.items() if key in own and own[key].shape == value.shape}
        network.load_state_dict(fitting, strict=False)
    return network


def _replace_first_convolution(network: nn.Module, in_channels: int) -> None:
    """Gives the first convolution another number of input channels, and new weights."""
    first = next(one for one in network.modules() if isinstance(one, nn.Conv2d))
    first.in_channels = in_channels
    first.weight = nn.Parameter(first.weight.new_empty(first.out_channels, in_channels, *first.kernel_size))
    first.reset_parameters()
