"""NEFTune: hooks that a user put on an embedding see its whole output, so the noise is that of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from harness.compare import assert_gradients_equal, assert_losses_equal, full_grads, mean_over_ranks
from harness.meshes import MESHES
from harness.pool import run_distributed
from harness.training import _Rows, batches_for, build, data_rank, trainable
from transformers.integrations.neftune import activate_neftune

from hf_automodel_parallel import AutoParallelismConfig

ALPHA = 50.0  # strong enough to change every digit of the loss


def noisy_step(name: str, adapter: Any, mesh: str) -> tuple[float, dict[str, torch.Tensor | None]]:
    """One step; the data-parallel ranks have seeds of their own, the ranks of a tp group too before prepare."""
    _, sizes, dp_size = MESHES[mesh]
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = build(name, adapter)
    activate_neftune(model, ALPHA, accelerator)
    batch = batches_for(model, dp_size)[data_rank(accelerator)]
    tp = sizes.get("tp_size", 1)
    torch.manual_seed(dist.get_rank() // tp * 100 + dist.get_rank() % tp)
    model, _ = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.1))
    loss = model.train()(**batch, use_cache=False).loss
    accelerator.backward(loss)
    return mean_over_ranks(loss), full_grads(model)


CELLS = [
    ("llama", None, "tp2_fsdp2"),  # sharded over the vocabulary
    ("llama_odd_vocab", None, "tp2_fsdp2"),  # over the hidden size
    ("llama_odd_vocab", None, "tp2"),
    ("llama", {"target_modules": ["q_proj", "embed_tokens"]}, "tp2"),
]


@pytest.mark.core_cases("llama-tp2_fsdp2")
@pytest.mark.parametrize("cell", CELLS, ids=lambda c: f"{c[0]}-{c[2]}{'' if c[1] is None else '-lora'}")
def test_noise_is_that_of_one_process(cell):
    name, adapter, mesh = cell
    world, _, dp_size = MESHES[mesh]
    loss, gradients = run_distributed(world, noisy_step, name, adapter, mesh)[0]
    reference = build(name, adapter)
    activate_neftune(reference, ALPHA)
    total = 0.0
    for rank, batch in enumerate(batches_for(reference, dp_size)):
        torch.manual_seed(rank * 100)  # the first rank of each tp group
        part = reference.train()(**batch).loss / dp_size
        part.backward()
        total += part.item()
    assert_losses_equal(loss, total)
    assert_gradients_equal(gradients, {n: p.grad for n, p in reference.named_parameters()})


def trainer_losses(output_dir: str, sizes: dict[str, int] | None) -> list[float]:
    from transformers import Trainer, TrainingArguments

    model = build("llama_odd_vocab", num_hidden_layers=1)
    args = TrainingArguments(
        output_dir,
        use_cpu=True,
        neftune_noise_alpha=ALPHA,
        optim="sgd",
        learning_rate=0.1,
        per_device_train_batch_size=4,
        max_steps=3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        parallelism_config=AutoParallelismConfig(**sizes) if sizes is not None else None,
    )
    trainer = Trainer(model, args, train_dataset=_Rows([batches_for(model, 1, rows=4)[0]]))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_neftune_in_the_trainer(tmp_path):
    got = run_distributed(2, trainer_losses, str(tmp_path), {"tp_size": 2})
    want = trainer_losses(str(tmp_path), None)
    assert len(want) == 3 and got[0] == pytest.approx(want, rel=1e-6)
