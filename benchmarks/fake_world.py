"""Ranks that do not exist: a process group whose collectives do nothing; this process is rank 0 of it.

Run in a fresh process, since a process has one group: :func:`in_process`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from .ranks import RanksFailed, environment

#: name -> class of the config, and the fields of the published geometry
GEOMETRIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 3.1 405B": (
        "LlamaConfig",
        {
            "hidden_size": 16384,
            "intermediate_size": 53248,
            "num_hidden_layers": 126,
            "num_attention_heads": 128,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
        },
    ),
    "DeepSeek-V3": ("DeepseekV3Config", {"num_hidden_layers": 61, "num_nextn_predict_layers": 0}),
}


def model_on_meta(geometry: str, layers: int) -> nn.Module:
    """The model in bfloat16 on the meta device."""
    import transformers

    name, fields = GEOMETRIES[geometry]
    config = getattr(transformers, name)(**{**fields, "num_hidden_layers": layers})
    with torch.device("meta"):
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model


def prepared(geometry: str, world: int, tp: int, layers: int, **options: Any) -> tuple[nn.Module, float]:
    """The model sharded over (world / tp, tp) ranks, and the CPU seconds that this took; in a process of its own.

    Args:
        options: fields of ``AutoParallelismConfig`` beside the sizes.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from hf_automodel_parallel.core.options import ParallelOptions
    from hf_automodel_parallel.strategies.context import ParallelizeContext
    from hf_automodel_parallel.strategies.default import DefaultParallelizationStrategy

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    model = model_on_meta(geometry, layers)
    mesh = init_device_mesh("cpu", (world // tp, tp), mesh_dim_names=("dp_shard_cp", "tp"))
    begin = time.process_time()
    context = ParallelizeContext(model, mesh, torch.device("cpu"), ParallelOptions(**options), sums_after_backward=True)
    context.fsdp.mp_policy = MixedPrecisionPolicy()
    strategy = DefaultParallelizationStrategy()
    strategy.plan(context)
    strategy.carry_out(context)
    return model, time.process_time() - begin


def prepare_seconds(depths: list[int], rounds: int, **arguments: Any) -> list[list[float]]:
    """CPU seconds of :func:`prepared` at every depth, ``rounds`` times after one that warms up."""
    found: list[list[float]] = [[] for _ in depths]
    for round_ in range(rounds + 1):
        for layers, seconds in zip(depths[: None if round_ else 1], found):
            taken = prepared(layers=layers, **arguments)[1]
            dist.destroy_process_group()
            if round_:
                seconds.append(taken)
    return found


def in_process(function: str, timeout: float = 900.0, **arguments: Any) -> Any:
    """What a function of this package returns in a fresh process; ``"module:name"``.

    Raises:
        RanksFailed: it raised, or the time is over.
    """
    module, _, name = function.partition(":")
    code = f"import json, sys, {module} as m; print(json.dumps(m.{name}(**json.loads(sys.argv[1]))))"
    command = [sys.executable, "-W", "ignore", "-c", code, json.dumps(arguments)]
    try:
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as error:
        raise RanksFailed(function, f"it took longer than {timeout:.0f} s") from error
    if done.returncode:
        raise RanksFailed(function, done.stderr)
    return json.loads(done.stdout.splitlines()[-1])
