"""Combines our options with Accelerate's plugins and the model's own settings; refuses contradictions."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn

from .. import compat
from ..activation_checkpointing import normalized_mode
from ..core.model_view import ModelView
from ..core.options import ParallelOptions
from ..errors import ConfigError
from ..fsdp.dtype_groups import own_dtype_parameters
from ..fsdp.options import ShardingOptions, without_pinning

if TYPE_CHECKING:
    from accelerate import Accelerator


def fill_mixed_precision(plugin: FullyShardedDataParallelPlugin, mixed_precision: str) -> None:
    """Give ``plugin`` the policy of ``mixed_precision``, unless the user gave one.

    Parameters compute in the low precision. Gradients are reduced in float32, and outputs are float32: that is what one
    process and DDP return. Accelerate's FSDP2 code would reduce in the low precision and round what leaves the model to
    it, the loss included (8 bits in bfloat16).

    With a GPU Accelerate has filled in its policy before this is called, so a policy of the user that is equal to it
    in every field is replaced as well. ``MixedPrecisionPolicy(dtype, dtype)`` asks for both of its dtypes.
    """
    if mixed_precision == "no":
        return
    given, plugin.mixed_precision_policy = plugin.mixed_precision_policy, None
    plugin.set_mixed_precision(mixed_precision)
    of_accelerate = plugin.mixed_precision_policy
    if given is not None and given != of_accelerate:
        plugin.mixed_precision_policy = given
        return
    plugin.mixed_precision_policy = dataclasses.replace(
        of_accelerate, reduce_dtype=torch.float32, output_dtype=torch.float32
    )


def sharding_options(accelerator: Accelerator, asked: ParallelOptions, model: nn.Module) -> ShardingOptions:
    """FSDP2's options for ``model``: ours where given, else those of the FSDP plugin.

    Raises:
        ConfigError: the plugin asks for something that cannot be honoured.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin = accelerator.state.fsdp_plugin
    config: Any = accelerator.parallelism_config
    reshard = plugin.reshard_after_forward if asked.reshard_after_forward is None else asked.reshard_after_forward
    options = ShardingOptions(
        mp_policy=plugin.mixed_precision_policy or MixedPrecisionPolicy(),
        # On one rank there is nothing to reshard: the unsharded parameter is the shard.
        reshard_after_forward=bool(reshard) and config.dp_shard_size * config.cp_size > 1,
        forward_prefetch=asked.forward_prefetch,
        backward_prefetch=asked.backward_prefetch,
        towers=asked.towers,
    )
    if not isinstance(plugin.cpu_offload, (bool, type(None))):
        options.offload_policy = without_pinning(plugin.cpu_offload, accelerator.device)
    elif plugin.cpu_offload:
        raise ConfigError("fsdp_plugin.cpu_offload=True was not turned into a policy; pass CPUOffloadPolicy() instead.")
    # param_dtype is not applied to what autocast and the model's own code would leave alone in one process.
    options.own_dtype = frozenset(own_dtype_parameters(model, options.mp_policy.param_dtype))
    if plugin.ignored_modules is not None:
        options.ignored_parameters = compat.parameters_of_ignored_modules(plugin, model, accelerator.device)
    if config.dp_shard_size * config.cp_size > 1:  # else units make no difference
        _check_wrap_policy(plugin)
    if _wrap_policies(plugin) == {_BY_SIZE} and (plugin.min_num_params or 0) > 0:
        options.minimum_unit_size = plugin.min_num_params
    return options


def checkpointing(accelerator: Accelerator, asked: ParallelOptions, model: nn.Module) -> str:
    """The mode of activation checkpointing, from our option and the FSDP plugin.

    Raises:
        ConfigError: the two contradict each other, or the model's own gradient checkpointing is on as well.
    """
    mode = normalized_mode(asked.activation_checkpointing)
    if accelerator.state.fsdp_plugin.activation_checkpointing:
        if asked.activation_checkpointing is not None and mode != "full":
            raise ConfigError(
                f"fsdp_plugin.activation_checkpointing=True and "
                f"activation_checkpointing={asked.activation_checkpointing!r} contradict each other. Give one of the "
                "two."
            )
        mode = "full"
    inner = ModelView.of(model).inner
    own = any(getattr(module, "gradient_checkpointing", False) for module in inner.modules())
    if own and mode != "none":
        raise ConfigError(
            f"activation_checkpointing={mode!r} and the model's own gradient checkpointing are both on; layers would "
            "be recomputed twice. Leave out gradient_checkpointing=True / gradient_checkpointing_enable(), or the "
            "option here."
        )
    return mode


