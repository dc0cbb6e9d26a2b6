"""What the stock stack gets wrong, one test per gap, passing with this package.

The numbers are those of the list of gaps measured on torch 2.13, transformers 5.23, accelerate 1.15 and peft 0.21. The
other numbers have their tests elsewhere: 3, 8, 11 and 15 in test_gaps_checkpointing.py, checkpoints and exports (6,
12).
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator, ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin
from harness.compare import assert_gradients_equal, assert_losses_equal, full_grads, full_parameters
from harness.meshes import MESHES
from harness.models import LORA_7, build_model
from harness.oracle import loss_and_grads, train_steps
from harness.pool import expect_error, run_distributed
from harness.training import batches_for, build, data_rank, first_gradients, trainable
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard

from hf_automodel_parallel import AutoParallelismConfig

#: name -> (world size, size fields, number of data-parallel ranks)


def check_first_step(model: str, mesh: str, adapter: dict[str, Any]) -> dict[str, torch.Tensor | None]:
    """The first loss and all gradients equal one process; returns the gradients."""
    world, sizes, dp_size = MESHES[mesh]
    loss, gradients = run_distributed(world, first_gradients, model, sizes, adapter=adapter, dp_size=dp_size)[0]
    reference = build(model, adapter)
    want_loss, want = loss_and_grads(reference, batches_for(reference, dp_size))
    assert_losses_equal(loss, want_loss)
    assert_gradients_equal(gradients, want)
    return gradients


def assert_bitwise_equal(by_rank: list[dict[str, torch.Tensor]]) -> None:
    """Every rank reports the same tensors, to the last bit."""
    for rank, tensors in enumerate(by_rank):
        assert tensors.keys() == by_rank[0].keys()
        different = [name for name, tensor in tensors.items() if not torch.equal(tensor, by_rank[0][name])]
        assert not different, f"rank {rank} differs from rank 0 in {len(different)} tensors: {different[:4]}"


# ---- 1: LoRA on row-wise layers ------------------------------------------------------------------------------------


def test_gap_01_lora_on_row_wise_targets():
    """Stock: PEFT's adapter of `o_proj` / `down_proj` has the shape of the shard; the first forward crashes."""
    gradients = check_first_step("llama", "tp2", {"target_modules": LORA_7})
    row_wise = [
        n for n, g in gradients.items() if ("o_proj" in n or "down_proj" in n) and "lora" in n and g is not None
    ]
    assert len(row_wise) == 2 * 2 * 2  # layers x projections x {A, B}


def test_gap_01_lora_on_a_two_dimensional_mesh():
    """Stock: there, adapters of q and v alone crash already."""
    check_first_step("llama", "tp2_fsdp2", {"target_modules": ["q_proj", "v_proj"]})


# ---- 2: FSDP2 + TP through Accelerate ------------------------------------------------------------------------------


def gradients_with_explicit_plugin(sizes: dict[str, int], dp_size: int) -> dict[str, Any]:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes), fsdp_plugin=plugin)
    model = build("llama")
    batches = batches_for(model, dp_size)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    accelerator.backward(model(**batches[data_rank(accelerator)], use_cache=False).loss)
    weight = model.model.layers[0].self_attn.q_proj.weight
    return {
        "gradients": full_grads(model),
        "same_plugin": accelerator.state.fsdp_plugin is plugin,
        "is_fsdp2": accelerator.is_fsdp2,
        "axes": weight.device_mesh.mesh_dim_names,
        "local_shape": tuple(weight.to_local().shape),
        "class": type(model).__mro__[1].__name__,
    }


