"""Files of a sharded model equal those that one process writes, and are written tensor by tensor."""

from __future__ import annotations

import ctypes
import filecmp
import functools
import json
import os
import re
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from harness.compare import (
    assert_same_tensors,
    full_parameters,
)
from harness.meshes import run_on_mesh
from harness.models import build_model, lora
from harness.pool import run_distributed
from harness.training import LORA, batches_for, build, data_rank, trainable
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from hf_automodel_parallel import AutoParallelismConfig
from hf_automodel_parallel.accelerate_plugin import saving
from hf_automodel_parallel.errors import AutoParallelError, ConfigError, ExportError
from ranks.accelerate.jobs import prepared_llama
from ranks.trainer.jobs import InOrder, Rows, arguments

HEAD = {"target_modules": ["q_proj", "o_proj"], "modules_to_save": ["lm_head"]}
EMBEDDING = {"target_modules": ["embed_tokens", "down_proj"], "r": 4}
SMALL = "100KB"


def assert_same_files(expected: Path, found: Path, but: tuple[str, ...] = ()) -> None:
    """Every file is equal in each byte, adapter configs (which hold sets) as parsed JSON."""
    names = {str(p.relative_to(expected)) for p in expected.rglob("*") if p.is_file()}
    assert names == {str(p.relative_to(found)) for p in found.rglob("*") if p.is_file()}
    for name in names:
        if name.endswith("adapter_config.json"):
            assert parsed(expected / name) == parsed(found / name), name
        elif name not in but:
            assert filecmp.cmp(expected / name, found / name, shallow=False), name


def parsed(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text())
    return {key: sorted(value) if isinstance(value, list) else value for key, value in content.items()}


def prepared(
    name: str, adapter: dict[str, Any] | None, sizes: dict[str, int], dtype: torch.dtype | None = None, **kw: Any
):
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes), **kw)
    model = build(name, adapter)
    if dtype is not None:
        model = model.to(dtype)
    model, _ = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.1))
    return accelerator, model


# ---- equal to one process --------------------------------------------------------------------------------------------


def save_several(cells: list[tuple[str, Any]], sizes: dict[str, int], directory: str) -> None:
    for number, (name, adapter) in enumerate(cells):
        accelerator, model = prepared(name, adapter, sizes)
        model.save_pretrained(f"{directory}/{number}", **({"max_shard_size": SMALL} if adapter is None else {}))
        accelerator.save_model(model, f"{directory}/{number}-model", max_shard_size=SMALL)


CELLS = [("llama", None), ("llama_tied", None), ("mixtral", None), ("llama", {}), ("llama", HEAD), ("llama", EMBEDDING)]


