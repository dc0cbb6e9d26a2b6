"""Where does the code that a model runs come from: a release of a library, or the user's own hands?

A class of a library shows little: its ``forward`` may have been replaced, on the class or on one instance, or a
function that it calls (``modeling_llama.apply_rotary_pos_emb = mine``), or an entry of a registry that it reads (the
attention functions, the activations). So each function is looked at: where was it written?
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

#: Packages whose releases are tested with plans, and what their modeling code calls.
_RELEASED = frozenset(
    "torch torchvision torchao transformers peft accelerate bitsandbytes liger_kernel kernels trl timm diffusers "
    "sentence_transformers hf_automodel_parallel huggingface_hub numpy einops triton flash_attn flash_attn_interface "
    "causal_conv1d mamba_ssm fla megatron_fsdp safetensors typing_extensions".split()
)
#: Modules with base classes of all models, whose methods beside the forward compute no activations.
_GENERAL = frozenset(["builtins", "torch.nn.modules.module", "transformers.modeling_utils"])
#: Modules of transformers whose classes are parts of models; quantised layers of its integrations are not.
_MODELING = re.compile(r"transformers\.(?!integrations\.|quantizers\.)")
#: Modules of torch whose functions modeling code calls by their full names.
_CALLED_BY_NAME = ("torch.nn.functional", "torch")

#: Types of functions that can be taken apart.
FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)


@dataclass
class RunningCode:
    """The code that a model runs.

    Attributes:
        own: where something stands that comes from no release of the libraries -> its name; each name once.
        functions: the functions of ``own``.
        modules: names of transformers' Python modules with the forwards and attention functions that the model runs.
    """

    own: dict[str, str] = field(default_factory=dict)
    functions: list[types.FunctionType] = field(default_factory=list)
    modules: set[str] = field(default_factory=set)

    def key(self) -> tuple[Any, ...] | None:
        """The functions of :attr:`own`, hashable; None if one of them holds objects, which a key would keep alive."""
        held = [c for function in self.functions for c in _held_by(function)]
        if not all(isinstance(value, (type, int, float, str, types.NoneType)) for value in held):
            return None
        return tuple(sorted((function.__code__ for function in self.functions), key=id)), tuple(held)

    def names(self) -> set[str]:
        """The global names and attributes that the user's own code reads."""
        return {name for code in self._codes() for name in code.co_names}

    def numbers(self) -> set[int]:
        """The integers in the user's own code, in what it closes over, and in the globals that it reads."""
        found: list[Any] = [c for code in self._codes() for c in code.co_consts]
        found += [x for constant in found if isinstance(constant, (tuple, frozenset)) for x in constant]
        for function in self.functions:
            found += [function.__globals__.get(name) for name in function.__code__.co_names]
            found += function.__defaults__ or ()
            found += _held_by(function)
        return {value for value in found if type(value) is int}

    def _codes(self) -> Iterator[types.CodeType]:
        codes = [function.__code__ for function in self.functions]
        while codes:
            code = codes.pop()
            yield code
            codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]


def running_code(model: nn.Module) -> RunningCode:
    """The origin of the code of ``model``: its modules' classes and own attributes, what these call, registries.

    Takes about a millisecond. It reads the objects that would be called now, so it is not cached.
    """
    code = RunningCode()
    strings: set[str] = set()
    classes: dict[type, str] = {}
    called: set[str] = set(_CALLED_BY_NAME)
    for name, module in model.named_modules():
        classes.setdefault(type(module), name)
        for key, value in own_functions_of(module).items():
            _add(code, f"{name}.{key}", type(module).__name__ if key == "forward" else "", value)
        settings = getattr(module, "config", None)
        strings.update(v for v in getattr(settings, "__dict__", {}).values() if isinstance(v, str))
    for cls, name in classes.items():
        for base in _computing_bases(cls):
            if package(base) in _RELEASED:
                called.add(base.__module__)
                if "forward" in vars(base) and _MODELING.match(base.__module__):
                    code.modules.add(base.__module__)
            elif cls.__name__ not in code.own.values():
                code.own[name] = cls.__name__
            for key, value in vars(base).items():
                inner = _function_of_attribute(value)
                if package(base) not in _RELEASED:
                    code.functions += [inner] if isinstance(inner, types.FunctionType) else []
                elif inner is not None and is_own(inner):
                    _add(code, name if key == "forward" else f"{base.__module__}.{base.__name__}.{key}", "", inner)
    for name in sorted(called):
        _add_globals(code, name, strings)
    for function in code.functions:  # which grows: the user's helper functions, and theirs
        for name in function.__code__.co_names:
            helper = function.__globals__.get(name)
            if isinstance(helper, types.FunctionType) and is_own(helper) and helper not in code.functions:
                code.functions.append(helper)
    return code


