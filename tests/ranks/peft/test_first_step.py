"""Where LoRA and trained copies sit: row-wise layers, embedding, head, on one axis and on two."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from harness.compare import (
    assert_bitwise_equal,
    assert_gradients_equal,
    assert_losses_equal,
    full_parameters,
    mean_over_ranks,
)
from harness.meshes import MESHES
from harness.models import LORA_7
from harness.oracle import loss_and_grads, train_steps
from harness.pool import run_distributed
from harness.training import batches_for, build, data_rank, first_gradients, trainable

from hf_automodel_parallel import AutoParallelismConfig


def check_first_step(model: str, mesh: str, adapter: dict[str, Any]) -> dict[str, torch.Tensor | None]:
    """The first loss and all gradients equal one process; returns the gradients."""
    world, sizes, dp_size = MESHES[mesh]
    loss, gradients = run_distributed(world, first_gradients, model, sizes, adapter=adapter, dp_size=dp_size)[0]
    reference = build(model, adapter)
    want_loss, want = loss_and_grads(reference, batches_for(reference, dp_size))
    assert_losses_equal(loss, want_loss)
    assert_gradients_equal(gradients, want)
    return gradients


@pytest.mark.core
def test_lora_on_row_wise_targets():
    """Stock: PEFT's adapter of `o_proj` / `down_proj` has the shape of the shard; the first forward crashes."""
    gradients = check_first_step("llama", "tp2", {"target_modules": LORA_7})
    row_wise = [
        n for n, g in gradients.items() if ("o_proj" in n or "down_proj" in n) and "lora" in n and g is not None
    ]
    assert len(row_wise) == 2 * 2 * 2  # layers x projections x {A, B}


@pytest.mark.core
def test_lora_on_two_axes():
    """Stock: there, adapters of q and v alone crash already."""
    check_first_step("llama", "tp2_fsdp2", {"target_modules": ["q_proj", "v_proj"]})


ENDS = {"target_modules": ["embed_tokens", "lm_head"]}


def three_steps(sizes: dict[str, int], dp_size: int, adapter: dict[str, Any]) -> tuple[list, dict[str, torch.Tensor]]:
    """Losses of three AdamW steps and, from every rank, the trainable parameters after them."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = build("llama", adapter)
    steps = [batches_for(model, dp_size, seed=10 + step) for step in range(3)]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0))
    losses = []
    for batches in steps:
        loss = model(**batches[data_rank(accelerator)], use_cache=False).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean_over_ranks(loss))
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    return losses, {name: tensor for name, tensor in full_parameters(model).items() if name in learned}


@pytest.mark.core
def test_lora_on_embedding_and_head_on_two_axes():
    """Stock: their adapters live on the tp mesh alone, so nothing averages them over fsdp (gradients off by 150 %)."""
    world, sizes, dp_size = MESHES["tp2_fsdp2"]
    gradients = check_first_step("llama", "tp2_fsdp2", ENDS)
    assert len([n for n, g in gradients.items() if g is not None]) == 4
    results = run_distributed(world, three_steps, sizes, dp_size, ENDS)
    assert_bitwise_equal([parameters for _, parameters in results])
    reference = build("llama", ENDS)
    steps = [batches_for(reference, dp_size, seed=10 + step) for step in range(3)]
    want = train_steps(reference, steps, lr=1e-2)
    assert_losses_equal(results[0][0], [step["loss"] for step in want])
    learned = {n: p.detach() for n, p in reference.named_parameters() if p.requires_grad}
    for name, parameter in learned.items():
        torch.testing.assert_close(
            results[0][1][name], parameter, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.core_cases("tp2")
@pytest.mark.parametrize("mesh", ["tp2", "tp2_fsdp2"])
def test_modules_to_save_of_the_head(mesh):
    """Stock: PEFT's copy of a sharded head crashes in deepcopy."""
    gradients = check_first_step(
        "llama", mesh, {"target_modules": ["q_proj", "o_proj"], "modules_to_save": ["lm_head"]}
    )
    assert gradients["base_model.model.lm_head.modules_to_save.default.weight"].shape == (128, 64)


def test_lora_on_the_head():
    """Stock: its adapter (`colwise_gather_output`) has the wrong shape."""
    check_first_step("llama", "tp2", {"target_modules": ["lm_head"]})