def test_gap_02_fsdp2_and_tp_through_accelerate():
    """Stock: `_prepare_tp` imports a name that transformers no longer has, so no script reaches FSDP2 with TP."""
    world, sizes, dp_size = MESHES["tp2_fsdp2"]
    results = run_distributed(world, gradients_with_explicit_plugin, sizes, dp_size)
    reference = build("llama")
    _, want = loss_and_grads(reference, batches_for(reference, dp_size))
    for result in results:
        assert result["same_plugin"] and result["is_fsdp2"]
        assert result["axes"] == ("dp_shard", "tp")
        assert result["local_shape"] == (64 // 4, 64)
    assert_gradients_equal(results[0]["gradients"], want)


# ---- 4: adapters at both ends on a 2-D mesh ------------------------------------------------------------------------

ENDS = {"target_modules": ["embed_tokens", "lm_head"]}


def three_steps(sizes: dict[str, int], dp_size: int, adapter: dict[str, Any]) -> tuple[list, dict[str, torch.Tensor]]:
    """Losses of three AdamW steps and, from every rank, the trainable parameters after them."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = build("llama", adapter)
    steps = [batches_for(model, dp_size, seed=10 + step) for step in range(3)]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0))
    losses = []
    for batches in steps:
        loss = model(**batches[data_rank(accelerator)], use_cache=False).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    return losses, {name: tensor for name, tensor in full_parameters(model).items() if name in learned}


def test_gap_04_lora_on_embedding_and_head_of_a_two_dimensional_mesh():
    """Stock: their adapters live on the tp mesh alone, so nothing averages them over fsdp (gradients off by 150 %)."""
    world, sizes, dp_size = MESHES["tp2_fsdp2"]
    gradients = check_first_step("llama", "tp2_fsdp2", ENDS)
    assert len([n for n, g in gradients.items() if g is not None]) == 4
    results = run_distributed(world, three_steps, sizes, dp_size, ENDS)
    assert_bitwise_equal([parameters for _, parameters in results])
    reference = build("llama", ENDS)
    steps = [batches_for(reference, dp_size, seed=10 + step) for step in range(3)]
    want = train_steps(reference, steps, lr=1e-2)
    assert_losses_equal(results[0][0], [step["loss"] for step in want])
    learned = {n: p.detach() for n, p in reference.named_parameters() if p.requires_grad}
    for name, parameter in learned.items():
        torch.testing.assert_close(
            results[0][1][name], parameter, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


# ---- 5: TP asked for is TP applied ---------------------------------------------------------------------------------


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def prepare_and_describe(adapter: dict[str, Any] | None) -> tuple[dict[str, tuple], list[str]]:
    """Class, placement on tp and local shape of each parameter of the first layer; everything that was logged."""
    records = _Records()
    logging.getLogger().addHandler(records)
    logging.getLogger("accelerate").addHandler(records)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
        model = build("llama", adapter)
        model, _ = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
    parameters = {
        name.partition("layers.0.")[2]: (
            type(p.data),
            p.placements[p.device_mesh.mesh_dim_names.index("tp")],
            tuple(p.to_local().shape),
        )
        for name, p in model.named_parameters()
        if "layers.0." in name
    }
    return parameters, records.messages + [str(w.message) for w in caught]


@pytest.mark.parametrize("adapter", [None, {"target_modules": LORA_7}], ids=["built", "peft_wrapped"])
def test_gap_05_tp_size_shards_an_already_built_model(adapter):
    """Stock: such a model trains without TP, and a warning says to ignore it."""
    base = "" if adapter is None else "base_layer."
    want = {
        f"self_attn.q_proj.{base}weight": (Shard(0), (32, 64)),
        f"self_attn.k_proj.{base}weight": (Shard(0), (16, 64)),
        f"self_attn.o_proj.{base}weight": (Shard(1), (64, 32)),
        f"mlp.up_proj.{base}weight": (Shard(0), (64, 64)),
        f"mlp.down_proj.{base}weight": (Shard(1), (64, 64)),
        "input_layernorm.weight": (Replicate(), (64,)),
    }
    if adapter is not None:
        want |= {
            "self_attn.q_proj.lora_A.default.weight": (Replicate(), (4, 64)),
            "self_attn.q_proj.lora_B.default.weight": (Shard(0), (32, 4)),
            "mlp.down_proj.lora_A.default.weight": (Shard(1), (4, 64)),
            "mlp.down_proj.lora_B.default.weight": (Replicate(), (64, 4)),
        }
    for parameters, messages in run_distributed(2, prepare_and_describe, adapter):
        assert {kind for kind, _, _ in parameters.values()} == {DTensor}
        assert {name: parameters[name][1:] for name in want} == want
        assert not [m for m in messages if "TP preparation" in m or "not sharded" in m]


# ---- 7: the output projection --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", ["tp2", "tp2_fsdp2"])
def test_gap_07_modules_to_save_of_the_head(mesh):
    """Stock: PEFT's copy of a sharded head crashes in deepcopy."""
    gradients = check_first_step(
        "llama", mesh, {"target_modules": ["q_proj", "o_proj"], "modules_to_save": ["lm_head"]}
    )
    assert gradients["base_model.model.lm_head.modules_to_save.default.weight"].shape == (128, 64)


def test_gap_07_lora_on_the_head():
    """Stock: its adapter (`colwise_gather_output`) has the wrong shape."""
    check_first_step("llama", "tp2", {"target_modules": ["lm_head"]})


# ---- 9: models that transformers sharded itself --------------------------------------------------------------------


def prepare_a_model_sharded_by_transformers(path: str, native: dict[str, int], sizes: dict[str, int]) -> None:
    from transformers.distributed import DistributedConfig

    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = transformers.AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(**native))
    assert any(isinstance(p, DTensor) for p in model.parameters()), "transformers has not sharded this model"
    accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))


needs_native = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23),
    reason="DistributedConfig(fsdp_size=...) is of transformers 5.23",
)