def package(code: Any) -> str:
    """The package that defines a class or function, also of one that was decorated to look like another."""
    while isinstance(code, (types.MethodType, functools.partial)):
        code = code.__func__ if isinstance(code, types.MethodType) else code.func
    names = getattr(code, "__globals__", None)
    module = names.get("__name__", "") if isinstance(code, types.FunctionType) and names else ""
    return str(module or getattr(code, "__module__", "") or "").partition(".")[0]


def own_functions_of(module: nn.Module) -> dict[str, Any]:
    """The functions that were set on the instance ``module`` and come from no release: attribute -> function."""
    return {key: v for key, v in vars(module).items() if isinstance(v, FUNCTIONS) and is_own(v)}


def is_own(value: Any) -> bool:
    """True if a function, or one that it wraps, comes from no release of the libraries."""
    return any(True for _ in _own_within(value, 0))


def _own_within(value: Any, depth: int) -> Iterator[Any]:
    """The functions of the user's own in ``value``: it itself, and what it wraps or was decorated with."""
    if isinstance(value, types.MethodType):
        value = value.__func__
    if isinstance(value, functools.partial):
        for part in (value.func, *value.args, *value.keywords.values()):
            if isinstance(part, FUNCTIONS):
                yield from _own_within(part, depth)
        return
    if not isinstance(value, types.FunctionType):
        if not isinstance(value, type) and callable(value) and not _is_known(package(type(value))):
            yield value
        return
    file, code = value.__globals__.get("__file__"), value.__code__
    # Code that was put into a function of a library has another file.
    moved = file is not None and code.co_filename[:1] != "<" and code.co_filename != file
    if not _is_known(package(value)) or moved:
        yield value
    elif depth < 3:
        for content in _held_by(value):
            if isinstance(content, FUNCTIONS):
                yield from _own_within(content, depth + 1)


def _held_by(function: types.FunctionType) -> list[Any]:
    """What a function closes over."""
    contents = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            contents.append(cell.cell_contents)
    return contents


def _is_known(name: str) -> bool:
    return name in _RELEASED or name in sys.stdlib_module_names or not name


def _computing_bases(cls: type) -> Iterator[type]:
    """``cls`` and its bases, up to those that all models have."""
    for base in cls.__mro__:
        if base.__module__ in _GENERAL:
            return
        yield base


def _function_of_attribute(value: Any) -> Any:
    if isinstance(value, (staticmethod, classmethod)):
        return value.__func__
    if isinstance(value, property):
        return value.fget
    return value if isinstance(value, FUNCTIONS) else None


def _add_globals(code: RunningCode, name: str, strings: set[str]) -> None:
    """Add the user's functions among the globals of a Python module, and in its registries under ``strings``."""
    for key, value in list(vars(sys.modules[name]).items()) if name in sys.modules else ():
        if isinstance(value, type):
            continue  # classes are known by their modules
        if isinstance(value, Mapping) and not key.startswith("__"):
            for entry in strings:
                try:
                    found = value.get(entry)
                except Exception:  # a lazy registry, whose entry needs a library that is missing
                    continue
                if isinstance(found, FUNCTIONS) and is_own(found):
                    _add(code, f"{name}.{key}[{entry!r}]", "", found)
                elif isinstance(found, types.FunctionType) and package(found) == "transformers":
                    code.modules.add(found.__module__)
        elif callable(value) and is_own(value):
            _add(code, f"{name}.{key}", "", value)


def _add(code: RunningCode, where: str, name: str, value: Any) -> None:
    if not is_own(value):
        return
    found = [f for f in _own_within(value, 0) if isinstance(f, types.FunctionType)]
    code.functions += [f for f in found if f not in code.functions]
    name = name or next((f.__qualname__ for f in found), type(value).__name__)
    if name not in code.own.values():
        code.own[where] = name
