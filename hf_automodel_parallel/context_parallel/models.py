"""Which models support context parallelism: only attention that we compute may mix positions.

Decided from properties of modules and configs, before the model changes. Errors name the property.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from .. import compat
from ..core.model_structure import ModelStructure
from ..core.model_view import ModelView
from ..errors import UnsupportedError

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)

#: Rotary embeddings whose frequencies depend on the largest position in the input, which differs between ranks.
_LENGTH_DEPENDENT_ROPES = ("dynamic", "longrope")


@dataclass(frozen=True)
class Suitable:
    """Facts about a model that supports context parallelism.

    Attributes:
        attention: the modules that compute attention.
        takes: names of the arguments of the model's forward.
        no_loss: why the model's own loss cannot take ``shift_labels``; "" if it can.
    """

    attention: list[nn.Module]
    takes: frozenset[str]
    no_loss: str = ""


def check_model(
    model: nn.Module | ModelView, structure: ModelStructure, size: int, sequence_parallel: bool = False
) -> Suitable:
    """Find the attention of ``model`` and refuse what would be wrong on a sequence shard.

    Args:
        model: the model, plain or PEFT-wrapped.
        structure: its layers.
        size: number of ranks on the cp axis, for the messages.
        sequence_parallel: the config asks for sequence parallelism, too.

    Raises:
        UnsupportedError: names the property that prevents context parallelism, and a remedy.
    """
    view = ModelView.of(model)
    model, inner = view.model, view.inner

    def refuse(why: str, remedy: str = "Use cp_size=1 for this model.") -> UnsupportedError:
        return UnsupportedError(f"cp_size={size} cannot be used with {type(inner).__name__}: {why} {remedy}")

    if sequence_parallel:
        raise refuse("sequence_parallel=True shards the same dimension.", "Leave out one of the two.")
    config: Any = getattr(inner, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    implementation = getattr(config, "_attn_implementation", None)
    if implementation != "sdpa":
        why = f"its attention implementation is {implementation!r}, and context parallelism computes SDPA"
        if not getattr(inner, "_supports_sdpa", True):
            raise refuse(f"{why}, which this class does not have.")
        raise refuse(f"{why}.", "Load it with attn_implementation='sdpa', or use cp_size=1.")
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise refuse("it has an encoder; only causal language models are supported.")
    if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None) is not None:
        raise refuse(f"its layers have a sliding window of {config.sliding_window} tokens.")
    kinds = sorted({str(kind) for kind in getattr(config, "layer_types", None) or ()} - {"full_attention"})
    if kinds:
        raise refuse(f"it has layers of type {', '.join(kinds)}; every layer has to be full causal attention.")
    if getattr(config, "output_router_logits", False):
        raise refuse(
            "its loss contains the router's auxiliary loss (output_router_logits), which is not a mean over tokens and "
            "so not the mean of the ranks' losses.",
            "Set config.output_router_logits=False, or use cp_size=1.",
        )
    for name, module in inner.named_modules():
        ropes = getattr(module, "rope_type", None)
        for rope in ropes.values() if isinstance(ropes, dict) else [ropes]:
            if isinstance(rope, str) and any(kind in rope for kind in _LENGTH_DEPENDENT_ROPES):
                raise refuse(f"{name} has rope_type={rope!r}, whose frequencies depend on the length of a sequence.")
    _check_adapters(model, refuse)
    attention = _attention_of(inner, structure, refuse)
    # The instance's forward may be wrapped already; the signature is that of the model's own.
    forward = inspect.unwrap(inner.__dict__.get("forward", type(inner).forward))
    takes = frozenset(inspect.signature(forward).parameters)
    if "position_ids" not in takes or "attention_mask" not in takes:
        raise refuse("its forward takes no position_ids or no attention_mask.")
    return Suitable(attention, takes, _why_no_loss(inner, forward))


def _attention_of(inner: nn.Module, structure: ModelStructure, refuse: Any) -> list[nn.Module]:
    names = {module: name for name, module in inner.named_modules()}
    attention = [module for module in names if compat.uses_attention_registry(module)]
    inside = {module for layer in structure.layers for module in layer.modules()}
    for module in attention:
        if module not in inside:
            raise refuse(f"{names[module]} computes attention outside of the decoder layers.")
        if not getattr(module, "is_causal", True):
            raise refuse(f"{names[module]} computes attention that is not causal.")
        if getattr(module, "sliding_window", None) is not None:
            raise refuse(f"{names[module]} has a sliding window of {module.sliding_window} tokens.")
    if not structure.layers:
        raise refuse("no decoder layers were found in it.")
    for layer in structure.layers:
        parts = list(layer.modules())
        if not any(module in attention for module in parts):
            raise refuse(
                f"{names[layer]} ({type(layer).__name__}) has no attention that transformers' registry of attention "
                f"functions can replace, so it mixes positions in a way that stops at the sequence shard of a rank."
            )
        for module in parts:
            if isinstance(module, (*_CONVOLUTIONS, *_RECURRENT)):
                raise refuse(f"{names[module]} ({type(module).__name__}) mixes neighbouring positions.")
    return attention


def _check_adapters(model: nn.Module, refuse: Any) -> None:
    for config in getattr(model, "peft_config", {}).values() if compat.is_peft_model(model) else ():
        if getattr(config, "is_prompt_learning", False):
            raise refuse(
                f"PEFT's {config.peft_type.value} puts virtual tokens in front of every sequence shard.",
                "Use LoRA or cp_size=1.",
            )
        if getattr(config, "alora_invocation_tokens", None):
            raise refuse("activated LoRA looks for its invocation tokens in the full sequence.", "Use plain LoRA.")


def _why_no_loss(inner: nn.Module, forward: Any) -> str:
    """Why ``model(..., labels=..., shift_labels=...)`` would ignore ``shift_labels``; "" if it uses them."""
    code = getattr(forward, "__code__", None)
    if code is None or "loss_function" not in code.co_names:
        return "its forward does not compute the loss with the model's loss_function"
    function: Any = inner.loss_function
    parameters = inspect.signature(function).parameters
    missing = [name for name in ("shift_labels", "num_items_in_batch") if name not in parameters]
    if missing:
        return f"its loss_function ({getattr(function, '__name__', function)}) takes no {' and no '.join(missing)}"
    return ""
