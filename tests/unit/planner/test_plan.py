"""The parts of ``plan`` and ``explain`` that need no other process, the page, and one whole run."""

import io
import json
import os
import pickle
import re
import resource
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness.fake_ranks import fake_world
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

import hf_automodel_parallel
from hf_automodel_parallel import AutoParallelismConfig, errors, explain
from hf_automodel_parallel.cli import app
from hf_automodel_parallel.cli.plan import show
from hf_automodel_parallel.core.output import size_text
from hf_automodel_parallel.errors import AutoParallelError, ConfigError, UnsupportedError
from hf_automodel_parallel.planner import child
from hf_automodel_parallel.planner import explain as explaining
from hf_automodel_parallel.planner.counting import Collectives
from hf_automodel_parallel.planner.depth import depths, extrapolate
from hf_automodel_parallel.planner.explanation import Explanation
from hf_automodel_parallel.planner.interconnect import Interconnect, span
from hf_automodel_parallel.planner.models import geometries, lora_of, model_config, on_meta
from hf_automodel_parallel.planner.sizes import bytes_of

DOCS = Path(hf_automodel_parallel.__file__).resolve().parents[1] / "docs"
EXAMPLE = json.loads((DOCS / "plan-llama-3.1-405b.json").read_text())


def shown(found, capsys):
    capsys.readouterr()
    show(found)
    return "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())


def test_the_page_shows_the_example_in_80_columns(capsys):
    text = shown(Explanation(**EXAMPLE), capsys)
    page = (DOCS / "plan.md").read_text()
    assert re.search(r"<!-- example: begin.*?-->\n```\n(.*?)\n```\n<!-- example: end -->", page, re.S)[1] == text
    assert max(map(len, text.splitlines())) <= 80


def test_plan_of_405b_on_1024_ranks():
    """Its depth is 126; the collectives and the bytes of the page are those that a run of today counts."""
    found = explain(
        "llama-3.1-405b", "tp=8,dp_shard=128,sequence_parallel,activation_checkpointing=full", sequence=8192
    )
    for name in ("parameters", "gradients", "optimizer"):
        assert found.memory[name] == EXAMPLE["memory"][name]
    assert found.parameters == 405_853_388_800
    assert found.collectives == EXAMPLE["collectives"]
    assert found.peaks.keys() == {"forward", "head's backward", "layers' backward", "clipping and step"}
    assert 0.8 < found.memory["peak"] / EXAMPLE["memory"]["peak"] < 1.25
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 4 * 1024 * 1024  # KiB, of the largest process


