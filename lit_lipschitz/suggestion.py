"""``suggest``: estimates the learning rate before training, from a few batches."""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_lipschitz.attachment import attach
from lit_lipschitz.control.controller import Controller
from lit_lipschitz.control.plain_loop import unwrapped_model, unwrapped_optimizer
from lit_lipschitz.control.policy import Decision
from lit_lipschitz.errors import ConfigurationError
from lit_lipschitz.measurement.gradient_noise import NoiseScale, gram_matrix, noise_scale
from lit_lipschitz.measurement.norms import as_real
from lit_lipschitz.measurement.random_state import kept_random_state
from lit_lipschitz.measurement.trial_step import TrialError, trial_step
from lit_lipschitz.optim.lr_writer import LRWriter

CURVE_DECADES = 2  #: The curve goes from the rate over 10 to this power to the rate times it.
CURVE_POINTS_PER_DECADE = 4


@dataclass(frozen=True)
class LossCurve:
    """The loss on a held-out batch after one optimizer step, against the learning rate of that step.

    Attributes:
        rates: Learning rates, on a logarithmic grid; the middle one is the suggested rate.
        losses: The loss after a step at each of them, from the same weights.
        loss: The loss without a step.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    loss: float


@dataclass(frozen=True)
class Suggestion:
    """The result of :func:`suggest`.

    Attributes:
        rate: Learning rate of the first step with the first batch, at a schedule factor of 1.
        rates: The learning rate from each of the batches.
        constant: L with the first batch.
        kind: Whether L is a proven ``"bound"``, ``"measured"``, or the paper's ``"estimate"``.
        meaning: What L is, in words.
        loss: Name of the loss that was recognised, or ``"measured"``.
        output_layers: Name of the output layer, or of several.
        batch_size: n, the number of examples that an optimizer step averages over.
        noise: The gradient noise scale; None if there was only one batch.
        curve: The loss against the learning rate, if it was asked for.
    """

    rate: float
    rates: tuple[float, ...]
    constant: float
    kind: Literal["bound", "measured", "estimate"]
    meaning: str
    loss: str
    output_layers: str
    batch_size: int
    noise: NoiseScale | None
    curve: LossCurve | None = None

    @property
    def rate_range(self) -> tuple[float, float]:
        """The smallest and the largest rate of a batch."""
        return min(self.rates), max(self.rates)


def suggest(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor],
    *,
    num_batches: int = 8,
    curve: bool = False,
    accumulate_grad_batches: int = 1,
    clip: Callable[[], Any] | None = None,
    **settings: Any,
) -> Suggestion:
    r"""Estimates the learning rate that :class:`~lit_lipschitz.LipschitzLR` would start with, before training.

    For each batch there is a forward and a backward pass in training mode; the optimizer's step ends as soon as the
    rate is known, so no weight moves. Afterwards, also after an error, weights, buffers, gradients, modes, optimizer
    and random numbers are exactly as before. Call it before :func:`~lit_lipschitz.attach`.

    It also estimates the gradient noise scale :math:`tr(\Sigma) / |G|^2` of McCandlish, Kaplan, Amodei and others
    (:mod:`lit_lipschitz.measurement.gradient_noise`), where G is the expected gradient and :math:`\Sigma` the
    covariance of the gradient of one example. Batches much larger than this save few steps. It is the value at the
    current weights; during training it grows, often tenfold or more. The estimate from a few batches is rough and has
    a confidence interval. The gradients of all batches are kept in main memory for it.

    With ``curve``, one optimizer step with the first batch is tried at 17 learning rates, from a hundredth of the
    suggested rate to a hundred times it. Each starts from the same weights and state, and the loss of the last batch is
    computed after it, with the same dropout. The suggested rate should lie where this loss falls. With momentum b, a
    run moves up to 1 / (1 - b) times as far at the same rate as this single step. The update is that of a copy of the
    optimizer at a small rate, scaled.

    Args:
        model: The network; a compiled one runs without compilation.
        optimizer: Its optimizer.
        batches: A DataLoader or other iterable of batches, of which the first ones are used; they are moved to the
            device of the parameters.
        loss_fn: Called as ``loss_fn(model(inputs), targets)`` if a batch is a pair, otherwise as
            ``loss_fn(model, batch)``; returns the loss, shape ().
        num_batches: Number of optimizer steps to measure; fewer if there are not enough batches.
        curve: Whether to compute the curve.
        accumulate_grad_batches: Number of batches in one optimizer step, which minimizes the mean of their losses.
        clip: Clips the gradients as the training loop does; called before each optimizer step.
        settings: ``total_steps``, ``schedulers``, and the arguments of LipschitzLR that ``attach`` also has.

    Raises:
        ConfigurationError: An argument is out of its range, or a loss is not finite.
        LitLipschitzError: A batch gives no rate, for example because its gradient is 0.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> batches = [(torch.randn(8, 4), torch.arange(8) % 2) for _ in range(4)]
        >>> found = suggest(model, optimizer, batches, nn.functional.cross_entropy)
        >>> found.rate_range[0] <= found.rate <= found.rate_range[1]
        True
        >>> found.loss, found.batch_size
        ('cross_entropy', 8)

    References:
        S. McCandlish, J. Kaplan, D. Amodei and others: An Empirical Model of Large-Batch Training, arXiv 1812.06162,
        2018. L. N. Smith: Cyclical Learning Rates for Training Neural Networks, arXiv 1506.01186, 2015, for the curve.
    """
    if not (isinstance(model, nn.Module) and isinstance(optimizer, Optimizer)):
        raise ConfigurationError(
            "suggest(model, optimizer, ...) expected a torch.nn.Module and a torch.optim.Optimizer, and found "
            f"{type(model).__name__} and {type(optimizer).__name__}"
        )
    steps = _Steps(model, optimizer, loss_fn, clip, {**settings, "accumulate_grad_batches": accumulate_grad_batches})
    _check(steps.optimizer, num_batches, settings)
    trials: list[_Trial] = []
    drawn = None
    with _restored(unwrapped_model(model), steps.optimizer):
        for group in _groups(batches, num_batches, accumulate_grad_batches, steps.parameters[0].device):
            last = group
            trials.append(steps.attempt(group, len(trials) + 1))
            if curve and len(trials) == 1:
                updates = steps.updates()
        if not trials:
            raise ConfigurationError(
                f"suggest expected at least {accumulate_grad_batches} batches and found fewer; pass a DataLoader, or a "
                "list of batches"
            )
        if curve:
            drawn = steps.curve(last, updates, trials[0].decision.lr)
    first, rates = trials[0], tuple(trial.decision.lr for trial in trials)
    noise = None
    if len(trials) > 1:
        noise = noise_scale(gram_matrix([one.gradient for one in trials]), [one.size for one in trials])
    found = first.decision.constant, first.kind, first.meaning, first.loss, first.output_layers
    return Suggestion(rates[0], rates, *found, first.size, noise, drawn)


@dataclass
class _Trial:
    """What one optimizer step would have been made with."""

    decision: Decision
    kind: Literal["bound", "measured", "estimate"]  # of constant
    loss: str
    output_layers: str
    size: int  # examples
    gradient: list[Tensor | None]  # of each parameter, on the CPU, before it is clipped

    @property
    def meaning(self) -> str:
        """What the constant is, in words."""
        return next(term.meaning for term in self.decision.terms if term.symbol == "L")


class _StepEnded(Exception):
    """Ends a step of the optimizer, whose rate is decided, before a parameter moves."""


def _check(optimizer: Optimizer, num_batches: int, settings: Mapping[str, Any]) -> None:
    if type(num_batches) is not int or num_batches < 1:
        raise ConfigurationError(f"suggest(num_batches={num_batches!r}): expected a number of at least 1")
    for name, reason in (
        ("grad_scaler", "the loss is not scaled here"),
        ("initial_lr", "it is the first learning rate, and nothing is computed"),
    ):
        if settings.get(name) is not None:
            raise ConfigurationError(f"suggest({name}=...): {reason}; leave it out")
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", {}).values()
    if any(isinstance(getattr(hook, "__self__", None), LRWriter) for hook in hooks):
        raise ConfigurationError(
            "suggest expected an optimizer that is not controlled yet, and found one that attach or LipschitzLR "
            "controls; call suggest before attach, or call detach() first"
        )


def _groups(batches: Iterable[Any], count: int, accumulated: int, device: torch.device) -> Iterator[list[Any]]:
    """The batches of each optimizer step, on a device, without a last group that is incomplete."""
    iterator = iter(batches)
    for _ in range(count):
        group = [_moved(batch, device) for batch in islice(iterator, accumulated)]
        if len(group) < accumulated:
            return
        yield group


def _moved(batch: Any, device: torch.device) -> Any:
    """A batch on a device."""
    if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
        return type(batch)(_moved(part, device) for part in batch)
    if type(batch) is dict:
        return {key: _moved(part, device) for key, part in batch.items()}
    return batch.to(device) if callable(getattr(batch, "to", None)) else batch


def _num_examples(batch: Any) -> int | None:
    """The length of the first tensor of a batch; None without one."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else None
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return next((count for part in parts if (count := _num_examples(part)) is not None), None)


