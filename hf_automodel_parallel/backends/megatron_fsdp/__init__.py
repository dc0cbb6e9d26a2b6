"""NVIDIA's megatron-fsdp as the data-parallel engine under our tensor parallelism.

Light to import: the package ``megatron_fsdp`` is imported when it is first needed, or when :data:`HAVE_MEGATRON_FSDP`
is read.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    #: True if ``megatron_fsdp`` can be imported; evaluated at each read.
    HAVE_MEGATRON_FSDP: bool

__all__ = ["HAVE_MEGATRON_FSDP"]


def __getattr__(name: str) -> Any:
    if name == "HAVE_MEGATRON_FSDP":
        from .engine import importable

        return importable()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
