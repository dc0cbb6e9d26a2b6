"""What the processes of ``hf-automodel-parallel verify`` compute."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..accelerate_plugin.prepared import prepared
from ..config import AutoParallelismConfig
from ..core.importing import import_modules
from ..core.model_view import ModelView
from ..plan_search.proxy_model import VOCABULARY, build_proxy_model
from .comparison import Compared, compare, mean_over_ranks, one_process


@dataclass(frozen=True)
class Job:
    """What is verified.

    Attributes:
        network: the model on the meta device, in its real sizes.
        lora: arguments of ``peft.LoraConfig``, or None.
        fields: fields of ``AutoParallelismConfig``, all sizes of axes given.
        sizes: these sizes.
        rows: of each data-parallel rank.
        length: tokens of a row.
        environment: variables that ``accelerate launch`` would set (``FSDP_*``).
        imports: modules to import first, in each process.
    """

    network: nn.Module
    lora: dict[str, Any] | None
    fields: dict[str, Any]
    sizes: dict[str, int]
    rows: int
    length: int
    environment: dict[str, str]
    imports: tuple[str, ...] = ()


def build(job: Job) -> nn.Module:
    """The small model in training mode without dropout, with the same values in every process."""
    model = build_proxy_model(job.network)
    inner: Any = ModelView.of(model).inner
    inner.config.update({"use_cache": False})
    if job.lora is not None:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **job.lora))  # type: ignore[arg-type]
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                nn.init.normal_(parameter, std=0.02)  # lora_B: at zero, the gradients of lora_A are zero
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def batch(job: Job) -> dict[str, torch.Tensor]:
    """The global batch: ids and labels, int64 of shape (rows of all data-parallel ranks, length)."""
    rows = job.rows * job.sizes["dp_replicate_size"] * job.sizes["dp_shard_size"]
    ids = torch.randint(4, VOCABULARY, (rows, job.length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone()}


def write_reference(job: Job, folder: Path, rank: int) -> None:
    """Write what :func:`reference` returns to ``folder``."""
    import_modules(job.imports)  # a fork has them, a fresh interpreter has not
    torch.save(reference(job), folder / "reference.pt")


def write_result(job: Job, folder: Path, rank: int) -> None:
    """Rank 0 writes what :func:`parallel` returns to ``folder``."""
    import_modules(job.imports)  # a fork has them, a fresh interpreter has not
    found = parallel(job, torch.load(folder / "reference.pt", weights_only=True))
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def reference(job: Job) -> dict[str, Any]:
    """Loss and gradients of one process with the global batch."""
    return one_process(lambda: build(job), batch(job), bf16=False)


def parallel(job: Job, expected: dict[str, Any]) -> dict[str, Any]:
    """Run ``job`` on this rank through Accelerate, and compare it with ``expected``, what :func:`reference` returned.

    Returns:
        The fields of :class:`.comparison.Compared`, ``ok``, ``where``, ``loss_error``, and the plan's ``origin``.
    """
    from accelerate import Accelerator

    os.environ.update(job.environment)
    config = AutoParallelismConfig(**job.fields)
    accelerator = Accelerator(cpu=True, mixed_precision="no", parallelism_config=config)
    model = build(job)
    trained = [p for p in model.parameters() if p.requires_grad]
    model, _ = accelerator.prepare(model, torch.optim.AdamW(trained, lr=1e-3))
    rank = accelerator.process_index // config.non_data_parallel_size
    own = {name: x.chunk(config.data_parallel_size)[rank].clone() for name, x in batch(job).items()}
    if config.cp_size == 1:
        loss = model(**own).loss
        accelerator.backward(loss)
    else:
        own["shift_labels"] = nn.functional.pad(own["labels"], (0, 1), value=-100)[:, 1:].contiguous()
        own["position_ids"] = torch.arange(job.length).repeat(job.rows, 1)
        buffers = list(own.values())
        with accelerator.maybe_context_parallel(buffers=buffers, buffer_seq_dims=[1] * len(buffers)):
            loss = model(**own).loss
            accelerator.backward(loss)
    found = compare(mean_over_ranks(loss), model, expected)
    state = prepared(model)
    plan = None if state is None else state.context.plan
    origin = None if plan is None else plan.origin
    return judged(found) | {"origin": origin}


def judged(found: Compared) -> dict[str, Any]:
    """The fields of ``found`` and what follows from them, for JSON."""
    return asdict(found) | {"ok": found.ok, "where": found.where, "loss_error": found.loss_error}
