"""Gaps of the stock stack around checkpointing, compilation and adapter files: 3, 8, 11, 15 (the others:
test_gaps.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from harness.pool import run_distributed
from harness.training import batches_for, build, data_rank, trainable
from parity.cells import Cell, run_cell
from safetensors.torch import load_file

from hf_automodel_parallel import AutoParallelismConfig


def assert_holds(cell: Cell) -> None:
    verdict = run_cell(cell, "aot_eager")
    assert not verdict.problems, verdict


@pytest.mark.parametrize("mode", ["full", "submodule", "selective"])
def test_gap_03_tensor_parallel_with_checkpointing_and_compile(mode):
    """Stock: AOTAutograd finds a DeviceMesh among the saved tensors."""
    assert_holds(Cell("llama", "full", 0.0, "tp2", mode, True))


def test_gap_08_two_dimensional_mesh_with_compiled_layers():
    """Stock: TypeError."""
    assert_holds(Cell("llama", "full", 0.0, "tp2_fsdp2", "none", True))


@pytest.mark.parametrize("mesh", ["fsdp2", "tp2_fsdp2"])
def test_gap_15_checkpointing_repeats_the_dropout(mesh):
    """Stock: Accelerate's checkpoint wrapper drops the random state; gradients are off by 0.45."""
    assert_holds(Cell("llama", "lora", 0.1, mesh, "full", False))


def save_by_the_documented_recipe(sizes: dict[str, int], directory: str) -> dict[str, torch.Tensor]:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = build("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]})
    dp_size = accelerator.num_processes // sizes.get("tp_size", 1)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
    accelerator.backward(model(**batches_for(model, dp_size)[data_rank(accelerator)], use_cache=False).loss)
    optimizer.step()
    state = accelerator.get_state_dict(model)
    accelerator.unwrap_model(model).save_pretrained(
        directory, is_main_process=accelerator.is_main_process, save_function=accelerator.save, state_dict=state
    )
    accelerator.wait_for_everyone()
    return {name: p.full_tensor() for name, p in model.named_parameters() if p.requires_grad}


def test_gap_11_modules_to_save_with_the_documented_save_recipe(tmp_path: Path):
    """Stock: every rank but the first dies with a KeyError."""
    trained = run_distributed(2, save_by_the_documented_recipe, {"dp_shard_size": 2}, str(tmp_path))[0]
    saved = load_file(tmp_path / "adapter_model.safetensors")
    expected = {
        name.replace(".modules_to_save.default", "").replace(".default", ""): value for name, value in trained.items()
    }
    assert saved.keys() == expected.keys()
    for name, value in saved.items():
        assert torch.equal(value, expected[name]), name
