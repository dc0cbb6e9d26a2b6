"""A model whose forward reads parameters of other modules: what the ranks run."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from harness.compare import full_grads
from harness.models import build_model, lora, make_batches
from harness.training import data_rank, trainable
from transformers import LlamaForCausalLM

from hf_automodel_parallel import AutoParallelismConfig


class ReadingLlama(LlamaForCausalLM):
    """Its loss depends on a row of the embedding, on the whole table, and on the last norm, each read from outside."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inner = self.model
        pad = inner.embed_tokens.weight[5, :]
        output = super().forward(*args, **kwargs)
        extra = (pad * torch.arange(pad.shape[-1]).to(inner.embed_tokens.weight.dtype)).mean()
        extra = extra + self.all_of_it().square().mean() + self.model.norm.weight.sum()
        output.loss = output.loss + extra
        return output

    def all_of_it(self) -> torch.Tensor:
        table = self.model.embed_tokens
        return 3 * table.weight[-2] + self.get_input_embeddings().weight


def reading(tied: bool, adapter: bool) -> torch.nn.Module:
    plain = build_model("llama", tie_word_embeddings=tied)
    model = ReadingLlama(plain.config)
    model.load_state_dict(plain.state_dict())
    return lora(model, target_modules=["q_proj", "embed_tokens"]) if adapter else model


def batches(parts: int) -> list[dict[str, torch.Tensor]]:
    return make_batches(parts, 4 // parts, 16, 128, seed=3)


def reading_gradients(
    cases: list[tuple[bool, bool]], sizes: dict[str, int], dp_size: int
) -> list[tuple[float, dict[str, torch.Tensor | None]]]:
    """Loss and gradients through ``Accelerator.prepare`` for each (tied, with LoRA)."""
    results = []
    for tied, adapter in cases:
        accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
        model = reading(tied, adapter)
        model, _ = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
        loss = model(**batches(dp_size)[data_rank(accelerator)]).loss
        accelerator.backward(loss)
        total = loss.detach().clone()
        dist.all_reduce(total)
        results.append((total.item() / dist.get_world_size(), full_grads(model)))
        accelerator.state._reset_state()
    return results
