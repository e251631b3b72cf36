"""Updates the learning rate of one optimizer when an update is due, the same on all ranks."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lit_lipschitz.control.diagnostics import Reporter
from lit_lipschitz.control.head_finder import FoundHeads
from lit_lipschitz.control.loop_facts import LoopFacts
from lit_lipschitz.control.noise_damping import NoiseDamping
from lit_lipschitz.control.options import Options, Target
from lit_lipschitz.control.policy import Decision, Measurement, Policy
from lit_lipschitz.control.rank_statistics import RankStatistics
from lit_lipschitz.control.reduction import Reduce
from lit_lipschitz.control.state import ControllerState
from lit_lipschitz.errors import ConfigurationError, LitLipschitzError
from lit_lipschitz.measurement.optimizer_updates import optimizer_info
from lit_lipschitz.measurement.step_scale import StepScaleEstimator


class RateUpdater:
    """Reduces what the ranks have measured, and decides on a rate by the policy.

    Args:
        policy: How a learning rate follows from a measurement.
        options: When to update, and what to do with values that are not finite.
        target: The optimizer.
        loop: State of the training loop when it starts.
        reduce: Element-wise MAX over the ranks.
        notify: Prints a message once for all ranks.
        state: State of the run that is resumed, or None.

    Attributes:
        info: What is known of the optimizer.
        rule: The rule.
        estimator: Estimates the step scale; None if the rule needs none.
        state: Counters, the last measurement and the last decision.
        statistics: What this rank has measured.
        damping: Noise damping of a squared error.
        reporter: Reports what is not finite.
        pass_epoch: Epoch of a pass over the training set that no step has used yet, or None.

    Raises:
        ConfigurationError: There is no rule for the optimizer.
        LitLipschitzError: The state was saved with another rule or by another version.
    """

    def __init__(
        self,
        policy: Policy,
        options: Options,
        target: Target,
        loop: LoopFacts,
        *,
        reduce: Reduce,
        notify: Callable[[str], None],
        state: Mapping[str, Any] | None,
    ) -> None:
        self._policy, self._options, self._target, self._notify = policy, options, target, notify
        self.info = optimizer_info(target.optimizer)
        self.rule = policy.rule_for(self.info, target.optimizer.param_groups)
        self._rule_state = self.rule.initial_state(options.initial_lr)
        self.estimator: StepScaleEstimator | None = None
        if self.rule.step_scale is not None:
            needs_logit_grads = self.rule.needs_logit_grads and policy.bound == "strict"
            self.estimator = StepScaleEstimator(target.optimizer, target.model, self.rule.step_scale, needs_logit_grads)
        self.statistics = RankStatistics(policy, options, target, self.estimator, loop, reduce)
        self.reporter = Reporter(options.on_nonfinite == "raise", loop.rank, target.label, loop.may_overflow)
        self.damping = NoiseDamping()
        self.pass_epoch: int | None = None
        self.state = ControllerState(self.rule.name)
        if state:
            self.restore(state)

    def needs_pass(self, epoch: int) -> bool:
        """Whether a pass over the training set is due; a checkpoint may have interrupted the epoch after it."""
        fixed_rate = self.state.last_pass_epoch < 0 and self._options.initial_lr is not None
        return not (self.pass_epoch == epoch or fixed_rate or self.state.last_pass_epoch == epoch)

    def end_pass(self, epoch: int) -> None:
        """Keeps the weight norm that belongs to a pass."""
        self.pass_epoch, self.statistics.pass_weight_norm = epoch, self.statistics.measure_weight_norm()

    def count_step(self, accumulated: int, epoch: int) -> None:
        """Counts an optimizer step.

        Args:
            accumulated: Batches in it.
            epoch: The current epoch.
        """
        state = self.state
        state.steps += 1
        if state.steps == 1:
            state.epoch = epoch
        state.accumulated = max(state.accumulated, accumulated) if self._options.running else accumulated

    def update(self, found: FoundHeads, loop: LoopFacts, lr_ratios: Callable[[], list[float]]) -> Decision | None:
        """Measures the step scale and decides on a rate, whichever is due at a step, with one all-reduce.

        Args:
            found: The head and the loss.
            loop: The loop's state.
            lr_ratios: Learning rate of each parameter group over that of the first one.

        Returns:
            The decision for the step; None before the first one.
        """
        state, first_interval = self.state, self.state.intervals == 0
        measures_scale = self.estimator is not None and self.estimator.begin_step()
        if self.estimator is not None and self.estimator.restarted:
            self._rule_state = self.rule.initial_state()
        has_pass = self.pass_epoch is not None
        is_fixed = first_interval and self._options.initial_lr is not None and state.measurement is None
        is_early = state.decision is None or (first_interval and state.steps & (state.steps - 1) == 0)
        updates = has_pass or (self._options.running and not is_fixed and is_early)
        ratios = lr_ratios() if measures_scale else None
        values = self.statistics.reduce(loop, update=updates, lr_ratios=ratios)
        if updates:
            self._decide(values, found, loop, interval_over=has_pass, scale_measured=measures_scale)
            self.pass_epoch = self.statistics.pass_weight_norm = None
        elif is_fixed and self._options.initial_lr is not None:
            state.decision = state.decision or Decision(self._options.initial_lr)
        elif measures_scale and state.measurement is not None:
            self._settle(self.statistics.with_step_scale(state.measurement), found, keep_state=True)
        state.last_pass_epoch = loop.epoch
        return state.decision

    def interval_is_over(self, loop: LoopFacts) -> bool:
        """Whether the interval ends with the last step."""
        update = self._options.update
        over = self._epoch_is_over(loop) if update == "epoch" else self.state.steps >= update
        return over and self.state.steps > 0

    def _epoch_is_over(self, loop: LoopFacts) -> bool:
        # If the last batch is unknown or the rest of an epoch is skipped, the next epoch's first step ends it.
        return loop.is_last_batch or loop.epoch > self.state.epoch

    def end_interval(self, found: FoundHeads, loop: LoopFacts) -> None:
        """Decides on the rate of the next interval by the one that has ended."""
        state = self.state
        values = self.statistics.reduce(loop, update=True)
        self._decide(values, found, loop, interval_over=True, scale_measured=False)
        self.statistics.end_interval()
        if self._epoch_is_over(loop):
            self._damp(loop)
        state.steps, state.accumulated, state.intervals = 0, 1, state.intervals + 1

    def _damp(self, loop: LoopFacts) -> None:
        """Adds an epoch, or an interval that is longer, to the noise damping."""
        state, residuals = self.state, self.statistics.residuals
        before, state.damped_epochs = state.damped_epochs, loop.epochs_completed
        if residuals.width:
            groups = self._target.optimizer.param_groups
            num_parameters = sum(p.numel() for group in groups for p in group["params"] if p.requires_grad)
            num_epochs = max(1, state.damped_epochs - before)
            self.damping.add_epoch(self.statistics.all_residuals, loop.step, num_parameters, num_epochs)
            residuals.end_epoch()

    def _decide(
        self,
        values: dict[str, list[float]],
        found: FoundHeads,
        loop: LoopFacts,
        *,
        interval_over: bool,
        scale_measured: bool,
    ) -> None:
        """Decides on a rate from values that all ranks agree on."""
        measured = self.statistics.measurement(values, self.state.accumulated, interval_over)
        if not interval_over:
            self.damping.add_first_batches(self.statistics.all_residuals, loop.step)
        if not self._options.running and not measured.batch_size and not measured.dropped:
            raise ConfigurationError(
                f"LipschitzLR(measure='pass') called {type(self._target.model).__name__} with the inputs of "
                f"the training batches, and the head {found.hook.name!r} did not run; let forward() go "
                "through the head, or use measure='running'"
            )
        if self.check_losses(loop) and self.state.decision is not None:
            return
        self._settle(measured, found, keep_state=interval_over if self.estimator is None else scale_measured)

    def _settle(self, measured: Measurement, found: FoundHeads, keep_state: bool) -> None:
        """Decides on a rate from a measurement; ``keep_state``: whether the rule's state is updated."""
        state = self.state
        outcome = self._policy.decide(
            measured,
            loss=found.loss,
            num_outputs=found.num_outputs,
            optimizer=self.info,
            groups=self._target.optimizer.param_groups,
            state=self._rule_state,
            last=state.decision,
        )
        self.reporter.check_measurement(measured, outcome is not None, state.decision)
        if self.estimator is not None and (not keep_state if outcome is not None else not measured.step_scale):
            state.measurement = measured  # for the next measurement of the step scale, which updates the rate
            return
        if outcome is None:
            return
        decision, rule_state = outcome
        if decision.cap and (state.decision is None or state.decision.cap != decision.cap):
            self._notify(f"LipschitzLR: {decision.cap} limits the learning rate to {decision.lr:.4g}")
        state.decision, state.measurement = decision, measured
        if keep_state:
            self._rule_state = rule_state

    def check_losses(self, loop: LoopFacts) -> bool:
        """Reports non-finite losses since the last check; returns whether there were any.

        Raises:
            LitLipschitzError: There were, and ``on_nonfinite`` is ``"raise"``.
        """
        return self.reporter.check_losses(self.statistics.nonfinite, self.state.decision, loop.step)

    def check_remaining_losses(self, loop: LoopFacts) -> None:
        """Reports non-finite losses since the last check, of any rank; all ranks must call it."""
        if self.statistics.nonfinite.first_step != loop.step:
            self.statistics.share_nonfinite()
            self.check_losses(loop)

    def complete_state(self) -> ControllerState:
        """The state with those of the rule and the statistics; the head's and the writer's are not among them."""
        return replace(
            self.state,
            rule_state=self._rule_state._asdict(),
            warned=self.reporter.warned,
            step_scale=self.estimator.state_dict() if self.estimator else None,
            nonfinite=self.statistics.nonfinite.state_dict(),
            damping=self.damping.state_dict(),
            residuals=self.statistics.residuals.state_dict(),
        )

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restores a saved state.

        Raises:
            LitLipschitzError: It was saved with another rule or by another version.
        """
        state = ControllerState.from_dict(saved)
        if state.rule != self.rule.name:
            raise LitLipschitzError(
                f"LipschitzLR's state in the checkpoint was saved with the rule {state.rule!r}, and this run's "
                f"{self.info.name} has the rule {self.rule.name!r}; resume with the optimizer that it was "
                "saved with, or pass restore=False to measure again"
            )
        self.state = state
        self._rule_state = self.rule.restored_state(state.rule_state)
        self.reporter.warned = state.warned
        if self.estimator is not None and state.step_scale is not None:
            self.estimator.load_state_dict(state.step_scale)
        self.statistics.nonfinite.load_state_dict(state.nonfinite)
        self.statistics.residuals.load_state_dict(state.residuals)
        self.damping.load_state_dict(state.damping)
