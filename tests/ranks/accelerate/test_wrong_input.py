"""What a user can get wrong ends in one clear error on *every* rank within seconds: never a hang, never a wrong
result.
"""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, FullyShardedDataParallelPlugin
from harness.compare import assert_gradients_equal, full_grads
from harness.meshes import MESHES, each_mesh
from harness.models import build_model, lora, make_batches
from harness.pool import expect_error, run_distributed
from peft import OFTConfig, PromptTuningConfig, get_peft_model
from torch import nn

from hf_automodel_parallel import AutoParallelismConfig

TP2 = {"tp_size": 2}
FSDP2 = {"dp_shard_size": 2}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def batch(rows: int = 2) -> dict[str, torch.Tensor]:
    return make_batches(1, rows, 8, 128, seed=3)[0]


def prepare(
    sizes: Any, model: str = "llama", overrides: dict[str, Any] | None = None, adapter: Any = None, **accelerator: Any
) -> tuple[Accelerator, nn.Module, torch.optim.Optimizer]:
    """The usual calls, with the parts that a test gets wrong as arguments; runs on every rank."""
    config = AutoParallelismConfig.parse(sizes)
    accelerator = Accelerator(parallelism_config=config, **accelerator)
    network = build_model(model, **(overrides or {}))
    network = network if adapter is None else adapt(network, adapter)
    return accelerator, *accelerator.prepare(network, sgd(network))


def adapt(model: nn.Module, adapter: str | dict[str, Any]) -> nn.Module:
    if isinstance(adapter, dict):
        return lora(model, **adapter)
    torch.manual_seed(1)
    if adapter == "dora":
        return lora(model, use_dora=True, target_modules=["q_proj", "down_proj"])
    if adapter == "oft":
        return get_peft_model(model, OFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], oft_block_size=4))
    if adapter == "prompt":
        return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    raise ValueError(adapter)


def call_prepare(*args: Any, **kwargs: Any) -> None:
    prepare(*args, **kwargs)


# ---- the config ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "world, sizes, message",
    [
        (2, {"tp": 3}, r"tp_size=3.* multiply to 3, but there are 2 processes\. Start 3 processes"),
        (2, {"tp": 4}, r"tp_size=4.*but there are 2 processes\. Start 4 processes"),
        (4, {"tp": 2, "dp_shard": 4}, r"dp_shard_size=4, tp_size=2.* multiply to 8, but there are 4 processes"),
        (
            4,
            {"tp": 2, "dp_shard": 1, "dp_replicate": 1},
            r"multiply to 2, but there are 4 processes\. Start 2 processes",
        ),
        (4, {"tp": 3}, r"a multiple of 3 processes, or change a size so that the product is 4"),
    ],
    ids=["too_many", "twice_too_many", "two_axes", "too_few", "remainder"],
)
def test_sizes_that_do_not_multiply_to_the_world(world, sizes, message):
    expect_error(world, call_prepare, sizes, match=message)


@pytest.mark.parametrize(
    "text, message",
    [
        ("tq=2", r"unknown field 'tq'.*did you mean 'tp'"),
        ("tp=two", r"tp_size='two'"),
        ("sequence_parallel,tp=1", r"sequence_parallel=True with tp_size=1"),
        ("tp=2,plan_order=hugging_face", r"plan_order=\('hugging_face',\)"),
    ],
)
def test_config_that_cannot_be_read(text, message):
    expect_error(2, call_prepare, text, match=message)


def test_config_file_that_does_not_parse(tmp_path):
    path = tmp_path / "parallel.yaml"
    path.write_text("tp: [2\n")
    expect_error(2, call_prepare, str(path), match=r"parallel\.yaml' is not valid YAML or JSON")


def accelerator_with(kind: str) -> None:
    from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, TorchTensorParallelPlugin

    options: dict[str, Any] = {
        "plugin": lambda: {"torch_tp_plugin": TorchTensorParallelPlugin(tp_size=2)},
        "hook": lambda: {"kwargs_handlers": [DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.BF16)]},
    }[kind]()
    Accelerator(parallelism_config=AutoParallelismConfig(**TP2), **options)


