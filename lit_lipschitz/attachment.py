"""``attach``: the learning rate of an optimizer in any training loop, which stays as it is."""

import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_lipschitz import bounds
from lit_lipschitz.control.backward_observer import add_observer, remove_observer
from lit_lipschitz.control.controller import Controller
from lit_lipschitz.control.controllers import Controllers
from lit_lipschitz.control.loop_facts import LoopFacts, Target
from lit_lipschitz.control.options import Options
from lit_lipschitz.control.plain_loop import PlainLoop, scaler_of, unwrapped_model, unwrapped_optimizer
from lit_lipschitz.control.policy import Policy
from lit_lipschitz.control.rank_states import gather_states
from lit_lipschitz.control.results import RateProperties, Results
from lit_lipschitz.control.settings import check_saved, make_settings, saved_settings
from lit_lipschitz.control.state import refuse_other_versions
from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.measurement.norms import Weights
from lit_lipschitz.recognition.autograd_nodes import parameters_below

_controlled = weakref.WeakSet[Optimizer]()  # optimizers that something is attached to


class Attachment(RateProperties):
    """The controlled learning rate of an optimizer, as :func:`attach` returns it.

    The optimizer holds it, so that it lives as long as the optimizer does. As a context manager it detaches at the end.
    """

    def __init__(
        self,
        target: Target,
        policy: Policy,
        options: Options,
        loop: PlainLoop,
        others: Iterable[Optimizer] = (),
        name: str = "",
    ) -> None:
        self.policy, self.options = policy, options
        self._loop, self._prefix = loop, f"lipschitz/{name}" if name else "lipschitz"
        self._losses = 0  # backwards whose gradients are in the coming step
        self._last_made = 0  # those in the last step
        self._told: set[str] = set()  # what was reported
        self._label = target.label
        self._has_decided = False  # on the rate of the step that is being made
        self._parameters: set[Tensor] = set()
        self._shared: dict[int, Any] | None = None  # the states of all ranks, until the next backward
        self._is_sharded = False  # the graph of a sharded network has other tensors than its optimizer
        self._controller: Controller | None = None  # which has hooks on the optimizer by the time it fails
        controller = Controller(policy, options, target, loop.now(), None, self._before_step, self._after_step)
        self._controller = controller
        self._results: Controller | Results = controller
        _controlled.add(target.optimizer)
        self._handles = [other.register_step_pre_hook(self._before_other_step) for other in others]
        controller.begin_batch(loop.now())
        add_observer(self)

    @property
    def _source(self) -> Controller | Results:
        return self._results

    @property
    def controller(self) -> Controller | Results:
        """The controller of the rate, or its results after :meth:`detach`."""
        return self._results

    def metrics(self) -> dict[str, float]:
        """Metrics of the last step, for loggers, named as those of LipschitzLR; empty before the first one."""
        return {f"{self._prefix}/{name}": value for name, value in self._results.metrics().items()}

    def state_dict(self) -> dict[str, Any]:
        """The state, as tensors and plain values that ``torch.load(weights_only=True)`` admits.

        With several ranks, call :meth:`share` on all of them before one saves it.
        """
        states = self._shared or {0: self._results.state_dict()}
        return {"settings": saved_settings(self.policy, self.options), "optimizers": states, "step": self._loop.step}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads the state of :meth:`state_dict`, before the first step of the run that is resumed.

        Raises:
            LitLipschitzError: It was saved with other settings, or by another version.
        """
        controller = self._attached()
        with refuse_other_versions():
            check_saved(state_dict, self.policy, self.options)
            state, step = state_dict["optimizers"][0], int(state_dict["step"])
        controller.load_state_dict(state)
        self._loop.step = step
        controller.begin_batch(self._loop.now())

    def share(self) -> None:
        """Gathers what the ranks have measured, for the checkpoint of this step; all ranks must call it."""
        self._shared = gather_states({0: self._attached().state_dict()}, self._loop.now().world_size)

    def detach(self) -> None:
        """Removes all hooks; the results are kept.

        The optimizer keeps its last learning rate, or with a scheduler has that of the scheduler.
        """
        remove_observer(self)
        for handle in self._handles:
            handle.remove()
        if self._controller is not None:
            self._controller.close()
            _controlled.discard(self._controller.optimizer)
            self._results = Results.of(self._controller)
        self._controller, self._handles, self._parameters = None, [], set()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has, which is detached: the results so far, and nothing of the run."""
        detached: dict[str, Any] = {"_controller": None, "_handles": [], "_parameters": set()}
        results = self._results if isinstance(self._results, Results) else Results.of(self._results)
        return {**vars(self), **detached, "_results": results}

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _attached(self) -> Controller:
        if self._controller is None:
            raise ConfigurationError("attach(...) was detached; attach again to continue")
        return self._controller

    def before_backward(self, losses: Sequence[Tensor], inputs: Sequence[Tensor] | None) -> bool:
        """Ends the measurement of a batch by its losses, if a gradient of the optimizer's parameters is computed."""
        controller = self._controller
        # After the decision, only a closure that the optimizer calls again makes losses.
        if controller is None or (self._has_decided and controller.is_stepping):
            return False
        own = self._own_parameters(controller)
        if inputs is not None and own.isdisjoint(inputs):
            return False
        losses = [loss for loss in losses if loss.grad_fn is not None and (self._is_sharded or _reaches(loss, own))]
        if not losses:
            return False
        self._shared = None
        self._check_losses(controller, losses)
        for loss in losses:
            Controllers({0: controller}).before_backward(loss, self._loop.now())
        self._losses += 1
        return True

    def after_backward(self) -> None:
        """Notes how long the gradients are, which may be clipped, and begins the next batch."""
        controller = self._attached()
        controller.losses.after_backward(self._loop.now())
        is_complete = not self._loop.automatic and self._losses % self._loop.accumulated == 0
        if not controller.is_stepping and not is_complete:
            controller.begin_batch(self._loop.now())

    def _own_parameters(self, controller: Controller) -> set[Tensor]:
        groups = controller.optimizer.param_groups
        if len(self._parameters) != sum(len(group["params"]) for group in groups):
            self._parameters = {parameter for group in groups for parameter in group["params"]}
            self._is_sharded = any(hasattr(parameter, "full_tensor") for parameter in self._parameters)
        return self._parameters

    def _check_losses(self, controller: Controller, losses: Sequence[Tensor]) -> None:
        """Checks that losses are as the loop was described."""
        if not self._loop.automatic:
            return
        # A step may have been skipped, or inputs have been optimized, and the gradients set to None or to 0.
        if self._losses and self._has_no_gradients():
            # Lightning counts the steps that a GradScaler skips, and so does the loop that epoch_steps is about.
            self._loop.step += self._loop.scales_loss and self._losses >= self._loop.accumulated
            controller.discard_losses()
            self._losses = 0
        if (controller.decision is None and not self._is_sharded) and any(
            isinstance(parameter, nn.Parameter) and parameter not in self._parameters  # an input may train as well
            for loss in losses
            for parameter in parameters_below(loss.grad_fn)
        ):
            raise ConfigurationError(
                "attach expected a loss of the attached model and found one that depends on trainable parameters of "
                "another module; pass others= with the other optimizers of the loop, or attach to a module that "
                "contains all of them"
            )

    def _has_no_gradients(self) -> bool:
        """Whether the gradients of the losses so far are gone; if the loop is as described, not whether they are 0."""
        grads = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        return not grads or (self._losses >= self._loop.accumulated and not any(bool(grad.any()) for grad in grads))

    def _before_step(self) -> None:
        """Updates the rate if an update is due, and writes it; the optimizer's step calls this."""
        controller = self._controller
        if controller is None:
            return
        if controller.decision is None:
            self._check_first_step(controller)
        if self._loop.automatic and self._losses > self._loop.accumulated:
            raise ConfigurationError(
                f"attach(accumulate_grad_batches={self._loop.accumulated}) expected this number of backward "
                f"passes before each optimizer.step(), and found {self._losses}; pass accumulate_grad_batches= with "
                "the number of batches that the loop accumulates, or call backward once on the sum of the losses"
            )
        self._has_decided = True
        loop = self._loop.now()
        self._check_length(controller, loop)
        controller.on_step(loop)

    def _check_length(self, controller: Controller, loop: LoopFacts) -> None:
        """Reports once that steps have fewer backward passes, and once that the run has more steps, than expected."""
        made = self._losses
        # The last step of an epoch may be made of fewer.
        if loop.automatic and 0 < made == self._last_made < loop.accumulated and "backwards" not in self._told:
            self._told.add("backwards")
            loop.notify(
                f"attach(accumulate_grad_batches={loop.accumulated}){self._label} expected this number of backward "
                f"passes before each optimizer.step(), and found {made} twice in a row; the learning rate is that of "
                f"{loop.accumulated}; pass accumulate_grad_batches={made} if this is the usual number"
            )
        self._last_made = made
        total = loop.total_steps()
        if loop.step >= total and "steps" not in self._told and controller.schedule.decays(loop):
            self._told.add("steps")
            loop.notify(
                f"attach(total_steps={total:.0f}){self._label} expected this number of optimizer steps, and the run "
                "makes more; the learning rate of the schedule's last step is kept; pass total_steps= with the "
                "optimizer steps of the whole run, such as epochs * len(loader)"
            )

    def _check_first_step(self, controller: Controller) -> None:
        groups = controller.optimizer.param_groups
        if not controller.scheduled and any("initial_lr" in group for group in groups):
            raise ConfigurationError(
                "attach expected no scheduler to be created after it, and found one; create the "
                "scheduler of an optimizer before attach(model, optimizer)"
            )
        if not controller.schedulers and any({"initial_lr", "max_lr", "min_lr"} <= set(group) for group in groups):
            raise ConfigurationError(
                "attach expected a OneCycleLR among schedulers=, since the parameter groups have its max_lr, and found "
                "none; pass attach(..., schedulers=[scheduler])"
            )
        if not self._loop.scales_loss and _called_by_scaler():
            raise ConfigurationError(
                "attach expected no factor on the loss and found a GradScaler; pass attach(..., grad_scaler=scaler)"
            )
        if self._losses == 0 and any(p.grad is not None for group in groups for p in group["params"]):
            raise ConfigurationError(
                "attach expected a backward pass before optimizer.step() and saw none that reaches the optimizer's "
                "parameters; call attach before the first loss.backward(), and do not use torch.autograd.grad "
                "instead of it"
            )

    def _after_step(self) -> None:
        """Ends an epoch with its last step, and begins the next batch."""
        controller, loop = self._controller, self._loop
        if controller is None:
            return
        loop.step += 1
        self._losses, self._has_decided = 0, False
        ended = loop.now(ended=True)
        controller.end_batch(ended)
        if ended.is_last_batch:
            controller.updater.check_remaining_losses(ended)
            controller.begin_epoch()
        controller.begin_batch(loop.now())

    def _before_other_step(self, *_: Any) -> None:
        self._attached().on_other_optimizer_step()