@pytest.mark.core
@pytest.mark.both_ends
@pytest.mark.parametrize(
    "sizes",
    [{"tp_size": 2}, {"dp_shard_size": 2}, {"tp_size": 2, "dp_shard_size": 2}],
    ids=["tp2", "fsdp2", "tp2_fsdp2"],
)
def test_files_equal_those_of_one_process(tmp_path, sizes):
    """``save_pretrained`` and ``accelerator.save_model``: each file in each byte, and what plain libraries load from
    it.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    cells = CELLS if len(sizes) == 1 else [CELLS[1], CELLS[2], CELLS[4]]
    run_distributed(2 * len(sizes), save_several, cells, sizes, str(tmp_path / "found"))
    for number, (name, adapter) in enumerate(cells):
        model = build(name, adapter)
        model.save_pretrained(tmp_path / f"expected/{number}", **({"max_shard_size": SMALL} if adapter is None else {}))
        Accelerator().save_model(model, tmp_path / f"expected/{number}-model", max_shard_size=SMALL)
        assert_same_files(tmp_path / f"expected/{number}", tmp_path / f"found/{number}")
        assert_same_files(tmp_path / f"expected/{number}-model", tmp_path / f"found/{number}-model")
        found = tmp_path / f"found/{number}"
        if adapter is None:
            assert name == "llama_tied" or len(list(found.glob("model-*.safetensors"))) > 1
            loaded = AutoModelForCausalLM.from_pretrained(found)
        else:
            loaded = PeftModel.from_pretrained(build(name), found)
        state = loaded.state_dict()
        for key, value in model.state_dict().items():
            assert torch.equal(state[key], value), (name, key)


def save_with_options(directory: str) -> None:
    """bfloat16 weights that are trained in float32; CPU offload; two adapters, of which one is saved."""
    _, model = prepared("llama", None, {"dp_shard_size": 2}, torch.bfloat16, mixed_precision="bf16")
    model.save_pretrained(f"{directory}/bf16")
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_offload=True, cpu_ram_efficient_loading=False)
    accelerator, model = prepared("llama", HEAD, {"dp_shard_size": 2}, fsdp_plugin=plugin)
    model.save_pretrained(f"{directory}/offloaded", save_embedding_layers=True)
    model = accelerator.prepare(two_adapters())
    model.save_pretrained(f"{directory}/one", selected_adapters=["other"])
    model.save_pretrained(f"{directory}/both", safe_serialization=False)
    plain = accelerator.prepare(build_model("llama"))
    plain.save_pretrained(f"{directory}/variant", variant="fp8", max_shard_size=SMALL)
    plain.save_pretrained(f"{directory}/variant", variant="fp8")  # the shards of the first go
    mixtral = accelerator.prepare(build_model("mixtral"))
    mixtral.save_pretrained(f"{directory}/fused", save_original_format=False)
    accelerator.save_model(mixtral, f"{directory}/pickled", safe_serialization=False)


def adapter_config():
    from peft import LoraConfig

    torch.manual_seed(5)
    return LoraConfig(target_modules=["q_proj", "down_proj"], r=4)


def two_adapters() -> torch.nn.Module:
    model = lora(build_model("llama"))
    model.add_adapter("other", adapter_config())
    return model


def test_options_mean_what_they_mean_in_one_process(tmp_path):
    """dtypes under mixed precision, CPU offload, adapters chosen, formats, variants."""
    run_distributed(2, save_with_options, str(tmp_path / "found"))
    expected = tmp_path / "expected"
    build("llama").to(torch.bfloat16).save_pretrained(expected / "bf16")
    build("llama", HEAD).save_pretrained(expected / "offloaded", save_embedding_layers=True)
    two_adapters().save_pretrained(expected / "one", selected_adapters=["other"])
    two_adapters().save_pretrained(expected / "both", safe_serialization=False)
    build("llama").save_pretrained(expected / "variant", variant="fp8")
    build("mixtral").save_pretrained(expected / "fused", save_original_format=False)
    Accelerator().save_model(build("mixtral"), expected / "pickled", safe_serialization=False)
    pickles = ("both/adapter_model.bin", "both/other/adapter_model.bin", "pickled/pytorch_model.bin")
    assert_same_files(expected, tmp_path / "found", but=pickles)
    for name in pickles:
        ours, theirs = (torch.load(d / name, weights_only=True) for d in (tmp_path / "found", expected))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs), name


def own_adapters() -> torch.nn.Module:
    """By transformers' ``add_adapter``, without a PeftModel."""
    model = build_model("llama")
    for name, rank in (("default", 4), ("other", 2)):
        config = adapter_config()
        config.r = rank
        model.add_adapter(config, name)
    model.set_adapter("default")
    return model


def save_own_adapters(directory: str) -> None:
    own = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2)).prepare(own_adapters())
    own.save_pretrained(f"{directory}/default")
    own.set_adapter("other")
    own.save_pretrained(f"{directory}/other", save_peft_format=False)
    own.set_adapter(["default", "other"])
    with pytest.raises(ConfigError, match=r"several active adapters \(default, other\)"):
        own.save_pretrained(f"{directory}/both")


@pytest.mark.both_ends
def test_adapters_without_a_peft_model(tmp_path):
    from packaging.version import Version
    from transformers.integrations.peft import MIN_PEFT_VERSION

    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):  # transformers asks for more than PyPI has
        with pytest.raises(ValueError, match=f"PEFT.*{MIN_PEFT_VERSION}"):
            own_adapters()
        return
    run_distributed(2, save_own_adapters, str(tmp_path / "found"))
    expected = own_adapters()
    expected.save_pretrained(tmp_path / "expected/default")
    expected.set_adapter("other")
    expected.save_pretrained(tmp_path / "expected/other", save_peft_format=False)
    assert_same_files(tmp_path / "expected", tmp_path / "found")
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        run_distributed(2, train_and_save, kind, "own", str(tmp_path / kind))
        expected = set(os.listdir(tmp_path / "expected/default")) | {"training_args.bin"}
        assert set(os.listdir(tmp_path / kind / "saved")) == expected
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            found, wanted = tmp_path / kind / "saved" / name, tmp_path / "expected/default" / name
            assert found.read_bytes() == wanted.read_bytes() or (
                name.endswith("json") and sorted(found.read_text()) == sorted(wanted.read_text())
            )  # PEFT writes a set, in any order
        without = {"adapter_model.safetensors"} if kind == "SHARDED_STATE_DICT" else set()
        assert set(os.listdir(tmp_path / kind / "checkpoint")) == expected - without