@pytest.mark.parametrize(
    "kind, message",
    [("plugin", "torch_tp_plugin beside AutoParallelismConfig"), ("hook", "comm_hook='bf16'.*reduce_dtype")],
)
def test_what_accelerate_would_drop(kind, message):
    expect_error(2, accelerator_with, kind, match=message)


def config_after_accelerator(first_config: dict | None) -> None:
    Accelerator(parallelism_config=None if first_config is None else AutoParallelismConfig(**first_config))
    Accelerator(parallelism_config=AutoParallelismConfig(**TP2))


def test_config_that_comes_after_an_accelerator():
    """Accelerate shares one state between all Accelerators and would ignore the config without a word."""
    expect_error(
        2, config_after_accelerator, None, match=r"created after an Accelerator already exists.*the first Accelerator"
    )


def test_second_accelerator_of_a_parallel_run_is_no_mistake():
    """For example that of a second Trainer with the same arguments."""
    run_distributed(2, config_after_accelerator, TP2)


def config_depends_on_the_rank(configs: list) -> None:
    prepare(configs[dist.get_rank()])


@pytest.mark.parametrize("configs", [[{"tp": 2}, {"dp_shard": 2}], [{"dp_replicate": 2}, {}]])
def test_other_sizes_on_one_rank(configs):
    """For example two machines with different config files: each rank would wait in groups that the others never
    make.
    """
    expect_error(
        2, config_depends_on_the_rank, configs, match=r"different parallelism configs: .* on rank 0, .* on rank 1\."
    )


def test_sizes_that_do_not_fit_on_one_rank():
    messages = expect_error(
        2, config_depends_on_the_rank, [{"tp": 2}, {"tp": 4}], match=r"tp_size=4.*but there are 2 processes"
    )
    assert "failed on rank 1" in messages[0]


@pytest.mark.parametrize(
    "name, values",
    [
        ("loss_parallel", (None, False)),
        ("sequence_parallel_regather", (True, False)),
        ("activation_checkpointing", ("full", "selective")),
        ("check_optimizer", (False, True)),
    ],
)
def test_other_choices_on_one_rank(name, values):
    """One rank would wait in a collective that the other never calls."""
    configs = [{"tp": 2, "sequence_parallel": True, name: value} for value in values]
    message = (
        rf"different parallelism configs: {name}={values[0]!r} on rank 0, {name}={values[1]!r} on rank 1\. Start all"
    )
    expect_error(2, config_depends_on_the_rank, configs, match=message)


def test_what_ranks_may_write_differently():
    """The same in other words, and what each rank does alone."""
    configs = [
        {"tp": 2, "audit": True, "plan_order": ["hf"]},
        {"tp": 2, "plan_order": ["hf", "default"], "loss_chunk_size": 8},
    ]
    run_distributed(2, config_depends_on_the_rank, configs)


def plugin_depends_on_the_rank(options: list[dict[str, Any]]) -> None:
    with_plugin(TP2, {"fsdp_version": 2, **options[dist.get_rank()]})


def test_other_plugin_on_one_rank():
    message = r"option activation_checkpointing='none'.* on rank 0 and .*activation_checkpointing='full'.* on rank 1\."
    expect_error(2, plugin_depends_on_the_rank, [{}, {"activation_checkpointing": True}], match=message)


def test_other_plan_on_one_rank():
    plans = [{"tp": 2}, {"tp": 2, "tp_plan": {"lm_head": "rowwise_split_input"}}]
    expect_error(2, config_depends_on_the_rank, plans, match=r"not the same on all ranks: ranks \[1\]")


# ---- what Accelerate was given beside the config ------------------------------------------------------------------


def with_plugin(sizes: dict, options: dict[str, Any], own_checkpointing: bool = False, **config: Any) -> None:
    plugin = FullyShardedDataParallelPlugin(cpu_ram_efficient_loading=False, **options)
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes, **config), fsdp_plugin=plugin)
    model = build_model("llama")
    if own_checkpointing:
        model.gradient_checkpointing_enable()
    accelerator.prepare(model, sgd(model))


