"""DeviceLoader: the order of examples, ranks, workers, resuming, and memory."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_lipschitz import ConfigurationError
from lit_lipschitz.data.loader import DeviceLoader, fold


def keep(images, generator):
    return images


def noisy(images, generator):
    return images + torch.rand(images.shape, generator=generator)


def loader(count=20, batch_size=4, transform=keep, **settings):
    images = torch.arange(count, dtype=torch.float32).reshape(count, 1)
    return DeviceLoader(images, torch.arange(count), batch_size, transform, **settings)


def labels(batches):
    return [batch.tolist() for _, batch in batches]


def test_an_epoch_is_a_permutation_and_the_next_one_another():
    epoch = 0
    source = loader(shuffle=True, epoch=lambda: epoch)
    first = labels(source)
    assert sorted(sum(first, [])) == list(range(20))
    assert first != labels(loader(count=20))
    assert labels(source) == first
    epoch = 1
    assert labels(source) != first


def test_images_and_labels_stay_together():
    for images, targets in loader(shuffle=True, seed=3):
        assert images[:, 0].tolist() == targets.tolist()


def test_ranks_share_the_global_batches_of_one():
    whole = labels(loader(batch_size=4, shuffle=True))
    ranks = [labels(loader(batch_size=2, shuffle=True, rank=rank, world_size=2)) for rank in range(2)]
    for batch, first, second in zip(whole, *ranks, strict=True):
        assert sorted(batch) == sorted(first + second)


@pytest.mark.parametrize("count", [20, 21, 22, 23])
def test_training_ranks_have_as_many_full_batches(count):
    parts = [loader(count, shuffle=True, rank=rank, world_size=2) for rank in range(2)]
    assert [len(part) for part in parts] == [len(labels(part)) for part in parts] == [count // 8] * 2
    assert all(len(batch) == 4 for part in parts for batch in labels(part))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_every_example_once(world_size):
    parts = [loader(21, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert all(len(part) == len(labels(part)) for part in parts)
    assert sorted(sum((sum(labels(part), []) for part in parts), [])) == list(range(21))


def test_what_is_random_depends_on_seed_epoch_batch_and_rank_alone():
    def drawn(**settings):
        return torch.cat([images for images, _ in loader(transform=noisy, **settings)])

    assert torch.equal(drawn(), drawn())
    for other in ({"seed": 1}, {"epoch": lambda: 1}):
        assert not torch.equal(drawn(), drawn(**other))
    first, second = (loader(count=8, transform=noisy, rank=rank, world_size=2) for rank in range(2))
    noise = [next(iter(part))[0] - part.images[rank::2][:4] for rank, part in enumerate((first, second))]
    assert not torch.equal(*noise)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_iteration_goes_on_where_it_was_left(num_workers):
    settings = {"shuffle": True, "transform": noisy, "num_workers": num_workers}
    whole = [images for images, _ in loader(**settings)]
    source = loader(**settings)
    iterator = iter(source)
    for _ in range(3):
        next(iterator)
    state = source.state_dict()
    resumed = loader(**settings)
    resumed.load_state_dict(state)
    rest = [images for images, _ in resumed]
    assert [r.tolist() for r in rest] == [w.tolist() for w in whole[3:]]
    assert len(list(resumed)) == 5


def test_a_state_of_another_epoch_starts_at_the_front():
    source = loader(shuffle=True, epoch=lambda: 1)
    source.load_state_dict({"epoch": 0, "position": 5})
    assert len(list(source)) == 5


def test_a_state_of_the_end_starts_at_the_front():
    source = loader(shuffle=True)
    assert len(list(source)) == 5
    resumed = loader(shuffle=True)
    resumed.load_state_dict(source.state_dict())
    assert len(list(resumed)) == 5


def test_workers_make_the_same_batches_in_the_same_order():
    alone, helped = (
        [
            (images.tolist(), targets.tolist())
            for images, targets in loader(shuffle=True, transform=noisy, num_workers=n)
        ]
        for n in (0, 2)
    )
    assert helped == alone


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ConfigurationError, match=r"global batches of 22, and the training set has 20 examples"):
        loader(batch_size=11, world_size=2, shuffle=True)
    with pytest.raises(ConfigurationError, match="batch_size=0"):
        loader(batch_size=0)


def test_seeds_differ():
    seeds = {fold(a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)


class Living(TorchDispatchMode):
    """Follows the bytes of the tensors that are made, from when they are made until they are gone."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()).data_ptr() not in self.known:
                self.known.add(address := storage.data_ptr())
                self.now += storage.nbytes()
                weakref.finalize(storage, self.gone, address, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def gone(self, address, size):
        self.known.discard(address)
        self.now -= size


@pytest.mark.parametrize("count", [1_000, 8_000])
def test_an_epoch_needs_the_memory_of_some_batches_whatever_the_size_of_the_data(count):
    images = torch.zeros(count, 3, 32, 32, dtype=torch.uint8)
    source = DeviceLoader(images, torch.zeros(count).long(), 100, lambda batch, _: batch.float(), shuffle=True)
    with Living() as living:
        for batch in source:
            assert len(batch[0]) == 100
    float_batch = 100 * 3 * 32 * 32 * 4
    order = 8 * count
    assert living.peak < 2.5 * float_batch + 3 * order  # of the data themselves: 3,072 bytes an image
    assert living.peak > float_batch
