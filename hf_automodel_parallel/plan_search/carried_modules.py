"""Modules that were replaced after a model was built, carried over to its tiny proxy model in small sizes.

The proxy model is built by the model's class. A user may since have replaced modules (an attention of his own, another
activation) or forwards of single modules. A plan is right for the model with them, so they are tried too.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..core.model_view import layer_pattern, without_wrappers
from ..core.sharding_spec import Plan
from ..errors import AutoParallelError, PlanError, first_line
from .code_origin import FUNCTIONS, own_functions_of
from .proxy_model import HEAD_DIM, HEADS, HIDDEN, INTERMEDIATE, build_proxy_model, fingerprint, layers_of_proxy

#: Fields of a config that name a size, the first one wins where two real sizes are equal.
_SIZES = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")


def proxy_with_replaced_modules(model: nn.Module, first: int = 0) -> nn.Module:
    """:func:`~.proxy_model.build_proxy_model` with the modules and forwards of ``model`` that its class does not build.

    Raises:
        PlanError: there is no proxy model, or a module cannot be made small; with its name.
    """
    small = build_proxy_model(model, first)
    _carry_over(model, small, layers_of_proxy(model.config, first))
    return small


def signature(model: nn.Module) -> tuple[Any, ...]:
    """What the proxy model of ``model`` depends on, as a key: classes, forwards and settings of modules, and config."""
    modules = []
    for name, module in model.named_modules():
        settings = repr([(k, v) for k, v in vars(module).items() if isinstance(v, (bool, int, float, str))])
        modules.append((name, type(module), vars(module).get("forward", type(module).forward), settings))
    return (*modules, fingerprint(model))


def once_per_kind(
    known: dict[Any, Plan | str], model: nn.Module, more: Callable[[], Any], find: Callable[[], Plan]
) -> Plan:
    """The plan that ``find`` returns for ``model``, or the error that it raises; once per process and kind of model.

    A model on whose instances a ``forward`` or functions of the user's own were set is not remembered: a key with them
    would keep the model alive, and never match again.

    Args:
        known: what was found so far; an error as its message.
        model: see :func:`signature`.
        more: returns what the plan depends on beside the model, hashable; None: nothing is to be remembered.
        find: looks for the plan.

    Raises:
        PlanError: ``find`` raised an error of this package, now or before.
    """
    rest = more()
    if rest is None or any(_set_on(module) for module in model.modules()):
        return find()
    key = signature(model), rest
    if key not in known:
        try:
            known[key] = find()
        except AutoParallelError as error:
            known[key] = str(error)
    found = known[key]
    if isinstance(found, str):
        raise PlanError(found)
    return found


def _carry_over(model: nn.Module, small: nn.Module, kept: list[int]) -> None:
    """Give ``small`` the modules and the forwards of ``model`` that its class does not build, in place.

    ``kept`` is the index in ``model`` of each layer of ``small``. PEFT's layers are looked through.
    """
    real = {without_wrappers(n): m for n, m in model.named_modules() if not type(m).__module__.startswith("peft.")}
    built = dict(small.named_modules())
    counterparts = {name: other for name, other in _names(small, model, kept) if other in real}
    memo: dict[int, Any] = {id(real[other]): built[name] for name, other in counterparts.items()}
    if getattr(model, "config", None) is not None:
        memo[id(model.config)] = small.config
    for name, other in _replaced(real, built, counterparts).items():
        module = real[other]
        if not _is_in(small, name, built[name]):
            continue  # below a module that was carried over
        try:
            if type(module) is not type(built[name]):
                made = _small_module(module, built[name], dict(memo), _sizes(model, small))
                owner, _, key = name.rpartition(".")
                small.get_submodule(owner).register_module(key, made)
            else:
                for key, function in _set_on(module).items():
                    setattr(built[name], key, rebound(function, memo | {id(module): built[name]}))
        except Exception as error:  # code of the user's module
            raise PlanError(
                f"{other} ({type(module).__name__}) cannot be made small for a tiny proxy model: {first_line(error)}"
            ) from error


def _replaced(real: dict[str, nn.Module], built: dict[str, nn.Module], counterparts: dict[str, str]) -> dict[str, str]:
    """Name in the proxy model -> name in the model of a module that takes its place there; outer ones first.

    A kind of module that only layers without a counterpart have takes the place of one in the last layers.
    """
    places: dict[str, list[str]] = {}
    for name in built:
        places.setdefault(layer_pattern(name), []).append(name)
    result: dict[str, str] = {}
    found: dict[tuple[Any, ...], str] = {}
    for other, module in real.items():
        pattern = layer_pattern(other)
        types_there = {type(built[name]) for name in places.get(pattern, ())}
        if pattern in places and (type(module) not in types_there or _set_on(module)):
            found.setdefault((pattern, *_kind(module)), other)
            result |= {name: other for name in places[pattern] if counterparts.get(name) == other}
    placed = {(layer_pattern(n), *_kind(real[o])) for n, o in result.items()}
    for kind, other in found.items():
        if kind not in placed:
            free = [name for name in places[kind[0]] if name not in result] or places[kind[0]]
            result[free[-1]] = other
    return {name: result[name] for name in built if name in result}


def _set_on(module: nn.Module) -> dict[str, Any]:
    """What was set on the instance ``module``: a forward, and functions of the user's own; attribute -> function."""
    forward = {"forward": vars(module)["forward"]} if "forward" in vars(module) else {}
    return forward | own_functions_of(module)


def _kind(module: nn.Module) -> tuple[Any, ...]:
    return type(module), *_set_on(module).items()


