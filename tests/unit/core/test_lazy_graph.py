"""The lazy tensor graph: recording, evaluation of regions and of streamed results, and the inverse."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch

from hf_automodel_parallel import UnsupportedError
from hf_automodel_parallel.core.lazy_graph import Leaf, Recording, StreamingEvaluator, assemble, read
from hf_automodel_parallel.loading import DeferredTensor
from hf_automodel_parallel.loading.deferred import DEFER_ALL


class Counted(Leaf):
    """A leaf that knows how many values were read."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(tensor.shape, tensor.dtype)
        self.tensor, self.count = tensor, 0

    def read(self, region):
        cut = self.tensor[tuple(slice(first, first + count) for first, count in region)]
        self.count += cut.numel()
        return cut


PUSHED_DOWN = {
    "cast": lambda a, b: a.to(torch.bfloat16),
    "clone": lambda a, b: a.clone(),
    "transpose": lambda a, b: a.transpose(0, -1),
    "select": lambda a, b: a.select(1, -2),
    "slice": lambda a, b: a[:, -3:],
    "split": lambda a, b: a.split(2, dim=1)[1],
    "split with sizes": lambda a, b: a.split([1, 3, 2], dim=-1)[1],
    "stack": lambda a, b: torch.stack([a, b], dim=-1),
    "cat": lambda a, b: torch.cat([a, b], dim=1),
    "several": lambda a, b: (
        torch.cat([a.transpose(0, 1), torch.stack([b[0], b[1]]).transpose(0, 1)], 1).chunk(2)[1].half()
    ),
}
RUN_IN_FULL = {
    "strided slice": lambda a, b: a[:, ::2],
    "view": lambda a, b: a.transpose(0, 1).reshape(-1),
    "sum of two": lambda a, b: a + b,
    "unbind": lambda a, b: a.unbind(0)[2],
}


@pytest.mark.parametrize("name", [*PUSHED_DOWN, *RUN_IN_FULL])
def test_a_region_is_the_slice_of_the_full_result(name):
    """And where it can be pushed down, it reads that many values."""
    function = (PUSHED_DOWN | RUN_IN_FULL)[name]
    a, b = torch.arange(24.0).reshape(4, 6), torch.arange(24.0, 48.0).reshape(4, 6)
    expected = function(a, b)
    regions = [[(0, size), (1, size - 1), (size - 1, 1), (1, 0)] for size in expected.shape]
    for region in itertools.product(*regions):
        leaves = Counted(a), Counted(b)
        with DEFER_ALL:
            deferred = function(*map(DeferredTensor, leaves))
        assert (deferred.shape, deferred.dtype) == (expected.shape, expected.dtype)
        want = expected[tuple(slice(first, first + count) for first, count in region)]
        assert torch.equal(read(deferred.node, region), want)
        if name in PUSHED_DOWN:
            assert sum(leaf.count for leaf in leaves) == want.numel()


def test_streaming_fetches_each_tensor_once_and_frees_it():
    value, fetched = torch.arange(24.0).reshape(4, 6), []
    recording = Recording()
    state = recording.declare({"a": ((4, 6), torch.float32), "b": ((6,), torch.float32)})
    with recording:
        parts = [part.t().contiguous() for part in state["a"].chunk(2, dim=1)] + [state["b"] + 1]

    def fetch(name: str) -> torch.Tensor:
        fetched.append(name)
        return value if name == "a" else value[0]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluator = StreamingEvaluator(map(recording.node, parts), fetch)
        results = [evaluator.compute(recording.node(part)) for part in parts]
    assert all(torch.equal(r, e) for r, e in zip(results, [*(p.t() for p in value.chunk(2, dim=1)), value[0] + 1]))
    assert fetched == ["a", "b"] and not evaluator._kept
    assert recording.names(parts[0]) == ["a"]


def test_what_cannot_be_recorded_is_refused():
    recording = Recording()
    state = recording.declare({"a": ((4, 6), torch.float32)})
    with recording:
        with pytest.raises(UnsupportedError, match="in place"):
            state["a"].mul_(2)
        with pytest.raises(UnsupportedError, match="not contiguous"):
            state["a"].t().as_strided((2,), (1,))
        unknown = recording.node(state["a"] + torch.empty(6, device="meta"))
    with pytest.raises(UnsupportedError, match="does not belong to the state dict"):
        StreamingEvaluator([unknown], lambda name: torch.ones(4, 6)).compute(unknown)


def test_a_leaf_is_assembled_from_its_results():
    value = torch.arange(24.0).reshape(2, 4, 3)
    recording = Recording()
    state = recording.declare({"experts": (value.shape, torch.float32)})
    leaf = recording.node(state["experts"])
    with recording:
        made = {str(i): one.transpose(0, 1).contiguous() for i, one in enumerate(state["experts"].unbind(0))}
        computed = {"sum": state["experts"] + 1}
    nodes = {name: recording.node(tensor) for name, tensor in made.items()}
    values = {str(i): one.t() for i, one in enumerate(value)}
    assert torch.equal(assemble(leaf, nodes, values), value)
    with pytest.raises(UnsupportedError, match="do not hold all of experts"):
        assemble(leaf, {"0": nodes["0"]}, {"0": values["0"]})
    with pytest.raises(UnsupportedError, match="computed, not rearranged"):
        assemble(leaf, {"sum": recording.node(computed["sum"])}, {"sum": value})
