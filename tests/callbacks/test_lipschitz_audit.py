"""LipschitzAudit in a Trainer: its numbers against an independent computation, its table and its conclusions."""

import math
import sys
from datetime import timedelta

import lightning as L
import pytest
import torch
from helpers import CLASSES, WIDTH, Classifier, Curves, examples, loader, trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lit_lipschitz import ConfigurationError, LipschitzLR
from lit_lipschitz.callbacks.lipschitz_audit import LipschitzAudit

LARGEST = ("audit/largest_is_head", "audit/largest_layer")
LAYERS = ("net.0", "net.2")


class Gradients(L.Callback):
    """Keeps every step's gradients by layer, and after the step the constant that its rate came from."""

    def __init__(self, lipschitz):
        self.lipschitz = lipschitz
        self.norms, self.entries, self.constants = [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        flat = {name: [] for name in LAYERS}
        for name, parameter in pl_module.named_parameters():
            flat[name.replace("_orig_mod.", "").rpartition(".")[0]].append(parameter.grad.flatten())
        flat = {name: torch.cat(parts) for name, parts in flat.items()}
        self.norms.append({name: part.square().sum().sqrt().item() for name, part in flat.items()})
        self.entries.append({name: part.abs().max().item() for name, part in flat.items()})
        inside = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer
        self.handle = inside.register_step_post_hook(self.after_step)

    def after_step(self, *_):
        self.constants.append(self.lipschitz.constant)
        self.handle.remove()


def fit(audit, module=None, lipschitz=None, first=False, batch_size=16, seed=1, **settings):
    """Trains with the audit behind LipschitzLR, or in front of it; returns the logged points and the gradients."""
    torch.manual_seed(seed)
    module = module or Classifier()
    lipschitz = lipschitz or LipschitzLR()
    gradients, curves = Gradients(lipschitz), Curves()
    two = [audit, lipschitz] if first else [lipschitz, audit]
    trainer(*two, *settings.pop("more", [gradients]), logger=curves, **settings).fit(module, loader(batch_size))
    return curves.points, gradients


def layer(audit, name):
    return next(layer for layer in audit.summary().layers if layer.name == name)


@pytest.mark.parametrize("first", [True, False])
def test_norms_and_constants_are_those_of_the_very_steps(first):
    audit = LipschitzAudit(every=3)
    points, seen = fit(audit, lipschitz=LipschitzLR(update=2), first=first)
    assert len(set(seen.constants)) > 3
    assert [step for step, _ in points] == [0, 3, 6, 9]
    for step, metrics in points:
        assert set(metrics) == {
            "audit/net.0/ratio",
            "audit/net.2/ratio",
            "audit/largest_is_head",
            "audit/largest_layer",
        }
        for name in LAYERS:
            expected = seen.norms[step][name] / seen.constants[step]
            assert metrics[f"audit/{name}/ratio"] == pytest.approx(expected, rel=1e-6)
        assert metrics["audit/largest_is_head"] == float(seen.norms[step]["net.2"] > seen.norms[step]["net.0"])
        assert metrics["audit/largest_layer"] == metrics["audit/largest_is_head"]  # 0 or 1, of two layers
    for name in LAYERS:
        norms = [seen.norms[step][name] for step in (0, 3, 6, 9)]
        found = layer(audit, name)
        assert found.steps == found.compared == 4
        assert found.median_norm == pytest.approx(sum(sorted(norms)[1:3]) / 2, rel=1e-6)
        assert found.largest_norm == pytest.approx(max(norms), rel=1e-6)
        assert found.largest_entry == pytest.approx(max(seen.entries[step][name] for step in (0, 3, 6, 9)), rel=1e-6)
        assert found.largest_ratio == pytest.approx(max(point[f"audit/{name}/ratio"] for _, point in points))


class Twice(Classifier):
    """Manual optimization with two steps per batch."""

    def training_step(self, batch, batch_idx):
        for _ in range(2):
            self.optimizers().zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()

    @property
    def automatic_optimization(self):
        return False


@pytest.mark.parametrize("first", [True, False])
def test_several_manual_steps_per_batch_have_a_constant_each(first):
    audit = LipschitzAudit(every=1)
    points, seen = fit(audit, Twice(), first=first, lipschitz=LipschitzLR(optimizers=0), max_epochs=1)
    assert [step for step, _ in points] == list(range(12))
    assert len(set(seen.constants)) > 2
    for step, metrics in points:
        assert metrics["audit/net.2/ratio"] == pytest.approx(seen.norms[step]["net.2"] / seen.constants[step], rel=1e-6)


def test_accumulated_gradients_are_those_of_the_large_batch():
    found = []
    for batch_size, pieces in ((8, 4), (32, 1)):
        audit, lipschitz = LipschitzAudit(every=2), LipschitzLR(initial_lr=0.1, update=1000)
        points, _ = fit(audit, lipschitz=lipschitz, batch_size=batch_size, accumulate_grad_batches=pieces)
        assert [step for step, _ in points] == [0, 2, 4]
        found.append([part.largest_norm for part in audit.summary().layers])
        found.append([metrics["audit/net.0/gradient"] for _, metrics in points])
    assert found[0] == pytest.approx(found[2], rel=1e-4)
    assert found[1] == pytest.approx(found[3], rel=1e-4)


def test_gradients_are_those_before_clipping():
    audit, clipped = LipschitzAudit(every=1), LipschitzAudit(every=1)
    fit(audit, max_steps=1)
    fit(clipped, max_steps=1, gradient_clip_val=1e-4)
    assert clipped.summary() == audit.summary()


def test_it_changes_nothing_that_is_trained():
    plain, audited = Classifier(), Classifier()
    audited.load_state_dict(plain.state_dict())
    for module, callbacks in ((plain, []), (audited, [LipschitzAudit(every=1)])):
        trainer(LipschitzLR(), *callbacks).fit(module, loader())
    for one, other in zip(plain.parameters(), audited.parameters(), strict=True):
        assert torch.equal(one, other)


class Counterexample(L.LightningModule):
    """E = 0.5 (w2 relu(w1 x) - t)^2 at x = 1, w1 = 0.1, w2 = 10, t = 0."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.first.weight, 0.1)
        nn.init.constant_(self.last.weight, 10.0)

    def training_step(self, batch, batch_idx):
        return 0.5 * F.mse_loss(self.last(F.relu(self.first(batch)))[:, 0], torch.zeros(1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


VIOLATED = (
    "The head's gradient had the largest norm in 0 of 1 audited steps, and the largest entry in 0; the norm of "
    "another layer (first) was up to 100 times that of the head."
)


@pytest.mark.parametrize("first", [True, False])
def test_the_counterexample_violates_the_premise(first, capsys):
    audit = LipschitzAudit()
    callbacks = [audit, LipschitzLR()] if first else [LipschitzLR(), audit]
    trainer(*callbacks, max_steps=1).fit(Counterexample(), DataLoader(torch.ones(1, 1)))
    summary = audit.summary()
    assert (summary.steps, summary.head, summary.head_layer.largest_by_norm) == (1, "last", 0)
    assert layer(audit, "first").largest_norm == pytest.approx(10)
    assert layer(audit, "last").largest_norm == pytest.approx(0.1)
    assert (summary.largest_over_head, summary.largest_other) == (pytest.approx(100), "first")
    assert summary.verdicts[0] == VIOLATED
    assert VIOLATED in capsys.readouterr().err.splitlines()


def test_the_counterexamples_constant_bounds_the_head_alone(capsys):
    audit = LipschitzAudit()
    trainer(LipschitzLR(), audit, max_steps=1).fit(Counterexample(), DataLoader(torch.ones(1, 1)))
    # L is the output and the target, 1 + 0, times the head's input, 0.1.
    assert layer(audit, "first").largest_ratio == pytest.approx(10 / 0.1)
    assert (layer(audit, "first").exceeded, layer(audit, "last").exceeded, audit.summary().bounded) == (1, 0, 0)
    assert audit.summary().verdicts == [
        VIOLATED,
        "L bounded the head's gradient in 1 of 1 steps; the largest norm / L was 1.",
        "L bounded every layer's gradient in 0 of 1 steps; the largest norm / L was 100 (first).",
    ]
    err = capsys.readouterr().err
    assert all(sentence in err.splitlines() for sentence in audit.summary().verdicts)


def test_the_premise_holds_where_the_head_comes_after_small_weights(capsys):
    module = Classifier()
    with torch.no_grad():
        module.net[2].weight.mul_(0.01)
    audit = LipschitzAudit(every=2)
    points, _ = fit(audit, module, max_epochs=1)
    assert [metrics["audit/largest_is_head"] for _, metrics in points] == [1, 1, 1]
    summary = audit.summary()
    assert summary.largest_over_head < 1
    assert summary.bounded == 3
    assert summary.verdicts[0].startswith(
        "The head's gradient had the largest norm in 3 of 3 audited steps, and the largest entry in 3;"
    )
    out, err = capsys.readouterr()
    assert "net" not in out
    (row,) = (line.split() for line in err.splitlines() if line.startswith("net.2 (head)"))
    assert row[5:7] == ["3/3", "3/3"]
    assert row[-1] == "0/3"


@pytest.mark.parametrize(
    ("lipschitz", "reason"),
    [
        (LipschitzLR(bound="smooth"), "bounds the Hessian, not the gradient"),
        (LipschitzLR(initial_lr=0.1, update=1000), "in no audited step was the learning rate computed from a constant"),
    ],
    ids=["smooth", "initial_lr"],
)
def test_without_a_constant_that_bounds_gradients_norms_are_logged(lipschitz, reason, capsys):
    audit = LipschitzAudit(every=4)
    points, seen = fit(audit, lipschitz=lipschitz, max_epochs=1)
    for step, metrics in points:
        assert set(metrics) == {
            "audit/net.0/gradient",
            "audit/net.2/gradient",
            "audit/largest_is_head",
            "audit/largest_layer",
        }
        assert metrics["audit/net.0/gradient"] == pytest.approx(seen.norms[step]["net.0"], rel=1e-6)
    assert reason in audit.summary().verdicts[1]
    assert layer(audit, "net.0").largest_ratio is None
    assert "above L" not in capsys.readouterr().err


class Spoils(L.Callback):
    """Makes one gradient of the second step NaN."""

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == 1:
            pl_module.net[0].bias.grad[0] = math.nan


def test_a_nan_is_found_in_a_gradient_and_stays_out_of_the_curves(capsys):
    module = Classifier()
    audit = LipschitzAudit(every=1)
    points, _ = fit(audit, module, more=[Spoils()], max_steps=2)
    assert [step for step, _ in points] == [0]
    assert (layer(audit, "net.0").nonfinite, layer(audit, "net.2").nonfinite) == (1, 0)
    assert "finite" in capsys.readouterr().err


class Wide(Classifier):
    """Many layers, one that is frozen, one that the loss leaves out, and a parameter of the module's own."""

    def __init__(self, depth):
        hidden = [part for _ in range(depth) for part in (nn.Linear(4, 4), nn.Tanh())]
        super().__init__(net=nn.Sequential(nn.Linear(WIDTH, 4), *hidden, nn.Linear(4, CLASSES)))
        self.net[0].requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(1))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0] * self.scale), batch[1])


