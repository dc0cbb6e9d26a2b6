"""Layers whose backward somebody else runs, and classes that FSDP2 cannot extend."""

from abc import ABC
from typing import Generic, TypeVar

import pytest
import torch
from harness.models import build_model
from sweep.tiny import build

from hf_automodel_parallel.core.model_structure import find_structure
from hf_automodel_parallel.errors import UnsupportedError
from hf_automodel_parallel.fsdp.unsupported_models import (
    refuse_other_layouts,
    refuse_own_backward,
    refuse_sparse_gradients,
)


def test_reversible_layers_are_refused():
    model = build("reformer")
    with pytest.raises(
        UnsupportedError, match=r"_ReversibleFunction.backward .* calls ReformerLayer.backward_pass.*DDP"
    ):
        refuse_own_backward(model, find_structure(model).layers)


class Doubled(torch.autograd.Function):
    """Calls methods of tensors alone; two have the names of methods of every module."""

    @staticmethod
    def forward(ctx, x):
        return x.float() * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient.float().to(gradient.dtype).mul(2)


def test_other_functions_are_not():
    model = build_model("llama")
    layers = find_structure(model).layers
    kind = type("Layer", (type(layers[0]),), {"__module__": __name__})
    for layer in layers:
        layer.__class__ = kind
    refuse_own_backward(model, layers)


class AbstractFirst(ABC, torch.nn.Module):
    pass


class GenericFirst(Generic[TypeVar("T")], torch.nn.Module):
    pass


class ModuleFirst(torch.nn.Module, ABC):
    pass


def test_classes_that_cannot_be_extended():
    """Python says "object layout differs" only when FSDP2 is half done."""
    refuse_other_layouts([ModuleFirst(), torch.nn.Sequential(), build_model("llama")])
    for cls in (AbstractFirst, GenericFirst):
        with pytest.raises(UnsupportedError, match=rf"{cls.__name__} cannot be a unit .*layout.*nn.Module has to come"):
            refuse_other_layouts([ModuleFirst(), cls()])


def test_sparse_gradients_of_a_trained_table():
    model = build_model("llama")
    refuse_sparse_gradients(model)
    model.model.embed_tokens.sparse = True
    with pytest.raises(
        UnsupportedError, match=r"model\.embed_tokens has sparse gradients .*model\.embed_tokens\.sparse = False"
    ):
        refuse_sparse_gradients(model)
    model.requires_grad_(False)
    refuse_sparse_gradients(model)
