"""Parameters that are exchanged during a call: ties, errors, buffers, order."""

import pytest
import torch
from torch import nn

from hf_automodel_parallel.core.swap import swapped_parameters


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.ones(3))


def doubled(name, tensor):
    return tensor.detach() * 2 if name.endswith("weight") else None


def test_ties_are_kept_and_everything_returns():
    model = Tied()
    before = dict(model.named_parameters(remove_duplicate=False))
    with swapped_parameters(model, doubled):
        assert type(model.first.weight) is torch.Tensor
        assert model.first.weight is model.second.weight
        assert torch.equal(model.first.weight, before["first.weight"] * 2)
        assert model.first.bias is before["first.bias"]
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)


def test_after_an_error_everything_returns_and_is_written_back():
    model = Tied()
    weight = model.first.weight
    written = []
    with pytest.raises(RuntimeError, match="inside"):
        with swapped_parameters(model, doubled, lambda former, last: written.append((former, last))):
            model.second._parameters["weight"] = torch.zeros(3, 3)
            raise RuntimeError("inside")
    assert model.first.weight is weight and model.second.weight is weight
    assert [former is weight for former, _ in written] == [True, True]
    assert [bool(last.any()) for _, last in written] == [True, False]


def test_an_error_while_stand_ins_are_made_changes_nothing():
    model = Tied()
    weight = model.first.weight

    def failing(name, tensor):
        if name == "second.bias":
            raise RuntimeError("no stand-in")
        return torch.zeros_like(tensor)

    with pytest.raises(RuntimeError, match="no stand-in"), swapped_parameters(model, failing):
        pass
    assert model.first.weight is weight


def test_buffers_on_request():
    model = Tied()
    scale = model.scale

    def zeros(name, tensor):
        return torch.zeros_like(tensor)

    with swapped_parameters(model, zeros):
        assert model.scale is scale
    with swapped_parameters(model, zeros, buffers=True):
        assert not model.scale.any()
    assert model.scale is scale


def test_a_slot_that_the_block_removes_returns_and_hides_no_error():
    module = nn.Linear(2, 2)
    weight, bias = module.weight, module.bias
    written: list[torch.Tensor] = []
    with (
        pytest.raises(ValueError, match="of the block"),
        swapped_parameters(
            module, lambda _, old: nn.Parameter(old.detach() + 1), lambda old, last: written.append(old)
        ),
    ):
        del module.weight
        raise ValueError("of the block")
    assert module.weight is weight and module.bias is bias
    assert len(written) == 1 and written[0] is bias