def test_layers_without_a_gradient_do_not_count_and_the_others_keep_the_networks_order():
    audit = LipschitzAudit(every=1)
    fit(audit, Wide(2), more=[], max_steps=2)
    assert [part.name for part in audit.summary().layers] == ["Wide", "net.1", "net.3", "net.5"]


def test_what_the_optimizer_does_not_step_does_not_count():
    audit = LipschitzAudit(every=1)
    fit(audit, Classifier(lambda p: torch.optim.SGD(list(p)[2:], lr=0.1)), max_steps=2)
    assert [part.name for part in audit.summary().layers] == ["net.2"]
    assert audit.summary().verdicts[0] == (
        "The head's gradient had the largest norm in 2 of 2 audited steps, and the largest entry in 2."
    )


def test_a_frozen_head_is_said_to_have_no_gradient():
    module = Classifier()
    module.net[2].requires_grad_(False)
    audit = LipschitzAudit(every=1)
    points, _ = fit(audit, module, more=[], max_steps=1)
    assert set(points[0][1]) == {"audit/net.0/ratio", "audit/largest_layer"}
    assert audit.summary().verdicts[0] == "The head net.2 had no gradient of its own in any audited step."


def test_a_deep_networks_table_has_the_layers_with_the_largest_ratios(capsys):
    audit = LipschitzAudit(every=1)
    fit(audit, Wide(45), more=[], max_steps=1)
    err = capsys.readouterr().err
    assert "the 40 of 47 layers with the largest ratios to L, largest first" in err
    rows = [line.split()[0] for line in err.splitlines() if line.startswith(("net.", "Wide"))]
    ranked = sorted(audit.summary().layers, key=lambda part: part.largest_ratio, reverse=True)
    assert rows == [part.name for part in ranked[:40]]


