"""The registry of strategies: by the model's class name, through base classes and wrappers. Imports lazily; installed
packages can add entries.
"""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, TypeVar

from torch import nn

from ..core.importing import import_object
from ..core.model_view import ModelView
from ..errors import ConfigError, PrepareError, RegistrationError, without_stop
from .base import ParallelizationStrategy
from .default import DefaultParallelizationStrategy

logger = logging.getLogger(__name__)

#: Entry-point group of installed packages; an entry is ``model class name = "package.module:StrategyClass"``.
ENTRY_POINTS = "hf_automodel_parallel.strategies"

_FAMILIES = "hf_automodel_parallel.strategies.families"

#: The families of this package, as entry points: a module is imported when a model of its family is prepared.
BUILT_IN: dict[str, str] = {
    "NemotronHForCausalLM": f"{_FAMILIES}.nemotron_h:NemotronHParallelizationStrategy",
    "DeepseekV4ForCausalLM": f"{_FAMILIES}.deepseek_v4:DeepseekV4ParallelizationStrategy",
    "Qwen3_5ForConditionalGeneration": f"{_FAMILIES}.qwen3_5:Qwen3_5ParallelizationStrategy",
    "Qwen3_5ForCausalLM": f"{_FAMILIES}.qwen3_5:Qwen3_5ParallelizationStrategy",
    "WanTransformer3DModel": f"{_FAMILIES}.wan:WanParallelizationStrategy",
    "HunyuanVideo15Transformer3DModel": f"{_FAMILIES}.hunyuan_video:HunyuanParallelizationStrategy",
    "BagelForUnifiedMultimodal": f"{_FAMILIES}.bagel:BagelParallelizationStrategy",
}

_Class = TypeVar("_Class", bound=type)


