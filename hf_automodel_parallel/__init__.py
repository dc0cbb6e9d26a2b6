"""Parallelise any Hugging Face model, already built and PEFT-wrapped, inside ``Accelerator.prepare`` and the stock Trainer.

Only light names are imported here; everything that needs a model or a process group loads when it is first used.
"""

from typing import TYPE_CHECKING, Any

from .config import AutoParallelismConfig
from .errors import (
    AutoParallelError,
    ConfigError,
    NotAvailableYetError,
    PlanError,
    PrepareError,
    RegistrationError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from .activation_checkpointing import apply_selective_activation_checkpointing
    from .derive.verify import verify_plan
    from .integrations.trainer import AutoParallelArgumentsMixin, AutoParallelTrainingArguments
    from .plan.optimized import register_optimized_plan
    from .plan.selection import register_plan
    from .strategies.base import ParallelizationStrategy
    from .strategies.default import DefaultParallelizationStrategy
    from .strategies.registry import get_parallelization_strategy, register_parallel_strategy

__version__ = "0.1.0"

__all__ = [
    "AutoParallelArgumentsMixin",
    "AutoParallelError",
    "AutoParallelTrainingArguments",
    "AutoParallelismConfig",
    "ConfigError",
    "DefaultParallelizationStrategy",
    "NotAvailableYetError",
    "ParallelizationStrategy",
    "PlanError",
    "PrepareError",
    "RegistrationError",
    "UnsupportedError",
    "apply_selective_activation_checkpointing",
    "get_parallelization_strategy",
    "register_optimized_plan",
    "register_parallel_strategy",
    "register_plan",
    "verify_plan",
]

_LAZY = {
    "apply_selective_activation_checkpointing": ".activation_checkpointing",
    "AutoParallelArgumentsMixin": ".integrations.trainer",
    "AutoParallelTrainingArguments": ".integrations.trainer",
    "register_optimized_plan": ".plan.optimized",
    "register_plan": ".plan.selection",
    "verify_plan": ".derive.verify",
    "ParallelizationStrategy": ".strategies.base",
    "DefaultParallelizationStrategy": ".strategies.default",
    "get_parallelization_strategy": ".strategies.registry",
    "register_parallel_strategy": ".strategies.registry",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