def test_a_terminals_width_is_kept_and_a_file_has_a_line_a_sentence(capsys, monkeypatch):
    audit = LipschitzAudit(every=1)
    fit(audit, more=[], max_steps=1)
    assert audit.summary().verdicts[0] in capsys.readouterr().err.splitlines()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    fit(audit, more=[], max_steps=1)
    err = capsys.readouterr().err
    lines = err[err.index("Gradients before clipping") :].splitlines()
    assert max(map(len, lines)) <= 80
    assert audit.summary().verdicts[0] in " ".join(lines)


def test_names_and_numbers_of_a_compiled_network():
    plain, compiled = LipschitzAudit(every=1), LipschitzAudit(every=1)
    fit(plain, more=[], max_steps=2)
    torch.manual_seed(1)
    module = Classifier()
    module.net = torch.compile(module.net, backend="eager")
    lipschitz = LipschitzLR(loss="cross_entropy")
    trainer(compiled, lipschitz, max_steps=2).fit(module, loader())
    assert [part.name for part in compiled.summary().layers] == list(LAYERS)
    assert compiled.summary().head_layer is not None
    assert compiled.summary().head_layer.largest_norm == pytest.approx(plain.summary().head_layer.largest_norm)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_half_precision(precision):
    audit = LipschitzAudit(every=1)
    fit(audit, more=[], max_steps=2, precision=precision)
    exact = LipschitzAudit(every=1)
    fit(exact, more=[], max_steps=2)
    assert layer(audit, "net.2").largest_norm == pytest.approx(layer(exact, "net.2").largest_norm, rel=0.05)


