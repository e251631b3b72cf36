"""SGD with a momentum buffer that starts at zero, as in the papers' AdaMo."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import SGD


class ZeroStartSGD(SGD):
    """torch's SGD with a momentum buffer that starts at 0, as in the AdaMo of the LipschitzLR papers.

    torch starts the buffer at the first gradient, without dampening. With momentum and dampening 0.9, where the buffer
    averages the gradients, the first step is then ten times too long, and all steps together contain the first gradient
    nine times too often. Arguments are those of ``torch.optim.SGD``.

    References:
        The optimizer in the scripts published with R. Yedida, S. Saha, arXiv 1902.07399.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step; arguments and result as for ``torch.optim.SGD``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"] if group["momentum"] else ():
                if parameter.grad is not None and self.state[parameter].get("momentum_buffer") is None:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        super().step()
        return loss
