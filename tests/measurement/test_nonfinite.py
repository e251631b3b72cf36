"""Non-finite losses: what is reported and when, and what happens to the rate and the parameters."""

import math
import warnings
from pathlib import Path

import pytest
import torch
from helpers import Classifier, Slices, Steps, due_steps, loader, trainer, two_ranks
from lightning import Callback
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn import functional as F

from lit_lipschitz import LipschitzLR
from lit_lipschitz.errors import LitLipschitzError
from lit_lipschitz.measurement import nonfinite
from lit_lipschitz.measurement.nonfinite import WINDOW, NonfiniteLosses


class Spiking(Classifier):
    """The loss of one step is not finite; the activations are."""

    def __init__(self, step, value=math.nan, rank=0):
        super().__init__()
        self.step, self.value, self.rank = step, value, rank
        self.before = None

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        if self.global_step == self.step and self.global_rank == self.rank:
            self.before = [p.detach().clone() for p in self.parameters()]
            return loss + (loss.detach() * 0 + 1) * self.value  # no part of the gradient
        return loss


def fit(callback, module, **settings):
    run = trainer(callback, steps := Steps(), max_epochs=3, **settings)
    run.fit(module, loader())
    return [rate for (rate,) in steps.rates]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("step", [0, 4, 7, 17])
def test_it_is_reported_once_with_step_rank_and_last_rate(step, value):
    with pytest.warns(UserWarning, match=rf"a non-finite loss in step {step} on rank 0; ") as caught:
        rates = fit(LipschitzLR(schedule="none"), Spiking(step, value))
    (message,) = [str(one.message) for one in caught if "non-finite" in str(one.message)]
    if step:
        assert message.endswith(f"the last rate was {rates[step]:.4g}, which is kept")
    else:
        assert message.endswith("no rate has been computed yet")
    assert all(math.isfinite(rate) and rate < 1 for rate in rates)


def test_the_last_rate_is_kept_at_the_update_that_notices():
    free = fit(LipschitzLR(schedule="none", rule="inverse"), Classifier())
    with pytest.warns(UserWarning, match="in step 8"):
        rates = fit(LipschitzLR(schedule="none", rule="inverse"), Spiking(8))
    assert len({*free[0:6], *free[6:12], *free[12:18]}) > 2
    assert free[12] != free[11]
    assert rates[12] == rates[11]


def test_the_first_step_is_the_one_that_is_named():
    class Broken(Spiking):
        def training_step(self, batch, batch_idx):
            self.step = max(self.step, self.global_step)  # and all after it
            return super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="in step 9 on rank 0"):
        fit(LipschitzLR(schedule="none"), Broken(9))


@pytest.mark.parametrize("settings", [{}, {"update": 4}, {"measure": "pass"}, {"initial_lr": 0.01}])
@pytest.mark.parametrize("step", [0, 3, 9])
def test_on_one_cpu_raise_ends_the_run_before_the_parameters_move(settings, step):
    module = Spiking(step)
    with pytest.raises(LitLipschitzError, match=rf"a non-finite loss in step {step} on rank 0; .* to continue\)"):
        fit(LipschitzLR(schedule="none", on_nonfinite="raise", **settings), module)
    assert all(torch.equal(before, now) for before, now in zip(module.before, module.parameters(), strict=True))


