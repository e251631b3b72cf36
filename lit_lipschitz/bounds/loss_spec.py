"""Registry of the losses whose constant is known: the bound of each, and how it appears in torch's autograd graph.

A loss that torch computes in one autograd node is added by one record, from any package:

    register_loss(LossSpec("soft_margin", soft_margin, nodes=("SoftMarginLossBackward0",)))

``LipschitzLR`` then recognises it, and accepts its name as ``loss=``. Losses that torch composes of several nodes
(cross-entropy, the mean absolute error) have patterns in ``lit_lipschitz.recognition``.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lit_lipschitz.bounds.classification import binary_cross_entropy, cross_entropy
from lit_lipschitz.bounds.families import Bound, Norm, Reduction
from lit_lipschitz.bounds.regression import huber, mean_absolute_error, mean_squared_error, smooth_l1


@dataclass(frozen=True)
class LossSpec:
    """A kind of loss.

    Attributes:
        name: The loss's name, as in ``LipschitzLR(loss=...)``.
        bound: Its constant, called as ``bound(activation_norm, batch_size=, bound=, norm=, reduction=, ...)``, like
            :func:`lit_lipschitz.bounds.huber`. It raises ValueError if a family is not defined for the loss.
        nodes: Names of the autograd nodes of torch's function, such as ``"HuberLossBackward0"``. They save the outputs
            or targets as ``_saved_target``, and the reduction as ``_saved_reduction``.
        arguments: Arguments of ``bound`` and the attributes of the node that hold them, such as
            ``{"delta": "_saved_delta"}``; of a saved tensor the largest entry is used.
        outputs: The argument of ``bound`` for the number of the head's outputs: ``"num_outputs"`` if each output is
            compared with a target of its own and the mean is over outputs too, ``"num_classes"`` if all outputs of an
            example share a target and the mean is over the examples alone.
        needs_output_norm: Families for which ``bound`` takes ``output_norm`` and ``target_norm`` as well.
    """

    name: str
    bound: Callable[..., float]
    nodes: tuple[str, ...] = ()
    arguments: Mapping[str, str] = field(default_factory=dict)
    outputs: Literal["num_outputs", "num_classes"] = "num_outputs"
    needs_output_norm: tuple[Bound, ...] = ()

    @property
    def per_output(self) -> bool:
        """Whether a mean is over the outputs of an example too."""
        return self.outputs == "num_outputs"

    def loss(self, reduction: Reduction = "mean", **arguments: Any) -> "Loss":
        """The loss with arguments of :attr:`bound`; defaults are left out, so that equal losses compare equal."""
        parameters = inspect.signature(self.bound).parameters
        return Loss(self.name, reduction, {k: v for k, v in arguments.items() if v != parameters[k].default})


LOSSES: dict[str, LossSpec] = {}
"""The registered losses by name."""


ALIASES = {
    "ce": "cross_entropy",
    "bce": "binary_cross_entropy",
    "mse": "mean_squared_error",
    "mae": "mean_absolute_error",
}
"""Short names of losses, which arguments may have."""


def register_loss(spec: LossSpec) -> None:
    """Adds a loss to ``LOSSES``; before ``LipschitzLR`` is imported, to be a choice of the command line too.

    Raises:
        ValueError: The name or one of the nodes is registered already.
    """
    for other in LOSSES.values():
        if other.name == spec.name or set(other.nodes) & set(spec.nodes):
            raise ValueError(f"loss {spec.name!r} with nodes {spec.nodes}: {other.name!r} is registered for the same")
    LOSSES[spec.name] = spec


def find_spec(node: str) -> LossSpec | None:
    """The loss that torch computes in the autograd node of a name, or None."""
    return next((spec for spec in LOSSES.values() if node in spec.nodes), None)


@dataclass(frozen=True)
class Loss:
    """A loss of the head's outputs, one number for a batch."""

    name: str  #: its name in ``LOSSES``
    reduction: Reduction = "mean"  #: over the batch
    #: arguments of :attr:`LossSpec.bound` that are not at their defaults, such as ``label_smoothing``
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def spec(self) -> LossSpec:
        """The kind of the loss."""
        return LOSSES[self.name]

    def needs_output_norm(self, bound: Bound) -> bool:
        """Whether its constant depends on the norms of outputs and targets."""
        return bound in self.spec.needs_output_norm

    def constant(
        self,
        activation_norm: float,
        *,
        batch_size: int,
        num_outputs: int,
        bound: Bound,
        norm: Norm,
        output_norm: float = 0.0,
    ) -> float:
        """The constant of the loss in the head's weights; that of a sum is divided by the number of its terms.

        ``num_outputs`` are the outputs of the head. If :meth:`needs_output_norm`, ``output_norm`` is the norm of the
        outputs plus that of the targets.

        Raises:
            ValueError: A number is out of its range, or the family is not defined for the loss.
        """
        arguments: dict[str, Any] = {self.spec.outputs: num_outputs, **self.arguments}
        if self.needs_output_norm(bound):
            arguments.update(output_norm=output_norm, target_norm=0.0)
        constant = self.spec.bound(
            activation_norm, batch_size=batch_size, bound=bound, norm=norm, reduction=self.reduction, **arguments
        )
        if self.reduction == "mean":
            return constant
        return constant / (batch_size * num_outputs if self.spec.per_output else batch_size)


for _spec in (
    LossSpec("cross_entropy", cross_entropy, outputs="num_classes"),
    LossSpec(
        "binary_cross_entropy",
        binary_cross_entropy,
        nodes=("BinaryCrossEntropyWithLogitsBackward0",),
        arguments={"pos_weight": "_saved_pos_weight"},
    ),
    LossSpec(
        "mean_squared_error", mean_squared_error, nodes=("MseLossBackward0",), needs_output_norm=("paper", "strict")
    ),
    LossSpec("mean_absolute_error", mean_absolute_error),
    LossSpec("huber", huber, nodes=("HuberLossBackward0",), arguments={"delta": "_saved_delta"}),
    LossSpec("smooth_l1", smooth_l1, nodes=("SmoothL1LossBackward0",), arguments={"beta": "_saved_beta"}),
):
    register_loss(_spec)
