"""Adapter files: PEFT selects the weights of an adapter from meta tensors, and only these weights are gathered."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import compat
from ..core.lazy_graph import Recording
from ..errors import ConfigError
from .gathering import Fetch, Shapes


def write_adapters(model: nn.Module, shapes: Shapes, fetch: Fetch, directory: Path, options: Mapping[str, Any]) -> None:
    """Write the files of ``PeftModel.save_pretrained``.

    Args:
        model: the ``PeftModel``.
        shapes: of its state dict.
        fetch: returns full tensors on the CPU; called for the adapters' weights only.
        directory: an existing directory.
        options: of PEFT's method: ``selected_adapters``, ``save_embedding_layers``, ``safe_serialization``.
    """
    adapters = options.get("selected_adapters") or list(model.peft_config)  # type: ignore[arg-type]
    needed: dict[str, None] = {}
    stand_ins: dict[str, torch.Tensor] = {}
    # A dry run for each adapter, to find the weights that its files need.
    for adapter in adapters:
        if adapter not in model.peft_config:  # type: ignore[operator]
            break  # PEFT's save_pretrained, below, raises its own error
        recording = Recording()
        stand_ins = recording.declare(shapes)
        with recording, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns again when it saves
            picked = compat.adapter_state(model, dict(stand_ins), adapter, options.get("save_embedding_layers", "auto"))
        for value in picked.values():
            needed.update(dict.fromkeys(recording.names(value)))
    state = {**stand_ins, **{name: fetch(name) for name in needed}}
    cls: Any = type(model)  # the instance's save_pretrained is our own
    cls.save_pretrained(model, directory, state_dict=state, **options)


def write_own_adapter(
    model: nn.Module, shapes: Shapes, fetch: Fetch, directory: Path, options: Mapping[str, Any]
) -> None:
    """Write the active adapter of a transformers model, as ``PreTrainedModel.save_pretrained`` does.

    Args:
        model: has adapters from ``model.add_adapter`` and no ``PeftModel`` around it.
        shapes: of its state dict.
        fetch: returns full tensors on the CPU; called for the adapter's weights only.
        directory: an existing directory.
        options: of transformers' method, such as ``save_peft_format``.
    """
    cls: Any = type(model)  # the instance's save_pretrained is our own
    recording = Recording()
    state = recording.declare(shapes)
    with recording:
        picked = cls.get_adapter_state_dict(model, state_dict=dict(state))
    for value in picked.values():
        state.update({name: fetch(name) for name in recording.names(value)})
    cls.save_pretrained(model, directory, state_dict=state, **options)


def check_adapter_options(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Refuse options that shards do not allow, before any rank waits for another.

    Raises:
        ConfigError: an unknown adapter; an option that would load an adapter while saving.
    """
    known: Any = model.peft_config
    unknown = [name for name in options.get("selected_adapters") or () if name not in known]
    if unknown:
        raise ConfigError(f"selected_adapters={options['selected_adapters']!r}: this model has {list(known)}.")
    path = options.get("path_initial_model_for_weight_conversion")
    if path is not None:
        raise ConfigError(
            f"path_initial_model_for_weight_conversion={str(path)!r}: PEFT loads the initial adapter into the model to "
            f"subtract it, which one rank cannot do on shards. Save the adapter without it; then, in one process, "
            "PeftModel.from_pretrained(base, directory).save_pretrained(other, "
            "path_initial_model_for_weight_conversion=...)."
        )


def keep_model_card(old: Path, new: Path) -> None:
    """Copy the model card of ``old``, if it has one, so that PEFT extends it."""
    if (old / "README.md").is_file():
        shutil.copy2(old / "README.md", new / "README.md")
