"""Which linear layers of a model may be pairs of a column-wise and a row-wise projection: guesses, to be verified.

One forward of the tiny proxy model is hooked. Layers that read the *same tensor* are columns (q, k and v; gate and up);
the next one whose output has the width of that tensor is their row (o, down). All other linear layers can still be
sharded on their own, with a gathered output.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .. import compat
from ..core.source_code import source_of
from ..plan.layer_kinds import as_matrix
from .proxy_model import BATCH, HEADS

_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")


@dataclass(frozen=True)
class Group:
    """Linear layers that belong together, by their patterns.

    Attributes:
        columns: layers that read the same activation.
        row: the layer that writes the result, or "" for columns without one.
    """

    columns: tuple[str, ...]
    row: str = ""


@dataclass
class Variant:
    """One way to shard a group.

    Attributes:
        styles: pattern -> style.
        counts: pattern of modules -> attributes that count what is sharded.
        head_arguments: pattern of modules -> argument -> (dimension, attribute that counts the heads).
        inside: the activations between columns and row stay sharded; else the outputs are gathered.
    """

    styles: dict[str, str]
    counts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    head_arguments: dict[str, dict[str, tuple[int, str]]] = field(default_factory=dict)
    inside: bool = True


@dataclass
class _Call:
    name: str
    source: torch.Tensor
    in_features: int
    out_features: int


class Observed:
    """What one forward of the tiny proxy model shows.

    Args:
        model: the tiny proxy model.
        inputs: its batch.

    Attributes:
        groups: groups of layers in the order in which they run, each set of patterns once.
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        self.model = model
        self.calls: list[_Call] = []
        self.arguments: dict[str, dict[str, torch.Tensor]] = {}  # pattern of a module -> keyword -> tensor
        ends = {compat.input_embedding_module(model), compat.lm_head_module(model)}
        handles = []
        for name, module in model.named_modules():
            if as_matrix(module, name) is not None and module not in ends and not _read_by_owner(model, name):
                handles.append(module.register_forward_pre_hook(self._linear(name, module)))
            handles.append(module.register_forward_pre_hook(self._module(name), with_kwargs=True))
        try:
            with torch.no_grad():
                model(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        self.groups = list(dict.fromkeys(self._groups()))

    def _linear(self, name: str, module: nn.Module) -> Any:
        matrix = as_matrix(module, name)

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], torch.Tensor) and matrix is not None:
                self.calls.append(_Call(name, args[0], matrix.in_features, matrix.out_features))

        return hook

    def _module(self, name: str) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = {k: v for k, v in kwargs.items() if isinstance(v, torch.Tensor)}
            if given:
                self.arguments.setdefault(pattern_of(name), given)

        return hook

    def _groups(self) -> Iterator[Group]:
        columns: list[_Call] = []
        for call in self.calls:
            if columns and call.source is columns[0].source:
                columns.append(call)
            elif columns and _may_be_row(call, columns):
                yield Group(tuple(dict.fromkeys(pattern_of(c.name) for c in columns)), pattern_of(call.name))
                columns = []
            else:
                yield from (Group((pattern_of(c.name),)) for c in columns)
                columns = [call]
        yield from (Group((pattern_of(c.name),)) for c in columns)

    # ---- ways to shard a group -----------------------------------------------------------------------------------

    def variants(self, group: Group) -> Iterator[Variant]:
        """Variants to try, the best first: sharded inside, then each layer on its own."""
        if group.row:
            yield from self._sharded_inside(group)
            gathered = dict.fromkeys(group.columns, "colwise_gather_output") | {group.row: "rowwise_split_input"}
        else:
            gathered = dict.fromkeys(group.columns, "colwise_gather_output")
        yield Variant(gathered, inside=False)

    def _sharded_inside(self, group: Group) -> Iterator[Variant]:
        by_pattern = {pattern_of(c.name): c for c in reversed(self.calls)}
        width = by_pattern[group.row].in_features
        fused = by_pattern[group.columns[0]].out_features // width if len(group.columns) == 1 else 1
        styles = ["colwise"] + {2: ["packed_colwise"], 3: ["qkv_colwise"]}.get(fused, [])
        owner = _common_owner((*group.columns, group.row))
        counts, heads = self._counters(owner, width)
        for style in styles:
            plan = dict.fromkeys(group.columns, style) | {group.row: "rowwise"}
            for attributes in counts:
                yield Variant(plan, attributes)
                for arguments in self._per_head(owner, heads):
                    yield Variant(plan, attributes, arguments)

    def _counters(self, owner: str, width: int) -> tuple[list[dict[str, tuple[str, ...]]], dict[str, str]]:
        """Sets of attributes below ``owner`` that may count heads or the width of all of them, and one that counts
        heads.
        """
        heads: dict[str, tuple[str, ...]] = {}
        both: dict[str, tuple[str, ...]] = {}
        widths: dict[str, tuple[str, ...]] = {}
        counter: dict[str, str] = {}
        for name, module in self.model.named_modules():
            pattern = pattern_of(name)
            if not (pattern == owner or pattern.startswith(f"{owner}.")) or as_matrix(module, name) is not None:
                continue
            numbers = {k: v for k, v in vars(module).items() if type(v) is int and not k.startswith("_")}
            counting = tuple(k for k, v in numbers.items() if "head" in k and "dim" not in k and 1 < v <= HEADS)
            wide = tuple(
                k for k, v in numbers.items() if v == width and re.search("dim|size|width|hidden|feat|embed", k)
            )
            if counting:
                heads[pattern] = counting
                counter[pattern] = next((k for k in counting if numbers[k] == HEADS), "")
            if wide:
                widths[pattern] = wide
            if counting or wide:
                both[pattern] = tuple(dict.fromkeys((*counting, *wide)))
        found: list[dict[str, tuple[str, ...]]] = []
        for choice in ({}, heads, both, widths):
            if choice not in found:
                found.append(choice)
        return found, {pattern: name for pattern, name in counter.items() if name}

    def _per_head(self, owner: str, heads: dict[str, str]) -> Iterator[dict[str, dict[str, tuple[int, str]]]]:
        """Arguments of modules below ``owner`` that may have a value for each head."""
        found: dict[str, dict[str, tuple[int, str]]] = {}
        for pattern, attribute in heads.items():
            for name, value in self.arguments.get(pattern, {}).items():
                dim = 0 if value.ndim and value.shape[0] in (HEADS, BATCH * HEADS) else 1
                if value.ndim > dim and value.shape[dim] in (HEADS, BATCH * HEADS):
                    found.setdefault(pattern, {})[name] = (dim, attribute)
        if found:
            yield found


def _may_be_row(call: _Call, columns: list[_Call]) -> bool:
    """True if a layer may write the result of ``columns``: as wide as what they read, or read as wide as they write.

    The latter for attention over more than the hidden states (Zamba), where the input is wider than the result.
    """
    wide = len(columns) > 2 and call.in_features == max(column.out_features for column in columns)
    return wide or call.out_features == columns[0].in_features


def pattern_of(name: str) -> str:
    """``name`` with ``*`` for each index of a layer."""
    return _INDEX.sub("*", name)


def _common_owner(patterns: tuple[str, ...]) -> str:
    parts = [pattern.split(".")[:-1] for pattern in patterns]
    shared: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def _read_by_owner(model: nn.Module, name: str) -> bool:
    """True if the class of the module around a linear layer hands its weight to a kernel of some devices (Mamba).

    The proxy model runs the branches that a config selects, but on the CPU only.
    """
    owner, _, leaf = name.rpartition(".")
    cls: Any = type(model.get_submodule(owner))
    source = source_of(cls)
    if not re.search("cuda|fast_path|use_kernel", source):
        return False
    return re.search(rf"self\.{re.escape(leaf)}\.(weight|bias)\b(?!\s*\.(dtype|device|shape))", source) is not None
