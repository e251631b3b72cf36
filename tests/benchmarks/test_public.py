"""Tasks with published figures: their sources' settings, safe reading of graphs, runs that are not repeated."""

import collections
import json
import os
import pickle
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def public(monkeypatch, tmp_path):
    """The script, which reads data from the folder of the test."""
    monkeypatch.setenv("LIT_LIPSCHITZ_DATA", str(tmp_path))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import public

    threads = torch.get_num_threads()
    yield public
    torch.set_num_threads(threads)
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def graph(tmp_path):
    """A generated graph of 520 nodes in the Planetoid format: 2 with a label, 510 without, and 4 + gaps to test."""
    sparse = pytest.importorskip("scipy.sparse")
    random = np.random.RandomState(0)
    known, tests = 512, np.array([518, 512, 519, 514])  # 513, 515, 516 and 517 have neither features nor a label
    features = random.randint(2, size=(known + 4, 6)).astype(np.float32)
    labels = np.eye(3, dtype=np.int32)[random.randint(3, size=known + 4)]
    neighbours = collections.defaultdict(list, {node: [node + 1] for node in range(511)})
    neighbours[519] = [0, 0, 519]
    parts = {
        "x": sparse.csr_matrix(features[:2]), "y": labels[:2],
        "tx": sparse.csr_matrix(features[known:]), "ty": labels[known:],
        "allx": sparse.csr_matrix(features[:known]), "ally": labels[:known], "graph": neighbours,
    }  # fmt: skip
    folder = tmp_path / "planetoid"
    folder.mkdir()
    for name, part in parts.items():
        (folder / f"ind.cora.{name}").write_bytes(pickle.dumps(part, protocol=2))
    (folder / "ind.cora.test.index").write_text("\n".join(map(str, tests)))
    return SimpleNamespace(folder=folder, features=features, labels=labels, tests=tests, known=known)


def test_a_graph_is_read_as_its_source_does(public, graph):
    read = sys.modules["citation_graphs"].read_graph("cora")
    rows = read.features.to_dense()
    assert rows.shape == (520, 6)
    for node in (0, 300, *graph.tests):
        at = node if node < graph.known else graph.known + list(graph.tests).index(node)
        own = graph.features[at]
        assert rows[node].tolist() == pytest.approx((own / max(own.sum(), 1)).tolist())
        assert read.labels[node] == graph.labels[at].argmax()
    assert not rows[515].any()
    assert [part.tolist()[:1] + part.tolist()[-1:] for part in (read.train, read.val)] == [[0, 1], [2, 501]]
    assert read.test.tolist() == [512, 514, 518, 519]
    matrix = read.adjacency.to_dense()
    # Node 519 has the edges to 0 and to itself, and a second loop from A + I; node 0 has edges to 1, 519 and itself.
    assert matrix[519, 519] == pytest.approx(2 / 3)
    assert matrix[0, 519] == matrix[519, 0] == pytest.approx(1 / 3)
    assert matrix[515].tolist() == np.eye(520)[515].tolist()