def test_few_layers_say_what_all_do():
    """A module of 9 layers, of which two kinds alternate after the first."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=9, num_attention_heads=4, vocab_size=512
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for layer in model.model.layers[2::2]:
            layer.mlp.down_proj = torch.nn.Linear(96, 64, bias=True, dtype=torch.bfloat16)
    given = {"batch": 2, "sequence": 64}
    few, all_ = (explain(model, "dp_shard=4", every_layer=every, **given) for every in (False, True))
    assert few.collectives == all_.collectives and few.memory["optimizer"] == all_.memory["optimizer"]
    assert few.memory["activations"] == pytest.approx(all_.memory["activations"], rel=1e-3)
    assert few.memory["gathered"] == all_.memory["gathered"]
    assert few.memory["peak"] == pytest.approx(all_.memory["peak"], rel=0.01)
    assert len(model.model.layers) == 9  # the caller's model is not changed


@pytest.mark.parametrize(
    "kinds, found",
    [
        ("a" * 126, (4, 5)),
        ("aaa" + "b" * 58, (7, 8)),  # dense layers before experts
        ("aaaaab" * 10 + "aa", (8, 14)),  # sliding before full attention
        ("a" * 5, None),
        ("abcdefgh", None),
    ],
)
def test_depths(kinds, found):
    assert depths(list(kinds)) == found
    for depth in found or ():
        step = found[1] - found[0]
        assert kinds[depth - step : depth] == kinds[-step:]  # ends like the whole


def test_extrapolate_follows_both_ends():
    """The last layer's backward grows by activations, the first one's by gradients."""

    def figures(depth):
        peaks = {f"backward of layer {i}": 100 * i + 30 * (depth - i) for i in range(depth)}
        return {"kept": 100 * depth, "peaks": {"forward": 100 * depth, **peaks}, "collectives": {"a tp": [depth, 2, 3]}}

    assert extrapolate(figures(4), figures(5), 6) == {
        "kept": 1000,
        "peaks": {"forward": 1000, "layers' backward": 930},
        "collectives": {"a tp": [10, 2, 3]},
    }


@pytest.mark.parametrize(
    "name, billions",
    [
        ("llama-3.1-405b", 405.853),
        ("mixtral-8x22b", 140.630),
        ("qwen3-235b-a22b", 235.094),
        ("deepseek-v3", 671.026),
        ("gemma3-27b", 27.009),
    ],
)
def test_geometries_have_the_published_sizes(name, billions):
    """From few layers: those of one kind are equal."""
    config = model_config(name)
    total, dense = config.num_hidden_layers, getattr(config, "first_k_dense_replace", 0)
    counts = []
    for layers in (dense + 1, dense + 2):
        config = model_config(name)
        config.num_hidden_layers = layers
        counts.append(sum(p.numel() for p in on_meta(config, "bf16").parameters()))
    assert (counts[0] + (total - dense - 1) * (counts[1] - counts[0])) / 1e9 == pytest.approx(billions, abs=0.001)
    assert name in geometries()


def test_interconnect(tmp_path):
    sizes = {"dp_replicate": 2, "dp_shard": 4, "cp": 1, "tp": 8}
    assert (span("tp", sizes), span("dp_shard", sizes), span("dp_shard_cp", sizes)) == (8, 32, 32)
    link = Interconnect.named("h100-infiniband")
    rows = [{"axis": "tp", "sent_bytes": 450e9}, {"axis": "dp_shard", "sent_bytes": 100e9}]
    assert link.seconds(rows, sizes) == {"tp": 1.0, "dp_shard": 2.0}
    (tmp_path / "mine.yaml").write_text("fast: {gpus_per_node: 64, intra_node: 100, inter_node: 1}")
    assert Interconnect.named(f"{tmp_path / 'mine.yaml'}:fast").seconds(rows, sizes) == {"tp": 4.5, "dp_shard": 1.0}
    with pytest.raises(ConfigError, match="a100-infiniband"):
        Interconnect.named("token-ring")


def test_texts():
    assert [size_text(size) for size in (1023, 1023 * 1024, 187.78 * 2**30, 1588 * 2**20, 46 * 1024)] == [
        "1023 B",
        "1,023 KiB",
        "188 GiB",
        "1.55 GiB",
        "46.0 KiB",
    ]
    assert bytes_of("80GiB") == 80 << 30 and bytes_of("1.5 GB") == 1_500_000_000 and bytes_of("7") == 7
    assert lora_of("r=16,targets=q_proj+v_proj") == {"r": 16, "target_modules": ["q_proj", "v_proj"]}
    assert lora_of("all-linear") == {"target_modules": "all-linear"}
    for wrong in (lambda: bytes_of("big"), lambda: lora_of("rank=3"), lambda: lora_of("r=x")):
        with pytest.raises(ConfigError):
            wrong()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["nowhere"], "no model directory, config.json or cached hub id"),
        (["gemma3-27b", "--tp", "3", "--world", "8"], "multiply to 3"),
        (["gemma3-27b", "--optimizer", "magic"], "optimizer 'magic'"),
        (["gemma3-27b", "--dtype", "int8"], "dtype 'int8'"),
        (["gemma3-27b", "--cp", "2", "--seq", "33"], "does not divide by cp_size=2"),
        (["gemma3-27b", "--set", "backend=megatron_fsdp"], "with the backend 'fsdp2' only"),
        (["gemma3-27b", "--no-step", "--seq", "8", "--no-modes"], "--no-step runs no step, so --seq, --modes would"),
    ],
)
def test_wrong_options_give_one_line(arguments, sentence, monkeypatch):
    monkeypatch.setattr(explaining, "results_of", lambda job: iter([model_config(job.model)]))
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 1 and sentence in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_arguments_without_effect_are_refused():
    with pytest.raises(ConfigError, match="step=False runs no step, so gpu_memory, every_layer would have no effect"):
        explain("gemma3-27b", "tp=2", step=False, gpu_memory=1, every_layer=True)
    with pytest.raises(ConfigError, match="world_size=0: give 1 or more"):
        explain("gemma3-27b", "tp=2", world_size=0)
    with pytest.raises(ConfigError, match="dtype='bf16': the module's parameters are torch.float32"):
        explain(torch.nn.Linear(2, 2, device="meta"), "tp=2", dtype="bf16")
    assert CliRunner().invoke(app, ["plan", "gemma3-27b", "--world", "0"]).exit_code == 2


def test_modes_that_are_not_measured_are_named_and_a_module_keeps_its_dtype(monkeypatch):
    placed = {"shard_bytes": 8, "layers": 1, "flops_per_token": 0, "experts_used": None, "notes": []}
    figures = {
        "parameters": 8,
        "activations": 0,
        "peaks": {"forward": 8},
        "collectives": {},
        "optimizer": 0,
        "logits": 0,
        "layer": {},
    }
    monkeypatch.setattr(explaining, "results_of", lambda job: iter([dict(placed), dict(figures)]))
    model = torch.nn.Linear(2, 2, device="meta", dtype=torch.float16)
    found = explain(
        model, "tp=2,sequence_parallel,sequence_parallel_regather", checkpointing=("none", "full"), gpus_per_node=8
    )
    assert found.about["dtype"] == "fp16"
    assert found.notes == ["activation checkpointing full: not measured beside sequence_parallel_regather."]


@pytest.mark.parametrize(
    "call, kind, whole",
    [
        (lambda t, n: dist.all_gather([torch.empty(6) for _ in range(4)], t), "all_gather", 4 * 24),
        (lambda t, n: dist.reduce_scatter(t, [torch.empty(6) for _ in range(4)]), "reduce_scatter", 4 * 24),
        (lambda t, n: dist.all_reduce(t), "all_reduce", 24),
        (lambda t, n: ops().all_gather_into_tensor_coalesced([t, t[:2]], 4, n), "all_gather", 4 * 32),
        (lambda t, n: ops().reduce_scatter_tensor_coalesced([t[:4], t[:4]], "sum", 4, n), "reduce_scatter", 32),
        (lambda t, n: ops().all_reduce_coalesced([t, t[:2]], "sum", n), "all_reduce", 32),
    ],
)
def test_collectives_of_lists_count_all_their_bytes(call, kind, whole):
    with fake_world(4), Collectives() as seen:
        call(torch.empty(6), dist.group.WORLD.group_name)
    assert {key: (calls.count, calls.tensor_bytes) for key, calls in seen.calls.items()} == {(kind, "all"): (1, whole)}


def ops():
    return torch.ops._c10d_functional


def test_config_file_of_accelerate(monkeypatch):
    """Sizes, processes, mixed precision and the section of FSDP; options win."""
    seen = {}

    def run(job):
        seen["setting"] = job.placed
        raise UnsupportedError("enough")
        yield

    monkeypatch.setattr(explaining, "results_of", run)
    file = DOCS.parent / "accelerate_configs" / "gpu_hsdp_tp_2nodes.yaml"
    result = CliRunner().invoke(app, ["plan", "gemma3-27b", "--config_file", str(file), "--checkpointing", "full"])
    setting = seen["setting"]
    assert setting.config | {"tp_size": 2, "dp_shard_size": 4, "dp_replicate_size": 2} == setting.config, result.output
    assert setting.world == 16 and setting.mixed_precision == "bf16"
    assert setting.config["activation_checkpointing"] == "full"
    assert setting.environment["FSDP_RESHARD_AFTER_FORWARD"] == "true"


def test_warnings_have_remedies():
    from hf_automodel_parallel.planner.remedies import warnings_for

    found = Explanation(**EXAMPLE)
    assert warnings_for(found, 8, 80 << 30) == []
    assert "Use --tp 4 or less" in warnings_for(found, 4, None)[0]
    assert "more than the 8.0 GiB of a GPU" in warnings_for(found, 8, 8 << 30)[0]
    found = Explanation(**{**EXAMPLE, "replicated_over_tp": EXAMPLE["parameters"] // 10})
    assert "tp does not shard 10%" in warnings_for(found, 8, None)[0]
    found = Explanation(**{**EXAMPLE, "memory": EXAMPLE["memory"] | {"activations": EXAMPLE["memory"]["peak"] - 1}})
    found.about = found.about | {"checkpointing": "none", "sequence_parallel": False}
    assert ["--sequence-parallel" in w or "--checkpointing full" in w for w in warnings_for(found, 8, None)] == [
        True
    ] * 2


def test_an_error_of_prepare_arrives():
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=1)
    with pytest.raises(errors.PlanError, match="which tp_size=3 does not divide"):
        explain(config, AutoParallelismConfig(tp_size=3), step=False)


def results_from(tmp_path, monkeypatch, code):
    """``results_of`` with a small script for the other process; ``output`` is what the results are written to."""
    script = tmp_path / "interpreter"
    script.write_text(f"#!{sys.executable} -IS\nimport os, sys\noutput = open(int(sys.argv[-1]), 'w')\n{code}")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return list(explaining.results_of("job"))


def test_what_a_library_prints_is_no_result(tmp_path, monkeypatch):
    """More than a pipe holds, on both streams."""
    monkeypatch.setenv("HF_AUTO_PARALLEL_VERBOSE", "2")
    code = """
