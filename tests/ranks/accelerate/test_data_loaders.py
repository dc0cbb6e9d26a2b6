"""Data loaders on every mesh: the ranks of a tp group read the same batches, the others the rest."""


import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from harness.meshes import MESHES
from harness.pool import expect_error, run_distributed

from hf_automodel_parallel import AutoParallelismConfig
from ranks.accelerate.jobs import FSDP2


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
