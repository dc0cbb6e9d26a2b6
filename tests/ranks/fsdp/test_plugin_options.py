"""Options of Accelerate's FullyShardedDataParallelPlugin: applied on the CPU too, or refused by name on every rank."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin
from harness.compare import assert_gradients_equal, full_grads
from harness.meshes import MESHES, each_mesh
from harness.oracle import loss_and_grads
from harness.pool import expect_error, run_distributed
from harness.training import LORA, batches_for, build, data_rank, trainable
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from hf_automodel_parallel import AutoParallelismConfig
from ranks.accelerate.jobs import TP2, with_plugin


@pytest.mark.core
@each_mesh
def test_fsdp_version_1(mesh):
    world, sizes, _ = MESHES[mesh]
    expect_error(world, with_plugin, sizes, {"fsdp_version": 1}, match=r"fsdp_version=1.*Set fsdp_version=2")


@pytest.mark.core
def test_class_to_wrap_that_does_not_exist():
    options = {
        "fsdp_version": 2,
        "auto_wrap_policy": "transformer_based_wrap",
        "transformer_cls_names_to_wrap": ["LamaLayer"],
    }
    message = r"transformer_cls_names_to_wrap=\['LamaLayer'\].*LlamaDecoderLayer"
    expect_error(2, with_plugin, TP2, options, match=message)


def test_ignored_modules_under_tensor_parallelism():
    options = {"fsdp_version": 2, "ignored_modules": ".*norm.*"}
    expect_error(2, with_plugin, TP2, options, match=r"ignored_modules.*Remove ignored_modules or use tp_size=1")


def with_a_policy_of_its_own(sizes: dict[str, int]) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy=lambda module, **_: False)
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes), fsdp_plugin=plugin)
    model = build("llama")
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_wrap_policy_that_nobody_would_call_is_refused():
    expect_error(2, with_a_policy_of_its_own, {"dp_shard_size": 2}, match="auto_wrap_policy")
    run_distributed(2, with_a_policy_of_its_own, {"tp_size": 2})  # nothing is sharded by units


def with_the_policy_of_peft(sizes: dict[str, int], dp_size: int) -> tuple[list[str], dict]:
    """As PEFT's documentation has it: set on the plugin of an Accelerator that exists, before the model is prepared."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = build("llama", LORA)
    accelerator.state.fsdp_plugin.auto_wrap_policy = fsdp_auto_wrap_policy(model)
    batch = batches_for(model, dp_size)[data_rank(accelerator)]
    model, _ = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
    accelerator.backward(model(**batch, use_cache=False).loss)
    return fsdp_units(model), full_grads(model)


@pytest.mark.parametrize("mesh", ["fsdp2", "tp2_fsdp2"])
def test_the_wrap_policy_of_peft(mesh):
    """Its layers are the units. Units of its own for trainable leaves, which FSDP1 needs, are not made."""
    world, sizes, dp_size = MESHES[mesh]
    units, gradients = run_distributed(world, with_the_policy_of_peft, sizes, dp_size)[0]
    assert {unit for unit in units if "layers" in unit} == {f"base_model.model.model.layers.{i}" for i in range(2)}
    reference = build("llama", LORA)
    _, want = loss_and_grads(reference, batches_for(reference, dp_size))
    assert_gradients_equal(gradients, want)


def prepared_with_plugin(**plugin: Any) -> tuple[Accelerator, torch.nn.Module, Any]:
    config = AutoParallelismConfig(dp_shard_size=2)
    accelerator = Accelerator(
        parallelism_config=config, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2, **plugin)
    )
    model = build("llama")
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    return accelerator, model, optimizer


def fsdp_units(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]


def one_step(accelerator: Accelerator, model: torch.nn.Module, optimizer: Any) -> float:
    batch = batches_for(model, 2)[data_rank(accelerator)]
    loss = model(**batch, use_cache=False).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def plain_loop_on_cpu() -> dict[str, Any]:
    accelerator, model, optimizer = prepared_with_plugin()
    one_step(accelerator, model, optimizer)
    weight = model.model.layers[0].mlp.up_proj.weight
    return {
        "accepted": isinstance(accelerator.parallelism_config, ParallelismConfig),
        "axes": accelerator.torch_device_mesh.mesh_dim_names,
        "units": fsdp_units(model),
        "local": tuple(weight.to_local().shape),
        "data_parallel": type(model).__name__,
    }


@pytest.mark.core
def test_parallelism_config_and_plugin_are_accepted_on_cpu():
    """Stock: a `ParallelismConfig` is rejected there, and with a plugin alone the model ends up in DDP."""
    for result in run_distributed(2, plain_loop_on_cpu):
        assert result["accepted"] and result["axes"] == ("dp_shard",)
        assert {"", "model.layers.0", "model.layers.1"} <= set(result["units"])
        assert result["local"] == (64, 64)
        assert "DistributedDataParallel" not in result["data_parallel"]


def first_layer_is_sharded_after_forward(reshard_after_forward: bool) -> bool:
    accelerator, model, _ = prepared_with_plugin(reshard_after_forward=reshard_after_forward)
    model(**batches_for(model, 2)[0], use_cache=False)
    return isinstance(model.model.layers[0].mlp.up_proj.weight, DTensor)


