"""Counts the batches of the optimizer step that is coming."""

from dataclasses import dataclass


@dataclass
class StepBatches:
    """Batches since the last optimizer step, and those of them whose gradients are in the next one."""

    begun: int = 0
    with_loss: int = 0  # batches whose gradients are in the next step
    pending: bool = False  # whether a loss has come since the last step
    _has_loss: bool = False  # whether the current batch is one with a loss

    def begin(self) -> None:
        """A batch begins."""
        self.begun, self._has_loss = self.begun + 1, False

    def add_loss(self) -> None:
        """The current batch has a loss; further ones do not count."""
        if not self._has_loss:
            self.with_loss, self._has_loss = self.with_loss + 1, True
        self.pending = True

    def clear(self) -> None:
        """The gradients of all batches so far have been used, or are not in the next step."""
        self.begun, self.with_loss, self._has_loss = 0, 0, False
