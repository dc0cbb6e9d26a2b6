"""QLoRA: bitsandbytes' 4-bit weights under FSDP2 at parity; what cannot be sharded is refused by name."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from harness.compare import assert_gradients_equal, assert_losses_equal, full_grads, mean_over_ranks
from harness.meshes import MESHES
from harness.models import build_model
from harness.pool import run_distributed
from harness.training import batches_for, data_rank, trainable
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_automodel_parallel import AutoParallelismConfig
from hf_automodel_parallel.errors import AutoParallelError

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
NF4: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": FLOAT32}

#: label -> (BitsAndBytesConfig, options of LoRA)
CELLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "stored as bytes": (NF4, {}),
    "stored as float32": ({**NF4, "bnb_4bit_quant_storage": FLOAT32}, {}),
    "nested": ({**NF4, "bnb_4bit_quant_storage": BFLOAT16, "bnb_4bit_use_double_quant": True}, {}),
    "dora": ({**NF4, "bnb_4bit_quant_storage": FLOAT32}, {"use_dora": True}),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("base")
    build_model("llama").save_pretrained(directory)
    return str(directory)


def quantized(
    directory: str, quantization: dict[str, Any], options: dict[str, Any], dtype: torch.dtype = FLOAT32
) -> torch.nn.Module:
    """The way of every QLoRA script: load quantised, prepare_model_for_kbit_training, wrap."""
    base = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=BitsAndBytesConfig(**quantization), dtype=dtype, device_map={"": "cpu"}
    )
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    values = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "target_modules": "all-linear", **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **values)).train()


def two_steps(directory: str, sizes: dict[str, int], dp_size: int, disturb: bool) -> dict[str, list[Any]]:
    """Label -> (loss, gradients) of two steps of SGD with an evaluation between them, and its loss."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    results: dict[str, list[Any]] = {}
    for label, cell in CELLS.items():
        model = quantized(directory, *cell)
        if disturb and dist.get_rank() == 1:  # scales are no parameters, and rank 0's count all the same
            for module in model.modules():
                if getattr(module, "quant_state", None) is not None:
                    module.quant_state.absmax.zero_()
        batches = batches_for(model, dp_size)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=1e-3))
        seen = results.setdefault(label, [])
        for _ in range(2):
            loss = model(**batches[data_rank(accelerator)]).loss
            accelerator.backward(loss)
            seen.append((mean(loss), full_grads(model)))
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                model.eval()
                seen.append((mean(model(**batches[data_rank(accelerator)]).loss), {}))
                model.train()
        accelerator.free_memory()
    return results


def mean(loss: torch.Tensor) -> float:
    return mean_over_ranks(loss)


@pytest.mark.core_cases("fsdp2-True")
@pytest.mark.parametrize("mesh, disturb", [("fsdp2", True), ("hsdp", False)])
def test_training_equals_one_process(mesh, disturb, checkpoint):
    world, sizes, dp_size = MESHES[mesh]
    results = run_distributed(world, two_steps, checkpoint, sizes, dp_size, disturb)[0]
    for label, seen in results.items():
        reference = quantized(checkpoint, *CELLS[label])
        optimizer = torch.optim.SGD(trainable(reference), lr=1e-3)
        batches = batches_for(reference, dp_size)
        for step in range(2):
            loss = torch.stack([reference(**batch).loss for batch in batches]).mean()
            loss.backward()
            assert_losses_equal(seen[2 * step][0], loss.item())
            want = {name: p.grad for name, p in reference.named_parameters()}
            assert_gradients_equal(seen[2 * step][1], want)
            optimizer.step()
            optimizer.zero_grad()
            # In train mode: in eval mode bitsandbytes computes in bfloat16 on some CPUs, and converts the weights for
            # good.
            with torch.no_grad():
                loss = torch.stack([reference(**batch).loss for batch in batches]).mean()
            assert_losses_equal(seen[2 * step + 1][0], loss.item())


IN_BFLOAT16 = {**NF4, "bnb_4bit_quant_storage": BFLOAT16, "bnb_4bit_compute_dtype": BFLOAT16}


def adapter_file(directory: str, sizes: dict[str, int], mixed: str) -> dict[str, torch.Tensor]:
    """Train in mixed precision with bytes stored as bfloat16, save the adapter."""
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes), mixed_precision=mixed)
    model = quantized(directory, IN_BFLOAT16, {}, BFLOAT16)
    batch = batches_for(model, 2)[data_rank(accelerator)]
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.0))
    accelerator.backward(model(**batch).loss)
    optimizer.step()
    state = accelerator.get_state_dict(model)
    model.save_pretrained(f"{directory}/adapter", state_dict=state, is_main_process=accelerator.is_main_process)
    try:
        model.merge_adapter()
    except AutoParallelError as error:
        return {"message": str(error)}
    return {}


def test_mixed_precision_and_saving(checkpoint):
    for result in run_distributed(2, adapter_file, checkpoint, {"dp_shard_size": 2}, "bf16"):
        assert "quantised weights is not available" in result["message"]
    from safetensors.torch import load_file

    saved = load_file(f"{checkpoint}/adapter/adapter_model.safetensors")
    model = quantized(checkpoint, IN_BFLOAT16, {}, BFLOAT16)
    want = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    assert saved.keys() == want.keys()
    assert all(torch.equal(saved[name], want[name]) for name in saved)


def prepare_errors(directory: str, sizes: dict[str, int], cells: list[Any], mixed: str) -> list[str]:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes), mixed_precision=mixed)
    messages = []
    for quantization, evaluate in cells:
        model = quantized(directory, quantization, {})
        if evaluate:
            for module in model.modules():
                if getattr(module, "quant_state", None) is not None:
                    module.quant_state.packing_format_for_cpu = True  # what a forward in eval mode does on some CPUs
        try:
            accelerator.prepare(model, torch.optim.SGD(trainable(model)))
            messages.append("prepared")
        except AutoParallelError as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages


EIGHT = {"load_in_8bit": True}
AS_FLOAT32 = {**NF4, "bnb_4bit_quant_storage": FLOAT32}


@pytest.mark.core_cases("tp2")
@pytest.mark.parametrize(
    "sizes, mixed, cells, words",
    [
        ({"tp_size": 2}, "no", [(NF4, False), (EIGHT, False)], ["quantised with bitsandbytes; tensor parallelism"] * 2),
        (
            {"dp_shard_size": 2},
            "no",
            [(EIGHT, False), (NF4, True)],
            ["is a Int8Params, which FSDP2 cannot shard", "converted for inference on the CPU"],
        ),
        ({"dp_shard_size": 2}, "bf16", [(AS_FLOAT32, False)], ["Set bnb_4bit_quant_storage=torch.bfloat16"]),
    ],
    ids=["tp2", "fsdp2", "mixed precision"],
)
def test_refused_by_name(sizes, mixed, cells, words, checkpoint):
    for messages in run_distributed(2, prepare_errors, checkpoint, sizes, cells, mixed):
        assert all(word in message for word, message in zip(words, messages, strict=True)), messages