@each_mesh
def test_fsdp_version_1(mesh):
    world, sizes, _ = MESHES[mesh]
    expect_error(world, with_plugin, sizes, {"fsdp_version": 1}, match=r"fsdp_version=1.*Set fsdp_version=2")


@pytest.mark.parametrize(
    "options, own, config, message",
    [
        ({"activation_checkpointing": True}, True, {}, r"activation_checkpointing='full' and the model's own gradient"),
        ({"activation_checkpointing": True}, False, {"activation_checkpointing": "none"}, r"contradict each other"),
        (
            {"activation_checkpointing": True},
            False,
            {"activation_checkpointing": "selective"},
            r"contradict each other",
        ),
        ({}, True, {"activation_checkpointing": "submodule"}, r"'submodule' and the model's own gradient"),
    ],
    ids=["plugin_and_model", "plugin_and_none", "plugin_and_selective", "config_and_model"],
)
def test_two_wishes_for_checkpointing(options, own, config, message):
    """Layers would be recomputed twice, or one of the wishes ignored."""
    expect_error(2, with_plugin, TP2, {"fsdp_version": 2, **options}, own, match=message, **config)


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


@pytest.mark.parametrize("precision, message", [("fp16", r"fp16"), ("fp8", r"fp8")])
def test_precision_that_the_cpu_does_not_have(precision, message):
    """Whoever refuses it, we or Accelerate, does it on all ranks and names it."""
    expect_error(2, call_prepare, TP2, match=message, mixed_precision=precision)


def test_compile_backend_that_does_not_exist():
    expect_error(2, call_prepare, {**TP2, "compile": "inducktor"}, match=r"compile='inducktor'.*inductor")


def with_device_placement() -> None:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**TP2))
    model = build_model("llama")
    accelerator.prepare(model, sgd(model), device_placement=[True, False])


def test_device_placement():
    expect_error(2, with_device_placement, match=r"device_placement cannot be customised.*Leave it out")


class Numbers(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index])


def with_dispatched_batches(sizes: dict) -> list[int]:
    accelerator = Accelerator(
        parallelism_config=AutoParallelismConfig(**sizes),
        dataloader_config=DataLoaderConfiguration(dispatch_batches=True),
    )
    loader = accelerator.prepare(torch.utils.data.DataLoader(Numbers(), batch_size=2))
    return [int(value) for values in loader for value in values]


@pytest.mark.parametrize("mesh", ["tp2", "tp2_fsdp2"])
def test_dispatched_batches_under_tensor_parallelism(mesh):
    world, sizes, _ = MESHES[mesh]
    expect_error(
        world,
        with_dispatched_batches,
        sizes,
        match=r"dispatch_batches=True does not know tensor and context parallelism",
    )


def test_dispatched_batches_under_fsdp2_alone_stay_as_they_are():
    first, second = run_distributed(2, with_dispatched_batches, FSDP2)
    assert sorted(first + second) == list(range(8))


# ---- the plan -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tp_plan, message",
    [
        ({"lm_head": "columnwise"}, r"'lm_head' has the unknown style 'columnwise'"),
        ({"model.layers.*.mlp.up": "colwise"}, r"'model\.layers\.\*\.mlp\.up' match no module"),
        ({"model.norm": "colwise"}, r"shards linear layers, but model\.norm is a LlamaRMSNorm"),
        ("no_such_plan", r"tp_plan='no_such_plan' is neither a named plan"),
        ("no.such:plan", r"No module named 'no'"),
        ({}, r"is empty"),
    ],
    ids=["style", "key", "layer", "name", "import", "empty"],
)
@pytest.mark.parametrize("mesh", ["tp2", "tp2_fsdp2"])
def test_plan_that_cannot_be_used(mesh, tp_plan, message):
    world, sizes, _ = MESHES[mesh]
    expect_error(world, call_prepare, {**sizes, "tp_plan": tp_plan}, match=message)


