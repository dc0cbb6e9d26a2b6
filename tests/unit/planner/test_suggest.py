"""``suggest``: what is considered, the order, the reasons, and the files; the planner's runs are replaced."""

import dataclasses
import json
import math
import os
import re
import subprocess
from pathlib import Path

import pytest
import transformers
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from typer.testing import CliRunner

from hf_automodel_parallel import AutoParallelismConfig
from hf_automodel_parallel.cli import app
from hf_automodel_parallel.cli import suggest as command
from hf_automodel_parallel.errors import ConfigError, PlanError
from hf_automodel_parallel.planner import suggest as searching
from hf_automodel_parallel.planner.arithmetic import Arithmetic, Candidate
from hf_automodel_parallel.planner.explanation import Explanation
from hf_automodel_parallel.planner.interconnect import Interconnect
from hf_automodel_parallel.planner.suggest import reason, suggest

GIB = 1 << 30
#: On two nodes a row's activations and the unsharded units fit beside the states under tp only.
TOO_LARGE_FOR_FSDP = {"parameters": 110e9, "layers": 80, "width": 16384, "modes": ("full",)}
LLAMA_8B = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    return str(tmp_path / "config.json")


def base(
    parameters=8e9,
    world=16,
    sequence=4096,
    layers=32,
    width=4096,
    modes=("full", "none", "submodule", "selective"),
    experts_used=None,
):
    """FSDP2 over all ranks in bf16: about what the planner counts for a Llama."""
    whole = {"parameters": 2 * parameters, "gradients": 2 * parameters, "optimizer": 4 * parameters}
    states = {name: int(size / world) for name, size in whole.items()}
    row = sequence * width * 2
    kept = {
        "full": row * layers,
        "none": row * layers * 16,
        "submodule": row * layers * 3,
        "selective": row * layers * 9,
    }
    units = int(8 * parameters / layers)
    by_mode = {
        mode: {"activations": size, "peak": sum(states.values()) + size + units + row * 16}
        for mode, size in kept.items()
        if mode in modes
    }
    rows = [("all_gather", 4 * parameters), ("reduce_scatter", 2 * parameters)]
    sent = [
        {"kind": kind, "axis": "dp_shard", "count": 1, "tensor_bytes": int(size), "sent_bytes": int(size)}
        for kind, size in rows
    ]
    return Explanation(
        {"dp_shard": world},
        {"world_size": world, "sequence": sequence, "dtype": "bf16", "mixed_precision": "no", "optimizer": "adamw"}
        | {"layers": layers, "flops_per_token": 6 * parameters, "experts_used": experts_used, "model": "a llama"},
        parameters=int(parameters),
        trainable=int(parameters),
        memory={**states, "gathered": units // 2, "logits": sequence * 128256 * 2, "peak": by_mode["full"]["peak"]},
        by_checkpointing=by_mode,
        collectives=sent,
    )


@pytest.fixture
def planner(monkeypatch):
    """The first run is `given`; a run of a mesh answers with 1 GiB more than arithmetic, unless `answer` says else."""
    state = {"runs": [], "base": {}, "answer": lambda fields, found: found}

    def explain(model, fields, **rest):
        if len(rest.get("checkpointing", ())) > 1:
            state["given"] = base(world=fields["dp_shard_size"], sequence=rest["sequence"], **state["base"])
            state["given"].about["mixed_precision"] = rest["mixed_precision"]
            return state["given"]
        state["runs"].append((fields, rest["batch"]))
        return state["answer"](fields, Explanation({}, {}, memory={"peak": 30 * GIB}, collectives=[]))

    monkeypatch.setattr(searching, "explain", explain)
    return state


def test_replicas_on_nodes_for_what_fits_on_one(model, planner):
    """8B on two nodes: one copy on each node, no tensor parallelism, and the same for one node without replicas."""
    found = suggest(model, 16, 80 * GIB)
    best = found.ranked[0]
    assert best.mesh == "dp_replicate=2,dp_shard=8" and best.measured and best.reason == ""
    assert len(planner["runs"]) == 2 and all(row.reason for row in found.ranked[1:])
    assert not any(row.measured for row in found.ranked[2:])
    assert "bytes between nodes" in next(row for row in found.ranked if row.mesh == "dp_shard=16").reason
    assert "span nodes of 8" in found.refused["tp=16"]
    assert found.to_dict()["ranked"][0]["auto_parallel"].startswith("dp_replicate=2,dp_shard=8")
    assert suggest(model, 8, 80 * GIB).ranked[0].mesh == "dp_shard=8"


def test_tensor_parallelism_where_fsdp_does_not_fit(model, planner):
    """Another model on the same nodes: FSDP2 over all of them is too much by some GiB, and the reason says so."""
    planner["base"] = TOO_LARGE_FOR_FSDP
    found = suggest(model, 16, 80 * GIB)
    best = found.ranked[0]
    assert best.sizes["tp"] in (2, 4, 8) and best.sequence_parallel and best.checkpointing == "full"
    assert best.memory <= found.about["usable_memory"] == int(68 * GIB)
    assert "does not fit: " in found.refused["dp_shard=16"] and "GiB too much" in found.refused["dp_shard=16"]
    rows = best.batch * best.accumulation * best.sizes["dp_shard"] * best.sizes["dp_replicate"]
    assert rows == found.about["rows"] == 16


def test_a_mesh_that_does_not_fit_when_it_is_run_loses(model, planner):
    def answer(fields, found):
        found.memory["peak"] = (90 if fields["tp_size"] == 1 else 50) * GIB
        return found

    planner["answer"] = answer
    found = suggest(model, 16, 80 * GIB, measured=1)
    assert found.ranked[0].measured and found.ranked[0].sizes["tp"] > 1
    # Without tp nothing else is tried in this mode: what one mesh missed, others are expected to miss.
    modes = [fields.get("activation_checkpointing", "none") for fields, _ in planner["runs"] if fields["tp_size"] == 1]
    assert len(modes) == len(set(modes))
    assert found.ranked[0].memory == 50 * GIB


def test_an_axis_that_prepare_refuses_and_no_sequence_parallelism(model, planner):
    """Errors of `prepare` become reasons; a model that refuses sequence parallelism is tried without it."""
    planner["base"] = TOO_LARGE_FOR_FSDP

    def answer(fields, found):
        if fields.get("sequence_parallel"):
            raise PlanError("sequence_parallel=True: this model cannot.")
        if fields["tp_size"] == 8:
            raise PlanError("eight is too many.")
        return found

    planner["answer"] = answer
    found = suggest(model, 32, 80 * GIB, measured=3)
    assert not any(row.sequence_parallel for row in found.ranked)
    assert found.about["sequence_parallel"] is False
    if "tp=8" in found.refused:
        assert found.refused["tp=8"] == "eight is too many."
    assert found.ranked[0].sizes["tp"] < 8


def test_nothing_fits(model, planner):
    planner["base"] = {"parameters": 600e9, "layers": 60}
    with pytest.raises(ConfigError, match=r"no mesh of 16 GPUs fits: the least is .* By arithmetic 128 GPUs do"):
        suggest(model, 16, 80 * GIB)
    planner["base"] = {"modes": ("full",)}
    planner["answer"] = lambda fields, found: dataclasses.replace(found, memory={"peak": 500 * GIB})
    with pytest.raises(ConfigError) as error:  # what was counted is named, not what arithmetic said of it
        suggest(model, 16, 80 * GIB)
    assert float(re.search(r"the least is ([\d.]+) GiB", str(error.value))[1]) > 68
    planner["base"] = {"parameters": 600e9, "layers": 60}
    with pytest.raises(ConfigError, match="2 rows of a step cannot be divided among"):
        suggest(model, 32, 80 * GIB, rows=2)
    with pytest.raises(ConfigError, match="does not divide by the 8 GPUs of a node"):
        suggest(model, 12, 80 * GIB)


def arithmetic(gpus, rows=None, sequence=4096, config=None, batch=None):
    config = transformers.LlamaConfig(**(LLAMA_8B | (config or {})))
    link = Interconnect.named("h100-infiniband")
    return Arithmetic(base(world=gpus, sequence=sequence), config, link, gpus, rows or gpus, batch)


def test_what_is_considered():
    every = arithmetic(32).candidates(True)
    assert {row.sizes["tp"] for row in every} == {1, 2, 4, 8} and {row.sizes["cp"] for row in every} == {1}
    assert all(math.prod(row.sizes.values()) == 32 for row in every)
    assert all(row.sequence_parallel == (row.sizes["tp"] > 1) for row in every)
    # Within a node nothing is held twice, besides whole replicas.
    assert all(row.sizes["dp_shard"] * row.sizes["tp"] >= 8 or row.sizes["dp_shard"] == 1
               for row in every if row.sizes["dp_replicate"] > 1)  # fmt: skip
    # Fewer rows than ranks leave tp; long ones cp, too.
    assert {row.sizes["tp"] for row in arithmetic(32, rows=4).candidates(True)} == {8}
    assert {row.sizes["cp"] for row in arithmetic(32, rows=4).candidates(True)} == {1}
    assert {row.sizes["cp"] for row in arithmetic(32, rows=4, sequence=32768).candidates(True)} == {1, 2, 4, 8}
    assert {row.sizes["cp"] for row in arithmetic(8, sequence=131072).candidates(True)} == {1, 2, 4, 8}
    assert {(row.batch, row.accumulation) for row in every if row.sizes["tp"] == 4} >= {(4, 1), (2, 2), (1, 4)}
    assert {row.batch for row in arithmetic(32, batch=2, rows=64).candidates(True)} == {2}
    heads = arithmetic(24, config={"num_attention_heads": 12, "num_key_value_heads": 4, "hidden_size": 768})
    refused = dict(heads.impossible())
    assert refused["tp=8"] == "does not divide 12 attention heads" and "span nodes" in refused["tp=12"]
    assert "tp=4" not in refused and {row.sizes["tp"] for row in heads.candidates(True)} == {1, 2, 4}


def test_arithmetic_scales_as_the_axes_divide():
    """States over all shards, activations over tp with sequence parallelism and without, bytes over the nodes."""
    found = {(c.mesh, c.checkpointing, c.batch): c for c in arithmetic(16, rows=64).candidates(True)}
    one, four = found["dp_shard=16", "full", 4], found["dp_shard=4,tp=4", "full", 4]
    more = found["dp_shard=16", "full", 2]
    assert one.memory > more.memory and four.memory < one.memory
    assert one.accumulation == 1 and more.accumulation == 2 and more.between_nodes == 2 * one.between_nodes
    assert one.within_node == 0 and one.between_nodes == 6 * 8_000_000_000 * 15 // 16
    hybrid = found["dp_replicate=2,dp_shard=8", "full", 4]
    assert hybrid.between_nodes < one.between_nodes / 10 and hybrid.within_node > 0
    whole = {(c.mesh, c.checkpointing, c.batch): c for c in arithmetic(16, rows=64).candidates(False)}
    assert whole["dp_shard=4,tp=4", "full", 4].memory > four.memory


def test_the_simpler_mesh_is_first_of_those_about_as_quick():
    """The estimate of time is no better than a tenth: least tp, then memory, if there is no more to it."""
    simple = Candidate({"dp_shard": 64, "tp": 1}, "full", False, 1, 1, 60 * GIB, 0, 100, 2.0)
    tensor = Candidate({"dp_shard": 16, "tp": 4}, "none", True, 1, 1, 40 * GIB, 10, 100, 1.9)
    light = Candidate({"dp_shard": 32, "tp": 2}, "none", True, 1, 1, 40 * GIB, 10, 101, 1.92)
    heavy = Candidate({"dp_replicate": 2, "dp_shard": 16, "tp": 2}, "none", True, 1, 1, 50 * GIB, 10, 90, 1.91)
    assert searching._in_order([tensor, heavy, light, simple]) == [simple, light, heavy, tensor]
    slow = dataclasses.replace(simple, seconds=2.2)
    assert searching._in_order([slow, tensor, light]) == [light, tensor, slow]


def test_few_experts_limit_the_shards():
    """Rank 0 of 16 holds an eighth of the model: more shards divide nothing, and what they gather is padded."""
    even = {(c.mesh, c.checkpointing): c for c in arithmetic(16).candidates(True) if c.batch == 1}
    found = base(world=16)
    states = sum(found.memory[name] for name in ("parameters", "gradients", "optimizer"))
    for name in ("parameters", "gradients", "optimizer"):
        found.memory[name] *= 2
    for its in found.by_checkpointing.values():
        its["peak"] += states
    for row in found.collectives:
        row["tensor_bytes"] *= 2
    given = Arithmetic(found, transformers.LlamaConfig(**LLAMA_8B), Interconnect.named("h100-infiniband"), 16, 16, None)
    assert given.even_shards == 8
    few = {(c.mesh, c.checkpointing): c for c in given.candidates(True) if c.batch == 1}
    assert few["dp_shard=16", "full"].memory == pytest.approx(even["dp_shard=16", "full"].memory + states, rel=1e-6)
    assert few["dp_shard=16", "full"].between_nodes == 2 * even["dp_shard=16", "full"].between_nodes
    assert few["dp_shard=8,tp=2", "full"].between_nodes == even["dp_shard=8,tp=2", "full"].between_nodes
    assert few["dp_shard=8,tp=2", "full"].memory < even["dp_shard=8,tp=2", "full"].memory + 1


def test_reasons():
    winner = Candidate({"dp_shard": 8, "tp": 8}, "full", True, 1, 1, 50 * GIB, 10, 100, 2.0, True)
    slower = Candidate({"dp_shard": 64}, "full", False, 1, 2, 60 * GIB, 0, 800, 4.0)
    assert reason(slower, winner) == "8 x bytes between nodes, 2 micro-batches"
    equal = Candidate({"dp_shard": 16, "tp": 4}, "full", False, 1, 1, 60 * GIB, 0, 150, 2.0)
    assert reason(equal, winner) == "not quicker, 10.0 GiB more memory"
    light = Candidate({"dp_shard": 16, "tp": 4}, "full", False, 1, 1, 50 * GIB, 0, 150, 2.0)
    assert reason(light, winner) == "1.5 x bytes between nodes"
    needless = Candidate({"dp_shard": 8, "tp": 8}, "none", True, 1, 1, 40 * GIB, 10, 100, 1.9)
    simple = Candidate({"dp_shard": 64}, "full", False, 1, 1, 50 * GIB, 0, 100, 2.0, True)
    assert reason(needless, simple) == "5 % quicker by estimate, and each layer waits for 8 ranks"
    inside = Candidate({"dp_shard": 4, "tp": 16}, "full", True, 1, 1, 60 * GIB, 40, 90, 3.0)
    assert reason(inside, winner) == "4 x bytes in the node"
    again = Candidate({"dp_shard": 8, "tp": 8}, "none", True, 1, 1, 50 * GIB, 10, 100, 1.0, True)
    assert reason(winner, again) == "has to recompute (full)"


def test_the_files_start_what_was_chosen(model, planner, tmp_path, monkeypatch):
    """Accelerate's loader and our parser read the file, bash the script, and all say the same."""
    planner["base"] = TOO_LARGE_FOR_FSDP
    config, script = tmp_path / "cfg.yaml", tmp_path / "train.sbatch"
    arguments = ["suggest", model, "--gpus", "16", "--gpu-memory", "80GiB", "--write", str(config)]
    result = CliRunner().invoke(app, [*arguments, "--slurm", str(script)])
    assert result.exit_code == 0, result.output
    assert (
        max(len(line) for line in result.stdout.splitlines() if line.isascii() and not re.search("parallel|/", line))
        <= 80
    )
    flag = next(line for line in result.stdout.splitlines() if line.startswith("First choice: ")).split(": ")[1]
    chosen = AutoParallelismConfig.parse(flag)
    assert f"--auto_parallel {flag}" in result.stdout and "--nnodes 2" in result.stdout
    read = AutoParallelismConfig.parse(str(config))
    assert read.to_dict() | chosen.to_dict() == read.to_dict() and read.activation_checkpointing == "full"
    read.resolve_sizes(16)
    loaded = load_config_from_file(str(config))
    assert loaded.num_processes == 16 and loaded.num_machines == 2 and loaded.fsdp_config["fsdp_version"] == 2
    assert loaded.fsdp_config["fsdp_activation_checkpointing"] and loaded.main_process_port == 29500
    assert f'--auto_parallel "{flag}"' in script.read_text() and "#SBATCH --nodes=2\n" in script.read_text()
    assert loaded.mixed_precision == "bf16"
    # The script, with programs in SLURM's place that print what they are given.
    for name, does in (("scontrol", "echo first"), ("srun", 'shift; exec "$@"'), ("torchrun", 'printf "%s\\n" "$@"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    names = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "first,second", "SLURM_JOB_NAME": "job"}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    ran = subprocess.run(["bash", script], env={"PATH": path, **names}, capture_output=True, text=True, check=True)
    given = ran.stdout.splitlines()
    assert given[:2] == ["--nnodes", "2"] and "first:20007" in given
    launch = given.index("hf_automodel_parallel.launch")
    assert given[launch + 1 : launch + 4] == ["--auto_parallel", flag, "train.py"]
    wanted = re.search(r"train\.py (.*)", result.stdout)
    assert wanted is not None and " ".join(given).endswith(wanted[1]) and "--bf16 True" in wanted[1]


def test_a_file_without_data_parallelism():
    """Tensor parallelism over all processes: FSDP has nothing to shard over."""
    about = {"gpus": 4, "gpus_per_node": 4, "model": "m", "mixed_precision": "bf16", "dtype": "bf16", "sequence": 8}
    only = Candidate({"dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 4}, "none", True, 1, 1)
    values = yaml.safe_load(command.accelerate_file(only, about, Path("cfg.yaml")))
    assert values["distributed_type"] == "MULTI_GPU" and "fsdp_config" not in values
    assert values["parallelism_config"]["parallelism_config_sequence_parallel"] is True
    alone = Candidate({"dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1}, "none", False, 1, 1)
    assert command.torchrun(alone, about | {"gpus": 1, "gpus_per_node": 1}).startswith("python train.py")
    with pytest.raises(ConfigError, match="one GPU needs no config file"):
        command.accelerate_file(alone, about | {"gpus": 1, "gpus_per_node": 1}, Path("cfg.yaml"))
    assert "--bf16 True" in command.sbatch(only, about, Path("train.sbatch"))


def test_json_and_wrong_options(model, planner):
    arguments = ["suggest", model, "--gpus", "16", "--gpu-memory", "80GiB"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    found = json.loads(result.stdout)
    assert found["ranked"][0]["measured"] and found["command"].startswith("torchrun --nnodes 2")
    for wrong, sentence in (("--interconnect=token-ring", "h100-infiniband"), ("--per-node=5", "does not divide")):
        result = CliRunner().invoke(app, [*arguments, wrong])
        assert result.exit_code == 1 and sentence in result.output and len(result.output.strip().splitlines()) == 1
