"""The papers' classical models: learning rates 1/L and the epochs that they need.

Repeats softmax regression on Iris and Digits and logistic regression on Breast cancer over many seeds, by gradient
descent on all training rows in double precision from weights drawn from N(0, 1), and compares the results with the
papers', at their learning rate of 0.1 and at 1/L of each family of constants:

    python benchmarks/papers/classical.py [--seeds 30]

A seed draws the split (70 % of the rows, but all of them for Breast cancer) and the weights, which are the same for
every learning rate. The data sets are those of scikit-learn: pip install lit-lipschitz[digits].
"""

import argparse
import math
import platform
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_lipschitz.bounds import classical as regression
from lit_lipschitz.bounds.families import Bound

BASELINE = "0.1"
FAMILIES: tuple[Bound, ...] = ("paper", "strict", "smooth")
LOGITS_AT_ONCE = 200_000
"""Seeds share a matrix product, as many as keep its result in the cache."""


@dataclass(frozen=True)
class Published:
    """The papers' results at one learning rate."""

    rate: float
    epochs: int
    accuracy: float


@dataclass(frozen=True)
class Problem:
    """A data set, a model and a threshold of its loss."""

    name: str
    load: str
    binary: bool  # logistic regression with one output, on all rows; else softmax regression on a split
    threshold: float  # of the loss
    cap: int  # epochs after which a run is given up
    budget: int  # epochs after which the papers take the accuracy
    published: dict[str, Published]

    def data(self) -> tuple[Tensor, Tensor]:
        """Features of shape (rows, columns), and targets of shape (rows,)."""
        from sklearn import datasets

        raw, classes = getattr(datasets, self.load)(return_X_y=True)
        features, targets = torch.as_tensor(raw, dtype=torch.float64), torch.as_tensor(classes, dtype=torch.long)
        if self.binary:
            features = torch.cat([torch.ones_like(features[:, :1]), features], dim=1)
            features = features / features.sum(dim=0)
        return features, targets


IRIS = Problem(
    "Iris",
    "load_iris",
    binary=False,
    threshold=0.2,
    cap=10_000,
    budget=200,
    published={BASELINE: Published(0.1, 413, 93.33), "paper": Published(1.902, 49, 97.78)},
)
DIGITS = Problem(
    "Digits",
    "load_digits",
    binary=False,
    threshold=0.2,
    cap=4_000,
    budget=200,
    published={BASELINE: Published(0.1, 337, 91.30), "paper": Published(0.634, 2, 94.63)},
)
BREAST_CANCER = Problem(
    "Breast cancer",
    "load_breast_cancer",
    binary=True,
    threshold=0.69,
    cap=100_000,
    budget=100,
    published={BASELINE: Published(0.1, 37_008, 43.23), "paper": Published(4280.23, 2, 90.50)},
)


@dataclass
class Draw:
    """Splits and first weights of the seeds."""

    training: Tensor  # shape (seeds, rows), whether a seed trains on a row
    weights: Tensor  # shape (seeds, outputs, columns)


@dataclass
class Runs:
    """How the seeds' runs at one rate ended, each of shape (seeds,)."""

    rates: Tensor
    epochs: Tensor  # one more than the cap where the threshold was not reached
    losses: Tensor
    rises: Tensor  # share of the steps after which the loss was higher
    train: Tensor  # accuracies
    test: Tensor  # NaN without rows to test on


@dataclass
class Comparison:
    """A data set's results, by rate."""

    problem: Problem
    rows: int
    untrained: Tensor  # losses of the first weights, shape (seeds,)
    to_threshold: dict[str, Runs]
    in_budget: dict[str, Runs]
    reference: tuple[Tensor, Tensor]  # scikit-learn's accuracies
    notes: list[str]


def draw(problem: Problem, features: Tensor, targets: Tensor, seeds: int) -> Draw:
    """Splits and first weights."""
    rows, columns = features.shape
    outputs = 1 if problem.binary else int(targets.max()) + 1
    training = torch.full((seeds, rows), problem.binary)
    weights = torch.empty(seeds, outputs, columns, dtype=torch.float64)
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        training[seed, torch.randperm(rows, generator=generator)[: int(0.7 * rows)]] = True
        weights[seed] = torch.randn(outputs, columns, generator=generator, dtype=torch.float64)
    return Draw(training, weights)


