"""Streaming load: equal to transformers' loading in every bit, at parity, and clear about damaged files."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness.compare import assert_gradients_equal, assert_losses_equal
from harness.models import build_model, lora, make_batches
from harness.oracle import loss_and_grads
from harness.pool import run_distributed

from ranks.loading.jobs import (
    CELLS,
    differences,
    efficient_loading,
    missing_shard,
    refused,
    rewrite,
    save_checkpoints,
    shard_with,
    streamed_gradients,
    trainer_losses,
    truncated,
    values_sent_by_prepare,
    without_accelerator,
)

ROOT = Path(__file__).parents[3]

SIZES = {"tp_size": 2, "dp_shard_size": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return save_checkpoints(tmp_path_factory.mktemp("checkpoints"))


# ---- the result ---------------------------------------------------------------------------------------------------


IN_CORE = ["tied", "packed projections", "LoRA on fused experts"]


@pytest.mark.core_cases("core")
@pytest.mark.parametrize("cells", [IN_CORE, [cell for cell in CELLS if cell not in IN_CORE]], ids=["core", "more"])
def test_every_bit_is_that_of_loading_in_memory(root, cells):
    """On tp2 x fsdp2: plain, tied, cast, converted and missing weights, with all kinds of adapters."""
    for found in run_distributed(4, differences, str(root), cells, SIZES, timeout=200):
        assert {cell: wrong for cell, wrong in found.items() if wrong} == {}


@pytest.mark.core
def test_every_bit_with_fsdp2_alone(root):
    cells = ["tied", "fused experts from a file for each", "fresh LoRA, cast, a head trained whole"]
    for found in run_distributed(2, differences, str(root), cells, {"dp_shard_size": 2}):
        assert {cell: wrong for cell, wrong in found.items() if wrong} == {}


def test_without_an_accelerator(root):
    """The reference API fills such a model, too; after a refusal it is as it was."""
    for wrong, error in run_distributed(2, without_accelerator, str(root / "llama")):
        assert not wrong and "no_such_module" in error


@pytest.mark.core_cases("llama-True")
@pytest.mark.parametrize("name, adapter", [("llama", True), ("llama_tied", False), ("mixtral", False)])
def test_parity(root, name, adapter):
    model = build_model(name)
    batches = make_batches(2, 2, 16, model.config.vocab_size, 3)
    loss, gradients = loss_and_grads(lora(model) if adapter else model, batches)
    for got_loss, got in run_distributed(4, streamed_gradients, str(root / name), SIZES, 2, adapter):
        assert_losses_equal([got_loss], [loss])
        assert_gradients_equal(got, gradients)


def test_trainer(root, tmp_path):
    """The stock Trainer looks at parameters, moves the model and creates the optimizer before it prepares."""
    for memory, streamed in run_distributed(2, trainer_losses, str(root), str(tmp_path), "fresh LoRA", {"tp_size": 2}):
        assert len(memory) == 3 and memory == streamed


def test_cpu_ram_efficient_loading(root):
    for wrong, compared in run_distributed(2, efficient_loading, str(root / "llama")):
        assert not wrong and compared == 2 * 21


def test_equal_values_are_not_sent(root):
    """A model in memory on all ranks costs fingerprints; one in files not even those. What differs is sent alone."""
    path = str(root / "llama")
    assert run_distributed(2, values_sent_by_prepare, path, "in memory") == [0, 0]
    assert run_distributed(2, values_sent_by_prepare, path, "streamed") == [0, 0]
    assert run_distributed(2, values_sent_by_prepare, path, "one differs") == [128 * 64, 128 * 64]


def test_memory(tmp_path):
    """Anonymous memory stays below the shard, the largest tensor and 100 MB; a rank that reads everything is far
    above.
    """
    command = [sys.executable, "-m", "benchmarks.run", "--suite", "cpu", "--only", "load", "--smoke"]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "cpu-load.json").read_text())
    ranks = result["rows"]
    assert [rank["way"] for rank in ranks] == ["streamed"] * 4
    for rank in ranks:
        whole = 4 * rank["shard"]
        assert rank["shard"] < rank["peak"] <= rank["shard"] + rank["largest"] + 100e6 < 0.6 * whole


# ---- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.core
def test_errors_on_all_ranks(root, tmp_path):
    """A damage on one rank, other files there, files that change later, values that never were: one error
    everywhere.
    """
    for name in ("llama", "truncated", "missing_shard", "other", "later"):
        shutil.copytree(root / "llama", tmp_path / name)
    names = {"truncated": truncated(tmp_path / "truncated").name}
    names["missing_shard"] = missing_shard(tmp_path / "missing_shard").name
    rewrite(shard_with(tmp_path / "other", "lm_head.weight"), lambda tensors: tensors.update(odd=torch.zeros(2)))
    expected = {
        "truncated": rf"truncated/{names['truncated']}.*truncated, or no safetensors",
        "missing_shard": rf"missing_shard/{names['missing_shard']}: missing",
        "other": r"^PrepareError: ranks 0 and 1 were loaded from different files \(.*llama/model.*other/model",
        "meta": r"^UnsupportedError: device='meta': 21 parameters have no values"
        r".*hf_automodel_parallel.from_pretrained",
        "later": r"llama/model-00002-of-\d+.safetensors: has changed since the model was loaded",
    }
    for damage, pattern in expected.items():
        for seconds, message in run_distributed(2, refused, str(tmp_path), damage):
            assert seconds < 20
            assert re.search(pattern, message), message
