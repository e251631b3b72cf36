"""What else the rate could have been: the variants that were tried before the defaults were chosen, by validation.

    python benchmarks/variants.py --variants "adamw: mean of readings" --tasks "digits_mlp;mnist_cnn" [--seeds 0,1,2]
    python benchmarks/variants.py                      # the table of results/variants.jsonl

Each is LipschitzLR's own constant (a dry run) times what the variant makes of it, with the same warm-up and decay. The
table is of the validation part. Schedule-Free has its own warm-up, of a tenth of the run, and no decay.
"""

import abc
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from compare import Recipe, _adamw, _mean_and_error, _quiet, _schedule_free, _sgd, run
from rows import add_row, read_rows, results_parser
from sensitivity import VARIANTS as MNIST_MLP
from tasks import TASKS
from torch import Tensor

from lit_lipschitz import LipschitzLR
from lit_lipschitz.measurement.optimizer_updates import lengths, lengths_of_weights, weights_of
from lit_lipschitz.measurement.scale_invariance import ScaleInvariance

RESULTS = Path(__file__).parent / "results" / "variants.jsonl"
ROOT = math.sqrt(10)  # 1 / sqrt(1 - 0.9)
ALL = {**TASKS, "mnist_mlp": MNIST_MLP["middle"], "mnist_mlp, batch 512": MNIST_MLP["batch 512"]}


class Variant(L.Callback, abc.ABC):
    """Writes the rate of a variant, after LipschitzLR has computed its own."""

    def __init__(self, ours: LipschitzLR) -> None:
        self.ours, self.steps, self.memory = ours, 0, dict[str, float]()
        self.examples = 0  # that a step's loss averages over; a text's tokens

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Writes it, times the scheduler's factor."""
        self.steps += 1
        task, targets = pl_module.task, pl_module.data.train[1]
        self.examples = task.batch_size * targets[0].numel()  # type: ignore[operator]
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        factor = schedulers[0].get_last_lr()[0] if schedulers else 1.0
        assert self.ours.rate is not None
        rate = self.rate(self.ours.rate, optimizer)
        for group in optimizer.param_groups:
            group["lr"] = rate * factor

    @abc.abstractmethod
    def rate(self, inverse: float, optimizer: Any) -> float:
        """The variant's rate from 1/L."""

    def mean(self, name: str, value: float) -> float:
        """The mean of a value over the calls so far."""
        count = self.memory[f"{name} count"] = self.memory.get(f"{name} count", 0) + 1
        mean = self.memory.get(name, 0.0)
        self.memory[name] = mean + (value - mean) / count
        return self.memory[name]


class Times(Variant):
    """SGD at a number times 1/L."""

    def __init__(self, ours: LipschitzLR, number: float) -> None:
        super().__init__(ours)
        self.number = number

    def rate(self, inverse: float, optimizer: Any) -> float:
        """The product."""
        return self.number * inverse


class Root(Times):
    """SGD at a number times sqrt(m) / L."""

    def rate(self, inverse: float, optimizer: Any) -> float:
        """The product."""
        return self.number * math.sqrt(self.examples) * inverse


class MeanOfInverses(Variant):
    """SGD at the mean of 1/L over all steps so far."""

    def rate(self, inverse: float, optimizer: Any) -> float:
        """The mean."""
        return self.mean("inverse", inverse)


class Grafted(Variant):
    """Adam's direction, a number times SGD's length; how readings of the lengths become a rate is the variant."""

    every = 16

    def __init__(self, ours: LipschitzLR, number: float = 1.0) -> None:
        super().__init__(ours)
        self.number = number

    def rate(self, inverse: float, optimizer: Any) -> float:
        """The rate after the last reading."""
        if self.steps % self.every == 0 or self.steps & (self.steps - 1) == 0:
            gradient, step = self.lengths(optimizer)
            self.memory["rate"] = self.read(self.scale(optimizer, gradient, step), inverse)
        return self.number * ROOT * self.memory["rate"] * self.again(inverse)

    def lengths(self, optimizer: Any) -> tuple[float, float]:
        """Of the gradient and of the step at a rate of 1, over all parameters together."""
        gradient, step = lengths(optimizer).tolist()
        return gradient, step

    def scale(self, optimizer: Any, gradient: float, step: float) -> float:
        """Length of SGD's step, without momentum, over that of Adam's, at rates of 1."""
        return gradient / step

    def again(self, inverse: float) -> float:
        """What is multiplied anew in each step."""
        return inverse

    def read(self, scale: float, inverse: float) -> float:
        """Takes a reading in."""
        recent = self.memory.get("recent")
        self.memory["recent"] = scale if recent is None else math.sqrt(recent * scale)
        return self.memory["recent"]


