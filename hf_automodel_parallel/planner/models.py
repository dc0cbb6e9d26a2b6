"""The models that a plan is made for: a directory, a ``config.json``, a cached hub id, a shipped geometry, a module."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError

GEOMETRIES = Path(__file__).parent / "geometries"

#: Names of dtypes on the command line.
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "float": "float32"}


def geometries() -> list[str]:
    """Names of the shipped geometries: the published sizes of large models, without weights."""
    return sorted(path.stem for path in GEOMETRIES.glob("*.json"))


def model_config(model: str) -> Any:
    """The transformers config that ``model`` names.

    Args:
        model: a model directory, a ``config.json``, the name of a shipped geometry, or a hub id that is cached.

    Raises:
        ConfigError: it is none of these.
    """
    from transformers import AutoConfig

    path = Path(model)
    shipped = GEOMETRIES / f"{model.lower()}.json"
    if path.exists():
        return AutoConfig.from_pretrained(path)
    if shipped.parent == GEOMETRIES and shipped.exists():
        return AutoConfig.from_pretrained(shipped)
    try:
        return AutoConfig.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{model!r} is no model directory, config.json or cached hub id. Give one of these, or a shipped geometry: "
            f"{', '.join(geometries())}."
        ) from error


def dtype_of(name: str) -> torch.dtype:
    """The floating-point dtype of this name ("bf16", "bfloat16", ...).

    Raises:
        ConfigError: there is none.
    """
    found = getattr(torch, DTYPES.get(name, name), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype {name!r}: give bf16, fp16 or fp32.")
    return found


def name_of(dtype: torch.dtype) -> str:
    """The short name of a floating-point dtype, such as "bf16", that :func:`dtype_of` reads."""
    full = str(dtype).removeprefix("torch.")
    return next((short for short, name in DTYPES.items() if name == full), full)


def on_meta(model: str | nn.Module | Any, dtype: str, lora: Mapping[str, Any] | None = None) -> nn.Module:
    """The model without memory, with LoRA around it if given.

    Args:
        model: what :func:`model_config` takes, a config of transformers, or a module on any device.
        dtype: dtype of its parameters; a module keeps its own.
        lora: arguments of ``peft.LoraConfig``.

    Raises:
        ConfigError: ``model`` names none, or ``dtype`` is none.
    """
    if isinstance(model, nn.Module):
        network = model
    else:
        from transformers import AutoModelForCausalLM

        config = model_config(model) if isinstance(model, str) else model
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config, dtype=dtype_of(dtype))
    if lora is not None:
        from peft import LoraConfig, get_peft_model

        with torch.device("meta"):
            network = get_peft_model(network, LoraConfig(task_type="CAUSAL_LM", **lora))
    return network


_LORA_FIELDS = {"targets": "target_modules", "alpha": "lora_alpha", "dropout": "lora_dropout"}


def lora_of(text: str) -> dict[str, Any]:
    """Arguments of ``peft.LoraConfig`` from "r=16,targets=all-linear" or "q_proj,v_proj".

    Raises:
        ConfigError: a field is unknown, or its value cannot be read.
    """
    found: dict[str, Any] = {}
    targets: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.partition("=")
        field = _LORA_FIELDS.get(name, name)
        if not equals:
            targets.append(part)
        elif field == "target_modules":
            targets += value.split("+")
        elif field in ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "bias"):
            try:
                found[field] = json.loads(value) if field != "bias" else value
            except ValueError as error:
                raise ConfigError(f"--lora {text}: {name}={value!r} is not a number, true or false.") from error
        else:
            raise ConfigError(f"--lora {text}: no field {name!r}; give r, alpha, dropout, targets, use_dora or bias.")
    found["target_modules"] = "all-linear" if targets in ([], ["all-linear"]) else targets
    return found
