"""Several forwards before one backward, of which each is differentiated at another place (distillation, contrastive
losses).
"""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from harness.compare import assert_gradients_equal, assert_losses_equal, full_grads, mean_over_ranks
from harness.meshes import MESHES
from harness.pool import run_distributed
from harness.training import build, data_rank, trainable

from hf_automodel_parallel import AutoParallelismConfig
from ranks.sequence_parallel.jobs import batches_of


def loss_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Hidden states of a first forward, the last one behind the final norm; some logits of a second; the loss of a
    third.
    """
    states = model(input_ids=batch["input_ids"], output_hidden_states=True, use_cache=False).hidden_states
    logits = model(input_ids=batch["input_ids"], logits_to_keep=3, use_cache=False).logits
    return sum(h.square().mean() for h in states) + logits.square().mean() + model(**batch, use_cache=False).loss


def gradients_of_forwards(name: str, sizes: dict[str, Any], parts: int) -> tuple[float, dict]:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = build(name).train()
    batches = batches_of(model, parts)
    model, _ = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.1))
    loss = loss_of(model, batches[data_rank(accelerator)])
    accelerator.backward(loss)
    return mean_over_ranks(loss), full_grads(model)


@pytest.mark.core_cases("llama-fsdp2-plain", "llama-tp2-sp")
@pytest.mark.parametrize(
    "model, mesh, fields",
    [
        ("llama", "fsdp2", {}),
        ("llama", "tp2", {}),
        ("llama", "tp2", {"sequence_parallel": True}),
        ("llama_tied", "tp2_fsdp2", {"sequence_parallel": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "sp" if value else "plain",
)
def test_gradients_equal_one_process(model, mesh, fields):
    """torch alone ends with a segmentation fault here, because it frees the unit of final norm and head too early."""
    world, sizes, parts = MESHES[mesh]
    loss, gradients = run_distributed(world, gradients_of_forwards, model, {**sizes, **fields}, parts)[0]
    reference = build(model).train()
    losses = []
    for batch in batches_of(reference, parts):
        losses.append(loss_of(reference, batch))
        (losses[-1] / parts).backward()
    assert_losses_equal(loss, sum(x.item() for x in losses) / parts)
    assert_gradients_equal(gradients, full_grads(reference))
