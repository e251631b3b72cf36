"""The one all-reduce, without a Trainer: two ranks whose tensors are compared here."""

import pytest
import torch

from lit_lipschitz.control.reduction import MaxReduction

CPU = torch.device("cpu")


def registered(reduce, slots):
    reduction = MaxReduction(reduce, CPU)
    for name, values in slots.items():
        reduction.register(name, lambda values=values: torch.tensor(values))
    return reduction


def together(names, *ranks):
    """What each rank gets back if all of them reduce the same names."""
    packed = []
    for slots in ranks:
        registered(lambda tensor: packed.append(tensor) or tensor, slots).share(names)
    assert len(packed) == len(ranks)  # one all-reduce a rank, however many names
    largest = torch.stack(packed).amax(dim=0)
    return [registered(lambda _: largest, slots).reduce(names) for slots in ranks]


@pytest.mark.parametrize("names", [["norms", "loss"], ["loss", "norms"], ["norms"]])
def test_all_ranks_get_the_largest_numbers_of_each_statistic(names):
    found = together(names, {"norms": [1.0, 5.0], "loss": [3.0]}, {"norms": [2.0, 4.0], "loss": [-1.0]})
    expected = {"norms": [2.0, 5.0], "loss": [3.0]}
    assert found == [{name: expected[name] for name in names}] * 2


def test_a_statistic_takes_its_own_part_and_chooses_what_is_read():
    reduction, taken = MaxReduction(lambda tensor: 2 * tensor, CPU), []
    reduction.register("first", lambda: torch.tensor([1.0]))
    reduction.register(
        "sums", lambda: torch.tensor([1.0, 2.0, 3.0]), lambda part: taken.append(part) or part.sum()[None]
    )
    reduction.register("nothing", lambda: torch.tensor([4.0]), lambda part: part[:0])
    assert reduction.reduce(["first", "sums", "nothing"]) == {"first": [2.0], "sums": [12.0], "nothing": []}
    assert [part.tolist() for part in taken] == [[2.0, 4.0, 6.0]]


def test_a_statistic_of_the_same_name_is_replaced():
    reduction = registered(lambda tensor: tensor, {"norms": [1.0, 5.0]})
    reduction.register("norms", lambda: torch.tensor([7.0]))
    assert reduction.reduce(["norms"]) == {"norms": [7.0]}
