"""What real ranks have and send in a step, for the comparison with what is planned."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from hf_automodel_parallel import AutoParallelismConfig
from hf_automodel_parallel.planner.counting import Collectives

ROWS, LENGTH = 2, 32


def tiny(family: str) -> Any:
    common = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 7, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    if family == "llama":
        return LlamaConfig(**common, **heads)
    return MixtralConfig(**common, **heads, num_local_experts=4, num_experts_per_tok=2)


def real_step(family: str, sizes: dict[str, int], options: dict[str, Any], lora: dict[str, Any] | None) -> Any:
    """Bytes of this rank after the second of two steps, and its collectives."""
    torch.manual_seed(0)
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes, **options, audit="off"))
    model: Any = AutoModelForCausalLM.from_config(tiny(family), dtype=torch.bfloat16)
    model = model if lora is None else get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    ids = torch.randint(0, 128, (ROWS, LENGTH))
    for _ in range(2):
        optimizer.zero_grad()
        with Collectives(accelerator.torch_device_mesh) as seen:
            accelerator.backward(model(input_ids=ids, labels=ids, use_cache=False).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    states = [v for state in optimizer.state.values() for v in state.values()]
    return {
        "parameters": _bytes(model.parameters()),
        "gradients": _bytes(p.grad for p in model.parameters() if p.grad is not None),
        "optimizer": _bytes(states),
        "collectives": sorted(
            (*key, calls.count, calls.tensor_bytes, calls.sent_bytes) for key, calls in seen.calls.items()
        ),
    }


def _bytes(tensors: Any) -> int:
    parts = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in parts)