@pytest.mark.parametrize("adapter", [None, {}], ids=["full", "lora"])
@pytest.mark.parametrize("mesh", ["tp2", "tp2_fsdp2"])
def test_heads_that_do_not_divide(mesh, adapter):
    world, sizes, _ = MESHES[mesh]
    message = r"num_key_value_heads=3 does not divide by tp_size=2"
    expect_error(world, call_prepare, sizes, "llama_odd_heads", adapter=adapter, match=message)


def test_heads_that_divide_by_two_but_not_by_four():
    six = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 6}
    message = r"num_key_value_heads=6 does not divide by tp_size=4"
    expect_error(4, call_prepare, {"tp_size": 4}, overrides=six, match=message)


def test_intermediate_size_that_does_not_divide():
    overrides = {"intermediate_size": 127}
    expect_error(2, call_prepare, TP2, overrides=overrides, match=r"gate_proj\.weight of shape \(127, 64\).*tp_size=2")


def test_model_without_a_plan():
    sizes = {**TP2, "plan_order": ["hf", "registry", "default"]}
    expect_error(
        2, call_prepare, sizes, "gpt2", match=r"no tensor-parallel plan for the class GPT2LMHeadModel.*tp_plan="
    )


def plan_fails_on_one_rank(rank: int) -> None:
    def plan() -> dict[str, str]:
        if dist.get_rank() == rank:
            raise RuntimeError("no such file")
        return {"lm_head": "colwise_gather_output"}

    prepare({**TP2, "tp_plan": plan} if rank < 2 else {"tp": 2, "dp_shard": 2, "tp_plan": plan})


@pytest.mark.parametrize("world, rank", [(2, 0), (2, 1), (4, 3)])
def test_error_on_one_rank_is_an_error_on_all(world, rank):
    """Only one rank cannot read something; the others say which rank and why instead of waiting for it."""
    messages = expect_error(world, plan_fails_on_one_rank, rank, match=r"no such file")
    for other, message in enumerate(messages):
        assert message == "no such file" or f"failed on rank {rank}" in message, (other, message)


# ---- model and optimizer ------------------------------------------------------------------------------------------


def two_models() -> None:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**TP2))
    first, second = build_model("llama"), build_model("llama", seed=1)
    accelerator.prepare(first, second, sgd(first))


def test_two_models_in_one_call():
    """Which optimizer belongs to which would be a guess."""
    expect_error(2, two_models, match=r"2 models in one prepare call \(LlamaForCausalLM, LlamaForCausalLM\)")


def with_optimizer(sizes: dict, kind: str) -> None:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = build_model("llama")
    parameters = list(model.parameters())
    if kind == "missing":
        parameters = [p for name, p in model.named_parameters() if "norm" not in name]
    elif kind == "foreign":
        parameters = list(build_model("llama").parameters())
    elif kind == "one_more":
        parameters.append(nn.Parameter(torch.zeros(3, 7)))
    elif kind == "before_peft":
        model = lora(model, modules_to_save=["lm_head"], target_modules=["q_proj"])
    elif kind == "missing_on_rank_1":
        parameters = parameters[1:] if dist.get_rank() == 1 else parameters
    accelerator.prepare(model, torch.optim.SGD(parameters, lr=0.1))


@each_mesh
@pytest.mark.parametrize(
    "kind, message",
    [
        ("missing", r"5 trainable parameters are in no optimizer.*norm.*requires_grad_\(False\)"),
        ("foreign", r"SGD holds \d+ parameters that the model in this prepare call does not have"),
        ("one_more", r"holds 1 parameters that.*\(3, 7\)"),
        ("before_peft", r"trainable parameters are in no optimizer.*lora_A"),
        ("missing_on_rank_1", r"1 trainable parameters are in no optimizer"),
    ],
    ids=lambda value: value if re.fullmatch(r"\w+", value) else "",
)
def test_optimizer_that_does_not_fit_the_model(mesh, kind, message):
    """A parameter that no optimizer has would collect gradients and never change."""
    world, sizes, _ = MESHES[mesh]
    expect_error(world, with_optimizer, sizes, kind, match=message)


