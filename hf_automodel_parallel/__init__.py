"""Parallelise a built, optionally PEFT-wrapped Hugging Face model in ``Accelerator.prepare`` and the stock Trainer.

This module imports only the config and the errors; all other names are imported on first access.
"""

from typing import TYPE_CHECKING, Any

from .config import AutoParallelismConfig
from .errors import (
    AutoParallelError,
    CheckpointError,
    ConfigError,
    NotAvailableYetError,
    PlanError,
    PrepareError,
    RegistrationError,
    UnsupportedError,
)
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .accelerate_plugin.full_parameter import full_parameter
    from .arguments import AutoParallelArgumentsMixin, AutoParallelTrainingArguments
    from .checkpoint.background import wait_for_saves
    from .checkpoint.commit import last_complete_checkpoint
    from .checkpoint.training import load_training_state
    from .export.merged import save_merged
    from .export.streaming import stream_weights
    from .loading import from_pretrained
    from .plan.select import register_plan
    from .plan.sources.registry import register_optimized_plan
    from .plan_search.verify import verify_plan
    from .planner.explain import explain
    from .selective_checkpointing import apply_selective_activation_checkpointing
    from .strategies.base import ParallelizationStrategy
    from .strategies.default import DefaultParallelizationStrategy
    from .strategies.registry import get_parallelization_strategy, register_parallel_strategy
    from .trainer_plugin.metrics import ParallelMetrics

__all__ = [
    "AutoParallelArgumentsMixin",
    "AutoParallelError",
    "AutoParallelTrainingArguments",
    "AutoParallelismConfig",
    "CheckpointError",
    "ConfigError",
    "DefaultParallelizationStrategy",
    "NotAvailableYetError",
    "ParallelMetrics",
    "ParallelizationStrategy",
    "PlanError",
    "PrepareError",
    "RegistrationError",
    "UnsupportedError",
    "apply_selective_activation_checkpointing",
    "explain",
    "from_pretrained",
    "full_parameter",
    "get_parallelization_strategy",
    "last_complete_checkpoint",
    "load_training_state",
    "register_optimized_plan",
    "register_parallel_strategy",
    "register_plan",
    "save_merged",
    "stream_weights",
    "verify_plan",
    "wait_for_saves",
]

_LAZY = {
    "explain": ".planner.explain",
    "apply_selective_activation_checkpointing": ".selective_checkpointing",
    "from_pretrained": ".loading",
    "full_parameter": ".accelerate_plugin.full_parameter",
    "save_merged": ".export.merged",
    "stream_weights": ".export.streaming",
    "AutoParallelArgumentsMixin": ".arguments",
    "AutoParallelTrainingArguments": ".arguments",
    "register_optimized_plan": ".plan.sources.registry",
    "register_plan": ".plan.select",
    "verify_plan": ".plan_search.verify",
    "ParallelizationStrategy": ".strategies.base",
    "DefaultParallelizationStrategy": ".strategies.default",
    "get_parallelization_strategy": ".strategies.registry",
    "register_parallel_strategy": ".strategies.registry",
    "ParallelMetrics": ".trainer_plugin.metrics",
    "last_complete_checkpoint": ".checkpoint.commit",
    "load_training_state": ".checkpoint.training",
    "wait_for_saves": ".checkpoint.background",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
