"""Private names of transformers' models; their table is :mod:`.names`."""

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
    """A copy of a transformers config whose attention implementation is ``name``.

    The public setter would write into the sub-configs too, which the copy shares with the original.
    """
    result = copy.copy(config)
    result._attn_implementation_internal = name
    return result


def uses_attention_registry(module: nn.Module) -> bool:
    """True if the forward of ``module`` looks attention up in transformers' registry (5.17 to 5.24: by this name)."""
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
    """The ``_tp_plan`` that a model class declares itself (transformers 5.17 to 5.23), empty if it declares none."""
    return dict(getattr(cls, "_tp_plan", None) or {})


def instance_tensor_parallel_plan(model: nn.Module) -> dict[str, str]:
    """The ``_tp_plan`` set on this very object (transformers merges class, config and children there), else empty."""
    return dict(model.__dict__.get("_tp_plan") or {})


def no_split_module_names(model: nn.Module) -> set[str]:
    """Class names in ``_no_split_modules`` of the model and of every sub-model (a list, set or None by version)."""
    names: set[str] = set()
    for module in model.modules():
        names.update(getattr(module, "_no_split_modules", None) or ())
    return names


def transformers_layer_type() -> type | None:
    """The base class of transformers' layers that can be checkpointed (all decoder and encoder layers), None without
    it.
    """
    if "transformers" not in sys.modules:
        return None
    from transformers.modeling_layers import GradientCheckpointingLayer

    return GradientCheckpointingLayer


def checkpoints_around_calls() -> bool:
    """True if transformers checkpoints a layer outside of its ``__call__``, so around our hooks (before 5.23)."""
    layer_type = transformers_layer_type()
    return layer_type is not None and "__call__" in vars(layer_type)


def names_kept_in_float32(model: nn.Module, dtype: torch.dtype) -> re.Pattern[str] | None:
    """What transformers does not load in ``dtype``: a pattern over parameter names, None if there is nothing of the
    kind.
    """
    listed = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        listed |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return re.compile("|".join(rf"(?:^|\.){name}(?:$|\.)" for name in sorted(listed))) if listed else None


def lm_head_module(model: nn.Module) -> nn.Module | None:
    """The model's output projection through ``get_output_embeddings``, None when it has none or refuses."""
    return _embedding_accessor(model, "get_output_embeddings")


def input_embedding_module(model: nn.Module) -> nn.Module | None:
    """The model's input embedding through ``get_input_embeddings``, None when it has none or refuses."""
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
    """GPT-2's ``Conv1D`` (a linear layer whose weight is stored transposed), None when transformers is not imported."""
    if "transformers" not in sys.modules:
        return None
    from transformers.pytorch_utils import Conv1D

    return Conv1D


@functools.cache
def gemma4_class() -> type:
    """transformers' ``Gemma4ForConditionalGeneration``, or an empty class of that name where there is none: one class
    per process, so that tests like ``type(model) in [...]`` hold. Imports the model's code, so it is to be called only
    on demand."""
    try:
        from transformers import Gemma4ForConditionalGeneration
    except ImportError:
        return type("Gemma4ForConditionalGeneration", (), {"__doc__": "Stands in where transformers has no Gemma4."})
    return Gemma4ForConditionalGeneration


def is_transformers_v5_or_higher() -> bool:
    """True if the installed transformers is of version 5 or later."""
    from importlib.metadata import version

    return int(version("transformers").split(".")[0]) >= 5


def without_tied_duplicates(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``state`` (on the meta device) without the names that transformers does not save since they are tied to
    another.
    """
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    return remove_tied_weights_from_state_dict(state, model)


def as_in_files(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``state`` with the names and shapes that the files of this architecture have, e.g. one weight for each expert."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, state)


def names_not_saved(model: nn.Module) -> set[str]:
    """Names that transformers leaves out of the files of this class."""
    return set(getattr(model, "_keys_to_ignore_on_save", None) or ())


def carries_adapters(model: nn.Module) -> bool:
    """True for a transformers model with adapters of its own (``model.add_adapter``), without a ``PeftModel`` around
    it.
    """
    return bool(getattr(model, "_hf_peft_config_loaded", False))


#: Where a loaded model keeps the names of its files.
_CONVERSIONS = "_weight_conversions"


def copy_weight_conversions(source: nn.Module, target: nn.Module) -> None:
    """Let ``target`` be saved under the names that ``source`` was loaded from (transformers 5.17 to 5.24)."""
    if _CONVERSIONS in source.__dict__:
        target.__dict__[_CONVERSIONS] = source.__dict__[_CONVERSIONS]


def runs_all_layers_under_fsdp(cls: type) -> bool:
    """True if the forward of ``cls`` asks transformers whether its module is sharded, and then drops no layer (5.17 to
    5.24).
    """
    forward = inspect.unwrap(getattr(cls, "forward", lambda: None))
    return "is_fsdp_managed_module" in getattr(getattr(forward, "__code__", None), "co_names", ())


def show_as_sharded(module: nn.Module) -> None:
    """Let transformers' ``is_fsdp_managed_module`` be true for ``module``."""
    module._is_fsdp_managed_module = True  # type: ignore[assignment]
