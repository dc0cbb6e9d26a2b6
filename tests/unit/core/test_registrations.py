"""What a model got since it was looked through is noticed; what each forward of a decoder does is not."""

import copy

import pytest
import torch
from torch import nn

from hf_automodel_parallel.core.registrations import Registrations


def _add_parameter(model):
    model.scale = nn.Parameter(torch.ones(1))


def _add_module(model):
    model.extra = nn.Linear(2, 2)


def _add_module_inside(model):
    model.layers[0].add_module("adapter", nn.Linear(2, 2))


def _add_to_dict(model):
    model.dict["new"] = nn.Linear(2, 2)


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.dict = nn.ModuleDict()


@pytest.mark.parametrize("add", [_add_parameter, _add_module, _add_module_inside, _add_to_dict])
def test_additions_are_news(add):
    model, registrations = _Model(), Registrations()
    assert registrations.news
    registrations.seen(model)
    assert not registrations.news
    add(model)
    assert registrations.news
    registrations.seen(model)
    assert not registrations.news


def test_slices_of_known_lists_are_none():
    model, registrations = _Model(), Registrations()
    registrations.seen(model)
    for layer in model.layers[:2]:
        layer(torch.ones(2))
    model.layers[0].weight.requires_grad_(False)
    assert not registrations.news


def test_another_model_is_none():
    """Loading a second model, or training two in turn, costs the first one no walk through its modules."""
    model, registrations = _Model(), Registrations()
    registrations.seen(model)
    other, of_other = _Model(), Registrations()
    assert not registrations.news and of_other.news
    of_other.seen(other)
    _add_parameter(other)
    assert not registrations.news and of_other.news


def test_a_copy_has_been_looked_through_by_nobody():
    model, registrations = _Model(), Registrations()
    registrations.seen(model)
    assert copy.deepcopy(registrations).news and not registrations.news