class Harmful:
    """Its pickle makes a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("made",)


def test_a_pickle_with_code_is_refused_and_a_missing_file_is_named(public, graph):
    errors, read = sys.modules["lit_lipschitz.errors"], sys.modules["citation_graphs"].read_graph
    (graph.folder / "ind.cora.graph").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(errors.DataError, match=r"ind\.cora\.graph can't be read: .*mkdir is not admitted"):
        read("cora")
    assert not os.path.exists("made")
    (graph.folder / "ind.cora.y").unlink()
    with pytest.raises(errors.DataError, match=r"ind\.cora\.y not found; expected the files of github"):
        read("cora")


def test_a_graph_network_trains_on_all_nodes_at_once(public, graph, monkeypatch):
    monkeypatch.setitem(public.TASKS, "gcn_cora", replace(public.TASKS["gcn_cora"], epochs=3, batch_size=2))
    row = public.run("gcn_cora", "adam-constant:0.01", 0)
    assert (row["steps"], row["diverged"]) == (3, False)
    assert 0 <= row["test"] <= 100


def test_the_quadratic_has_its_published_loss_at_the_mean_of_the_training_data(public):
    task = public.TASKS["quadratic_deep"]
    network, data = task.network(), task.data()
    network.theta.data = data.train[0].mean(dim=0)
    assert task.loss(network, *data.test).item() == pytest.approx(task.published[0].figure, abs=0.005)


def test_networks_have_the_sizes_of_their_sources(public):
    sizes = {"mnist_mlp": 89_610, "mnist_example": 1_199_882, "algoperf_mnist": 101_770, "quadratic_deep": 100}
    for name, size in sizes.items():
        assert sum(weights.numel() for weights in public.TASKS[name].network().parameters()) == size
    images = torch.rand(2, 1, 28, 28)
    outputs, mean, _ = public.TASKS["mnist_vae"].network()(images)
    assert (outputs.shape, mean.shape) == ((2, 784), (2, 8))


def test_a_run_ends_by_the_validation_loss_as_the_source_does(public):
    stopping, losses, trainer = public.WindowStopping(), [], SimpleNamespace(should_stop=False)
    curve = [1.0, *[3.0] * 10, 2.0, *[1.0] * 8, 1.25, 1.25, 9.0]
    while not trainer.should_stop:
        losses.append(curve[len(losses)])
        stopping.on_train_epoch_end(trainer, SimpleNamespace(val_losses=losses))
    # The 11th is above the 10 before it, too early. 1.25 is below the mean before the 21st, 1.3, not the next, 1.125.
    assert len(losses) == 22


def test_an_incomplete_batch_is_dropped_or_kept(public):
    part = (torch.arange(10), torch.arange(10))
    for drop, sizes in ((True, [4, 4]), (False, [4, 4, 2])):
        batches = public.Batches(part, 4, drop, seed=0)
        epochs = [[inputs for inputs, _ in batches] for _ in range(2)]
        assert [len(batch) for batch in epochs[0]] == sizes
        assert len(batches) == len(sizes)
        assert [len(set(torch.cat(epoch).tolist())) for epoch in epochs] == [sum(sizes)] * 2
        assert torch.cat(epochs[0]).tolist() != torch.cat(epochs[1]).tolist()


def test_runs_are_not_repeated_and_what_cannot_run_is_named(public, monkeypatch, tmp_path, capsys):
    task = replace(public.TASKS["quadratic_deep"], epochs=2, seeds=2, grids={"sgd": (0.01,)}, published=())
    monkeypatch.setitem(public.TASKS, "quadratic_deep", task)
    monkeypatch.setattr(public, "PACKAGES", dict.fromkeys([*public.PACKAGES], "no-such-package"))
    path = tmp_path / "runs.jsonl"

    def call(*options):
        monkeypatch.setattr(sys, "argv", ["public.py", "--runs", str(path), "--tasks", "quadratic_deep", *options])
        public.main()
        return capsys.readouterr().out

    call("--steps", "1")
    assert not path.exists()
    assert "no-such-package is not installed; the policies that need it are skipped" in call()
    lines = path.read_text().splitlines()
    done = [(row["policy"], row["seed"]) for row in map(json.loads, lines)]
    assert done == [(policy, seed) for seed in (0, 1) for policy in ("lipschitz", "lipschitz-adamw", "sgd:0.01")]
    path.write_text("\n".join(lines[:-1]) + '\n{"task": "quad')  # cut off by a kill
    assert call().count("14 steps") == 1
    printed = call("--summary", str(tmp_path / "summary.csv"))
    rows = public.read_summary(tmp_path / "summary.csv")
    assert [(row["policy"], row["seeds"]) for row in rows] == [
        ("lipschitz", 2),
        ("lipschitz-adamw", 2),
        ("sgd:0.01", 2),
    ]
    assert public.table(rows) in printed
    assert public.repeated(rows) in printed
    assert "gcn_cora: skipped, " in call("--tasks", "gcn_cora")


def test_the_table_has_the_grids_best_rate_by_validation(public):
    def runs(policy, tests, vals, diverged=False):
        pairs = enumerate(zip(tests, vals, strict=True))
        return [
            {"task": "mnist_mlp", "policy": policy, "seed": seed, "test": test, "val": val, "diverged": diverged,
             "seconds": 1.0, "torch": "2", "lightning": "2", "package": "", "device": "CPU"}
            for seed, (test, val) in pairs
        ]  # fmt: skip

    rows = public.summarise([
        *runs("sgd:0.1", [97.0, 98.0, 99.0], [91.0] * 3), *runs("sgd:0.3", [99.0] * 3, [90.0] * 3),
        *runs("sgd:1", [99.5] * 3, [99.5] * 3, diverged=True), *runs("sgd:3", [99.9], [99.9]),
        *runs("momo", [97.9, 98.1], [0.0, 0.0]), *runs("lipschitz", [98.0] * 3, [98.0] * 3),
    ])  # fmt: skip
    lines = public.table(rows).splitlines()
    assert lines[2] == "| published | 97.97 |"
    assert "| `lipschitz` | 98.00 ± 0.00 |" in lines
    assert "| `momo` | 98.00 ± 0.10, 2 seeds |" in lines
    assert "| `sgd`, best of a grid | 98.00 ± 0.58 (0.1) |" in lines
    momo = next(row for row in rows if row["policy"] == "momo")
    assert momo["published"] == 97.97
    source = public.TASKS["mnist_mlp"].published[2].source
    line = f"| `mnist_mlp` | MoMo 1 | 97.97 | 98.00 ± 0.10, 2 seeds | [source]({source}) |"
    assert line in public.repeated(rows).splitlines()


def test_the_readmes_table_compares_with_the_best_published_figure(public):
    import readme_tables

    def runs(policy, tests, task="mnist_mlp"):
        return [
            {"task": task, "policy": policy, "seed": seed, "test": test, "val": test, "diverged": False,
             "seconds": 1.0, "torch": "2", "lightning": "2", "package": "", "device": "CPU"}
            for seed, test in enumerate(tests)
        ]  # fmt: skip

    rows = public.summarise([
        *runs("sgd:0.1", [97.0, 98.0, 99.0]), *runs("lipschitz", [98.0, 98.0, 98.1]),
        *runs("lipschitz", [88.0, 88.1, 88.2], "quadratic_deep"), *runs("lipschitz", [2000.0] * 3, "algoperf_mnist"),
    ])  # fmt: skip
    assert readme_tables.published(rows).replace(readme_tables.NO_BREAK, " ").splitlines()[2:] == [
        "| MNIST, MLP, 10 epochs, accuracy | 97.97 | 98.00 | 98.03 ± 0.03 ▲ | not run |",
        "| DeepOBS, noisy quadratic, loss | 87.05 | not run | 88.10 ± 0.06 ▼ | not run |",
    ]
