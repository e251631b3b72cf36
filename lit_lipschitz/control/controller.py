"""Controls the rate of one optimizer: measure, reduce, decide, write."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lit_lipschitz.bounds.loss_spec import Loss
from lit_lipschitz.control.builtin_schedule import OwnSchedule
from lit_lipschitz.control.head_finder import HeadAndLoss
from lit_lipschitz.control.noise_damping import Progress, Residuals
from lit_lipschitz.control.options import Options
from lit_lipschitz.control.policy import Decision, Measurement, Policy
from lit_lipschitz.errors import ConfigurationError, LitLipschitzError
from lit_lipschitz.measurement import norms
from lit_lipschitz.measurement.head_hooks import Probes
from lit_lipschitz.measurement.nonfinite import LossWatch, describe
from lit_lipschitz.measurement.optimizer_updates import optimizer_info
from lit_lipschitz.measurement.step_scale import StepScaleEstimator
from lit_lipschitz.optim.lr_writer import RateWriter


class Controller:
    """Decides the rate of one optimizer, and writes it.

    Args:
        policy: How a rate follows from a measurement.
        options: The other arguments of the callback.
        trainer: A trainer that begins to fit.
        module: Its module.
        position: The place of the optimizer, neither stepped nor restored, among the trainer's.
        state: :meth:`state_dict` of the run that is resumed, or nothing.
        several: Whether other optimizers are controlled as well.

    Raises:
        ConfigurationError: The module or the optimizer is not what can be controlled.
    """

    def __init__(
        self,
        policy: Policy,
        options: Options,
        trainer: Trainer,
        module: LightningModule,
        position: int,
        state: Mapping[str, Any],
        several: bool = False,
    ) -> None:
        optimizer = trainer.optimizers[position]
        self.policy, self.options, self.optimizer = policy, options, optimizer
        self._info = optimizer_info(optimizer)
        self._rule = rule = policy.rule_for(self._info, optimizer.param_groups)
        logit_grads = rule.needs_logit_grads and policy.bound == "strict"
        self._step_scale: StepScaleEstimator | None = None
        if rule.step_scale is not None:
            self._step_scale = StepScaleEstimator(optimizer, module, rule.step_scale, logit_grads)
        # A GradScaler begins with a scale that may be too large, and skips the steps that show it.
        self._may_overflow = getattr(trainer.precision_plugin, "scaler", None) is not None
        self._rule_state = rule.initial_state(options.initial_lr)
        self._decision: Decision | None = None
        self._measured: Measurement | None = None  # behind the decision
        self._applied: tuple[Decision, list[float]] | None = None  # behind the last step, with the groups' rates
        self._steps = 0  # optimizer steps since the interval began
        self._intervals = 0  # intervals that are over
        self._epoch = 0  # in which the interval began
        self._passed = -1  # the last epoch whose pass, or whose rate set by hand, an optimizer step has used
        self._pass: tuple[int, Tensor] | None = None  # the epoch of a pass that no step has used yet, and W then
        self._micro_batches = 0  # batches since the last optimizer step
        self._accumulated = 1  # most batches that made one step in this interval
        self._warned = False
        self._whose = f" of optimizer {position}" if several else ""
        self._progress = Progress()  # of a squared error
        self._epochs = 0  # that are in it
        self._residuals = Residuals()  # of all ranks, as they last knew
        device = trainer.strategy.root_device
        self.watch = LossWatch(trainer.global_rank, trainer.world_size, trainer.global_step, device)
        self._take(state)

        schedulers = [c.scheduler for c in trainer.lr_scheduler_configs if c.scheduler.optimizer is optimizer]
        callbacks: Sequence[Any] = trainer.callbacks  # type: ignore[attr-defined]
        keep = any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks)
        self.writer = RateWriter(optimizer, schedulers, state.get("references", ()), keep_nominal=keep)
        self.found = HeadAndLoss(policy, options, trainer, module, position, state.get("measured"))
        self._take_residuals(state)
        wanted = options.schedule == "auto" and policy.bound != "paper"
        if wanted and keep and not schedulers:
            rank_zero_info(
                "LipschitzLR: StochasticWeightAveraging brings rates of its own, so there is no warm-up and no decay "
                "but for these; bring a scheduler to have one before (schedule='none' says that none is wanted)"
            )
        self._schedule = OwnSchedule(optimizer, wanted and not self.writer.scheduled)

    @property
    def probes(self) -> Probes:
        """The probes of what is or can be the head."""
        return self.found.probes

    @property
    def decision(self) -> Decision | None:
        """The decision behind the last optimizer step; None before the first one."""
        return self._applied[0] if self._applied else None

    @property
    def rates(self) -> list[float]:
        """The parameter groups' rates in the last optimizer step; empty before the first one."""
        return self._applied[1] if self._applied else []

    @property
    def head_name(self) -> str | None:
        """The name of the head, once the first step has told which module it is."""
        return self.found.chosen.name if self.found.chosen else None

    @property
    def head(self) -> nn.Module | None:
        """The head, once the first step has told which module it is."""
        return self.found.chosen.head if self.found.chosen else None

    @property
    def loss(self) -> Loss | None:
        """The loss, once the first step has told which one it is."""
        return self.found.loss

    @property
    def measurement(self) -> Measurement | None:
        """What the last decision was made of; None where none was made of a measurement."""
        return self._measured

    @property
    def num_scale_invariant(self) -> int | None:
        """Number of weights detected as scale-invariant; None where the rule needs no step scale."""
        return self._step_scale.num_scale_invariant if self._step_scale is not None else None

    @property
    def accumulated(self) -> int:
        """Most batches that made one step in the interval that goes on, as far as is known."""
        return self._accumulated

    @property
    def schedule(self) -> str | None:
        """What the callback's own schedule is made of, if there is one; known from the first step on."""
        return self._schedule.parts

    @property
    def unexplained(self) -> float | None:
        """The share of its targets' variance that a squared error left unexplained in the last epoch, if it is one."""
        return self._progress.unexplained

    @property
    def restraint(self) -> float:
        """What the callback's own schedule multiplies the rate by for that; 1 where there is none of either."""
        return self._progress.factor if self._schedule.parts else 1.0

    def close(self) -> None:
        """Takes all hooks off."""
        self.probes.remove()
        self.writer.close()

    # -- measure, reduce, decide, write ------------------------------------------------------------------------------

    def begin_epoch(self) -> None:
        """Forgets batches that an epoch left without a step."""
        self._micro_batches = 0

    def needs_pass(self, epoch: int) -> bool:
        """Whether an epoch's pass is to be made: a checkpoint may have interrupted the epoch since."""
        made = self._pass is not None and self._pass[0] == epoch
        by_hand = self._passed < 0 and self.options.initial_lr is not None
        return not (made or by_hand or self._passed == epoch)

    def end_pass(self, epoch: int, module: LightningModule) -> None:
        """Keeps what goes with a pass that was made."""
        self._pass = epoch, norms.weight_norm(self.optimizer, module, self.options.weights)

    def begin_batch(self, module: LightningModule) -> None:
        """Counts the batches that make one optimizer step, and drops what has made no loss."""
        self._micro_batches += 1
        self.found.begin_batch(module.automatic_optimization)

    def take_loss(self, trainer: Trainer, loss: Tensor) -> None:
        """Ends the measurement of a batch with the loss that it has made; the first time, finds out what loss it is."""
        estimator = self._step_scale
        estimator = estimator if estimator and estimator.needs_logit_grads and estimator.due else None
        before = self.found.chosen
        self.found.take(trainer, loss, first=self._applied is None, step_scale=estimator)
        if before is None:
            self._look_at_ratio()

    def _look_at_ratio(self) -> None:
        """Says so where the head's steps are longer than the rate, which is the first parameter group's."""
        chosen = self.found.chosen
        if chosen is None:
            return
        groups = self.optimizer.param_groups
        own = [i for i, group in enumerate(groups) if any(p is chosen.weight for p in group["params"])]
        ratio = self.writer.references[own[0]] / self.writer.reference if own else 1.0
        if ratio > 1:
            rank_zero_warn(
                f"LipschitzLR: the head {chosen.name!r} is in parameter group {own[0]}, whose configured rate is "
                f"{ratio:g} times that of the first group, which has the computed rate: the head has {ratio:g} times "
                "it. Put its group first in the optimizer to have the others follow by their ratios to it"
            )

    def step(self, trainer: Trainer, module: LightningModule) -> bool:
        """Decides where an update is due, and writes the rate before the parameters move.

        Returns:
            Whether there is something new to log.
        """
        by_hand = not module.automatic_optimization
        if self.found.chosen is None:
            # No on_before_backward has come. The batch was skipped, or manual optimization has a backward of its own.
            if not by_hand:
                return False
            self.found.take_named()
            self._look_at_ratio()
        self.found.raise_if_refused(first=self._applied is None)
        if by_hand:
            self.found.close_batch()
        self._steps += 1
        if self._steps == 1:
            self._epoch = trainer.current_epoch
        accumulated = max(1, self._micro_batches) if by_hand else trainer.accumulate_grad_batches
        running = self.options.running
        self._accumulated = max(self._accumulated, accumulated) if running else accumulated
        self._micro_batches = 0
        first = self._intervals == 0
        before = self._decision
        read = self._read_step(trainer)
        if self._pass is not None:
            self._decide(trainer, interval_over=True, read=read)
            self._pass = None
        elif first and self.options.initial_lr is not None and self._measured is None:
            self._decision = self._decision or Decision(self.options.initial_lr)
        elif running and (self._decision is None or (first and self._steps & (self._steps - 1) == 0)):
            self._decide(trainer, interval_over=False, read=read)
        elif read and self._measured is not None:
            self._settle(replace(self._measured, **self._seen()), keep=True)
        self._passed = trainer.current_epoch
        factor = self._schedule.factor(trainer, module) * self.restraint
        rate = self._decision.lr * factor if self._decision else None
        rates = self.writer.write(None if self.options.dry_run else rate)
        if self.options.dry_run and rate is not None:
            rates = self.writer.rates(rate)
        self._applied = (self._decision or Decision(rates[0]), rates)
        return self._steps == 1 or self._decision is not before

    def pass_turn(self) -> None:
        """Another optimizer is about to step."""
        self.found.pass_turn()
        if self._step_scale is not None:
            self._step_scale.on_other_optimizer_step()

    def _read_step(self, trainer: Trainer) -> bool:
        """Reads the step, where the rule asks for it and it is due; one reduction."""
        if self._step_scale is None:
            return False
        due = self._step_scale.begin_step()
        if self._step_scale.restarted:
            self._rule_state = self._rule.initial_state()
        if not due:
            return False
        scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        scaled = scaler is not None and getattr(self.optimizer, "_step_supports_amp_scaling", False)
        grad_scale = scaler.get_scale() if scaled else 1.0
        packed = self._step_scale.pack(grad_scale, self.writer.ratios, trainer.global_rank, trainer.world_size)
        reduced: Any = trainer.strategy.reduce(packed.to(trainer.strategy.root_device), reduce_op="max")
        self._step_scale.unpack(reduced)
        return True

    def end_batch(self, trainer: Trainer, module: LightningModule, batch_idx: int) -> None:
        """Ends the interval with its last step, so that an epoch's checkpoint holds values that all ranks share."""
        if self._applied is None and self.writer.steps and not module.automatic_optimization:
            raise ConfigurationError(
                "LipschitzLR writes the rate when Lightning's optimizer steps, and a step went past it; call "
                "self.optimizers().step(), not the step of the optimizer inside"
            )
        if self.found.chosen is None or not self.options.running:
            return
        update = self.options.update
        over = self._steps >= int(update) if update != "epoch" else self._epoch_over(trainer)
        if over and self._steps:
            self._decide(trainer, interval_over=True)
            self.found.chosen.statistic.reset()
            self.found.residuals.end_interval()
            if self._epoch_over(trainer):
                self._end_epoch(trainer)
            self._steps = 0
            self._accumulated = 1
            self._intervals += 1
        elif trainer.world_size > 1 and _may_be_saved(trainer, batch_idx):
            self._reduce(trainer)

    def _end_epoch(self, trainer: Trainer) -> None:
        """Looks at what a squared error explains, after an epoch or an interval that is longer."""
        before, self._epochs = self._epochs, trainer.current_epoch + trainer.is_last_batch
        if self.found.residuals.width:
            trained = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
            parameters = sum(parameter.numel() for parameter in trained)
            epochs = max(1, self._epochs - before)
            self._progress.add(self._residuals, trainer.global_step, parameters, epochs)
            self.found.residuals.end_epoch()

    def share(self, trainer: Trainer) -> None:
        """Has all ranks hold the same running maximum, for a checkpoint between two updates."""
        if trainer.world_size > 1 and self.found.chosen is not None and self.options.running:
            self._reduce(trainer)

    def _epoch_over(self, trainer: Trainer) -> bool:
        # Where the last batch can't be known or the rest of an epoch is skipped, the next epoch's first step ends it.
        return trainer.is_last_batch or trainer.current_epoch > self._epoch

    def _decide(self, trainer: Trainer, interval_over: bool, read: bool = False) -> None:
        """One reduction, then a decision that every rank makes alike."""
        assert self.found.chosen is not None
        measured = self._measurement(trainer, self._reduce(trainer), interval_over)
        if not self.options.running and not measured.batch_size and not measured.dropped:
            raise ConfigurationError(
                f"LipschitzLR(measure='pass') called {type(trainer.lightning_module).__name__} with the inputs of "
                f"the training batches, and the head {self.found.chosen.name!r} did not run; let forward() go "
                "through the head, or use measure='running'"
            )
        if self.check_losses(trainer) and self._decision is not None:
            return
        self._settle(measured, keep=interval_over if self._step_scale is None else read)

    def _settle(self, measured: Measurement, keep: bool) -> None:
        """Decides, and lets the rule remember it or not."""
        assert self.found.loss is not None
        outcome = self.policy.decide(
            measured,
            loss=self.found.loss,
            num_outputs=self.found.outputs,
            optimizer=self._info,
            groups=self.optimizer.param_groups,
            state=self._rule_state,
            last=self._decision,
        )
        self._report(measured, usable=outcome is not None)
        if self._step_scale is not None and (not keep if outcome is not None else not measured.step_scale):
            self._measured = measured  # for the next measured step, with which the rate changes
            return
        if outcome is None:
            return
        decision, rule_state = outcome
        if decision.cap and (self._decision is None or self._decision.cap != decision.cap):
            rank_zero_info(f"LipschitzLR: {decision.cap} binds, the rate is {decision.lr:.4g}")
        self._decision, self._measured = decision, measured
        if keep:
            self._rule_state = rule_state

    def _reduce(self, trainer: Trainer) -> Tensor:
        """The one collective of an update: MAX over ranks of the statistic's values and W, which all ranks keep.

        Where power iteration goes on from a vector, it is rank 0's from here on.
        """
        assert self.found.chosen is not None
        statistic = self.found.chosen.statistic
        if self._pass is not None:
            _, weights = self._pass
        else:
            weights = norms.weight_norm(self.optimizer, trainer.lightning_module, self.options.weights)
        weights = weights.to(statistic.values.device).reshape(1)
        # A NaN's fate in a MAX depends on the order of the ranks; -1 stands for it until all agree.
        weights = torch.where(torch.isfinite(weights), weights, -1.0)
        values = statistic.values.clone()
        values[0] *= self.found.factor
        values[3] *= self.found.factor**2
        direction = statistic.direction
        if trainer.global_rank > 0:
            direction = torch.full_like(direction, -math.inf)
        slots = self.watch.slots()
        residuals = self.found.residuals.slots(trainer.global_rank, trainer.world_size)
        together = torch.cat([weights, values, direction, residuals, slots])
        reduced = trainer.strategy.reduce(together, reduce_op="max")
        assert isinstance(reduced, Tensor)
        reduced, agreed = reduced[: -len(slots)], reduced[-len(slots) :]
        self.watch.take(agreed)
        size = len(statistic.values)
        shared = reduced[1 : 1 + size]
        for i in (0, 1, 3, 4):  # how many batches were left out stays each rank's own
            statistic.values[i].copy_(shared[i])
        size += 1
        statistic.direction.copy_(reduced[size : size + len(direction)])
        return torch.cat([reduced[:size], self.found.residuals.share(reduced[size + len(direction) :])])

    def _measurement(self, trainer: Trainer, reduced: Tensor, interval_over: bool) -> Measurement:
        """What the ranks agree on, read to the host; a residual of whole intervals alone, as it falls in the first."""
        assert self.found.chosen is not None
        weight_norm, largest, count, dropped, squares, outputs, *residuals = reduced.tolist()
        self._residuals = Residuals(*residuals)
        if not interval_over:
            self._progress.begin(self._residuals, trainer.global_step)
        pieces = trainer.world_size * self._accumulated
        batch_size = int(count) * pieces
        if self.found.chosen.statistic.mean:
            largest *= math.sqrt(batch_size)
            outputs *= math.sqrt(batch_size)
        elif self.policy.norm_grows_with_batch:
            largest *= math.sqrt(pieces)
            outputs *= math.sqrt(pieces)
        return Measurement(
            activation_norm=largest,
            weight_norm=weight_norm if weight_norm >= 0 else math.nan,
            batch_size=batch_size,
            dropped=int(dropped),
            fourth_moment_norm=squares * math.sqrt(pieces),
            output_norm=outputs,
            residual_rms=self._residuals.root_mean_square if interval_over else 0.0,
            loss_factor=self._residuals.factor,
            **self._seen(),
        )

    def _seen(self) -> dict[str, Any]:
        """What a measurement has of the steps that were read."""
        if self._step_scale is None:
            return {}
        scale = self._step_scale.scale
        return {
            "step_scale": scale.value,
            "logit_grad_norm": scale.logit_grad_norm,
            "mean_logit_grad_norm": scale.mean_logit_grad_norm,
        }

    def check_losses(self, trainer: Trainer) -> bool:
        """Says once, or raises, that a loss was not finite; returns whether one was since the last look."""
        found = self.watch.read()
        self.watch.reset(trainer.global_step)
        if found is None:
            return False
        message = describe(*found, self._decision.lr if self._decision else None, self._whose)
        if self.options.on_nonfinite == "raise":
            raise LitLipschitzError(f"LipschitzLR: {message} (on_nonfinite='keep' would go on)")
        if not self.watch.reported:
            rank_zero_warn(f"LipschitzLR: {message}{', which is kept' if self._decision else ''}")
            self.watch.reported = True
        return True

    def _report(self, measured: Measurement, usable: bool) -> None:
        """Says once, or raises, what was not finite."""
        if usable and not measured.dropped:
            return
        if not measured.step_scale and self._may_overflow:
            return
        message = f"{measured.dropped} batches had non-finite activations and were left out of the maximum"
        if not usable:
            last = "the configured rate" if self._decision is None else f"the last rate, {self._decision.lr:.4g}"
            message = (
                f"no constant can be computed from activations of size {measured.activation_norm:g}, weights of size "
                f"{measured.weight_norm:g} and {measured.dropped} batches with non-finite activations; keeping {last}"
            )
            if not measured.step_scale:
                message = f"no gradient that is finite and not 0 has been seen; keeping {last}"
        if self.options.on_nonfinite == "raise":
            raise LitLipschitzError(f"LipschitzLR: {message} (on_nonfinite='keep' would go on)")
        if not self._warned:
            rank_zero_warn(f"LipschitzLR: {message}")
            self._warned = True

    # -- log and checkpoint ------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """What is logged of the last step; empty before the first one."""
        if self._applied is None:
            return {}
        decision, rates = self._applied
        metrics = {
            "lr": rates[0],
            "constant": decision.constant,
            "activation_norm": decision.activation_norm,
            "weight_norm": decision.weight_norm,
        }
        if self._step_scale is not None:
            metrics["step_scale"] = self._step_scale.scale.value
        if decision.observed_constant or (self._step_scale is not None and self._step_scale.needs_logit_grads):
            metrics["observed_constant"] = decision.observed_constant
        if self.found.residuals.width:
            metrics["restraint"] = self.restraint
        if self.policy.has_limits:
            metrics["capped"] = float(bool(decision.cap))
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """The state, as tensors and plain values."""
        return {
            "decision": self._decision.state_dict() if self._decision else None,
            "measurement": asdict(self._measured) if self._measured else None,
            "rule_state": self._rule_state._asdict(),
            "rule": self._rule.name,
            "step_scale": self._step_scale.state_dict() if self._step_scale else None,
            "steps": self._steps,
            "intervals": self._intervals,
            "epoch": self._epoch,
            "passed": self._passed,
            "accumulated": self._accumulated,
            "warned": self._warned,
            "losses": self.watch.state_dict(),
            "progress": self._progress.state_dict(),
            "epochs": self._epochs,
            "residuals": self.found.residuals.state_dict(),
            "measured": self.probes.state_dict(),
            "references": self.writer.references,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the state of :meth:`state_dict`, as some strategies bring it after the fit has begun."""
        self._take(state)
        if state.get("measured") is not None:
            self.probes.load_state_dict(state["measured"])
        self._take_residuals(state)

    def _take(self, state: Mapping[str, Any]) -> None:
        if not state:
            return
        if state["rule"] != self._rule.name:
            raise LitLipschitzError(
                f"LipschitzLR's state in the checkpoint was saved with the rule {state['rule']!r}, and this run's "
                f"{self._info.name} has the rule {self._rule.name!r}; resume with the optimizer that it was saved "
                "with, or pass restore=False to measure again"
            )
        self._decision = Decision.from_state_dict(state["decision"]) if state["decision"] else None
        self._measured = Measurement(**state["measurement"]) if state["measurement"] else None
        self._rule_state = self._rule.restored_state(state["rule_state"])
        if self._step_scale is not None:
            self._step_scale.load_state_dict(state["step_scale"])
        self._steps = state["steps"]
        self._intervals = state["intervals"]
        self._epoch = state["epoch"]
        self._passed = state["passed"]
        self._accumulated = state["accumulated"]
        self._warned = state["warned"]
        if state.get("losses"):  # later than the rest of the state
            self.watch.load_state_dict(state["losses"])

    def _take_residuals(self, state: Mapping[str, Any]) -> None:
        if "plenty" in state.get("progress", ()):  # later than the rest of the state
            self._progress.load_state_dict(state["progress"])
            self._epochs = state["epochs"]
            self.found.residuals.load_state_dict(state["residuals"])


def _may_be_saved(trainer: Trainer, batch_idx: int) -> bool:
    """Whether a checkpoint may be saved after this batch, as all ranks know alike.

    That is every so many steps, with a validation that follows, and at the epoch's end.
    """
    step = trainer.global_step
    intervals: Sequence[int] = [getattr(c, "_every_n_train_steps", 0) or 0 for c in trainer.checkpoint_callbacks]
    due = trainer.is_last_batch or any(every > 0 and step % every == 0 for every in intervals)
    validation = getattr(trainer, "val_check_batch", math.inf)
    return due or (validation != math.inf and validation > 0 and (batch_idx + 1) % validation == 0)
