"""Checks the papers' premise on a network in training: the output layer's gradient is the largest, and L bounds it."""

from lit_lipschitz.audit.summary import AuditSummary, LayerSummary

__all__ = ["AuditSummary", "LayerSummary"]