def optimizer_alone(of_the_model: bool) -> None:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**TP2))
    model = accelerator.prepare(build_model("llama"))
    accelerator.prepare(sgd(model if of_the_model else build_model("llama")))


def test_optimizer_prepared_without_its_model():
    expect_error(2, optimizer_alone, False, match=r"SGD does not hold the parameters of a model prepared here")
    run_distributed(2, optimizer_alone, True)


def train_without_optimizer(sizes: dict, adapter: Any, mode: str) -> float:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = build_model("llama")
    model = accelerator.prepare(model if adapter is None else adapt(model, adapter))
    model.train(mode != "eval")
    with torch.set_grad_enabled(mode != "no_grad"):
        return model(**batch()).loss.item()


@each_mesh
@pytest.mark.parametrize("adapter", [None, {}], ids=["full", "lora"])
def test_training_a_model_that_was_prepared_alone(mesh, adapter):
    """Its optimizer would hold the old parameters, and the training do nothing."""
    world, sizes, _ = MESHES[mesh]
    expect_error(
        world, train_without_optimizer, sizes, adapter, "train", match=r"prepared without an optimizer, for evaluation"
    )


@pytest.mark.parametrize("mode", ["eval", "no_grad"])
def test_evaluating_a_model_that_was_prepared_alone(mode):
    want = build_model("llama")(**batch()).loss.item()
    assert run_distributed(2, train_without_optimizer, TP2, None, mode) == pytest.approx([want, want], rel=1e-6)


def already_sharded(kind: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**TP2))
    model = build_model("llama")
    mesh = init_device_mesh("cpu", (2,))
    if kind == "tensor_parallel":
        parallelize_module(model, mesh, {"model.layers.0.mlp.up_proj": ColwiseParallel()})
    else:
        fully_shard(model, mesh=mesh)
    accelerator.prepare(model, sgd(model))


@pytest.mark.parametrize("kind", ["tensor_parallel", "fsdp"])
def test_model_that_is_sharded_already(kind):
    expect_error(2, already_sharded, kind, match=r"already sharded by other code \(\d+ DTensor parameters.*tp_plan")


def on_meta() -> None:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**TP2))
    with torch.device("meta"):
        model = build_model("llama")
    accelerator.prepare(model, sgd(model))


def test_model_without_values():
    """Trained as it is, it would learn from whatever is in the memory."""
    expect_error(
        2, on_meta, match=r"parameters have no values and no files .*\(model\.embed_tokens\.weight.*from_pretrained"
    )


def another_model_on_one_rank(sizes: dict, rank: int, kind: str) -> None:
    here = dist.get_rank() == rank
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = build_model("llama", **({"intermediate_size": 64} if here and kind == "size" else {}))
    if here and kind == "heads":
        model = build_model("llama_odd_heads")
    if kind == "adapter":
        model = lora(model, r=8 if here else 4)
    if here and kind == "dtype":
        model = model.to(torch.bfloat16)
    if here and kind == "frozen":
        model.lm_head.requires_grad_(False)
    if here and kind == "depth":
        model = build_model("llama", num_hidden_layers=3)
    accelerator.prepare(model, sgd(model))


@pytest.mark.parametrize("kind", ["size", "heads", "adapter", "dtype", "frozen", "depth"])
@pytest.mark.parametrize("mesh, rank", [("tp2", 1), ("fsdp2", 0), ("tp2_fsdp2", 3)])
def test_another_model_on_one_rank(mesh, rank, kind):
    """Whatever differs, all ranks say so before the first collective that would wait for ever or mix up two models."""
    world, sizes, _ = MESHES[mesh]
    message = r"not the same on all ranks: ranks \["
    if kind == "heads" and "tp" in mesh:
        message = r"num_key_value_heads=3"
    messages = expect_error(world, another_model_on_one_rank, sizes, rank, kind, match=message)
    if "num_key_value_heads" not in message:  # each rank names the same difference
        assert len(set(messages)) == 1 and "for example in" in messages[0]