# ---- Trainer ---------------------------------------------------------------------------------------------------------


def train_and_save(state_dict_type: str, adapter: Any, directory: str) -> None:

    arguments = TrainingArguments(
        output_dir=f"{directory}/run",
        use_cpu=True,
        report_to=[],
        parallelism_config=AutoParallelismConfig(dp_shard_size=2),
        fsdp="full_shard",
        fsdp_config={"version": 2, "state_dict_type": state_dict_type, "cpu_ram_efficient_loading": False},
    )
    model = own_adapters() if adapter == "own" else build("llama", adapter)
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": [1, 2]}])
    trainer.create_optimizer()
    trainer.model = trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)
    gathered = trainer.accelerator.get_state_dict
    trainer.save_model(f"{directory}/saved")
    trainer.save_model(f"{directory}/checkpoint", _internal_call=True)
    if trainer.accelerator.get_state_dict != gathered:
        raise AssertionError("get_state_dict was not put back")


@pytest.mark.core_cases("SHARDED_STATE_DICT-lora")
@pytest.mark.parametrize("adapter", [None, HEAD], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_trainer_saves_the_model_with_both_kinds_of_state_dict(tmp_path, kind, adapter):
    """Stock: nothing is written with SHARDED_STATE_DICT, silently. A sharded checkpoint gets its configs beside the
    shards.
    """

    run_distributed(2, train_and_save, kind, adapter, str(tmp_path / "found"))
    arguments = TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to=[])
    Trainer(build("llama", adapter), arguments).save_model(str(tmp_path / "expected"))
    assert_same_files(tmp_path / "expected", tmp_path / "found/saved", but=("training_args.bin",))
    names = {path.name for path in (tmp_path / "found/checkpoint").iterdir()}
    weights, config = (
        ("model.safetensors", "config.json")
        if adapter is None
        else (
            "adapter_model.safetensors",
            "adapter_config.json",
        )
    )
    assert config in names and (weights in names) == (kind == "FULL_STATE_DICT")


# ---- refusals and faults ---------------------------------------------------------------------------------------------


def one_rank_alone(directory: str) -> list[str]:
    os.environ["HF_AUTOMODEL_PARALLEL_SAVE_TIMEOUT"] = "1"
    accelerator, model = prepared("llama", None, {"tp_size": 2})
    messages = []
    try:
        for save in (lambda: model.save_pretrained(directory), lambda: accelerator.save_model(model, directory)):
            if accelerator.is_main_process:
                started = time.time()
                try:
                    save()
                except ExportError as error:
                    messages.append(str(error))
                messages += ["late"] * (time.time() - started > 10) + ["written"] * Path(directory).exists()
    finally:
        del os.environ["HF_AUTOMODEL_PARALLEL_SAVE_TIMEOUT"]
    accelerator.wait_for_everyone()
    model.save_pretrained(directory)  # a script that goes on after the error saves with all ranks
    return messages


@pytest.mark.core
def test_saving_on_the_main_process_alone_ends_in_seconds(tmp_path):
    """Stock: the others hang. Afterwards the ranks meet again, though one has been called twice more than the other."""
    messages, others = run_distributed(2, one_rank_alone, str(tmp_path / "x"))
    assert len(messages) == 2 and others == []
    assert all("rank 1 did not come within 1 s" in m and "is_main_process" in m for m in messages)
    build("llama").save_pretrained(tmp_path / "expected")
    assert_same_files(tmp_path / "expected", tmp_path / "x")


