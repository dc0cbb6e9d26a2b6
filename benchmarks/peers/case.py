"""The model and the batch that every peer gets."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

LORA_RANK = 8

#: Vocabulary of a case without and with embedding, head and loss in what is parallelised.
LAYERS_ONLY, WHOLE = 1024, 32768


@dataclass(frozen=True)
class Case:
    """What is measured: a Llama of one size, trained in one way on one mesh.

    Attributes:
        tp: ranks of tensor parallelism.
        dp: ranks of FSDP2.
        sequence_parallel: shard activations between attention and MLP along the sequence.
        lora: adapters of rank 8 on all linear layers of the decoder, everything else frozen.
        compiled: each decoder layer is compiled.
        whole: embedding and head are tensor parallel, too, and have a vocabulary of 32,768; else they are replicated
            over tp and small.
        hidden: width; the MLP is twice as wide.
        tokens: of each data-parallel rank, in two rows.
        layers: decoder layers.
    """

    tp: int = 2
    dp: int = 1
    sequence_parallel: bool = False
    lora: bool = False
    compiled: bool = False
    whole: bool = False
    hidden: int = 128
    tokens: int = 64
    layers: int = 4

    @property
    def world(self) -> int:
        return self.tp * self.dp

    @property
    def vocabulary(self) -> int:
        return WHOLE if self.whole else LAYERS_ONLY

    @property
    def mesh_name(self) -> str:
        """``TP2 + SP x FSDP2``, for tables."""
        names = [f"TP{self.tp}" + (" + SP" if self.sequence_parallel else "")] if self.tp > 1 else []
        return " x ".join([*names, *([f"FSDP{self.dp}"] if self.dp > 1 else [])])

    @property
    def slug(self) -> str:
        """``tp2-h128-lora-eager``, for names of files."""
        words = [f"{name}{size}" for name, size in (("tp", self.tp), ("fsdp", self.dp)) if size > 1]
        words += ["sp"] if self.sequence_parallel else []
        words += [f"h{self.hidden}", "lora" if self.lora else "full", "compiled" if self.compiled else "eager"]
        return "-".join([*words, *(["whole"] if self.whole else [])])

    def as_row(self) -> dict[str, Any]:
        return {**asdict(self), "mesh": self.mesh_name}


def build_model(case: Case) -> nn.Module:
    """A Llama with the same random weights on all ranks and for all peers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=case.vocabulary,
            hidden_size=case.hidden,
            intermediate_size=2 * case.hidden,
            num_hidden_layers=case.layers,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=case.tokens,
            tie_word_embeddings=False,
        )
    )


def with_lora(model: nn.Module) -> nn.Module:
    """The model with PEFT's LoRA, both matrices random, so that both have gradients."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=LORA_RANK, target_modules=names, task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(model, config)  # type: ignore[return-value, arg-type]


def build(case: Case) -> nn.Module:
    """:func:`build_model`, with LoRA if the case has it."""
    model = build_model(case)
    return with_lora(model) if case.lora else model


def batch(case: Case) -> dict[str, torch.Tensor]:
    """Token ids and labels (2, tokens / 2) of this rank; ranks of one tp group have the same ones."""
    ids = torch.randint(LAYERS_ONLY, (case.dp, 2, case.tokens // 2), generator=torch.Generator().manual_seed(2))
    mine = ids[dist.get_rank() // case.tp]
    return {"input_ids": mine, "labels": mine}


def mesh_of(case: Case) -> DeviceMesh:
    """(dp, tp) of all ranks."""
    return init_device_mesh("cpu", (case.dp, case.tp), mesh_dim_names=("dp", "tp"))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def layers_of(model: nn.Module) -> Any:
    """The decoder layers, below PEFT's wrapper, too."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.model.layers


def compile_layers(model: nn.Module) -> None:
    for layer in layers_of(model):
        layer.compile()