class EachStep(Grafted):
    """Each step's own lengths."""

    every = 1

    def read(self, scale: float, inverse: float) -> float:
        """As it is."""
        return scale


class Capped(Grafted):
    """Smoothed, and at most the mean so far."""

    def read(self, scale: float, inverse: float) -> float:
        """The smaller one."""
        recent = super().read(scale, inverse)
        return min(recent, self.mean("recent mean", recent))


class Smallest(Grafted):
    """The smallest smoothed reading so far."""

    def read(self, scale: float, inverse: float) -> float:
        """The minimum."""
        self.memory["least"] = min(self.memory.get("least", math.inf), super().read(scale, inverse))
        return self.memory["least"]


class First(Grafted):
    """The mean of the readings after 1, 2, 4, 8 and 16 steps."""

    def read(self, scale: float, inverse: float) -> float:
        """The mean, which stays."""
        return self.mean("first", scale) if self.steps <= 16 else self.memory["first"]


class Lasting(Grafted):
    """The mean of the first readings, or of all where that is larger."""

    def read(self, scale: float, inverse: float) -> float:
        """The larger one."""
        if self.steps <= 16:
            self.mean("first", scale)
        return max(self.memory["first"], self.mean("all", scale))


class MeanOfReadings(Grafted):
    """The mean over all readings of the smoothed scale over L."""

    def again(self, inverse: float) -> float:
        """L is in the mean."""
        return 1.0

    def read(self, scale: float, inverse: float) -> float:
        """The mean."""
        return self.mean("rates", super().read(scale, inverse) * inverse)


class Velocity(MeanOfReadings):
    """The length is that of SGD's step with momentum, from Adam's own moving average of the gradient."""

    def scale(self, optimizer: Any, gradient: float, step: float) -> float:
        """The same, with momentum, over the factor that stands for it elsewhere."""
        square = 0.0
        for group in optimizer.param_groups:
            beta = group["betas"][0]
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                before = beta * state["exp_avg"] / (1 - beta) if state else 0.0
                square += float((parameter.grad + before).norm()) ** 2
        return math.sqrt(square) / step / ROOT


class Seen(Capped):
    """AdamW with L's slope as the batch has it, not the steepest one: the norm of the loss's gradient in the outputs.

    |g| / (|u| |G| |A|) is how much of the examples' gradients agrees. It falls with the root of the batch where they do
    not, which the factor of the rule ``noise``, at most 1, takes back.
    """

    def __init__(self, ours: LipschitzLR, number: float = 1.0) -> None:
        super().__init__(ours, number)
        self.inputs = self.outputs = math.nan  # norms of A and G in the last batch
        self.hooked = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watches the head, once its name is known: from the second step on."""
        if self.hooked or not self.ours.head_name:
            return
        head, self.hooked = pl_module.get_submodule(self.ours.head_name), True

        def see(module: Any, arguments: tuple[Tensor, ...]) -> None:
            if torch.is_grad_enabled():
                rows = arguments[0].detach().flatten(0, -2)
                self.inputs = math.sqrt(float(rows.square().sum()) + len(rows) * (module.bias is not None))

        def back(module: Any, inwards: Any, outwards: tuple[Tensor, ...]) -> None:
            self.outputs = float(outwards[0].norm())

        head.register_forward_pre_hook(see)
        head.register_full_backward_hook(back)

    def rate(self, inverse: float, optimizer: Any) -> float:
        """The first step is at the plain rate, within the warm-up."""
        beta = optimizer.param_groups[0]["betas"][0]
        if not self.hooked:
            gradient, step = self.lengths(optimizer)
            return self.number * gradient / step * inverse
        noise = min((1 - beta) * math.sqrt(self.examples / 2), 1.0)
        return super().rate(inverse, optimizer) / ROOT * noise / math.sqrt(1 - beta**2)

    def scale(self, optimizer: Any, gradient: float, step: float) -> float:
        """Over the norms' product, which is in the place of L."""
        return gradient / step / (self.inputs * self.outputs)

    def again(self, inverse: float) -> float:
        """L is in the scale."""
        return 1.0


