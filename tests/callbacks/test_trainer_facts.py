"""What is read of a trainer: callbacks of both of Lightning's packages, and when a checkpoint may be saved."""

import math
from types import SimpleNamespace

import pytest
from lightning.pytorch import callbacks as ours

from lit_lipschitz.callbacks.trainer_facts import is_lightnings, may_save_checkpoint


@pytest.mark.filterwarnings("ignore")
def test_callbacks_of_both_packages_are_known_and_others_of_the_same_name_are_not():
    others = pytest.importorskip("pytorch_lightning").callbacks
    for package in (ours, others):
        averaging = package.StochasticWeightAveraging(0.1)
        assert is_lightnings(averaging, "StochasticWeightAveraging")
        assert is_lightnings(type("Own", (package.Timer,), {})(), "Timer")
        assert not is_lightnings(averaging, "Timer")
    assert not is_lightnings(type("Timer", (), {})(), "Timer")


@pytest.mark.parametrize(
    ("validation", "batch_idx", "expected"),
    [(math.inf, 3, False), (4, 3, True), (4, 4, False), (None, 3, True)],
)
def test_a_checkpoint_may_be_saved_before_a_validation(validation, batch_idx, expected):
    """A validation by the clock, which has no number of batches, may come after any batch."""
    trainer = SimpleNamespace(global_step=5, checkpoint_callbacks=[], is_last_batch=False, val_check_batch=validation)
    assert may_save_checkpoint(trainer, batch_idx) == expected
