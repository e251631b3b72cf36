"""The losses of the optimizer step that is coming: how many batches they are of, and what is measured of them."""

from torch import Tensor

from lit_lipschitz.control.loop_facts import LoopFacts
from lit_lipschitz.control.rate_updater import RateUpdater


class StepLosses:
    """Counts the batches since the last optimizer step, and measures their losses for a :class:`RateUpdater`."""

    def __init__(self, updater: RateUpdater) -> None:
        self._updater = updater
        self.begun = 0  # batches since the last step
        self.with_loss = 0  # of these, batches whose gradients are in the next step
        self.pending = False  # whether a loss has come since the last step
        self._has_loss = False  # whether the current batch is one with a loss

    def begin_batch(self) -> None:
        """A batch begins."""
        self.begun, self._has_loss = self.begun + 1, False

    def add(self, loss: Tensor, loop: LoopFacts) -> None:
        """Counts the batch of a loss of the head, and records whether the loss is finite; shape ()."""
        if not self._has_loss:
            self.with_loss, self._has_loss = self.with_loss + 1, True
        self.pending = True
        statistics, due, estimator = self._updater.statistics, self._updater.steps.due, self._updater.estimator
        statistics.nonfinite.update(loss, loop.step)
        if statistics.residuals.width:
            statistics.residuals.add_loss(loss, measured=due)
        if estimator is not None and due:
            estimator.add_loss(loss, loop.loss_scale() * loop.accumulated)

    def after_backward(self, loop: LoopFacts) -> None:
        """A backward has ended; the gradients may be clipped before the step."""
        estimator = self._updater.estimator
        if estimator is None or not self._updater.steps.due:
            return
        if loop.automatic or self.with_loss == 1:
            estimator.after_backward(loop.loss_scale() * loop.accumulated)
        else:
            estimator.forget_grad_norm()

    def end_step(self, loop: LoopFacts) -> int:
        """Forgets the batches, whose gradients a step is about to use; returns how many they are."""
        batches = self.with_loss or (0 if loop.automatic else self.begun) or 1
        self.begun, self.with_loss, self._has_loss, self.pending = 0, 0, False, False
        return batches

    def forget_batches(self) -> None:
        """Forgets the batches so far."""
        self.begun, self.with_loss, self._has_loss = 0, 0, False

    def discard(self) -> None:
        """Forgets the batches and the losses: their gradients are not in the next step."""
        self.forget_batches()
        self.pending = False
        if self._updater.estimator is not None:
            self._updater.estimator.discard()