class Share(Seen):
    """The same, with the head's inputs of the interval before, and at least a part of the steepest slope."""

    def __init__(self, ours: LipschitzLR, number: float = 1.0, least: float = 0.1) -> None:
        super().__init__(ours, number)
        self.least = least

    def scale(self, optimizer: Any, gradient: float, step: float) -> float:
        """Over the larger one of the two."""
        controller = self.ours.controllers[0]
        assert controller.decision is not None
        decision = controller.decision
        return gradient / step / max(self.outputs * decision.activation_norm, self.least * decision.constant)


class Effective(Share):
    """The same, with the noise of the examples that count, by how alike their slopes are."""

    def __init__(self, ours: LipschitzLR, number: float = 1.0, least: float = 0.1, half: float = 1.0) -> None:
        super().__init__(ours, number, least)
        self.half = half
        self.even = 1.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watches the rows of the gradient in the outputs too."""
        known = self.hooked
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if known or not self.hooked:
            return

        def back(module: Any, inwards: Any, outwards: tuple[Tensor, ...]) -> None:
            slopes = outwards[0].flatten(0, -2).norm(dim=-1)
            self.even = float(slopes.mean() ** 2 / slopes.square().mean())

        assert self.ours.head_name is not None
        pl_module.get_submodule(self.ours.head_name).register_full_backward_hook(back)

    def rate(self, inverse: float, optimizer: Any) -> float:
        """The noise is in the scale."""
        beta = optimizer.param_groups[0]["betas"][0]
        if not self.hooked:
            return super().rate(inverse, optimizer)
        return Grafted.rate(self, inverse, optimizer) / ROOT / math.sqrt(1 - beta**2)

    def scale(self, optimizer: Any, gradient: float, step: float) -> float:
        """Times what momentum and the noise make of a step."""
        beta = optimizer.param_groups[0]["betas"][0]
        noise = min((1 - beta) * math.sqrt(self.examples * self.even / self.half), 1.0)
        return super().scale(optimizer, gradient, step) * noise


class LastingEffective(Effective):
    """Schedule-Free: the lasting scale, times what follows from slopes and the examples that count."""

    def rate(self, inverse: float, optimizer: Any) -> float:
        """The first step is within the warm-up."""
        if not self.hooked:
            gradient, step = self.lengths(optimizer)
            return 5 * gradient / step * inverse
        return Grafted.rate(self, inverse, optimizer) / ROOT

    def scale(self, optimizer: Any, gradient: float, step: float) -> float:
        """Of the gradient and the step; the rest is kept."""
        self.memory["rest"] = self.share(optimizer)
        return gradient / step

    def share(self, optimizer: Any) -> float:
        """What c / O is now."""
        beta = optimizer.param_groups[0]["betas"][0]
        controller = self.ours.controllers[0]
        assert controller.decision is not None
        decision = controller.decision
        observed = max(self.outputs * decision.activation_norm, self.least * decision.constant)
        return min(self.noise(), 1 / (1 - beta)) / observed

    def noise(self) -> float:
        """The root of the examples that count."""
        return math.sqrt(self.examples * self.even)

    def read(self, scale: float, inverse: float) -> float:
        """The lasting scale; the rest smoothed, and at most its mean."""
        if self.steps <= 16:
            self.mean("first", scale)
        lasting = max(self.memory["first"], self.mean("all", scale))
        smoothed = self.memory.get("smoothed rest")
        rest = self.memory["rest"] if smoothed is None else math.sqrt(smoothed * self.memory["rest"])
        self.memory["smoothed rest"] = rest
        return lasting * min(rest, self.mean("rest mean", rest))


class LinearEffective(LastingEffective):
    """The same, linear in the examples that count."""

    def noise(self) -> float:
        """An eighth of them."""
        return self.examples * self.even / 8


class FallingEffective(LastingEffective):
    """The same, with the gradients' fall: smoothed as a whole, and at most its mean."""

    def scale(self, optimizer: Any, gradient: float, step: float) -> float:
        """All of it."""
        return gradient / step * self.share(optimizer)

    def read(self, scale: float, inverse: float) -> float:
        """The smaller one."""
        return Capped.read(self, scale, inverse)


