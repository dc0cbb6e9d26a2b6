"""Counted, not timed: collectives and bytes of one step, and what a forward keeps for its backward, per decoder layer.

What belongs to a layer is the difference between 4 and 2 layers, divided by 2; "ends" is the rest: embedding, final
norm, head, loss. Llama of width 256, 2 x 256 tokens, float32, vocabulary 8,192.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hf_automodel_parallel.planner.counting import Collectives, Memory

from ..counting import figures
from ..ranks import on_ranks
from ..recorder import Recorder

FEW, MANY = 2, 4
ROWS, LENGTH = 2, 256


@dataclass(frozen=True)
class Variant:
    """One way to parallelise the model.

    Attributes:
        fields: of ``AutoParallelismConfig``, beside ``tp_size``.
        lora: adapters on all linear layers, everything else frozen.
        native: transformers' own tensor parallelism instead.
    """

    fields: dict[str, Any]
    lora: bool = False
    native: bool = False


REGATHER = {"sequence_parallel": True, "sequence_parallel_regather": True}

#: Loss parallelism is on wherever the logits are not said to be whole.
VARIANTS = {
    "transformers' own TP": Variant({}, native=True),
    "TP, whole logits": Variant({"loss_parallel": False}),
    "TP": Variant({}),
    "TP + SP": Variant({"sequence_parallel": True}),
    "TP + SP, gathered again": Variant(REGATHER),
    "TP, LoRA": Variant({}, lora=True),
    "TP + SP, LoRA": Variant({"sequence_parallel": True}, lora=True),
    "TP + SP, gathered again, LoRA": Variant(REGATHER, lora=True),
}


def run(arguments: argparse.Namespace, recorder: Recorder) -> None:
    """Every variant on tp 2 and tp 4."""
    names = ["TP"] if recorder.smoke else list(VARIANTS)
    for tp in (2,) if recorder.smoke else (2, 4):
        recorder.progress(f"traffic: tp {tp}")
        found = on_ranks(tp, "benchmarks.cpu.traffic:measure", {"names": names})[0]
        rows = [{"name": name, "tp": tp, **figures} for name, figures in found.items() if isinstance(figures, dict)]
        left_out = [
            {"what": f"traffic of {name}, tp {tp}", "why": why} for name, why in found.items() if isinstance(why, str)
        ]
        recorder.record("traffic", rows, {"layers": [FEW, MANY], "tokens": ROWS * LENGTH}, left_out, case=f"tp{tp}")


def measure(names: list[str]) -> dict[str, dict[str, dict[str, float]] | str]:
    """The figures of every variant, or why it cannot run."""
    found: dict[str, dict[str, dict[str, float]] | str] = {}
    for name in names:
        try:
            found[name] = _figures(name)
        except Exception as error:  # of another library's code
            found[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    return found


def _figures(name: str) -> dict[str, dict[str, float]]:
    """Of a layer and of the ends: kinds of collectives, the bytes of all of them, the bytes kept for backward."""
    few, many = (_of_layers(VARIANTS[name], layers) for layers in (FEW, MANY))
    layer = {key: (many[key] - few[key]) / (MANY - FEW) for key in few}
    return {"layer": layer, "ends": {key: few[key] - FEW * layer[key] for key in few}}


def _of_layers(variant: Variant, layers: int) -> dict[str, float]:
    model, backward = _parallel(variant, layers)
    backward(model(**_batch(), use_cache=False).loss)  # a first time, for what is set up once
    inputs = _batch()
    with Collectives() as seen:
        backward(model(**inputs, use_cache=False).loss)
    memory = Memory()
    memory.add([*model.parameters(), *model.buffers(), *inputs.values()])
    before = memory.now
    with memory:
        loss = model(**inputs, use_cache=False).loss
    gc.collect()
    kept = memory.now - before - loss.nbytes
    backward(loss)
    calls = ((kind, calls.count, calls.sent_bytes) for (kind, _), calls in seen.calls.items())
    return {**figures(calls), "kept": kept}


def _build(layers: int, lora: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8192,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=LENGTH,
        )
    )
    if lora:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(model, config)  # type: ignore[return-value, arg-type]
    return model


def _batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(8192, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def _parallel(variant: Variant, layers: int) -> tuple[Any, Callable[[torch.Tensor], None]]:
    """The parallelised model, and what runs its backward."""
    if variant.native:
        from transformers import LlamaForCausalLM
        from transformers.distributed import DistributedConfig

        place: list[Any] = [None]
        with tempfile.TemporaryDirectory() as directory:
            if dist.get_rank() == 0:
                _build(layers).save_pretrained(directory)
                place = [directory]
            dist.broadcast_object_list(place)
            config = DistributedConfig(tp_size=dist.get_world_size())
            model = LlamaForCausalLM.from_pretrained(place[0], distributed_config=config)
            dist.barrier()
        return model, torch.Tensor.backward
    from accelerate import Accelerator

    from hf_automodel_parallel import AutoParallelismConfig

    from ..peers.accelerate_state import new_state

    new_state()
    config = AutoParallelismConfig(tp_size=dist.get_world_size(), **variant.fields)
    accelerator = Accelerator(cpu=True, parallelism_config=config)
    ours = _build(layers, variant.lora)
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=1e-3)
    ours, _ = accelerator.prepare(ours, optimizer)
    return ours, accelerator.backward
