"""A plain DistributedDataParallel loop with ``attach`` has the rates and weights of the callback on as many ranks."""

import os

import pytest
import torch
from helpers import Classifier, examples, two_ranks
from helpers.loops import EPOCHS, OPTIMIZERS, network
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from lit_lipschitz import LipschitzLR, attach
from lit_lipschitz.data import DeviceLoader


def train_a_rank(rank, world_size, optimizer, settings, shards=False):
    """Leaves the rates and the weights in a file, as the recorder of Lightning's ranks does."""
    torch.distributed.init_process_group(
        "gloo", init_method="file://" + os.path.abspath("store"), rank=rank, world_size=world_size
    )
    net = network()
    if shards:
        wrapped = fully_shard(net, mesh=init_device_mesh("cpu", (world_size,)))
    else:
        wrapped = nn.parallel.DistributedDataParallel(net)
    by = OPTIMIZERS[optimizer](net.parameters())
    epoch = 0
    batches = DeviceLoader(
        *examples().tensors,
        16 // world_size,
        lambda batch, _: batch,
        shuffle=True,
        epoch=lambda: epoch,
        rank=rank,
        world_size=world_size,
    )
    control = attach(
        wrapped,
        by,
        total_steps=EPOCHS * len(batches),
        epoch_steps=len(batches),
        notify=print if rank == 0 else lose,
        **settings,
    )
    rates = []
    for epoch in range(EPOCHS):  # noqa: B007
        for inputs, targets in batches:
            by.zero_grad()
            F.cross_entropy(wrapped(inputs), targets).backward()
            by.step()
            rates.append([control.lr])
    control.share()
    weights = [] if shards else [p.detach() for p in net.parameters()]
    torch.save({"rates": rates, "weights": weights}, f"rank{rank}.pt")
    torch.save(control.state_dict(), f"state{rank}.pt")
    torch.distributed.destroy_process_group()


def lose(message):
    raise AssertionError(f"the second rank has said {message}")


def train_ranks(count, *arguments):
    torch.multiprocessing.start_processes(train_a_rank, (count, *arguments), count, start_method="fork")
    return [torch.load(f"rank{rank}.pt") for rank in range(count)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_ranks_have_the_numbers_of_the_callback_and_share_their_state(optimizer):
    torch.manual_seed(1)
    expected = two_ranks(LipschitzLR(), Classifier(OPTIMIZERS[optimizer], network()), 8, max_epochs=EPOCHS)
    found = train_ranks(2, optimizer, {})
    for own, other in zip(found, expected, strict=True):
        assert own["rates"] == other["rates"]
        assert all(torch.equal(a, b) for a, b in zip(own["weights"], other["weights"], strict=True))
    first, second = (torch.load(f"state{rank}.pt")["optimizers"][0] for rank in range(2))
    assert first["decision"] == second["decision"]
    assert str(first["head"]) == str(second["head"])


def test_the_same_global_batch_gives_the_same_rates_on_one_and_two_ranks():
    whole, (parts, _) = train_ranks(1, "SGD", {"norm": "sample"})[0], train_ranks(2, "SGD", {"norm": "sample"})
    assert [rate for (rate,) in parts["rates"]] == pytest.approx([rate for (rate,) in whole["rates"]], rel=1e-4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_sharded_network_has_the_rates_of_a_replicated_one(optimizer):
    replicated, sharded = (train_ranks(2, optimizer, {}, shards) for shards in (False, True))
    assert sharded[0]["rates"] == sharded[1]["rates"]
    expected = [rate for (rate,) in replicated[0]["rates"]]
    assert [rate for (rate,) in sharded[0]["rates"]] == pytest.approx(expected, rel=1e-5)
