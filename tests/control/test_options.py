"""Options: defaults, and the error for each value that is out of its range."""

import math

import pytest

from lit_lipschitz import ConfigurationError
from lit_lipschitz.control.options import Options


def test_by_default_the_training_batches_are_measured_and_the_loss_is_found():
    options = Options()
    assert options.running
    assert options.loss_name is None


def test_a_pass_and_a_named_loss():
    options = Options(loss="huber", measure="pass", initial_lr=1e-3)
    assert not options.running
    assert options.loss_name == "huber"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "hinge"}, "LipschitzLR(loss='hinge'): expected one of 'auto', 'measured', "),
        ({"on_nonfinite": "skip"}, "LipschitzLR(on_nonfinite='skip'): expected one of 'keep', 'raise'"),
        ({"schedule": "cosine"}, "LipschitzLR(schedule='cosine'): expected one of 'auto', 'none'"),
        ({"measure": "once"}, "LipschitzLR(measure='once'): expected one of 'running', 'pass'"),
        ({"weights": "biases"}, "LipschitzLR(weights='biases'): expected one of 'decayed', 'parameters', 'all'"),
        *[
            ({"update": update}, f"LipschitzLR(update={update!r}): expected 'epoch' or a number of steps >= 1")
            for update in (0, -3, 2.0, True, "step")
        ],
        ({"measure": "pass", "update": 5}, "LipschitzLR(measure='pass', update=5): a pass is made once an epoch"),
        *[
            ({"initial_lr": rate}, f"LipschitzLR(initial_lr={rate}): expected a positive number")
            for rate in (0.0, -0.1, math.inf, math.nan)
        ],
    ],
    ids=str,
)
def test_a_value_out_of_its_range_is_refused(settings, message):
    with pytest.raises(ConfigurationError) as error:
        Options(**settings)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("update", ["epoch", 1, 100])
def test_updates_are_every_epoch_or_every_few_steps(update):
    assert Options(update=update).update == update
