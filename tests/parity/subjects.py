"""What the parity cells train: models, adapters and batches, by where the tensor-parallel plan comes from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from harness import planned_models
from harness.models import COMMON, make_batches, randomize
from harness.training import LORA
from harness.training import build as build_model
from peft import LoraConfig, get_peft_model
from sweep.tiny import build as build_tiny
from sweep.tiny import vocabulary
from transformers import AutoConfig

Batch = dict[str, torch.Tensor]

ROWS = 4

#: name -> options of LoRA
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "dora": {**LORA, "use_dora": True},
    "ends": {"target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"]},
    "bias_all": {**LORA, "bias": "all"},
    "rslora": {**LORA, "use_rslora": True},
    "patterns": {**LORA, "rank_pattern": {"q_proj": 2, "down_proj": 6}, "alpha_pattern": {"q_proj": 3}},
    "one_layer": {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]},
    "saved_ends": {"modules_to_save": ["lm_head", "embed_tokens"], "target_modules": ["q_proj", "o_proj"]},
    "dora_biases": {**LORA, "use_dora": True, "bias": "lora_only"},
}


@dataclass(frozen=True)
class Subject:
    """Models of one kind.

    Attributes:
        build: model, adapter, dropout, config values -> the model.
        batches: the model, its name, number of micro-batches, length, with images -> that many micro-batches.
        options: fields of the config that select the plan.
        arguments: of each forward on the ranks.
        held: model -> the largest fraction of all parameters that the plan may leave on a tp rank.
    """

    build: Callable[[str, str, float, dict[str, Any]], torch.nn.Module]
    batches: Callable[[torch.nn.Module, str, int, int, bool], list[Batch]]
    options: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    held: Callable[[str], float] = lambda model: math.inf


# ---- models that have a plan in transformers -----------------------------------------------------------------------


def adapter_options(model: str, adapter: str, dropout: float) -> dict[str, Any] | None:
    """LoRA options of a cell, None for full fine-tuning.

    PEFT has neither dropout nor DoRA for the fused expert weights of a mixture of experts (an error of its own says
    so): there such an adapter is on the attention alone; without them, on every linear layer and on the experts.
    """
    if adapter == "full":
        return None
    options = ADAPTERS[adapter] | {"lora_dropout": dropout}
    if "moe" in model and (adapter == "dora" or dropout):
        options["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return options


def _build(model: str, adapter: str, dropout: float, values: dict[str, Any]) -> torch.nn.Module:
    return build_model(model, adapter_options(model, adapter, dropout), **values).train()


def _batches(model: torch.nn.Module, name: str, parts: int, length: int, images: bool) -> list[Batch]:
    return make_batches(parts, ROWS // parts, length, model.config.vocab_size, seed=3)


# ---- models with an optimised plan in the registry -----------------------------------------------------------------


def _build_registered(model: str, adapter: str, dropout: float, values: dict[str, Any]) -> torch.nn.Module:
    return planned_models.build_family(model, **values) if adapter == "full" else planned_models.adapted(model)


def _batches_registered(model: torch.nn.Module, name: str, parts: int, length: int, images: bool) -> list[Batch]:
    return planned_models.family_batches(name, parts, images)


# ---- models without a plan: a derived one --------------------------------------------------------------------------


def _build_derived(model: str, adapter: str, dropout: float, values: dict[str, Any]) -> torch.nn.Module:
    built = build_tiny(model, **values)
    if adapter == "full":
        return built
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}
        return get_peft_model(built, LoraConfig(r=4, lora_alpha=8, **options))


def _batches_derived(model: torch.nn.Module, name: str, parts: int, length: int, images: bool) -> list[Batch]:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return make_batches(parts, ROWS // parts, length, vocabulary(inner), seed=3)


# ---- classification, rewards, encoders -----------------------------------------------------------------------------

LABELS = 3
TASKS = {
    "sequence": "AutoModelForSequenceClassification",
    "reward": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "masked": "AutoModelForMaskedLM",
}

_DECODER = COMMON | {"intermediate_size": 128, "num_key_value_heads": 2, "pad_token_id": 0, "classifier_dropout": 0.0}
_ENCODER = COMMON | {"intermediate_size": 128, "pad_token_id": 0}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _DECODER,
    "qwen2": _DECODER,
    "bert": _ENCODER | _NO_DROPOUT,
    "modernbert": _ENCODER | {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 4},
}


def _build_head(model: str, adapter: str, dropout: float, values: dict[str, Any]) -> torch.nn.Module:
    """``model`` is "type/task"; a reward is a classification with one label."""
    model_type, task = model.split("/")
    labels = 1 if task == "reward" else LABELS
    config = AutoConfig.for_model(model_type, num_labels=labels, **CONFIGS[model_type], **values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built = getattr(transformers, TASKS[task]).from_config(config)
        randomize(built)
        if adapter != "full":
            # modernbert: not its classifier, which is trained as a copy
            targets = ["Wqkv", "Wi", "Wo"] if model_type == "modernbert" else "all-linear"
            kind = "TOKEN_CLS" if task == "token" else "SEQ_CLS"
            options: dict[str, Any] = {"task_type": kind, "target_modules": targets, "init_lora_weights": False}
            if task == "token":
                options["exclude_modules"] = ["score", "classifier"]  # trained as a copy, so not adapted, too
            built = get_peft_model(built, LoraConfig(r=4, lora_alpha=8, **options))
            randomize(built)
    return built


def _batches_head(model: torch.nn.Module, name: str, parts: int, length: int, images: bool) -> list[Batch]:
    """Rows of different lengths; labels per row, per token, or a score."""
    task = name.split("/")[1]
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 128, (ROWS, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    mask[2, 6:] = 0
    batch = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    if task == "masked":
        batch["labels"] = ids
    elif task == "token":
        batch["labels"] = torch.randint(LABELS, ids.shape, generator=generator)
    elif task == "reward":
        batch["labels"] = torch.randn(ROWS, generator=generator)
    else:
        batch["labels"] = torch.randint(LABELS, (ROWS,), generator=generator)
    rows = ROWS // parts
    return [{k: v[i * rows : (i + 1) * rows] for k, v in batch.items()} for i in range(parts)]


#: Where the plan comes from -> what is trained with it. The plans of "head" are transformers' or derived.
SUBJECTS: dict[str, Subject] = {
    "transformers": Subject(_build, _batches, arguments={"use_cache": False}),
    "registry": Subject(_build_registered, _batches_registered, {"plan_order": planned_models.REGISTRY_FIRST}),
    # mamba has no pairs of projections: each is on its own
    "derived": Subject(_build_derived, _batches_derived, held=lambda model: 0.85 if model == "mamba" else 0.65),
    "head": Subject(_build_head, _batches_head),
}
