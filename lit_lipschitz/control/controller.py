"""Controls the learning rate of one optimizer: measure, reduce over the ranks, decide, write."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from lit_lipschitz.control import diagnostics
from lit_lipschitz.control.batch_meter import BatchMeter
from lit_lipschitz.control.builtin_schedule import BuiltinSchedule
from lit_lipschitz.control.head_finder import FoundHeads, HeadFinder
from lit_lipschitz.control.loop_facts import LoopFacts
from lit_lipschitz.control.options import Options, Target
from lit_lipschitz.control.policy import Decision, Measurement, Policy
from lit_lipschitz.control.rate_updater import RateUpdater
from lit_lipschitz.control.reduction import Reduce
from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.measurement.head_hooks import HeadHooks
from lit_lipschitz.measurement.residuals import RunningResiduals
from lit_lipschitz.optim.lr_writer import LRWriter
from lit_lipschitz.recognition.loss_graph import LossGraph


class Controller:
    """Measures what enters the head, updates the learning rate of one optimizer, and writes it.

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
        updater: Updates the rate.
        found: The head and the loss; None before the first loss.

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
        self._target = target
        self.updater = RateUpdater(policy, options, target, loop, reduce=reduce, notify=notify, state=state)
        saved = self.updater.state
        self._writer = LRWriter(
            self.optimizer, target.schedulers, saved.references, keep_scheduled=bool(loop.lr_writer)
        )
        self._finder = HeadFinder(policy, options, target, loop.device, saved.head)
        self._schedule = self._make_schedule(loop, notify)
        self.found: FoundHeads | None = None
        self._meter: BatchMeter | None = None
        self._applied: tuple[Decision, list[float]] | None = None  # of the last step, with the groups' learning rates
        self._batch_open = False  # whether a batch has begun that has made no loss yet
        self._micro_batches = 0  # batches since the last optimizer step

    def _make_schedule(self, loop: LoopFacts, notify: Callable[[str], None]) -> BuiltinSchedule:
        """The built-in schedule, unless something else changes the learning rate."""
        wanted = self.options.schedule == "auto" and self.policy.bound != "paper"
        if wanted and loop.lr_writer and not self._target.schedulers:
            notify(
                f"LipschitzLR: {loop.lr_writer} changes the learning rate itself, so the built-in warm-up and decay "
                "are off; add a scheduler for the epochs before it, or pass schedule='none' to hide this message"
            )
        return BuiltinSchedule(
            enabled=wanted and not self._writer.scheduled,
            averages_weights=self.updater.info.averages_weights,
            has_warmup=any(group.get("warmup_steps") for group in self.optimizer.param_groups),
            notify=notify,
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
        return self.updater.state.measurement

    @property
    def schedule(self) -> str | None:
        """Description of the built-in schedule, if it is used; known from the first step on."""
        return self._schedule.description

    @property
    def fraction_unexplained(self) -> float | None:
        """Fraction of variance that a squared error left unexplained in the last epoch; None for other losses."""
        return self.updater.damping.fraction_unexplained

    @property
    def damping(self) -> float:
        """Factor of the noise damping, which is part of the built-in schedule; 1 without one."""
        return self.updater.damping.factor if self._schedule.description else 1.0

    def close(self) -> None:
        """Removes all hooks."""
        self.hooks.remove()
        self._writer.close()

    def begin_epoch(self) -> None:
        """Forgets batches of the last epoch that made no step."""
        self._micro_batches = 0

    def begin_batch(self, loop: LoopFacts) -> None:
        """Starts the measurement of a batch; discards a batch that made no loss."""
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
                self._meter = self._measure_by(found, loop)
                if not self.options.running:
                    self.updater.statistics.pass_factor = self._meter.pass_factor(graph, loop)
        if self._meter is not None:
            self._measure(self._meter, graph, loop)
        # A backward may run forwards again (activation checkpointing); in manual optimization more may follow.
        if loop.automatic:
            self.hooks.set_mode("off")

    def observe_loss(self, loss: Tensor, loop: LoopFacts) -> None:
        """Records whether a loss of the head is finite; shape ()."""
        self.updater.statistics.nonfinite.update(loss, loop.step)

    def _measure_by(self, found: FoundHeads, loop: LoopFacts) -> BatchMeter:
        """Measures by a head and a loss that were found from now on."""
        statistics = self.updater.statistics
        width = found.num_outputs if found.loss.name == "mean_squared_error" else 0
        if width != statistics.residuals.width:  # a checkpoint may have restored them
            statistics.residuals = RunningResiduals(width, loop.device)
        warning = diagnostics.lr_ratio_warning(found.hook, self.optimizer, self._writer.references)
        if self.found is None and warning is not None:
            self.updater.reporter.warn(warning)
        self.found, statistics.activations = found, found.hook.statistic
        return BatchMeter(
            found,
            self.policy,
            statistics.residuals,
            only_optimizer=self._target.is_only,
            named_loss=self.options.loss_name is not None,
        )

    def _measure(self, meter: BatchMeter, graph: LossGraph, loop: LoopFacts) -> None:
        """Measures a batch by its loss."""
        estimator = self.updater.estimator
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
        if self.updater.estimator is not None:
            self.updater.estimator.logit_grads.on_other_optimizer_step()

    def on_step(self, loop: LoopFacts) -> bool:
        """Updates the rate if an update is due, and writes it before the optimizer steps.

        Returns:
            Whether there is something new to log.
        """
        if self.found is None:
            # No loss has come: the batch was skipped, or manual optimization calls backward itself.
            if loop.automatic:
                return False
            self._meter = self._measure_by(self._finder.find_named(), loop)
        assert self.found is not None
        self._finder.raise_deferred_error(first_step=self._applied is None)
        if not loop.automatic and self._batch_open:
            self.found.hook.statistic.finish()  # of a batch that made a step without a loss
            self._batch_open = False
        before = self.updater.state.decision
        self.updater.count_step(loop.accumulated if loop.automatic else max(1, self._micro_batches), loop.epoch)
        self._micro_batches = 0
        decision = self.updater.update(self.found, loop, lambda: self._writer.ratios)
        factor = self._schedule.factor(loop) * self.damping
        rate = decision.lr * factor if decision else None
        rates = self._writer.write(None if self.options.dry_run else rate)
        if self.options.dry_run and rate is not None:
            rates = self._writer.rates(rate)
        self._applied = (decision or Decision(rates[0]), rates)
        return self.updater.state.steps == 1 or decision is not before

    def end_batch(self, loop: LoopFacts, may_be_saved: bool) -> None:
        """Ends the interval with its last step.

        Args:
            loop: The loop's state.
            may_be_saved: Whether a checkpoint may be saved after the batch, which all ranks know alike.
        """
        self.hooks.set_mode("off")
        if self._applied is None and self._writer.steps and not loop.automatic:
            raise ConfigurationError(
                "LipschitzLR writes the learning rate before a step of Lightning's optimizer, and found a step of the "
                "torch optimizer inside it; call self.optimizers().step(), not self.optimizers().optimizer.step()"
            )
        if self.found is None or not self.options.running:
            return
        if self.updater.interval_is_over(loop):
            self.updater.end_interval(self.found, loop)
        elif may_be_saved:
            self.share()

    def share(self) -> None:
        """Gives all ranks the same statistics, for a checkpoint between two updates; all ranks must call it."""
        if self.found is not None and self.options.running:
            self.updater.statistics.share()

    def metrics(self) -> dict[str, float]:
        """Metrics of the last step, for loggers; empty before the first one."""
        if self._applied is None:
            return {}
        estimator = self.updater.estimator
        return diagnostics.log_metrics(
            self._applied[0],
            self._applied[1][0],
            step_scale=estimator.scale.value if estimator else None,
            observes=estimator is not None and estimator.needs_logit_grads,
            damping=self.damping if self.updater.statistics.residuals.width else None,
            has_limits=self.policy.has_limits,
        )

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values; see :class:`~lit_lipschitz.control.state.ControllerState`."""
        state = self.updater.complete_state()
        return replace(state, references=self._writer.references, head=self.hooks.state_dict()).to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads the state of :meth:`state_dict`, which some strategies restore after the fit has begun."""
        self.updater.restore(state)
        if self.updater.state.head is not None:
            self.hooks.load_state_dict(self.updater.state.head)
