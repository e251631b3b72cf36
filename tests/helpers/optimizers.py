"""Optimizers that are not registered, as other packages have them."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from schedulefree import SGDScheduleFree
from torch import Tensor
from torch.optim import Optimizer


class _Foreign(Optimizer):
    """Updates each parameter that has a gradient by its own formula; ``settings`` are those of its groups."""

    settings: dict[str, Any] = {}

    def __init__(self, parameters: Any, lr: float = 1e-3, **settings: Any) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": 0.0, **self.settings, **settings})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group, parameter in self.trained():
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.sub_(self.update(parameter, parameter.grad, self.state[parameter], group), alpha=group["lr"])
        return loss

    def trained(self) -> Iterator[tuple[dict[str, Any], Any]]:
        for group in self.param_groups:
            yield from ((group, parameter) for parameter in group["params"] if parameter.grad is not None)

    def update(self, parameter: Tensor, grad: Tensor, state: Any, group: dict[str, Any]) -> Tensor:
        raise NotImplementedError


def _moments(grad: Tensor, state: Any, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
    if not state:
        state.update(state1=torch.zeros_like(grad), state2=torch.zeros_like(grad), count=0)
    state["count"] += 1
    state["state1"].lerp_(grad, 1 - betas[0])
    state["state2"].lerp_(grad * grad, 1 - betas[1])
    return state["state1"], state["state2"]


class Lion(_Foreign):
    """X. Chen et al.: Symbolic Discovery of Optimization Algorithms, arXiv 2302.06675, 2023."""

    settings = {"betas": (0.9, 0.99)}

    def update(self, parameter: Tensor, grad: Tensor, state: Any, group: dict[str, Any]) -> Tensor:
        mean, (beta1, beta2) = state.setdefault("mean", torch.zeros_like(grad)), group["betas"]
        sign = mean.lerp(grad, 1 - beta1).sign()
        mean.lerp_(grad, 1 - beta2)
        return sign


class Lamb(_Foreign):
    """Y. You et al.: Large Batch Optimization for Deep Learning, arXiv 1904.00962, 2019; with bias correction."""

    settings = {"betas": (0.9, 0.999)}

    def update(self, parameter: Tensor, grad: Tensor, state: Any, group: dict[str, Any]) -> Tensor:
        (first, second), (beta1, beta2) = _moments(grad, state, group["betas"]), group["betas"]
        count = state["count"]
        update = first / (1 - beta1**count) / ((second / (1 - beta2**count)).sqrt() + 1e-6)
        size, length = parameter.norm(), update.norm()
        return update * torch.where((size > 0) & (length > 0), size / length, 1.0)


class OtherAdamW(_Foreign):
    """Without bias correction, and its state has names of its own."""

    settings = {"betas": (0.9, 0.999), "eps": 1e-8}

    def update(self, parameter: Tensor, grad: Tensor, state: Any, group: dict[str, Any]) -> Tensor:
        first, second = _moments(grad, state, group["betas"])
        return first / (second.sqrt() + group["eps"])


OtherAdamW.__name__ = "AdamW"


class OtherSGD(_Foreign):
    """Its momentum is the first of its betas."""

    settings = {"betas": (0.9, 0.0)}

    def update(self, parameter: Tensor, grad: Tensor, state: Any, group: dict[str, Any]) -> Tensor:
        velocity: Tensor = state.setdefault("velocity", torch.zeros_like(grad))
        return velocity.mul_(group["betas"][0]).add_(grad)


class MuonWithAdam(_Foreign):
    """Two kinds of groups: matrices have orthogonal updates, other parameters those of Adam, each with own settings."""

    def __init__(self, parameters: Any) -> None:
        parameters = list(parameters)
        matrices = {"params": [p for p in parameters if p.ndim == 2], "momentum": 0.95}
        others = {"params": [p for p in parameters if p.ndim != 2], "betas": (0.9, 0.95)}
        super().__init__([matrices, others], lr=0.02)

    def update(self, parameter: Tensor, grad: Tensor, state: Any, group: dict[str, Any]) -> Tensor:
        if "betas" in group:
            first, second = _moments(grad, state, group["betas"])
            return first / (second.sqrt() + 1e-8)
        mean = state.setdefault("mean", torch.zeros_like(grad)).lerp_(grad, 1 - group["momentum"])
        left, _, right = torch.linalg.svd(grad.lerp(mean, group["momentum"]), full_matrices=False)
        update: Tensor = left @ right
        return update


class Lookahead(Optimizer):
    """Has another optimizer make the steps, and every fifth one goes back half the way (arXiv 1907.08610, 2019)."""

    def __init__(self, base: Optimizer) -> None:
        super().__init__(base.param_groups, {})
        self.base, self.param_groups, self.count = base, base.param_groups, 0
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]

    def step(self, closure: Any = None) -> Any:
        loss = self.base.step(closure)
        self.count += 1
        for group, slow in zip(self.param_groups, self.slow, strict=True):
            for parameter, before in zip(group["params"], slow, strict=True) if self.count % 5 == 0 else ():
                before.lerp_(parameter.detach(), 0.5)
                parameter.data.copy_(before)
        return loss


def stepping(kind: Any, **settings: Any) -> Any:
    """Makes optimizers of a subclass with a ``step`` that is the same as that of its class."""

    def step(self: Any, closure: Any = None) -> Any:
        return kind.step(self, closure)

    return partial(type(f"Stepping{kind.__name__}", (kind,), {"step": step}), **settings)


def _schedule_free_sgd(parameters: Any) -> Any:
    optimizer = SGDScheduleFree(parameters, lr=1.0)
    optimizer.train()
    return optimizer


# Optimizers whose update is measured.
MEASURED_OPTIMIZERS = {
    "Lion": Lion,
    "Lion, weight decay": partial(Lion, weight_decay=0.1),
    "LAMB": Lamb,
    "another AdamW": OtherAdamW,
    "Muon with Adam": MuonWithAdam,
    "Lookahead": lambda parameters: Lookahead(OtherAdamW(parameters)),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.01),
    "Adafactor": partial(torch.optim.Adafactor, lr=0.01),
    "Adadelta": torch.optim.Adadelta,
    "a step of its own": stepping(torch.optim.AdamW),
}
# Optimizers that turn out to sum up the gradients.
LINEAR_OPTIMIZERS = {
    "another SGD": OtherSGD,
    "ASGD": partial(torch.optim.ASGD, lr=0.01),
    "a step of its own": stepping(torch.optim.SGD, lr=0.1, momentum=0.9),
    "schedule-free": _schedule_free_sgd,
}
