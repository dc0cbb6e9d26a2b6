"""The audit of a training step: no lost gradient, no flipped ``requires_grad``, no replica that drifts."""

from .first_step import Audit, GradientAuditError

__all__ = ["Audit", "GradientAuditError"]
