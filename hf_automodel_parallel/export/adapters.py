"""Adapter files: PEFT selects the weights of an adapter from meta tensors, and only these weights are gathered."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import compat
from ..core.lazy_graph import Recording
from ..core.model_view import class_of
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
    with full_prompts(model, fetch, adapters):
        needed: dict[str, None] = {}
        stand_ins: dict[str, torch.Tensor] = {}
        # A dry run for each adapter, to find the weights that its files need.
        for adapter in adapters:
            recording = Recording()
            stand_ins = recording.declare(shapes)
            with recording, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT warns again when it saves
                embeddings = options.get("save_embedding_layers", "auto")
                picked = compat.adapter_state(model, dict(stand_ins), adapter, embeddings)
            for value in picked.values():
                needed.update(dict.fromkeys(recording.names(value)))
        state = {**stand_ins, **{name: fetch(name) for name in needed}}
        cls: Any = type(model)  # the instance's save_pretrained is our own
        cls.save_pretrained(model, directory, state_dict=state, **options)


@contextmanager
def full_prompts(model: nn.Module, fetch: Fetch, adapters: Iterable[str] | None = None) -> Iterator[None]:
    """Within the block, the learned prompts of a ``PeftModel`` are computed from full plain tensors.

    PEFT runs the prompt encoder to save it, instead of reading a state dict, and it does so on the rank that writes
    alone. So there the encoder is a copy without hooks, shards and FSDP2.

    Args:
        model: the ``PeftModel``.
        fetch: returns full tensors by their names in the state dict of ``model``.
        adapters: whose prompts; None for all.
    """
    encoders: Any = model._modules.get("prompt_encoder")  # PEFT's own: a base model may have one, too
    before = dict(encoders.items()) if isinstance(encoders, nn.ModuleDict) else {}
    for name, encoder in before.items():
        if adapters is None or name in adapters:
            encoders[name] = _plain_copy(encoder, f"prompt_encoder.{name}.", fetch)
    try:
        yield
    finally:
        if before:
            encoders.update(before)


def _plain_copy(module: nn.Module, prefix: str, fetch: Fetch) -> nn.Module:
    """A copy of ``module`` as it was before it was sharded, with the values of ``fetch(prefix + name)``."""
    cls: Any = class_of(module)
    result: Any = cls.__new__(cls)
    nn.Module.__init__(result)
    # Attributes of its own: what nn.Module keeps (hooks among it) is new, and a forward of the instance is a wrapper.
    attributes = {
        # Containers are copied: recurrent layers write their weights into a list.
        name: copy.copy(value) if isinstance(value, (list, dict)) else value
        for name, value in vars(module).items()
        if name not in vars(result) and name != "forward"
    }
    vars(result).update(attributes, training=module.training)
    for name, parameter in module._parameters.items():
        # setattr, because recurrent layers hold their weights in a list, too.
        full = None if parameter is None else nn.Parameter(fetch(prefix + name), parameter.requires_grad)
        result.register_parameter(name, None)
        setattr(result, name, full)
    vars(result)["_buffers"].update(module._buffers)
    for name, child in module.named_children():
        result.add_module(name, _plain_copy(child, f"{prefix}{name}.", fetch))
    return result


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
    """Refuse what PEFT refuses, before any rank waits for another.

    Raises:
        ConfigError: an unknown adapter.
    """
    known: Any = model.peft_config
    unknown = [name for name in options.get("selected_adapters") or () if name not in known]
    if unknown:
        raise ConfigError(f"selected_adapters={options['selected_adapters']!r}: this model has {list(known)}.")


def keep_model_card(old: Path, new: Path) -> None:
    """Copy the model card of ``old``, if it has one, so that PEFT extends it."""
    if (old / "README.md").is_file():
        shutil.copy2(old / "README.md", new / "README.md")
