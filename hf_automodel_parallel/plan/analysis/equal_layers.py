"""Which layers of a stack compute the same? One of them is run on fake tensors for all.

Equal are layers with the same classes, attributes, buffers, shapes and entries of the plan. The index of a layer, which
differs, may not be read while the layer runs. What a layer is called with is compared at each call.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...core.model_structure import references
from ...core.sharding_spec import ShardingSpec
from .operator_trace import storage_id

#: Attributes of every module that a copy for a run does not keep, or that are compared otherwise.
_LEFT_OUT = frozenset(
    "_parameters _buffers _modules _forward_hooks _forward_hooks_with_kwargs _forward_hooks_always_called "
    "_forward_pre_hooks _forward_pre_hooks_with_kwargs _state_dict_hooks _state_dict_pre_hooks "
    "_load_state_dict_pre_hooks _load_state_dict_post_hooks _backward_hooks _backward_pre_hooks training "
    "gradient_checkpointing".split()
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, enum.Enum)
#: Attribute of a module in the copy -> the names of its tracked attributes that were read.
_READ = "_read_attributes_of_index"


@dataclass
class _Description:
    """What a layer is: two layers of equal ``facts``, ``integers`` and ``buffers`` compute the same."""

    facts: list[Any] = field(default_factory=list)
    integers: dict[tuple[str, str], int] = field(default_factory=dict)  # (module in the layer, attribute) -> value
    buffers: list[torch.Tensor] = field(default_factory=list)
    parameters: list[Any] = field(default_factory=list)


class EqualLayers:
    """Groups of equal layers.

    Args:
        model: the model; it is only read.
        spec: its resolved plan.
        layers: the layers in forward order.
        names: module -> its name in ``model``.
        others: more tables whose keys are names of modules or parameters, such as faults of a plan.

    Attributes:
        first: name of a layer that is equal to an earlier one -> the name of the first of them.
        indices: name of such a first layer -> (module in it, attribute) that counts the layers.
        outcomes: name of such a first layer -> calls: (layer, arguments, what the call has shown).
    """

    def __init__(
        self,
        model: nn.Module,
        spec: ShardingSpec,
        layers: list[nn.Module],
        names: dict[nn.Module, str],
        *others: Mapping[str, Any],
    ) -> None:
        self.first: dict[str, str] = {}
        self.indices: dict[str, set[tuple[str, str]]] = {}
        self.outcomes: dict[str, list[tuple[str, Any, Any]]] = {}
        count = references(model)
        tables: list[Mapping[str, Any]] = [spec.parameters, spec.modules, spec.head_counts, spec.head_arguments]
        tables += others
        entries = _entries(tables, {names[layer] for layer in layers})
        known: list[tuple[int, str, _Description]] = []
        kinds = set(layers)
        for position, layer in enumerate(layers):
            name = names[layer]
            inner = list(layer.modules())
            owned = all(count[id(x)] == 1 for x in (*inner, *layer.parameters()))
            if not owned or any(module in kinds for module in inner[1:]):
                continue
            description = _described(layer)
            description.facts.append(entries.get(name))
            for earlier, other, its in known:
                indices = _equal(its, description, position - earlier)
                if indices is not None:
                    self.first[name] = other
                    self.indices.setdefault(other, set()).update(indices)
                    break
            else:
                known.append((position, name, description))

    def group(self, name: str) -> str | None:
        """The first of the layers that are equal to the layer ``name``; None if there is no other one."""
        first = self.first.get(name, name)
        return first if first in self.indices else None

    def outcome(self, name: str, arguments: Any) -> tuple[str, Any] | None:
        """(layer, what its call has shown) of a layer that is equal and was called with equal arguments, or None."""
        for layer, its, outcome in self.outcomes.get(self.group(name) or "", ()) if arguments is not None else ():
            if its == arguments:
                return layer, outcome
        return None


class WatchedRun:
    """Does a run of a layer's copy depend on the layer's index, or change the layer? Then it says nothing of others.

    Args:
        layer: the copy, before the run.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.before = layer, _described(layer)
        self._was_read()

    def speaks_for_equal_layers(self) -> bool:
        """After the run: True if each equal layer does the same."""
        return not self._was_read() and self._unchanged()

    def _unchanged(self) -> bool:
        before, now = self.before, _described(self.layer)
        tensors = [list(map(id, [*x.buffers, *x.parameters])) for x in (before, now)]
        return tensors[0] == tensors[1] and before.facts == now.facts and before.integers == now.integers

    def _was_read(self) -> bool:
        read = [vars(module)[_READ] for module in self.layer.modules() if _READ in vars(module)]
        found = any(read)
        for names in read:
            names.clear()
        return found


def renamed(name: str, layer: str, other: str) -> str:
    """``name``, or what corresponds to it in the layer ``other`` if it is in ``layer``."""
    return other + name[len(layer) :] if name == layer or name.startswith(f"{layer}.") else name