sys.stdin.read()
print('["found", 1]')
sys.stdout.write("x" * 200_000)
sys.stderr.write("y" * 200_000)
output.write('["found", %s]' % os.environ["HF_AUTO_PARALLEL_VERBOSE"])
"""
    assert results_from(tmp_path, monkeypatch, code) == [0]


@pytest.mark.parametrize(
    "code, kind, sentence",
    [
        ('output.write(\'["error", "PlanError", "no plan"]\')', errors.PlanError, "^no plan$"),
        ("output.write('[\"found\", {\"rows'); sys.exit('out of luck')", AutoParallelError, "error: out of luck$"),
        ("os.kill(os.getpid(), 9)", AutoParallelError, "was killed by SIGKILL; most likely memory ran out"),
        ("os._exit(3)", AutoParallelError, "exit code 3"),
    ],
    ids=["an error", "within a line", "killed", "silent"],
)
def test_a_process_that_ends_early_says_why(tmp_path, monkeypatch, code, kind, sentence):
    with pytest.raises(kind, match=sentence) as found:
        results_from(tmp_path, monkeypatch, code)
    assert type(found.value) is kind


def test_a_measurement_that_is_killed_is_an_error(monkeypatch):
    monkeypatch.setattr(child, "placements", lambda *_: os.kill(os.getpid(), 9))
    with pytest.raises(UnsupportedError, match="measured the placements was killed; most likely memory ran out"):
        child._apart(("placements", None, None))


def test_a_users_class_of_errors_arrives_as_the_one_that_it_is_made_of(monkeypatch):
    class Mine(errors.PlanAssertionError):
        def __init__(self):
            super().__init__("mine")

    def refuse(*_):
        raise Mine

    monkeypatch.setattr(child, "placements", refuse)
    with pytest.raises(errors.PlanAssertionError, match="^mine$") as found:
        child._apart(("placements", None, None))
    assert type(found.value) is errors.PlanAssertionError


def test_a_class_that_the_other_process_cannot_import(monkeypatch):
    text = pickle.dumps(LlamaConfig).replace(b"LlamaConfig", b"OtherConfig")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    with pytest.raises(UnsupportedError, match="'OtherConfig'.*Define its classes in a module that can be imported"):
        child._read()