class Bag(Classifier):
    """A sparse gradient, in which rows come more than once."""

    def __init__(self, sparse):
        super().__init__(lambda p: torch.optim.SGD(p, lr=0.1))
        self.words = nn.Embedding(3, WIDTH, sparse=sparse)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0] * self.words(batch[1])), batch[1])


def test_sparse_gradients():
    found = []
    for sparse in (True, False):
        audit = LipschitzAudit(every=1)
        torch.manual_seed(1)
        fit(audit, Bag(sparse), more=[], max_steps=1)
        found.append(layer(audit, "words"))
    assert found[0].largest_norm == pytest.approx(found[1].largest_norm, rel=1e-5)
    assert found[0].largest_entry == pytest.approx(found[1].largest_entry, rel=1e-5)


def test_steps_that_are_not_due_cost_nothing(monkeypatch):
    calls, reads = [], []
    norms, values = torch._foreach_norm, torch.Tensor.tolist
    lipschitz = LipschitzLR(initial_lr=0.1, update=1000, rule="inverse")
    monkeypatch.setattr(torch, "_foreach_norm", lambda *a, **k: calls.append(1) or norms(*a, **k))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(1) or values(self))
    module = Classifier()
    audit = LipschitzAudit(every=5)

    class Hooks(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.before = len(calls)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            due = batch_idx % 5 == 0
            assert (len(calls), len(reads)) == ((2, 1) if due else (0, 0))
            calls.clear()
            reads.clear()
            ours = [name for part in pl_module.modules() for name in part._backward_hooks]
            assert ours == []

    fit(audit, module, lipschitz=lipschitz, more=[Hooks()], max_epochs=1)
    assert audit.summary().steps == 2
    for part in module.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
        assert not part._backward_pre_hooks
    assert not any(parameter._backward_hooks for parameter in module.parameters())


@pytest.mark.parametrize("every", [0, -3, 2.5, True, "10", None])
def test_every_must_be_a_number_of_steps(every):
    with pytest.raises(ConfigurationError, match=rf"LipschitzAudit\(every={every!r}\): expected a number of steps"):
        LipschitzAudit(every=every)


def test_without_a_lipschitz_lr_it_says_to_add_one():
    with pytest.raises(ConfigurationError, match=r"found no LipschitzLR in trainer.callbacks: add one"):
        trainer(LipschitzAudit()).fit(Classifier(), loader())


def test_before_a_fit_there_is_nothing_and_each_fit_starts_a_new_audit():
    audit = LipschitzAudit(every=1)
    assert audit.summary().verdicts == ["No gradient was audited."]
    assert audit.summary().layers == ()
    for _ in range(2):
        fit(audit, more=[], max_steps=3)
        assert audit.summary().steps == 3


def test_a_resumed_run_starts_a_new_audit(tmp_path):
    fit(LipschitzAudit(every=4), more=[], max_epochs=1)
    module, lipschitz = Classifier(), LipschitzLR()
    run = trainer(lipschitz, LipschitzAudit(every=4), max_epochs=1)
    run.fit(module, loader())
    run.save_checkpoint("last.ckpt")
    assert not any("Audit" in name for name in torch.load("last.ckpt", weights_only=True)["callbacks"])
    audit, curves = LipschitzAudit(every=4), Curves()
    resumed = trainer(LipschitzLR(), audit, logger=curves, max_epochs=2)
    resumed.fit(Classifier(), loader(), ckpt_path="last.ckpt")
    assert [step for step, _ in curves.points] == [6, 10]
    assert audit.summary().steps == 2


class Keep(L.Callback):
    """Leaves each rank's summary and logged points in a file."""

    def __init__(self, audit):
        self.audit = audit

    def on_fit_end(self, trainer, pl_module):
        norms = [part.largest_norm for part in self.audit.summary().layers]
        torch.save({"norms": norms, "points": trainer.logger.points}, f"rank{trainer.global_rank}.pt")


def test_two_ranks_see_the_same_gradients_and_one_of_them_logs_and_prints(capfd):
    audit = LipschitzAudit(every=2)
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60))
    data = DataLoader(examples(), batch_size=8)
    run = trainer(LipschitzLR(), audit, Keep(audit), logger=Curves(), devices=2, strategy=strategy, max_epochs=1)
    run.fit(Classifier(), data)
    first, second = (torch.load(f"rank{rank}.pt") for rank in range(2))
    assert first["norms"] == second["norms"]
    assert [step for step, _ in first["points"]] == [0, 2, 4]
    assert second["points"] == []
    assert capfd.readouterr().err.count("L bounded every layer's gradient") == 1
