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
#: Attributes that are the same, or harmless to read, on a sharded parameter.
_HARMLESS = frozenset("dtype device shape size ndim dim requires_grad is_meta".split())


def cross_module_reads(model: nn.Module, layers: list[nn.Module]) -> dict[str, list[str]]:
    """The parameters that forwards outside of the layers read past the module whose forward would use them.

    Chains of attributes (and ``get_input_embeddings()``) are followed that begin with ``self``, ``super()`` or a local
    name for such a chain, in ``forward`` and in the methods that it calls, also of other modules. A forward without
    source is taken to read nothing.

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
        own = {id(p) for p in module._parameters.values()}
        own |= {id(p) for m in module.children() if not compat.has_implemented_forward(m) for p in m.parameters()}
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
        owner: Any = module
        for position, attribute in enumerate(chain):
            if attribute.endswith("()"):
                owner = getattr(owner, attribute.removesuffix("()"), lambda: None)()
                if not isinstance(owner, nn.Module):
                    break
                continue
            wrapped = attribute not in owner._modules and isinstance(owner, wrappers)  # answers for what it wraps
            value = getattr(owner, attribute, None) if wrapped else owner._parameters.get(attribute)
            if isinstance(value, nn.Parameter):
                if chain[position + 1 : position + 2] not in {(name,) for name in _HARMLESS}:
                    yield value
                break
            child = owner._modules.get(attribute)
            if child is None:
                if (id(owner), attribute) not in seen:
                    seen.add((id(owner), attribute))
                    for method in _definitions(owner, attribute):
                        yield from _reads(owner, method, seen, wrappers)
                break
            owner = child


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
        while isinstance(node, ast.Attribute) or _gets_module(node):
            attribute: Any = node.func if isinstance(node, ast.Call) else node
            chain.insert(0, attribute.attr if attribute is node else f"{attribute.attr}()")
            node = attribute.value
        parent = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
        starts = {()} if parent else local.get(node.id, set()) if isinstance(node, ast.Name) else set()
        return [(*start, *chain) for start in starts]

    for node in ast.walk(tree):  # table = self.embed_tokens
        if isinstance(node, ast.Assign) and (isinstance(node.value, ast.Attribute) or _gets_module(node.value)):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    local.setdefault(target.id, set()).update(read(node.value))

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and (found := read(node)):
            chains.update(found)
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return frozenset(chains)


def _gets_module(node: ast.AST) -> bool:
    """True for ``x.get_input_embeddings()``."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _GETTERS
