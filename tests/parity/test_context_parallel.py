"""Context parallelism: loss and gradients of one process, through Accelerate's documented loop and the stock Trainer."""

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from harness.compare import assert_gradients_equal, assert_losses_equal, full_grads
from harness.oracle import loss_and_grads
from harness.pool import run_distributed

from hf_automodel_parallel import AutoParallelismConfig
from parity.jobs import SEQUENCE, batches_for, build, data_rank, trainable

LORA = {"target_modules": "all-linear"}


def with_shifted_labels(batch):
    """What a collator for context parallelism makes of a batch; every tensor has the sequence in dimension 1."""
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    positions = torch.arange(batch["input_ids"].shape[1]).expand(len(batch["input_ids"]), -1)
    return {**batch, "shift_labels": shifted, "position_ids": positions}


def in_context(accelerator, batch, **options):
    buffers = list(batch.values())
    return accelerator.maybe_context_parallel(buffers=buffers, buffer_seq_dims=[1] * len(buffers), **options)


def gradients(name, sizes, adapter, dp_size, overrides=None, **options):
    """Loss and gradients of one step of Accelerate's loop; labels of some prompts are ignored, so parts have other numbers."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes, **options))
    model = build(name, adapter, **(overrides or {}))
    model, _ = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
    batch = with_shifted_labels(batches_for(model, dp_size, ragged=True)[data_rank(accelerator)])
    with in_context(accelerator, batch):
        assert batch["input_ids"].shape[1] == SEQUENCE // sizes["cp_size"], "not sharded"
        loss = model(**batch).loss
        accelerator.backward(loss)
    assert batch["input_ids"].shape[1] == SEQUENCE, "not restored"
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size(), loss.item(), full_grads(model)


MESHES = {
    "cp2": (2, {"cp_size": 2}, 1),
    "cp2_tp2": (4, {"cp_size": 2, "tp_size": 2}, 1),
    "cp2_fsdp2": (4, {"cp_size": 2, "dp_shard_size": 2}, 2),
    "cp4": (4, {"cp_size": 4}, 1),
}

CELLS = [
    ("llama", "cp2_tp2", None, {}),
    ("llama_tied", "cp2_tp2", LORA, {"activation_checkpointing": "full"}),
    ("llama", "cp2_fsdp2", LORA, {"activation_checkpointing": "selective"}),
    ("qwen3", "cp2_fsdp2", None, {}),
    ("mixtral", "cp4", LORA, {}),
    ("gpt2", "cp2", None, {}),
    ("llama", "cp2", LORA, {"compile": "aot_eager"}),
]


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: "-".join([c[0], c[1], "lora" if c[2] else "full", *c[3].values()]))
def test_gradients_equal_one_process(cell):
    name, mesh, adapter, options = cell
    world, sizes, dp_size = MESHES[mesh]
    answers = run_distributed(world, gradients, name, sizes, adapter, dp_size, **options)
    reference = build(name, adapter)
    batches = batches_for(reference, dp_size, ragged=True)
    want_loss, want = loss_and_grads(reference, batches)
    assert_losses_equal(answers[0][0], want_loss)
    assert_losses_equal(answers[0][1], loss_and_grads(reference, batches[:1])[0])  # the loss of a rank is that of its rows
    assert_gradients_equal(answers[0][2], want)
