"""The table of parity cells is complete, and its judge and its replayed dropout masks fail when they should."""

import math

import pytest
import torch
from harness.dropout import replay_dropout
from harness.training import build
from parity.cells import ADAPTER_AXES, SEQUENCE_AXES, all_cells, judge, uncovered
from parity.subjects import adapter_options
from parity.table import CELLS, MATRIX, SEQUENCE


def test_every_pair_of_values_is_covered():
    assert uncovered(MATRIX, ADAPTER_AXES) == set()
    combinations = math.prod(map(len, ADAPTER_AXES.values()))
    assert len(all_cells(ADAPTER_AXES)) == combinations * 5 // 6  # no dropout without an adapter: 5 of 6
    for name, values in ADAPTER_AXES.items():
        missing = uncovered(MATRIX, ADAPTER_AXES | {name: (*values, "new")})
        assert missing and all((name, "new") in pair for pair in missing), f"a new value of {name} goes unnoticed"


def test_every_pair_of_values_is_covered_under_sequence_parallelism():
    assert uncovered(SEQUENCE, SEQUENCE_AXES) == set()


def test_names_tell_the_cells_apart():
    assert len({str(cell) for cell in CELLS}) == len(CELLS)


def test_the_judge_condemns():
    """Every way in which a cell can be wrong is seen."""
    want = {"a": torch.ones(4), "b": torch.ones(2), "frozen": None}
    assert not judge(1.0, dict(want), 1.0, want).problems
    for change in ({"a": torch.ones(4) * (1 + 3e-5)}, {"a": None}, {"frozen": torch.ones(1)}, {"a": torch.ones(5)}):
        assert judge(1.0, want | change, 1.0, want).problems
    assert judge(1.0, {"a": want["a"], "frozen": None}, 1.0, want).problems
    assert judge(1.0 + 2e-6, want, 1.0, want).problems
    assert judge(math.nan, want, 1.0, want).problems
    assert judge(1.0, want | {"a": torch.full((4,), math.nan)}, 1.0, want).problems


def masks(seed: int, key: str, width: int) -> dict[str, torch.Tensor]:
    return {key: torch.rand(2, 16, width, generator=torch.Generator().manual_seed(seed)) > 0.1}


@pytest.mark.parametrize("width, seeds, message", [(64, (0, 1), "drew different masks"), (32, (0, 1), None)])
def test_replayed_masks_are_put_together_or_compared(width, seeds, message):
    """Whole features: the tp ranks' masks have to agree. Slices of them: put side by side."""
    options = {**adapter_options("llama", "lora", 0.1), "target_modules": ["q_proj"], "layers_to_transform": [0]}
    reference = build("llama", options)
    layer = reference.base_model.model.model.layers[0].self_attn.q_proj
    key = "base_model.model.model.layers.0.self_attn.q_proj.default"
    by_rank = [masks(seed, key, width) for seed in seeds]
    if message:
        with pytest.raises(AssertionError, match=message):
            replay_dropout(reference, by_rank, tp_size=2)
        return
    assert replay_dropout(reference, by_rank, tp_size=2) == 1
    x = torch.randn(2, 16, 64)
    whole = torch.cat([rank[key] for rank in by_rank], dim=-1)
    torch.testing.assert_close(layer.lora_dropout["default"](x), x * whole / 0.9)
