"""Controls the learning rate of one optimizer: measure, reduce over the ranks, decide, write."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from lit_lipschitz.control.builtin_schedule import BuiltinSchedule
from lit_lipschitz.control.finder import Finder
from lit_lipschitz.control.found_heads import FoundHeads, Hooks, Meter
from lit_lipschitz.control.loop_facts import LoopFacts, Target
from lit_lipschitz.control.options import Options
from lit_lipschitz.control.policy import Decision, Measurement, Policy
from lit_lipschitz.control.rate_updater import RateUpdater
from lit_lipschitz.control.results import metrics_of
from lit_lipschitz.control.step_losses import StepLosses
from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.optim.lr_writer import LRWriter
from lit_lipschitz.recognition.loss_graph import LossGraph


class Controller:
    """Measures what enters the head, updates the learning rate of one optimizer, and writes it.

    A training loop calls :meth:`begin_batch`, :meth:`on_loss` before the backward, and :meth:`end_batch`. The optimizer
    calls ``before_step`` when its gradients are final, from which the loop calls :meth:`on_step`, and ``after_step`` at
    the end of the step. ``state`` is the :meth:`state_dict` of a run that is resumed.
    """

    def __init__(
        self,
        policy: Policy,
        options: Options,
        target: Target,
        loop: LoopFacts,
        state: Mapping[str, Any] | None,
        before_step: Callable[[], None],
        after_step: Callable[[], None] | None = None,
    ) -> None:
        self.policy, self.options, self.optimizer = policy, options, target.optimizer
        self._target, self.schedulers = target, target.schedulers
        self.updater = RateUpdater(policy, options, target, loop, state)
        saved = self.updater.state
        self._writer = LRWriter(
            target.optimizer,
            target.schedulers,
            saved.references,
            saved.written,
            bool(loop.lr_writer),
            before_step,
            after_step,
        )
        self._finder = Finder(policy, options, target, loop, saved.head)
        wanted = options.schedule == "auto" and policy.bound != "paper"
        scheduled, averages_weights = self._writer.scheduled, self.updater.info.averages_weights
        self.schedule = BuiltinSchedule.of(
            target, loop, wanted=wanted, scheduled=scheduled, averages_weights=averages_weights
        )
        self.found: FoundHeads | None = None  # the head and the loss; None before the first loss
        self._meter: Meter | None = None
        self.decision: Decision | None = None  # behind the last optimizer step; None before the first one
        self.rates: list[float] = []  # learning rates of the parameter groups in it
        # Whether all ranks measure the constant, and so decide by it; else one of them may.
        self._measured_by_all = self._decides_by_measured
        self._batch_open = False  # whether a batch has begun that has made no loss yet
        self.losses = StepLosses(self.updater)
        self._versions = 0  # changes to the weights before this batch
        self.measuring = False  # whether the forwards of this batch are measured
        self._is_unknown = False  # whether the last loss was of a kind that was not measured before

    @property
    def hooks(self) -> Hooks:
        """The hooks on what is or can be the head, or on the output layers."""
        return self._finder.hooks

    @property
    def due(self) -> bool:
        """Whether the coming step is measured, which is the same on all ranks."""
        return self.updater.steps.due or self.found is None

    @property
    def is_stepping(self) -> bool:
        """Whether the optimizer makes a step."""
        return self._writer.is_stepping

    @property
    def scheduled(self) -> bool:
        """Whether schedulers set the learning rates that are factors of the computed one."""
        return self._writer.scheduled

    @property
    def measurement(self) -> Measurement | None:
        """The measurement behind the last decision; None if it is not based on one."""
        return self.updater.state.measurement

    @property
    def _decides_by_measured(self) -> bool:
        return self.measurement is not None and self.measurement.largest_grad_norm > 0

    @property
    def head_name(self) -> str | None:
        """Name of the head or of the output layers; None before the first loss."""
        return self.found.hook.name if self.found else None

    @property
    def damping(self) -> float:
        """Factor of the noise damping, which is part of the built-in schedule; 1 without one."""
        damping = self.updater.state.damping
        return damping.factor if damping.fractions and self.schedule.description else 1.0

    def close(self) -> None:
        """Removes all hooks."""
        self._finder.close()
        self._writer.close()
        if self.updater.estimator is not None:
            self.updater.estimator.close()

    def begin_epoch(self) -> None:
        """Forgets batches of the last epoch that made no step."""
        self.losses.forget_batches()

    def on_short_epoch(self, loop: LoopFacts) -> None:
        """Reports that an epoch has skipped batches that the schedule counts on."""
        self.schedule.on_short_epoch(loop)

    def begin_backward(self) -> None:
        """Forgets the batches and losses since the last step if their gradients are not in the next one."""
        groups = self.optimizer.param_groups
        if self.losses.pending and all(p.grad is None for group in groups for p in group["params"]):
            self.discard_losses()

    def discard_losses(self) -> None:
        """Forgets the batches and losses since the last step."""
        self.losses.discard()
        self._finder.discard_gradients()

    def begin_batch(self, loop: LoopFacts) -> None:
        """Starts the measurement of a batch; discards a batch that made no loss."""
        self._writer.end_step()
        if self.updater.begin_run(loop):
            self._finder.forget_interval()
        self.losses.begin_batch()
        if not self.due:
            return
        if self._batch_open or not loop.automatic:
            self.hooks.discard()
        self._batch_open = self.options.running
        self._measure_forwards()
        if self.decision is None and not loop.automatic:
            self._versions = self._count_changes()

    def _measure_forwards(self) -> None:
        measured = self.options.running and self.updater.steps.due
        self.hooks.set_mode("training" if measured else "watching")
        self.measuring = True

    def _count_changes(self) -> int:
        """How often the weights have been changed in place."""
        return sum(parameter._version for parameter in self._target.parameters)

    def is_new(self, kind: str) -> bool:
        """Whether a loss whose graph begins with these nodes is to be measured, in a step that need not be due."""
        self._is_unknown = self.updater.state.is_new_loss(kind)
        return self.due or self._is_unknown

    def pass_over_loss(self, loss: Tensor, loop: LoopFacts) -> None:
        """A loss comes of a kind that was measured before, in a step that is not due."""
        self.losses.add(loss, loop)
        self._finder.forget_inputs()

    def on_loss(self, graph: LossGraph, loop: LoopFacts) -> None:
        """Ends the measurement of a batch by its loss, before the backward; the first one shows the head."""
        # With several optimizers, the last loss before the first step is the one that the step uses.
        if self._meter is None or (self.decision is None and not self._target.is_only):
            found = self._finder.find(graph, loop)
            if found is not None:
                self._meter = self._measure_by(found, graph, loop)
        if self._meter is not None and (self.updater.steps.due or self._is_unknown):
            self._batch_open = False
            if self._finder.compare(graph, self._meter.measure(graph, loop)):
                self._measure_from_now(loop)
                self._meter.measure(graph, loop)
        if self.updater.steps.due or self._is_unknown:
            self._finder.check(graph, loop)
        # A backward may run forwards again (activation checkpointing); in manual optimization more may follow.
        if loop.automatic:
            self.hooks.set_mode("off")

    def _measure_by(self, found: FoundHeads, graph: LossGraph | None, loop: LoopFacts) -> Meter:
        """Measures by a head and a loss that were found, in the graph if there is one, from now on."""
        if self.found is None:
            self.updater.reporter.check_lr_of_head(found.hook, self._writer.references)
        self.found = found
        self.updater.statistics.measure_head(found, loop.device)
        return self._finder.meter(found, self.updater, graph, loop)

    def on_other_optimizer_step(self) -> None:
        """Another optimizer is about to step."""
        self._finder.on_other_optimizer_step()
        if self.updater.estimator is not None:
            self.updater.estimator.logit_grads.on_other_optimizer_step()

    def on_step(self, loop: LoopFacts) -> bool:
        """Updates the rate if an update is due, and writes it before the parameters move; returns whether to log it.

        Until a gradient gives a rate, the rate is 0.
        """
        # A single process on the CPU can check at once: there is no device to wait for.
        if self.options.on_nonfinite == "raise" and loop.world_size == 1 and loop.device.type == "cpu":
            self.updater.check_losses(loop)
        if self.found is None:
            # No loss has come: the batch was skipped, or manual optimization calls backward itself.
            if loop.automatic:
                return False
            self._meter = self._measure_by(self._finder.find_named(), None, loop)
        assert self.found is not None
        if self._finder.differs:
            self._measure_from_now(loop)
        due, batches = self.due, self.losses.end_step(loop)
        # In the first step, that of a resumed run too, the ranks compare what they found: all of them, due or not.
        if due or self._finder.watching or self.decision is None:
            self._end_measurement(self.found, loop, batches)
        before = self.updater.state.decision
        if before is None or self.decision is None:
            averages = self.updater.info.averages_weights
            self.updater.statistics.decays = averages or self._writer.scheduled or self.schedule.decays(loop)
        decision = self.updater.begin_step(self.found, loop, batches, lambda: self._writer.ratios)
        if due:
            self._follow_ranks(loop)
        factor = self.schedule.factor(loop) * self.damping
        rate = decision.lr * factor if decision else 0.0
        self.rates = self._writer.write(None if self.options.dry_run else rate)
        if self.options.dry_run:
            self.rates = self._writer.rates(rate)
        if decision is not None and (self.decision is None or before is None):
            self.updater.reporter.announce(self.found, decision, self.policy.bound)
        self.updater.reporter.check_overwritten(self._writer.overwritten)
        self.decision = decision or Decision(self.rates[0])
        if not loop.automatic and not self.measuring and self.due:  # the batch may make more steps
            self._measure_forwards()
        return self.updater.state.steps == 1 or before is None

    def _end_measurement(self, found: FoundHeads, loop: LoopFacts, batches: int) -> None:
        """Ends the measurement of a step that is about to be made, of so many batches."""
        now = self._finder.begin_step(found, loop, batches, due=self.due, first_step=self.decision is None)
        if now is not found:
            self._meter = self._measure_by(now, None, loop)
        if self.decision is None:
            if now.measured and self.measurement is not None and not self._measured_by_all:
                self.updater.restart()  # the run that is resumed had another loss
            self._measured_by_all = now.measured
        if not loop.automatic and self._batch_open:
            now.hook.statistic.finish()  # of a batch that made a step without a loss
            self._batch_open = False

    def measures_batch(self, loop: LoopFacts) -> bool:
        """Whether there is more to do at the end of a batch than to count it; ``loop`` is at the batch's beginning."""
        by_epoch = loop.automatic and self.options.update == "epoch"
        return not by_epoch or self.measuring or loop.epoch > self.updater.state.epoch

    def end_batch(self, loop: LoopFacts) -> None:
        """Ends the interval with its last step."""
        if self.measuring:
            self.hooks.set_mode("off")
            self.measuring = False
        if self.decision is None and not loop.automatic and self._versions != self._count_changes():
            raise ConfigurationError(
                f"LipschitzLR sets the learning rate when step() of the optimizer{self._target.label} is called, and "
                "found that the weights changed without this call; change them in step() of the optimizer, or of an "
                "inner optimizer that is its attribute and has the same param_groups"
            )
        if self.found is None or not self.options.running:
            return
        if self.updater.end_step(self.found, loop):
            self._finder.reset()
        self._follow_ranks(loop)

    def _measure_from_now(self, loop: LoopFacts) -> None:
        """Measures the constant from now on, since a loss was not recognised."""
        found = self._finder.measure_from_now()
        if self.found is not None:  # until all ranks know, they decide by the loss that was recognised
            found = replace(found, loss=self.found.loss, num_outputs=self.found.num_outputs)
        self._meter = self._measure_by(found, None, loop)
        if loop.world_size == 1 and self.decision is not None:
            self._begin_again(loop)

    def _follow_ranks(self, loop: LoopFacts) -> None:
        """Measures the constant from now on if a rank does or a bound was none, which all ranks know alike."""
        measured, decision = self.measurement, self.updater.state.decision
        exceeded = decision is not None and decision.exceeded
        if not self._measured_by_all and (exceeded or (measured is not None and measured.largest_grad_norm)):
            if self._finder.may_measure:
                self._measure_from_now(loop)
            self._begin_again(loop)

    def _begin_again(self, loop: LoopFacts) -> None:
        """Estimates from the next step on what was estimated of a recognised loss."""
        loop.notify(
            f"LipschitzLR{self._target.label}: the loss is not the one that was recognised, or its gradient exceeds "
            f"the bound; from step {loop.step + 1} on its constant is measured, an estimate and not a bound"
        )
        self._measured_by_all = True
        self.updater.restart()

    def metrics(self) -> dict[str, float]:
        """Metrics of the last step, for loggers; empty before the first one."""
        return metrics_of(self)

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values; see :class:`~lit_lipschitz.control.state.ControllerState`."""
        return self.updater.state_dict(self._writer.references, self._writer.written, self._finder.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads the state of :meth:`state_dict`, which some loops restore after training has begun."""
        self.updater.restore(state)
        self._writer.restore(self.updater.state.references, self.updater.state.written)
        self._measured_by_all = self._decides_by_measured
        if self.updater.state.head is not None:
            self._finder.load_state_dict(self.updater.state.head)
