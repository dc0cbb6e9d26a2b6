"""What the ranks run in the tests of ``Accelerator.prepare``: the usual calls, what is wrong as arguments."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from harness.models import build_model, lora, make_batches
from harness.training import build, trainable
from peft import OFTConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

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


def with_plugin(sizes: dict, options: dict[str, Any], own_checkpointing: bool = False, **config: Any) -> None:
    plugin = FullyShardedDataParallelPlugin(cpu_ram_efficient_loading=False, **options)
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes, **config), fsdp_plugin=plugin)
    model = build_model("llama")
    if own_checkpointing:
        model.gradient_checkpointing_enable()
    accelerator.prepare(model, sgd(model))


def prepared_llama(**sizes: int) -> tuple[Accelerator, Any]:
    accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
    model = build("llama")
    model, _ = accelerator.prepare(model, torch.optim.SGD(trainable(model), lr=0.1))
    return accelerator, model


def make_accelerator(sizes: dict[str, int], **options: Any) -> Accelerator:
    return Accelerator(parallelism_config=AutoParallelismConfig(**sizes), **options)


CYCLE = 7  # not a multiple of the ranks, and fewer than what they would advance


def make_schedule(optimizer: torch.optim.Optimizer, one_cycle: bool) -> Any:
    if one_cycle:
        return OneCycleLR(optimizer, max_lr=1.0, total_steps=CYCLE)
    return LambdaLR(optimizer, lambda n: 1.0 - n / 100)
