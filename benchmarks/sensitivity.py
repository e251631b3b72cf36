"""Whether the defaults need retuning where a fixed rate does: batch size, width, depth, size of inputs, label noise.

    python benchmarks/sensitivity.py [--seeds 0,1,2] [--kinds sgd,adamw,schedulefree]   # measures what results/ lacks
    python benchmarks/sensitivity.py --print              # the table

The task is MNIST, 8,192 images, an MLP, 5 epochs. The fixed rates are tuned on it in the middle (batch 128, width 128,
one hidden layer, standardised inputs, true labels) by validation, with the same warm-up and decay, and then kept.
Schedule-Free AdamW has a warm-up and no decay.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compare import _mean_and_error, _quiet, run
from rows import add_row, read_rows, results_parser
from tasks import Data, Task, _keep, images
from torch import Tensor

from lit_lipschitz import MLP

RESULTS = Path(__file__).parent / "results" / "sensitivity.jsonl"
GRIDS = {
    "sgd": (0.01, 0.03, 0.1, 0.3),
    "adamw": (3e-4, 1e-3, 3e-3, 1e-2),
    "schedulefree": (2.5e-3, 5e-3, 1e-2, 3e-2),
}
OURS = {"sgd": "lipschitz", "adamw": "lipschitz-adamw", "schedulefree": "lipschitz-schedulefree"}


def mnist(scale: float, noise: float, seed: int) -> Data:
    """MNIST with inputs times a number and a fraction of the training labels drawn anew."""
    data = images("MNIST", False, (8192, 2500), 10000, _keep, seed)
    inputs, labels = data.train
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 10, labels.shape, generator=generator)
    labels = torch.where(torch.rand(labels.shape, generator=generator) < noise, drawn, labels)

    def scaled(part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return part[0] * scale, part[1]

    return Data(scaled((inputs, labels)), scaled(data.val), scaled(data.test), _keep)


def task(hidden: tuple[int, ...] = (128,), batch_size: int = 128, scale: float = 1.0, noise: float = 0.0) -> Task:
    """The middle, with something changed."""
    network: Callable[[], Any] = partial(MLP, (1, 28, 28), hidden)
    return Task(network, partial(mnist, scale, noise), epochs=5, batch_size=batch_size)


VARIANTS: dict[str, Task] = {
    "middle": task(),
    **{f"batch {size}": task(batch_size=size) for size in (32, 512, 2048)},
    **{f"width {width}": task(hidden=(width,)) for width in (32, 512, 1024)},
    **{f"{depth} hidden layers": task(hidden=(128,) * depth) for depth in (2, 4, 8)},
    **{f"inputs x {scale:g}": task(scale=scale) for scale in (0.1, 10.0)},
    **{f"label noise {noise:.0%}": task(noise=noise) for noise in (0.2, 0.5)},
}


def best(rows: list[dict[str, Any]], kind: str) -> str:
    """The fixed rate that was best in the middle, by validation."""
    found = defaultdict(list)
    for row in rows:
        if row["task"] == "middle" and row["policy"].partition(":")[0] == kind and ":" in row["policy"]:
            found[row["policy"]].append(row["val"])
    return max(found, key=lambda policy: statistics.mean(found[policy]))


def measure(variant: str, policy: str, seed: int, path: Path) -> None:
    """Runs what is not there yet."""
    if (variant, policy, seed) in {(row["task"], row["policy"], row["seed"]) for row in read_rows(path)}:
        return
    row = run(variant, policy, seed, task=VARIANTS[variant])
    add_row(path, row)
    print(
        f"{variant:20} {policy:16} {seed} {row['test']:.2f} rate {row['rate']:.4g} {row['seconds']:.1f} s", flush=True
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Test accuracy of each variant, in Markdown, with the default's last rate."""
    tuned = {kind: best(rows, kind) for kind in GRIDS}
    policies = [policy for kind in GRIDS for policy in (OURS[kind], tuned[kind])]
    lines = [
        "| variant | " + " | ".join(f"{policy} | rate" if policy in OURS.values() else policy for policy in policies)
    ]
    lines[0] += " |"
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for variant in VARIANTS:
        cells = []
        for policy in policies:
            found = [row for row in rows if (row["task"], row["policy"]) == (variant, policy)]
            cells.append(_mean_and_error([row["test"] for row in found]) if found else "")
            if policy in OURS.values():
                cells.append(f"{statistics.median(row['rate'] for row in found):.2g}" if found else "")
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Tunes in the middle, then measures the rest."""
    parser = results_parser(RESULTS)
    parser.add_argument("--kinds", default=",".join(GRIDS))
    parser.add_argument("--print", action="store_true")
    arguments = parser.parse_args()
    if not arguments.print:
        _quiet()
        torch.set_num_threads(1)
        kinds = arguments.kinds.split(",")
        seeds = arguments.seeds
        for seed in seeds:
            for kind in kinds:
                for rate in GRIDS[kind]:
                    measure("middle", f"{kind}:{rate:g}", seed, arguments.results)
        for seed in seeds:
            for variant in VARIANTS:
                for kind in kinds:
                    measure(variant, OURS[kind], seed, arguments.results)
                    measure(variant, best(read_rows(arguments.results), kind), seed, arguments.results)
    print(table(read_rows(arguments.results)))


if __name__ == "__main__":
    main()
