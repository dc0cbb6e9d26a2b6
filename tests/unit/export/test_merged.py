"""``hf-automodel-parallel export`` in one process: merged adapters, dtypes, tokenizers, mistakes."""

from __future__ import annotations

import filecmp
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from harness.training import build
from ranks.export.test_files import SMALL, assert_same_files, parsed
from ranks.export.test_merged import run
from typer.testing import CliRunner

from hf_automodel_parallel.cli import app


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
        ((where, tmp_path / "out", "--merge"), "holds an entire model and no adapter"),
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
