"""Declaration of options: an option is a typed dataclass field, and its metadata describes everything else.

:func:`option` makes such a field. Validation, the text form, the comparison across ranks, the errors of backends and
the table in ``docs/options.md`` iterate over the declarations (:func:`options_of`). So an option is declared once.
"""

from __future__ import annotations

import dataclasses
import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ..errors import ConfigError, UnsupportedError

#: Values of the option ``backend``, the default first.
Backend = Literal["fsdp2", "megatron_fsdp"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

_KEY = "option"


# ---- what values an option takes -----------------------------------------------------------------------------------


class Values(ABC):
    """The values that an option takes."""

    @property
    @abstractmethod
    def expected(self) -> str:
        """A description of the values that completes "give ...", for error messages and the table."""

    @abstractmethod
    def accepts(self, value: Any) -> bool:
        """True if the option takes ``value`` (not None)."""

    def converted(self, value: Any, default: Any) -> Any:
        """Convert ``value`` to the form that is stored. ``value`` is None for an empty entry of a YAML file."""
        return value

    def meaning(self, value: Any) -> Any:
        """The canonical form of ``value``; ranks with different synonyms of one value compare as equal."""
        return value


class Flag(Values):
    """True or false; None means the default. With ``optional``, None is a third, separate value."""

    def __init__(self, optional: bool = False) -> None:
        self.optional = optional

    @property
    def expected(self) -> str:
        return "true, false or leave it out" if self.optional else "true or false"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, bool)  # not 0 or 1, which `is False` would miss

    def converted(self, value: Any, default: Any) -> Any:
        return default if value is None else value


class Number(Values):
    """An integer of at least ``minimum``. ``what`` describes the number in error messages."""

    def __init__(self, minimum: int, what: str) -> None:
        self.minimum, self.what = minimum, what

    @property
    def expected(self) -> str:
        return f"{self.what}, {f'{self.minimum} or more' if self.minimum == 0 else f'at least {self.minimum}'}"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= self.minimum


class Choice(Values):
    """One of ``choices``. ``synonyms`` maps other spellings (booleans, None) to a choice."""

    def __init__(self, choices: tuple[str, ...], synonyms: Mapping[Any, str] | None = None) -> None:
        self.choices, self.synonyms = choices, dict(synonyms or {})

    @property
    def expected(self) -> str:
        return f"one of {', '.join(self.choices)}"

    def accepts(self, value: Any) -> bool:
        return (isinstance(value, str) and value in self.choices) or (
            isinstance(value, bool) and value in self.synonyms
        )

    def converted(self, value: Any, default: Any) -> Any:
        return default if value is None else value

    def meaning(self, value: Any) -> Any:
        return self.synonyms.get(value, value) if isinstance(value, (bool, type(None))) else value


class Anything(Values):
    """Any value that ``accepted`` returns true for, after the conversion by ``convert``."""

    def __init__(
        self, expected: str, accepted: Callable[[Any], bool], convert: Callable[[Any], Any] | None = None
    ) -> None:
        self._expected, self._accepted, self._convert = expected, accepted, convert

    @property
    def expected(self) -> str:
        return self._expected

    def accepts(self, value: Any) -> bool:
        return self._accepted(value)

    def converted(self, value: Any, default: Any) -> Any:
        return value if self._convert is None else self._convert(value)


# ---- the declaration -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Condition:
    """A value that another option must have (``needs``) or must not have (``excludes``).

    Attributes:
        name: the other option.
        value: its value.
        because: the reason, as the end of a sentence; may be empty.
    """

    name: str
    value: Any
    because: str = ""


@dataclass(frozen=True)
class Option:
    """The declaration of one option; see :func:`option` for the fields."""

    name: str
    default: Any
    values: Values
    help: str
    collective: bool
    tp_axis: str
    needs: Condition | None
    excludes: Condition | None
    backends: tuple[str, ...]
    belongs_to: str | None
    off: tuple[Any, ...]
    argument: str | None
    by_strategy: bool

    def asks(self, value: Any) -> bool:
        """True if ``value`` requests a feature, so that code without this feature must raise instead of ignoring it."""
        return value != self.default and value not in self.off


def option(
    default: Any,
    values: Values,
    help: str,
    *,
    collective: bool = True,
    tp_axis: str = "",
    needs: Condition | None = None,
    excludes: Condition | None = None,
    backends: tuple[str, ...] = BACKENDS,
    belongs_to: str | None = None,
    off: tuple[Any, ...] = (),
    argument: str | None = None,
    by_strategy: bool = True,
) -> Any:
    """A dataclass field that declares an option.

    Args:
        default: the default value; it requests no feature.
        values: the values that the option takes.
        help: documentation, in full sentences.
        collective: the option decides which collectives run, or in which order. Ranks with different values would wait
            forever, so the values are compared across ranks.
        tp_axis: the reason why the option has no effect if tp_size is 1; empty if it has one.
        needs: the value of another option without which this one has no effect.
        excludes: the value of another option that contradicts this one.
        backends: the backends that support the option. The others raise when a model is prepared.
        belongs_to: the only backend that has this option. A config for another backend raises.
        off: further values that request no feature.
        argument: name of the argument of ``ParallelizationStrategy.parallelize`` for this option. Strategies that only
            implement this method raise for an option without one.
        by_strategy: False if Accelerator and Trainer implement the option, and not the strategy.
    """
    # Must be the first statement: locals() may only contain the arguments, which become fields of `Option`.
    facts = dict(locals())
    return field(default=facts.pop("default"), metadata={_KEY: facts})


