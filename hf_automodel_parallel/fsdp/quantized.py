"""Quantised weights: which of them can be sharded.

FSDP2 turns each parameter into flat shards and back into a plain ``nn.Parameter``, without the attributes of a
parameter subclass. A quantised weight survives that if its quantisation state is kept elsewhere: bitsandbytes' 4-bit
layers keep it on the module and restore the parameter from there. Tensor parallelism shards the same weights
(:mod:`..core.packed_weights`).
"""

from __future__ import annotations

import torch
from torch import nn

from ..core.model_view import ModelView
from ..core.packed_weights import packed_matrix
from ..errors import ConfigError, UnsupportedError


def quantization_method(model: nn.Module) -> str | None:
    """The method that ``model`` is quantised with ("bitsandbytes", "gptq", ...), None for floating-point weights."""
    inner = ModelView.of(model).inner
    quantizer = getattr(inner, "hf_quantizer", None)
    if quantizer is not None or getattr(inner, "is_quantized", False):
        method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", "unknown")
        return str(getattr(method, "value", method))
    # Layers that were quantised by hand have no config: integer storage, or a quantisation state, shows them.
    for parameter in model.parameters():
        if not parameter.is_floating_point() or getattr(parameter, "quant_state", None) is not None:
            return type(parameter).__name__
    return None


def check_quantized(
    model: nn.Module, compute_dtype: torch.dtype | None, tensor_parallel: bool, load_on_rank_zero: bool
) -> None:
    """Raise for quantised weights that cannot be sharded.

    Args:
        model: the model before sharding.
        compute_dtype: dtype to which FSDP2 casts unsharded parameters (``param_dtype`` of its policy), None for no
            cast.
        tensor_parallel: the tp axis has more than one rank.
        load_on_rank_zero: only rank 0 has the weights.

    Raises:
        UnsupportedError: a parameter subclass that loses its quantisation state in shards; under tensor parallelism
            anything but bitsandbytes' 4-bit linear layers; weights converted for inference; weights that only rank 0
            has.
        ConfigError: packed numbers stored as a floating-point type that mixed precision would cast.
    """
    method = quantization_method(model)
    if method is not None and tensor_parallel:
        _check_sliceable(model, method)
    if method is not None and load_on_rank_zero:
        raise UnsupportedError(
            f"cpu_ram_efficient_loading=True cannot be combined with weights quantised with {method}: their scales "
            f"are not parameters and would be missing on the other ranks. Set fsdp_cpu_ram_efficient_loading: false."
        )
    for owner_name, owner in model.named_modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None and type(parameter) is not nn.Parameter:
                _check_parameter(f"{owner_name}.{key}", parameter, owner, compute_dtype)


def _check_sliceable(model: nn.Module, method: str) -> None:
    """Raise :class:`UnsupportedError` if quantised weights have no rows and columns that ranks could slice."""
    remedy = "Use bitsandbytes' 4-bit weights (load_in_4bit=True), tp_size=1, or load the model unquantised."
    packed = {module for module in model.modules() if packed_matrix(module) is not None}
    if not packed:
        raise UnsupportedError(
            f"the model is quantised with {method}; tensor parallelism of such weights is not available, because the "
            f"layout of their numbers and scales is not known here. {remedy}"
        )
    for owner_name, owner in model.named_modules():
        for key, parameter in owner._parameters.items():
            if parameter is None or (type(parameter) is nn.Parameter and parameter.is_floating_point()):
                continue
            if owner not in packed or key != "weight":
                raise UnsupportedError(
                    f"{owner_name}.{key} is a {type(parameter).__name__} of {parameter.dtype} in a model quantised "
                    f"with {method}; tensor parallelism slices 4-bit weights of linear layers only. {remedy}"
                )


def _check_parameter(name: str, parameter: nn.Parameter, owner: nn.Module, compute_dtype: torch.dtype | None) -> None:
    if hasattr(parameter, "fsdp_pre_all_gather"):  # FSDP2's extension: the subclass has its own all-gather
        return
    state = getattr(parameter, "quant_state", None)
    if state is None or getattr(owner, "quant_state", None) is None:
        raise UnsupportedError(
            f"{name} is a {type(parameter).__name__}, which FSDP2 cannot shard: it is unsharded as a plain parameter, "
            f"without its quantisation state. Use bitsandbytes' 4-bit weights (load_in_4bit=True), or load the "
            f"model unquantised."
        )
    if getattr(state, "packing_format_for_cpu", False):
        raise UnsupportedError(
            f"{name} has been converted for inference on the CPU by a forward in eval mode; it has no gradient in that "
            f"form. Load the model again and call accelerator.prepare before its first forward."
        )
    if parameter.is_floating_point() and compute_dtype not in (None, parameter.dtype):
        raise ConfigError(
            f"bnb_4bit_quant_storage={parameter.dtype} with mixed precision in {compute_dtype}: FSDP2 would cast the "
            f"packed numbers of {name}. Set bnb_4bit_quant_storage={compute_dtype}, or leave it at torch.uint8."
        )


def keep_layout(model: nn.Module) -> None:
    """Stop bitsandbytes from converting weights for inference in place.

    The layer would take the next unsharded weight for a converted one, but the shards are not converted.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
