"""Logits that stay sharded over the vocabulary."""

from . import elementwise, reductions  # noqa: F401  they fill the table of functions
