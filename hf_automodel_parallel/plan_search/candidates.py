"""Candidates for pairs of column-wise and row-wise projections among the linear layers of a model, to be verified.

Hooks observe one forward of the tiny proxy model. Layers that read the *same tensor object* are columns (q, k and v;
gate and up). The next layer whose output has the width of that tensor is their row (o, down). Every other linear layer
can be sharded on its own, with an all-gathered output.
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
        row: the row-wise layer behind them, or "" if there is none.
    """

    columns: tuple[str, ...]
    row: str = ""


@dataclass
class Variant:
    """One way to shard a group.

    Attributes:
        styles: pattern -> style.
        counts: pattern of modules -> attributes that count sharded heads or features.
        head_arguments: pattern of modules -> argument -> (dimension, attribute that counts the heads).
        inside: the activations between columns and row stay sharded; else each output is all-gathered.
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
    """Observes one forward of the tiny proxy model; the constructor runs it.

    Args:
        model: the tiny proxy model.
        inputs: its batch.

    Attributes:
        groups: groups of layers in the order of the forward, each set of patterns once.
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
            alone = sum(other.source is call.source for other in self.calls) == 1
            if columns and (call.source is columns[0].source or (not alone and _in_one_module(call, columns[0]))):
                # Cross attention: keys and values read something else than the queries do.
                columns.append(call)
            elif columns and alone and _in_one_layer(call, columns[0]) and _may_be_row(call, columns):
                yield Group(tuple(dict.fromkeys(pattern_of(c.name) for c in columns)), pattern_of(call.name))
                columns = []
            else:
                yield from (Group((pattern_of(c.name),)) for c in columns)
                columns = [call]
        yield from (Group((pattern_of(c.name),)) for c in columns)

    # ---- ways to shard a group -----------------------------------------------------------------------------------

    def variants(self, group: Group) -> Iterator[Variant]:
        """Variants to verify, the best first: activations sharded inside the group, then each layer on its own."""
        if group.row:
            yield from self._sharded_inside(group)
            gathered = dict.fromkeys(group.columns, "colwise_gather_output") | {group.row: "rowwise_split_input"}
        else:
            gathered = dict.fromkeys(group.columns, "colwise_gather_output")
        yield Variant(gathered, inside=False)

    def _sharded_inside(self, group: Group) -> Iterator[Variant]:
        by_pattern = {pattern_of(c.name): c for c in reversed(self.calls)}
        width = by_pattern[group.row].in_features
        # A single column that is 2 or 3 times as wide as its row's input packs gate and up, or q, k and v.
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
        """Sets of attributes below ``owner`` that may count heads or their total width, as pattern -> attributes; and
        pattern -> an attribute that counts all heads.
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
        # No counts first: current classes of transformers infer the number of heads from the tensor.
        for choice in ({}, heads, both, widths):
            if choice not in found:
                found.append(choice)
        return found, {pattern: name for pattern, name in counter.items() if name}

    def _per_head(self, owner: str, heads: dict[str, str]) -> Iterator[dict[str, dict[str, tuple[int, str]]]]:
        """Arguments of modules below ``owner`` that may have one value per head; see :attr:`Variant.head_arguments`."""
        found: dict[str, dict[str, tuple[int, str]]] = {}
        for pattern, attribute in heads.items():
            for name, value in self.arguments.get(pattern, {}).items():
                dim = 0 if value.ndim and value.shape[0] in (HEADS, BATCH * HEADS) else 1
                if value.ndim > dim and value.shape[dim] in (HEADS, BATCH * HEADS):
                    found.setdefault(pattern, {})[name] = (dim, attribute)
        if found:
            yield found


def _may_be_row(call: _Call, columns: list[_Call]) -> bool:
    """True if a layer may be the row of ``columns``: its output is as wide as their input; or there are three or more
    columns and its input is as wide as the widest output.

    The second rule is for attention over more than the hidden states (Zamba), whose input is wider than its output.
    """
    wide = len(columns) > 2 and call.in_features == max(column.out_features for column in columns)
    return wide or call.out_features == columns[0].in_features


def _in_one_module(call: _Call, other: _Call) -> bool:
    return call.name.rpartition(".")[0] == other.name.rpartition(".")[0]


def _in_one_layer(call: _Call, other: _Call) -> bool:
    """True if no item of a list holds one of two layers and not the other."""
    return _layer_of(call.name) == _layer_of(other.name)


def _layer_of(name: str) -> str:
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[: last + 1])


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
    """True if the parent module of a linear layer may pass its weight to a kernel on some devices (Mamba).

    Found in the source, because the proxy model runs on the CPU and does not reach that branch.
    """
    owner, _, leaf = name.rpartition(".")
    cls: Any = type(model.get_submodule(owner))
    source = source_of(cls)
    if not re.search("cuda|fast_path|use_kernel", source):
        return False
    return re.search(rf"self\.{re.escape(leaf)}\.(weight|bias)\b(?!\s*\.(dtype|device|shape))", source) is not None