class _Steps:
    """Optimizer steps that begin and do not end."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_fn: Callable[[Any, Any], Tensor],
        clip: Callable[[], Any] | None,
        settings: dict[str, Any],
    ) -> None:
        self._model, self._wrapped, self._loss_fn, self._clip = model, optimizer, loss_fn, clip
        self.optimizer = unwrapped_optimizer(optimizer)
        self.parameters: list[Tensor] = [one for group in self.optimizer.param_groups for one in group["params"]]
        self._settings = {"notify": lambda message: None, "on_nonfinite": "raise", **settings}

    def attempt(self, group: Sequence[Any], number: int) -> _Trial:
        """Begins the optimizer step of some batches, up to the decision on its learning rate; leaves its gradients."""
        for parameter in self.parameters:
            parameter.grad = None
        total = 0.0
        with attach(self._model, self._wrapped, **self._settings) as control:
            for batch in group:
                loss = self._loss(batch) / len(group)
                torch.autograd.backward(loss)
                total += loss.item()
            if not math.isfinite(total):
                raise ConfigurationError(
                    f"suggest expected a finite loss and found {total} for batch {number}; check the batch and the "
                    "initial weights"
                )
            gradient = [_on_cpu(parameter.grad) for parameter in self.parameters]
            if self._clip is not None:
                self._clip()
            self._begin_step()
            controller = control.controller
            assert isinstance(controller, Controller)
            decision, measurement, found = controller.decision, controller.measurement, controller.found
        if decision is None or not decision.rule or measurement is None or found is None:
            raise ConfigurationError(
                f"suggest expected an optimizer that can be copied, and found {type(self.optimizer).__name__}, whose "
                "learning rate is known only after its own first step; train with attach or LipschitzLR"
            )
        size = sum(_num_examples(batch) or 0 for batch in group) * measurement.ranks
        loss_name = "measured" if found.measured else found.loss.name
        kind: Literal["bound", "measured", "estimate"] = "estimate" if controller.policy.bound == "paper" else "bound"
        if decision.is_measured:
            kind = "measured"
        return _Trial(decision, kind, loss_name, found.hook.name, size or measurement.batch_size, gradient)

    def _begin_step(self) -> None:
        """Lets the optimizer begin a step, and ends it before a parameter moves."""

        def end(*_: Any) -> None:
            raise _StepEnded

        handle = self.optimizer.register_step_pre_hook(end)  # after that of the controller, which decides
        try:
            with suppress(_StepEnded):
                type(self.optimizer).step(self.optimizer)
        finally:
            handle.remove()

    def _loss(self, batch: Any) -> Tensor:
        is_pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        loss = self._loss_fn(self._model(batch[0]), batch[1]) if is_pair else self._loss_fn(self._model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ConfigurationError(f"suggest expected one number from loss_fn and found {found}; return the mean")
        return loss

    def updates(self) -> list[Tensor | None]:
        """What the coming optimizer step moves each parameter by, over the learning rate of the first group."""
        try:
            update_of = trial_step(self.optimizer, keep_decay=True)
        except TrialError as error:
            raise ConfigurationError(
                f"suggest(curve=True) expected an optimizer that can be copied, and found "
                f"{type(self.optimizer).__name__} ({error}); pass curve=False"
            ) from None
        groups = self.optimizer.param_groups
        rates = [_configured(group) / _configured(groups[0]) for group in groups]
        return [
            None if parameter.grad is None else rate * update_of(parameter)
            for group, rate in zip(groups, rates, strict=True)
            for parameter in group["params"]
        ]

    @torch.no_grad()
    def curve(self, batches: Sequence[Any], updates: Sequence[Tensor | None], rate: float) -> LossCurve:
        """The loss of some batches after a step at each rate of the grid around one."""
        before = [parameter.detach().clone() for parameter in self.parameters]
        number = CURVE_DECADES * CURVE_POINTS_PER_DECADE
        rates = [rate * 10 ** (i / CURVE_POINTS_PER_DECADE) for i in range(-number, number + 1)]
        try:
            losses = [self._loss_at(one, batches, before, updates) for one in (0.0, *rates)]
        finally:
            for parameter, value in zip(self.parameters, before, strict=True):
                parameter.copy_(value)
        return LossCurve(tuple(rates), tuple(losses[1:]), losses[0])

    def _loss_at(
        self, rate: float, batches: Sequence[Any], before: Sequence[Tensor], updates: Sequence[Tensor | None]
    ) -> float:
        for parameter, value, update in zip(self.parameters, before, updates, strict=True):
            parameter.copy_(value)
            if update is not None:
                as_real(parameter).sub_(update, alpha=rate)
        with kept_random_state(parameter.device for parameter in self.parameters):
            return sum(self._loss(batch).item() for batch in batches) / len(batches)


def _configured(group: Mapping[str, Any]) -> float:
    return float(group.get("initial_lr", group["lr"]))


def _on_cpu(grad: Tensor | None) -> Tensor | None:
    if grad is None:
        return None
    dense = as_real(grad.detach().to_dense() if grad.is_sparse else grad.detach())
    return dense.to("cpu", torch.float64 if dense.dtype == torch.float64 else torch.float32, copy=True)


@contextmanager
def _restored(model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """Trains inside, and restores buffers, modes, gradients, the optimizer's settings and random numbers."""
    parts, groups = list(model.modules()), optimizer.param_groups
    parameters = {*model.parameters(), *(one for group in groups for one in group["params"])}
    modes = [(part, part.training) for part in parts]
    buffers = [(part._buffers, dict(part._buffers)) for part in parts]
    values = [(one, one.clone()) for _, own in buffers for one in own.values() if one is not None]
    grads, known = [(one, one.grad) for one in parameters], set(optimizer.state)
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    values += [(one, one.clone()) for own in settings for one in own.values() if isinstance(one, Tensor)]
    with ExitStack() as stack:
        stack.enter_context(kept_random_state(one.device for one in parameters))
        stack.enter_context(torch.enable_grad())
        if "torch._dynamo" in sys.modules:  # hooks on layers that have run compiled would not be called
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            if not model.training:
                model.train()
            yield
        finally:
            with torch.no_grad():
                for tensor, value in values:
                    tensor.copy_(value)
            for own, before in buffers:
                own.clear()
                own.update(before)
            for group, before in zip(groups, settings, strict=True):
                group.update(before)
            for one in set(optimizer.state) - known:  # made by reading them
                del optimizer.state[one]
            for one, grad in grads:
                one.grad = grad
            for part, training in modes:
                part.training = training
