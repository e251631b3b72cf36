"""``LipschitzCallback``: the learning rate in the Trainer of Hugging Face transformers."""

import base64
import inspect
import io
import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from lit_lipschitz.attachment import Attachment, attach
from lit_lipschitz.control.settings import make_settings
from lit_lipschitz.errors import ConfigurationError

_FROM_TRAINER = (
    "model",
    "optimizer",
    "total_steps",
    "epoch_steps",
    "accumulate_grad_batches",
    "schedulers",
    "grad_scaler",
    "others",
    "name",
)
_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(attach).parameters.items()
    if name not in _FROM_TRAINER
}


class LipschitzCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Sets the learning rate of a Trainer's optimizer to that of :class:`~lit_lipschitz.LipschitzLR`.

    The Trainer's scheduler (``lr_scheduler_type``, linear decay by default) is a factor of the computed rate, and
    ``learning_rate`` counts only as its unit. What the Trainer logs of a training step has the metrics of
    :meth:`Attachment.metrics() <lit_lipschitz.Attachment.metrics>` too, and ``learning_rate`` is the one that the step
    used; a reporter sees them if it comes after this callback. The state is in the Trainer's checkpoints
    (``trainer_state.json``), and ``resume_from_checkpoint`` continues from it.

    Args:
        **settings: Arguments of :func:`lit_lipschitz.attach` that are not known from the Trainer: ``notify``, and all
            from ``loss`` on.

    Raises:
        ConfigurationError: An argument is unknown or out of its range.

    Example:
        >>> callback = LipschitzCallback(max_lr=0.1)  # for Trainer(callbacks=[callback])
    """

    def __init__(self, **settings: Any) -> None:
        if unknown := set(settings) - set(_DEFAULTS):
            raise ConfigurationError(
                f"LipschitzCallback({sorted(unknown)[0]}=...): expected one of {', '.join(map(repr, _DEFAULTS))}"
            )
        make_settings({**_DEFAULTS, "measure": "running", **settings})
        self.attachment: Attachment | None = None  # of the current or the last training; None before the first
        self._settings = settings

    def state(self) -> dict[str, Any]:
        """The arguments and the state, as JSON admits them."""
        arguments = {name: value for name, value in self._settings.items() if not callable(value)}
        saved = None if self.attachment is None else _encoded(self.attachment.state_dict())
        return {"args": arguments, "attributes": {"saved": saved}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attaches to the model and the optimizer, and continues from the state in a checkpoint."""
        self._detach()
        optimizer, scheduler, accumulated = (
            kwargs["optimizer"],
            kwargs["lr_scheduler"],
            args.gradient_accumulation_steps,
        )
        self.attachment = attach(
            kwargs["model"],
            optimizer,
            total_steps=state.max_steps,
            epoch_steps=_epoch_steps(kwargs["train_dataloader"], accumulated),
            accumulate_grad_batches=accumulated,
            schedulers=[getattr(scheduler, "scheduler", scheduler)],
            **self._settings,
        )
        # The Trainer itself restores callbacks only if restore_callback_states_from_checkpoint is set.
        callbacks: Any = state.stateful_callbacks  # a dict by now
        stored = callbacks.setdefault(type(self).__name__, {})
        saved = stored.get("attributes", {}).get("saved")
        if state.global_step and saved is not None:
            self.attachment.load_state_dict(_decoded(saved))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Gives all ranks the same statistics before a checkpoint."""
        if control.should_save and self.attachment is not None:
            self.attachment.share()

    on_epoch_end = on_step_end

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the metrics of the last step to what is logged of it."""
        if self.attachment is None or logs is None or "loss" not in logs:
            return
        added = self.attachment.metrics()
        if self.attachment.lr is not None and "learning_rate" in logs:
            added["learning_rate"] = self.attachment.lr
        logs.update(added)
        state.log_history[-1].update(added)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Removes all hooks; the results stay in ``attachment``."""
        self._detach()

    def _detach(self) -> None:
        if self.attachment is not None:
            self.attachment.detach()


def _epoch_steps(loader: Any, accumulated: int) -> int | None:
    """Optimizer steps of an epoch, as the Trainer counts them; None if the loader has no length."""
    try:
        return max(1, math.ceil(len(loader) / accumulated))
    except TypeError:  # of an iterable data set
        return None


def _encoded(state: Mapping[str, Any]) -> str:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def _decoded(text: str) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True)
    return state
