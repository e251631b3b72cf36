"""Lipschitz constants of losses: pure functions from the norm of the output layer's inputs to the constant.

    >>> from lit_lipschitz import bounds
    >>> round(bounds.cross_entropy(20.0, num_classes=10, batch_size=100), 4)
    2.8284

:mod:`~lit_lipschitz.bounds.families` has the formulas that all losses share, :mod:`~lit_lipschitz.bounds.loss_spec` the
registry of losses, and :mod:`~lit_lipschitz.bounds.classical` the constants of linear models, the only ones that need
torch.
"""

from lit_lipschitz.bounds.classification import binary_cross_entropy, cross_entropy
from lit_lipschitz.bounds.families import (
    Bound,
    LossBounds,
    Norm,
    NormOrAuto,
    Reduction,
    WeightRange,
    batch_constant,
    outputwise_constant,
    resolve_norm,
)
from lit_lipschitz.bounds.loss_spec import LOSSES, Loss, LossSpec, register_loss
from lit_lipschitz.bounds.penalties import SecondMoment, l2, second_moment, tikhonov
from lit_lipschitz.bounds.regression import huber, mean_absolute_error, mean_squared_error, quantile, smooth_l1

__all__ = [
    "LOSSES",
    "Bound",
    "Loss",
    "LossBounds",
    "LossSpec",
    "Norm",
    "NormOrAuto",
    "Reduction",
    "SecondMoment",
    "WeightRange",
    "batch_constant",
    "binary_cross_entropy",
    "cross_entropy",
    "huber",
    "l2",
    "mean_absolute_error",
    "mean_squared_error",
    "outputwise_constant",
    "quantile",
    "register_loss",
    "resolve_norm",
    "second_moment",
    "smooth_l1",
    "tikhonov",
]
