"""Loading in one process: what stands before ``prepare``, where files are found, damaged files, what is refused."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from harness.models import build_model, make_batches
from ranks.loading.jobs import (
    missing_shard,
    rewrite,
    save_checkpoints,
    shard_with,
    truncated,
)
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from hf_automodel_parallel import CheckpointError, ConfigError, UnsupportedError, from_pretrained
from hf_automodel_parallel.loading import DeferredTensor


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return save_checkpoints(tmp_path_factory.mktemp("checkpoints"))


def copy_of(root: Path, tmp_path: Path, name: str = "llama") -> Path:
    return Path(shutil.copytree(root / name, tmp_path / "copy"))


@pytest.mark.both_ends
def test_before_prepare(root):
    """Nothing is read for shapes, casts and copies; what needs values has them; the rest is as transformers leaves
    it.
    """
    path = str(root / "llama")
    torch.manual_seed(1)
    expected = AutoModelForCausalLM.from_pretrained(path)
    torch.manual_seed(1)
    model, info = from_pretrained(AutoModelForCausalLM, path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(isinstance(p, DeferredTensor) for p in model.parameters())
    assert not any(isinstance(b, DeferredTensor) for b in model.buffers())
    assert model.config.to_dict() == expected.config.to_dict()
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    assert (model.name_or_path, model.config.name_or_path, model.training) == (path, path, False)
    batch = make_batches(1, 2, 8, 128, 0)[0]
    assert torch.allclose(model(**batch).loss, expected(**batch).loss, atol=1e-6)
    for one in (model, expected):
        one.to(torch.bfloat16).to("cpu")
        torch.manual_seed(2)
        one.resize_token_embeddings(136)
        torch.nn.init.constant_(one.model.norm.weight, 2.0)
    for (name, p), (_, want) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(p.detach().float() + 0, want.detach().float()), name
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, DeferredTensor)
    with pytest.raises(UnsupportedError, match="writing into a part"), torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0] = 0


@pytest.mark.both_ends
def test_missing_unexpected_and_renamed(root, tmp_path):
    directory = copy_of(root, tmp_path)
    rewrite(shard_with(directory, "lm_head.weight"), lambda tensors: tensors.update(odd=torch.zeros(2)))
    torch.manual_seed(3)
    expected, want = AutoModelForSequenceClassification.from_pretrained(
        directory, num_labels=3, output_loading_info=True
    )
    torch.manual_seed(3)
    model, info = from_pretrained(AutoModelForSequenceClassification, directory, num_labels=3, output_loading_info=True)
    assert info["missing_keys"] == want["missing_keys"] == {"score.weight"}
    assert info["unexpected_keys"] == want["unexpected_keys"] == {"lm_head.weight", "odd"}
    assert torch.equal(model.score.weight, expected.score.weight) and not isinstance(model.score.weight, DeferredTensor)
    model = build_model("llama")
    state = {key.replace("lm_head", "top"): value for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "renamed")
    save_file(state, tmp_path / "renamed" / "model.safetensors", metadata={"format": "pt"})
    renamed = from_pretrained(AutoModelForCausalLM, tmp_path / "renamed", key_mapping={"^top": "lm_head"})
    assert torch.equal(renamed.lm_head.weight + 0, model.lm_head.weight)


@pytest.mark.both_ends
def test_where_files_are(root, tmp_path):
    """A config of one's own, a subfolder, a variant, a single file."""
    model = build_model("llama")
    model.save_pretrained(tmp_path / "sub")
    model.save_pretrained(tmp_path / "sub", variant="fp16", max_shard_size="100KB")
    for options in ({"subfolder": "sub"}, {"subfolder": "sub", "variant": "fp16", "revision": "main"}):
        loaded = from_pretrained(AutoModelForCausalLM, tmp_path, attn_implementation="eager", **options)
        assert torch.equal(loaded.lm_head.weight + 0, model.lm_head.weight)
        assert loaded.config._attn_implementation == "eager"
    config = AutoConfig.from_pretrained(root / "llama", num_hidden_layers=1)
    model, info = from_pretrained(type(model), root / "llama", config=config, output_loading_info=True)
    assert len(model.model.layers) == 1 and len(info["unexpected_keys"]) == 9


def bad_header(directory: Path) -> Path:
    shard = shard_with(directory, "lm_head.weight")
    shard.write_bytes(b"\xff" * 64 + shard.read_bytes()[64:])
    return shard


