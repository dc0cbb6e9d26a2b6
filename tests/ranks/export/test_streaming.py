"""``stream_weights``: the tensors of one process's files, one at a time, and ends that let no rank wait."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from harness.meshes import MESHES
from harness.pool import run_distributed
from harness.training import build
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_automodel_parallel import AutoParallelismConfig, stream_weights
from hf_automodel_parallel.errors import ExportError
from ranks.export.test_files import HEAD

TOKENS = {"target_modules": ["q_proj", "down_proj"], "trainable_token_indices": [1, 5]}
#: model, adapter, what is streamed
CELLS: list[tuple[str, Any, dict[str, Any]]] = [
    ("llama", None, {}),
    ("llama_tied", None, {"dtype": torch.bfloat16}),
    ("mixtral", None, {}),
    ("llama", HEAD, {}),
    ("llama", HEAD, {"merged": True}),
    ("llama", HEAD, {"adapters_only": True}),
    ("llama", TOKENS, {}),
    ("mixtral", {}, {"merged": True, "dtype": torch.bfloat16}),
    ("phi3", {"use_dora": True}, {"merged": True}),
]


class Peak(TorchDispatchMode):
    """The largest number of bytes of tensors at one time that were made within the block."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        local = [p.to_local() if isinstance(p, DTensor) else p for p in [*model.parameters(), *model.buffers()]]
        self.known = {tensor.untyped_storage().data_ptr() for tensor in local}
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, result)):
            if type(tensor) is torch.Tensor and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.live.values()))
        return result


def stream_cells(cells: list[Any], sizes: dict[str, int]) -> list[tuple[dict[str, torch.Tensor], int, int, bool]]:
    results = []
    for name, adapter, options in cells:
        accelerator = Accelerator(parallelism_config=AutoParallelismConfig(**sizes))
        model = accelerator.prepare(build(name, adapter))
        before = {n: p.to_local().clone() for n, p in model.named_parameters()}
        found, largest = {}, 0
        with Peak(model) as peak:
            for key, tensor in stream_weights(model, **options):
                with torch.utils._python_dispatch._disable_current_modes():
                    found[key] = tensor.clone()
                assert tensor.is_contiguous() and not tensor.requires_grad
        for parameter in model.parameters():
            largest = max(largest, parameter.numel() * parameter.itemsize)
        same = all(torch.equal(p.to_local(), before[n]) for n, p in model.named_parameters())
        same = same and not any(getattr(module, "merged_adapters", None) for module in model.modules())
        results.append((found, peak.bytes, largest, same))
    return results


def saved(directory: Path, name: str, adapter: Any, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of the files that one process saves."""
    model = build(name, adapter)
    if adapter is not None and not options.get("adapters_only"):
        model = model.merge_and_unload() if options.get("merged") else model.unload()
    if options.get("dtype"):
        model.to(options["dtype"])
    model.save_pretrained(directory)
    return {key: value for file in directory.glob("*.safetensors") for key, value in load_file(file).items()}


@pytest.mark.core_cases("tp2")
@pytest.mark.parametrize("mesh", ["tp2", "fsdp2", "tp2_fsdp2", "hsdp"])
def test_tensors_equal_the_files_of_one_process(tmp_path, mesh):
    """Names, dtypes, shapes and bytes, on every rank; the model stays as it is, and two tensors are held."""
    world, sizes, _ = MESHES[mesh]
    some = {"fsdp2": [1, 2, 3, 4], "tp2_fsdp2": [1, 2, 3, 5, 8], "hsdp": [2]}.get(mesh, range(len(CELLS)))
    cells = [CELLS[index] for index in some]
    ranks = run_distributed(world, stream_cells, cells, sizes)
    for number, (name, adapter, options) in enumerate(cells):
        want = saved(tmp_path / str(number), name, adapter, options)
        for found, peak, largest, unchanged in (results[number] for results in ranks):
            assert unchanged, (name, options)
            assert found.keys() == want.keys(), (name, options, found.keys() ^ want.keys())
            for key, value in want.items():
                assert found[key].dtype == value.dtype and torch.equal(found[key], value), (name, key)
            if not options.get("merged"):
                assert peak <= (2 + 1 / 16) * largest + 1024, (name, options, peak / largest)


# ---- a rank that leaves ----------------------------------------------------------------------------------------------


def leave(sizes: dict[str, int], how: str) -> tuple[str, int]:
    """The message of the error, and the tensors that this rank got; rank 1 leaves after two of them."""
    model = Accelerator(parallelism_config=AutoParallelismConfig(**sizes)).prepare(build("llama"))
    seen = 0
    try:
        for _ in stream_weights(model):
            seen += 1
            if how == "all" and seen == 2:
                break
            if dist.get_rank() == 1 and seen == {"break": 2, "raise": 2, "last": len(model.state_dict())}.get(how):
                if how == "break":
                    break
                raise ValueError("the server is gone")
    except (ValueError, ExportError) as error:
        return f"{type(error).__name__}: {error}", seen
    return "", seen


def leaves(sizes: dict[str, int]) -> list[Any]:
    results = [leave(sizes, how) for how in ("all", "break", "raise", "last")]
    # Nothing is left over: the ranks still agree on their collectives.
    dist.barrier()
    return results


def test_a_rank_that_leaves_lets_no_other_wait():
    first, second = run_distributed(2, leaves, {"tp_size": 2}, timeout=120)
    stopped = "ExportError: stream_weights() stopped on rank 1: its loop ended at model."
    assert first[0] == second[0] == ("", 2), "all leave alike: no error"
    assert first[1][0].startswith(stopped) and first[1][1] == 2 and second[1] == ("", 2)
    assert first[2][0].startswith(stopped) and second[2] == ("ValueError: the server is gone", 2)
    assert first[3][0] == "" and second[3][0] == "ValueError: the server is gone", "the last tensor ends the stream"
    assert first[3][1] == second[3][1] > 20