@needs_native
@pytest.mark.parametrize("native", [{"fsdp_size": 2}, {"tp_size": 2}], ids=lambda n: next(iter(n)))
def test_gap_09_natively_sharded_model_is_refused_by_name(native, tmp_path):
    """Stock: a plain loop wraps it in DDP and crashes."""
    build_model("llama").save_pretrained(tmp_path)
    expect_error(
        2,
        prepare_a_model_sharded_by_transformers,
        str(tmp_path),
        native,
        {"tp_size": 2},
        match=r"already sharded by transformers' DistributedConfig.*without distributed_config",
        within=60,
    )


def train_a_model_sharded_by_transformers(path: str, native: dict[str, int], sizes: dict[str, int]) -> None:
    from transformers.distributed import DistributedConfig

    args = transformers.TrainingArguments(
        output_dir=path,
        use_cpu=True,
        max_steps=1,
        save_strategy="no",
        report_to=[],
        parallelism_config=AutoParallelismConfig(**sizes),
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(**native))
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
    transformers.Trainer(model, args, train_dataset=rows).train()


@needs_native
def test_gap_09_natively_sharded_model_is_refused_by_the_trainer(tmp_path):
    """Trainer prepares such a model in another way (for evaluation), in which the config must not be lost silently."""
    build_model("llama").save_pretrained(tmp_path)
    expect_error(
        2,
        train_a_model_sharded_by_transformers,
        str(tmp_path),
        {"fsdp_size": 2},
        {"dp_shard_size": 2},
        match=r"already sharded by transformers' DistributedConfig",
        within=60,
    )


# ---- 10: fused and foreach optimizers ------------------------------------------------------------------------------


def two_steps(sizes: dict[str, int], dp_size: int, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The change of each trainable parameter in two AdamW steps, all parameters in one group."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    adapter = {"target_modules": ["q_proj", "o_proj"], "modules_to_save": ["norm", "lm_head"]}
    model = build("llama", adapter)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    batches = batches_for(model, dp_size)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-2, **options))
    for _ in range(2):
        accelerator.backward(model(**batches[data_rank(accelerator)], use_cache=False).loss)
        optimizer.step()
        optimizer.zero_grad()
    return {n: p - before[n] for n, p in full_parameters(model).items() if n in before}


@pytest.mark.parametrize("mesh", ["tp2", "tp2_fsdp2"])
def test_gap_10_fused_and_foreach_adamw(mesh):
    """Stock: DTensors and plain tensors in one group crash both; here every parameter is a DTensor."""
    world, sizes, dp_size = MESHES[mesh]
    loop, fused, foreach = (
        run_distributed(world, two_steps, sizes, dp_size, options)[0]
        for options in ({"foreach": False}, {"fused": True}, {"foreach": True})
    )
    assert any("norm" in name for name in loop) and any("lora_A" in name for name in loop)
    for name, change in loop.items():
        assert change.abs().max() > 1e-3, f"{name} has not moved"
        torch.testing.assert_close(fused[name], change, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(foreach[name], change, rtol=1e-4, atol=1e-6)


# ---- 13: random numbers --------------------------------------------------------------------------------------------

DROPOUT_CELLS = {
    "lora_dropout": ("llama", {"target_modules": LORA_7, "lora_dropout": 0.1}, {}),
    "residual_dropout": ("phi3", None, {"resid_pdrop": 0.1, "embd_pdrop": 0.1}),
}


def five_steps_with_dropout(cell: str, sizes: dict[str, int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Trains with another seed on each rank. Returns this rank's view of the parameters and its random state."""
    name, adapter, overrides = DROPOUT_CELLS[cell]
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = build(name, adapter, **overrides)
    torch.manual_seed(1000 + dist.get_rank())
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-2))
    model.train()
    for step in range(5):
        batch = batches_for(model, 2, seed=10 + step)[data_rank(accelerator)]
        accelerator.backward(model(**batch, use_cache=False).loss)
        optimizer.step()
        optimizer.zero_grad()
    return full_parameters(model), torch.get_rng_state()


@pytest.mark.parametrize("mesh", ["tp2", "tp2_fsdp2"])
@pytest.mark.parametrize("cell", DROPOUT_CELLS)
def test_gap_13_dropout_does_not_let_replicas_drift(cell, mesh):
    """Stock: with a seed per rank, the replicated `lora_A` is 0.32 apart after five steps.

    `full_parameters` gathers only what is sharded, so what is replicated over tp is this rank's own copy.
    """
    world, sizes, dp_size = MESHES[mesh]
    results = run_distributed(world, five_steps_with_dropout, cell, sizes)
    assert_bitwise_equal([parameters for parameters, _ in results])
    states = [state for _, state in results]
    for rank in range(0, world, 2):
        assert torch.equal(states[rank], states[rank + 1]), "the ranks of a tp group draw different masks"
    if dp_size == 2:
        assert not torch.equal(states[0], states[2]), "data-parallel ranks draw the same masks"


def gradients_with_dropout() -> dict[str, torch.Tensor | None]:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=2))
    model = build("llama", COLUMN_WISE_DROPOUT)
    torch.manual_seed(1000 + dist.get_rank())
    model, _ = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=1e-3))
    model.train()
    accelerator.backward(model(**batches_for(model, 1)[0], use_cache=False).loss)
    return full_grads(model)