class Each(Grafted):
    """Has the mean over the weights of how long the gradient is beside the step, in place of all together."""

    module: L.LightningModule
    invariance: ScaleInvariance | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remembers whose weights they are."""
        self.module, self.invariance = pl_module, ScaleInvariance()

    def lengths(self, optimizer: Any) -> tuple[float, float]:
        """The mean, and 1."""
        is_weight = weights_of(self.module)
        mean, one = lengths_of_weights(optimizer, invariance=self.invariance, is_weight=is_weight).tolist()
        return mean, one


class EachWeight(Each, Effective):
    """AdamW's."""


class LessForFew(EachWeight):
    """The same, and less where few examples are left: times the fourth root of their share, and 1.174."""

    def scale(self, optimizer: Any, gradient: float, step: float) -> float:
        """With the c of rule `grafted` in the place of 1 / sqrt(1 - beta^2)."""
        beta = optimizer.param_groups[0]["betas"][0]
        return super().scale(optimizer, gradient, step) * self.even**0.25 * (1 + beta) ** 0.25


class LinearEachWeight(EachWeight):
    """The same, linear in the examples that count."""

    def scale(self, optimizer: Any, gradient: float, step: float) -> float:
        """With the square of what is below 1 in the place of it."""
        beta = optimizer.param_groups[0]["betas"][0]
        noise = min((1 - beta) ** 2 * self.examples * self.even, 1.0)
        return Share.scale(self, optimizer, gradient, step) * noise


class FreeEachWeight(Each, LinearEffective):
    """Schedule-Free's: a tenth of the examples that count, up to a limit."""

    def __init__(self, ours: LipschitzLR, limit: float) -> None:
        super().__init__(ours, 1.0, 0.01)
        self.limit = limit

    def noise(self) -> float:
        """As many."""
        return min(self.examples * self.even / 10, self.limit)


