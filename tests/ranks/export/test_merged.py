"""``hf-automodel-parallel export`` and ``save_merged``: from shards and from training checkpoints, in files of one
process.
"""

from __future__ import annotations

import filecmp
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from harness.pool import run_distributed
from harness.training import build, trainable
from typer.testing import CliRunner

from hf_automodel_parallel import AutoParallelismConfig
from hf_automodel_parallel.cli import app
from hf_automodel_parallel.export.merged import save_merged
from ranks.export.test_files import HEAD, SMALL, assert_same_files, parsed


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


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("named_by", ["model", "file"])
def test_an_adapter_alone_is_merged_into_the_files_of_its_base(tmp_path, name, named_by):
    """The experts of Mixtral are one tensor in the adapted model and one for each expert in the base model's files."""
    model = build(name, {})
    state = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    if named_by == "file":  # as stock Accelerate does
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(model)
    dcp.save({"model": state}, checkpoint_id=tmp_path / "checkpoint-1/pytorch_model_fsdp_0", no_dist=True)
    build(name).save_pretrained(tmp_path / "base", max_shard_size=SMALL)
    model.save_pretrained(tmp_path / "adapter")
    shutil.copy(tmp_path / "adapter/adapter_config.json", tmp_path / "checkpoint-1")
    run(tmp_path / "checkpoint-1", tmp_path / "exported", "--config", tmp_path / "base")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        ours, theirs = tmp_path / "exported" / file, tmp_path / "adapter" / file
        same = parsed(ours) == parsed(theirs) if file.endswith("json") else filecmp.cmp(ours, theirs, shallow=False)
        assert same, file
    run(tmp_path / "checkpoint-1", tmp_path / "merged", "--merge", "--base", tmp_path / "base")
    model.merge_and_unload().save_pretrained(tmp_path / "expected")
    assert_same_files(tmp_path / "expected", tmp_path / "merged")


def checkpoint(directory: Path, model: torch.nn.Module) -> Path:
    dcp.save({"model": model.state_dict()}, checkpoint_id=directory / "pytorch_model_fsdp_0", no_dist=True)
    return directory


def test_a_dtype_and_the_tokenizer(tmp_path):
    model = build("llama")
    where = checkpoint(tmp_path / "state", model)
    model.save_pretrained(where)
    (where / "model.safetensors").unlink()
    (where / "tokenizer.json").write_text("{}")
    run(where, tmp_path / "out", "--dtype", "bf16")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "expected")
    (tmp_path / "expected/tokenizer.json").write_text("{}")
    assert_same_files(tmp_path / "expected", tmp_path / "out")


class _Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_mistakes_and_malice_are_friendly_errors_that_leave_everything_as_it_was(tmp_path):
    model = build("llama")
    where = checkpoint(tmp_path / "state", model)
    model.config.save_pretrained(where)
    full = tmp_path / "full"
    full.mkdir()
    (full / "something").write_text("kept")
    other = build("llama", None, num_hidden_layers=3).config
    other.save_pretrained(tmp_path / "other")
    cases = [
        ((tmp_path / "nowhere", tmp_path / "out"), "does not exist"),
        ((full, tmp_path / "out"), "holds no weights"),
        ((where, full), "is not empty. Give another directory, or --force"),
        ((where, tmp_path / "out", "--config", tmp_path / "other"), r"it lacks model.layers.2"),
        ((where, tmp_path / "out", "--merge"), "holds a whole model and no adapter"),
        ((where, tmp_path / "out", "--dtype", "int4"), "--dtype int4"),
        ((where, tmp_path / "out", "--max-shard-size", "big"), "--max-shard-size big"),
        ((where / "pytorch_model_fsdp_0", tmp_path / "out", "--config", full), "no config.json in"),
    ]
    for arguments, message in cases:
        if arguments[0] == where / "pytorch_model_fsdp_0":
            (where / "config.json").rename(tmp_path / "moved.json")
        output = run(*arguments, code=1)
        assert message in output and "Traceback" not in output, (message, output)
    (tmp_path / "moved.json").rename(where / "config.json")
    evil = tmp_path / "ran"
    metadata = where / "pytorch_model_fsdp_0/.metadata"
    good = metadata.read_bytes()
    metadata.write_bytes(pickle.dumps(_Malicious(evil)))
    assert "Nothing of it was run" in run(where, tmp_path / "out", code=1)
    metadata.write_bytes(good)
    torch.save({"x": _Malicious(evil)}, full / "pytorch_model_fsdp.bin")
    assert "Nothing of it was run" in run(full, tmp_path / "out", code=1)
    assert not evil.exists() and not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if "incomplete" in path.name]
    assert "model" in run(where, full, "--force")
    assert not (full / "something").exists() and (full / "model.safetensors").exists()


@pytest.mark.both_ends
def test_a_loaded_model_keeps_its_conversions_in_the_attribute_that_is_copied():
    import inspect

    from transformers.core_model_loading import revert_weight_conversion

    assert 'getattr(model, "_weight_conversions", None)' in inspect.getsource(revert_weight_conversion)


def test_help_has_examples():
    result = CliRunner().invoke(app, ["export", "--help"])
    assert result.exit_code == 0 and "--merge --base path/to/base-model" in " ".join(result.output.split())