@pytest.mark.parametrize("settings", [{"update": 4}, {"measure": "pass"}, {"initial_lr": 0.01, "update": 100}])
def test_the_end_of_an_epoch_evaluates_what_no_update_has(settings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(LipschitzLR(schedule="none", **settings), max_epochs=1).fit(Spiking(5), loader())
    seen = [str(one.message) for one in caught if "non-finite loss in step 5 on rank 0" in str(one.message)]
    assert len(seen) == 1


def test_accumulated_batches_count_as_their_step():
    with pytest.warns(UserWarning, match="in step 2 on rank 0"):
        fit(LipschitzLR(schedule="none"), Spiking(2), accumulate_grad_batches=2)


def test_it_costs_no_value_on_the_host(monkeypatch):
    monkeypatch.setattr(nonfinite, "is_on_host", lambda _: False)
    monitor = NonfiniteLosses(0, 1, 0)
    for name in ("item", "tolist", "__bool__", "__float__", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("read a tensor"))
    for step in range(5):
        monitor.update(torch.full((), math.nan), step)
    monitor.pack()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("on_device", [False, True])
def test_large_losses_are_no_spikes_and_steps_are_exact(on_device, dtype, monkeypatch):
    if on_device:
        monkeypatch.setattr(nonfinite, "is_on_host", lambda _: False)
    monitor = NonfiniteLosses(1, 3, 10)
    for step in range(10, 2_000_000, 150_001):
        monitor.update(torch.tensor(torch.finfo(dtype).max, dtype=dtype), step)
    assert monitor.first_nonfinite() is None
    monitor.update(torch.tensor(math.inf, dtype=dtype), 2_000_003)
    monitor.update(torch.tensor(math.inf, dtype=dtype), 2_000_004)
    assert monitor.first_nonfinite() == (2_000_003, [1])
    monitor.reset(2_000_005)
    assert monitor.first_nonfinite() is None


def test_the_ranks_agree_on_the_earliest_step_and_who_had_it():
    monitors = [NonfiniteLosses(rank, 3, 5) for rank in range(3)]
    for monitor, bad in zip(monitors, (7, 6, 6), strict=True):
        for step in (5, 6, 7):
            monitor.update(torch.tensor(math.nan if step == bad else 1.0), step)
    agreed = torch.stack([monitor.pack() for monitor in monitors]).amax(dim=0)
    for monitor in monitors:
        monitor.unpack(agreed)
        assert monitor.first_nonfinite() == (6, [1, 2])


def test_two_ranks_keep_the_same_rate_after_a_loss_of_one_of_them(monkeypatch):
    def write(message, **settings):
        with Path("warnings.txt").open("a") as file:
            file.write(f"{message}\n")

    monkeypatch.setattr("lit_lipschitz.control.diagnostics.warnings.warn", write)
    first, second = two_ranks(LipschitzLR(schedule="none"), Spiking(4, rank=1), 8, max_epochs=2)
    assert first["rates"] == second["rates"]
    assert all(math.isfinite(rate) and rate < 1 for (rate,) in first["rates"])
    told = [line for line in Path("warnings.txt").read_text().splitlines() if line.startswith("LipschitzLR")]
    last = f"{first['rates'][4][0]:.4g}"
    assert told == [f"LipschitzLR: a non-finite loss in step 4 on rank 1; the last rate was {last}, which is kept"]


def test_two_ranks_both_end_after_a_loss_of_one_of_them():
    with pytest.raises(Exception, match=r"a non-finite loss in step 4 on rank 1; .* to continue"):
        two_ranks(LipschitzLR(schedule="none", on_nonfinite="raise"), Spiking(4, rank=1), 8, max_epochs=2)


@pytest.mark.parametrize("step", [0, 5, WINDOW - 1, WINDOW, WINDOW + 3, 5 * WINDOW + 7])
def test_the_watch_knows_the_first_of_many_steps(step):
    monitor = NonfiniteLosses(rank=1, world_size=3, step=2)
    for i in range(6 * WINDOW):
        for bad in (False, i in (step, step + 1, step + WINDOW)):
            monitor.update(torch.tensor(-math.inf if bad else 1e38), 2 + i)
    assert monitor.first_nonfinite() == (2 + step, [1])
    monitor.reset(6 * WINDOW)
    monitor.update(torch.tensor(1.0), 6 * WINDOW + 1000)
    assert monitor.first_nonfinite() is None
    monitor.update(torch.tensor(math.nan), 6 * WINDOW + 1000)
    monitor.update(torch.tensor(1.0), 6 * WINDOW + 1001)
    assert monitor.first_nonfinite() == (6 * WINDOW + 1000, [1])


class TwoHeads(Classifier):
    """Two networks with an optimizer each; the loss of one of them is not finite in one batch."""

    def __init__(self, spiking, batch=3, backwards_first=False):
        super().__init__()
        self.automatic_optimization = False
        self.other = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        self.spiking, self.batch, self.backwards_first = spiking, batch, backwards_first
        self.rates = [[], []]

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.1) for net in (self.net, self.other)]

    def training_step(self, batch, batch_idx):
        steps = []
        for i, (net, optimizer) in enumerate(zip((self.net, self.other), self.optimizers(), strict=True)):
            # A constant rate follows inputs that grow.
            loss = F.cross_entropy(net((1 + self.current_epoch) * batch[0]), batch[1])
            if i == self.spiking and batch_idx == self.batch and self.current_epoch == 1:
                loss = loss + loss.detach() * math.nan
            optimizer.zero_grad()
            self.manual_backward(loss)
            steps.append((i, optimizer))
            if not self.backwards_first or i == 1:
                for j, one in steps:
                    one.step()
                    self.rates[j].append(one.param_groups[0]["lr"])
                steps = []


