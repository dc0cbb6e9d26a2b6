"""Private names of PEFT; :mod:`.names` lists them.

The functions that return types do not import peft: if nothing has imported it, no model is PEFT-wrapped.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    pass


def is_peft_model(model: nn.Module) -> bool:
    """True if ``model`` is a ``peft.PeftModel``."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def peft_tuner_layer_type() -> type | None:
    """Base class of PEFT's adapter layers; None if peft is not imported."""
    if "peft" not in sys.modules:
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer

    return BaseTunerLayer


def peft_auxiliary_wrapper_type() -> type | None:
    """Base class of PEFT's ``modules_to_save`` and ``trainable_token_indices`` wrappers; None without peft."""
    if "peft" not in sys.modules:
        return None
    from peft.utils.other import AuxiliaryTrainingWrapper

    return AuxiliaryTrainingWrapper


def peft_wrapper_types() -> tuple[type, ...]:
    """Base classes of PEFT's modules around a layer (tuner layers, ``modules_to_save``); empty without peft."""
    return tuple(kind for kind in (peft_tuner_layer_type(), peft_auxiliary_wrapper_type()) if kind is not None)


def peft_layer_types() -> tuple[type, ...]:
    """PEFT's adapter layers that also work on a local shard of their base layer; empty without peft."""
    if "peft" not in sys.modules:
        return ()
    from peft.tuners.ia3.layer import Linear as IA3Linear
    from peft.tuners.ln_tuning.layer import LNTuningLayer
    from peft.tuners.lora.layer import Embedding, Linear
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    # LoRA on bitsandbytes' 4-bit layers. If nothing has imported it, no model has such layers.
    packed = getattr(sys.modules.get("peft.tuners.lora.bnb"), "Linear4bit", None)
    known = (Linear, Embedding, IA3Linear, LNTuningLayer, TrainableTokensLayer)
    return known if packed is None else (*known, packed)


def peft_parameter_wrapper_type() -> type | None:
    """PEFT's LoRA layer for an ``nn.Parameter`` (expert weights); None without peft."""
    if "peft" not in sys.modules:
        return None
    from peft.tuners.lora.layer import ParamWrapper

    return ParamWrapper


def parameter_adapter_stores_out_first(adapter: Any) -> bool:
    """True if the 3-D parameter under a ``ParamWrapper`` has the shape (experts, out, in); private since peft 0.17."""
    return bool(adapter._did_swap_in_out_features)


def peft_lora_variant_types() -> tuple[type, ...]:
    """PEFT's variants of linear LoRA that can be sharded like plain LoRA: DoRA and activated LoRA; may be empty."""
    if "peft" not in sys.modules:
        return ()
    from peft.tuners.lora.variants import ALoraLinearVariant, DoraLinearVariant

    return DoraLinearVariant, ALoraLinearVariant


def peft_dora_layer_type() -> type | None:
    """PEFT's module with the DoRA magnitude vector of a linear layer; None without peft."""
    if "peft" not in sys.modules:
        return None
    from peft.tuners.lora.dora import DoraLinearLayer

    return DoraLinearLayer


def adapter_state(
    model: nn.Module, state: dict[str, torch.Tensor], adapter: str, save_embedding_layers: bool | str
) -> dict[str, torch.Tensor]:
    """Select the entries of ``state`` that belong to ``adapter``, under the names of an adapter file."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(
        model, state_dict=state, adapter_name=adapter, save_embedding_layers=save_embedding_layers
    )
