"""Models that FSDP2 cannot run, refused before the first step: classes that cannot be extended, own backward passes and
LayerDrop.

The last two are found in the source code of the model, because one forward does not show them. Code without source
passes.

* Reversible layers (Reformer): an autograd function of the model calls methods of the layers in its ``backward``. FSDP2
  unshards the parameters of a layer around its ``forward`` and around its gradient, so such a method would compute with
  shards.
* LayerDrop: in training each rank skips layers that it draws at random, while the all-gather of a layer needs all
  ranks. Where transformers itself runs every layer under FSDP, the module is marked as sharded. Everything else is
  refused, before a rank waits for a layer that the others have skipped.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from .. import compat
from ..core.source_code import source_of, syntax_tree
from ..errors import UnsupportedError

# ---- classes ---------------------------------------------------------------------------------------------------------


def refuse_other_layouts(units: Iterable[nn.Module]) -> None:
    """Raise :class:`UnsupportedError` if Python does not allow FSDP2 to replace the class of one of ``units``."""
    for cls in dict.fromkeys(type(unit) for unit in units):
        try:
            nn.Module.__new__(cls).__class__ = type(cls.__name__, (FSDPModule, cls), {})
        except TypeError as error:
            bases = ", ".join(base.__name__ for base in cls.__mro__[1:-1] if base.__module__ != "builtins")
            raise UnsupportedError(
                f"{cls.__name__} cannot be a unit of FSDP2, which replaces the class of a module by a subclass: "
                f"{error}. Its bases are {bases}; nn.Module has to come before ABC, Generic and Protocol, as in class "
                f"Model(nn.Module, ABC)."
            ) from error


# ---- sparse gradients ------------------------------------------------------------------------------------------------


def refuse_sparse_gradients(model: nn.Module) -> None:
    """Raise :class:`UnsupportedError` if a trained table of embeddings has sparse gradients."""
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or not module.sparse:
            continue
        if module.weight.requires_grad:
            raise UnsupportedError(
                f"{name} has sparse gradients (sparse=True), which FSDP2 cannot reduce. Set {name}.sparse = False "
                "before accelerator.prepare; the result is the same."
            )


# ---- reversible layers -----------------------------------------------------------------------------------------------


def refuse_own_backward(model: nn.Module, layers: list[nn.Module]) -> None:
    """Raise :class:`UnsupportedError` if an autograd function of the model calls methods of its layers in ``backward``.

    Args:
        model: the model without PEFT's wrapper.
        layers: its repeated layers. The Python modules that define the model and these layers are searched.
    """
    files = {type(m).__module__ for m in (model, *layers)}
    for function in (f for name in files for f in vars(sys.modules.get(name, object)).values()):
        if not (inspect.isclass(function) and issubclass(function, torch.autograd.Function)):
            continue
        for method in sorted(_called_attributes(vars(function).get("backward"))):
            layer = next((x for x in layers if _is_own_method(type(x), method)), None)
            if layer is not None:
                raise UnsupportedError(
                    f"{function.__name__}.backward of {type(model).__name__} calls {type(layer).__name__}.{method}: "
                    f"the model runs the backward of its layers itself, where their parameters are sharded. Train it "
                    f"on one process per replica: without an AutoParallelismConfig (DDP)."
                )


def _called_attributes(function: Any) -> set[str]:
    """Names of the attributes that ``function`` calls."""
    calls = (node.func for node in ast.walk(syntax_tree(function)) if isinstance(node, ast.Call))
    return {call.attr for call in calls if isinstance(call, ast.Attribute)}


def _is_own_method(cls: type, name: str) -> bool:
    return inspect.isfunction(inspect.getattr_static(cls, name, None)) and not hasattr(nn.Module, name)


# ---- LayerDrop -------------------------------------------------------------------------------------------------------

#: A probability of dropping layers, as forwards read it from the module or its config.
_DROP_PROBABILITY = re.compile(r"\bself((?:\.\w+)*\.\w*layerdrop)\b")

#: A layer that runs, but whose output is thrown away, has no gradient on this rank while it has one on the others.
_OUTPUT_DROPPED = re.compile(r"if skip_the_layer:\s*continue")


def refuse_layer_drop(model: nn.Module, units: list[nn.Module]) -> None:
    """Raise :class:`UnsupportedError` if a module in training mode would skip some of ``units`` at random.

    Args:
        model: the model, before sharding; it is only read.
        units: the layers that will be FSDP units.
    """
    for name, module, fields in _dropping(model, units):
        if not _runs_all_layers(module):
            _check(module, name, fields)


def keep_layers_together(model: nn.Module, units: list[nn.Module]) -> None:
    """Let transformers run all ``units`` where it can; check the other modules again before each of their forwards."""
    for name, module, fields in list(_dropping(model, units)):
        if _runs_all_layers(module):
            compat.show_as_sharded(module)
        else:
            module.register_forward_pre_hook(functools.partial(_checked, name, fields))


def _runs_all_layers(module: nn.Module) -> bool:
    cls = type(module)
    return compat.runs_all_layers_under_fsdp(cls) and not _OUTPUT_DROPPED.search(source_of(cls.forward))


def _checked(name: str, fields: list[str], module: nn.Module, _: Any) -> None:
    _check(module, name, fields)


def _check(module: nn.Module, name: str, fields: list[str]) -> None:
    for field in fields:
        value: Any = module
        for key in field.split("."):
            value = getattr(value, key, 0)
        if module.training and isinstance(value, (int, float)) and value > 0:
            path = f"{name}.{field}".lstrip(".")
            raise UnsupportedError(
                f"{path}={value!r} (LayerDrop): each data-parallel rank would skip other layers of "
                f"{type(module).__name__}, but all ranks take part in the all-gather of each layer, and would wait for "
                f"ever. Set it to 0.0, as `model.{path} = 0.0` or in the config before the model is built, or use one "
                "data-parallel rank."
            )


def _dropping(model: nn.Module, units: list[nn.Module]) -> Iterator[tuple[str, nn.Module, list[str]]]:
    """Modules around ``units`` whose forward reads a drop probability: name, module, dotted paths of what it reads."""
    wanted = {id(unit) for unit in units}
    for name, module in model.named_modules():
        source = source_of(type(module).forward)
        fields = sorted({match.group(1).lstrip(".") for match in _DROP_PROBABILITY.finditer(source)})
        if fields and any(id(inner) in wanted for inner in module.modules() if inner is not module):
            yield name, module, fields
