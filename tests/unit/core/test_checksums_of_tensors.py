"""Checksums by which ranks find tensors that differ."""

import pytest
import torch

from hf_automodel_parallel.core.consistency import fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
@pytest.mark.parametrize("size", [1, 5, 3 * (1 << 19) + 3])
def test_a_change_of_one_element_and_of_the_order_is_seen(dtype, size):
    """Sizes below a word, with a rest, and of several parts; equal tensors, also strided ones, have equal checksums."""
    tensor = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(0)).to(dtype)
    known = fingerprint(tensor)
    assert known == fingerprint(tensor.clone()) == fingerprint(torch.stack([tensor, tensor], dim=1)[:, 0])
    for position in {0, size // 2, size - 1}:
        other = tensor.clone()
        other[position] = 1 - other[position].to(torch.int64)
        assert fingerprint(other) != known, position
    if size > 16:
        assert fingerprint(tensor.roll(8)) != known


def test_of_nothing():
    assert fingerprint(torch.zeros(0)) == 0 and fingerprint(torch.ones(())) != 0