def _described(layer: nn.Module) -> _Description:
    result = _Description()
    within = {id(module): name for name, module in layer.named_modules()}
    for name, module in layer.named_modules():
        facts: list[Any] = [name, type(module)]
        for key, value in vars(module).items():
            if key in _LEFT_OUT:
                continue
            if type(value) is int:
                result.integers[name, key] = value
            else:
                facts.append((key, _frozen(value, within)))
        for key in _HOOKS:
            if hooks := vars(module).get(key):
                facts.append((key, [_frozen(hook, within) for hook in hooks.values()]))
        result.parameters += module._parameters.values()
        for key, parameter in module._parameters.items():
            facts.append((key, None if parameter is None else (type(parameter), parameter.shape, parameter.dtype)))
        for key, buffer in module._buffers.items():
            facts.append((key, None if buffer is None else (buffer.shape, buffer.dtype, buffer.device)))
            if buffer is not None:
                result.buffers.append(buffer)
        result.facts.append(facts)
    return result


def arguments_of_call(value: Any, fact: Any, hidden: torch.Tensor | None = None) -> Any:
    """What decides the outcome of a call with nested arguments ``value`` on fake tensors; None if that is not known.

    Args:
        value: arguments and keyword arguments.
        fact: called with a tensor: what else is known of it.
        hidden: the argument that the caller replaces, of which only type and width count.
    """
    seen: dict[int, int] = {}

    def key(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            place = seen.setdefault(id(x), len(seen))
            if x is hidden:
                return "hidden", place, x.shape[-1], x.dtype
            memory = seen.setdefault(storage_id(x), len(seen))
            return type(x), place, memory, x.shape, x.stride(), x.storage_offset(), x.dtype, x.requires_grad, fact(x)
        if isinstance(x, _PLAIN):
            return type(x), x
        if type(x) in (tuple, list):
            return type(x), [key(item) for item in x]
        raise _Unknown

    try:
        args, kwargs = value
        return [key(x) for x in args], [(name, key(x)) for name, x in kwargs.items()]
    except _Unknown:
        return None


def holds_tensors_only(output: Any) -> bool:
    """True if the nested ``output`` of a layer holds nothing that could change later, beside tensors."""
    return arguments_of_call(((output,), {}), lambda x: None) is not None


class _Unknown(Exception):
    """An argument that a layer may read or change in a way that is not known."""


def track(module: nn.Module, attributes: Iterable[str]) -> None:
    """Note from now on when one of the ``attributes`` of ``module`` is read, for :class:`WatchedRun`.

    Raises:
        TypeError: the class of ``module`` cannot be extended.
    """
    kind: Any = type(module)
    members = {name: _tracked(name) for name in attributes}
    vars(module)[_READ] = set()
    module.__class__ = type(kind)(
        kind.__name__, (kind,), {"__module__": kind.__module__, "__qualname__": kind.__qualname__, **members}
    )


def _tracked(name: str) -> property:
    def get(module: nn.Module) -> Any:
        vars(module)[_READ].add(name)
        return vars(module)[name]

    def put(module: nn.Module, value: Any) -> None:
        vars(module)[name] = value

    return property(get, put)


def _equal(one: _Description, other: _Description, distance: int) -> set[tuple[str, str]] | None:
    """Where two equal layers, ``distance`` layers apart, have their index; None if they are not equal."""
    if one.facts != other.facts or one.integers.keys() != other.integers.keys():
        return None
    indices = set()
    for place, value in one.integers.items():
        if value != other.integers[place]:
            if other.integers[place] - value != distance:
                return None
            indices.add(place)
    for x, y in zip(one.buffers, other.buffers, strict=True):
        # Values that are still in files are not compared.
        if not (x is y or x.is_meta or (type(x) is type(y) is torch.Tensor and torch.equal(x, y))):
            return None
    return indices


def _frozen(value: Any, within: dict[int, str]) -> Any:
    """Something that is equal for equal values; objects of unknown kinds are equal to themselves alone."""
    if isinstance(value, _PLAIN):
        return type(value), value
    if type(value) in (list, tuple):
        return type(value), [_frozen(x, within) for x in value]
    if type(value) is dict:
        return dict, [(_frozen(k, within), _frozen(x, within)) for k, x in value.items()]
    if type(value) in (set, frozenset) and all(isinstance(x, _PLAIN) for x in value):
        return type(value), frozenset((type(x), x) for x in value)
    if isinstance(value, types.MethodType):
        return types.MethodType, id(value.__func__), _frozen(value.__self__, within)
    if id(value) in within:
        return "module", within[id(value)]
    return "object", id(value)


def _entries(tables: list[Mapping[str, Any]], layers: set[str]) -> dict[str, list[Any]]:
    """Layer -> what the tables say about it, under names within the layer."""
    found: dict[str, list[Any]] = {}
    for number, table in enumerate(tables):
        for name, value in table.items():
            path = name
            while path and path not in layers:
                path = path.rpartition(".")[0]
            if path:
                own = found.setdefault(path, [{} for _ in tables])
                own[number][name[len(path) :]] = value
    return found
