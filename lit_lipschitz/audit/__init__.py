"""Checks the papers' premise on a network in training: the output layer's gradient is the largest, and L bounds it."""

from lit_lipschitz.audit.gradients import GradientSnapshot, layers_with_parameters, read_gradients
from lit_lipschitz.audit.summary import AuditSummary, AuditTally, LayerSummary
from lit_lipschitz.audit.table import print_summary

__all__ = [
    "AuditSummary",
    "AuditTally",
    "GradientSnapshot",
    "LayerSummary",
    "layers_with_parameters",
    "print_summary",
    "read_gradients",
]
