"""Options of LoRA at parity: initialisations that change the base, biases, trained rows, expert weights, variants."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from harness.compare import assert_gradients_equal, assert_losses_equal, full_grads, mean_over_ranks
from harness.meshes import MESHES
from harness.models import build_model, randomize
from harness.pool import run_distributed
from harness.training import batches_for, data_rank, trainable
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from transformers import T5Config, T5ForConditionalGeneration

from hf_automodel_parallel import AutoParallelismConfig, UnsupportedError

ALL = {"target_modules": "all-linear"}
PACKED = {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}
BIASES = {"attention_bias": True, "mlp_bias": True}

#: label -> (model, overrides of its config, options of LoRA)
CELLS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "default init": ("llama", {}, {**ALL, "init_lora_weights": True}),
    "rslora": ("llama", {}, {**ALL, "use_rslora": True}),
    "gaussian": ("llama", {}, {**ALL, "init_lora_weights": "gaussian"}),
    "pissa": ("llama", {}, {**ALL, "init_lora_weights": "pissa"}),
    "olora": ("llama", {}, {**ALL, "init_lora_weights": "olora"}),
    "orthogonal": ("llama", {}, {**ALL, "init_lora_weights": "orthogonal"}),
    "eva": ("llama", {}, {**ALL, "init_lora_weights": "eva"}),
    "dora": ("llama", BIASES, {**ALL, "use_dora": True}),
    "dora on the head": ("llama", {}, {"target_modules": ["q_proj", "down_proj", "lm_head"], "use_dora": True}),
    "bias lora_only": ("llama", BIASES, {**ALL, "bias": "lora_only"}),
    "lora_bias": ("llama", BIASES, {**ALL, "lora_bias": True}),
    "lora_bias packed": ("phi3", {}, {**ALL, "lora_bias": True}),
    # query, key and value are one matrix, so vectors of its features are packed along their only dimension
    "dora packed in three": ("gpt2", {}, {**PACKED, "use_dora": True}),
    "lora_bias packed in three": ("gpt2", {}, {**PACKED, "lora_bias": True}),
    "saved and tied": (
        "llama_tied",
        {},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "modules_to_save": ("llama", {}, {**ALL, "modules_to_save": ["norm", "lm_head", "embed_tokens"]}),
    "tokens": ("llama", {}, {**ALL, "trainable_token_indices": [1, 7, 100]}),
    "tokens tied": ("llama_tied", {}, {**ALL, "trainable_token_indices": [1, 7, 100]}),
    "tokens of an encoder": ("t5", {}, {"target_modules": ["q"], "trainable_token_indices": [1, 7, 100]}),
    "tokens odd": ("llama_odd_vocab", {}, {**ALL, "trainable_token_indices": [1, 7, 130]}),
    "target_parameters": (
        "mixtral",
        {},
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "layers": ("llama", {}, {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]}),
    "patterns": ("llama", {}, {**ALL, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}}),
    "injected": ("llama", {}, {"target_modules": ["q_proj", "down_proj"]}),
    "alora": ("llama", {}, {**ALL, "alora_invocation_tokens": [5, 6]}),
}


def encoder_decoder() -> torch.nn.Module:
    """A T5, whose encoder and decoder look up in one table."""
    sizes = {
        "vocab_size": 128,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_heads": 4,
        "num_layers": 1,
        "dropout_rate": 0.0,
    }
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    randomize(model)
    return model


def build_cell(label: str) -> torch.nn.Module:
    """The adapted model; with an initialisation of PEFT's own, the factors are then moved off their zeros."""
    name, overrides, options = CELLS[label]
    task = "SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM"
    values = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": task, **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = encoder_decoder() if name == "t5" else build_model(name, **overrides)
        if label == "injected":  # transformers' own way, without a PeftModel
            try:
                model.add_adapter(LoraConfig(**values))
            except ValueError:  # transformers 5.24 wants a PEFT that is not out yet; below it does the same
                inject_adapter_in_model(LoraConfig(**values), model)
            model.train()
        else:
            model = get_peft_model(model, LoraConfig(**values))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.requires_grad and (".bias" in key or "trainable_tokens" in key):
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def cell_batches(model: torch.nn.Module, parts: int) -> list[dict[str, torch.Tensor]]:
    """Batches in which rows contain the invocation tokens of activated LoRA, at different places, or do not."""
    batches = batches_for(model, parts)
    for batch in batches:
        batch["input_ids"][0, 3:5] = torch.tensor([5, 6])
        batch["input_ids"][1, 8:10] = torch.tensor([5, 6])
    return batches


def run_cells(sizes: dict[str, int], dp_size: int, labels: list[str]) -> dict[str, Any]:
    """Label -> (loss, gradients)."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    results: dict[str, Any] = {}
    for label in labels:
        model = build_cell(label)
        batches = cell_batches(model, dp_size)
        model, _ = accelerator.prepare(model, torch.optim.AdamW(trainable(model)))
        loss = model(**batches[data_rank(accelerator)], use_cache=False).loss
        accelerator.backward(loss)
        results[label] = (mean_over_ranks(loss), full_grads(model))
        accelerator.free_memory()
    return results


def check_cells(mesh: str, labels: list[str]) -> None:
    world, sizes, dp_size = MESHES[mesh]
    results = run_distributed(world, run_cells, sizes, dp_size, labels)[0]
    problems = []
    for label in labels:
        reference = build_cell(label)
        losses = [reference(**batch, use_cache=False).loss for batch in cell_batches(reference, dp_size)]
        loss = torch.stack(losses).mean()
        loss.backward()
        try:
            assert_losses_equal(results[label][0], loss.item())
            assert_gradients_equal(results[label][1], {n: p.grad for n, p in reference.named_parameters()})
        except AssertionError as error:
            problems.append(f"{label}: {error}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("mesh", ["tp2", "fsdp2"])
def test_lora_options(mesh):
    check_cells(mesh, list(CELLS))


ON_BOTH_AXES = {
    "first": ["pissa", "lora_bias", "tokens tied", "target_parameters"],
    "more": [
        "dora on the head",
        "alora",
        "dora packed in three",
        "lora_bias packed in three",
        "saved and tied",
        "tokens of an encoder",
    ],
}


@pytest.mark.core_cases("first")
@pytest.mark.parametrize(
    "labels", [pytest.param(ON_BOTH_AXES["first"], marks=pytest.mark.both_ends), ON_BOTH_AXES["more"]], ids=ON_BOTH_AXES
)
def test_lora_options_on_both_axes(labels):
    check_cells("tp2_fsdp2", labels)


#: label -> (options, word of the message)
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "mica": ({"init_lora_weights": "mica"}, "MiCALinearVariant"),
    "embedding dora": ({"use_dora": True, "target_modules": ["embed_tokens"]}, "DoraEmbeddingVariant"),
}


def refusals(options: list[dict[str, Any]]) -> list[str]:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
    messages = []
    for values in options:
        values = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **values}
        model = get_peft_model(build_model("llama"), LoraConfig(**values))
        try:
            accelerator.prepare(model, torch.optim.AdamW(trainable(model)))
            messages.append("prepared")
        except UnsupportedError as error:
            messages.append(str(error))
    return messages


@pytest.mark.core
def test_variants_that_are_not_local_are_refused_by_name():
    for messages in run_distributed(2, refusals, [options for options, _ in VARIANTS.values()]):
        for message, (_, word) in zip(messages, VARIANTS.values(), strict=True):
            assert f"uses the LoRA variant {word}" in message, message
