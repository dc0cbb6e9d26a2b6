"""Which trained parameters are replicated over the data-parallel ranks, instead of sharded by FSDP2: small adapters.

Under LoRA a unit has a thousandth of its elements in adapters; all others are frozen. Managed by FSDP2, adapters are
all-gathered and reduce-scattered with each unit. Replicated, they cost one flat all-reduce per optimizer step, and
memory: weights, gradients and optimizer state of all adapters on every rank.
"""

from __future__ import annotations

from collections import Counter

from torch import nn
from torch.distributed.fsdp import OffloadPolicy

from .. import compat
from ..core.model_structure import ModelStructure
from ..errors import ConfigError
from .options import ShardingOptions

#: "auto" replicates at most so many elements on each rank: weights, gradients and AdamW's state in float32 take 1 GiB.
_MOST_ELEMENTS = 1 << 26
#: "auto" replicates where a unit has at least so many frozen elements for each one of an adapter.
_FROZEN_PER_ADAPTER = 8

_ASKED = "adapters_over_dp='replicated'"


def adapters_over_dp(
    model: nn.Module, structure: ModelStructure, options: ShardingOptions, asked: str, ranks: int
) -> frozenset[str]:
    """Names of the adapters of ``model`` that each data-parallel rank will have a replica of.

    By property and not by method: in a layer, the trained parameters beside frozen ones that have more elements;
    elsewhere (embedding, head), those of PEFT's adapter layers. With them adapters that are frozen now, which
    ``set_adapter`` may train later. Not the full copies of ``modules_to_save``, and nothing that several layers share.

    Args:
        model: before sharding.
        structure: its layers.
        options: how FSDP2 behaves.
        asked: an entry of :data:`~..core.options.ADAPTER_PLACEMENTS`.
        ranks: number of data-parallel ranks; on one there is nothing to decide.

    Raises:
        ConfigError: "replicated" was asked for and cannot be done, or there are no adapters.
    """
    if asked == "sharded" or ranks == 1:
        return frozenset()
    obstacle = _obstacle(options)
    if obstacle and asked == "replicated":
        raise ConfigError(f"{_ASKED} {obstacle}, or leave adapters_over_dp out.")
    adapters = set() if obstacle else _adapters(model, structure, options, asked)
    if asked == "auto" and sum(p.numel() for p in adapters) > _MOST_ELEMENTS:
        return frozenset()
    if asked == "replicated" and not adapters:
        raise ConfigError(
            f"{_ASKED}: {type(model).__name__} has no adapters, that is, no trained parameters beside frozen ones with "
            f"more elements in the same layer. Leave adapters_over_dp out."
        )
    return frozenset(name for name, p in model.named_parameters() if p in adapters)


def _obstacle(options: ShardingOptions) -> str:
    """What prevents replicas under ``options``, as the end of a sentence with a remedy; empty if nothing does."""
    if type(options.offload_policy) is not OffloadPolicy:
        return (
            "with CPU offload: replicas and shards of one optimizer would be on different devices. Use one of the two"
        )
    if options.minimum_unit_size is not None:
        return "with min_num_params of the fsdp_plugin: adapters are replicated by layer. Use units of layers"
    return ""


def _adapters(model: nn.Module, structure: ModelStructure, options: ShardingOptions, asked: str) -> set[nn.Parameter]:
    of_peft = adapter_parameters(model)
    kept = {p for name, p in model.named_parameters() if name in options.read_by_other_modules or _is_full_copy(name)}
    kept |= options.ignored_parameters | {p for p in model.parameters() if p.ndim == 0}
    inside: Counter[nn.Parameter] = Counter()
    for layer in structure.layers:
        inside.update(set(layer.parameters()))
    groups: list[tuple[set[nn.Parameter], bool]] = [(set(layer.parameters()), True) for layer in structure.layers]
    groups.append(({p for p in model.parameters() if p not in inside}, False))
    ratio = _FROZEN_PER_ADAPTER if asked == "auto" else 1
    result: set[nn.Parameter] = set()
    for members, is_layer in groups:
        chosen = {p for p in members if p in of_peft or (is_layer and p.requires_grad)} - kept
        frozen = sum(p.numel() for p in members if not p.requires_grad and p not in chosen)
        if any(p.requires_grad for p in chosen) and frozen > ratio * sum(p.numel() for p in chosen):
            result |= {p for p in chosen if inside[p] <= 1}
    return result


def adapter_layers(model: nn.Module) -> list[nn.Module]:
    """PEFT's adapter layers in ``model``."""
    kind = compat.peft_tuner_layer_type()
    return [module for module in model.modules() if kind is not None and isinstance(module, kind)]


def adapter_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of PEFT's adapter layers, those of the layers below them apart."""
    return {
        p
        for layer in adapter_layers(model)
        for name, p in layer.named_parameters()
        if "base_layer" not in name.split(".")
    }


def _is_full_copy(name: str) -> bool:
    return "modules_to_save" in name.split(".")