class StrategyRegistry(MutableMapping[str, ParallelizationStrategy]):
    """Name of a model class -> strategy instance, as a dict; an instance is made at its first lookup.

    A name is looked up among what was registered in this process, then among the entry points of installed packages,
    then among the families of this package. ``copy``, ``|`` and ``update`` import no strategy, so that code which
    saves and restores the registry (``unittest.mock.patch.dict``) does not import every family.
    """

    def __init__(self) -> None:
        self._registered: dict[str, ParallelizationStrategy] = {}
        self._loaded: dict[str, ParallelizationStrategy] = {}
        self._removed: set[str] = set()

    def __getitem__(self, name: str) -> ParallelizationStrategy:
        if name in self._registered:
            return self._registered[name]
        if name in self._removed:
            raise KeyError(name)
        if name not in self._loaded:
            target = _targets().get(name)
            if target is None:
                raise KeyError(name)
            self._loaded[name] = _load(name, target)
        return self._loaded[name]

    def __setitem__(self, name: str, strategy: ParallelizationStrategy) -> None:
        if not isinstance(strategy, ParallelizationStrategy):
            raise RegistrationError(
                f"the strategy for {name!r} is {strategy!r}; give an instance of a subclass of ParallelizationStrategy."
            )
        self._registered[name] = strategy

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise KeyError(name)
        self._registered.pop(name, None)
        if name in _targets():
            self._removed.add(name)

    def __iter__(self) -> Iterator[str]:
        yield from self._registered
        yield from (name for name in _targets() if name not in self._registered and name not in self._removed)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:  # imports no strategy
        return name in self._registered or (name in _targets() and name not in self._removed)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self)})"

    def __reversed__(self) -> Iterator[str]:
        return reversed(list(self))

    def copy(self) -> StrategyRegistry:
        """A registry with the same entries, which can be changed on its own."""
        new = type(self)()
        new._registered, new._removed = dict(self._registered), set(self._removed)
        # Shared: a name has one instance in all copies, as in copies of a dict.
        new._loaded = self._loaded
        return new

    __copy__ = copy

    def update(self, other: Any = (), /, **more: ParallelizationStrategy) -> None:
        """Add the entries of ``other`` (a mapping, or pairs) and ``more``; the last value of a name counts.

        Raises:
            RegistrationError: a value is not a strategy instance.
        """
        if isinstance(other, StrategyRegistry):
            # A name that other would look up is looked up here, too: also where this registry has a value of its own.
            for name in other:
                self._registered.pop(name, None)
            self._removed.difference_update(other)
            other = other._registered
        super().update(other, **more)

    def clear(self) -> None:
        """Remove all entries."""
        self._registered.clear()
        self._removed.update(_targets())

    def __or__(self, other: Any) -> StrategyRegistry:
        if not isinstance(other, Mapping):
            return NotImplemented
        new = self.copy()
        new.update(other)
        return new

    def __ror__(self, other: Any) -> StrategyRegistry:
        if not isinstance(other, Mapping):
            return NotImplemented
        new = self.copy()
        new.update({name: strategy for name, strategy in other.items() if name not in self})
        return new

    def __ior__(self, other: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> StrategyRegistry:  # type: ignore[misc]
        self.update(other)
        return self


@functools.cache
def _targets() -> dict[str, str]:
    """Name of a model class -> "package.module:StrategyClass", installed packages before our own families."""
    result = dict(BUILT_IN)
    seen: dict[str, str] = {}
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        if seen.setdefault(point.name, point.value) != point.value:
            raise ConfigError(
                f"two installed packages register a strategy for {point.name!r}: {seen[point.name]} and {point.value} "
                f"(entry points of the group {ENTRY_POINTS!r}). Uninstall one, or choose by "
                "register_parallel_strategy(name=...)."
            )
        # An installed package may replace a family of ours.
        if point.name in BUILT_IN:
            logger.info("the strategy for %s comes from the installed %s", point.name, point.value)
        result[point.name] = point.value
    return result


def _load(name: str, target: str) -> ParallelizationStrategy:
    try:
        found = import_object(target)
    except Exception as error:  # the import of another package, which may raise any error
        raise ConfigError(
            f"the strategy for {name!r}, {target!r} (an entry point of the group {ENTRY_POINTS!r}), cannot be loaded: "
            f"{type(error).__name__}: {without_stop(error)}. Repair or uninstall that package."
        ) from error
    if inspect.isclass(found) and issubclass(found, ParallelizationStrategy):
        found = found()
    if not isinstance(found, ParallelizationStrategy):
        raise ConfigError(f"the strategy for {name!r}, {target!r}, is not a subclass of ParallelizationStrategy.")
    return found


#: The registry. Use :func:`register_parallel_strategy` to add to it.
PARALLELIZATION_STRATEGIES = StrategyRegistry()

#: The strategy of every model without an entry.
DEFAULT_STRATEGY = DefaultParallelizationStrategy()


def register_parallel_strategy(arg: Any = None, *, name: str | None = None) -> Callable[[_Class], _Class]:
    """Class decorator that registers a strategy for the model class called ``name`` and its subclasses.

    An installed package does not need this call if it has an entry point in the group
    ``hf_automodel_parallel.strategies``: ``name = "package.module:StrategyClass"``.

    Args:
        arg: not used; without it, ``@register_parallel_strategy`` without parentheses would raise an unclear error.
        name: name of the model class, bare (``"LlamaForCausalLM"``), or with its module if two classes have one name.

    Returns:
        A decorator that returns the class unchanged. The class is constructed once, without arguments.

    Raises:
        ConfigError: ``name`` is missing (also a ``ValueError``).
        RegistrationError: the decorated object is not a strategy class, or the name is taken (also an
            ``AssertionError``).

    Examples:
        >>> @register_parallel_strategy(name="MyForCausalLM")
        ... class MyStrategy(DefaultParallelizationStrategy): ...
    """
    if not isinstance(name, str) or not name:
        raise ConfigError("name is required: @register_parallel_strategy(name='MyModelClass')")

    def register(cls: _Class) -> _Class:
        if not (inspect.isclass(cls) and issubclass(cls, ParallelizationStrategy)):
            raise RegistrationError(
                f"{cls!r} cannot be registered for {name!r}: it is not a subclass of ParallelizationStrategy."
            )
        _check_steps(cls)
        if name in PARALLELIZATION_STRATEGIES:
            raise RegistrationError(
                f"a strategy for {name!r} is registered already. To replace it, delete it first: "
                f"del PARALLELIZATION_STRATEGIES[{name!r}]."
            )
        PARALLELIZATION_STRATEGIES[name] = cls()
        return cls

    return register


def _check_steps(cls: type) -> None:
    """Raise if a public method of a strategy class is nearly, but not, a step: nobody would call it."""
    steps = [name for name, value in vars(DefaultParallelizationStrategy).items() if inspect.isfunction(value)]
    steps += [name for name, value in vars(ParallelizationStrategy).items() if inspect.isfunction(value)]
    known = {name for base in cls.__mro__[1:] for name in vars(base)}
    for name, value in vars(cls).items():
        if name.startswith("_") or name in known or not inspect.isfunction(value):
            continue
        near = difflib.get_close_matches(name, steps, n=1, cutoff=0.85)
        if near:
            raise RegistrationError(
                f"{cls.__name__}.{name} is not a step of a strategy, so nothing would call it; did you mean "
                f"{near[0]!r}? The name of a helper of yours starts with an underscore."
            )


def get_parallelization_strategy(model: nn.Module) -> ParallelizationStrategy:
    """The strategy for ``model``: that of its class, else of its nearest base class, else the default.

    Wrappers of PEFT, ``torch.compile`` and DDP around the model are ignored.

    Args:
        model: a module, or a stand-in with ``named_children``, of which only the class is read.

    Raises:
        PrepareError: ``model`` is neither.
    """
    if isinstance(model, type) or not hasattr(model, "named_children"):
        raise PrepareError(
            f"model={model!r}: a strategy is looked for by the class of a torch.nn.Module. Give the model itself."
        )
    for cls in type(_innermost(model) if isinstance(model, nn.Module) else model).__mro__:
        for name in (f"{cls.__module__}.{cls.__qualname__}", cls.__name__):
            if name in PARALLELIZATION_STRATEGIES:
                return PARALLELIZATION_STRATEGIES[name]
    _warn_of_misspelt_name(type(_innermost(model)).__name__)
    return DEFAULT_STRATEGY


@functools.cache
def _warn_of_misspelt_name(name: str) -> None:
    """Warn if a strategy is registered for a name that is nearly ``name``, and that no class of transformers has."""
    near = difflib.get_close_matches(name, [n for n in PARALLELIZATION_STRATEGIES if n not in BUILT_IN], 1, 0.9)
    if near:
        import transformers

        if near[0] not in dir(transformers):
            logger.warning(
                "no strategy is registered for %s, which gets the default one; one is registered for %r. If that is a "
                "misspelling, register it for %r.",
                name,
                near[0],
                name,
            )


def _innermost(model: nn.Module) -> nn.Module:
    """The model inside of PEFT's wrapper, ``torch.compile``'s and DDP's."""
    while True:
        inner = ModelView.of(model).inner
        children = dict(inner.named_children())
        # A wrapper has one child and no parameters of its own; a model with a module of this name has more.
        if children.keys() in ({"_orig_mod"}, {"module"}) and not any(True for _ in inner.parameters(recurse=False)):
            (inner,) = children.values()
        if inner is model:
            return model
        model = inner
