"""The audit of a training step: no lost gradient, no changed ``requires_grad``, no diverging replicas."""

from .first_step import Audit, GradientAuditError

__all__ = ["Audit", "GradientAuditError"]
