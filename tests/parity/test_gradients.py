"""Gradients at equal weights: every cell of model x mesh x {full, LoRA} equals one process (DESIGN: promise 1)."""

import pytest
from harness.compare import assert_gradients_equal, assert_losses_equal
from harness.meshes import MESHES
from harness.oracle import loss_and_grads
from harness.pool import run_distributed
from harness.training import LORA, batches_for, build, first_gradients

MODELS = [
    "llama",
    "llama_tied",
    "llama_odd_vocab",
    "qwen3",
    "gemma3",
    "phi3",
    "mixtral",
    "mixtral_aux",
    "qwen3_moe",
    "qwen3_moe_aux",
]
LORA_ENDS = {"target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"]}

CELLS = [(model, "tp2_fsdp2", adapter) for model in MODELS for adapter in (None, LORA)]
# On the other meshes every model once, full and LoRA in turn.
CELLS += [
    (model, mesh, (None, LORA)[(row + column) % 2])
    for column, mesh in enumerate(("tp2", "fsdp2", "hsdp"))
    for row, model in enumerate(MODELS)
]
CELLS += [("llama", "tp2_hsdp", LORA), ("qwen3", "tp2_hsdp", None), ("llama", "ddp_like", None)]
CELLS += [(model, "tp2_fsdp2", LORA_ENDS) for model in ("llama", "llama_odd_vocab")]
CELLS += [(model, "tp2_fsdp2", None) for model in ("mistral", "olmo2", "cohere")]
CELLS += [("gemma3_softcap", "tp2_fsdp2", None)]
CELLS += [("gpt2", "fsdp2", None), ("gpt2", "hsdp", LORA)]


def label(cell):
    model, mesh, adapter = cell
    kind = "full" if adapter is None else "lora" if adapter is LORA else "lora_ends"
    return f"{model}-{mesh}-{kind}"


def check(model: str, mesh: str, adapter, overrides=None) -> None:
    """Compare one cell with the one-process oracle."""
    world, sizes, dp_size = MESHES[mesh]
    loss, gradients = run_distributed(
        world, first_gradients, model, sizes, adapter=adapter, overrides=overrides, dp_size=dp_size
    )[0]
    reference = build(model, adapter, **(overrides or {}))
    want_loss, want = loss_and_grads(reference, batches_for(reference, dp_size))
    assert_losses_equal(loss, want_loss)
    assert_gradients_equal(gradients, want)


@pytest.mark.parametrize("cell", CELLS, ids=label)
def test_gradients_equal_one_process(cell):
    check(*cell)


@pytest.mark.parametrize(
    "model, adapter",
    [
        ("gemma3_softcap", LORA),
        ("cohere", LORA),
        ("llama_tied", None),
        ("qwen3", LORA),
        ("mixtral_aux", None),
        ("llama", LORA_ENDS),
    ],
    ids=["softcap_lora", "scale_lora", "tied_full", "qwen3_lora", "router_full", "head_lora"],
)
def test_four_slices_of_the_vocabulary(model, adapter):
    """What the loss has to bear: soft-capped, scaled, tied, a router's loss beside it, an adapter on the head."""
    check(model, "tp4", adapter, {"num_key_value_heads": 4})


@pytest.mark.both_ends
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("model", ["llama_tied", "mixtral"])
def test_both_supported_transformers_versions(model, adapter):
    check(model, "tp2_fsdp2", adapter)