def rates_of(problem: Problem, features: Tensor, targets: Tensor, training: Tensor) -> dict[str, Tensor]:
    """The baseline and 1 over each family's constant of the seeds' training rows."""

    def constant(rows: Tensor, bound: Bound) -> float:
        if problem.binary:
            return regression.logistic_regression(features[rows], bound=bound)
        return regression.softmax_regression(features[rows], int(targets.max()) + 1, bound=bound)

    rates = {BASELINE: torch.full((len(training),), float(BASELINE), dtype=torch.float64)}
    for bound in FAMILIES:
        rates[bound] = torch.tensor([1 / constant(rows, bound) for rows in training], dtype=torch.float64)
    return rates


def losses_and_gradients(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The rows' losses and their gradients in the logits.

    Args:
        logits: Shape (seeds, outputs, rows).
        targets: Classes, shape (rows,).

    Returns:
        The losses, shape (seeds, rows), and the gradients, of the logits' shape.
    """
    if logits.shape[1] == 1:
        return (F.softplus(logits) - logits * targets)[:, 0], logits.sigmoid() - targets
    log_p = logits.log_softmax(dim=1)
    chosen = targets.expand(len(logits), 1, -1)
    losses = -log_p.gather(1, chosen)[:, 0]
    return losses, log_p.exp_().scatter_add_(1, chosen, torch.full_like(chosen, -1, dtype=log_p.dtype))


def logits_of(weights: Tensor, features: Tensor) -> Tensor:
    """Outputs of all seeds' models on all rows, shape (seeds, outputs, rows)."""
    return (weights.flatten(0, 1) @ features.T).unflatten(0, weights.shape[:2])


def descend(features: Tensor, targets: Tensor, start: Draw, rates: Tensor, *, threshold: float, cap: int) -> Runs:
    """Gradient descent of every seed until its loss is below the threshold, or for ``cap`` epochs.

    An epoch is a pass over the training rows: their loss and its gradient. The epoch in which the loss is found below
    the threshold counts too, as it does in the papers' loops.
    """
    epochs = torch.full((len(rates),), cap + 1)
    losses, rises = torch.zeros(2, len(rates), dtype=torch.float64)
    final = start.weights.clone()
    share = start.training / start.training.sum(dim=1, keepdim=True, dtype=torch.float64)
    at_once = max(1, LOGITS_AT_ONCE // (final.shape[1] * len(features)))
    for active in torch.arange(len(rates)).split(at_once):
        weights, part, rate = final[active], share[active, None], rates[active, None, None]
        previous, higher = torch.full_like(rate[:, 0, 0], math.inf), torch.zeros_like(rate[:, 0, 0])
        for epoch in range(1, cap + 1):
            each, gradients = losses_and_gradients(logits_of(weights, features), targets)
            loss = (each * part[:, 0]).sum(dim=1)
            higher += loss > previous
            below = loss < threshold
            if epoch == cap or below.any():
                ended = below | (epoch == cap)
                epochs[active[below]] = epoch
                final[active[ended]], losses[active[ended]] = weights[ended], loss[ended]
                rises[active[ended]] = higher[ended] / max(epoch - 1, 1)
                if ended.all():
                    break
                active, weights, part, rate, gradients, loss, higher = (
                    values[~ended] for values in (active, weights, part, rate, gradients, loss, higher)
                )
            weights = weights - rate * ((gradients * part).flatten(0, 1) @ features).view_as(weights)
            previous = loss
    return Runs(rates, epochs, losses, rises, *accuracies(features, targets, start.training, final))


def accuracies(features: Tensor, targets: Tensor, training: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of the training rows, and of the others, that each seed's weights classify correctly."""
    logits = logits_of(weights, features)
    predictions = (logits[:, 0] >= 0).long() if logits.shape[1] == 1 else logits.argmax(dim=1)
    correct = predictions == targets
    train, test = ((correct & rows).sum(dim=1) / rows.sum(dim=1) for rows in (training, ~training))
    return train, test


def unguarded(
    features: Tensor, targets: Tensor, start: Draw, rates: Tensor, threshold: float
) -> list[tuple[int, float]]:
    """Epochs and last loss of each seed where the softmax regression is computed as the authors' notebook does.

    The largest logit of all rows is subtracted, not that of each row, so that small probabilities underflow to 0, and
    the loss multiplies their logarithms by the 0 of a class that is not the target: NaN, which is not above the
    threshold either.
    """
    ends = []
    for rows, weights, rate in zip(start.training, start.weights.mT, rates, strict=True):
        x, y = features[rows], F.one_hot(targets[rows]).double()
        loss, epochs = math.inf, 0
        while loss >= threshold:
            logits = x @ weights
            exponentials = (logits - logits.max()).exp()
            p = exponentials / exponentials.sum(dim=1, keepdim=True)
            loss = -(y * p.log()).sum().item() / len(x)
            weights = weights - rate * x.T @ (p - y) / len(x)
            epochs += 1
        ends.append((epochs, loss))
    return ends


def reference(features: Tensor, targets: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """Accuracies of scikit-learn's logistic regression, with its defaults on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    splits = training[:1] if training.all() else training
    train, test = torch.full((2, len(splits)), math.nan, dtype=torch.float64)
    for seed, rows in enumerate(splits):
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        model.fit(features[rows].numpy(), targets[rows].numpy())
        correct = (torch.as_tensor(model.predict(features.numpy())) == targets).double()
        train[seed], test[seed] = correct[rows].mean(), correct[~rows].mean()
    return train, test


def compare(problem: Problem, seeds: int) -> Comparison:
    """Runs one data set at every rate, to the threshold and for the papers' number of epochs."""
    features, targets = problem.data()
    start = draw(problem, features, targets, seeds)
    rates = rates_of(problem, features, targets, start.training)

    def run(name: str, threshold: float, cap: int) -> Runs:
        return descend(features, targets, start, rates[name], threshold=threshold, cap=cap)

    untrained = run(BASELINE, -math.inf, 1).losses
    to_threshold = {name: run(name, problem.threshold, problem.cap) for name in rates}
    in_budget = {name: run(name, -math.inf, problem.budget) for name in rates}
    notes = [f"Loss of the first weights {ranged(untrained)}, threshold {problem.threshold}."]
    for name, runs in to_threshold.items():
        late = runs.epochs > problem.cap
        if late.any():
            notes.append(
                f"{name}: {int(late.sum())} of {seeds} seeds not there after {problem.cap:,} epochs, at a loss of "
                f"{ranged(runs.losses[late])}."
            )
        back = (runs.epochs <= problem.budget) & (in_budget[name].losses >= problem.threshold)
        if back.any():
            notes.append(
                f"{name}: {int(back.sum())} of {seeds} seeds that were below the threshold are above it again after "
                f"{problem.budget} epochs."
            )
    if problem.binary:
        majority = targets.bincount().max().item() / len(targets)
        notes += [
            f"A model that says 1/2 to every row has a loss of ln 2 = {math.log(2):.4f}: at this threshold training",
            f"has hardly begun. To name the larger class always gets {majority:.2%} of the rows.",
            "The papers' 2 epochs are one step of 1/L, and hold: no NaN.",
        ]
    else:
        ends = unguarded(features, targets, start, rates["paper"], problem.threshold)
        bad = [epochs for epochs, loss in ends if math.isnan(loss)]
        in_epoch = f", in epoch {statistics.median_low(bad)}: no convergence" if bad else ""
        notes.append(f"Without log_softmax {len(bad)} of {seeds} seeds leave the loop at 1/L by a NaN loss{in_epoch}.")
    scores = reference(features, targets, start.training)
    return Comparison(problem, int(start.training[0].sum()), untrained, to_threshold, in_budget, scores, notes)


def ranged(values: Tensor, cap: float = math.inf) -> str:
    """The median and the range, if there is one, of rates or losses, or of epochs up to a cap."""

    def text(value: float) -> str:
        if math.isinf(cap):
            return f"{value:,.2f}" if value >= 100 else f"{value:.4g}"
        return f">{cap:,.0f}" if value > cap else f"{value:,.0f}"

    low, middle, high = values.min().item(), statistics.median(values.tolist()), values.max().item()
    return text(middle) if low == high else f"{text(middle)} ({text(low)} .. {text(high)})"


def percent(values: Tensor) -> str:
    """The median in percent, or a dash where there were no rows."""
    return "-" if values.isnan().any() else f"{100 * statistics.median(values.tolist()):.2f}"


THRESHOLD_TABLE = "{:13} {:>5}  {:8} {:>30} {:>9} {:>31} {:>7} {:>8} {:>7} {:>7}"
BUDGET_TABLE = "{:13} {:>6}  {:12} {:>28} {:>7} {:>7} {:>8}"
LEGEND = """
rate: 0.1 is the papers' baseline, the others are 1/L by the constants of lit_lipschitz.bounds.classical.
loss up: share of the steps after which the loss was higher, in percent.
paper's: one run each, from the authors' draft of 2019 (github.com/yrahul3910/lipschitz-learning-rate); the numbers of
epochs of the second table are those of the notebooks there. For Breast cancer the accuracy is on the training rows.
scikit-learn: its LogisticRegression to convergence, with an intercept and an L2 term, on standardised features.
"""


def threshold_rows(comparison: Comparison) -> list[str]:
    """Rows of the first table."""
    problem, rows = comparison.problem, []
    for name, runs in comparison.to_threshold.items():
        paper = problem.published.get(name)
        said = (f"{paper.rate:,}", f"{paper.epochs:,}") if paper else ("", "")
        cells = [problem.name, comparison.rows, name, ranged(runs.rates), said[0], ranged(runs.epochs, problem.cap)]
        cells += [said[1], percent(runs.rises), percent(runs.train), percent(runs.test)]
        rows.append(THRESHOLD_TABLE.format(*cells))
    return rows


def budget_rows(comparison: Comparison) -> list[str]:
    """Rows of the second table."""
    problem, rows = comparison.problem, []
    for name, runs in comparison.in_budget.items():
        paper = problem.published.get(name)
        cells = [problem.name, problem.budget, name, ranged(runs.losses), percent(runs.train), percent(runs.test)]
        rows.append(BUDGET_TABLE.format(*cells, f"{paper.accuracy:.2f}" if paper else ""))
    train, test = comparison.reference
    rows.append(BUDGET_TABLE.format(problem.name, "", "scikit-learn", "", percent(train), percent(test), ""))
    return rows


def report(seeds: int) -> list[Comparison]:
    """Runs all data sets and prints the tables."""
    print(f"{seeds} seeds, float64; medians (ranges) over the seeds; accuracies in percent")
    print("\nEpochs until the loss on the training rows is below the threshold, and what was there then")
    heads = ("data set", "m", "rate", "1/L", "paper's", "epochs", "paper's", "loss up", "train", "test")
    print(THRESHOLD_TABLE.format(*heads))
    comparisons = []
    for problem in (IRIS, DIGITS, BREAST_CANCER):
        comparisons.append(compare(problem, seeds))
        print(*threshold_rows(comparisons[-1]), sep="\n", flush=True)
    print("\nAfter the number of epochs that the papers' accuracies were taken at")
    print(BUDGET_TABLE.format("data set", "epochs", "rate", "loss", "train", "test", "paper's"))
    for comparison in comparisons:
        print(*budget_rows(comparison), sep="\n")
    print(LEGEND)
    for comparison in comparisons:
        print(f"{comparison.problem.name}:", *(f"  {note}" for note in comparison.notes), sep="\n")
    return comparisons


def main() -> None:
    """Parses the arguments and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=30, help="splits and first weights, at least 1")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds {arguments.seeds}: expected at least 1")
    try:
        import sklearn
    except ImportError:
        raise SystemExit(
            "benchmarks/papers/classical.py needs scikit-learn: pip install lit-lipschitz[digits]"
        ) from None
    versions = f"torch {torch.__version__}, scikit-learn {sklearn.__version__}, Python {platform.python_version()}"
    print(f"CPU, {torch.get_num_threads()} threads; {versions}")
    report(arguments.seeds)


if __name__ == "__main__":
    main()
