"""What a loss's constant depends on, as found in a module that nobody prepared, or as its user names it."""

from dataclasses import dataclass
from typing import Any, Literal

from lit_lipschitz.bounds import families as constants

LossName = Literal[
    "cross_entropy", "binary_cross_entropy", "mean_squared_error", "mean_absolute_error", "huber", "smooth_l1"
]
LOSSES: tuple[LossName, ...] = (
    "cross_entropy",
    "binary_cross_entropy",
    "mean_squared_error",
    "mean_absolute_error",
    "huber",
    "smooth_l1",
)
"""The losses that have a constant in :mod:`lit_lipschitz.bounds.families` and that a callback can tell apart."""


@dataclass(frozen=True)
class Loss:
    """A loss of the head's outputs, one number for a batch.

    Attributes:
        name: Which function of :mod:`lit_lipschitz.bounds.families` it belongs to.
        reduction: ``"mean"`` or ``"sum"`` over the batch.
        label_smoothing: See :func:`lit_lipschitz.bounds.families.cross_entropy`.
        class_weights: Likewise.
        pos_weight: See :func:`lit_lipschitz.bounds.families.binary_cross_entropy`; the largest one of several outputs.
        threshold: ``delta`` of the Huber loss, ``beta`` of the smooth L1 loss.
    """

    name: LossName
    reduction: constants.Reduction = "mean"
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None
    pos_weight: float = 1.0
    threshold: float = 1.0

    def needs_outputs(self, bound: constants.Bound) -> bool:
        """Whether its constant depends on the size of outputs and targets."""
        return self.name == "mean_squared_error" and bound != "smooth"

    def constant(
        self,
        activation_norm: float,
        *,
        batch_size: int,
        num_outputs: int,
        bound: constants.Bound,
        norm: constants.Norm,
        output_norm: float = 0.0,
    ) -> float:
        """The constant of the loss in the head's weights; of a sum, divided by the number of what is summed up.

        Args:
            activation_norm: K, the size of the head's inputs.
            batch_size: m, examples in the loss.
            num_outputs: Outputs of the head.
            bound: Family of the constant.
            norm: What K measures.
            output_norm: Where :meth:`needs_outputs`, the norm of the outputs plus that of the targets.

        Returns:
            The constant.

        Raises:
            ValueError: A number is out of its range, or the family has no constant for the loss.
        """
        arguments: dict[str, Any] = {
            "batch_size": batch_size,
            "bound": bound,
            "norm": norm,
            "reduction": self.reduction,
        }
        arguments["num_classes" if self.name == "cross_entropy" else "num_outputs"] = num_outputs
        if self.name == "cross_entropy":
            arguments.update(label_smoothing=self.label_smoothing, class_weights=self.class_weights)
        elif self.name == "binary_cross_entropy":
            arguments.update(pos_weight=self.pos_weight)
        elif self.name == "mean_squared_error":
            arguments.update(output_norm=output_norm, target_norm=0.0)
        elif self.name == "huber":
            arguments.update(delta=self.threshold)
        elif self.name == "smooth_l1":
            arguments.update(beta=self.threshold)
        constant: float = getattr(constants, self.name)(activation_norm, **arguments)
        if self.reduction == "mean":
            return constant
        return constant / (batch_size if self.name == "cross_entropy" else batch_size * num_outputs)
