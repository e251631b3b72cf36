import math

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from lit_lipschitz.measurement import norms
from lit_lipschitz.measurement.running_maximum import RunningMaximum


def batches(seed=0, count=4):
    generator = np.random.default_rng(seed)
    return [
        generator.standard_normal((rows, 5)) * scale for rows, scale in zip((6, 9, 3, 6), (1, 3, 2, 1), strict=True)
    ]


def with_ones(batch):
    return np.concatenate([batch, np.ones((len(batch), 1))], axis=1)


REFERENCE = {
    "frobenius": lambda a: math.sqrt((a**2).sum()),
    "sample": lambda a: max(math.sqrt((row**2).sum()) for row in a),
}


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", list(REFERENCE))
def test_the_maximum_over_batches_is_numpys(norm, bias, mean):
    statistic = RunningMaximum(norm, 5, bias=bias, mean=mean)
    expected = 0.0
    for batch in batches():
        statistic.update(torch.from_numpy(batch).float())
        seen = with_ones(batch) if bias else batch
        expected = max(expected, REFERENCE[norm](seen) / (math.sqrt(len(seen)) if mean else 1))
    assert statistic.values.tolist() == pytest.approx([expected, 9, 0, 0, 0], rel=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_power_iteration_reaches_the_singular_value_from_below(bias):
    statistic = RunningMaximum("spectral", 5, bias=bias)
    batch = batches()[1]
    exact = np.linalg.svd(with_ones(batch) if bias else batch, compute_uv=False)[0]
    values = []
    for _ in range(20):
        statistic.update(torch.from_numpy(batch).float())
        values.append(statistic.values[0].item())
    assert values == sorted(values)
    assert 0.8 * exact < values[0] <= exact * (1 + 1e-6)
    assert values[-1] == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype):
    statistic = RunningMaximum("frobenius", 64)
    statistic.update(torch.full((32, 64), 2.0e3 if dtype is torch.float16 else 1e10, dtype=dtype))
    expected = (2.0e3 if dtype is torch.float16 else 1e10) * math.sqrt(32 * 64)
    assert statistic.values[0].item() == pytest.approx(expected, rel=1e-2)
    assert statistic.values[2].item() == 0


