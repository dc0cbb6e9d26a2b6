"""What the audit's hooks read before the first step: each parameter once in a forward, none in a forward without
gradients, of which a rollout has hundreds.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_automodel_parallel.audit import reachability
from hf_automodel_parallel.audit.reachability import ReachabilityHooks


@pytest.fixture
def model() -> nn.Module:
    block = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    return nn.Sequential(block, nn.Linear(2, 2))


@pytest.fixture
def read(monkeypatch) -> list[torch.Tensor]:
    found = []
    known = reachability.checksum

    def checksum(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return known(tensor)

    monkeypatch.setattr(reachability, "checksum", checksum)
    return found


def test_each_parameter_once(model, read):
    hooks = ReachabilityHooks(model, [], lambda shapes: None)
    for forwards in (1, 2):
        model(torch.ones(1, 2)).sum().backward()
        assert len(read) == forwards * len(list(model.parameters()))
    assert not hooks.written


def test_none_without_gradients(model, read):
    ReachabilityHooks(model, [], lambda shapes: None)
    with torch.no_grad():
        model(torch.ones(1, 2))
    with torch.inference_mode():
        model(torch.ones(1, 2))
    assert not read


def test_a_write_is_seen_by_every_module_around(model):
    hooks = ReachabilityHooks(model, [], lambda shapes: None)
    inner = model[0][1][0]

    def write(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            module.weight.add_(1.0)
        return output

    inner.register_forward_hook(write, prepend=True)
    model(torch.ones(1, 2))
    assert {(module, name) for module, name in hooks.written if module is inner} == {(inner, "weight")}
    assert (model[0], "1.0.weight") in hooks.written
