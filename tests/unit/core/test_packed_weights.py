"""Packed weights: a shard has the values of one process, or the placement is refused."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import nn

from hf_automodel_parallel.core.packed_weights import check_shards, packed_matrix, shown_unpacked
from hf_automodel_parallel.core.shard_layout import local_slice
from hf_automodel_parallel.core.sharding_spec import REPLICATED, ParameterSpec, ShardingSpec
from hf_automodel_parallel.errors import UnsupportedError

CPU = torch.device("cpu")
ROWS, COLUMNS = ParameterSpec(0), ParameterSpec(1)
#: Each rank computes with one of two key-value heads.
HEADS = ParameterSpec(None, 1, partial_gradient=True, forward_shard_dim=0, forward_shards=2)


def layer(rows: int, width: int, **options) -> Linear4bit:
    torch.manual_seed(0)
    return Linear4bit(width, rows, bias=False, quant_type="nf4", **options).to("cpu")


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "shape, spec, size",
    [
        ((256, 128), ROWS, 4),
        ((64, 96), ROWS, 4),  # a block is two thirds of a row
        ((256, 128), ParameterSpec(0, 2), 2),
        ((64, 256), COLUMNS, 4),
        ((64, 512), ParameterSpec(1, 2), 2),
        ((64, 128), HEADS, 4),
    ],
    ids=str,
)
def test_a_shard_has_the_values_of_one_process(shape, spec, size, nested, storage):
    linear = layer(*shape, compress_statistics=nested, quant_storage=storage)
    packed, want = packed_matrix(linear), dequantize_4bit(linear.weight, linear.weight.quant_state)
    assert packed.misfit(spec, size) is None
    cut = ParameterSpec(0 if spec is HEADS else spec.dim, spec.blocks)
    for rank in range(size):
        index, parts = (rank // 2, 2) if spec is HEADS else (rank, size)
        numbers = local_slice(packed.as_matrix(linear.weight).detach(), cut, index, parts).reshape(-1, 1)
        state = packed.local_state(spec, rank, size, CPU)
        assert not state.nested and state.absmax.numel() * state.blocksize == state.shape.numel()
        assert torch.equal(dequantize_4bit(numbers, state), local_slice(want, cut, index, parts))
    assert linear.quant_state.shape == torch.Size(shape)  # the state of the entire matrix is left alone


@pytest.mark.parametrize(
    "shape, spec, size, reason",
    [
        ((64, 64), COLUMNS, 2, "a rank's 32 of 64 columns are no whole blocks"),
        ((6, 32), ROWS, 2, "a rank's 3 rows of 32 numbers are no whole blocks"),
        ((64, 128), ROWS, 3, "its 64 rows do not divide by 3"),
        ((128, 65), ROWS, 2, "its rows of 65 numbers do not fill whole bytes"),
    ],
)
def test_a_block_of_two_ranks_is_refused_by_name(shape, spec, size, reason):
    model = nn.Sequential(layer(*shape))
    with pytest.raises(UnsupportedError) as error:
        check_shards(model, ShardingSpec(parameters={"0.weight": spec}), size)
    message = str(error.value)
    assert message.startswith("0.weight of shape") and reason in message
    assert "blocksize=64" in message and f"tp_size={size}" in message and "llm_int8_skip_modules" in message
    check_shards(model, ShardingSpec(parameters={"0.weight": REPLICATED}), size)


def test_a_plan_sees_plain_layers_and_the_model_is_left_as_it_was():
    packed = layer(64, 128)
    packed.register_forward_hook(print)
    model = nn.ModuleList([packed, nn.Linear(2, 2), nn.Sequential(packed)])
    with shown_unpacked(model) as changed:
        assert changed and type(model[0]) is nn.Linear and model[2][0] is model[0]
        assert model[0].weight.shape == (64, 128) and model[0].weight.is_meta
        assert model[0]._forward_hooks == packed._forward_hooks
    assert model[0] is packed and model[2][0] is packed and packed.weight.dtype == torch.uint8
    with shown_unpacked(nn.Sequential(model[1])) as changed:
        assert not changed
