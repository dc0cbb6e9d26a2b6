"""transformers' ``DistributedConfig``, as the fields of an ``AutoParallelismConfig``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import ConfigError

_FIELDS = {
    "tp_size": "tp_size",
    "fsdp_size": "dp_shard_size",
    "dp_replicate_size": "dp_replicate_size",
    "enable_sequence_parallel": "sequence_parallel",
}

_EXPERTS = "tp_size gives each rank a slice of every expert; leave expert parallelism out."
#: Field without an equal here -> what to do instead.
_INSTEAD = {
    "fsdp_plan": "each layer is an FSDP2 unit; transformer_cls_names_to_wrap of Accelerate's fsdp_plugin names others.",
    "fsdp_cpu_offload": "give Accelerate's fsdp_plugin with cpu_offload=True.",
    "fsdp_mixed_precision": "give mixed_precision='bf16' (bf16=True to the Trainer).",
    "pp_size": "there is no pipeline parallelism; use tp_size and dp_shard_size.",
    "ep_size": _EXPERTS,
    "ep_plan": _EXPERTS,
    "ep_implementation": _EXPERTS,
    "enable_expert_parallel": _EXPERTS,
}


@dataclass(frozen=True)
class ChangedPlan:
    """The plan of a model's class with some entries changed, which a ``DistributedConfig`` calls its ``tp_plan``.

    Attributes:
        changes: pattern of module names -> style.
    """

    changes: Mapping[str, str]

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """The whole plan of ``model``."""
        return {**(getattr(model, "tp_plan", None) or {}), **self.changes}


def fields_of_distributed_config(given: Any) -> dict[str, Any]:
    """The fields of an ``AutoParallelismConfig`` that mean what ``given`` means.

    Args:
        given: a ``DistributedConfig``, or a mapping of its fields to values, as in a model's ``config.json``.

    Raises:
        ConfigError: ``given`` is neither, or sets something that has no equal here; the message has the remedy.
    """
    if isinstance(given, Mapping):
        values = {str(name): value for name, value in given.items()}
    elif dataclasses.is_dataclass(given) and hasattr(given, "tp_plan"):
        values = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    else:
        raise ConfigError(
            f"from_distributed_config() takes transformers' DistributedConfig or its fields as a dict, not "
            f"{type(given).__name__}: {given!r}"
        )
    result: dict[str, Any] = {}
    for name, value in values.items():
        # Sizes of 1 are what a DistributedConfig sets where nothing was given.
        nothing = value is None or value is False or (value is not True and value in (1, "auto"))
        if nothing and (name in _INSTEAD or value in (None, False)):
            continue
        if name == "tp_plan":
            if value != "auto":
                result[name] = _plan(value)
        elif name in _FIELDS:
            result[_FIELDS[name]] = value
        else:
            instead = _INSTEAD.get(name, f"this is not a field of it; the known ones: {', '.join(_known())}.")
            raise ConfigError(f"DistributedConfig has {name}={value!r}: {instead}")
    # A size that is not given is 1 there; here it would be inferred.
    for axis in ("tp_size", "dp_shard_size", "dp_replicate_size"):
        result.setdefault(axis, 1)
    if result["tp_size"] == 1:
        result.pop("tp_plan", None)
    return result


def _plan(value: Any) -> ChangedPlan:
    if not isinstance(value, Mapping) or not value:
        raise ConfigError(
            f"DistributedConfig has tp_plan={value!r}: with an empty plan nothing is tensor parallel; use tp_size=1, "
            f"or tp_plan='auto'."
        )
    return ChangedPlan(dict(value))


def _known() -> list[str]:
    return sorted([*_FIELDS, "tp_plan", *_INSTEAD])
