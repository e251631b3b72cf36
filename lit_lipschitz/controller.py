"""Controls the rate of one optimizer: measure, reduce, decide, write."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging, Timer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lit_lipschitz import directions, graph, inspection, rules
from lit_lipschitz.decision import Decision, Measurement, Policy
from lit_lipschitz.errors import ConfigurationError, LitLipschitzError
from lit_lipschitz.losses import Loss, LossName
from lit_lipschitz.makers import same_weight
from lit_lipschitz.probing import Probe, Probes
from lit_lipschitz.readings import StepReadings
from lit_lipschitz.schedules import linear_warmup, linear_warmup_decay
from lit_lipschitz.spikes import LossWatch, describe
from lit_lipschitz.statistics import RunningMaximum
from lit_lipschitz.writing import RateWriter


@dataclass(frozen=True)
class Options:
    """Arguments of ``LipschitzLR`` that are not part of the :class:`~lit_lipschitz.decision.Policy`."""

    loss: Literal["auto"] | LossName = "auto"
    head: str = "auto"
    update: Literal["epoch"] | int = "epoch"
    measure: Literal["running", "pass"] = "running"
    weights: inspection.Weights = "decayed"
    initial_lr: float | None = None
    on_nonfinite: Literal["keep", "raise"] = "keep"
    dry_run: bool = False
    schedule: Literal["auto", "none"] = "auto"


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
        self.policy, self.options, self.optimizer, self._position = policy, options, optimizer, position
        rule = policy.rule_for(type(optimizer).__name__, optimizer.param_groups)
        if rule in rules.SCALED and type(optimizer).__name__ not in directions.DIRECTIONS:
            raise ConfigurationError(
                f"LipschitzLR(rule={rule!r}) knows the steps of {', '.join(directions.DIRECTIONS)} and found "
                f"{type(optimizer).__name__}; use one of them, or pass another rule="
            )
        self._rule = rule
        sloped = rule in rules.SLOPED and policy.bound == "strict"
        scale = rules.SCALED.get(rule)
        self._readings = StepReadings(optimizer, scale(), sloped) if scale else None
        # A GradScaler begins with a scale that may be too large, and skips the steps that show it.
        self._may_overflow = getattr(trainer.precision_plugin, "scaler", None) is not None
        self._length: float | None = None  # optimizer steps that the run will have, for the schedule; inf without one
        self._alone = len(trainer.optimizers) == 1
        self._rule_state = rules.initial_state(policy.rule, options.initial_lr)
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
        self._open = False  # whether a batch has begun that has made no loss yet
        self._loss: Loss | None = None
        self._pooled = False  # whether the head's outputs are averaged over places before the loss
        self._factor = 1.0  # of the loss, where a pass does not see it
        self._outputs = 0  # of the head that the loss is taken of, or classes; 0 until they are known
        self._group = 1  # rows of the head that one target is chosen among
        self._head_weight: Tensor | None = None  # of the affine map that the loss was found to be taken of
        self._joined = False  # whether outputs of several calls were put together
        self._unclear = False  # whether the graph does not tell what comes between the head and the loss
        self._unknown: ConfigurationError | None = None  # why the last loss was not taken
        self._refused = False  # whether it was of the head, after another optimizer had stepped
        self._passed_turn = False  # whether another one has
        self._whose = f" of optimizer {position}" if several else ""
        device = trainer.strategy.root_device
        self.watch = LossWatch(trainer.global_rank, trainer.world_size, trainer.global_step, device)
        self._take(state)

        schedulers = [c.scheduler for c in trainer.lr_scheduler_configs if c.scheduler.optimizer is optimizer]
        callbacks: Sequence[Any] = trainer.callbacks  # type: ignore[attr-defined]
        keep = any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks)
        self.writer = RateWriter(optimizer, schedulers, state.get("references", ()), keep_nominal=keep)
        owned = {p for group in optimizer.param_groups for p in group["params"]}
        self.probes = Probes(
            module,
            options.head,
            lambda head: self._statistic(head, device),
            device,
            state.get("measured"),
            None if self._alone else owned,
        )

    def _statistic(self, head: nn.Module, device: torch.device) -> RunningMaximum:
        width, _ = inspection.head_size(head)
        if self.policy.norm == "spectral" and not width:
            raise ConfigurationError(
                "LipschitzLR(norm='spectral') needs the width of every affine map, and a lazy one has none yet; run a "
                "batch through the network before fit, or pass head="
            )
        rigorous = self.policy.bound != "paper"
        bias = rigorous and getattr(head, "bias", None) is not None
        mean, squares = rigorous and self._of_batch, self.policy.estimate == "scripts"
        return RunningMaximum(self.policy.norm, width, bias=bias, mean=mean, squares=squares, device=device)

    @property
    def _of_batch(self) -> bool:
        """Whether the norm is one of the whole batch matrix, which grows with the number of rows."""
        return self.policy.norm in ("frobenius", "spectral")

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
        return self.probes.chosen.name if self.probes.chosen else None

    @property
    def head(self) -> nn.Module | None:
        """The head, once the first step has told which module it is."""
        return self.probes.chosen.head if self.probes.chosen else None

    @property
    def loss(self) -> Loss | None:
        """The loss, once the first step has told which one it is."""
        return self._loss

    @property
    def measurement(self) -> Measurement | None:
        """What the last decision was made of; None where none was made of a measurement."""
        return self._measured

    @property
    def rule_state(self) -> rules.RuleState:
        """What the rule remembers of the updates so far."""
        return self._rule_state

    @property
    def accumulated(self) -> int:
        """Most batches that made one step in the interval that goes on, as far as is known."""
        return self._accumulated

    @property
    def schedule(self) -> str | None:
        """What the callback's own schedule is made of, if there is one; known from the first step on."""
        if self._length is None or self._length == math.inf:
            return None
        return "warm-up" if self._averages else "warm-up and decay"

    def close(self) -> None:
        """Takes all hooks off."""
        self.probes.remove()
        self.writer.close()

    # -- find head and loss, on the first step -----------------------------------------------------------------------

    def take_loss(self, trainer: Trainer, loss: Tensor) -> None:
        """Ends the measurement of a batch with the loss that it has made; the first time, finds out what loss it is."""
        automatic = trainer.lightning_module.automatic_optimization
        # Where several optimizers take turns, the last loss before the first step is the one that the step is made of.
        if self.probes.chosen is None or (self._applied is None and not self._alone):
            self._find(trainer, loss, automatic)
        chosen = self.probes.chosen
        if chosen is None or self._loss is None:
            return
        running = self.options.measure == "running"
        readings = self._readings if self._readings and self._readings.sloped and self._readings.due else None
        reading = self._read(loss) if running or readings else None
        if readings and reading is not None and (edges := self._own_edges(loss)):
            readings.watch(reading, edges, self._loss.reduction, self._by_example)
        if not running:
            return
        self._open = False
        if reading is None:
            chosen.statistic.finish()
            return
        outputs: tuple[Tensor, ...] = ()
        if self._loss.needs_outputs(self.policy.bound):
            outputs = tuple(inspection.output_rows(chosen.head, part, self._outputs) for part in reading.outputs)
        measured = chosen.statistic.rows
        count = reading.count
        weight: Any = self._weight(trainer, reading)
        if self._pooled:
            # Every place is a row; of the examples that are ignored all are.
            places = measured.clamp(min=1) * (reading.count / reading.rows)
            count = places if self.policy.bound == "paper" else places.clamp(max=reading.count)
            if self._of_batch:
                # The mean over an example's places is no longer than their root mean square.
                weight = weight * (count / places).sqrt()
        if self._group > 1 and not self._of_batch:
            weight = weight * self._group**0.5
        if self._unclear and self._of_batch and not self._pooled:
            # More rows in the loss than in the largest call are those of several calls, or of one several times.
            weight = weight * torch.clamp(reading.rows / measured.clamp(min=1), min=1.0).ceil().sqrt()
        if self._unclear:
            weight = weight * reading.stretch
        chosen.statistic.finish(count, outputs, reading.calls, weight)

    def _own_edges(self, loss: Tensor) -> list[graph.Edge]:
        """Where the gradients of a loss of the kind go, if it is of the affine map that was found, as far as known."""
        assert self._loss is not None
        edges = graph.find_edges(loss, self._loss.name, among_terms=self.options.loss != "auto")
        if self.probes.chosen is None or hasattr(self.probes.chosen.weight, "full_tensor"):
            return edges  # of a sharded head the graph has another tensor each time
        return [edge for edge in edges if same_weight(edge.head_weight, self._head_weight)]

    def _by_example(self, values: Tensor, dim: int | None) -> Tensor:
        """Outputs in the shape (examples, outputs), by the dimension of the classes where there is one."""
        assert self.head is not None
        # Where they were moved, the only dimension of that size tells.
        fitting = [i for i, size in enumerate(values.shape) if size == self._outputs] if dim is None else [dim]
        if len(fitting) != 1:
            return inspection.output_rows(self.head, values, self._outputs)
        return values.movedim(fitting[0], -1).reshape(-1, values.shape[fitting[0]])

    def _weight(self, trainer: Trainer, reading: graph.Reading) -> float | Tensor:
        """The factor by which a batch's loss is more than a mean, as far as the batch's norm goes."""
        assert self._loss is not None
        weight: Any = 1.0
        if trainer.lightning_module.automatic_optimization:
            scale: Any = reading.scale
            weight = abs(scale) / self._expected(trainer)
        if self._loss.reduction == "sum":
            weight = weight * reading.elements
        return weight**0.5 if self.policy.bound == "smooth" else weight  # the norm enters as its square there

    def _read(self, loss: Tensor) -> graph.Reading | None:
        assert self.probes.chosen is not None
        assert self._loss is not None
        named = self.options.loss != "auto"
        head = self.probes.chosen.weight if named else None
        joined = self._joined or self._unclear
        return graph.read_loss(loss, self._loss.name, self._outputs, among_terms=named, head=head, joined=joined)

    def _find(self, trainer: Trainer, loss: Tensor, automatic: bool) -> None:
        """Takes a loss that belongs to this optimizer; of others, remembers why not."""
        own = False
        try:
            found = self._search(loss)
            weight = found.head_weight if found is not None else None
            if self.options.loss != "auto" and weight is None and self.options.head == "auto":
                weight = self._first_head(loss)
            if not self._alone and weight is not None and not self.probes.owns(weight):
                return
            own = weight is not None and self.probes.owns(weight)
            if found is not None:
                self._check(trainer, found, automatic)
            if not self._alone and weight is None and self.options.head == "auto":
                raise ConfigurationError(
                    f"LipschitzLR looked for the head of optimizer {self._position} (of {len(trainer.optimizers)}) in "
                    f"the graph of a {found.loss.name if found else self.options.loss} and found none, as where it is "
                    "frozen or compiled; pass optimizers= with the position of the optimizer that trains it, or head= "
                    "with its name"
                )
            self._choose(found, weight)
        except ConfigurationError as error:
            if automatic:
                raise
            self._unknown = error.with_traceback(None)  # whose frames would keep the batch
            self._refused = own and self._passed_turn
            return
        self._refused = False
        reading = self._read(loss) if self.options.measure == "pass" else None
        if reading is not None:
            self._factor = float(self._weight(trainer, reading))
        if reading is not None and found is not None and int(reading.count) < found.rows:
            raise ConfigurationError(
                f"LipschitzLR(measure='pass') found that the loss ignores {found.rows - int(reading.count)} of "
                f"{found.rows} targets (ignore_index), which a pass over the inputs does not see; use measure='running'"
            )

    def _search(self, loss: Tensor) -> graph.FoundLoss | None:
        """What the loss is; None where it is taken on its user's word."""
        if self.options.loss == "auto":
            return graph.find_loss(loss)
        return graph.find_term(loss, self.options.loss, self.probes.named_weight)

    def _first_head(self, loss: Tensor) -> Tensor | None:
        """The only head that a loss is made from, where the loss itself is not known."""
        weights = [weight for weight in graph.first_heads(loss) if self.probes.owns(weight)]
        if len(weights) > 1:
            raise ConfigurationError(
                f"LipschitzLR(loss={self.options.loss!r}) looked for the affine map that makes the outputs and found "
                f"{len(weights)} of them behind the loss; pass head= with the name of the one to go by"
            )
        return weights[0] if weights else None

    @staticmethod
    def _expected(trainer: Trainer) -> float | Tensor:
        """The factor by which Lightning multiplies a loss; on the device where a GradScaler has it."""
        # Lightning divides by the accumulated batches first, and a GradScaler multiplies after that.
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is None:
            return 1.0 / trainer.accumulate_grad_batches
        scale = getattr(scaler, "_scale", None)
        return (scaler.get_scale() if scale is None else scale) / trainer.accumulate_grad_batches

    def _check(self, trainer: Trainer, found: graph.FoundLoss, automatic: bool) -> None:
        factor = abs(found.scale) / self._expected(trainer)
        named = self.options.loss != "auto"
        if not automatic and not named and not math.isclose(float(factor), 1.0, rel_tol=1e-5):
            raise ConfigurationError(
                f"LipschitzLR found a {found.loss.name} weighted by {float(factor):g} under manual optimization, where "
                "it can't tell a weight from one over the batches that are accumulated by hand; return the plain loss, "
                f"or pass loss={found.loss.name!r} to have the weight disregarded"
            )
        chain = found.chain or (found.bent if self.policy.bound == "smooth" else ())
        if chain and self.options.head == "auto" and not named:
            shapes = "Expand" in chain
            raise ConfigurationError(
                f"LipschitzLR looked for the affine map that makes the outputs and found {' > '.join(chain)}; "
                + ("give outputs and targets the same shape" if shapes else "feed the loss with the map's outputs")
                + ", or pass head= with its name to have what comes after it disregarded, where that makes no gradient "
                "larger"
            )

    def _choose(self, found: graph.FoundLoss | None, weight: Tensor | None) -> None:
        """Decides on the head and the loss, and makes sure that there is a constant for them."""
        loss = found.loss if found is not None else Loss(self.options.loss)  # type: ignore[arg-type]  # not "auto" then
        self.probes.choose(weight, found.width if found is not None else None)
        chosen = self.probes.chosen
        assert chosen is not None
        _, width = inspection.head_size(chosen.head)
        width = (found.width if found is not None else None) or width
        if loss.name == "cross_entropy" and width < 2:
            raise ConfigurationError(
                f"LipschitzLR: the head {chosen.name!r} has 1 output, and the cross-entropy needs at least 2 classes; "
                "pass head= with the name of the map that makes the logits"
            )
        if loss.needs_outputs(self.policy.bound) and found is None:
            raise ConfigurationError(
                f"LipschitzLR(loss={loss.name!r}, bound={self.policy.bound!r}) needs the size of outputs and targets, "
                "and the graph of the loss does not show them; use torch.nn.functional.mse_loss, or bound='smooth'"
            )
        try:
            bound, norm = self.policy.bound, self.policy.norm
            loss.constant(1.0, batch_size=2, num_outputs=width, bound=bound, norm=norm, output_norm=1.0)
        except ValueError as error:
            raise ConfigurationError(
                f"LipschitzLR: no constant for the {loss.name} of the head {chosen.name!r}: {error}"
            ) from None
        self._loss, self._outputs = loss, width
        self._look_at_ratio(chosen)
        if found is None:
            return
        self._pooled, self._group, self._unclear = found.pooled, found.group, bool(found.chain)
        self._joined, self._head_weight = found.joined, found.head_weight
        self._check_inputs(chosen, found.inputs)
        measured = int(chosen.statistic.rows) if self.options.measure == "running" else 0
        if self.options.head == "auto" and not self._pooled and measured >= 2 * found.head_rows:
            raise ConfigurationError(
                f"LipschitzLR measured {measured} rows at the head {chosen.name!r} in a batch and found {found.rows} "
                f"targets in the {loss.name}; let the head see what the loss is taken of, or pass head={chosen.name!r} "
                "to count the others as well"
            )

    def _look_at_ratio(self, chosen: Probe) -> None:
        """Says so where the head's steps are longer than the rate, which is the first parameter group's."""
        groups = self.optimizer.param_groups
        own = [i for i, group in enumerate(groups) if any(p is chosen.weight for p in group["params"])]
        ratio = self.writer.references[own[0]] / self.writer.reference if own else 1.0
        if ratio > 1:
            rank_zero_warn(
                f"LipschitzLR: the head {chosen.name!r} is in parameter group {own[0]}, whose configured rate is "
                f"{ratio:g} times that of the first group, which has the computed rate: the head has {ratio:g} times "
                "it. Put its group first in the optimizer to have the others follow by their ratios to it"
            )

    def _check_inputs(self, chosen: Probe, inputs: Tensor | None) -> None:
        """Makes sure that a head with a forward of its own is the affine map of what was measured, its input."""
        plain = any(type(chosen.head).forward is kind.forward for kind in inspection.HEADS)
        measured = self.options.head == "auto" and self.options.measure == "running" and self.policy.norm != "spectral"
        if plain or not measured or inputs is None:
            return
        own = self._statistic(chosen.head, inputs.device)
        own.add(inspection.head_rows(chosen.head, inputs))
        if int(own.rows) == int(chosen.statistic.rows) and not torch.allclose(
            own.size, chosen.statistic.size, rtol=0.02
        ):
            raise ConfigurationError(
                f"LipschitzLR measured the inputs of the head {chosen.name!r} and found that its forward, of "
                f"{type(chosen.head).__name__}, changes them; let a torch.nn.Linear see what the weight is multiplied "
                f"by, or pass head={chosen.name!r} to have the change disregarded, where it makes no input larger"
            )

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
        self._pass = epoch, inspection.weight_norm(self.optimizer, module, self.options.weights)

    def begin_batch(self, module: LightningModule) -> None:
        """Counts the batches that make one optimizer step, and drops what has made no loss."""
        self._micro_batches += 1
        if self._open or not module.automatic_optimization:
            self.probes.drop()
        self._open = self.options.measure == "running"

    def step(self, trainer: Trainer, module: LightningModule) -> bool:
        """Decides where an update is due, and writes the rate before the parameters move.

        Returns:
            Whether there is something new to log.
        """
        if self.probes.chosen is None:
            # No on_before_backward has come. The batch was skipped, or manual optimization has a backward of its own.
            if module.automatic_optimization:
                return False
            if self.options.loss == "auto":
                raise self._unknown or ConfigurationError(
                    "LipschitzLR looked for the loss in manual_backward, which was not called with one of the "
                    "optimizer's before its step; call self.manual_backward(loss), pass optimizers= with the position "
                    "of the optimizer that trains the head, or pass loss= with the loss's name"
                )
            self._choose(None, None)
        if self._refused and self._applied is None and self._unknown is not None:
            raise self._unknown  # the loss of this step; what was taken before was of another optimizer's
        assert self.probes.chosen is not None
        if not module.automatic_optimization and self._open:
            self.probes.chosen.statistic.finish()
            self._open = False
        self._steps += 1
        if self._steps == 1:
            self._epoch = trainer.current_epoch
        by_hand = not module.automatic_optimization
        accumulated = max(1, self._micro_batches) if by_hand else trainer.accumulate_grad_batches
        running = self.options.measure == "running"
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
        rate = self._decision.lr * self._schedule(trainer, module) if self._decision else None
        rates = self.writer.write(None if self.options.dry_run else rate)
        if self.options.dry_run and rate is not None:
            rates = self.writer.rates(rate)
        self._applied = (self._decision or Decision(rates[0]), rates)
        return self._steps == 1 or self._decision is not before

    def pass_turn(self) -> None:
        """Another optimizer is about to step."""
        self._passed_turn = True
        if self._readings is not None:
            self._readings.pass_turn()

    def _read_step(self, trainer: Trainer) -> bool:
        """Reads the step, where the rule asks for it and it is due; one reduction."""
        if self._readings is None:
            return False
        due = self._readings.begin_step()
        if self._readings.anew:
            self._rule_state = rules.RuleState()
        if not due:
            return False
        scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        scaled = scaler is not None and getattr(self.optimizer, "_step_supports_amp_scaling", False)
        grad_scale = scaler.get_scale() if scaled else 1.0
        read = self._readings.measure(grad_scale, self.writer.ratios, trainer.global_rank, trainer.world_size)
        reduced: Any = trainer.strategy.reduce(read.to(trainer.strategy.root_device), reduce_op="max")
        self._readings.take(reduced)
        return True

    def _schedule(self, trainer: Trainer, module: LightningModule) -> float:
        """The factor of the callback's own schedule, for runs that bring none and whose length is known."""
        if self._length is None:
            self._length = self._length_of_run(trainer, module)
        if self._length == math.inf:
            return 1.0
        factor = linear_warmup if self._averages else linear_warmup_decay
        return factor(min(trainer.global_step, int(self._length) - 1), int(self._length))

    @property
    def _averages(self) -> bool:
        """Whether the optimizer averages the weights, which is in place of a decay."""
        return type(self.optimizer).__name__ in rules.SCHEDULE_FREE

    def _length_of_run(self, trainer: Trainer, module: LightningModule) -> float:
        """Optimizer steps of the run; infinity where the callback brings no schedule."""
        if self.options.schedule == "none" or self.policy.bound == "paper" or self.writer.scheduled:
            return math.inf
        if self._averages and any(group["warmup_steps"] for group in self.optimizer.param_groups):
            return math.inf
        length = math.inf
        callbacks: Sequence[Any] = trainer.callbacks  # type: ignore[attr-defined]
        changing = any(isinstance(one, GradientAccumulationScheduler) and len(one.scheduling) > 1 for one in callbacks)
        timed = any(isinstance(one, Timer) and one.time_remaining() is not None for one in callbacks)
        if module.automatic_optimization and not changing and not timed:
            length = float(trainer.estimated_stepping_batches)
        if not 1 <= length < math.inf:
            rank_zero_info(
                "LipschitzLR: the length of the run is not known, so the rate has no warm-up and no decay; set "
                "max_epochs or max_steps, or bring a scheduler (schedule='none' says that none is wanted)"
            )
            return math.inf
        what = "warm-up over a tenth of" if self._averages else "warm-up and decay over"
        rank_zero_info(f"LipschitzLR: {what} {int(length)} optimizer steps (schedule='none' has none)")
        return length

    def end_batch(self, trainer: Trainer, module: LightningModule, batch_idx: int) -> None:
        """Ends the interval with its last step, so that an epoch's checkpoint holds values that all ranks share."""
        if self._applied is None and self.writer.steps and not module.automatic_optimization:
            raise ConfigurationError(
                "LipschitzLR writes the rate when Lightning's optimizer steps, and a step went past it; call "
                "self.optimizers().step(), not the step of the optimizer inside"
            )
        if self.probes.chosen is None or self.options.measure == "pass":
            return
        update = self.options.update
        over = self._steps >= int(update) if update != "epoch" else self._epoch_over(trainer)
        if over and self._steps:
            self._decide(trainer, interval_over=True)
            self.probes.chosen.statistic.reset()
            self._steps = 0
            self._accumulated = 1
            self._intervals += 1
        elif trainer.world_size > 1 and _may_be_saved(trainer, batch_idx):
            self._reduce(trainer)

    def share(self, trainer: Trainer) -> None:
        """Has all ranks hold the same running maximum, for a checkpoint between two updates."""
        if trainer.world_size > 1 and self.probes.chosen is not None and self.options.measure == "running":
            self._reduce(trainer)

    def _epoch_over(self, trainer: Trainer) -> bool:
        # Where the last batch can't be known or the rest of an epoch is skipped, the next epoch's first step ends it.
        return trainer.is_last_batch or trainer.current_epoch > self._epoch

    def _decide(self, trainer: Trainer, interval_over: bool, read: bool = False) -> None:
        """One reduction, then a decision that every rank makes alike."""
        assert self.probes.chosen is not None
        measured = self._measurement(trainer, self._reduce(trainer))
        if self.options.measure == "pass" and not measured.batch_size and not measured.dropped:
            raise ConfigurationError(
                f"LipschitzLR(measure='pass') called {type(trainer.lightning_module).__name__} with the inputs of "
                f"the training batches, and the head {self.probes.chosen.name!r} did not run; let forward() go "
                "through the head, or use measure='running'"
            )
        if self.check_losses(trainer) and self._decision is not None:
            return
        self._settle(measured, keep=interval_over if self._readings is None else read)

    def _settle(self, measured: Measurement, keep: bool) -> None:
        """Decides, and lets the rule remember it or not."""
        assert self._loss is not None
        outcome = self.policy.decide(
            measured,
            loss=self._loss,
            num_outputs=self._outputs,
            optimizer=type(self.optimizer).__name__,
            groups=self.optimizer.param_groups,
            state=self._rule_state,
            last=self._decision,
        )
        self._report(measured, usable=outcome is not None)
        if self._readings is not None and (not keep if outcome is not None else not measured.scale):
            self._measured = measured  # for the next reading, with which the rate changes
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
        assert self.probes.chosen is not None
        statistic = self.probes.chosen.statistic
        if self._pass is not None:
            _, weights = self._pass
        else:
            weights = inspection.weight_norm(self.optimizer, trainer.lightning_module, self.options.weights)
        weights = weights.to(statistic.values.device).reshape(1)
        # A NaN's fate in a MAX depends on the order of the ranks; -1 stands for it until all agree.
        weights = torch.where(torch.isfinite(weights), weights, -1.0)
        values = statistic.values.clone()
        values[0] *= self._factor
        values[3] *= self._factor**2
        direction = statistic.direction
        if trainer.global_rank > 0:
            direction = torch.full_like(direction, -math.inf)
        slots = self.watch.slots()
        reduced = trainer.strategy.reduce(torch.cat([weights, values, direction, slots]), reduce_op="max")
        assert isinstance(reduced, Tensor)
        reduced, agreed = reduced[: -len(slots)], reduced[-len(slots) :]
        self.watch.take(agreed)
        size = len(statistic.values)
        shared = reduced[1 : 1 + size]
        for i in (0, 1, 3, 4):  # how many batches were left out stays each rank's own
            statistic.values[i].copy_(shared[i])
        statistic.direction.copy_(reduced[1 + size :])
        return reduced[: 1 + size]

    def _measurement(self, trainer: Trainer, reduced: Tensor) -> Measurement:
        """What the ranks agree on, read to the host."""
        assert self.probes.chosen is not None
        weight_norm, largest, count, dropped, squares, outputs = (float(value) for value in reduced.tolist())
        pieces = trainer.world_size * self._accumulated
        batch_size = int(count) * pieces
        if self.probes.chosen.statistic.mean:
            largest *= math.sqrt(batch_size)
            outputs *= math.sqrt(batch_size)
        elif self._of_batch:
            largest *= math.sqrt(pieces)
            outputs *= math.sqrt(pieces)
        return Measurement(
            activation_norm=largest,
            weight_norm=weight_norm if weight_norm >= 0 else math.nan,
            batch_size=batch_size,
            dropped=int(dropped),
            squares=squares * math.sqrt(pieces),
            output_norm=outputs,
            **self._seen(),
        )

    def _seen(self) -> dict[str, Any]:
        """What a measurement has of the steps that were read."""
        if self._readings is None:
            return {}
        scale = self._readings.scale
        return {"scale": scale.value, "slope": scale.slope, "mean_slope": scale.mean_slope}

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
        if not measured.scale and self._may_overflow:
            return
        message = f"{measured.dropped} batches had non-finite activations and were left out of the maximum"
        if not usable:
            last = "the configured rate" if self._decision is None else f"the last rate, {self._decision.lr:.4g}"
            message = (
                f"no constant can be computed from activations of size {measured.activation_norm:g}, weights of size "
                f"{measured.weight_norm:g} and {measured.dropped} batches with non-finite activations; keeping {last}"
            )
            if not measured.scale:
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
        if self._readings is not None:
            metrics["step_scale"] = self._readings.scale.value
            if self._readings.sloped:
                metrics["observed_constant"] = decision.observed
        if self.policy.limited:
            metrics["capped"] = float(bool(decision.cap))
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """The state, as tensors and plain values."""
        return {
            "decision": asdict(self._decision) if self._decision else None,
            "measurement": asdict(self._measured) if self._measured else None,
            "rule_state": asdict(self._rule_state),
            "rule": self._rule,
            "readings": self._readings.state_dict() if self._readings else None,
            "steps": self._steps,
            "intervals": self._intervals,
            "epoch": self._epoch,
            "passed": self._passed,
            "accumulated": self._accumulated,
            "warned": self._warned,
            "losses": self.watch.state_dict(),
            "measured": self.probes.state_dict(),
            "references": self.writer.references,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the state of :meth:`state_dict`, as some strategies bring it after the fit has begun."""
        self._take(state)
        if state.get("measured") is not None:
            self.probes.load_state_dict(state["measured"])

    def _take(self, state: Mapping[str, Any]) -> None:
        if not state:
            return
        self._decision = Decision(**state["decision"]) if state["decision"] else None
        measured = state.get("measurement")  # later than the rest of the state
        self._measured = Measurement(**measured) if measured else None
        self._rule_state = rules.RuleState(**state["rule_state"])
        if state.get("rule", self._rule) != self._rule:
            raise LitLipschitzError(
                f"LipschitzLR's state in the checkpoint was saved with the rule {state['rule']!r}, and this run's "
                f"{type(self.optimizer).__name__} has the rule {self._rule!r}; resume with the optimizer that it was "
                "saved with, or pass restore=False to measure anew"
            )
        if self._readings is not None:
            self._readings.load_state_dict(state["readings"])
        self._steps = state["steps"]
        self._intervals = state["intervals"]
        self._epoch = state["epoch"]
        self._passed = state["passed"]
        self._accumulated = state["accumulated"]
        self._warned = state["warned"]
        if state.get("losses"):  # later than the rest of the state
            self.watch.load_state_dict(state["losses"])


def _may_be_saved(trainer: Trainer, batch_idx: int) -> bool:
    """Whether a checkpoint may be saved after this batch, as all ranks know alike.

    That is every so many steps, with a validation that follows, and at the epoch's end.
    """
    step = trainer.global_step
    intervals: Sequence[int] = [getattr(c, "_every_n_train_steps", 0) or 0 for c in trainer.checkpoint_callbacks]
    due = trainer.is_last_batch or any(every > 0 and step % every == 0 for every in intervals)
    validation = getattr(trainer, "val_check_batch", math.inf)
    return due or (validation != math.inf and validation > 0 and (batch_idx + 1) % validation == 0)
