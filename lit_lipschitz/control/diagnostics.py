"""What a controller reports: non-finite losses and activations, and a head with a larger learning rate."""

import warnings
from collections.abc import Sequence

from lit_lipschitz.bounds.families import Bound
from lit_lipschitz.control.found_heads import FoundHeads, Hook
from lit_lipschitz.control.loop_facts import LoopFacts, Target
from lit_lipschitz.control.options import Options
from lit_lipschitz.control.policy import Decision, Measurement
from lit_lipschitz.control.state import ControllerState
from lit_lipschitz.errors import LitLipschitzError
from lit_lipschitz.measurement.nonfinite import NonfiniteLosses


class Reporter:
    """Reports what is not finite: a warning on rank 0, once a kind, or with ``on_nonfinite="raise"`` an error."""

    def __init__(self, options: Options, target: Target, loop: LoopFacts) -> None:
        self._raises, self._target, self._notify = options.on_nonfinite == "raise", target, loop.notify
        self._rank, self._may_overflow, self._dry_run = loop.rank, loop.may_overflow, options.dry_run
        self._warned_of_overwriting = False

    def announce(self, found: FoundHeads, decision: Decision, bound: Bound) -> None:
        """Says once what the learning rate is computed from, and that the configured one is ignored."""
        kind = "the paper's estimate" if bound == "paper" else "a proven bound"
        if not found.recognised.saved:
            kind = "as named, not seen in the graph"
        loss = "loss not recognised: measured, an estimate and not a bound" if found.measured else found.loss.name
        loss = loss if found.measured else f"{loss}, {kind}"
        m = next((f", m = {term.value:g}" for term in decision.terms if term.symbol == "m"), "")
        dry_run = (
            "nothing is written" if self._dry_run else "of the configured learning rates, only their ratios are used"
        )
        layers = found.hook.name or "the model itself"
        self._notify(
            f"LipschitzLR{self._target.label}: output layers {layers}; {loss}{m}; first rate {decision.lr:.4g}; "
            f"{dry_run}"
        )

    def check_losses(self, losses: NonfiniteLosses, decision: Decision | None, step: int) -> bool:
        """Reports non-finite losses since the last check, and forgets them; returns whether there were any."""
        first = losses.first_nonfinite()
        losses.reset(step)
        if first is None:
            return False
        nonfinite_step, ranks = first  # steps are counted from 0
        label = self._target.label
        where = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
        last = f"the last rate{label} was {decision.lr:.4g}" if decision else f"no rate{label} has been computed yet"
        message = f"a non-finite loss in step {nonfinite_step} on {where}; {last}"
        self._report(message, ", which is kept" if decision else "", silent=losses.reported)
        losses.reported = True
        return True

    def check_measurement(self, measured: Measurement, usable: bool, state: ControllerState) -> None:
        """Reports non-finite activations, or that there is no usable gradient; ``usable``: it gives a learning rate."""
        # The initial scale of a GradScaler may be too large, and the steps that overflow are skipped.
        if (usable and not measured.dropped) or (not measured.step_scale and self._may_overflow):
            return
        last = (
            "the rate is 0 until a step has a usable gradient"
            if state.decision is None
            else f"keeping the last rate, {state.decision.lr:.4g}"
        )
        self._report(
            _unusable(measured, usable, self._has_gradients()), "" if usable else f"; {last}", silent=state.warned
        )
        state.warned = True

    def _has_gradients(self) -> bool:
        """Whether there is a gradient that is not 0, or none at all, as after a step that has deleted them."""
        gradients = [one.grad for one in self._target.parameters if one.grad is not None]
        return not gradients or any(bool(one.any()) for one in gradients)

    def check_lr_of_head(self, head: Hook, references: Sequence[float]) -> None:
        """Warns if the configured learning rate of the head's group is larger than that of the first group."""
        groups = self._target.optimizer.param_groups
        own = [i for i, group in enumerate(groups) if any(p is head.weight for p in group["params"])]
        ratio = references[own[0]] / references[0] if own else 1.0
        if ratio > 1:
            self._warn(
                f"the head {head.name!r} gets {ratio:g} times the computed learning rate, since it is in parameter "
                f"group {own[0]}, whose configured learning rate is {ratio:g} times that of the first group; to give "
                "the head the computed learning rate, make its group the first one of the optimizer"
            )

    def check_overwritten(self, overwritten: bool) -> None:
        """Warns once if other code has set the rate and it was overwritten."""
        if overwritten and not self._warned_of_overwriting:
            self._warned_of_overwriting = True
            self._warn(
                f"other code has set the learning rate{self._target.label} between two steps, which has no effect; "
                "to change the computed learning rate, return a scheduler from configure_optimizers, such as LambdaLR, "
                "whose factor multiplies it"
            )

    def _report(self, message: str, kept: str, silent: bool) -> None:
        if self._raises:
            raise LitLipschitzError(f"LipschitzLR: {message} (pass on_nonfinite='keep' to continue)")
        if not silent:
            self._warn(f"{message}{kept}")

    def _warn(self, message: str) -> None:
        if self._rank == 0:
            warnings.warn(f"LipschitzLR: {message}", stacklevel=2)


def _unusable(measured: Measurement, usable: bool, has_gradients: bool) -> str:
    if usable:
        return f"{measured.dropped} batches had non-finite activations and were left out of the maximum"
    if not measured.step_scale:
        return "all gradients or updates so far were 0 or not finite"
    if not has_gradients:
        return "no constant can be computed: all gradients of the loss are 0"
    return (
        f"no constant can be computed: the norm of the head's inputs is {measured.activation_norm:g}, that of the "
        f"weights {measured.weight_norm:g}, and {measured.dropped} batches had non-finite activations"
    )
