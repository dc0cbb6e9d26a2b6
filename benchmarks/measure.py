"""What the benchmarks share: variants of one small Llama, counters for collectives and saved activations, processes.

Everything is counted, nothing is timed, so the figures are the same on every machine.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

#: Tokens of one batch: 2 rows.
ROWS, LENGTH = 2, 256

_KINDS = {
    "all_reduce": ("_c10d_functional::all_reduce", "c10d::allreduce_"),
    "all_gather": ("_c10d_functional::all_gather_into_tensor", "c10d::allgather_", "c10d::_allgather_base_"),
    "reduce_scatter": (
        "_c10d_functional::reduce_scatter_tensor",
        "c10d::reduce_scatter_",
        "c10d::_reduce_scatter_base_",
    ),
}
_BY_OPERATOR = {operator: kind for kind, operators in _KINDS.items() for operator in operators}


@dataclass(frozen=True)
class Variant:
    """One way to parallelise the model.

    Attributes:
        name: as shown.
        fields: of ``AutoParallelismConfig``, beside ``tp_size``.
        lora: adapters on all linear layers, everything else frozen.
        native: transformers' own tensor parallelism instead.
    """

    name: str
    fields: dict[str, Any]
    lora: bool = False
    native: bool = False


REGATHER = {"sequence_parallel": True, "sequence_parallel_regather": True}

#: Loss parallelism is on wherever the logits are not said to be whole.
VARIANTS = [
    Variant("transformers' own TP", {}, native=True),
    Variant("TP, whole logits", {"loss_parallel": False}),
    Variant("TP", {}),
    Variant("TP + SP", {"sequence_parallel": True}),
    Variant("TP + SP, gathered again", REGATHER),
    Variant("TP, LoRA", {}, lora=True),
    Variant("TP + SP, LoRA", {"sequence_parallel": True}, lora=True),
    Variant("TP + SP, gathered again, LoRA", REGATHER, lora=True),
]


def build(layers: int, lora: bool = False) -> nn.Module:
    """A Llama of width 256 with a vocabulary of 8192, optionally with LoRA of rank 8 on all linear layers."""
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

        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model


def batch() -> dict[str, torch.Tensor]:
    """Token ids and labels, (2, 256)."""
    ids = torch.randint(8192, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def parallel(variant: Variant, layers: int) -> tuple[nn.Module, Callable[[torch.Tensor], None]]:
    """The parallelised model, and what runs its backward."""
    if variant.native:
        import tempfile

        from transformers import LlamaForCausalLM
        from transformers.distributed import DistributedConfig

        place: list[Any] = [None]
        with tempfile.TemporaryDirectory() as directory:
            if dist.get_rank() == 0:
                build(layers).save_pretrained(directory)
                place = [directory]
            dist.broadcast_object_list(place)
            config = DistributedConfig(tp_size=dist.get_world_size())
            model = LlamaForCausalLM.from_pretrained(place[0], distributed_config=config)
            dist.barrier()
        return model, torch.Tensor.backward
    from accelerate import Accelerator

    from hf_automodel_parallel import AutoParallelismConfig

    accelerator = Accelerator(
        cpu=True, parallelism_config=AutoParallelismConfig(tp_size=dist.get_world_size(), **variant.fields)
    )
    model = build(layers, variant.lora)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model, _ = accelerator.prepare(model, optimizer)
    return model, accelerator.backward


class Collectives(TorchDispatchMode):
    """Counts collectives by kind, and the bytes that each rank sends (ring algorithms: an all-reduce moves its tensor
    twice).
    """

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        kind = _BY_OPERATOR.get(function.name().partition(".")[0])
        if kind is not None:
            whole = max((t.numel() * t.element_size() for t in _tensors((args, result))), default=0)
            ranks = dist.get_world_size()
            self.count[kind] += 1
            self.bytes[kind] += whole * (ranks - 1) // ranks * (2 if kind == "all_reduce" else 1)
        return result


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


class Storages(TorchDispatchMode):
    """Knows every storage that operators allocate, to say what is alive of them later.

    Saved-tensor hooks would not do: those of ``sequence_parallel_regather`` and of checkpoints hide what they keep from
    others.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = _local(tensor).untyped_storage()
            self._seen[id(storage)] = weakref.ref(storage)  # torch keeps the Python object as long as the memory
        return result

    def alive(self, apart_from: Iterable[torch.Tensor]) -> int:
        """Bytes of those that are still alive, without the ones of the given tensors."""
        gc.collect()
        known = {_local(tensor).untyped_storage().data_ptr() for tensor in apart_from}
        alive = [storage for reference in self._seen.values() if (storage := reference()) is not None]
        return sum(storage.nbytes() for storage in alive if storage.data_ptr() not in known)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def launch(script: str, ranks: int, arguments: list[str]) -> None:
    """Run ``script`` again on ``ranks`` gloo processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--rdzv_backend", "c10d"]
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **os.environ}
    result = subprocess.run(
        [*command, "--rdzv_endpoint", "127.0.0.1:0", script, *arguments], env=environment, check=False
    )
    raise SystemExit(result.returncode)


def reset() -> None:
    """Forget the Accelerator of the last variant."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state()
    GradientState._reset_state()


def each(measure: Callable[[Variant, int], Any], layers: tuple[int, int]) -> list[tuple[Variant, Any, Any]]:
    """``measure`` of every variant with few and with many layers; an error in the place of both where one cannot
    run.
    """
    rows = []
    for variant in VARIANTS:
        try:
            few, many = (measure(variant, n) for n in layers)
        except Exception as error:  # of another library's code
            few, many = None, f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
        finally:
            reset()
        rows.append((variant, few, many))
    return rows


def run(
    script: str, description: str | None, measure: Callable[[Variant, int], Any], layers: tuple[int, int], show: Any
) -> None:
    """The program of a benchmark: start the processes, measure every variant, let rank 0 show the table.

    Args:
        script: path of the benchmark.
        description: for ``--help``.
        measure: of a variant with a number of layers; collective.
        layers: few, many.
        show: called with the rows of :func:`each` and the size of the tp axis.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2, help="number of processes, all on the tp axis (default 2)")
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        launch(script, arguments.tp, ["--tp", str(arguments.tp)])
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    rows = each(measure, layers)
    if dist.get_rank() == 0:
        show(rows, arguments.tp)
    dist.destroy_process_group()
