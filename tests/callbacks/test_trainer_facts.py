"""What is read of a trainer: callbacks of both of Lightning's packages."""

import pytest
from lightning.pytorch import callbacks as ours

from lit_lipschitz.callbacks.trainer_facts import is_lightnings


@pytest.mark.filterwarnings("ignore")
def test_callbacks_of_both_packages_are_known_and_others_of_the_same_name_are_not():
    others = pytest.importorskip("pytorch_lightning").callbacks
    for package in (ours, others):
        averaging = package.StochasticWeightAveraging(0.1)
        assert is_lightnings(averaging, "StochasticWeightAveraging")
        assert is_lightnings(type("Own", (package.Timer,), {})(), "Timer")
        assert not is_lightnings(averaging, "Timer")
    assert not is_lightnings(type("Timer", (), {})(), "Timer")
