"""Updates the learning rate of one optimizer when an update is due, the same on all ranks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from lit_lipschitz.control.diagnostics import Reporter
from lit_lipschitz.control.due_steps import MEASURE_EVERY, DueSteps
from lit_lipschitz.control.found_heads import FoundHeads
from lit_lipschitz.control.loop_facts import LoopFacts, Target
from lit_lipschitz.control.options import Options
from lit_lipschitz.control.policy import Decision, Measurement, Policy
from lit_lipschitz.control.rank_states import state_of_rank, unknown_ranks
from lit_lipschitz.control.rank_statistics import RankStatistics
from lit_lipschitz.control.run_facts import changed_facts, changes_batches, num_trained, run_facts
from lit_lipschitz.control.state import ControllerState, check_fields, check_like, refuse_other_versions
from lit_lipschitz.errors import ConfigurationError, LitLipschitzError
from lit_lipschitz.measurement.optimizer_updates import optimizer_info
from lit_lipschitz.measurement.step_scale import StepScaleEstimator


class RateUpdater:
    """Reduces what the ranks have measured, and decides on a rate by the policy.

    ``state`` is the :meth:`state_dict` of a run that is resumed.
    """

    def __init__(
        self, policy: Policy, options: Options, target: Target, loop: LoopFacts, state: Mapping[str, Any] | None
    ) -> None:
        self._policy, self._options, self._target, self._notify = policy, options, target, loop.notify
        self._rank, self._world_size = loop.rank, loop.world_size
        self.info = optimizer_info(target.optimizer)
        self.rule = policy.rule_for(self.info, target.optimizer.param_groups)
        self.estimator: StepScaleEstimator | None = None  # of the step scale; None if the rule needs none
        if self.rule.needs_steps:
            self.estimator = StepScaleEstimator(
                target.optimizer, target.model, policy.bound == "strict", self.info, loop.notify
            )
        self.statistics = RankStatistics(policy, options, target, self.estimator, loop)
        self.reporter = Reporter(options, target, loop)
        self._pass_epoch: int | None = None  # of a pass over the training set that no step has used yet
        self._last_measurement: Measurement | None = None  # of the interval, if its last step has made it already
        self._restarted = False  # whether the next step decides on new estimates
        self._begun = self._remeasures = False  # whether the fit has begun; whether its first step decides
        self.state = ControllerState(self.rule.name, self.rule.initial_state(options.initial_lr), self.info.name)
        every = 1 if policy.bound == "paper" else MEASURE_EVERY
        self.steps = DueSteps(every if options.measure_every == "auto" else options.measure_every)
        if state is not None:
            self.restore(state)

    def restart(self) -> None:
        """Decides in the next step, with a new state of the rule: the constant is another one from now on."""
        self._restarted = True
        self.steps.request()

    def begin_run(self, loop: LoopFacts) -> bool:
        """Says what has changed in a resumed run; returns whether its steps have other batches, so that it measures."""
        if self._begun:
            return False
        state, self._begun = self.state, True
        before, state.run = state.run, run_facts(loop, self._options, self._target)
        if changes := changed_facts(before, state.run):
            self._notify(
                f"LipschitzLR{self._target.label}: the run that is resumed has changed: {changes}; the schedule goes "
                f"on at step {loop.step + 1}, and the ratios between the parameter groups are kept"
            )
        if not (self._options.running and state.decision is not None and changes_batches(before, state.run)):
            return False
        self._remeasures = True
        self.steps.request()
        state.accumulated = 1
        self.statistics.residuals.end_interval()
        return True

    def needs_pass(self, epoch: int) -> bool:
        """Whether a pass over the training set is due; a checkpoint may have interrupted the epoch after it."""
        fixed_rate = self.state.last_pass_epoch < 0 and self._options.initial_lr is not None
        return not (self._pass_epoch == epoch or fixed_rate or self.state.last_pass_epoch == epoch)

    def end_pass(self, epoch: int) -> None:
        """Notes that the pass of an epoch has been made."""
        self._pass_epoch = epoch
        self.steps.request()
        self.statistics.end_pass()

    def begin_step(
        self, found: FoundHeads, loop: LoopFacts, batches: int, lr_ratios: Callable[[], list[float]]
    ) -> Decision | None:
        """Measures the step scale and decides on a rate, whichever is due at a step, with one all-reduce.

        The step is made of so many ``batches``; ``lr_ratios`` gives the learning rate of each parameter group over that
        of the first one. Returns the decision for the step; None before the first one.
        """
        state, first_interval, initial_lr = self.state, self.state.intervals == 0, self._options.initial_lr
        state.steps += 1
        if state.steps == 1:
            state.epoch = loop.epoch
        state.accumulated = max(state.accumulated, batches) if self._options.running else batches
        due, ratios, estimator = self.steps.due, None, self.estimator
        self.steps.end_step()
        if not due:
            if estimator is not None:
                estimator.discard()
            return state.decision
        if estimator is not None:
            ratios = lr_ratios()
            estimator.begin_step()
        if self._restarted or (estimator is not None and estimator.restarted):
            state.rule_state = self.rule.initial_state()
        has_pass = self._pass_epoch is not None
        is_fixed = first_interval and initial_lr is not None and state.measurement is None
        # Without an estimator a measured step needs no all-reduce, but an update does: not in each step if all are due.
        updates = estimator is not None or self.steps.every > 1 or state.steps & (state.steps - 1) == 0
        is_early = state.decision is None or (first_interval and updates)
        is_early, self._restarted = is_early or self._restarted or self._remeasures, False
        self._remeasures = False
        if has_pass or (self._options.running and not is_fixed and is_early):
            self._decide(found, loop, interval_over=has_pass, lr_ratios=ratios)
            self._pass_epoch = None
        else:
            if ratios is not None:
                self._measure_step_scale(found, loop, ratios)
            if is_fixed and initial_lr is not None:
                state.decision = state.decision or Decision(initial_lr)
            elif ratios is not None and state.measurement is not None:
                self._settle(self.statistics.with_step_scale(state.measurement), found, keep_state=True)
        if state.decision is None and self.estimator is not None and self.estimator.copies_fail:
            group = self._target.optimizer.param_groups[0]
            state.decision = Decision(float(group.get("initial_lr", group["lr"])))  # for a step to measure
        state.last_pass_epoch = loop.epoch
        if state.decision is None or (estimator is not None and not estimator.scale.value):
            self.steps.request()
        return state.decision

    def _measure_step_scale(self, found: FoundHeads, loop: LoopFacts, lr_ratios: Sequence[float]) -> None:
        """Measures the step scale; in an interval's last step, what the interval's end needs by the same all-reduce."""
        # In manual optimization the last batch may make more steps.
        if self._options.running and loop.automatic and self._ends_interval(loop):
            batches = self.state.accumulated
            self._last_measurement = self.statistics.measurement(
                found, loop, batches, interval_over=True, lr_ratios=lr_ratios
            )
        else:
            self.statistics.reduce(loop, lr_ratios)

    def _ends_interval(self, loop: LoopFacts) -> bool:
        """Whether the interval ends with the step that is being made."""
        # If the last batch is unknown or the rest of an epoch is skipped, the next epoch's first step ends it.
        update = self._options.update
        return self._epoch_over(loop) if update == "epoch" else self.state.steps >= update

    def _epoch_over(self, loop: LoopFacts) -> bool:
        return loop.is_last_batch or loop.epoch > self.state.epoch

    def end_step(self, found: FoundHeads, loop: LoopFacts) -> bool:
        """Decides on the rate of the next interval if this one ends with the last step; returns whether it does."""
        state = self.state
        if not state.steps or not self._ends_interval(loop):
            return False
        if self.estimator is not None:
            self.estimator.end_interval()
        self._decide(found, loop, interval_over=True)
        found.hook.statistic.reset()
        self.statistics.residuals.end_interval()
        if self._epoch_over(loop):
            self._damp(loop)
        state.steps, state.accumulated, state.intervals = 0, 1, state.intervals + 1
        self.steps.request()
        return True

    def _damp(self, loop: LoopFacts) -> None:
        """Adds an epoch, or an interval that is longer, to the noise damping."""
        state, residuals = self.state, self.statistics.residuals
        before, state.damped_epochs = state.damped_epochs, loop.epoch + loop.is_last_batch
        if residuals.width:
            num_parameters = sum(p.numel() for p in self._target.parameters if p.requires_grad)
            num_epochs = max(1, state.damped_epochs - before)
            state.damping.add_epoch(self.statistics.all_residuals, loop.step, num_parameters, num_epochs)
            residuals.end_epoch()

    def _decide(
        self, found: FoundHeads, loop: LoopFacts, *, interval_over: bool, lr_ratios: Sequence[float] | None = None
    ) -> None:
        """Decides on a rate from a new measurement."""
        state, statistics = self.state, self.statistics
        if self._last_measurement is None:
            measured = statistics.measurement(
                found, loop, state.accumulated, interval_over=interval_over, lr_ratios=lr_ratios
            )
        else:
            measured = statistics.with_step_scale(self._last_measurement)
        self._last_measurement, state.accumulated = None, measured.batches
        if not interval_over:
            state.damping.add_first_batches(statistics.all_residuals, loop.step)
        if not self._options.running and not measured.batch_size and not measured.dropped:
            raise ConfigurationError(
                f"LipschitzLR(measure='pass') called {type(self._target.model).__name__} with the inputs of "
                f"the training batches, and the head {found.hook.name!r} did not run; let forward() go "
                "through the head, or use measure='running'"
            )
        if self.check_losses(loop) and state.decision is not None:
            return
        self._settle(measured, found, keep_state=interval_over if self.estimator is None else lr_ratios is not None)

    def _settle(self, measured: Measurement, found: FoundHeads, keep_state: bool) -> None:
        """Decides on a rate from a measurement; ``keep_state``: whether the rule's state is updated."""
        state = self.state
        outcome = self._policy.decide(
            measured,
            loss=found.loss,
            num_outputs=found.num_outputs,
            optimizer=self.info,
            groups=self._target.optimizer.param_groups,
            state=state.rule_state,
            last=state.decision,
            step=self.steps.steps,
        )
        if self.estimator is None or not self.estimator.copies_fail or measured.step_scale:
            self.reporter.check_measurement(measured, outcome is not None, state)
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
            state.rule_state = rule_state

    def check_losses(self, loop: LoopFacts) -> bool:
        """Reports non-finite losses since the last check; returns whether there were any."""
        return self.reporter.check_losses(self.statistics.nonfinite, self.state.decision, loop.step)

    def check_remaining_losses(self, loop: LoopFacts) -> None:
        """Reports non-finite losses since the last check, of any rank; all ranks must call it."""
        if self.statistics.nonfinite.first_step != loop.step:
            self.statistics.share(["nonfinite"])
            self.check_losses(loop)

    def state_dict(self, references: list[float], written: list[float], head: dict[str, Any] | None) -> dict[str, Any]:
        """The state as tensors and plain values, with those of the writer and of the head."""
        state = replace(
            self.state,
            references=references,
            written=written,
            step_scale=self.estimator.state_dict() if self.estimator else None,
            nonfinite=self.statistics.nonfinite.state_dict(),
            residuals=self.statistics.residuals.state_dict(),
            head=head,
            due=asdict(self.steps),
            ranks=unknown_ranks(self._world_size),
            run=self.state.run and {**self.state.run, "trained parameters": str(num_trained(self._target))},
        )
        return state.to_dict()

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restores a state of :meth:`state_dict`, which must be of the same rule."""
        state = ControllerState.from_dict(state_of_rank(saved, self._rank, self._world_size, self._notify))
        if (state.rule, state.optimizer) != (self.rule.name, self.info.name):
            raise LitLipschitzError(
                f"LipschitzLR's state in the checkpoint was saved with the rule {state.rule!r} of {state.optimizer}, "
                f"and this run's "
                f"{self.info.name} has the rule {self.rule.name!r}; resume with the optimizer that it was "
                "saved with, or pass restore=False to measure again"
            )
        with refuse_other_versions():
            check_fields(self.rule.state_type, state.rule_state)
            self.state = replace(state, rule_state=self.rule.restored_state(state.rule_state))
            if self.estimator is not None and state.step_scale is not None:
                check_like(state.step_scale, self.estimator.state_dict())
                check_fields(type(self.estimator.scale), state.step_scale["scale"])
                self.estimator.load_state_dict(state.step_scale)
            check_like(state.due, asdict(self.steps))
            self.steps.resume(state.due["steps"], state.due["next"])
            for saved, own in (
                (state.nonfinite, self.statistics.nonfinite),
                (state.residuals, self.statistics.residuals),
            ):
                check_like(saved, own.state_dict())
                own.load_state_dict(saved)
