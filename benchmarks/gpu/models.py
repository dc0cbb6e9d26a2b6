"""The models of the suite: geometries of published ones with random weights, and what they cost."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

_LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "head_dim": 128, "rope_parameters": _LLAMA_ROPE}

#: name -> (model type of transformers, values of its config), of the published configs.
GEOMETRIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1-8b": (
        "llama",
        _LLAMA
        | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
        | {"max_position_embeddings": 131072},
    ),
    "qwen2.5-7b": (
        "qwen2",
        {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
        | {"num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    ),
    "llama-3.1-70b": (
        "llama",
        _LLAMA
        | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
        | {"max_position_embeddings": 131072},
    ),
}
_TINY = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
_TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}

LORA_RANK = 16


def geometry(name: str, tiny: bool = False) -> tuple[str, dict[str, Any]]:
    """Model type and config values; ``tiny`` ones have the same class and switches."""
    model_type, values = deepcopy(GEOMETRIES[name])
    common: dict[str, Any] = {"tie_word_embeddings": False, "use_cache": False, "pad_token_id": None}
    values |= common | {"bos_token_id": 1, "eos_token_id": 2}
    if tiny:
        values.pop("head_dim", None)
        values |= _TINY
    return model_type, values


def config_of(name: str, tiny: bool = False) -> Any:
    """transformers' config."""
    from transformers import AutoConfig

    model_type, values = geometry(name, tiny)
    return AutoConfig.for_model(model_type, **values)


def build(name: str, dtype: torch.dtype, device: torch.device, tiny: bool = False, seed: int = 0) -> nn.Module:
    """A model with random weights, made on ``device`` in ``dtype``."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with device:
        return AutoModelForCausalLM.from_config(config_of(name, tiny), dtype=dtype)


def with_lora(model: nn.Module, **options: Any) -> nn.Module:
    """LoRA on all linear layers, in the dtype of the model."""
    from peft import LoraConfig, get_peft_model

    values: dict[str, Any] = {"r": LORA_RANK, "lora_alpha": 2 * LORA_RANK, "target_modules": "all-linear"}
    config = LoraConfig(task_type="CAUSAL_LM", **(values | options))
    return get_peft_model(model, config, autocast_adapter_dtype=False)


# ---- floating-point operations -----------------------------------------------------------------------------------


def flops_per_token(model: nn.Module, sequence: int) -> float:
    """Floating-point operations of forward and backward of one token, without recomputation.

    A matrix of n numbers takes 2n forward, 2n for the gradient of its input, and 2n for its own gradient if it is
    trained. Causal attention takes 2 * sequence * heads * head_dim forward and twice that backward: a token sees half
    of the sequence. The gradient of the first layer's input is counted although nothing may need it.

    Args:
        model: before it is sharded; a causal language model, with or without LoRA.
        sequence: length of the sequences.
    """
    matrices = 0.0
    for matrix, trained in _matrices(model):
        matrices += (6.0 if trained else 4.0) * matrix.numel()
    config = model.config
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return matrices + 6.0 * config.num_hidden_layers * sequence * heads * width


def _matrices(model: nn.Module) -> Iterator[tuple[torch.Tensor, bool]]:
    """Each weight that tokens are multiplied with, and whether it is trained. An embedding is only looked up."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            yield module.weight, module.weight.requires_grad


# ---- sizes without a model, for the plan of a run -------------------------------------------------------------------


def linear_sizes(values: dict[str, Any]) -> list[tuple[int, int]]:
    """(inputs, outputs) of the linear layers of one decoder layer."""
    hidden, inner, heads = values["hidden_size"], values["intermediate_size"], values["num_attention_heads"]
    width = values.get("head_dim") or hidden // heads
    queries, keys = heads * width, values["num_key_value_heads"] * width
    attention = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    return [*attention, (hidden, inner), (hidden, inner), (inner, hidden)]


def parameter_count(values: dict[str, Any]) -> int:
    """Of the linear layers, the embedding and the head; biases and norms are too few to count."""
    layer = sum(inputs * outputs for inputs, outputs in linear_sizes(values))
    return values["num_hidden_layers"] * layer + 2 * values["vocab_size"] * values["hidden_size"]


