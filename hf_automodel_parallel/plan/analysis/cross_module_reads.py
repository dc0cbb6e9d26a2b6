"""Which forwards read parameters of other modules? Found in their source, because a run shows only one branch.

Most models use a parameter in the forward of its module only. Some also read the table of an embedding from outside, as
``self.language_model.embed_tokens.weight[pad_token_id]``, where it is sharded.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from ... import compat
from ...core.sharding_spec import REPLICATED, ShardingSpec
from ...core.source_code import syntax_tree
from ...errors import UnsupportedError

#: Methods without arguments that return a module.
_GETTERS = frozenset(["get_input_embeddings", "get_output_embeddings"])
#: In a chain: an index that is not known, for each module of a container.
_ANY = "*"
#: At the end of a chain: the module is handed to a function, which may read its parameters.
_HANDED = "*parameters"
#: Functions that only look at what they are given.
_LOOKING = frozenset("isinstance issubclass hasattr getattr callable id type len print repr str".split())
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
#: Attributes that are the same, or harmless to read, on a sharded parameter.
_HARMLESS = frozenset("dtype device shape size ndim dim requires_grad is_meta".split())


def cross_module_reads(model: nn.Module, layers: list[nn.Module]) -> dict[str, list[str]]:
    """The parameters that forwards outside of the layers read past the module whose forward would use them.

    Chains of attributes (``get_input_embeddings()``, ``getattr(x, "name")`` and ``heads[0]``, too) are followed that
    begin with ``self``, ``super()`` or a local name for such a chain, in ``forward`` and in the methods that it calls,
    also of other modules. A module that is handed to a function is taken to be read there, and a forward without source
    to read nothing.

    Args:
        model: the model, plain or PEFT-wrapped. It is only read.
        layers: its repeated layers; a layer may read its own parameters.

    Returns:
        Name of the reading module -> names of the parameters, each under the first of its names.
    """
    wrappers = compat.peft_wrapper_types()
    inside = {id(m) for layer in layers for m in layer.modules()}
    names = {id(p): name for name, p in model.named_parameters()}
    within = {id(p) for layer in layers for p in layer.parameters()}
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if id(module) in inside or isinstance(module, wrappers) or not compat.has_implemented_forward(module):
            continue  # an adapter reads the layer that it wraps, and is run together with it
        own = set(map(id, _held_by(module)))
        forwards = _definitions(module, "forward")
        reads = {id(p) for forward in forwards for p in _reads(module, forward, set(), wrappers)} - own - within
        if reads & set(names):
            found[name] = sorted(names[key] for key in reads if key in names)
    return found


def check_cross_module_reads(spec: ShardingSpec, reads: dict[str, list[str]]) -> None:
    """Raise :class:`UnsupportedError` for a parameter whose gradient would be neither Replicate nor Partial."""
    for module, names in reads.items():
        for name in names:
            parameter = spec.parameters.get(name, REPLICATED)
            plain = parameter.dim is not None and parameter.blocks == 1 and not parameter.partial_gradient
            if parameter != REPLICATED and not plain:
                raise UnsupportedError(
                    f"the forward of {module or 'the model'} reads the parameter {name}, which belongs to another "
                    f"module and is planned as {parameter}: its gradient would be neither Replicate nor Partial. "
                    f"Leave it out of the tp_plan, or use tp_size=1."
                )


def refuse_cross_module_reads(spec: ShardingSpec, reads: dict[str, list[str]]) -> None:
    """Raise :class:`UnsupportedError` if a parameter that other modules read is sharded: they would get a shard."""
    for module, names in reads.items():
        for name in names:
            if spec.parameters.get(name, REPLICATED) != REPLICATED:
                raise UnsupportedError(
                    f"the forward of {module or 'the model'} reads the parameter {name} of another module, which the "
                    f"tensor-parallel plan shards. With backend='megatron_fsdp' that is not supported: use "
                    f"backend='fsdp2', or tp_size=1."
                )


def _reads(
    module: nn.Module, function: Any, seen: set[tuple[int, str]], wrappers: tuple[type, ...]
) -> Iterator[nn.Parameter]:
    """The parameters below ``module`` that ``function``, one of its methods, reads by a chain of attributes."""
    for chain in _chains(inspect.unwrap(function)):
        yield from _reads_of_chain(module, chain, seen, wrappers)


def _reads_of_chain(
    owner: nn.Module, chain: tuple[str, ...], seen: set[tuple[int, str]], wrappers: tuple[type, ...]
) -> Iterator[nn.Parameter]:
    """The parameters that the ``chain`` of attributes of ``owner`` reads."""
    for position, attribute in enumerate(chain):
        if attribute.endswith("()"):
            got: Any = getattr(owner, attribute.removesuffix("()"), lambda: None)()
            if not isinstance(got, nn.Module):
                return
            owner = got
            continue
        if attribute == _HANDED:
            yield from (parameter for parameter in owner._parameters.values() if parameter is not None)
            return
        if attribute == _ANY:
            for child in owner.children() if isinstance(owner, _CONTAINERS) else ():
                yield from _reads_of_chain(child, chain[position + 1 :], seen, wrappers)
            return
        wrapped = attribute not in owner._modules and isinstance(owner, wrappers)  # answers for what it wraps
        value = getattr(owner, attribute, None) if wrapped else owner._parameters.get(attribute)
        if isinstance(value, nn.Parameter):
            if chain[position + 1 : position + 2] not in {(name,) for name in _HARMLESS}:
                yield value
            return
        inner = owner._modules.get(attribute)
        if inner is None:
            if (id(owner), attribute) not in seen:
                seen.add((id(owner), attribute))
                for method in _definitions(owner, attribute):
                    yield from _reads(owner, method, seen, wrappers)
            return
        owner = inner


def _held_by(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of ``module`` itself, also in containers (a ``ParameterDict``), which have no forward."""
    yield from (parameter for parameter in module._parameters.values() if parameter is not None)
    for child in module.children():
        if not compat.has_implemented_forward(child):
            yield from _held_by(child)


