"""Classification heads, reward heads and bidirectional encoders: what the ranks run."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator
from harness.compare import full_grads
from harness.models import COMMON, randomize
from harness.training import data_rank, trainable
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig

from hf_automodel_parallel import AutoParallelismConfig

LABELS = 3
_DECODER = COMMON | {"intermediate_size": 128, "num_key_value_heads": 2, "pad_token_id": 0, "classifier_dropout": 0.0}
_ENCODER = COMMON | {"intermediate_size": 128, "pad_token_id": 0}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _DECODER,
    "qwen2": _DECODER,
    "bert": _ENCODER | _NO_DROPOUT,
    "modernbert": _ENCODER | {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 4},
}


def build(model_type: str, task: str, adapter: bool = False) -> torch.nn.Module:
    """``task`` names a class of transformers, such as ``AutoModelForSequenceClassification``; one label is a reward."""
    labels = 1 if task.endswith(":reward") else LABELS
    config = AutoConfig.for_model(model_type, num_labels=labels, **CONFIGS[model_type])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, task.removesuffix(":reward")).from_config(config)
        randomize(model)
        if adapter:
            kind = "TOKEN_CLS" if "Token" in task else "SEQ_CLS"
            targets = (
                ["Wqkv", "Wi", "Wo"] if model_type == "modernbert" else "all-linear"
            )  # not its classifier, which is saved
            options = {"task_type": kind, "target_modules": targets, "init_lora_weights": False}
            if "Token" in task:
                options["exclude_modules"] = ["score", "classifier"]  # saved whole, so not adapted, too
            model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **options))
            randomize(model)
    return model


def batches_of(task: str, parts: int) -> list[dict[str, torch.Tensor]]:
    """Rows of different lengths; labels per row, per token, or a score."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 128, (4, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    mask[2, 6:] = 0
    batch = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    if "Masked" in task:
        batch["labels"] = ids
    elif "Token" in task:
        batch["labels"] = torch.randint(LABELS, ids.shape, generator=generator)
    elif task.endswith(":reward"):
        batch["labels"] = torch.randn(4, generator=generator)
    else:
        batch["labels"] = torch.randint(LABELS, (4,), generator=generator)
    rows = 4 // parts
    return [{k: v[i * rows : (i + 1) * rows] for k, v in batch.items()} for i in range(parts)]


def head_gradients(
    cells: list[tuple[str, str, bool]], sizes: dict[str, Any], dp_size: int
) -> list[tuple[float, dict[str, torch.Tensor | None]]]:
    """Loss and gradients for each cell (type, class, with LoRA)."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    results = []
    for model_type, task, adapter in cells:
        model = build(model_type, task, adapter)
        model, _ = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
        loss = model(**batches_of(task, dp_size)[data_rank(accelerator)]).loss
        accelerator.backward(loss)
        total = loss.detach().clone()
        dist.all_reduce(total)
        results.append((total.item() / dist.get_world_size(), full_grads(model)))
        accelerator.free_memory()
    return results
