"""Data loaders on every mesh: the ranks of a tp group read the same batches, the others the rest."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from harness.meshes import MESHES, each_mesh, run_on_mesh
from harness.pool import expect_error, run_distributed
from harness.training import build
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hf_automodel_parallel import AutoParallelismConfig
from ranks.accelerate.jobs import FSDP2, make_accelerator


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


@pytest.mark.core_cases("tp2")
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


SAMPLES = 11  # batches of two: neither they nor the ranks divide it


class Samples(Dataset):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"id": torch.tensor(index), "row": torch.tensor([index, index**2])}


def gathered(sizes: dict[str, int], dp_size: int) -> dict[str, list[Any]]:
    accelerator = make_accelerator(sizes)
    loader = accelerator.prepare(DataLoader(Samples(), batch_size=2))
    seen: dict[str, list[Any]] = {
        kind: [] for kind in ("tensor", "matrix", "dict", "nested", "objects", "dicts", "tensors_as_objects")
    }
    for batch in loader:
        ids, rows = batch["id"], batch["row"]
        seen["tensor"] += accelerator.gather_for_metrics(ids).tolist()
        seen["matrix"] += accelerator.gather_for_metrics(rows).tolist()
        seen["dict"] += accelerator.gather_for_metrics(batch)["id"].tolist()
        assert accelerator.gather_for_metrics(rows[:0]).shape == (0, 2), "an empty batch"
        first, (second, third) = accelerator.gather_for_metrics((ids, [rows, {"again": ids}]))
        seen["nested"] += list(zip(first.tolist(), second.tolist(), third["again"].tolist(), strict=True))
        seen["objects"] += accelerator.gather_for_metrics([f"sample {i}" for i in ids.tolist()])
        seen["dicts"] += accelerator.gather_for_metrics([{"id": i} for i in ids.tolist()])
        ragged = [torch.arange(i) for i in ids.tolist()]  # cannot be concatenated: what the option is for
        seen["tensors_as_objects"] += [len(t) for t in accelerator.gather_for_metrics(ragged, use_gather_object=True)]
    return seen


@pytest.mark.core
@each_mesh
def test_gather_for_metrics_returns_each_sample_once(mesh):
    """Gathered over all processes, each sample would come once per tp rank, and the cut at the end be wrong."""
    numbers = list(range(SAMPLES))
    for seen in run_on_mesh(mesh, gathered):
        assert seen["tensor"] == seen["dict"] == seen["tensors_as_objects"] == numbers
        assert seen["matrix"] == [[i, i**2] for i in numbers]
        assert seen["nested"] == [(i, [i, i**2], i) for i in numbers]
        assert seen["objects"] == [f"sample {i}" for i in numbers]
        assert seen["dicts"] == [{"id": i} for i in numbers]


class Stream(IterableDataset):
    def __init__(self, length: int = 16) -> None:
        self.length = length

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.arange(self.length))


def gathered_by_hand(sizes: dict[str, int], dp_size: int) -> dict[str, list[int]]:
    """What loops gather: of a stream, twice, and with a worker; and cut to the number of samples by hand."""
    accelerator = make_accelerator(sizes)
    loaders = [DataLoader(Stream(SAMPLES), batch_size=2, num_workers=workers) for workers in (0, 1)]
    stream, worker = accelerator.prepare(*loaders)
    found: dict[str, list[int]] = {}
    for name, loader, epochs in (("stream", stream, 2), ("worker", worker, 1)):
        batches = (batch for _ in range(epochs) for batch in loader)
        found[name] = [i for batch in batches for i in accelerator.gather_for_metrics(batch).tolist()]
    samples = accelerator.prepare(DataLoader(Samples(), batch_size=2))
    seen: list[int] = []
    for batch in samples:
        seen += accelerator.gather(batch)["id"].tolist()
    found["by_hand"] = seen[:SAMPLES]
    part = accelerator.prepare(DataLoader(Samples(), batch_size=2, sampler=[*range(6)]))
    found["part"] = [i for batch in part for i in accelerator.gather_for_metrics(batch)["id"].tolist()]
    found["scalar"] = accelerator.gather(torch.tensor(1)).tolist()
    return found


@pytest.mark.core
@each_mesh
def test_what_is_gathered_has_each_sample_once(mesh):
    """Also of a dataset without length, of a sampler that takes a part of one, and by scripts that cut what `gather`
    returns (`samples_seen`).
    """
    numbers = list(range(SAMPLES))
    for found in run_on_mesh(mesh, gathered_by_hand):
        assert found["stream"] == [*numbers, *numbers] and found["worker"] == numbers
        assert found["by_hand"] == numbers and found["part"] == numbers[:6]
        assert found["scalar"] == [1] * MESHES[mesh][0]  # one of each process, by whose number scripts divide


def streamed(sizes: dict[str, int], dp_size: int) -> list[int]:
    accelerator = make_accelerator(sizes)
    model = build("llama", num_hidden_layers=1)
    _, _, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(Stream(), batch_size=2)
    )
    return [i for batch in loader for i in batch.tolist()]


def shuffled(sizes: dict[str, int], dp_size: int) -> list[int]:
    """As in a script that seeds each rank differently, after prepare."""
    accelerator = make_accelerator(sizes)
    model = build("llama", num_hidden_layers=1)
    _, _, loader = accelerator.prepare(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        DataLoader(list(range(16)), batch_size=2, shuffle=True),
    )
    torch.manual_seed(dist.get_rank())
    return [i for _ in range(2) for batch in loader for i in batch.tolist()]


@pytest.mark.core_cases("tp2-shuffled", "fsdp2-shuffled", "tp2_fsdp2-shuffled", "tp2_fsdp2-iterable")
@pytest.mark.parametrize("job", [streamed, shuffled], ids=["iterable", "shuffled"])
@each_mesh
def test_ranks_of_a_tp_group_read_the_same_data_and_the_others_the_rest(mesh, job):
    by_rank = run_on_mesh(mesh, job)
    _, sizes, dp_size = MESHES[mesh]
    groups = by_rank[:: sizes.get("tp_size", 1)]
    assert by_rank == [data for data in groups for _ in range(sizes.get("tp_size", 1))]
    epochs = 2 if job is shuffled else 1
    for epoch in range(epochs):
        size = len(groups[0]) // epochs
        assert sorted(i for data in groups for i in data[epoch * size : (epoch + 1) * size]) == list(range(16))