def push(directory: str) -> Any:
    """All ranks call ``push_to_hub``; what would be uploaded is copied."""
    import shutil
    from types import SimpleNamespace

    from transformers.utils import hub

    accelerator, plain = prepared("llama", None, {"tp_size": 2})
    adapted = accelerator.prepare(build("llama", HEAD))
    api = SimpleNamespace(create_repo=lambda name, **_: SimpleNamespace(repo_id=name))
    card = SimpleNamespace(save=lambda path: Path(path).write_text("card"))
    answers = []
    with (
        mock.patch.object(hub, "hf_api", lambda *_, **__: api),
        mock.patch.object(hub, "create_and_tag_model_card", lambda *_, **__: card),
    ):
        for name, model in (("plain", plain), ("adapted", adapted)):

            def upload(folder: str, repo: str, *_: Any, **__: Any) -> str:
                shutil.copytree(folder, f"{directory}/{repo}")
                return repo

            model._upload_modified_files = upload
            answers.append(model.push_to_hub(name, max_shard_size=SMALL))
        failing = SimpleNamespace(create_repo=mock.Mock(side_effect=OSError("not logged in")))
        with mock.patch.object(hub, "hf_api", lambda *_, **__: failing):
            try:
                plain.push_to_hub("other")
            except (OSError, ExportError) as error:
                answers.append(str(error))
    return answers


def test_push_to_hub_uploads_the_files_of_one_process_and_an_error_reaches_all_ranks(tmp_path):
    first, second = run_distributed(2, push, str(tmp_path / "found"))
    assert first[:2] == ["plain", "adapted"] and second[:2] == [None, None]
    assert "not logged in" in first[2] and "not logged in" in second[2]
    build("llama").save_pretrained(tmp_path / "expected/plain", max_shard_size=SMALL)
    (tmp_path / "expected/plain/README.md").write_text("card")
    build("llama", HEAD).save_pretrained(tmp_path / "expected/adapted")
    assert_same_files(tmp_path / "expected", tmp_path / "found", but=("adapted/README.md",))


def refusals(directory: str) -> list[str]:
    _, model = prepared("llama", None, {"tp_size": 2})
    _, adapted = prepared("llama", HEAD, {"tp_size": 2})
    Path(directory, f"file{dist.get_rank()}").write_text("")
    calls = [
        lambda: model.save_pretrained(f"{directory}/file{dist.get_rank()}"),
        lambda: adapted.save_pretrained(directory, selected_adapters=["nobody"]),
        lambda: model.save_pretrained(directory, max_shard_size="1GB" if dist.get_rank() else "2GB"),
    ]
    messages = []
    for call in calls:
        try:
            call()
            messages.append("nothing was said")
        except AutoParallelError as error:
            messages.append(str(error))
    return messages


@pytest.mark.core
def test_what_cannot_be_honoured_is_refused_by_name_on_all_ranks(tmp_path):
    expected = [
        "this is a file",
        "selected_adapters=\\['nobody'\\]",
        "rank 0 called .*2GB.* rank 1 called .*1GB",
    ]
    for messages in run_distributed(2, refusals, str(tmp_path)):
        for pattern, message in zip(expected, messages, strict=True):
            with pytest.raises(ConfigError, match=pattern):
                raise ConfigError(message)


class Renamed(LlamaForCausalLM):
    """Overrides the method with other names, as classes of models often do."""

    def save_pretrained(self, path: str, *args: Any, note: str = "", **kwargs: Any) -> None:
        super().save_pretrained(path, *args, **kwargs)


#: What a save is called with besides the directory -> what is said of it, None for nothing.
PLAIN = [
    ({"safe_serialization": False}, "safe_serialization=False.*safetensors only"),
    ({"distributed_checkpoint": True}, "distributed_checkpoint=True.*usual files"),
    ({"shard_size": "1GB"}, "shard_size='1GB'.*Known are max_shard_size"),
    ({"safe_serialization": True, "distributed_checkpoint": False, "token": None, "save_function": print}, None),
]
ADAPTED = [
    ({"path_initial_model_for_weight_conversion": "x"}, "path_initial_model_for_weight_conversion='x'.*one process"),
    ({"push_to_hub": True}, "push_to_hub=True.*Nothing was uploaded"),
    ({"max_shard_size": "1GB"}, None),
]