def options_of(cls: Any) -> Iterator[Option]:
    """Yield the options of a dataclass, or of an instance, in the order of declaration."""
    for declared in dataclasses.fields(cls):
        if _KEY in declared.metadata:
            yield Option(declared.name, declared.default, **declared.metadata[_KEY])


# ---- checks, comparison and documentation --------------------------------------------------------------------------


def check_values(config: Any) -> None:
    """Convert the options of ``config`` in place and check them, first each one, then the combinations.

    Raises:
        ConfigError: a value has the wrong type or is out of range, an option has no effect or contradicts another one,
            or it belongs to another backend.
    """
    declared = list(options_of(config))
    for item in declared:
        value = item.values.converted(getattr(config, item.name), item.default)
        setattr(config, item.name, value)
        if not ((value is None and item.default is None) or item.values.accepts(value)):
            raise ConfigError(f"{item.name}={value!r}: give {item.values.expected}{_nearest(item.values, value)}.")
    for item in declared:
        value = getattr(config, item.name)
        if value != item.default:
            _check_conditions(config, item, value)


def _nearest(values: Values, value: Any) -> str:
    near = difflib.get_close_matches(str(value), getattr(values, "choices", ()), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _check_conditions(config: Any, item: Option, value: Any) -> None:
    needs, excludes = item.needs, item.excludes
    if needs is not None and getattr(config, needs.name) != needs.value:
        raise ConfigError(
            f"{item.name}={value!r} has an effect with {needs.name}={needs.value!r} alone, not with "
            f"{getattr(config, needs.name)!r}{needs.because and f': {needs.because}'}. Set "
            f"{needs.name}={needs.value!r}, or leave it out."
        )
    if excludes is not None and getattr(config, excludes.name) == excludes.value:
        raise ConfigError(
            f"{item.name}={value!r} contradicts {excludes.name}={excludes.value!r}"
            f"{excludes.because and f': {excludes.because}'}. Leave out one of the two."
        )
    if item.belongs_to not in (None, config.backend):
        raise ConfigError(
            f"{item.name}={value!r} is an option of backend={item.belongs_to!r} alone, which "
            f"backend={config.backend!r} does not take. Leave it out, or use backend={item.belongs_to!r}."
        )


def check_tp_axis(config: Any, tp_size: int) -> None:
    """Check that no option needs a larger tp axis than ``tp_size`` ranks.

    Raises:
        ConfigError: an option is set that has no effect with ``tp_size=1``.
    """
    for item in options_of(config) if tp_size == 1 else ():
        value = getattr(config, item.name)
        if item.tp_axis and item.asks(value):
            raise ConfigError(
                f"{item.name}={value!r} with tp_size=1 has no effect: {item.tp_axis}. Use tp_size=2 or more, or leave "
                f"{item.name} out."
            )


def refuse_for_backend(options: Any, backend: str) -> None:
    """Check that ``backend`` supports all options that are set.

    Raises:
        UnsupportedError: it does not support one of them.
    """
    for item in options_of(options):
        if item.belongs_to is None and backend not in item.backends and item.asks(getattr(options, item.name)):
            raise UnsupportedError(
                f"{item.name} cannot be combined with backend={backend!r}. Leave it out, or use "
                f"backend={item.backends[0]!r}."
            )


def compared_values(options: Any) -> dict[str, Any]:
    """Name -> value of each option that decides collectives, in canonical form and serialisable as JSON."""
    return {item.name: plain(meaning_of(options, item.name)) for item in options_of(options) if item.collective}


def meaning_of(options: Any, name: str) -> Any:
    """The value of the option ``name`` in canonical form (see :meth:`Values.meaning`)."""
    return next(item.values.meaning(getattr(options, name)) for item in options_of(options) if item.name == name)


def plain(value: Any) -> Any:
    """Convert ``value`` to types that JSON has. A callable becomes its import path, any other object its ``repr``."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if callable(value) and hasattr(value, "__qualname__") and hasattr(value, "__module__"):
        return f"{value.__module__}:{value.__qualname__}"
    return repr(value)


def argument_docs(cls: Any) -> str:
    """The options as lines of the "Args:" section of a docstring."""
    return "\n".join(f"        {item.name}: {item.help}" for item in options_of(cls))


def markdown_table(cls: Any) -> str:
    """The options as a Markdown table."""
    lines = ["| option | default | values | meaning |", "|---|---|---|---|"]
    for item in options_of(cls):
        meaning = " ".join([item.help, *_remarks(item)]).replace("|", "\\|")
        lines.append(f"| `{item.name}` | `{plain(item.default)!r}` | {item.values.expected} | {meaning} |")
    return "\n".join(lines) + "\n"


def _remarks(item: Option) -> Iterator[str]:
    if item.tp_axis:
        yield "Needs `tp_size` of 2 or more."
    if item.needs is not None:
        yield f"Needs `{item.needs.name}={item.needs.value!r}`."
    if item.excludes is not None:
        yield f"Contradicts `{item.excludes.name}={item.excludes.value!r}`."
    if item.belongs_to is not None:
        yield f"An option of `backend={item.belongs_to!r}` alone."
    elif item.backends != BACKENDS:
        yield f"Only with {' or '.join(f'`backend={name!r}`' for name in item.backends)}."
    if item.by_strategy and item.argument is None:
        yield "Refused by strategies that only implement `parallelize`."
    if not item.collective:
        yield "May differ between ranks."