@pytest.mark.parametrize("backwards_first", [False, True])
@pytest.mark.parametrize("spiking", [0, 1])
def test_the_optimizer_whose_loss_it_was_keeps_its_rate_and_no_other(spiking, backwards_first):
    free, module = (TwoHeads(one, backwards_first=backwards_first) for one in (None, spiking))
    for one in (free, module):
        torch.manual_seed(0)
        for net in (one.net, one.other):
            for part in net:
                if isinstance(part, torch.nn.Linear):
                    part.reset_parameters()
    trainer(LipschitzLR(optimizers=[0, 1]), max_epochs=3).fit(free, loader())
    # Six steps of each an epoch; those of the second one are 12 to 23, in turns.
    step = 18 + (spiking and not backwards_first)
    with pytest.warns(UserWarning, match="a non-finite loss") as caught:
        trainer(LipschitzLR(optimizers=[0, 1]), max_epochs=3).fit(module, loader())
    (message,) = {str(one.message) for one in caught if "non-finite" in str(one.message)}
    kept = module.rates[spiking][11]
    assert message == (
        f"LipschitzLR: a non-finite loss in step {step} on rank 0; the last rate of optimizer {spiking} was "
        f"{kept:.4g}, which is kept"
    )
    until = min(step for step in due_steps(18, 6) if step > 13) - 1  # a step that is measured after it may change it
    assert module.rates[spiking][12:until] == [kept] * (until - 12)
    assert free.rates[spiking][12] != kept
    assert module.rates[1 - spiking] == free.rates[1 - spiking]
    assert free.rates[1 - spiking][12] != free.rates[1 - spiking][11]


def test_raise_names_the_optimizer_and_ends_before_its_parameters_move():
    module = TwoHeads(1)
    with pytest.raises(LitLipschitzError, match="a non-finite loss in step 19 on rank 0; the last rate of optimizer 1"):
        trainer(LipschitzLR(optimizers=[0, 1], on_nonfinite="raise"), max_epochs=3).fit(module, loader())
    assert [len(rates) for rates in module.rates] == [10, 9]


def test_a_loss_that_no_update_has_seen_is_in_a_checkpoint():
    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 10:
                trainer.save_checkpoint("middle.ckpt")

    run = trainer(LipschitzLR(schedule="none"), steps := Steps(), Save(), max_epochs=3)
    with pytest.warns(UserWarning, match="a non-finite loss in step 8 on rank 0"):
        run.fit(module := Spiking(8), Slices(16))
    assert steps.rates[12] == steps.rates[11]
    resumed = Spiking(-1)
    run = trainer(LipschitzLR(schedule="none"), later := Steps(), max_epochs=3)
    with pytest.warns(UserWarning, match="a non-finite loss in step 8 on rank 0; the last rate was .*, which is kept"):
        run.fit(resumed, Slices(16), ckpt_path="middle.ckpt")
    assert later.rates == steps.rates[10:]
    assert all(torch.equal(one, two) for one, two in zip(module.parameters(), resumed.parameters(), strict=True))


def test_a_checkpoint_behind_a_report_tells_of_nothing():
    run = trainer(LipschitzLR(schedule="none"), max_epochs=2)
    with pytest.warns(UserWarning, match="a non-finite loss in step 8"):
        run.fit(Spiking(8), loader())
    run.save_checkpoint("end.ckpt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(LipschitzLR(schedule="none"), max_epochs=3).fit(Spiking(-1), loader(), ckpt_path="end.ckpt")
    assert not [one for one in caught if "non-finite" in str(one.message)]


def test_a_checkpoint_of_one_rank_tells_of_another_ranks_loss():
    monitors = [NonfiniteLosses(rank, 2, 5) for rank in range(2)]
    monitors[1].update(torch.tensor(math.nan), 7)
    agreed = torch.stack([monitor.pack() for monitor in monitors]).amax(dim=0)
    monitors[0].unpack(agreed)
    resumed = NonfiniteLosses(0, 1, 0)
    resumed.load_state_dict(monitors[0].state_dict())
    resumed.update(torch.tensor(math.nan), 9)
    again = NonfiniteLosses(0, 1, 0)
    again.load_state_dict(resumed.state_dict())
    assert resumed.first_nonfinite() == again.first_nonfinite() == (7, [1])
    again.reset(10)
    assert again.first_nonfinite() is None


@pytest.fixture
def mesh():
    """One device, as a mesh."""
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_sharded_loss_is_evaluated_where_it_lies(mesh):
    for placement in (Replicate(), Partial()):
        monitor = NonfiniteLosses(0, 1, 0)
        monitor.update(DTensor.from_local(torch.tensor(1.0), mesh, [placement]), 0)
        assert monitor.first_nonfinite() is None
        monitor.update(DTensor.from_local(torch.tensor(math.inf), mesh, [placement]), 1)
        assert monitor.first_nonfinite() == (1, [0])
    monitor = NonfiniteLosses(0, 1, 0)
    monitor.update(DTensor.from_local(torch.tensor([1.0, math.nan]), mesh, [Shard(0)]), 3)
    assert monitor.first_nonfinite() == (3, [0])


def test_a_fit_whose_loss_is_of_several_devices(mesh):
    class Spread(Spiking):
        def training_step(self, batch, batch_idx):
            return DTensor.from_local(super().training_step(batch, batch_idx), mesh, [Replicate()])

    with pytest.warns(UserWarning, match="in step 4 on rank 0; the last rate was"):
        rates = fit(LipschitzLR(loss="cross_entropy", schedule="none"), Spread(4))
    assert len(rates) == 18
