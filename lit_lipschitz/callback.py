"""``LipschitzLR``: the callback that sets the learning rate to the inverse of the loss's Lipschitz constant."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_lipschitz import constants, inspection, rules
from lit_lipschitz.decision import Decision, Measurement, Policy
from lit_lipschitz.errors import ConfigurationError, LitLipschitzError
from lit_lipschitz.inference import inference_pass
from lit_lipschitz.probing import Probes
from lit_lipschitz.statistics import RunningMaximum
from lit_lipschitz.writing import RateWriter


class LipschitzLR(Callback):
    r"""Sets the learning rate to 1/L, L being the Lipschitz constant of the loss in the weights of the last layer.

    The inputs of the last affine map (the head) are measured by a hook while the model trains; their size gives L
    (:mod:`lit_lipschitz.constants`), and the optimizer's rule turns L into a rate (:mod:`lit_lipschitz.rules`), anew
    every epoch or every N optimizer steps. All ranks agree on the measured values by one MAX all-reduce an update, so
    they use the same rate; the values are read to the host only then.

    The first rate comes from the first batch and applies to the step made with it. While the first interval lasts, the
    running maximum is looked at again after 1, 2, 4, 8, ... steps; each later interval uses the maximum of the one
    before. Every parameter group gets the rate times its configured rate over the first group's, so the size of the
    configured rates does not matter and their ratios do. A scheduler's value over its configured one is a factor.

    Args:
        loss: ``"auto"`` finds the loss in the autograd graph of the first step; ``"cross_entropy"`` takes your word
            that it is the mean softmax cross-entropy of the head's outputs.
        head: ``"auto"``, or the name of the last affine map as in ``named_modules()``.
        bound: Family of the constant. ``"strict"`` bounds the gradient, ``"smooth"`` the Hessian, ``"paper"`` is the
            estimate of arXiv 1902.07399.
        norm: How the head's inputs are measured: ``"frobenius"`` (of the batch), ``"sample"`` (largest row),
            ``"unit"`` (largest entry), ``"spectral"``; ``"auto"`` is the family's own.
        update: ``"epoch"``, or the number of optimizer steps between updates.
        measure: ``"running"`` measures the training batches themselves; ``"pass"`` makes a pass in inference mode over
            the training set at the start of every epoch, the paper's way (:mod:`lit_lipschitz.inference`).
        rule: ``"auto"`` follows the optimizer; a name of :data:`lit_lipschitz.rules.RULES` forces a rule: ``"inverse"``
            is 1/L, ``"adamo"`` the paper's for momentum, ``"adamo_authors"`` that of its authors' scripts.
        squared: The estimate of L squared that the rules of RMSprop and Adam use
            (:func:`lit_lipschitz.constants.squared`); ``"auto"`` is ``"scripts"`` for the authors' rules and
            ``"constant"`` for others.
        weight_decay: Coefficient of the L2 term in L; None is the optimizer's, where it adds it to the gradient.
        weights: Whose largest norm is W in the L2 term: ``"decayed"`` and all ``"parameters"`` of the optimizer, or
            ``"all"`` tensors of the network, moving statistics included, as in the authors' scripts.
        initial_lr: Rate to use until the first interval is over, in place of a measured one. The authors' rule for
            momentum starts its average from the same number.
        min_lr: No rate below this one.
        max_lr: No rate above this one.
        max_growth: No rate above this many times the one before.
        on_nonfinite: What to do when activations or the constant are not finite or the constant is 0: ``"keep"`` the
            last rate and warn once, or ``"raise"``.

    Raises:
        ConfigurationError: An argument is out of its range.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[LipschitzLR()], logger=False, enable_checkpointing=False)

    References:
        R. Yedida, S. Saha: A novel adaptive learning rate scheduler for deep neural networks, arXiv 1902.07399, 2019.
    """

    def __init__(
        self,
        loss: Literal["auto", "cross_entropy"] = "auto",
        head: str = "auto",
        bound: constants.Bound = "strict",
        norm: Literal["auto", "frobenius", "sample", "unit", "spectral"] = "auto",
        update: Literal["epoch"] | int = "epoch",
        measure: Literal["running", "pass"] = "running",
        rule: Literal[
            "auto",
            "inverse",
            "adamo",
            "rmsprop",
            "adam",
            "adamax",
            "adamo_authors",
            "rmsprop_authors",
            "adam_authors",
        ] = "auto",
        squared: Literal["auto", "constant", "text", "scripts"] = "auto",
        weight_decay: float | None = None,
        weights: inspection.Weights = "decayed",
        initial_lr: float | None = None,
        min_lr: float = 0.0,
        max_lr: float | None = None,
        max_growth: float | None = None,
        on_nonfinite: Literal["keep", "raise"] = "keep",
    ) -> None:
        super().__init__()
        _check_choice("loss", loss, ("auto", "cross_entropy"))
        _check_choice("on_nonfinite", on_nonfinite, ("keep", "raise"))
        _check_choice("measure", measure, ("running", "pass"))
        _check_choice("weights", weights, ("decayed", "parameters", "all"))
        if measure == "pass" and update != "epoch":
            raise ConfigurationError(f"LipschitzLR(measure='pass', update={update!r}): a pass is made every epoch")
        if update != "epoch" and not (type(update) is int and update >= 1):
            raise ConfigurationError(f"LipschitzLR(update={update!r}): expected 'epoch' or a number of steps >= 1")
        if initial_lr is not None and not 0 < initial_lr < math.inf:
            raise ConfigurationError(f"LipschitzLR(initial_lr={initial_lr}): expected a positive number")
        if initial_lr is not None and not min_lr <= initial_lr <= (max_lr or math.inf):
            raise ConfigurationError(
                f"LipschitzLR(initial_lr={initial_lr}): expected a rate from min_lr={min_lr} to max_lr={max_lr}"
            )
        try:
            resolved = constants.resolve_norm(bound, norm)
        except ValueError as error:
            raise ConfigurationError(f"LipschitzLR: {error}") from None
        self.policy = Policy(bound, resolved, rule, squared, weight_decay, min_lr, max_lr, max_growth)
        self.loss, self.head, self.update, self.measure, self.weights = loss, head, update, measure, weights
        self.initial_lr, self.on_nonfinite = initial_lr, on_nonfinite
        self._forget()

    def _forget(self) -> None:
        """The state before any run."""
        self._decision: Decision | None = None
        self._applied: tuple[Decision, list[float]] | None = None  # behind the last step, with the groups' rates
        self._rule_state = rules.initial_state(self.policy.rule, self.initial_lr)
        self._steps = 0  # optimizer steps since the interval began
        self._intervals = 0  # intervals that are over
        self._epoch = 0  # in which the interval began
        self._passed = -1  # the last epoch whose pass, or whose rate set by hand, an optimizer step has used
        self._summed = False  # whether the loss is a sum over the examples
        self._pass: tuple[int, Tensor] | None = None  # the epoch of a pass that no step has used yet, and W then
        self._micro_batches = 0  # batches since the last optimizer step
        self._accumulated = 1  # most batches that made one step in this interval
        self._warned = False
        # What a checkpoint brings for the probes and the writer, until they are there.
        self._stored: dict[str, Any] = {}
        self._ignored: Tensor | None = None  # whether the loss left targets out, on the device
        self._probes: Probes | None = None
        self._writer: RateWriter | None = None

    @property
    def rate(self) -> float | None:
        """The rate behind the last optimizer step at a schedule factor of 1; None before the first one."""
        return self._applied[0].lr if self._applied else None

    @property
    def lr(self) -> float | None:
        """The first parameter group's learning rate in the last optimizer step; None before the first one."""
        return self._applied[1][0] if self._applied else None

    @property
    def constant(self) -> float | None:
        """The Lipschitz constant behind the last optimizer step; None where there is none, as with a fixed rate."""
        return (self._applied[0].constant or None) if self._applied else None

    @property
    def head_name(self) -> str | None:
        """The name of the head, once the first step has told which module it is."""
        chosen = self._probes.chosen if self._probes else None
        return chosen.name if chosen else None

    # -- attach ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a second LipschitzLR and starts afresh; a checkpoint's state is loaded after this."""
        if stage != "fit":
            return
        same = [c for c in trainer.callbacks if isinstance(c, LipschitzLR)]  # type: ignore[attr-defined]
        if len(same) > 1:
            raise ConfigurationError(
                f"LipschitzLR must be the only one in charge of the rate; found {len(same)} of them in "
                "trainer.callbacks: pass one"
            )
        self._detach()
        self._forget()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches to the head (before its first forward, as torch.compile needs) and to the optimizer."""
        if len(trainer.optimizers) != 1:
            raise ConfigurationError(
                f"LipschitzLR sets the rate of one optimizer; configure_optimizers of {type(pl_module).__name__} "
                f"returned {len(trainer.optimizers)}: return one, or remove the callback"
            )
        if self.measure == "pass" and not is_overridden("forward", pl_module):
            raise ConfigurationError(
                f"LipschitzLR(measure='pass') calls the module, and {type(pl_module).__name__} has no forward; define "
                "one, or use measure='running'"
            )
        optimizer = trainer.optimizers[0]
        self.policy.rule_for(type(optimizer).__name__, optimizer.param_groups)
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        self._writer = RateWriter(optimizer, schedulers, self._stored.get("references", ()))
        device = trainer.strategy.root_device
        measured = self._stored.get("measured")
        self._probes = Probes(pl_module, self.head, lambda head: self._statistic(head, device), device, measured)
        self._ignored = torch.zeros((), dtype=torch.bool, device=device)

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

    def _detach(self) -> None:
        if self._probes is not None:
            self._probes.remove()
        if self._writer is not None:
            self._writer.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the hooks off."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Takes the hooks off a run that was interrupted, which Lightning does not tear down."""
        self._detach()

    # -- find head and loss, on the first step -----------------------------------------------------------------------

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """On the first step, checks what the loss is and takes the head from its graph."""
        if self._probes is None:
            return
        if self._probes.chosen is None:
            self._probes.choose(self._check_loss(trainer, loss) if self.loss == "auto" else None)
        if self.loss == "auto" and self.policy.norm != "sample":
            ignored = inspection.ignored_targets(loss)
            if ignored is not None and self._ignored is not None:
                self._ignored.logical_or_(ignored)

    def _check_loss(self, trainer: Trainer, loss: Tensor) -> nn.Parameter | None:
        found = inspection.find_cross_entropy(loss)
        # Lightning divides by the accumulated batches first, and a GradScaler multiplies after that.
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        expected = (scaler.get_scale() if scaler is not None else 1.0) / trainer.accumulate_grad_batches
        if not math.isclose(found.coefficient, expected, rel_tol=1e-5):
            raise ConfigurationError(
                f"LipschitzLR found a cross-entropy weighted by {found.coefficient / expected:g}, for which it has no "
                "constant; return the plain loss, or pass loss='cross_entropy' to have the weight disregarded (as is "
                "right where it is one over the batches that you accumulate by hand)"
            )
        if found.chain and self.head == "auto":
            raise ConfigurationError(
                f"LipschitzLR looked for the affine map that makes the logits and found {' > '.join(found.chain)}; "
                "feed the cross-entropy with the map's outputs, or pass head= with its name to have what comes after "
                "it disregarded"
            )
        self._summed = found.summed
        return found.head_weight

    # -- measure, reduce, decide, write ------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets batches that an epoch left without a step."""
        self._micro_batches = 0

    def _measure_by_pass(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The pass of an epoch, unless it has had one: a checkpoint may have interrupted it since."""
        assert self._probes is not None
        epoch = trainer.current_epoch
        made = self._pass is not None and self._pass[0] == epoch
        by_hand = self._passed < 0 and self.initial_lr is not None
        if made or by_hand or self._passed == epoch:
            return
        self._probes.reset()
        self._probes.arm("inference")
        try:
            inference_pass(trainer, pl_module)
        finally:
            self._probes.arm("off")
        self._pass = epoch, inspection.weight_norm(trainer.optimizers[0], pl_module, self.weights)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Measures from here to the batch's end, and counts the batches that make one optimizer step."""
        assert self._probes is not None
        if self.measure == "pass":
            # Not in on_train_epoch_start, which Lightning leaves out where it resumes at the end of an epoch.
            self._measure_by_pass(trainer, pl_module)
        self._probes.arm("training" if self.measure == "running" else "watching")
        self._micro_batches += 1

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Decides where an update is due, and writes the rate before the parameters move."""
        assert self._probes is not None
        if self._probes.chosen is None:
            # No on_before_backward has come. The batch was skipped, or manual optimization has a backward of its own.
            if pl_module.automatic_optimization:
                return
            if self.loss == "auto":
                raise ConfigurationError(
                    "LipschitzLR looked for the loss in manual_backward, which was not called before the optimizer's "
                    "step; call self.manual_backward(loss), or pass loss='cross_entropy'"
                )
            self._probes.choose(None)
        self._steps += 1
        if self._steps == 1:
            self._epoch = trainer.current_epoch
        by_hand = not pl_module.automatic_optimization
        accumulated = self._micro_batches if by_hand else trainer.accumulate_grad_batches
        self._accumulated = accumulated if self.measure == "pass" else max(self._accumulated, accumulated)
        self._micro_batches = 0
        first = self._intervals == 0
        before = self._decision
        if self._pass is not None:
            self._decide(trainer, optimizer, interval_over=True)
            self._pass = None
        elif first and self.initial_lr is not None:
            self._decision = self._decision or Decision(self.initial_lr)
        elif first and self.measure == "running" and self._steps & (self._steps - 1) == 0:
            self._decide(trainer, optimizer, interval_over=False)
        self._passed = trainer.current_epoch
        self._write(trainer, pl_module, changed=self._steps == 1 or self._decision is not before)

    def _write(self, trainer: Trainer, pl_module: LightningModule, changed: bool) -> None:
        assert self._writer is not None
        rates = self._writer.write(self._decision.lr if self._decision else None)
        self._applied = (self._decision or Decision(rates[0]), rates)
        if changed or (trainer.global_step + 1) % _logging_interval(trainer) == 0:
            # As tensors of the host: Lightning would copy numbers to the device, and wait.
            metrics = {name: torch.tensor(value, dtype=torch.float64) for name, value in self._metrics().items()}
            pl_module.log("lipschitz/lr", metrics.pop("lipschitz/lr"), prog_bar=True, batch_size=1)
            pl_module.log_dict(metrics, batch_size=1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends the interval with its last step, so that an epoch's checkpoint holds values that all ranks share."""
        assert self._probes is not None
        assert self._writer is not None
        self._probes.arm("off")
        if self._applied is None and self._writer.steps and not pl_module.automatic_optimization:
            raise ConfigurationError(
                "LipschitzLR writes the rate when Lightning's optimizer steps, and a step went past it; call "
                "self.optimizers().step(), not the step of the optimizer inside"
            )
        if self._probes.chosen is None or self.measure == "pass":
            return
        over = self._steps >= int(self.update) if self.update != "epoch" else self._epoch_over(trainer)
        if over and self._steps:
            self._decide(trainer, trainer.optimizers[0], interval_over=True)
            self._probes.chosen.statistic.reset()
            self._steps = 0
            self._accumulated = 1
            self._intervals += 1

    def _epoch_over(self, trainer: Trainer) -> bool:
        # Where the last batch can't be known or the rest of an epoch is skipped, the next epoch's first step ends it.
        return trainer.is_last_batch or trainer.current_epoch > self._epoch

    def _decide(self, trainer: Trainer, optimizer: Optimizer, interval_over: bool) -> None:
        """One reduction, then a decision that every rank makes alike."""
        assert self._probes is not None
        assert self._probes.chosen is not None
        measured = self._reduce(trainer, optimizer, self._probes.chosen.statistic)
        if self.measure == "pass" and not measured.batch_size and not measured.dropped:
            raise ConfigurationError(
                f"LipschitzLR(measure='pass') called {type(trainer.lightning_module).__name__} with the inputs of "
                f"the training batches, and the head {self._probes.chosen.name!r} did not run; let forward() go "
                "through the head, or use measure='running'"
            )
        if measured.ignored:
            raise ConfigurationError(
                f"LipschitzLR found targets that the loss ignores (ignore_index), and norm={self.policy.norm!r} needs "
                "to know how many; pass bound='strict', norm='sample', which holds for any number"
            )
        _, num_classes = inspection.head_size(self._probes.chosen.head)
        if num_classes < 2:
            raise ConfigurationError(
                f"LipschitzLR: the head {self._probes.chosen.name!r} has 1 output, and the cross-entropy needs at "
                "least 2 classes; pass head= with the name of the map that makes the logits"
            )
        outcome = self.policy.decide(
            measured,
            num_classes=num_classes,
            optimizer=type(optimizer).__name__,
            groups=optimizer.param_groups,
            state=self._rule_state,
            last=self._decision,
        )
        self._report(measured, usable=outcome is not None)
        if outcome is None:
            return
        decision, rule_state = outcome
        if decision.cap and (self._decision is None or self._decision.cap != decision.cap):
            rank_zero_info(f"LipschitzLR: {decision.cap} binds, the rate is {decision.lr:.4g}")
        self._decision = decision
        if interval_over:
            self._rule_state = rule_state

    def _reduce(self, trainer: Trainer, optimizer: Optimizer, statistic: RunningMaximum) -> Measurement:
        """The one collective of an update: MAX over ranks of the statistic's four values, W and ignored."""
        assert self._ignored is not None
        if self._pass is not None:
            _, weights = self._pass
        else:
            weights = inspection.weight_norm(optimizer, trainer.lightning_module, self.weights)
        weights = weights.to(statistic.values.device).reshape(1)
        # A NaN's fate in a MAX depends on the order of the ranks; -1 stands for it until all agree.
        weights = torch.where(torch.isfinite(weights), weights, -1.0)
        values = torch.cat([statistic.values, weights, self._ignored.float().reshape(1)])
        reduced = trainer.strategy.reduce(values, reduce_op="max")
        largest, rows, dropped, squares, weight_norm, ignored = (float(value) for value in reduced.tolist())
        pieces = trainer.world_size * self._accumulated
        batch_size = int(rows) * pieces
        if statistic.mean:
            largest *= math.sqrt(batch_size)
        elif self._of_batch:
            largest *= math.sqrt(pieces)
        weight_norm = weight_norm if weight_norm >= 0 else math.nan
        squares *= math.sqrt(pieces)
        # Ranks and accumulated batches are averaged whatever the loss does with the examples of one of them.
        summed = int(rows) if self._summed else 1
        return Measurement(largest, weight_norm, batch_size, int(dropped), ignored > 0, squares, summed)

    def _report(self, measured: Measurement, usable: bool) -> None:
        """Says once, or raises, what was not finite."""
        if usable and not measured.dropped:
            return
        message = f"{measured.dropped} batches had non-finite activations and were left out of the maximum"
        if not usable:
            last = "the configured rate" if self._decision is None else f"the last rate, {self._decision.lr:.4g}"
            message = (
                f"no constant can be computed from activations of size {measured.activation_norm:g}, weights of size "
                f"{measured.weight_norm:g} and {measured.dropped} batches with non-finite activations; keeping {last}"
            )
        if self.on_nonfinite == "raise":
            raise LitLipschitzError(f"LipschitzLR: {message} (on_nonfinite='keep' would go on)")
        if not self._warned:
            rank_zero_warn(f"LipschitzLR: {message}")
            self._warned = True

    # -- log and checkpoint ------------------------------------------------------------------------------------------

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives every logger a point for the epoch's last step, however short the epoch."""
        if self._applied is not None and trainer.global_step % _logging_interval(trainer) != 0:
            for logger in trainer.loggers:
                logger.log_metrics(self._metrics(), step=trainer.global_step - 1)

    def _metrics(self) -> dict[str, float]:
        assert self._applied is not None
        decision, rates = self._applied
        metrics = {
            "lipschitz/lr": rates[0],
            "lipschitz/constant": decision.constant,
            "lipschitz/activation_norm": decision.activation_norm,
            "lipschitz/weight_norm": decision.weight_norm,
        }
        if self.policy.limited:
            metrics["lipschitz/capped"] = float(bool(decision.cap))
        return metrics

    def _settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that was saved."""
        policy = self.policy
        return {
            "bound": policy.bound,
            "norm": policy.norm,
            "rule": policy.rule,
            "squared": policy.squared,
            "weight_decay": policy.weight_decay,
            "measure": self.measure,
            "weights": self.weights,
        }

    def state_dict(self) -> dict[str, Any]:
        """The state, as tensors and plain values that torch.load(weights_only=True) admits."""
        return {
            "settings": self._settings(),
            "decision": asdict(self._decision) if self._decision else None,
            "rule_state": asdict(self._rule_state),
            "steps": self._steps,
            "intervals": self._intervals,
            "epoch": self._epoch,
            "passed": self._passed,
            "accumulated": self._accumulated,
            "warned": self._warned,
            "measured": self._probes.state_dict() if self._probes else self._stored.get("measured"),
            "references": self._writer.references if self._writer else self._stored.get("references", []),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes the state of :meth:`state_dict`.

        Raises:
            LitLipschitzError: It was saved with other settings of what is measured and computed.
        """
        settings = self._settings()
        if set(state_dict.get("settings", ())) != set(settings):
            raise LitLipschitzError(
                "LipschitzLR's state in the checkpoint is of another version of lit-lipschitz; resume with the version "
                "that it was saved with, or start anew without the checkpoint"
            )
        for name, value in state_dict["settings"].items():
            if value != settings[name]:
                raise LitLipschitzError(
                    f"LipschitzLR's state in the checkpoint was saved with {name}={value!r}, and this run has "
                    f"{name}={settings[name]!r}; resume with the settings that it was saved with, or start anew "
                    "without the checkpoint"
                )
        self._decision = Decision(**state_dict["decision"]) if state_dict["decision"] else None
        self._rule_state = rules.RuleState(**state_dict["rule_state"])
        self._steps = state_dict["steps"]
        self._intervals = state_dict["intervals"]
        self._epoch = state_dict["epoch"]
        self._passed = state_dict["passed"]
        self._accumulated = state_dict["accumulated"]
        self._warned = state_dict["warned"]
        self._stored = {"measured": state_dict["measured"], "references": state_dict["references"]}
        # Some strategies load after on_fit_start, when the probes are there.
        if self._probes is not None and self._stored["measured"] is not None:
            self._probes.load_state_dict(self._stored["measured"])


def _logging_interval(trainer: Trainer) -> int:
    return max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigurationError(f"LipschitzLR({name}={value!r}): expected one of {', '.join(map(repr, choices))}")
