"""Which parameters ``full_parameter`` takes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from hf_automodel_parallel import UnsupportedError
from hf_automodel_parallel.accelerate_plugin import full_parameter as module


def test_shards_of_megatron_fsdp_are_refused(monkeypatch):
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    record = SimpleNamespace(context=SimpleNamespace(model=model, dp_mesh=None))
    monkeypatch.setattr(module, "all_prepared", lambda: [record])
    assert module.full_parameter(model.weight) is model.weight
    monkeypatch.setattr(module, "managed_by_megatron", lambda of: object() if of is model else None)
    assert module.full_parameter(other.weight) is other.weight
    with pytest.raises(UnsupportedError, match=r"full_parameter\(\) with backend='megatron_fsdp'"):
        module.full_parameter(model.weight)
