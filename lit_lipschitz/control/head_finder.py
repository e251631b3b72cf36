"""Finds the head and the loss that an optimizer's rate is computed from, and measures every batch by them."""

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_lipschitz.bounds.loss_spec import Loss
from lit_lipschitz.control.noise_damping import RunningResiduals
from lit_lipschitz.control.options import Options
from lit_lipschitz.control.policy import Policy
from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.measurement.head_hooks import Probe, Probes
from lit_lipschitz.measurement.running_maximum import RunningMaximum
from lit_lipschitz.measurement.step_scale import StepScaleEstimator
from lit_lipschitz.recognition import heads as inspection
from lit_lipschitz.recognition import loss_graph as graph
from lit_lipschitz.recognition.affine import same_weight


class HeadAndLoss:
    """The head and the loss of one optimizer's steps: found by the first one, then measured in each batch.

    Args:
        policy: What is to be measured.
        options: The other arguments of the callback.
        trainer: A trainer that begins to fit.
        module: Its module.
        position: The place of the optimizer among the trainer's.
        stored: The probes' state of the run that is resumed, or None.

    Raises:
        ConfigurationError: The module has nothing that can be the head.

    Attributes:
        probes: Watch every module that can be the head, until it is known which one is.
        loss: The loss, once it is known.
        outputs: Outputs of the head that the loss is taken of, or classes; 0 until they are known.
        factor: What the loss is multiplied by, where a pass over the training set does not see it.
        residuals: What a squared error leaves of its targets; nothing of other losses, and in a pass.
    """

    def __init__(
        self,
        policy: Policy,
        options: Options,
        trainer: Trainer,
        module: LightningModule,
        position: int,
        stored: dict[str, Any] | None,
    ) -> None:
        self._policy, self._options, self._position = policy, options, position
        self._alone = len(trainer.optimizers) == 1
        self.loss: Loss | None = None
        self.outputs = 0
        self.factor = 1.0
        self.residuals = RunningResiduals(device=trainer.strategy.root_device)
        self._open = False  # whether a batch has begun that has made no loss yet
        self._pooled = False  # whether the head's outputs are averaged over places before the loss
        self._group = 1  # rows of the head that one target is chosen among
        self._head_weight: Tensor | None = None  # of the affine map that the loss was found to be taken of
        self._joined = False  # whether outputs of several calls were put together
        self._unclear = False  # whether the graph does not tell what comes between the head and the loss
        self._unknown: ConfigurationError | None = None  # why the last loss was not taken
        self._refused = False  # whether it was of the head, after another optimizer had stepped
        self._passed_turn = False  # whether another one has
        device = trainer.strategy.root_device
        self.probes = Probes(
            module,
            options.head,
            lambda head: self._statistic(head, device),
            device,
            stored,
            None if self._alone else _parameters(trainer.optimizers[position]),
        )

    def _statistic(self, head: nn.Module, device: torch.device) -> RunningMaximum:
        width, _ = inspection.head_size(head)
        if self._policy.norm == "spectral" and not width:
            raise ConfigurationError(
                "LipschitzLR(norm='spectral') needs the width of every affine map, and a lazy one has none yet; run a "
                "batch through the network before fit, or pass head="
            )
        rigorous = self._policy.bound != "paper"
        bias = rigorous and getattr(head, "bias", None) is not None
        mean, squares = (
            rigorous and self._policy.norm_grows_with_batch,
            self._policy.second_moment_estimate == "scripts",
        )
        return RunningMaximum(self._policy.norm, width, bias=bias, mean=mean, squares=squares, device=device)

    @property
    def chosen(self) -> Probe | None:
        """The probe of the head, once it is known."""
        return self.probes.chosen

    # -- batch by batch ----------------------------------------------------------------------------------------------

    def begin_batch(self, automatic: bool) -> None:
        """Drops what has made no loss."""
        if self._open or not automatic:
            self.probes.drop()
        self._open = self._options.running

    def close_batch(self) -> None:
        """Ends the measurement of a batch of manual optimization that made a step and showed no loss."""
        if self._open and self.chosen is not None:
            self.chosen.statistic.finish()
            self._open = False

    def take(self, trainer: Trainer, loss: Tensor, first: bool, step_scale: StepScaleEstimator | None) -> None:
        """Ends the measurement of a batch with the loss that it has made; the first time, finds out what loss it is.

        Args:
            trainer: The trainer.
            loss: The loss, before its backward.
            first: Whether the optimizer has made no step yet.
            step_scale: Measures the loss's gradient norms in the logits, if they are needed.
        """
        # Where several optimizers take turns, the last loss before the first step is the one that the step is made of.
        if self.chosen is None or (first and not self._alone):
            self._find(trainer, loss)
        if self.chosen is None or self.loss is None:
            return
        running = self._options.running
        reading = self._read(loss) if running or step_scale else None
        if step_scale and reading is not None and (edges := self._own_edges(loss)):
            step_scale.watch(reading, edges, self.loss.reduction, self._by_example)
        if running:
            self._open = False
            self._finish(trainer, reading, self.chosen)

    def _finish(self, trainer: Trainer, reading: graph.Reading | None, chosen: Probe) -> None:
        """Ends the measurement of a batch with what its loss's graph tells, where it tells something."""
        if reading is None:
            chosen.statistic.finish()
            return
        assert self.loss is not None
        self._take_residuals(trainer, reading)
        outputs: tuple[Tensor, ...] = ()
        if self.loss.needs_outputs(self._policy.bound):
            outputs = tuple(inspection.output_rows(chosen.head, part, self.outputs) for part in reading.outputs)
        of_batch = self._policy.norm_grows_with_batch
        measured = chosen.statistic.rows
        count = reading.count
        weight: Any = self._weight(trainer, reading)
        if self._pooled:
            # Every place is a row; of the examples that are ignored all are.
            places = measured.clamp(min=1) * (reading.count / reading.rows)
            count = places if self._policy.bound == "paper" else places.clamp(max=reading.count)
            if of_batch:
                # The mean over an example's places is no longer than their root mean square.
                weight = weight * (count / places).sqrt()
        if self._group > 1 and not of_batch:
            weight = weight * self._group**0.5
        if self._unclear and of_batch and not self._pooled:
            # More rows in the loss than in the largest call are those of several calls, or of one several times.
            weight = weight * torch.clamp(reading.rows / measured.clamp(min=1), min=1.0).ceil().sqrt()
        if self._unclear:
            weight = weight * reading.stretch
        chosen.statistic.finish(count, outputs, reading.calls, weight)

    def _take_residuals(self, trainer: Trainer, reading: graph.Reading) -> None:
        """Takes in what a squared error leaves of its targets, where it is the only term of the only optimizer."""
        if not (reading.outputs and self._alone and reading.terms == 1):
            return
        outputs, targets = reading.outputs
        if outputs.ndim > 1 or self.outputs == 1:  # a choice of all outputs does not tell which is which
            rows = self._by_example(outputs, None), self._by_example(targets, None)
            self.residuals.add(*rows, self._factor(trainer, reading))

    def pass_turn(self) -> None:
        """Another optimizer is about to step."""
        self._passed_turn = True

    def _read(self, loss: Tensor) -> graph.Reading | None:
        assert self.chosen is not None
        assert self.loss is not None
        named = self._options.loss != "auto"
        head = self.chosen.weight if named else None
        joined = self._joined or self._unclear
        return graph.read_loss(loss, self.loss.name, self.outputs, among_terms=named, head=head, joined=joined)

    def _own_edges(self, loss: Tensor) -> list[graph.Edge]:
        """Where the gradients of a loss of the kind go, if it is of the affine map that was found, as far as known."""
        assert self.loss is not None
        edges = graph.find_edges(loss, self.loss.name, among_terms=self._options.loss != "auto")
        if self.chosen is None or hasattr(self.chosen.weight, "full_tensor"):
            return edges  # of a sharded head the graph has another tensor each time
        return [edge for edge in edges if same_weight(edge.head_weight, self._head_weight)]

    def _by_example(self, values: Tensor, dim: int | None) -> Tensor:
        """Outputs in the shape (examples, outputs), by the dimension of the classes where there is one."""
        assert self.chosen is not None
        # Where they were moved, the only dimension of that size tells.
        fitting = [i for i, size in enumerate(values.shape) if size == self.outputs] if dim is None else [dim]
        if len(fitting) != 1:
            return inspection.output_rows(self.chosen.head, values, self.outputs)
        return values.movedim(fitting[0], -1).reshape(-1, values.shape[fitting[0]])

    def _weight(self, trainer: Trainer, reading: graph.Reading) -> float | Tensor:
        """The factor by which a batch's loss is more than a mean, as far as the batch's norm goes."""
        factor: Any = self._factor(trainer, reading)
        return factor**0.5 if self._policy.bound == "smooth" else factor  # the norm enters as its square there

    def _factor(self, trainer: Trainer, reading: graph.Reading) -> float | Tensor:
        """The factor by which a batch's loss is more than a mean."""
        assert self.loss is not None
        factor: Any = 1.0
        if trainer.lightning_module.automatic_optimization:
            scale: Any = reading.scale
            factor = abs(scale) / _expected_scale(trainer)
        return factor * reading.elements if self.loss.reduction == "sum" else factor

    # -- the first time ----------------------------------------------------------------------------------------------

    def raise_if_refused(self, first: bool) -> None:
        """Raises why a step's loss was not taken, where what was taken before was of another optimizer's."""
        if self._refused and first and self._unknown is not None:
            raise self._unknown

    def take_named(self) -> None:
        """Takes the loss and the head that were named, where manual optimization steps and has shown no loss.

        Raises:
            ConfigurationError: None was named.
        """
        if self._options.loss == "auto":
            raise self._unknown or ConfigurationError(
                "LipschitzLR looked for the loss in manual_backward, which was not called with one of the "
                "optimizer's before its step; call self.manual_backward(loss), pass optimizers= with the position "
                "of the optimizer that trains the head, or pass loss= with the loss's name"
            )
        self._choose(None, None)

    def _find(self, trainer: Trainer, loss: Tensor) -> None:
        """Takes a loss that belongs to this optimizer; of others, remembers why not."""
        automatic = trainer.lightning_module.automatic_optimization
        own = False
        try:
            found = self._search(loss)
            weight = found.head_weight if found is not None else None
            if self._options.loss != "auto" and weight is None and self._options.head == "auto":
                weight = self._first_head(loss)
            if not self._alone and weight is not None and not self.probes.owns(weight):
                return
            own = weight is not None and self.probes.owns(weight)
            if found is not None:
                self._check(trainer, found)
            if not self._alone and weight is None and self._options.head == "auto":
                raise ConfigurationError(
                    f"LipschitzLR looked for the head of optimizer {self._position} (of {len(trainer.optimizers)}) in "
                    f"the graph of a {found.loss.name if found else self._options.loss} and found none, as where it is "
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
        reading = None if self._options.running else self._read(loss)
        if reading is not None:
            self.factor = float(self._weight(trainer, reading))
        if reading is not None and found is not None and int(reading.count) < found.rows:
            raise ConfigurationError(
                f"LipschitzLR(measure='pass') found that the loss ignores {found.rows - int(reading.count)} of "
                f"{found.rows} targets (ignore_index), which a pass over the inputs does not see; use measure='running'"
            )

    def _search(self, loss: Tensor) -> graph.FoundLoss | None:
        """What the loss is; None where it is taken on its user's word."""
        if self._options.loss == "auto":
            return graph.find_loss(loss)
        return graph.find_term(loss, self._options.loss, self.probes.named_weight)

    def _first_head(self, loss: Tensor) -> Tensor | None:
        """The only head that a loss is made from, where the loss itself is not known."""
        weights = [weight for weight in graph.first_heads(loss) if self.probes.owns(weight)]
        if len(weights) > 1:
            raise ConfigurationError(
                f"LipschitzLR(loss={self._options.loss!r}) looked for the affine map that makes the outputs and found "
                f"{len(weights)} of them behind the loss; pass head= with the name of the one to go by"
            )
        return weights[0] if weights else None

    def _check(self, trainer: Trainer, found: graph.FoundLoss) -> None:
        """Makes sure that nothing comes between the head and the loss, or after it, that the constant would need."""
        factor = abs(found.scale) / _expected_scale(trainer)
        automatic = trainer.lightning_module.automatic_optimization
        named = self._options.loss != "auto"
        if not automatic and not named and not math.isclose(float(factor), 1.0, rel_tol=1e-5):
            raise ConfigurationError(
                f"LipschitzLR found a {found.loss.name} weighted by {float(factor):g} under manual optimization, where "
                "it can't tell a weight from one over the batches that are accumulated by hand; return the plain loss, "
                f"or pass loss={found.loss.name!r} to have the weight disregarded"
            )
        chain = found.chain or (found.bent if self._policy.bound == "smooth" else ())
        if chain and self._options.head == "auto" and not named:
            shapes = "Expand" in chain
            raise ConfigurationError(
                f"LipschitzLR looked for the affine map that makes the outputs and found {' > '.join(chain)}; "
                + ("give outputs and targets the same shape" if shapes else "feed the loss with the map's outputs")
                + ", or pass head= with its name to have what comes after it disregarded, where that makes no gradient "
                "larger"
            )

    def _choose(self, found: graph.FoundLoss | None, weight: Tensor | None) -> None:
        """Decides on the head and the loss, and makes sure that there is a constant for them."""
        loss = found.loss if found is not None else Loss(self._options.loss)  # type: ignore[arg-type]  # not "auto" then
        self.probes.choose(weight, found.width if found is not None else None)
        chosen = self.probes.chosen
        assert chosen is not None
        _, width = inspection.head_size(chosen.head)
        width = (found.width if found is not None else None) or width
        self._check_constant(loss, chosen.name, width, sizes_known=found is not None)
        self.loss, self.outputs = loss, width
        squares = width if loss.name == "mean_squared_error" else 0
        if squares != self.residuals.width:  # a checkpoint may have brought them
            self.residuals = RunningResiduals(squares, self.residuals.values.device)
        if found is None:
            return
        self._pooled, self._group, self._unclear = found.pooled, found.group, bool(found.chain)
        self._joined, self._head_weight = found.joined, found.head_weight
        self._check_inputs(chosen, found.inputs)
        measured = int(chosen.statistic.rows) if self._options.running else 0
        if self._options.head == "auto" and not self._pooled and measured >= 2 * found.head_rows:
            raise ConfigurationError(
                f"LipschitzLR measured {measured} rows at the head {chosen.name!r} in a batch and found {found.rows} "
                f"targets in the {loss.name}; let the head see what the loss is taken of, or pass head={chosen.name!r} "
                "to count the others as well"
            )

    def _check_constant(self, loss: Loss, head: str, width: int, sizes_known: bool) -> None:
        """Makes sure that there is a constant for a loss of so many outputs of a head."""
        bound, norm = self._policy.bound, self._policy.norm
        if loss.name == "cross_entropy" and width < 2:
            raise ConfigurationError(
                f"LipschitzLR: the head {head!r} has 1 output, and the cross-entropy needs at least 2 classes; "
                "pass head= with the name of the map that makes the logits"
            )
        if loss.needs_outputs(bound) and not sizes_known:
            raise ConfigurationError(
                f"LipschitzLR(loss={loss.name!r}, bound={bound!r}) needs the size of outputs and targets, "
                "and the graph of the loss does not show them; use torch.nn.functional.mse_loss, or bound='smooth'"
            )
        try:
            loss.constant(1.0, batch_size=2, num_outputs=width, bound=bound, norm=norm, output_norm=1.0)
        except ValueError as error:
            raise ConfigurationError(
                f"LipschitzLR: no constant for the {loss.name} of the head {head!r}: {error}"
            ) from None

    def _check_inputs(self, chosen: Probe, inputs: Tensor | None) -> None:
        """Makes sure that a head with a forward of its own is the affine map of what was measured, its input."""
        plain = any(type(chosen.head).forward is kind.forward for kind in inspection.HEADS)
        measured = self._options.head == "auto" and self._options.running and self._policy.norm != "spectral"
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


def _parameters(optimizer: Optimizer) -> set[Tensor]:
    return {parameter for group in optimizer.param_groups for parameter in group["params"]}


def _expected_scale(trainer: Trainer) -> float | Tensor:
    """The factor by which Lightning multiplies a loss; on the device where a GradScaler has it."""
    # Lightning divides by the accumulated batches first, and a GradScaler multiplies after that.
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return 1.0 / trainer.accumulate_grad_batches
    scale = getattr(scaler, "_scale", None)
    return (scaler.get_scale() if scale is None else scale) / trainer.accumulate_grad_batches
