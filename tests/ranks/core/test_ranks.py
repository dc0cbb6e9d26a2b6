"""One error on one rank is one error on all ranks, exchanged once; values are compared on all ranks."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness.pool import run_distributed

from hf_automodel_parallel.core import ranks
from hf_automodel_parallel.core.ranks import difference, gather_tensors, raise_on_all_ranks
from hf_automodel_parallel.errors import CheckpointError, PrepareError

pytestmark = pytest.mark.core

pytestmark = pytest.mark.both_ends


def nested(failing: int, outer_of_four: bool) -> tuple[str, str, int]:
    """A block within a block fails on one rank; type and text of this rank's error, and the number of exchanges."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    half = halves[dist.get_rank() // 2]
    exchanges = 0

    def counted(value: object, group: dist.ProcessGroup | None = None) -> list[object]:
        nonlocal exchanges
        exchanges += 1
        return original(value, group)

    original = ranks.gather_objects
    with mock.patch.object(ranks, "gather_objects", counted):
        try:
            with (
                raise_on_all_ranks("outer", None if outer_of_four else half),
                raise_on_all_ranks("inner", half, CheckpointError),
            ):
                if dist.get_rank() == failing:
                    raise KeyError("planted")
        except Exception as error:
            return type(error).__name__, str(error), exchanges
    return "", "", exchanges


def test_error_of_one_rank_is_exchanged_once():
    results = run_distributed(4, nested, 1, False)
    assert results[1] == ("KeyError", "'planted'", 1)
    assert results[0] == ("CheckpointError", "inner failed on rank 1: KeyError: 'planted'", 1)
    assert results[2] == results[3] == ("", "", 2)


def test_error_known_in_a_smaller_group_is_exchanged_again_in_the_larger_one():
    results = run_distributed(4, nested, 1, True)
    assert results[1] == ("KeyError", "'planted'", 2)
    assert results[0][:1] + results[0][2:] == ("CheckpointError", 2)
    for name, text, exchanges in results[2:]:
        assert (name, exchanges) == ("PrepareError", 2) and text.startswith("outer failed on rank 0 (and 1 other): ")


def compared(value: int) -> tuple[object, object, list[list[float]]]:
    rank = dist.get_rank()
    table = gather_tensors(torch.full((2,), float(rank)))
    return difference("same"), difference({"value": value if rank < 2 else rank}), table.tolist()


def test_values_are_compared_on_all_ranks():
    for same, differing, table in run_distributed(4, compared, 1):
        assert same is None
        assert differing == ([2, 3], {"value": 1}, {"value": 2})
        assert table == [[0.0] * 2, [1.0] * 2, [2.0] * 2, [3.0] * 2]


def test_without_a_process_group():
    assert ranks.rank() == 0 and ranks.world_size() == 1 and difference(1) is None
    with pytest.raises(PrepareError, match="planted"), raise_on_all_ranks("outer"), raise_on_all_ranks("inner"):
        raise PrepareError("planted")
