"""The statistics of an audit, from plain numbers."""

import math

from lit_lipschitz.audit.summary import AuditTally


def test_ties_count_for_both_and_rounding_for_none():
    tally = AuditTally()
    assert tally.add({"a": (2.0, 1.0), "b": (2.0, 0.5)}, 2.0 * (1 - 1e-6), "b")
    summary = tally.summary("b", ["a", "b"])
    assert [part.largest_by_norm for part in summary.layers] == [1, 1]
    assert [part.largest_by_entry for part in summary.layers] == [1, 0]
    assert [part.exceeded for part in summary.layers] == [0, 0]
    assert summary.bounded == 1


def test_steps_that_are_not_finite_are_counted_and_nothing_else():
    tally = AuditTally()
    tally.add({"a": (2.0, 1.0), "b": (4.0, 1.0)}, 1.0, "b")
    assert not tally.add({"a": (math.inf, math.inf), "b": (1e9, 1e9)}, 1.0, "b")
    assert not tally.add({"a": (math.nan, 1.0), "b": (1e9, 1e9)}, 1.0, "b")
    summary = tally.summary("b", ["a", "b"])
    assert (summary.steps, summary.nonfinite, summary.bounded, summary.compared) == (1, 2, 0, 1)
    assert [part.nonfinite for part in summary.layers] == [2, 0]
    assert [part.median_norm for part in summary.layers] == [2.0, 4.0]
    assert [part.largest_ratio for part in summary.layers] == [2.0, 4.0]
    assert summary.verdicts[-1] == "Gradients were not finite in 2 audited steps, which are not counted."
