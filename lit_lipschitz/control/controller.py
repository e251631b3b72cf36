"""Controls the learning rate of one optimizer: measure, reduce over the ranks, decide, write."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from lit_lipschitz.bounds.loss_spec import Loss
from lit_lipschitz.control import diagnostics
from lit_lipschitz.control.batch_meter import BatchMeter
from lit_lipschitz.control.builtin_schedule import BuiltinSchedule
from lit_lipschitz.control.head_finder import FoundHeads, HeadFinder
from lit_lipschitz.control.loop_facts import LoopFacts
from lit_lipschitz.control.noise_damping import NoiseDamping
from lit_lipschitz.control.options import Options, Target
from lit_lipschitz.control.policy import Decision, Measurement, Policy
from lit_lipschitz.control.rank_statistics import RankStatistics
from lit_lipschitz.control.reduction import Reduce
from lit_lipschitz.control.state import ControllerState
from lit_lipschitz.errors import ConfigurationError, LitLipschitzError
from lit_lipschitz.measurement.head_hooks import HeadHooks
from lit_lipschitz.measurement.optimizer_updates import optimizer_info
from lit_lipschitz.measurement.residuals import RunningResiduals
from lit_lipschitz.measurement.step_scale import StepScaleEstimator
from lit_lipschitz.optim.lr_writer import LRWriter
from lit_lipschitz.recognition.loss_graph import LossGraph


class Controller:
    """Decides the learning rate of one optimizer, and writes it.

    A training loop calls :meth:`begin_batch`, :meth:`on_loss` before the backward, :meth:`on_step` before the optimizer
    steps, and :meth:`end_batch`.

    Args:
        policy: How a learning rate follows from a measurement.
        options: The other arguments of the callback.
        target: The optimizer, neither stepped nor restored from a checkpoint.
        loop: State of the training loop when it starts.
        reduce: Element-wise MAX over the ranks; the identity on one device.
        notify: Prints a message once for all ranks.
        state: :meth:`state_dict` of the run that is resumed, or None.

    Attributes:
        state: What a checkpoint holds; the states of the statistics are added by :meth:`state_dict`.
        statistics: What this rank measures.

    Raises:
        ConfigurationError: The network or the optimizer cannot be controlled.
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
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.policy, self.options, self.optimizer = policy, options, target.optimizer
        self._target, self._notify = target, notify
        self._info = optimizer_info(self.optimizer)
        self._rule = policy.rule_for(self._info, self.optimizer.param_groups)
        self._rule_state = self._rule.initial_state(options.initial_lr)
        self._estimator = self._make_estimator()
        self.state = ControllerState.from_dict(state) if state else ControllerState(self._rule.name)
        self.statistics = RankStatistics(policy, options, target, self._estimator, loop, reduce)
        self._reporter = diagnostics.Reporter(
            options.on_nonfinite == "raise", loop.rank, target.label, loop.may_overflow
        )
        self._damping = NoiseDamping()
        if state:
            self._restore()
        self._writer = LRWriter(
            self.optimizer, target.schedulers, self.state.references, keep_scheduled=bool(loop.lr_writer)
        )
        self._finder = HeadFinder(policy, options, target, loop.device, self.state.head)
        self._schedule = self._make_schedule(loop)
        self._found: FoundHeads | None = None
        self._meter: BatchMeter | None = None
        self._applied: tuple[Decision, list[float]] | None = None  # of the last step, with the groups' learning rates
        self._pass_epoch: int | None = None  # epoch of a pass over the training set that no step has used yet
        self._batch_open = False  # whether a batch has begun that has made no loss yet
        self._micro_batches = 0  # batches since the last optimizer step

    def _make_estimator(self) -> StepScaleEstimator | None:
        """Estimates the step scale, if the rule needs it."""
        if self._rule.step_scale is None:
            return None
        needs_logit_grads = self._rule.needs_logit_grads and self.policy.bound == "strict"
        return StepScaleEstimator(self.optimizer, self._target.model, self._rule.step_scale, needs_logit_grads)

    def _make_schedule(self, loop: LoopFacts) -> BuiltinSchedule:
        """The built-in schedule, unless something else changes the learning rate."""
        wanted = self.options.schedule == "auto" and self.policy.bound != "paper"
        if wanted and loop.lr_writer and not self._target.schedulers:
            self._notify(
                f"LipschitzLR: {loop.lr_writer} brings rates of its own, so there is no warm-up and no decay "
                "but for these; bring a scheduler to have one before (schedule='none' says that none is wanted)"
            )
        return BuiltinSchedule(
            enabled=wanted and not self._writer.scheduled,
            averages_weights=self._info.averages_weights,
            has_warmup=any(group.get("warmup_steps") for group in self.optimizer.param_groups),
            notify=self._notify,
        )

    @property
    def hooks(self) -> HeadHooks:
        """The hooks on what is or can be the head."""
        return self._finder.hooks

    @property
    def decision(self) -> Decision | None:
        """The decision behind the last optimizer step; None before the first one."""
        return self._applied[0] if self._applied else None

    @property
    def rates(self) -> list[float]:
        """Learning rates of the parameter groups in the last optimizer step; empty before the first one."""
        return self._applied[1] if self._applied else []

    @property
    def measurement(self) -> Measurement | None:
        """The measurement behind the last decision; None if it is not based on one."""
        return self.state.measurement

    @property
    def head_name(self) -> str | None:
        """Name of the head, once the first step has shown which module it is."""
        return self._found.hook.name if self._found else None

    @property
    def head(self) -> nn.Module | None:
        """The head, once the first step has shown which module it is."""
        return self._found.hook.head if self._found else None

    @property
    def loss(self) -> Loss | None:
        """The loss, once the first step has shown which one it is."""
        return self._found.loss if self._found else None

    @property
    def num_scale_invariant(self) -> int | None:
        """Number of weights detected as scale-invariant; None if the rule needs no step scale."""
        return self._estimator.num_scale_invariant if self._estimator is not None else None

    @property
    def accumulated(self) -> int:
        """Largest number of batches that made one step in the current interval, as far as known."""
        return self.state.accumulated

    @property
    def schedule(self) -> str | None:
        """Description of the built-in schedule, if it is used; known from the first step on."""
        return self._schedule.description

    @property
    def fraction_unexplained(self) -> float | None:
        """Fraction of variance that a squared error left unexplained in the last epoch; None for other losses."""
        return self._damping.fraction_unexplained

    @property
    def damping(self) -> float:
        """Factor of the noise damping, which is part of the built-in schedule; 1 without one."""
        return self._damping.factor if self._schedule.description else 1.0

    def close(self) -> None:
        """Removes all hooks."""
        self.hooks.remove()
        self._writer.close()

    def begin_epoch(self) -> None:
        """Forgets batches of the last epoch that made no step."""
        self._micro_batches = 0

    def needs_pass(self, epoch: int) -> bool:
        """Whether a pass over the training set is due; a checkpoint may have interrupted the epoch after it."""
        fixed_rate = self.state.last_pass_epoch < 0 and self.options.initial_lr is not None
        return not (self._pass_epoch == epoch or fixed_rate or self.state.last_pass_epoch == epoch)

    def end_pass(self, epoch: int) -> None:
        """Keeps the weight norm that belongs to a pass."""
        self._pass_epoch, self.statistics.pass_weight_norm = epoch, self.statistics.measure_weight_norm()

    def begin_batch(self, loop: LoopFacts) -> None:
        """Starts the measurement of a batch; discards a batch that made no loss."""
        self._loop = loop
        self._micro_batches += 1
        if self._batch_open or not loop.automatic:
            self.hooks.discard()
        self._batch_open = self.options.running
        self.hooks.set_mode("training" if self.options.running else "watching")

    def on_loss(self, graph: LossGraph, loop: LoopFacts) -> None:
        """Ends the measurement of a batch by its loss, before the backward; the first one shows the head and the loss.

        Args:
            graph: The autograd graph of the loss.
            loop: The loop's state.
        """
        # With several optimizers, the last loss before the first step is the one that the step uses.
        if self._meter is None or (self._applied is None and not self._target.is_only):
            found = self._finder.find(graph, loop)
            if found is not None:
                self._measure_by(found, loop)
                if self._meter is not None and not self.options.running:
                    self.statistics.pass_factor = self._meter.pass_factor(graph, loop)
        if self._meter is not None:
            self._measure(self._meter, graph, loop)
        # A backward may run forwards again (activation checkpointing); in manual optimization more may follow.
        if loop.automatic:
            self.hooks.set_mode("off")

    def _measure_by(self, found: FoundHeads, loop: LoopFacts) -> None:
        """Measures by a head and a loss that were found from now on."""
        width = found.num_outputs if found.loss.name == "mean_squared_error" else 0
        if width != self.statistics.residuals.width:  # a checkpoint may have restored them
            self.statistics.residuals = RunningResiduals(width, loop.device)
        warning = diagnostics.lr_ratio_warning(found.hook, self.optimizer, self._writer.references)
        if self._found is None and warning is not None:
            self._reporter.warn(warning)
        self._found, self.statistics.activations = found, found.hook.statistic
        self._meter = BatchMeter(
            found,
            self.policy,
            self.statistics.residuals,
            only_optimizer=self._target.is_only,
            named_loss=self.options.loss_name is not None,
        )

    def _measure(self, meter: BatchMeter, graph: LossGraph, loop: LoopFacts) -> None:
        """Measures a batch by its loss."""
        estimator = self._estimator
        watches = estimator is not None and estimator.needs_logit_grads and estimator.due
        batch = meter.read(graph) if self.options.running or watches else None
        if estimator is not None and watches and batch is not None:
            meter.watch_gradients(graph, batch, estimator)
        if self.options.running:
            self._batch_open = False
            meter.finish(batch, loop)

    def on_other_optimizer_step(self) -> None:
        """Another optimizer is about to step."""
        self._finder.on_other_optimizer_step()
        if self._estimator is not None:
            self._estimator.on_other_optimizer_step()

    def on_step(self, loop: LoopFacts) -> bool:
        """Updates the rate if an update is due, and writes it before the optimizer steps.

        Returns:
            Whether there is something new to log.
        """
        if self._found is None:
            # No loss has come: the batch was skipped, or manual optimization calls backward itself.
            if loop.automatic:
                return False
            self._measure_by(self._finder.find_named(), loop)
        self._finder.raise_deferred_error(first_step=self._applied is None)
        if not loop.automatic and self._batch_open and self.statistics.activations is not None:
            self.statistics.activations.finish()  # of a batch that made a step without a loss
            self._batch_open = False
        self._count_step(loop)
        before = self.state.decision
        self._update(loop)
        self.state.last_pass_epoch = loop.epoch
        factor = self._schedule.factor(loop) * self.damping
        rate = self.state.decision.lr * factor if self.state.decision else None
        rates = self._writer.write(None if self.options.dry_run else rate)
        if self.options.dry_run and rate is not None:
            rates = self._writer.rates(rate)
        self._applied = (self.state.decision or Decision(rates[0]), rates)
        return self.state.steps == 1 or self.state.decision is not before

    def _count_step(self, loop: LoopFacts) -> None:
        """Counts a step of the interval, and the batches that it accumulates."""
        state = self.state
        state.steps += 1
        if state.steps == 1:
            state.epoch = loop.epoch
        accumulated = loop.accumulated if loop.automatic else max(1, self._micro_batches)
        state.accumulated = max(state.accumulated, accumulated) if self.options.running else accumulated
        self._micro_batches = 0

    def _update(self, loop: LoopFacts) -> None:
        """Measures the step scale and decides on a rate, whichever is due, with one all-reduce."""
        state, first_interval = self.state, self.state.intervals == 0
        measures_scale = self._estimator is not None and self._estimator.begin_step()
        if self._estimator is not None and self._estimator.restarted:
            self._rule_state = self._rule.initial_state()
        has_pass = self._pass_epoch is not None
        is_fixed = first_interval and self.options.initial_lr is not None and state.measurement is None
        in_first_interval = state.decision is None or (first_interval and state.steps & (state.steps - 1) == 0)
        updates = has_pass or (self.options.running and not is_fixed and in_first_interval)
        ratios = self._writer.ratios if measures_scale else None
        values = self.statistics.reduce(loop, update=updates, lr_ratios=ratios)
        if updates:
            self._decide(values, loop, interval_over=has_pass, scale_measured=measures_scale)
            self._pass_epoch = self.statistics.pass_weight_norm = None
        elif is_fixed and self.options.initial_lr is not None:
            state.decision = state.decision or Decision(self.options.initial_lr)
        elif measures_scale and state.measurement is not None:
            self._settle(self.statistics.with_step_scale(state.measurement), keep_state=True)

    def end_batch(self, loop: LoopFacts, may_be_saved: bool) -> None:
        """Ends the interval with its last step.

        Args:
            loop: The loop's state.
            may_be_saved: Whether a checkpoint may be saved after the batch, which all ranks know alike.
        """
        self.hooks.set_mode("off")
        if self._applied is None and self._writer.steps and not loop.automatic:
            raise ConfigurationError(
                "LipschitzLR writes the rate when Lightning's optimizer steps, and a step went past it; call "
                "self.optimizers().step(), not the step of the optimizer inside"
            )
        if self._found is None or not self.options.running:
            return
        state, update = self.state, self.options.update
        # If the last batch is unknown or the rest of an epoch is skipped, the next epoch's first step ends it.
        epoch_over = loop.is_last_batch or loop.epoch > state.epoch
        interval_over = state.steps >= int(update) if update != "epoch" else epoch_over
        if interval_over and state.steps:
            self._decide(self.statistics.reduce(loop, update=True), loop, interval_over=True, scale_measured=False)
            self.statistics.end_interval()
            if epoch_over:
                self._end_epoch(loop)
            state.steps, state.accumulated, state.intervals = 0, 1, state.intervals + 1
        elif may_be_saved:
            self.share()

    def _end_epoch(self, loop: LoopFacts) -> None:
        """Adds an epoch, or an interval that is longer, to the noise damping."""
        state, residuals = self.state, self.statistics.residuals
        before, state.damped_epochs = state.damped_epochs, loop.epochs_completed
        if residuals.width:
            trained = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
            num_parameters = sum(parameter.numel() for parameter in trained)
            num_epochs = max(1, state.damped_epochs - before)
            self._damping.add_epoch(self.statistics.all_residuals, loop.step, num_parameters, num_epochs)
            residuals.end_epoch()

    def share(self) -> None:
        """Gives all ranks the same statistics, for a checkpoint between two updates; all ranks must call it."""
        if self._found is not None and self.options.running:
            self.statistics.share()

    def _decide(
        self, values: dict[str, list[float]], loop: LoopFacts, *, interval_over: bool, scale_measured: bool
    ) -> None:
        """Decides on a rate from values that all ranks agree on."""
        assert self._found is not None
        measured = self.statistics.measurement(values, self.state.accumulated, interval_over)
        if not interval_over:
            self._damping.add_first_batches(self.statistics.all_residuals, loop.step)
        if not self.options.running and not measured.batch_size and not measured.dropped:
            raise ConfigurationError(
                f"LipschitzLR(measure='pass') called {type(self._target.model).__name__} with the inputs of "
                f"the training batches, and the head {self._found.hook.name!r} did not run; let forward() go "
                "through the head, or use measure='running'"
            )
        if self.check_losses(loop) and self.state.decision is not None:
            return
        self._settle(measured, keep_state=interval_over if self._estimator is None else scale_measured)

    def _settle(self, measured: Measurement, keep_state: bool) -> None:
        """Decides on a rate from a measurement; ``keep_state``: whether the rule's state is updated."""
        assert self._found is not None
        state = self.state
        outcome = self.policy.decide(
            measured,
            loss=self._found.loss,
            num_outputs=self._found.num_outputs,
            optimizer=self._info,
            groups=self.optimizer.param_groups,
            state=self._rule_state,
            last=state.decision,
        )
        self._reporter.check_measurement(measured, outcome is not None, state.decision)
        if self._estimator is not None and (not keep_state if outcome is not None else not measured.step_scale):
            state.measurement = measured  # for the next measurement of the step scale, which updates the rate
            return
        if outcome is None:
            return
        decision, rule_state = outcome
        if decision.cap and (state.decision is None or state.decision.cap != decision.cap):
            self._notify(f"LipschitzLR: {decision.cap} binds, the rate is {decision.lr:.4g}")
        state.decision, state.measurement = decision, measured
        if keep_state:
            self._rule_state = rule_state

    def check_losses(self, loop: LoopFacts) -> bool:
        """Reports non-finite losses since the last check; returns whether there were any.

        Raises:
            LitLipschitzError: There were, and ``on_nonfinite`` is ``"raise"``.
        """
        return self._reporter.check_losses(self.statistics.nonfinite, self.state.decision, loop.step)

    def metrics(self) -> dict[str, float]:
        """Metrics of the last step, for loggers; empty before the first one."""
        if self._applied is None:
            return {}
        estimator = self._estimator
        return diagnostics.log_metrics(
            self._applied[0],
            self._applied[1][0],
            step_scale=estimator.scale.value if estimator else None,
            observes=estimator is not None and estimator.needs_logit_grads,
            damping=self.damping if self.statistics.residuals.width else None,
            has_limits=self.policy.has_limits,
        )

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values; see :class:`~lit_lipschitz.control.state.ControllerState`."""
        complete = replace(
            self.state,
            rule_state=self._rule_state._asdict(),
            warned=self._reporter.warned,
            references=self._writer.references,
            step_scale=self._estimator.state_dict() if self._estimator else None,
            nonfinite=self.statistics.nonfinite.state_dict(),
            damping=self._damping.state_dict(),
            residuals=self.statistics.residuals.state_dict(),
            head=self.hooks.state_dict(),
        )
        return complete.to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads the state of :meth:`state_dict`, which some strategies restore after the fit has begun."""
        self.state = ControllerState.from_dict(state)
        self._restore()
        if self.state.head is not None:
            self.hooks.load_state_dict(self.state.head)

    def _restore(self) -> None:
        """Restores the statistics from the state."""
        state = self.state
        if state.rule != self._rule.name:
            raise LitLipschitzError(
                f"LipschitzLR's state in the checkpoint was saved with the rule {state.rule!r}, and this run's "
                f"{self._info.name} has the rule {self._rule.name!r}; resume with the optimizer that it was "
                "saved with, or pass restore=False to measure again"
            )
        self._rule_state = self._rule.restored_state(state.rule_state)
        self._reporter.warned = state.warned
        if self._estimator is not None and state.step_scale is not None:
            self._estimator.load_state_dict(state.step_scale)
        self.statistics.nonfinite.load_state_dict(state.nonfinite)
        self.statistics.residuals.load_state_dict(state.residuals)
        self._damping.load_state_dict(state.damping)