KINDS: dict[str, Any] = {
    "sgd: 0.5 / L": lambda ours: Times(ours, 0.5),
    "sgd: 1 / L": lambda ours: Times(ours, 1.0),
    "sgd: 2 / L": lambda ours: Times(ours, 2.0),
    "sgd: mean of 1 / L": MeanOfInverses,
    "sgd: 0.05 sqrt(m) / L": lambda ours: Root(ours, 0.05),
    "sgd: 0.0707 sqrt(m) / L (default)": lambda ours: Root(ours, 0.0707),
    "sgd: 0.1 sqrt(m) / L": lambda ours: Root(ours, 0.1),
    "adamw: each step's lengths": EachStep,
    "adamw: smoothed readings": Grafted,
    "adamw: smoothed, times 0.725": lambda ours: Grafted(ours, 0.725),
    "adamw: smoothed, times 0.85": lambda ours: Grafted(ours, 0.85),
    "adamw: smallest reading so far": Smallest,
    "adamw: mean of the first readings": First,
    "adamw: mean of the first readings, times 0.5": lambda ours: First(ours, 0.5),
    "adamw: mean of readings": MeanOfReadings,
    "adamw: mean of readings, times 0.725": lambda ours: MeanOfReadings(ours, 0.725),
    "adamw: mean of readings, of the velocity": Velocity,
    "adamw: smoothed, at most their mean": Capped,
    "adamw: smoothed, at most their mean, times 0.85 (the rule grafted)": lambda ours: Capped(ours, 0.85),
    "adamw: smoothed, at most their mean, times 0.725": lambda ours: Capped(ours, 0.725),
    "adamw: of the slope as seen, with the noise": Seen,
    "adamw: of the slope as seen, with the noise, times 0.7": lambda ours: Seen(ours, 0.7),
    "adamw: of the slope as seen, with the noise, times 1.18": lambda ours: Seen(ours, 1.18),
    "adamw: of the slope as seen, at least 0.1, with the noise": Share,
    "adamw: of the slope as seen, at least 0.1, with the noise, times 1.3": lambda ours: Share(ours, 1.3),
    "adamw: of the slope as seen, at least 0.1, with the noise, times 1.41": lambda ours: Share(ours, 1.41),
    "adamw: of the slope as seen, at least 0.2, with the noise": lambda ours: Share(ours, 1.0, 0.2),
    "adamw: of the slope as seen, at least 0.3, with the noise": lambda ours: Share(ours, 1.0, 0.3),
    "adamw: of slope and half of the examples that count": lambda ours: Effective(ours, 1.0, 0.1, 2.0),
    "adamw: of slope and examples that count": lambda ours: Effective(ours, 1.0, 0.01, 1.0),
    "adamw: the same, mean over the weights": lambda ours: EachWeight(ours, 1.0, 0.01),
    "adamw: the same, mean over the weights, times 0.75": lambda ours: EachWeight(ours, 0.75, 0.01),
    "adamw: the same, mean over the weights, linear": lambda ours: LinearEachWeight(ours, 1.0, 0.01),
    "adamw: the same, mean over the weights, half": lambda ours: EachWeight(ours, 1.0, 0.01, 2.0),
    "adamw: the same, half, and less for few (default)": lambda ours: LessForFew(ours, 1.0, 0.01, 2.0),
    "schedulefree: smoothed, at most their mean": lambda ours: Capped(ours, 10 / ROOT),
    "schedulefree: mean of readings": lambda ours: MeanOfReadings(ours, 10 / ROOT),
    "schedulefree: mean of the first readings": lambda ours: First(ours, 10 / ROOT),
    "schedulefree: mean of the first readings or of all": lambda ours: Lasting(ours, 10 / ROOT),
    "schedulefree: mean of the first readings, times 0.5": lambda ours: First(ours, 5 / ROOT),
    "schedulefree: of slope and examples that count, falling": lambda ours: FallingEffective(ours, 1.0, 0.01),
    "schedulefree: of slope and root of the examples that count": lambda ours: LastingEffective(ours, 1.0, 0.01),
    "schedulefree: of slope and an eighth of the examples that count": lambda ours: LinearEffective(ours, 1.0, 0.01),
    "schedulefree: a tenth, mean over the weights, at most 5": lambda ours: FreeEachWeight(ours, 5.0),
    "schedulefree: a tenth, mean over the weights, at most 10": lambda ours: FreeEachWeight(ours, 10.0),
    "schedulefree: a tenth, mean over the weights, at most 7.1 (default)": lambda ours: FreeEachWeight(
        ours, math.sqrt(50)
    ),
}
MAKERS: dict[str, Any] = {
    "sgd": _sgd("linear", 1.0),
    "adamw": _adamw("linear", 1.0),
    "schedulefree": _schedule_free(warmup=0.1),
}


def measure(kind: str, task: str, seed: int) -> dict[str, Any]:
    """One run."""
    ours = LipschitzLR(dry_run=True, rule="inverse")
    made = Recipe(MAKERS[kind.partition(":")[0]], (ours, KINDS[kind](ours)))
    return run(task, kind, seed, made, ALL[task])


def table(rows: list[dict[str, Any]]) -> str:
    """The validation metric of each variant and task, in Markdown."""
    found = defaultdict(list)
    for row in rows:
        found[row["policy"], row["task"]].append(row)
    tasks = [task for task in ALL if any(task == other for _, other in found)]
    lines = [f"| variant | {' | '.join(tasks)} |", "|---" * (1 + len(tasks)) + "|"]
    for kind in KINDS:
        cells = []
        for task in tasks:
            runs = found[kind, task]
            lost = sum(row["diverged"] for row in runs)
            figure = _mean_and_error([row["val"] for row in runs]) if runs else ""
            cells.append(f"{lost} of {len(runs)} diverged" if lost else f"{figure} ({len(runs)})" if runs else "")
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is not there yet, or prints the table."""
    parser = results_parser(RESULTS)
    parser.add_argument("--variants", default="")
    parser.add_argument("--tasks", default="digits_mlp")
    arguments = parser.parse_args()
    if arguments.variants:
        _quiet()
        torch.set_num_threads(1)
    for kind in filter(None, arguments.variants.split(";")):
        for task in arguments.tasks.split(";"):
            for seed in arguments.seeds:
                done = {(row["policy"], row["task"], row["seed"]) for row in read_rows(arguments.results)}
                if (kind, task, seed) not in done:
                    add_row(arguments.results, measure(kind, task, seed))
    print(table(read_rows(arguments.results)))


if __name__ == "__main__":
    main()