def attach(  # noqa: D417 (LipschitzLR describes the others)
    model: nn.Module,
    optimizer: Optimizer,
    *,
    total_steps: int | None = None,
    epoch_steps: int | None = None,
    accumulate_grad_batches: int = 1,
    schedulers: Sequence[Any] = (),
    grad_scaler: Any = None,
    others: Sequence[Optimizer] = (),
    name: str = "",
    notify: Callable[[str], None] = print,
    loss: str = "auto",
    head: str = "auto",
    bound: bounds.Bound = "strict",
    norm: bounds.NormOrAuto = "auto",
    update: Literal["epoch"] | int = "epoch",
    rule: str = "auto",
    weight_decay: float | None = None,
    min_lr: float = 0.0,
    max_lr: float | None = None,
    max_growth: float | None = None,
    dry_run: bool = False,
    on_nonfinite: Literal["keep", "raise"] = "keep",
    schedule: Literal["auto", "none"] = "auto",
    measure_every: Literal["auto"] | int = "auto",
    weights: Weights = "decayed",
    second_moment: Literal["auto", bounds.SecondMoment] = "auto",
    initial_lr: float | None = None,
) -> Attachment:
    """Sets the learning rate of an optimizer to that of :class:`~lit_lipschitz.LipschitzLR`, in any training loop.

    Call it after the optimizer and its schedulers are created and before the first forward pass. From then on, each
    ``loss.backward()`` is measured, and each ``optimizer.step()`` first sets the learning rate, when the gradients are
    unscaled and clipped. If ``torch.distributed`` is initialised before, all ranks use the same learning rate.

    Args:
        model: The network, also wrapped by DistributedDataParallel, ``torch.compile`` or Fabric.
        optimizer: Its optimizer, also wrapped by Fabric or Accelerate.
        total_steps: Optimizer steps of the run, for the decay of the built-in schedule; None if unknown.
        epoch_steps: Optimizer steps of an epoch, such as ``len(loader)``: how often ``update="epoch"`` updates the
            rate. None treats the run as one epoch, with updates in each measured step.
        accumulate_grad_batches: Number of backward passes in one optimizer step.
        schedulers: The schedulers of the optimizer; needed for OneCycleLR, CyclicLR and ReduceLROnPlateau only.
        grad_scaler: The GradScaler of the loop; those of Fabric and Accelerate are found.
        others: The other optimizers of the loop, if losses depend on the parameters of several.
        name: Part of the names of the metrics, if several optimizers are attached.
        notify: Function that gets messages, on the first rank.
        loss: This and all other arguments are those of :class:`~lit_lipschitz.LipschitzLR`.

    Raises:
        ConfigurationError: An argument is out of its range, or, during training, the loop differs from the arguments.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> control = attach(model, optimizer, total_steps=100, notify=lambda message: None)
        >>> nn.functional.cross_entropy(model(torch.ones(8, 4)), torch.zeros(8, dtype=torch.long)).backward()
        >>> optimizer.step()
        >>> control.rate > 0
        True
        >>> control.detach()
    """
    policy, options = make_settings({**locals(), "measure": "running"})
    if not (isinstance(model, nn.Module) and isinstance(optimizer, Optimizer)):
        raise ConfigurationError(
            "attach(model, optimizer) expected a torch.nn.Module and a torch.optim.Optimizer, and found "
            f"{type(model).__name__} and {type(optimizer).__name__}"
        )
    if grad_scaler and not hasattr(grad_scaler, "is_enabled"):
        raise ConfigurationError(
            f"attach(grad_scaler={grad_scaler!r}) expected the torch.amp.GradScaler of the loop; pass it, or None"
        )
    network, stepped = unwrapped_model(model), unwrapped_optimizer(optimizer)
    if stepped in _controlled:
        raise ConfigurationError(
            "attach(model, optimizer) expected an optimizer that is not attached yet, and found an attached "
            f"{type(stepped).__name__}; call detach() of that attachment first"
        )
    own = {parameter for group in stepped.param_groups for parameter in group["params"]}
    if own.isdisjoint(network.parameters()) and any(p.requires_grad for p in network.parameters()):
        raise ConfigurationError(
            "attach(model, optimizer) expected the model whose parameters the optimizer trains, and found none of them "
            f"in this {type(network).__name__}; pass the model that the optimizer was made for"
        )
    is_only = not others and all(p in own for p in network.parameters() if p.requires_grad)
    loop = PlainLoop(
        next(iter(own)).device,
        automatic=is_only,
        total_steps=total_steps,
        epoch_steps=epoch_steps,
        accumulate_grad_batches=accumulate_grad_batches,
        grad_scaler=grad_scaler or scaler_of(optimizer),
        notify=notify,
    )
    label = f" of {name}" if name else ""
    schedulers = [schedulers] if hasattr(schedulers, "step") else list(schedulers or ())
    target = Target(network, stepped, schedulers, num_optimizers=1 if is_only else 2, label=label)
    return Attachment(target, policy, options, loop, map(unwrapped_optimizer, others), name)


def _reaches(loss: Tensor, parameters: set[Tensor]) -> bool:
    """Whether the graph of a loss computes gradients of some of the parameters, or hides which ones."""
    return any(p is None or p in parameters for p in parameters_below(loss.grad_fn))


def _called_by_scaler() -> bool:
    """Whether a GradScaler that is enabled has called the optimizer's step."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is torch.amp.GradScaler.step.__code__:
            return bool(frame.f_locals["self"].is_enabled())
        frame = frame.f_back  # type: ignore[assignment]
    return False
