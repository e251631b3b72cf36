"""Optimizers that average the weights, schedulefree's: which of their weights are in, and which a checkpoint holds.

While they train, the weights are y = (1 - beta) z + beta x, z being the sequence that is trained and x its average,
with beta the first of Adam's betas or SGD's momentum.

References:
    A. Defazio et al.: The Road Less Scheduled, arXiv 2405.15682, 2024.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

KEY = "averaged_parameters"
"""What a checkpoint holds beside the optimizers: of each one that averages, its parameters' names, in its order."""


def turn(optimizers: Iterable[Optimizer], way: Literal["train", "eval"]) -> bool:
    """Turns those that average the weights to training, or puts the averages in.

    Args:
        optimizers: Any optimizers.
        way: Which of the two.

    Returns:
        Whether one of them did average.
    """
    averaging = [optimizer for optimizer in optimizers if hasattr(optimizer, way)]
    for optimizer in averaging:
        getattr(optimizer, way)()
    return bool(averaging)


def are_training(optimizers: Iterable[Optimizer]) -> bool:
    """Whether the weights are those that one of them trains, in place of its average."""
    return any(group.get("train_mode", False) for optimizer in optimizers for group in optimizer.param_groups)


def note(checkpoint: dict[str, Any], module: nn.Module, optimizers: list[Optimizer]) -> None:
    """Has a checkpoint hold what :func:`average` needs; one without the optimizers' states has the averages at once.

    Args:
        checkpoint: A checkpoint of Lightning's, of the module and its optimizers as they are.
        module: The module.
        optimizers: Its optimizers.
    """
    if not are_training(optimizers):
        return
    names = {parameter: name for name, parameter in module.named_parameters()}
    checkpoint[KEY] = [[names.get(p, "") for group in o.param_groups for p in group["params"]] for o in optimizers]
    if "optimizer_states" not in checkpoint:
        average({**checkpoint, "optimizer_states": [optimizer.state_dict() for optimizer in optimizers]})
        del checkpoint[KEY]


def average(checkpoint: Mapping[str, Any]) -> bool:
    """Puts the averages in the place of the weights that a checkpoint holds, to be evaluated rather than trained on.

    Returns:
        Whether there were any to put in; what else the checkpoint holds, as BatchNorm's statistics, is of the others.
    """
    weights, changed = checkpoint["state_dict"], False
    for names, saved in zip(checkpoint.get(KEY, ()), checkpoint.get("optimizer_states", ()), strict=False):
        for group in saved["param_groups"]:
            if not group.get("train_mode", False):
                continue
            beta = group["betas"][0] if "betas" in group else group["momentum"]
            for i in group["params"]:
                z: Tensor | None = saved["state"].get(i, {}).get("z")
                if z is not None and names[i] in weights:
                    weights[names[i]] = weights[names[i]].lerp(z.to(weights[names[i]]), 1 - 1 / beta)
                    changed = True
    return changed
