"""What a controller logs and reports: metrics, non-finite losses and activations, a head with a larger lr."""

import warnings
from collections.abc import Sequence

from torch.optim import Optimizer

from lit_lipschitz.control.policy import Decision, Measurement
from lit_lipschitz.errors import LitLipschitzError
from lit_lipschitz.measurement.head_hooks import HeadHook
from lit_lipschitz.measurement.nonfinite import NonfiniteLosses


class Reporter:
    """Reports what is not finite: a warning on rank 0, once a kind, or an error on all ranks.

    Args:
        raises: Whether to raise an error.
        rank: Index of this process.
        label: Names the optimizer in messages if several are controlled, such as ``" of optimizer 1"``.
        may_overflow: Whether gradients may overflow and their step be skipped, as with a GradScaler.

    Attributes:
        warned: Whether non-finite activations or gradients were reported.
    """

    def __init__(self, raises: bool, rank: int, label: str, may_overflow: bool) -> None:
        self._raises, self._rank, self._label, self._may_overflow = raises, rank, label, may_overflow
        self.warned = False

    def check_losses(self, losses: NonfiniteLosses, decision: Decision | None, step: int) -> bool:
        """Reports non-finite losses since the last check, which are forgotten.

        Args:
            losses: The losses.
            decision: The last decision.
            step: The next optimizer step.

        Returns:
            Whether there were any.

        Raises:
            LitLipschitzError: There were, and errors are to be raised.
        """
        first = losses.first_nonfinite()
        losses.reset(step)
        if first is None:
            return False
        message = nonfinite_loss(*first, decision.lr if decision else None, self._label)
        self._report(message, "" if decision is None else ", which is kept", silent=losses.reported)
        losses.reported = True
        return True

    def check_measurement(self, measured: Measurement, usable: bool, decision: Decision | None) -> None:
        """Reports a measurement with non-finite activations, or without a usable gradient.

        Args:
            measured: The measurement.
            usable: Whether it gives a learning rate.
            decision: The last decision.

        Raises:
            LitLipschitzError: Something is not finite, and errors are to be raised.
        """
        # The initial scale of a GradScaler may be too large, and the steps that overflow are skipped.
        if (usable and not measured.dropped) or (not measured.step_scale and self._may_overflow):
            return
        last = "the configured rate" if decision is None else f"the last rate, {decision.lr:.4g}"
        self._report(_unusable(measured, usable), "" if usable else f"; keeping {last}", silent=self.warned)
        self.warned = True

    def _report(self, message: str, kept: str, silent: bool) -> None:
        if self._raises:
            raise LitLipschitzError(f"LipschitzLR: {message} (pass on_nonfinite='keep' to continue)")
        if not silent:
            self.warn(f"{message}{kept}")

    def warn(self, message: str) -> None:
        """Warns on rank 0."""
        if self._rank == 0:
            warnings.warn(f"LipschitzLR: {message}", stacklevel=2)


def nonfinite_loss(step: int, ranks: list[int], rate: float | None, label: str = "") -> str:
    """The message for a non-finite loss.

    Args:
        step: Optimizer step, counted from 0.
        ranks: Ranks that had it.
        rate: The last rate, or None before the first one.
        label: Names the optimizer, such as ``" of optimizer 1"``.
    """
    where = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    last = f"no rate{label} was computed yet" if rate is None else f"the last rate{label} was {rate:.4g}"
    return f"a non-finite loss in step {step} on {where}; {last}"


def _unusable(measured: Measurement, usable: bool) -> str:
    if usable:
        return f"{measured.dropped} batches had non-finite activations and were left out of the maximum"
    if not measured.step_scale:
        return "all gradients so far were 0 or not finite"
    return (
        f"no constant can be computed: the norm of the head's inputs is {measured.activation_norm:g}, that of the "
        f"weights {measured.weight_norm:g}, and {measured.dropped} batches had non-finite activations"
    )


def lr_ratio_warning(head: HeadHook, optimizer: Optimizer, references: Sequence[float]) -> str | None:
    """The warning for a head whose learning rate is larger than that of the first parameter group, or None.

    Args:
        head: The head.
        optimizer: The optimizer.
        references: Configured learning rate of each parameter group.
    """
    groups = optimizer.param_groups
    own = [i for i, group in enumerate(groups) if any(p is head.weight for p in group["params"])]
    ratio = references[own[0]] / references[0] if own else 1.0
    if ratio <= 1:
        return None
    return (
        f"the head {head.name!r} is in parameter group {own[0]}, whose configured learning rate is {ratio:g} times "
        f"that of the first group. The first group gets the computed learning rate and the head {ratio:g} times that; "
        "put the group of the head first in the optimizer, then the other groups keep their ratios to it"
    )


def log_metrics(
    decision: Decision, lr: float, *, step_scale: float | None, observes: bool, damping: float | None, has_limits: bool
) -> dict[str, float]:
    """The metrics of an optimizer step, for loggers.

    Args:
        decision: The decision behind it.
        lr: Learning rate of the first parameter group.
        step_scale: Estimate of the step scale; None if the rule needs none.
        observes: Whether gradient norms in the logits are measured.
        damping: Factor of the noise damping; None for losses without one.
        has_limits: Whether there is a limit that could change a rate.
    """
    metrics = {
        "lr": lr,
        "constant": decision.constant,
        "activation_norm": decision.activation_norm,
        "weight_norm": decision.weight_norm,
    }
    if step_scale is not None:
        metrics["step_scale"] = step_scale
    if decision.observed_constant or observes:
        metrics["observed_constant"] = decision.observed_constant
    if damping is not None:
        metrics["damping"] = damping
    if has_limits:
        metrics["capped"] = float(bool(decision.cap))
    return metrics
