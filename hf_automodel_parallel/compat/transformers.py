"""Private names of transformers' models; :mod:`.names` lists them."""

from __future__ import annotations

import copy
import functools
import inspect
import re
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    pass


def config_with_attention(config: Any, name: str) -> Any:
    """Return a shallow copy of a transformers config with ``name`` as attention implementation.

    The public setter also writes to the sub-configs, which the copy shares with the original.
    """
    result = copy.copy(config)
    result._attn_implementation_internal = name
    return result


def uses_attention_registry(module: nn.Module) -> bool:
    """True if the forward of ``module`` takes attention from transformers' ``ALL_ATTENTION_FUNCTIONS`` (5.17-5.24)."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def transformers_parallel_styles() -> dict[str, Any]:
    """Return transformers' registry of style name -> layer object, empty if this version has none.

    The registry lives in ``transformers.distributed.tensor_parallel`` from 5.17 on.
    """
    try:
        from transformers.distributed import tensor_parallel
    except ImportError:
        return {}
    registry = getattr(tensor_parallel, "ALL_PARALLEL_STYLES", None)
    if registry is None:
        return {}
    return {name: registry[name] for name in registry.keys()}


def tensor_parallel_plan_of_class(cls: type) -> dict[str, str]:
    """The ``_tp_plan`` of a model class (transformers 5.17 to 5.23); empty if it has none."""
    return dict(getattr(cls, "_tp_plan", None) or {})


def instance_tensor_parallel_plan(model: nn.Module) -> dict[str, str]:
    """The ``_tp_plan`` of the instance, where transformers merges class, config and children; empty if it has none."""
    return dict(model.__dict__.get("_tp_plan") or {})


def no_split_module_names(model: nn.Module) -> set[str]:
    """Class names in ``_no_split_modules`` of the model and all sub-models (a list, set or None, by version)."""
    names: set[str] = set()
    for module in model.modules():
        names.update(getattr(module, "_no_split_modules", None) or ())
    return names


def transformers_layer_type() -> type | None:
    """Base class of transformers' decoder and encoder layers, ``GradientCheckpointingLayer``, or None."""
    if "transformers" not in sys.modules:
        return None
    from transformers.modeling_layers import GradientCheckpointingLayer

    return GradientCheckpointingLayer


def checkpoints_around_calls() -> bool:
    """True if transformers' own checkpoint is around a layer's ``__call__``, outside of module hooks (before 5.23)."""
    layer_type = transformers_layer_type()
    return layer_type is not None and "__call__" in vars(layer_type)


def names_kept_in_float32(model: nn.Module, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Pattern of the parameter names that transformers loads in float32, not in ``dtype``; None without any."""
    listed = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        listed |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return re.compile("|".join(rf"(?:^|\.){name}(?:$|\.)" for name in sorted(listed))) if listed else None


def lm_head_module(model: nn.Module) -> nn.Module | None:
    """The model's output projection from ``get_output_embeddings``; None if it has none or the method raises."""
    return _embedding_accessor(model, "get_output_embeddings")


def input_embedding_module(model: nn.Module) -> nn.Module | None:
    """The model's input embedding from ``get_input_embeddings``; None if it has none or the method raises."""
    return _embedding_accessor(model, "get_input_embeddings")


def _embedding_accessor(model: nn.Module, name: str) -> nn.Module | None:
    accessor = getattr(model, name, None)
    if accessor is None:
        return None
    try:
        module = accessor()
    except (NotImplementedError, AttributeError):
        return None
    return module if isinstance(module, nn.Module) else None


def transformers_conv1d_type() -> type | None:
    """GPT-2's ``Conv1D``, a linear layer with weight (in, out); None if transformers is not imported."""
    if "transformers" not in sys.modules:
        return None
    from transformers.pytorch_utils import Conv1D

    return Conv1D


@functools.cache
def gemma4_class() -> type:
    """transformers' ``Gemma4ForConditionalGeneration``, or an empty class of that name if this version has none.

    Cached, so that the empty class is the same object at each call and ``type(model) in [...]`` works. Imports the
    model's code, so call it on demand only.
    """
    try:
        from transformers import Gemma4ForConditionalGeneration
    except ImportError:
        return type("Gemma4ForConditionalGeneration", (), {"__doc__": "Stands in where transformers has no Gemma4."})
    return Gemma4ForConditionalGeneration


def is_transformers_v5_or_higher() -> bool:
    """True if the installed transformers has version 5 or later."""
    from importlib.metadata import version

    return int(version("transformers").split(".")[0]) >= 5


def without_tied_duplicates(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return ``state`` (meta tensors) without the tied names that transformers does not save a second time."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    return remove_tied_weights_from_state_dict(state, model)


def as_in_files(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert ``state`` to the names and shapes of the architecture's files, e.g. one weight for each expert."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, state)


def names_not_saved(model: nn.Module) -> set[str]:
    """Names that transformers leaves out of the files of this class."""
    return set(getattr(model, "_keys_to_ignore_on_save", None) or ())


def carries_adapters(model: nn.Module) -> bool:
    """True for a transformers model with adapters from ``model.add_adapter``, which needs no ``PeftModel``."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


#: Attribute in which transformers keeps the weight conversions of a loaded model, to revert them when it saves.
_CONVERSIONS = "_weight_conversions"


def copy_weight_conversions(source: nn.Module, target: nn.Module) -> None:
    """Make transformers save ``target`` under the names that ``source`` was loaded from (transformers 5.17 to 5.24)."""
    if _CONVERSIONS in source.__dict__:
        target.__dict__[_CONVERSIONS] = source.__dict__[_CONVERSIONS]


def runs_all_layers_under_fsdp(cls: type) -> bool:
    """True if the forward of ``cls`` skips LayerDrop under FSDP: it calls ``is_fsdp_managed_module`` (5.17 to 5.24)."""
    forward = inspect.unwrap(getattr(cls, "forward", lambda: None))
    return "is_fsdp_managed_module" in getattr(getattr(forward, "__code__", None), "co_names", ())


def show_as_sharded(module: nn.Module) -> None:
    """Make transformers' ``is_fsdp_managed_module`` return True for ``module``."""
    module._is_fsdp_managed_module = True  # type: ignore[assignment]
