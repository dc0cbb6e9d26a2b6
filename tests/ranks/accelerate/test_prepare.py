"""``Accelerator.prepare``: what it shards, which models and optimizers it takes, and what it refuses on every rank."""

import gc
import logging
import re
import warnings
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from harness.compare import (
    assert_gradients_equal,
    assert_losses_equal,
    assert_same_tensors,
    full_grads,
    full_parameters,
)
from harness.meshes import MESHES, each_mesh, run_on_mesh
from harness.models import LORA_7, build_model, lora
from harness.oracle import loss_and_grads
from harness.pool import expect_error, run_distributed
from harness.training import LORA, batches_for, build, data_rank, trainable
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import (
    LlamaForCausalLM,
)

from hf_automodel_parallel import AutoParallelismConfig, PrepareError
from ranks.accelerate.jobs import TP2, adapt, batch, make_accelerator, prepared_llama, sgd


def two_models() -> None:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**TP2))
    first, second = build_model("llama"), build_model("llama", seed=1)
    accelerator.prepare(first, second, sgd(first))


@pytest.mark.core
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


@pytest.mark.core_cases("missing--tp2", "foreign--fsdp2", "before_peft--tp2_fsdp2")
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


@pytest.mark.core_cases("full-tp2", "lora-fsdp2")
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


@pytest.mark.core_cases("tensor_parallel")
@pytest.mark.parametrize("kind", ["tensor_parallel", "fsdp"])
def test_model_that_is_sharded_already(kind):
    expect_error(2, already_sharded, kind, match=r"already sharded by other code \(\d+ DTensor parameters.*tp_plan")


def on_meta() -> None:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**TP2))
    with torch.device("meta"):
        model = build_model("llama")
    accelerator.prepare(model, sgd(model))


@pytest.mark.core
def test_model_without_values():
    """Trained as it is, it would learn from whatever is in the memory."""
    expect_error(
        2, on_meta, match=r"parameters have no values and no files .*\(model\.embed_tokens\.weight.*from_pretrained"
    )


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


def names_of(sizes: dict[str, int]) -> tuple[str, str]:
    _, model = prepared_llama(**sizes)
    return model._get_name(), type(model.model.layers[0]).__name__


@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"dp_shard_size": 2}], ids=["tp2", "fsdp2"])
def test_classes_keep_their_names(sizes):
    """The Trainer looks the class name up to decide whether label smoothing shifts the labels."""
    assert run_distributed(2, names_of, sizes) == [("LlamaForCausalLM", "LlamaDecoderLayer")] * 2


def messages_of_wrong_order() -> list[str]:
    accelerator, model = prepared_llama(tp_size=2)
    compiled = torch.compile(build_model("llama"), backend="eager")
    messages = []
    for call in (lambda: accelerator.prepare(compiled, sgd(compiled)), lambda: model.resize_token_embeddings(512)):
        try:
            call()
        except PrepareError as error:
            messages.append(str(error))
    return messages


def test_what_comes_too_early_or_too_late_is_named():
    compiled, resized = run_distributed(2, messages_of_wrong_order)[0]
    assert "compiled by torch.compile before prepare" in compiled and "compile=True" in compiled
    assert "Resize the model before prepare" in resized


def evaluate_with_a_plain_accelerator() -> None:
    from accelerate.state import AcceleratorState

    _, model = prepared_llama(tp_size=2)
    AcceleratorState._reset_state()  # what a second TrainingArguments does
    Accelerator(cpu=True)
    with torch.no_grad():
        model.eval()(**batches_for(model, 1)[0])


def test_second_trainer_without_the_config_is_refused():
    """It would deal different batches to the ranks of one tp group, which would add them up."""
    expect_error(2, evaluate_with_a_plain_accelerator, match="same AutoParallelismConfig")


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


@pytest.mark.core
def test_fsdp2_and_tp_through_accelerate():
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


@pytest.mark.core
@pytest.mark.parametrize("adapter", [None, {"target_modules": LORA_7}], ids=["built", "peft_wrapped"])
def test_tp_size_shards_an_already_built_model(adapter):
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


@pytest.mark.core_cases("tp_size")
@needs_native
@pytest.mark.parametrize("native", [{"fsdp_size": 2}, {"tp_size": 2}], ids=lambda n: next(iter(n)))
def test_natively_sharded_model_is_refused_by_name(native, tmp_path):
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
def test_natively_sharded_model_is_refused_by_the_trainer(tmp_path):
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


