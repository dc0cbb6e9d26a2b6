"""``hf-automodel-parallel export`` and ``save_merged``: from shards and from training checkpoints, in files of one
process.
"""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from harness.pool import run_distributed
from harness.training import build, trainable
from typer.testing import CliRunner

from hf_automodel_parallel import AutoParallelismConfig
from hf_automodel_parallel.cli import app
from hf_automodel_parallel.export.merged import save_merged
from ranks.export.test_files import HEAD, SMALL, assert_same_files


def run(*arguments: Any, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


# ---- merged --------------------------------------------------------------------------------------------------------

MERGED = [
    ("llama", HEAD),
    ("llama", {"use_dora": True}),
    ("mixtral", {}),
    ("llama_tied", {"target_modules": ["embed_tokens"]}),
]


def merge(cells: list[tuple[str, Any]], sizes: dict[str, int], directory: str) -> list[bool]:
    unchanged = []
    for number, (name, adapter) in enumerate(cells):
        accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
        model = accelerator.prepare(build(name, adapter))
        before = {n: p.to_local().clone() for n, p in model.named_parameters()}
        save_merged(model, f"{directory}/{number}", max_shard_size=SMALL)
        unchanged += [torch.equal(p.to_local(), before[n]) for n, p in model.named_parameters()]
        unchanged.append(not any(getattr(m, "merged_adapters", None) for m in model.modules()))
    return unchanged


@pytest.mark.core_cases("tp2")
@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"tp_size": 2, "dp_shard_size": 2}], ids=["tp2", "tp2_fsdp2"])
def test_merged_files_equal_those_of_one_process_and_the_model_stays_unmerged(tmp_path, sizes):
    cells = MERGED if len(sizes) == 1 else MERGED[:1]
    assert all(run_distributed(2 * len(sizes), merge, cells, sizes, str(tmp_path / "found"))[0])
    for number, (name, adapter) in enumerate(cells):
        build(name, adapter).merge_and_unload().save_pretrained(tmp_path / f"expected/{number}", max_shard_size=SMALL)
    assert_same_files(tmp_path / "expected", tmp_path / "found")


# ---- from a training checkpoint --------------------------------------------------------------------------------------


def save_states(cells: list[tuple[str, Any, str]], directory: str) -> None:
    from accelerate.state import AcceleratorState

    for number, (name, adapter, kind) in enumerate(cells):
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind, cpu_ram_efficient_loading=False)
        sizes = {"tp_size": 2} if name == "llama" else {"dp_shard_size": 2}
        accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes), fsdp_plugin=plugin)
        model = build(name, adapter)
        model, _ = accelerator.prepare(model, torch.optim.AdamW(trainable(model)))
        accelerator.save_state(f"{directory}/{number}")
        AcceleratorState._reset_state()


STATES = [
    ("llama_tied", None, "SHARDED_STATE_DICT"),
    ("mixtral", None, "SHARDED_STATE_DICT"),
    ("llama", None, "FULL_STATE_DICT"),
    ("llama", HEAD, "SHARDED_STATE_DICT"),
    ("llama", HEAD, "FULL_STATE_DICT"),
]


def test_saved_states_of_two_ranks_become_models_and_adapters_in_one_process(tmp_path):
    """Equal in each byte to what one process saves: plain, tied, fused experts, adapters, and merged."""
    run_distributed(2, save_states, STATES, str(tmp_path))
    for number, (name, adapter, _) in enumerate(STATES):
        expected, found = tmp_path / f"expected{number}", tmp_path / f"found{number}"
        model = build(name, adapter)
        model.save_pretrained(expected, **({"max_shard_size": SMALL} if adapter is None else {}))
        if adapter is None:
            output = run(tmp_path / str(number), found, "--config", expected, "--max-shard-size", SMALL)
            assert ": model, " in output
            assert_same_files(expected, found)
            continue
        base = tmp_path / f"base{number}"
        build(name).save_pretrained(base)
        shutil.copy(expected / "adapter_config.json", base)
        run(tmp_path / str(number), found, "--config", base)
        assert_same_files(expected, found, but=("README.md",))
        model.merge_and_unload().save_pretrained(tmp_path / f"merged{number}")
        run(tmp_path / str(number), tmp_path / f"out{number}", "--merge", "--config", base)
        assert_same_files(tmp_path / f"merged{number}", tmp_path / f"out{number}")