def empty(directory: Path) -> Path:
    shard = shard_with(directory, "lm_head.weight")
    shard.write_bytes(b"")
    return shard


def missing_key(directory: Path) -> Path:
    shard = shard_with(directory, "lm_head.weight")
    rewrite(
        shard,
        lambda tensors: (
            tensors.pop("lm_head.weight") if len(tensors) > 1 else tensors.update(x=tensors.pop("lm_head.weight"))
        ),
    )
    return shard


def wrong_shape(directory: Path) -> Path:
    shard = shard_with(directory, "model.norm.weight")
    rewrite(shard, lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)}))
    return shard


def wrong_kind(directory: Path) -> Path:
    shard = shard_with(directory, "model.norm.weight")
    rewrite(shard, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    return shard


def unknown_dtype(directory: Path) -> Path:
    shard = shard_with(directory, "model.norm.weight")
    shard.write_bytes(shard.read_bytes().replace(b'"F32"', b'"Q32"', 1))
    return shard


def bad_index(directory: Path) -> Path:
    index = directory / "model.safetensors.index.json"
    index.write_text(index.read_text()[:200])
    return index


def outside(directory: Path) -> Path:
    index = directory / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    return index


DAMAGES = {
    truncated: "truncated, or no safetensors file",
    bad_header: "truncated, or no safetensors file",
    empty: r"\(0 bytes\): truncated",
    missing_shard: "missing; model.safetensors.index.json says that it holds",
    missing_key: "tensor lm_head.weight is missing",
    wrong_shape: r"tensor model.norm.weight has shape \(63,\), the model expects \(64,\)",
    wrong_kind: "tensor model.norm.weight holds torch.int8, the model expects torch.float32",
    unknown_dtype: "truncated, or no safetensors file",
    bad_index: "no index of a sharded checkpoint",
    outside: "not a safetensors file beside it",
}


@pytest.mark.both_ends
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_files(root, tmp_path, damage):
    directory = copy_of(root, tmp_path)
    path = damage(directory)
    with pytest.raises(CheckpointError, match=DAMAGES[damage]) as caught:
        from_pretrained(AutoModelForCausalLM, directory)
    assert str(path) in str(caught.value)


def test_mismatched_sizes_on_request(root, tmp_path):
    directory = copy_of(root, tmp_path)
    wrong_shape(directory)
    torch.manual_seed(0)
    model = from_pretrained(AutoModelForCausalLM, directory, ignore_mismatched_sizes=True)
    assert torch.equal(model.model.norm.weight, torch.ones(64))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_no_pickle_is_opened(root, tmp_path, name):
    """Neither where it is the only file, nor beside safetensors."""
    bomb, mark = pickle.dumps(Bomb(tmp_path / "exploded")), tmp_path / "exploded"
    pickle.loads(bomb)
    assert mark.exists()  # it works
    mark.unlink()
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(root / "llama" / "config.json", alone)
    (alone / name).write_bytes(bomb)
    with pytest.raises(CheckpointError, match=rf"{name}: only safetensors .* model.save_pretrained"):
        from_pretrained(AutoModelForCausalLM, alone)
    beside = copy_of(root, tmp_path)
    for file in (name, "training_args.bin", "model.safetensors.index.bin"):
        (beside / file).write_bytes(bomb)
    from_pretrained(AutoModelForCausalLM, beside)
    assert not mark.exists()


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "auto"},
        {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)},
        {"use_safetensors": False},
        {"trust_remote_code": True},
        {"tp_plan": "auto"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_refused_arguments(root, options):
    with pytest.raises(UnsupportedError, match=rf"{next(iter(options))}=.* cannot be honoured"):
        from_pretrained(AutoModelForCausalLM, root / "llama", **options)


def test_refused_directories(root, tmp_path):
    with pytest.raises(ConfigError, match="holds an adapter"):
        from_pretrained(AutoModelForCausalLM, root / "adapter")
    directory = copy_of(root, tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(ConfigError, match=r"quantised \(gptq\)"):
        from_pretrained(AutoModelForCausalLM, directory)
    for file in directory.glob("model*"):
        file.unlink()
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="has neither model.safetensors nor model.safetensors.index.json"):
        from_pretrained(AutoModelForCausalLM, directory)
