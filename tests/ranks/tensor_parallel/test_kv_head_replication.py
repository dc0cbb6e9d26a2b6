"""Key and value heads fewer than tp ranks: neighbours share a head, and the gradients are those of one process."""

import pytest
import torch
from accelerate import Accelerator
from harness.compare import assert_gradients_equal, assert_losses_equal, full_parameters
from harness.meshes import MESHES
from harness.oracle import loss_and_grads, train_steps
from harness.pool import run_distributed
from harness.training import batches_for, build, first_gradients, trainable
from torch.distributed.tensor import Replicate

from hf_automodel_parallel import AutoParallelismConfig

ONE, TWO = {"num_key_value_heads": 1}, {"num_key_value_heads": 2}
BIAS = ONE | {"attention_bias": True}
LORA = {"target_modules": "all-linear"}
DORA = {"target_modules": ["k_proj", "v_proj", "o_proj"], "use_dora": True}


@pytest.mark.core_cases("llama-tp2-overrides0-None-options0", "qwen3-tp2_fsdp2-overrides4-adapter4-options4")
@pytest.mark.parametrize(
    ("model", "mesh", "overrides", "adapter", "options"),
    [
        ("llama", "tp2", BIAS, None, {}),
        ("llama", "tp4", TWO, LORA, {}),
        ("llama", "tp4", BIAS, None, {"sequence_parallel": True}),
        ("qwen3", "tp4", ONE, None, {}),  # its keys are normed per head
        ("qwen3", "tp2_fsdp2", ONE, LORA, {"sequence_parallel": True}),
        ("mistral", "tp2_fsdp2", ONE, None, {"activation_checkpointing": "full"}),
        ("mistral", "tp2", ONE, DORA, {}),
        ("phi3", "tp4", ONE, None, {}),  # q, k and v in one matrix: whole in flight
    ],
)
def test_ranks_share_heads(model, mesh, overrides, adapter, options):
    world, sizes, dp_size = MESHES[mesh]
    loss, gradients = run_distributed(
        world, first_gradients, model, sizes | options, adapter=adapter, overrides=overrides, dp_size=dp_size
    )[0]
    reference = build(model, adapter, **overrides)
    want_loss, want = loss_and_grads(reference, batches_for(reference, dp_size))
    assert_losses_equal(loss, want_loss)
    assert_gradients_equal(gradients, want)


def steps_and_files(directory: str):
    """Three clipped steps; then what rank 0 saves, and where the projection lies."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=4))
    model = build("llama", **TWO)
    batches = [batches_for(model, 1, rows=8, seed=10 + step)[0] for step in range(3)]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3, weight_decay=0.0))
    history = []
    for batch in batches:
        loss = model(**batch, use_cache=False).loss
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
        history.append({"loss": loss.item(), "grad_norm": norm.item()})
        optimizer.step()
        optimizer.zero_grad()
    attention = model.model.layers[0].self_attn
    place = attention.k_proj.weight.placements[-1]
    state = accelerator.get_state_dict(model)
    model.save_pretrained(directory, state_dict=state, is_main_process=accelerator.is_main_process)
    return history, place, attention.num_key_value_groups, full_parameters(model)


def test_steps_norms_and_files_are_those_of_one_process(tmp_path):
    history, place, groups, parameters = run_distributed(4, steps_and_files, str(tmp_path))[0]
    reference = build("llama", **TWO)
    want = train_steps(
        reference,
        [batches_for(reference, 1, rows=8, seed=10 + step) for step in range(3)],
        max_grad_norm=0.5,
    )
    assert place == Replicate() and groups == 1
    for got, expected in zip(history, want, strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5), "each copy is counted once"
    assert_gradients_equal(parameters, dict(reference.state_dict()), rtol=1e-4)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "model.safetensors")
    assert saved["model.layers.0.self_attn.k_proj.weight"].shape == (32, 64)
    assert {n: t.shape for n, t in saved.items()} == {n: t.shape for n, t in reference.state_dict().items()}
