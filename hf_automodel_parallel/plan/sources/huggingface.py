"""A Hugging Face model's own plan: ``_tp_plan`` of classes and instances, ``base_model_tp_plan`` of configs."""

from __future__ import annotations

from torch import nn

from ... import compat
from ...core.sharding_spec import PlanEntry
from ..layer_kinds import only_looks_up


def huggingface_plan(model: nn.Module) -> dict[str, PlanEntry]:
    """Collect the plan entries of ``model`` (unwrapped) and of every model inside it.

    Later sources override earlier ones: ``_tp_plan`` of the class; ``base_model_tp_plan`` of a base model's config;
    ``_tp_plan`` of the instance, if it differs from both. Patterns of an inner model are prefixed with its name. An
    input embedding that no entry matches is sharded over the vocabulary, as transformers does from 5.18 on.

    Returns:
        pattern -> entry, empty when no part of the model has a plan.
    """
    entries: dict[str, PlanEntry] = {}

    def add(prefix: str, plan: dict[str, str], source: str) -> None:
        for key, style in plan.items():
            pattern = f"{prefix}{key}"
            known = entries.get(pattern)
            if known is None or known.style != style:
                entries[pattern] = PlanEntry(pattern, style, source)

    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        class_plan = compat.tensor_parallel_plan_of_class(type(module))
        if class_plan:
            add(prefix, class_plan, f"class {type(module).__name__}")
        config = getattr(module, "config", None)
        config_plan = getattr(config, "base_model_tp_plan", None)
        if config_plan and getattr(module, "base_model", None) is module:
            add(prefix, dict(config_plan), f"{type(config).__name__}.base_model_tp_plan")
    # transformers' post_init copies the plans of class and config to the instance, so only an entry that differs was
    # set by the user. Users set it on the outermost model, so its entries come last.
    declared = {pattern: entry.style for pattern, entry in entries.items()}
    for name, module in reversed(list(model.named_modules())):
        prefix = f"{name}." if name else ""
        plan = compat.instance_tensor_parallel_plan(module)
        changed = {key: style for key, style in plan.items() if declared.get(f"{prefix}{key}") != style}
        add(prefix, changed, f"instance of {type(module).__name__}")
    if entries:
        _add_input_embedding(model, entries)
    return entries


def _add_input_embedding(model: nn.Module, entries: dict[str, PlanEntry]) -> None:
    embedding = compat.input_embedding_module(model)
    table = None if embedding is None else _embedding_below(embedding)
    if table is None or not only_looks_up(table):
        return
    for name, module in model.named_modules():
        if module is embedding and name not in entries:
            entries[name] = PlanEntry(name, "embedding_rowwise", "derived: input embedding")


def _embedding_below(module: nn.Module) -> nn.Embedding | None:
    """``module`` itself, or the embedding inside of PEFT's wrapper; None if it is not an ``nn.Embedding``."""
    candidate = getattr(module, "base_layer", getattr(module, "original_module", module))
    return candidate if isinstance(candidate, nn.Embedding) else None