def _definitions(module: nn.Module, method: str) -> list[Any]:
    """The functions of that name in the module's class and its bases, which ``super()`` reaches."""
    return [f for cls in type(module).__mro__ if inspect.isfunction(f := vars(cls).get(method))]


@functools.lru_cache(maxsize=4096)
def _chains(function: Any) -> frozenset[tuple[str, ...]]:
    """The longest chains of attributes of ``self`` or ``super()`` (also under a local name) in ``function``, without
    these.
    """
    tree = syntax_tree(function)
    chains: set[tuple[str, ...]] = set()
    local: dict[str, set[tuple[str, ...]]] = {"self": {()}}

    def read(node: Any) -> list[tuple[str, ...]]:
        chain: list[str] = []
        while (step := _step(node)) is not None:
            node, name = step
            chain.insert(0, name)
        parent = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
        starts = {()} if parent else local.get(node.id, set()) if isinstance(node, ast.Name) else set()
        return [(*start, *chain) for start in starts]

    for node in ast.walk(tree):  # table = self.embed_tokens
        if isinstance(node, ast.Assign) and _step(node.value) is not None:
            for target in node.targets:
                if isinstance(target, ast.Name):
                    local.setdefault(target.id, set()).update(read(node.value))

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in _LOOKING):
            handed = [value for value in (*node.args, *(k.value for k in node.keywords)) if _step(value) is not None]
            chains.update((*chain, _HANDED) for value in handed for chain in read(value))
        loads = isinstance(getattr(node, "ctx", ast.Load()), ast.Load)
        if loads and _step(node) is not None and (found := read(node)):
            chains.update(found)
            for inside in ast.walk(node):  # what an index is computed from
                if isinstance(inside, ast.Subscript):
                    visit(inside.slice)
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return frozenset(chains)


def _step(node: ast.AST) -> tuple[ast.AST, str] | None:
    """The last step of a chain of attributes, as (the rest, the attribute); None for anything else."""
    if isinstance(node, ast.Attribute):
        return node.value, node.attr
    if isinstance(node, ast.Subscript):
        constant = isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, (int, str))
        return node.value, str(node.slice.value) if constant else _ANY  # type: ignore[attr-defined]
    if not isinstance(node, ast.Call):
        return None
    if isinstance(node.func, ast.Attribute) and node.func.attr in _GETTERS and not node.args:
        return node.func.value, f"{node.func.attr}()"
    named = len(node.args) > 1 and isinstance(node.args[1], ast.Constant) and isinstance(node.args[1].value, str)
    if isinstance(node.func, ast.Name) and node.func.id == "getattr" and named:
        return node.args[0], node.args[1].value  # type: ignore[attr-defined]
    return None