def _names(small: nn.Module, model: nn.Module, kept: list[int]) -> Iterator[tuple[str, str]]:
    """Name of each module of ``small``, and of its counterpart in ``model``."""
    for name, _ in small.named_modules():
        parts, path = name.split("."), ""
        for i, part in enumerate(parts):
            if part.isdigit():
                length, other = _length(small, ".".join(parts[:i])), _length(model, path)
                if length == len(kept) and other > length and int(part) < len(kept) and kept[-1] < other:
                    part = str(kept[int(part)])
            path = f"{path}.{part}".lstrip(".")
        yield name, path


def _length(model: nn.Module, name: str) -> int:
    try:
        return len(list(model.get_submodule(name).children()))
    except AttributeError:
        return 0


def _is_in(model: nn.Module, name: str, module: nn.Module) -> bool:
    try:
        return model.get_submodule(name) is module
    except AttributeError:
        return False


def _sizes(model: nn.Module, small: nn.Module) -> dict[int, int]:
    """Size in ``model`` -> size in ``small``."""
    sizes: dict[int, int] = {}
    outer: Any = model.config
    reduced_outer: Any = small.config
    configs = [(outer, reduced_outer)]
    if hasattr(outer, "get_text_config"):
        configs.append((outer.get_text_config(), reduced_outer.get_text_config()))
    for one, other in configs:
        for field in _SIZES:
            size, reduced = getattr(one, field, None), getattr(other, field, None)
            if type(size) is int and type(reduced) is int:
                sizes.setdefault(size, reduced)
        hidden, heads = getattr(one, "hidden_size", None), getattr(one, "num_attention_heads", None)
        if type(hidden) is int and type(heads) is int and heads:
            sizes.setdefault(hidden // heads, HEAD_DIM)
            for times in (2, 3, 4):
                sizes.setdefault(times * hidden, times * HIDDEN)
        inner = getattr(one, "intermediate_size", None)
        if type(inner) is int:
            sizes.setdefault(2 * inner, 2 * INTERMEDIATE)
    return sizes


def _small_module(module: nn.Module, like: nn.Module, memo: dict[int, Any], sizes: dict[int, int]) -> nn.Module:
    """A copy of ``module`` with the sizes of ``like``, the module that the class builds in its place."""
    known = dict(like.named_modules())
    for name, child in module.named_modules():
        memo.pop(id(child), None)
        if name and not _set_on(child) and type(known.get(name)) is type(child):
            memo[id(child)] = known[name]
    tensors = dict(like.named_parameters()) | dict(like.named_buffers())
    generator = torch.Generator().manual_seed(3)
    own = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in own:
        if name in tensors and tensors[name].ndim == tensor.ndim:
            value = tensors[name].detach().clone()
        else:
            value = _small_tensor(tensor, sizes, generator)
        memo[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    made = copy_model(module, memo)
    for name, child in made.named_modules():
        if child is known.get(name):
            continue
        other = known.get(name)
        for key, value in list(vars(child).items()):
            if type(value) not in (int, float):
                continue
            if other is not None and type(vars(other).get(key)) is type(value):
                setattr(child, key, vars(other)[key])
            elif type(value) is int and value > HEADS // 2 and value in sizes:
                setattr(child, key, sizes[value])
    return made


def _small_tensor(tensor: torch.Tensor, sizes: dict[int, int], generator: torch.Generator) -> torch.Tensor:
    shape = [sizes.get(size, size) for size in tensor.shape]
    if not isinstance(tensor, nn.Parameter) and tensor.device.type != "meta":
        if all(new <= size for new, size in zip(shape, tensor.shape, strict=True)):  # a table keeps its values
            return tensor[tuple(slice(size) for size in shape)].detach().cpu().clone()
    if not tensor.is_floating_point():
        return torch.zeros(shape, dtype=tensor.dtype)
    value = torch.randn(shape, generator=generator)
    return 1 + 0.1 * value if tensor.ndim < 2 else value * HIDDEN**-0.5


# ---- copies whose replaced forwards belong to the copy --------------------------------------------------------------


def copy_model(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy of ``model`` in which forwards that were replaced by functions use the copied modules.

    ``copy.deepcopy`` keeps functions as they are, with the modules and methods that they hold.

    Args:
        model: the module to copy.
        memo: id of an object -> what replaces it in the copy.
    """
    memo = {} if memo is None else memo
    result = copy.deepcopy(model, memo)
    for module in list(model.modules()):
        copied = memo.get(id(module))
        if isinstance(copied, nn.Module):
            for key, function in _set_on(module).items():
                if isinstance(function, FUNCTIONS):
                    setattr(copied, key, rebound(function, memo))
    return result


def rebound(value: Any, memo: dict[int, Any]) -> Any:
    """``value``, a function, method or what they hold, with the objects that ``memo`` has for those it holds."""
    if id(value) in memo and not isinstance(value, FUNCTIONS):
        return memo[id(value)]
    if isinstance(value, types.MethodType):
        return types.MethodType(rebound(value.__func__, memo), memo.get(id(value.__self__), value.__self__))
    if isinstance(value, functools.partial):
        return functools.partial(
            rebound(value.func, memo),
            *(rebound(x, memo) for x in value.args),
            **{key: rebound(x, memo) for key, x in value.keywords.items()},
        )
    if not isinstance(value, types.FunctionType) or not value.__closure__:
        return value
    contents = []
    for cell in value.__closure__:
        try:
            contents.append(rebound(cell.cell_contents, memo))
        except ValueError:  # an empty cell
            return value
    old = [cell.cell_contents for cell in value.__closure__]
    if all(new is before for new, before in zip(contents, old, strict=True)):
        return value
    result = types.FunctionType(
        value.__code__, value.__globals__, value.__name__, value.__defaults__, tuple(map(types.CellType, contents))
    )
    result.__kwdefaults__, result.__dict__ = value.__kwdefaults__, dict(value.__dict__)
    return result