COLUMN_WISE_DROPOUT = {"target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], "lora_dropout": 0.1}


def test_gap_13_masks_are_those_of_one_process():
    """The input of a column-wise adapter is replicated: with rank 0's seed, one process draws the very same masks."""
    gradients = run_distributed(2, gradients_with_dropout)[0]
    reference = build("llama", COLUMN_WISE_DROPOUT).train()
    torch.manual_seed(1000)
    _, want = loss_and_grads(reference, batches_for(reference, 1))
    assert_gradients_equal(gradients, want)


# ---- 14: geometry that does not divide, models without a plan ------------------------------------------------------


def just_prepare(model: str, adapter: dict[str, Any] | None, sizes: dict[str, int]) -> None:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    built = build(model, adapter)
    accelerator.prepare(built, torch.optim.AdamW(trainable(built), lr=1e-3))


@pytest.mark.parametrize("adapter", [None, {}], ids=["full", "lora"])
@pytest.mark.parametrize(
    "model, message",
    [
        ("llama_odd_heads", r"num_key_value_heads=3 does not divide by tp_size=2"),
        ("gpt2", r"GPT2LMHeadModel.*(tp_plan|tp_size=1)"),
    ],
)
def test_gap_14_what_cannot_be_sharded_is_a_clear_error_on_all_ranks(model, message, adapter):
    """Stock: a single key/value head dies in the model's `view()`, deep inside the first forward."""
    sizes = {"tp_size": 2, "plan_order": ("hf", "registry", "default")}  # without deriving one
    expect_error(2, just_prepare, model, adapter, sizes, match=rf"(?s){message}")


# ---- 16: the plugin and the mesh on CPU ----------------------------------------------------------------------------


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


def test_gap_16_parallelism_config_and_plugin_are_accepted_on_cpu():
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


def test_gap_16_reshard_after_forward():
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


@pytest.mark.parametrize("policy", WRAP_POLICIES)
@pytest.mark.parametrize("mesh", ["fsdp2", "tp2_fsdp2"])
def test_gap_16_wrap_policies(mesh, policy):
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


def test_gap_16_unknown_class_to_wrap_is_an_error():
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


@pytest.mark.parametrize(
    "kind, present",
    [("SHARDED_STATE_DICT", "pytorch_model_fsdp_0/.metadata"), ("FULL_STATE_DICT", "pytorch_model_fsdp.bin")],
)
def test_gap_16_state_dict_type(kind, present, tmp_path):
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


def test_gap_16_mixed_precision_policy():
    for result in run_distributed(2, dtypes_with_policy):
        assert result["weight"] == result["output"] == torch.bfloat16
        assert result["gradients"] == result["stored"] == {torch.float32}


def offload_of(cpu_offload: Any) -> tuple[str, list[bool]]:
    accelerator, model, optimizer = prepared_with_plugin(cpu_offload=cpu_offload)
    one_step(accelerator, model, optimizer)
    group = model.model.layers[0]._get_fsdp_state()._fsdp_param_group
    return type(group.offload_policy).__name__, [p.offload_to_cpu for p in group.fsdp_params]


@pytest.mark.parametrize("policy", [True, CPUOffloadPolicy(pin_memory=False)], ids=["true", "policy"])
def test_gap_16_cpu_offload(policy):
    for name, offloaded in run_distributed(2, offload_of, policy):
        assert name == "CPUOffloadPolicy" and offloaded and all(offloaded)


def placements_with_ignored_modules(ignored: str) -> dict[str, list[str]]:
    accelerator, model, _ = prepared_with_plugin(ignored_modules=ignored)
    names = {True: [], False: []}
    for name, parameter in model.named_parameters():
        names[isinstance(parameter, DTensor)].append(name)
    return {"sharded": names[True], "plain": names[False]}


def test_gap_16_ignored_modules():
    for result in run_distributed(2, placements_with_ignored_modules, r"model\.layers\.0\.mlp.*"):
        assert sorted(result["plain"]) == [f"model.layers.0.mlp.{p}_proj.weight" for p in ("down", "gate", "up")]
        assert "model.layers.1.mlp.up_proj.weight" in result["sharded"]