def save_with_any_arguments(directory: str) -> list[list[str]]:
    """Each of the saves into a folder of its own; returns what was said of each."""
    _, model = prepared("llama", None, {"tp_size": 2})
    accelerator, adapted = prepared("llama", HEAD, {"tp_size": 2})
    renamed = build("llama")
    renamed.__class__ = Renamed
    renamed = accelerator.prepare(renamed)
    calls = [functools.partial(model.save_pretrained, **options) for options, _ in PLAIN]
    calls += [functools.partial(adapted.save_pretrained, **options) for options, _ in ADAPTED]
    # Positional and renamed arguments: of PEFT's method safe_serialization, of a model's is_main_process.
    calls += [lambda path: adapted.save_pretrained(path, True), lambda path: renamed.save_pretrained(path, True)]
    calls += [lambda path: renamed.save_pretrained(path=path, note="note")]
    said: list[list[str]] = []
    for number, call in enumerate(calls):
        with mock.patch.object(saving.logger, "warning", lambda text, *values: said[-1].append(text % values)):
            said.append([])
            call(f"{directory}/{number}")
    return said


def test_no_argument_of_a_save_loses_the_weights(tmp_path):
    """What has no effect is named in a warning, unless the libraries ignore it; the files are written."""
    first, second = run_distributed(2, save_with_any_arguments, str(tmp_path))
    patterns = [*(pattern for _, pattern in PLAIN + ADAPTED), None, None, "note='note'"]
    for texts, pattern in zip(first, patterns, strict=True):
        assert len(texts) == (pattern is not None) and all(re.search(pattern, text) for text in texts), texts
    assert not any(second), "one rank speaks"
    expected = {"model.safetensors": tmp_path / "plain", "adapter_model.safetensors": tmp_path / "adapted"}
    build("llama").save_pretrained(tmp_path / "plain")
    build("llama", HEAD).save_pretrained(tmp_path / "adapted")
    for number in range(len(first)):
        adapted = len(PLAIN) <= number <= len(PLAIN) + len(ADAPTED)
        name = "adapter_model.safetensors" if adapted else "model.safetensors"
        assert filecmp.cmp(expected[name] / name, tmp_path / str(number) / name, shallow=False), number


def fail_in_the_middle(directory: str) -> str:
    """The disk of the rank that writes is full after some tensors."""
    from hf_automodel_parallel.export import safetensors_writer

    _, model = prepared("llama", None, {"tp_size": 2})
    model.save_pretrained(directory)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    original, count = safetensors_writer.SafetensorsWriter.write, []

    def write(self, name, value):
        count.append(name)
        if len(count) == 5:
            raise OSError(28, "No space left on device", str(self.path))
        original(self, name, value)

    safetensors_writer.SafetensorsWriter.write = write
    try:
        model.save_pretrained(directory)
    except (OSError, ExportError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        safetensors_writer.SafetensorsWriter.write = original
    return "nothing was said"


def test_a_full_disk_is_an_error_on_all_ranks_and_leaves_the_files_that_were_there(tmp_path):
    found = run_distributed(2, fail_in_the_middle, str(tmp_path / "found"))
    assert found[0].startswith("OSError") and found[1].startswith("ExportError")
    assert all("No space left" in message and "model.safetensors" in message for message in found)
    build("llama").save_pretrained(tmp_path / "expected")
    assert_same_files(tmp_path / "expected", tmp_path / "found")


# ---- memory ----------------------------------------------------------------------------------------------------------


M_MMAP_THRESHOLD = -3  # <malloc.h>


class _Peak:
    """Peak of this process's anonymous memory within a block, in bytes over what it was before."""

    def __enter__(self) -> _Peak:
        # Each large block is given back when it is freed. By default glibc keeps blocks of up to 32 MB once one of that
        # size was freed, so that the peak would depend on the tests that ran before in this process.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
        ctypes.CDLL(None).malloc_trim(0)
        self.before = self.most = self._now()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()

    @property
    def added(self) -> int:
        return self.most - self.before

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            self.most = max(self.most, self._now())

    @staticmethod
    def _now() -> int:
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon:")) * 1024


def memory_of_saving(directory: str) -> tuple[int, int, int, int]:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 20, "num_attention_heads": 8}
    model = accelerator.prepare(build_model("llama", **sizes))
    largest = max(p.numel() * 4 for p in model.parameters())
    total = sum(p.numel() * 4 for p in model.parameters())
    model.save_pretrained(directory)  # imports of the libraries, once in a process
    with _Peak() as streamed:
        model.save_pretrained(directory)
    with _Peak() as gathered:
        state = accelerator.get_state_dict(model)
    del state
    return largest, total, streamed.added, gathered.added


