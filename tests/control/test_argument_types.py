"""Types of the arguments of LipschitzLR, which are checked where they are given, and how it prints itself."""

import numpy as np
import pytest

from lit_lipschitz import ConfigurationError, LipschitzLR


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_lr": "0.1"}, r"LipschitzLR\(max_lr='0.1'\): expected a number or None, found str"),
        ({"min_lr": None}, r"LipschitzLR\(min_lr=None\): expected a number, found NoneType"),
        ({"min_lr": True}, r"LipschitzLR\(min_lr=True\): expected a number, found bool"),
        ({"max_growth": [2]}, r"max_growth=\[2\]\): expected a number or None, found list"),
        ({"dry_run": "no"}, r"dry_run='no'\): expected True or False, found str"),
        ({"restore": 1}, r"restore=1\): expected True or False, found int"),
        ({"head": 3}, r"head=3\): expected a text, found int"),
        ({"loss": ["mse"]}, r"loss=\['mse'\]\): expected a text, found list"),
        ({"bound": []}, r"bound=\[\]\): expected a text, found list"),
        ({"norm": 2}, r"norm=2\): expected a text, found int"),
        ({"rule": None}, r"rule=None\): expected a text, found NoneType"),
        ({"initial_lr": "x"}, r"initial_lr='x'\): expected a number or None, found str"),
        ({"weight_decay": "x"}, r"weight_decay='x'\): expected a number or None, found str"),
        ({"update": 1.5}, r"update=1.5\): expected 'epoch' or a number of steps >= 1"),
        ({"measure_every": "x"}, r"measure_every='x'\): expected 'auto' or a number of steps >= 1"),
    ],
    ids=str,
)
def test_a_wrong_type_is_told_where_it_is_given(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        LipschitzLR(**arguments)


@pytest.mark.parametrize("value", [1, 1.0, np.float32(1.0), np.int64(1)])
def test_numbers_of_all_kinds_are_numbers(value):
    assert LipschitzLR(max_lr=value).policy.max_lr == 1


@pytest.mark.parametrize(
    ("short", "name"),
    [
        ("ce", "cross_entropy"),
        ("bce", "binary_cross_entropy"),
        ("mse", "mean_squared_error"),
        ("mae", "mean_absolute_error"),
    ],
)
def test_losses_have_short_names(short, name):
    assert LipschitzLR(loss=short).options == LipschitzLR(loss=name).options


@pytest.mark.parametrize(
    "text",
    [
        "LipschitzLR()",
        "LipschitzLR(max_lr=0.1)",
        "LipschitzLR(bound='paper', rule='inverse')",
        "LipschitzLR(norm='sample', optimizers=[0, 1])",
        "LipschitzLR(loss='mean_squared_error', update=10, dry_run=True, restore=False)",
    ],
)
def test_it_prints_as_the_call_that_makes_it(text):
    assert repr(eval(text)) == text