# ---- adapters -----------------------------------------------------------------------------------------------------


UNSUPPORTED = {
    "dora_embedding": (
        {"use_dora": True, "target_modules": ["embed_tokens"]},
        r"embed_tokens uses the LoRA variant DoraEmbedding.*tp_size=1",
    ),
    "oft": ("oft", r"is PEFT's OFT, which is not available under tensor parallelism.*tp_size=1"),
}


@pytest.mark.parametrize("adapter", UNSUPPORTED)
@pytest.mark.parametrize("mesh", ["tp2", "tp2_fsdp2"])
def test_adapter_that_tensor_parallelism_does_not_know(mesh, adapter):
    """By name and with the way out; sharded as if it were LoRA it would be wrong in silence."""
    world, sizes, _ = MESHES[mesh]
    values, message = UNSUPPORTED[adapter]
    expect_error(world, call_prepare, sizes, adapter=values, match=message)


def one_step(sizes: dict, adapter: Any, dp_size: int) -> dict[str, Any]:
    """Gradients of a first step, and whether every trainable parameter changed in it."""
    accelerator, model, optimizer = prepare(sizes, adapter=adapter)
    rows = batch(rows=2 * dp_size)
    mine = dist.get_rank() % dp_size
    loss = model(**{key: value[2 * mine : 2 * mine + 2] for key, value in rows.items()}).loss
    accelerator.backward(loss)
    gradients = full_grads(model)
    before = {name: p.detach().full_tensor().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer.step()
    changed = {
        name: not torch.equal(before[name], p.full_tensor()) for name, p in model.named_parameters() if name in before
    }
    return {"gradients": gradients, "changed": changed}


@pytest.mark.parametrize(
    "mesh, adapter",
    [*(("fsdp2", name) for name in (*UNSUPPORTED, "dora", "prompt")), ("tp2", "dora"), ("tp2", "prompt")],
)
def test_adapter_that_works(mesh, adapter):
    """The message sends people to FSDP2 alone; there the same adapters have to be right."""
    world, sizes, _ = MESHES[mesh]
    values = UNSUPPORTED[adapter][0] if adapter in UNSUPPORTED else adapter
    dp_size = 2 if mesh == "fsdp2" else 1
    result = run_distributed(world, one_step, sizes, values, dp_size)[0]
    reference = adapt(build_model("llama"), values)
    rows = batch(rows=2 * dp_size)
    for part in range(dp_size):
        (reference(**{k: v[2 * part : 2 * part + 2] for k, v in rows.items()}).loss / dp_size).backward()
    assert_gradients_equal(result["gradients"], {name: p.grad for name, p in reference.named_parameters()})
    assert result["changed"] and all(result["changed"].values()), result["changed"]


def after_an_error() -> float:
    """The same process goes on after it caught an error, as in a notebook."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**TP2))
    model = build_model("llama")
    try:
        accelerator.prepare(model, torch.optim.SGD(list(model.parameters())[1:], lr=0.1))
    except ValueError:
        pass
    model, optimizer = accelerator.prepare(model, sgd(model))
    return model(**batch()).loss.item()


def test_model_is_untouched_by_a_refused_prepare():
    """An error comes before the first change, so the corrected call works on the same objects."""
    want = build_model("llama")(**batch()).loss.item()
    assert run_distributed(2, after_an_error) == pytest.approx([want, want], rel=1e-6)


# ---- from the shell -----------------------------------------------------------------------------------------------


SCRIPT = """
import torch
from accelerate import Accelerator
from hf_automodel_parallel import AutoParallelismConfig

accelerator = Accelerator(parallelism_config=AutoParallelismConfig(tp_size=3))
print("not reached")
"""


def test_wrong_size_ends_the_launched_script(tmp_path):
    """The whole way: a shell sees a failure soon, and the message is in what the processes printed."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0, output
    assert "ConfigError: the sizes of the mesh axes (tp_size=3) multiply to 3, but there are 2 processes." in output
    assert "not reached" not in output
    assert time.monotonic() - start < 60, output