def offload_activations(accelerator: Accelerator, asked: ParallelOptions, model: nn.Module) -> bool:
    """True if full checkpoints offload their saved inputs to the CPU (``activation_checkpointing_offload``).

    Raises:
        ConfigError: offloading without full activation checkpointing.
    """
    if not getattr(accelerator.state.fsdp_plugin, "activation_checkpointing_offload", False):
        return False
    if checkpointing(accelerator, asked, model) != "full":
        raise ConfigError(
            "fsdp_plugin.activation_checkpointing_offload=True moves the inputs of fully checkpointed layers to the "
            "CPU. Set activation_checkpointing=True in the fsdp_plugin (or 'full' in AutoParallelismConfig) too, or "
            "leave it out."
        )
    return True


def compile_options(accelerator: Accelerator, asked: ParallelOptions) -> dict[str, Any] | None:
    """Arguments of ``torch.compile`` from the config or Accelerate's dynamo plugin; None for eager.

    Raises:
        ConfigError: ``compile`` names a backend that this torch does not have.
    """
    plugin = accelerator.state.dynamo_plugin
    if plugin.disable:
        return None
    options = {
        k: v
        for k, v in plugin.to_kwargs().items()
        if k in ("mode", "fullgraph", "dynamic", "options") and v is not None
    }
    if isinstance(asked.compile, str) and asked.compile not in torch.compiler.list_backends(exclude_tags=()):
        raise ConfigError(
            f"compile={asked.compile!r} is not a torch.compile backend here; there are "
            f"{', '.join(torch.compiler.list_backends())}. Use true for inductor."
        )
    if asked.compile:
        return {**options, "backend": "inductor" if asked.compile is True else asked.compile}
    backend = plugin.backend.value
    return None if backend in (None, "NO") else {**options, "backend": backend.lower()}


#: Policies of ``torch.distributed.fsdp.wrap`` that can be honoured.
_BY_CLASS, _BY_SIZE = "transformer_auto_wrap_policy", "size_based_auto_wrap_policy"
#: peft's ``fsdp_auto_wrap_policy`` combines the layers with this one, for trainable leaves. FSDP1 needs units of their
#: own for these; units of FSDP2 may mix trainable and frozen parameters, so the layers are the units.
_TRAINABLE_LEAVES = "lambda_auto_wrap_policy"


def layer_classes(plugin: FullyShardedDataParallelPlugin) -> list[str] | None:
    """The plugin's ``transformer_cls_names_to_wrap`` if its wrap policy uses them, else None."""
    names = plugin.transformer_cls_names_to_wrap
    return list(names) if names and _BY_CLASS in _wrap_policies(plugin) else None


def _wrap_policies(plugin: FullyShardedDataParallelPlugin) -> set[str]:
    """Names of the plugin's wrap policy, or of those that it combines; empty for NO_WRAP, Accelerate's default, with
    which each layer is an FSDP unit.
    """
    policy = plugin.auto_wrap_policy
    parts = getattr(policy, "keywords", {}).get("policies", [] if policy is None else [policy])
    return {getattr(getattr(part, "func", part), "__name__", "") for part in parts}


def _check_wrap_policy(plugin: FullyShardedDataParallelPlugin) -> None:
    """Raise :class:`ConfigError` for a custom policy function, which would never be called."""
    if _wrap_policies(plugin) not in (set(), {_BY_CLASS}, {_BY_SIZE}, {_BY_CLASS, _TRAINABLE_LEAVES}):
        raise ConfigError(
            f"fsdp_plugin.auto_wrap_policy={plugin.auto_wrap_policy!r}: only TRANSFORMER_BASED_WRAP (with "
            "transformer_cls_names_to_wrap), SIZE_BASED_WRAP (with min_num_params) and peft's fsdp_auto_wrap_policy "
            "can be used here; without a policy each layer is a unit."
        )
