"""``LipschitzAudit``, the callback that compares each layer's gradient with the head's and with L during training."""

from typing import Any

from torch.optim import Optimizer

from lit_lipschitz.audit.gradients import GradientSnapshot, layers_with_parameters, read_gradients
from lit_lipschitz.audit.summary import AuditSummary, AuditTally, step_metrics
from lit_lipschitz.audit.table import print_summary
from lit_lipschitz.bounds import Bound
from lit_lipschitz.callbacks.lipschitz_lr import LipschitzLR
from lit_lipschitz.callbacks.trainer_facts import callbacks_of
from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.lightning_api import Callback, LightningModule, Trainer, class_in, rank_zero_info

_SHARDING = ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy")


class LipschitzAudit(Callback):
    """Checks the assumption of the method while a network trains with :class:`~lit_lipschitz.LipschitzLR`.

    In how many steps is the gradient of the last layer the largest, in how many does L bound the gradients, and by what
    factor? The first optimizer step and every ``every``-th step after it are audited. A layer is a module that directly
    owns trainable parameters. For each layer, the Euclidean norm of its gradient and its largest absolute entry are
    compared with the constant L of this step's learning rate. This costs one host read per audited step; other steps
    cost nothing.

    Every logger of the trainer gets ``audit/<layer>/ratio`` (norm / L), ``audit/largest_is_head`` (1 or 0, by norm) and
    ``audit/largest_layer``, the row of the layer with the largest norm in the table, counted from 0. In a step without
    L, or if L bounds the Hessian (``bound="smooth"``), ``audit/<layer>/gradient``, the norm, replaces the ratio. At the
    end of fit a table of the layers and the conclusions are printed on stderr; :meth:`summary` returns the numbers.

    - Gradients are read at the start of the optimizer's step: accumulated, unscaled and averaged over the ranks, but
      not yet clipped. Coupled weight decay, which the optimizer adds in its step, is included in L only.
    - A layer without a gradient in a step, such as a frozen one, is not counted in that step. Steps with non-finite
      gradients are only counted as such. Parameters that two layers share count in both.
    - Nothing is saved in checkpoints: a resumed run starts a new audit.

    Args:
        every: Optimizer steps from one audited step to the next.

    Raises:
        ConfigurationError: ``every`` is not a positive int; when the fit begins, the trainer has no LipschitzLR or its
            strategy shards the gradients.

    Example:
        >>> import lightning as L
        >>> from lit_lipschitz import LipschitzAudit, LipschitzLR
        >>> trainer = L.Trainer(callbacks=[LipschitzLR(), LipschitzAudit()], logger=False, enable_checkpointing=False)

    References:
        R. Yedida, S. Saha: A novel adaptive learning rate scheduler for deep neural networks, arXiv 1902.07399, 2019,
        equation 1.
    """

    def __init__(self, every: int = 100) -> None:
        super().__init__()
        if type(every) is not int or every < 1:
            raise ConfigurationError(f"LipschitzAudit(every={every!r}): expected a number of steps >= 1")
        self.every = every
        self._lipschitz: LipschitzLR | None = None
        self._reset()

    def _reset(self, bound: Bound = "strict") -> None:
        self._steps = 0  # optimizer steps
        self._snapshot: GradientSnapshot | None = None
        self._layer_order: list[str] = []
        self._tally = AuditTally(bound)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the LipschitzLR and starts a new audit."""
        if stage != "fit":
            return
        callbacks = callbacks_of(trainer)
        lipschitz = next((callback for callback in callbacks if isinstance(callback, LipschitzLR)), None)
        if lipschitz is None:
            raise ConfigurationError(
                "LipschitzAudit compares gradients with LipschitzLR's constant and found no LipschitzLR in "
                "trainer.callbacks: add one"
            )
        if any(class_in(trainer.strategy, name) for name in _SHARDING):
            raise ConfigurationError(
                f"LipschitzAudit needs the whole gradients on each rank, and {type(trainer.strategy).__name__} shards "
                "them; use ddp or one device, or remove the callback"
            )
        self._reset(lipschitz.policy.bound)
        self._lipschitz = lipschitz
        if lipschitz.policy.bound == "smooth":
            rank_zero_info(
                "LipschitzAudit: the constant of bound='smooth' bounds the Hessian, not the gradient; gradient norms "
                "are logged instead of ratios"
            )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measures the gradients on their device if the step is due."""
        assert self._lipschitz is not None
        if not self._lipschitz.controls(optimizer):
            return
        # With manual optimization a batch can have several steps: the previous one's snapshot may be pending.
        self._finish(trainer)
        self._steps += 1
        if (self._steps - 1) % self.every:
            return
        self._layer_order = list(layers_with_parameters(pl_module))
        self._snapshot = read_gradients(pl_module, optimizer, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts and logs an audited step."""
        self._finish(trainer)

    def _finish(self, trainer: Trainer) -> None:
        snapshot, self._snapshot = self._snapshot, None
        if snapshot is None:
            return
        assert self._lipschitz is not None
        # This is the first hook after the step, which has set the constant.
        constant = None if self._tally.bound == "smooth" else self._lipschitz.constant
        head = self._lipschitz.head_name
        gradients = snapshot.by_layer()
        if self._tally.add(gradients, constant, head) and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(step_metrics(gradients, constant, head), step=snapshot.step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the table and the conclusions, on rank 0."""
        if trainer.is_global_zero:
            print_summary(self.summary(), self.every)

    def summary(self) -> AuditSummary:
        """Statistics of the audited steps of the last fit so far."""
        head = self._lipschitz.head_name if self._lipschitz is not None else None
        return self._tally.summary(head, self._layer_order)