@pytest.mark.core
def test_reshard_after_forward():
    assert run_distributed(2, first_layer_is_sharded_after_forward, True) == [True, True]
    assert run_distributed(2, first_layer_is_sharded_after_forward, False) == [False, False]


def units_and_gradients(sizes: dict[str, int], dp_size: int, **plugin: Any) -> tuple[list[str], dict]:
    accelerator = Accelerator(
        parallelism_config=AutoParallelismConfig(**sizes),
        fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2, **plugin),
    )
    model = build("llama")
    batch = batches_for(model, dp_size)[data_rank(accelerator)]
    model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    accelerator.backward(model(**batch, use_cache=False).loss)
    return fsdp_units(model), full_grads(model)


WRAP_POLICIES = {
    "class_names": {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_cls_names_to_wrap": ["LlamaMLP"]},
    "size_of_the_mlp": {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 3 * 64 * 128 - 1},
    "size_of_a_layer": {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 3 * 64 * 128},
}


@pytest.mark.core_cases("fsdp2-class_names", "tp2_fsdp2-size_of_the_mlp")
@pytest.mark.parametrize("policy", WRAP_POLICIES)
@pytest.mark.parametrize("mesh", ["fsdp2", "tp2_fsdp2"])
def test_wrap_policies(mesh, policy):
    """Units are where the plugin wants them, inside of layers too, and the gradients stay those of one process."""
    world, sizes, dp_size = MESHES[mesh]
    units, gradients = run_distributed(world, units_and_gradients, sizes, dp_size, **WRAP_POLICIES[policy])[0]
    layers = {"model.layers.0", "model.layers.1"}
    blocks = {f"{layer}.mlp" for layer in layers}
    assert "" in units
    assert layers <= set(units) if policy.startswith("size") else not layers & set(units)
    assert blocks <= set(units) if policy != "size_of_a_layer" else not blocks & set(units)
    reference = build("llama")
    _, want = loss_and_grads(reference, batches_for(reference, dp_size))
    assert_gradients_equal(gradients, want)


def test_unknown_class_to_wrap_is_an_error():
    expect_error(
        2,
        units_and_gradients,
        {"dp_shard_size": 2},
        2,
        auto_wrap_policy="TRANSFORMER_BASED_WRAP",
        transformer_cls_names_to_wrap=["LlamaDecoder"],
        match="no module of class LlamaDecoder",
    )


def save_with_state_dict_type(kind: str, directory: str) -> None:
    accelerator, model, optimizer = prepared_with_plugin(state_dict_type=kind)
    one_step(accelerator, model, optimizer)
    accelerator.save_state(directory)


@pytest.mark.core_cases("SHARDED_STATE_DICT-pytorch_model_fsdp_0/.metadata")
@pytest.mark.parametrize(
    "kind, present",
    [("SHARDED_STATE_DICT", "pytorch_model_fsdp_0/.metadata"), ("FULL_STATE_DICT", "pytorch_model_fsdp.bin")],
)
def test_state_dict_type(kind, present, tmp_path):
    run_distributed(2, save_with_state_dict_type, kind, str(tmp_path))
    assert (Path(tmp_path) / present).exists()


def dtypes_with_policy() -> dict[str, Any]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    accelerator, model, optimizer = prepared_with_plugin(mixed_precision_policy=policy)
    seen = {}
    model.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda module, args, output: seen.update(weight=module.weight.dtype, output=output.dtype)
    )
    accelerator.backward(model(**batches_for(model, 2)[0], use_cache=False).loss)
    return seen | {
        "gradients": {p.grad.dtype for p in model.parameters()},
        "stored": {p.dtype for p in model.parameters()},
    }


@pytest.mark.core
def test_mixed_precision_policy():
    for result in run_distributed(2, dtypes_with_policy):
        assert result["weight"] == result["output"] == torch.bfloat16
        assert result["gradients"] == result["stored"] == {torch.float32}


def offload_of(cpu_offload: Any) -> tuple[str, list[bool]]:
    accelerator, model, optimizer = prepared_with_plugin(cpu_offload=cpu_offload)
    one_step(accelerator, model, optimizer)
    group = model.model.layers[0]._get_fsdp_state()._fsdp_param_group
    return type(group.offload_policy).__name__, [p.offload_to_cpu for p in group.fsdp_params]


@pytest.mark.parametrize("policy", [True, CPUOffloadPolicy(pin_memory=False)], ids=["true", "policy"])
def test_cpu_offload(policy):
    for name, offloaded in run_distributed(2, offload_of, policy):
        assert name == "CPUOffloadPolicy" and offloaded and all(offloaded)


def placements_with_ignored_modules(ignored: str) -> dict[str, list[str]]:
    accelerator, model, _ = prepared_with_plugin(ignored_modules=ignored)
    names = {True: [], False: []}
    for name, parameter in model.named_parameters():
        names[isinstance(parameter, DTensor)].append(name)
    return {"sharded": names[True], "plain": names[False]}


@pytest.mark.core
def test_ignored_modules():
    for result in run_distributed(2, placements_with_ignored_modules, r"model\.layers\.0\.mlp.*"):
        assert sorted(result["plain"]) == [f"model.layers.0.mlp.{p}_proj.weight" for p in ("down", "gate", "up")]
        assert "model.layers.1.mlp.up_proj.weight" in result["sharded"]