@pytest.mark.parametrize("norm", ["frobenius", "sample", "spectral"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_is_left_out_and_counted(norm, poison):
    statistic, clean = RunningMaximum(norm, 5), RunningMaximum(norm, 5)
    for i, batch in enumerate(batches()):
        batch = torch.from_numpy(batch).float()
        if i != 1:
            clean.update(batch)
        else:
            batch[2, 3] = poison
        statistic.update(batch)
    assert statistic.values[2].item() == 1
    assert statistic.values[0].item() == pytest.approx(clean.values[0].item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_reach_the_statistic(dtype):
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(64, 512, generator=generator).relu()
    inside, outside = RunningMaximum("spectral", 512, bias=True), RunningMaximum("spectral", 512, bias=True)
    outside.update(activations)
    with torch.autocast("cpu", dtype=dtype):
        inside.update(activations)
    assert torch.equal(inside.values, outside.values)


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_power_iteration_at_any_scale_and_after_a_batch_of_zeros(scale):
    statistic = RunningMaximum("spectral", 5)
    batch = torch.from_numpy(batches()[1]).float() * scale
    for _ in range(20):
        statistic.update(batch)
    before = statistic.values[0].item()
    assert before == pytest.approx(np.linalg.svd(batch.double().numpy(), compute_uv=False)[0], rel=1e-4)
    statistic.reset()
    statistic.update(torch.zeros(3, 5))
    assert statistic.values.tolist() == [0, 3, 0, 0, 0]
    statistic.update(batch)
    assert statistic.values[0].item() == pytest.approx(before, rel=1e-5)


def test_the_squares_are_the_frobenius_norm_of_the_squared_matrix():
    statistic = RunningMaximum("frobenius", 5, squares=True)
    for batch in batches():
        statistic.update(torch.from_numpy(batch).float())
    statistic.update(torch.full((1, 5), math.nan))
    expected = max(np.linalg.norm(np.square(batch)) for batch in batches())
    assert statistic.values[3].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("norm", ["frobenius", "sample", "spectral"])
def test_an_empty_batch_is_refused(norm):
    with pytest.raises(ValueError, match=r"shape \(0, 5\): expected \(rows, width\) with at least 1 row"):
        RunningMaximum(norm, 5).update(torch.zeros(0, 5))


def test_merging_is_seeing_both():
    first, second, both = (RunningMaximum("sample", 5) for _ in range(3))
    for i, batch in enumerate(batches()):
        batch = torch.from_numpy(batch).float()
        (first if i % 2 else second).update(batch)
        both.update(batch)
    first.merge(second)
    assert first.values.tolist() == both.values.tolist()


def test_reset_forgets_the_batches():
    statistic = RunningMaximum("frobenius", 5)
    statistic.update(torch.ones(2, 5))
    statistic.reset()
    assert statistic.values.tolist() == [0, 0, 0, 0, 0]


def test_the_state_goes_through_a_weights_only_file(tmp_path):
    statistic = RunningMaximum("spectral", 5, bias=True)
    for batch in batches():
        statistic.update(torch.from_numpy(batch).float())
    torch.save(statistic.state_dict(), tmp_path / "state")
    restored = RunningMaximum("spectral", 5, bias=True)
    restored.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert torch.equal(restored.values, statistic.values)
    assert torch.equal(restored.direction, statistic.direction)


def test_the_state_of_another_head_is_refused():
    with pytest.raises(ValueError, match=r"direction: expected shape \(5,\), found \(7,\)"):
        RunningMaximum("spectral", 5).load_state_dict(RunningMaximum("spectral", 7).state_dict())


def test_no_graph_is_built():
    statistic = RunningMaximum("frobenius", 5)
    statistic.update(torch.ones(2, 5, requires_grad=True))
    assert not statistic.values.requires_grad


@pytest.mark.parametrize("norm", ["frobenius", "sample", "spectral"])
def test_double_precision_is_measured_too(norm):
    double, single = (RunningMaximum(norm, 5, squares=True) for _ in range(2))
    for batch in batches():
        double.update(torch.from_numpy(batch).double())
        single.update(torch.from_numpy(batch).float())
    assert double.values.dtype == torch.float32
    torch.testing.assert_close(double.values, single.values)


NORMS = ["frobenius", "sample", "spectral"]


def peak_memory(function):
    """The most bytes that a call holds at once beyond what there was, copies inside of torch's operations included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    now = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_no_copy_of_the_activations_is_made(norm, dtype, monkeypatch):
    monkeypatch.setattr(norms, "PART", 2**14)
    peaks = []
    for rows in (2048, 4096):
        activations = torch.randn(rows, 512).to(dtype)
        statistic = RunningMaximum(norm, 512, bias=True, mean=True, squares=norm == "frobenius")
        statistic.update(activations)
        peaks.append(peak_memory(lambda statistic=statistic, of=activations: statistic.update(of)))
    # Two parts in fp32, where they are copied; a number a row, and some vectors. A copy would be 2 MiB a thousand rows.
    part = 4 * 2**14 if dtype is not torch.float32 else 0
    assert peaks[1] <= 2 * part + 2 * 4 * 4096 + 16 * 4 * 512
    assert peaks[1] - peaks[0] <= 2 * 4 * 2048 + 4096


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_parts_and_layouts_change_nothing_but_the_rounding(norm, dtype, monkeypatch):
    channels_first = torch.randn(6, 5, 3, 4).to(dtype)
    rows = channels_first.movedim(1, -1).reshape(-1, 5)
    whole, parts, scattered = (RunningMaximum(norm, 5, bias=True, squares=norm != "spectral") for _ in range(3))
    whole.update(rows)
    monkeypatch.setattr(norms, "PART", 35)
    parts.update(rows)
    scattered.update(channels_first.movedim(1, -1))
    for other in (parts, scattered):
        torch.testing.assert_close(other.values, whole.values)
        torch.testing.assert_close(other.direction, whole.direction)
    assert whole.values[1] == 72


def operations(function):
    """The operations on tensors that a call makes."""

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), settings=None):
            names.append(str(operation))
            return operation(*arguments, **(settings or {}))

    names = []
    with Record():
        function()
    return names


def test_a_batch_costs_as_many_operations_whatever_its_size():
    found = {}
    for rows, width in ((8, 16), (512, 16), (8, 1024)):
        statistic = RunningMaximum("frobenius", width, bias=True, mean=True)
        batch, count = torch.randn(rows, width), torch.tensor(float(rows))
        found[rows, width] = operations(lambda s=statistic, b=batch, c=count: (s.add(b), s.finish(c)))
    (names,) = {tuple(names) for names in found.values()}
    assert len(names) <= 17
    assert not any("_local_scalar" in name or "item" in name for name in names)