def estimated_flops_per_token(values: dict[str, Any], method: str, sequence: int) -> float:
    """:func:`flops_per_token` from a config's values; ``method`` is "full" or "lora"."""
    layers, sizes = values["num_hidden_layers"], linear_sizes(values)
    base = layers * sum(i * o for i, o in sizes) + values["vocab_size"] * values["hidden_size"]
    adapters = layers * sum(LORA_RANK * (i + o) for i, o in sizes)
    attention = 6.0 * layers * sequence * sizes[3][0]
    return attention + (6.0 * base if method == "full" else 4.0 * base + 6.0 * adapters)


def estimated_memory(
    values: dict[str, Any], method: str, optimizer: str, checkpointing: bool, rows: int, sequence: int
) -> int:
    """Bytes of a training in bf16 on one GPU, roughly: parameters, gradients, optimizer state, copies of the ends that
    FSDP2 all-gathers, logits and their gradients, activations.
    """
    count = parameter_count(values)
    ends = 2 * values["vocab_size"] * values["hidden_size"]
    per_parameter = 2 if method == "lora" else {"adamw": 8, "sgd": 4}[optimizer]
    fixed = per_parameter * count + (2 if method == "lora" else 4) * ends
    tokens = rows * sequence
    per_layer = 2 * (8 * values["hidden_size"] + 5 * values["intermediate_size"])
    kept = 2 * values["hidden_size"] * values["num_hidden_layers"] + per_layer
    activations = kept if checkpointing else per_layer * values["num_hidden_layers"]
    return fixed + tokens * (12 * values["vocab_size"] + activations)


def training_that_fits(values: dict[str, Any], method: str, rows: int, sequence: int, memory: int) -> tuple[str, bool]:
    """Optimizer and whether to checkpoint: the first of AdamW without and with, SGD without and with, that 85% of
    ``memory`` bytes hold; the last if none.
    """
    choices = [("adamw", False), ("adamw", True), ("sgd", False), ("sgd", True)]
    if method == "lora":
        choices = choices[:2]
    for optimizer, checkpointing in choices:
        if estimated_memory(values, method, optimizer, checkpointing, rows, sequence) <= 0.85 * memory:
            return optimizer, checkpointing
    return choices[-1]


# ---- a checkpoint that takes no space ------------------------------------------------------------------------------


def write_empty_checkpoint(name: str, directory: Path, tiny: bool = False) -> None:
    """Files of a bf16 model whose weights are holes: zeros when read, no space on the disk.

    A model too large for one device is loaded from them, each rank its shards, and filled with random numbers then.
    """
    from transformers import AutoModelForCausalLM

    config = config_of(name, tiny)
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    files: list[dict[str, torch.Tensor]] = [{}]
    for key, tensor in model.state_dict().items():
        if sum(t.numel() for t in files[-1].values()) > 2_000_000_000:
            files.append({})
        files[-1][key] = tensor
    names = [f"model-{index + 1:05d}-of-{len(files):05d}.safetensors" for index in range(len(files))]
    weight_map = {key: file for file, tensors in zip(names, files) for key in tensors}
    total = sum(_write_holes(directory / file, tensors) for file, tensors in zip(names, files))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_holes(path: Path, tensors: dict[str, torch.Tensor]) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, tensor in tensors.items():
        begin, end = end, end + 2 * tensor.numel()
        header[key] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return end


@torch.no_grad()
def fill_with_random_numbers(model: nn.Module, seed: int) -> None:
    """Fill the shards of a prepared model: matrices with normal numbers, vectors with ones.

    Frozen weights get numbers of this rank's own: what the values are is of no interest, only that they are not zeros,
    for which a GPU needs less power. Trained parameters and vectors stay equal on their replicas.
    """
    for index, (_, parameter) in enumerate(model.named_parameters()):
        shard = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if parameter.dim() < 2:
            shard.fill_(1.0)
        elif not parameter.requires_grad:
            generator = torch.Generator(shard.device).manual_seed(seed * 100_003 + index)
            shard.normal_(std=0.02, generator=generator)
