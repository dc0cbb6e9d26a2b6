"""What the processes of ``hf-automodel-parallel selftest`` compute, and the comparison with one process."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..config import AutoParallelismConfig
from ..core.mesh import AXES
from .comparison import LOSS, compare, mean_over_ranks, one_process

#: Steps that the case "resume" trains, and the step after which its first run saves and is killed.
STEPS, SAVED_AFTER = 4, 2

#: Bytes of the tensors whose all-reduce the case "bandwidth" times.
REDUCED_BYTES = (1 << 16, 1 << 20, 1 << 24)

_ROWS, _LENGTH, _VOCABULARY = 2, 32, 256


def build(adapter: bool) -> nn.Module:
    """A small Llama with the same values in every process, with LoRA on its linear layers if ``adapter``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=_VOCABULARY,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=4,
            use_cache=False,
        )
    )
    if not adapter:
        return model
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # not at zero, where the gradients of lora_A are zero
            nn.init.normal_(parameter, std=0.02)
    return model


def batch(step: int, rows: int) -> torch.Tensor:
    """Token ids of the global batch of ``step``: (rows, length)."""
    return torch.randint(_VOCABULARY, (rows, _LENGTH), generator=torch.Generator().manual_seed(100 + step))


def write_reference(case: dict[str, Any], device: str, folder: Path, rank: int) -> None:
    """Write what :func:`reference` returns to ``folder``."""
    torch.save(reference(case, torch.device(device)), folder / "reference.pt")


def write_result(case: dict[str, Any], device: str, folder: Path, rank: int) -> None:
    """Rank 0 writes what :func:`parallel` returns to ``folder``."""
    expected = torch.load(folder / "reference.pt", weights_only=True)
    result = parallel(case, device == "cpu", expected, folder)
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def write_bandwidth(case: dict[str, Any], device: str, folder: Path, rank: int) -> None:
    """Rank 0 writes what :func:`bandwidth` returns to ``folder``."""
    result = {"ok": True, "axes": bandwidth(case["sizes"], device == "cpu")}
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def bandwidth(sizes: dict[str, Any], cpu: bool) -> list[dict[str, Any]]:
    """Time all-reduces on each axis of a mesh, in all groups of the axis at once, as in training. Collective.

    Args:
        sizes: the number of ranks on each axis, by the names of the fields.
        cpu: over gloo, else on the GPUs.

    Returns:
        For each axis and size of a tensor: ``axis``, ``ranks``, ``bytes``, ``seconds`` of an all-reduce on the slowest
        rank, and ``gb_per_second``, 10^9 bytes that a link of a ring carries: ``bytes * 2 (n - 1) / n / seconds``.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=cpu, parallelism_config=AutoParallelismConfig(**sizes))
    found = []
    for axis in [name for name in AXES if sizes.get(f"{name}_size", 1) > 1]:
        ranks = sizes[f"{axis}_size"]
        group = accelerator.torch_device_mesh.get_group(axis)
        for size in REDUCED_BYTES:
            tensor = torch.zeros(size // 4, device=accelerator.device)
            _seconds(tensor, group, 1)  # buffers and connections are made by the first one
            slowest = torch.tensor(_seconds(tensor, group, 5), device=accelerator.device)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            row = {"axis": axis, "ranks": ranks, "bytes": size, "seconds": slowest.item()}
            found.append(row | {"gb_per_second": size * 2 * (ranks - 1) / ranks / slowest.item() / 1e9})
    return found


def _seconds(tensor: torch.Tensor, group: dist.ProcessGroup, times: int) -> float:
    """Seconds of an all-reduce of ``tensor``, of ``times`` the mean."""
    dist.barrier()
    began = time.perf_counter()
    for _ in range(times):
        dist.all_reduce(tensor, group=group)
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


def reference(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Loss and gradients of one process with the global batch; for "resume" the losses of all steps."""
    rows = _ROWS * case["batches"]
    if case["name"] == "resume":
        model = build(False).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return {"losses": [_step(model, optimizer, batch(step, rows).to(device)) for step in range(STEPS)]}
    ids = batch(0, rows).to(device)
    return one_process(lambda: build(case["lora"]).to(device), {"input_ids": ids, "labels": ids}, case["bf16"])


def _step(
    model: nn.Module, optimizer: Any, ids: torch.Tensor, backward: Callable[[torch.Tensor], Any] = torch.Tensor.backward
) -> float:
    loss = model(input_ids=ids, labels=ids).loss
    backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return mean_over_ranks(loss)


def parallel(case: dict[str, Any], cpu: bool, expected: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run ``case`` on this rank through Accelerate and compare with ``expected``, what :func:`reference` returned.

    Returns:
        ``ok``, ``loss``, ``reference_loss``, ``worst`` (relative error of the worst gradient or loss) and ``where``.
    """
    from accelerate import Accelerator

    config = AutoParallelismConfig(**case["sizes"], **case["options"])
    accelerator = Accelerator(cpu=cpu, mixed_precision="bf16" if case["bf16"] else "no", parallelism_config=config)
    model = build(case["lora"])
    trained = [p for p in model.parameters() if p.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, lr=1e-2))
    rank = accelerator.process_index // config.non_data_parallel_size

    def ids(step: int) -> torch.Tensor:
        rows = batch(step, _ROWS * case["batches"])
        return rows.chunk(config.data_parallel_size)[rank].to(accelerator.device)

    if case["name"] == "resume":
        return _train(accelerator, model, optimizer, ids, case["first"], expected["losses"], folder)
    loss = model(input_ids=ids(0), labels=ids(0)).loss
    accelerator.backward(loss)
    found = compare(mean_over_ranks(loss), model, expected)
    result = {"ok": found.ok, "loss": found.loss, "reference_loss": found.reference_loss}
    return result | {"worst": found.worst, "where": found.where}


def _train(
    accelerator: Any,
    model: nn.Module,
    optimizer: Any,
    ids: Callable[[int], torch.Tensor],
    first: bool,
    losses: list[float],
    folder: Path,
) -> dict[str, Any]:
    """The first run saves in the middle and is killed; the second one goes on from there, on another mesh."""
    done = 0 if first else SAVED_AFTER
    if not first:
        accelerator.load_state(str(folder / "checkpoint"))
    result: dict[str, Any] = {"ok": True, "worst": 0.0, "where": ""}
    for step in range(done, STEPS):
        if first and step == SAVED_AFTER:
            accelerator.save_state(str(folder / "checkpoint"))
            accelerator.wait_for_everyone()
            os.kill(os.getpid(), signal.SIGKILL)
        loss = _step(model, optimizer, ids(step), accelerator.backward)
        error = abs(loss - losses[step]) / losses[step]
        result |= {"loss": loss, "reference_loss": losses[step]}
        if error >= result["worst"]:
            result |= {"worst": error, "where": f"loss of step {step + 1}"}
    # Adam's division makes more of the last bits of a gradient than one step does.
    return result | {"ok": result["worst"] < 10 * LOSS}