def test_saving_takes_memory_for_a_few_tensors_and_not_for_the_model(tmp_path):
    """One file of 230 MB: the rank that writes never holds it. Gathering, as the stock stack does, is measured beside
    it.
    """
    (largest, total, streamed, gathered), (_, _, helper, _) = run_distributed(2, memory_of_saving, str(tmp_path))
    assert (tmp_path / "model.safetensors").stat().st_size > total
    report = (
        f"largest {largest:,}, model {total:,}; added: streaming {streamed:,} and {helper:,}, gathering {gathered:,}"
    )
    print(report)
    assert gathered > 0.8 * total
    # One tensor is held several times: as gathered, as put in order, as handed to the disk; and a thread of gloo may
    # keep the buffers of the last gather until it is scheduled again.
    assert max(streamed, helper) < 10 * largest + 16 * 2**20 < total / 4


# ---- the pieces ------------------------------------------------------------------------------------------------------


def save_by_the_documented_recipe(directory: str) -> None:
    accelerator, model = prepared_llama(tp_size=2)
    state_dict = accelerator.get_state_dict(model)
    accelerator.unwrap_model(model).save_pretrained(
        directory,
        state_dict=state_dict,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
    )


@pytest.mark.core
def test_save_pretrained_with_the_gathered_state_dict(tmp_path):
    """As Accelerate's documentation does; without a state dict: test_export.py."""

    run_distributed(2, save_by_the_documented_recipe, str(tmp_path))
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in build("llama").state_dict().items())


def save_adapters_by_the_documented_recipe(sizes: dict[str, int], directory: str) -> dict[str, torch.Tensor]:
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


def test_modules_to_save_with_the_documented_save_recipe(tmp_path: Path):
    """Stock: every rank but the first dies with a KeyError."""
    trained = run_distributed(2, save_adapters_by_the_documented_recipe, {"dp_shard_size": 2}, str(tmp_path))[0]
    saved = load_file(tmp_path / "adapter_model.safetensors")
    expected = {
        name.replace(".modules_to_save.default", "").replace(".default", ""): value for name, value in trained.items()
    }
    assert saved.keys() == expected.keys()
    for name, value in saved.items():
        assert torch.equal(value, expected[name]), name


def train_and_save_model(
    sizes: dict[str, int], dp_size: int, name: str, adapter: Any, directory: str
) -> dict[str, torch.Tensor]:
    model = build(name, adapter)
    rows = Rows(8, model.config.vocab_size, seed=40)
    trainer = InOrder(model, arguments(directory, sizes, dp_size), train_dataset=rows)
    trainer.train()
    trainer.save_model(directory)
    dist.barrier()
    return full_parameters(trainer.model)


SAVED = [
    ("llama_odd_vocab", None),
    ("llama_tied", None),
    ("phi3", None),
    ("mixtral", None),
    ("llama_odd_vocab", {"target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"]}),
    ("mixtral", LORA),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
]


@pytest.mark.parametrize(
    "name, adapter", SAVED, ids=lambda v: "full" if v is None else "lora" if isinstance(v, dict) else v
)
def test_saved_model_is_that_of_one_process(name, adapter, tmp_path):
    """`Trainer.save_model` writes what plain `from_pretrained` loads, every tensor identical to the trained one."""
    want = run_on_mesh("tp2_fsdp2", train_and_save_model, name, adapter, str(tmp_path))[0]
    if adapter is None:
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    else:
        assert not list(Path(tmp_path).glob("model*.safetensors")), "the base model was saved beside the adapter"
        loaded = PeftModel.from_pretrained(build_model(name), tmp_path)
    assert_same_tensors({n: p.detach() for n, p in loaded.named_parameters()}, want, rtol=0, atol=0)
    start = build(name, adapter)
    moved = [n for n, p in start.named_parameters() if p.requires_grad and torch.equal(p, want[n])]
    assert not moved, f"not trained: {moved}"