def evaluate_only(sizes: dict[str, int], dp_size: int) -> float:
    accelerator = make_accelerator(sizes)
    model = build("llama_tied")
    batches = batches_for(model, dp_size)
    model = accelerator.prepare(model)
    model.eval()
    with torch.no_grad():
        loss = model(**batches[data_rank(accelerator)], use_cache=False).loss
    return accelerator.gather_for_metrics(loss).mean().item()


@pytest.mark.core
@each_mesh
def test_model_prepared_alone_evaluates_as_one_process(mesh):
    reference = build("llama_tied")
    want, _ = loss_and_grads(reference, batches_for(reference, MESHES[mesh][2]))
    for loss in run_on_mesh(mesh, evaluate_only):
        assert_losses_equal(loss, want)


def train_what_was_prepared_alone(sizes: dict[str, int], dp_size: int) -> None:
    accelerator = make_accelerator(sizes)
    model = accelerator.prepare(build("llama"))
    model.train()
    model(**batches_for(model, 1)[0], use_cache=False)


def test_training_a_model_prepared_alone_is_refused():
    expect_error(2, train_what_was_prepared_alone, {"tp_size": 2}, 1, match="prepared without an optimizer")


def unwrapped(sizes: dict[str, int], dp_size: int) -> dict[str, Any]:
    accelerator = make_accelerator(sizes)
    plain, adapted = build("llama"), build("llama", LORA)
    prepared, _ = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    inner = accelerator.unwrap_model(prepared)
    prepared_adapted, _ = accelerator.prepare(adapted, torch.optim.SGD(trainable(adapted), lr=0.1))
    inner_adapted = accelerator.unwrap_model(prepared_adapted)
    return {
        "same_object": inner is plain and inner_adapted is adapted,
        "classes": isinstance(inner, LlamaForCausalLM) and isinstance(inner_adapted, PeftModel),
        "state_dict": accelerator.get_state_dict(prepared),
        "parameters": full_parameters(prepared),
    }


@pytest.mark.core_cases("tp2")
@pytest.mark.parametrize("mesh", ["tp2", "tp2_fsdp2"])
def test_unwrap_model_and_get_state_dict(mesh):
    results = run_on_mesh(mesh, unwrapped)
    assert all(r["same_object"] and r["classes"] for r in results)
    assert_same_tensors(results[0]["state_dict"], results[0]["parameters"], rtol=0, atol=0)
    assert_same_tensors(
        results[0]["parameters"], {n: p.detach() for n, p in build("llama").named_parameters()}, rtol=0, atol=0
    )


def forget(sizes: dict[str, int], dp_size: int) -> bool:
    accelerator = make_accelerator(sizes)
    model = build("llama")
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    known = weakref.ref(model)
    accelerator.free_memory()
    del model, optimizer
    gc.collect()
    return known() is None


@pytest.mark.core
def test_a_prepared_model_can_be_freed():
    """A script that trains one model after the other must not keep all of them."""
    assert run_on_mesh("tp2", forget) == [True, True]


def write_after_evaluation(sizes: dict[str, int], dp_size: int) -> list[float]:
    """Losses of an evaluation, of one after all parameters were halved in place, and of one process's halved model."""
    accelerator = make_accelerator(sizes)
    model = build("llama")
    batch = batches_for(model, 1)[0]
    halved = build("llama")
    with torch.no_grad():
        for parameter in halved.parameters():
            parameter.mul_(0.5)
        want = halved(**batch).loss.item()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with torch.no_grad():
        before = model(**batch).loss.item()
        for parameter in model.parameters():
            parameter.mul_(0.5)
        return [before, model(**batch).loss.item(), want]


@pytest.mark.core_cases("tp2_fsdp2")
@pytest.mark.parametrize("mesh", ["tp2", "tp2_fsdp2"])
def test_parameters_written_after_an_evaluation_are_used(mesh):
    """An averaged or clamped model: FSDP2 leaves the last units gathered after a forward without gradients."""
    for before, after, want in run_on_mesh(mesh, write_after_evaluation):
        assert after == pytest.approx(want, rel=1e-6) and after != pytest.approx(before, rel=1e-3)
