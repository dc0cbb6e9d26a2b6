"""The command-line flag ``--auto_parallel tp=2,dp_shard=4`` for ``TrainingArguments`` and its subclasses."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from .config import AutoParallelismConfig
from .core.option_fields import plain
from .errors import ConfigError

# Mark of a __post_init__ that reads the flag before it calls what the class inherits.
_READS_FLAG = "_reads_auto_parallel"


@dataclass
class AutoParallelArgumentsMixin:
    """Adds the field ``auto_parallel`` to a subclass of ``transformers.TrainingArguments``.

    The field sets ``parallelism_config``, which the stock Trainer passes to Accelerate. The mixin may stand before or
    behind the class that it extends.

    Examples:
        >>> @dataclass
        ... class ParallelSFTConfig(AutoParallelArgumentsMixin, SFTConfig):
        ...     pass

    Raises:
        ConfigError: the value cannot be read, or contradicts an explicit ``parallelism_config``.
    """

    auto_parallel: str | None = field(
        default=None,
        metadata={
            "help": "Parallelise the model: a list such as 'tp=2,dp_shard=4', or the path of a YAML or JSON file with "
            "the fields of AutoParallelismConfig (in Python also a dict). Axes that are left out are inferred from the "
            "number of processes. Example: --auto_parallel tp=2"
        },
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(AutoParallelArgumentsMixin)]
        # Of a class like TrainingArguments in front of the mixin, whose __post_init__ need not call ours.
        if not any("__post_init__" in vars(c) and not issubclass(c, AutoParallelArgumentsMixin) for c in before):
            return
        inherited: Any = cls.__post_init__
        if hasattr(inherited, _READS_FLAG):
            return

        @functools.wraps(inherited)
        def read_flag_first(self: Any) -> None:
            self._read_auto_parallel()
            inherited(self)

        setattr(read_flag_first, _READS_FLAG, True)
        cls.__post_init__ = read_flag_first  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        self._read_auto_parallel()
        super().__post_init__()  # type: ignore[misc]

    def _read_auto_parallel(self) -> None:
        """Set ``parallelism_config`` from the flag; nothing if that has been done."""
        explicit: Any = getattr(self, "parallelism_config", None)
        if isinstance(explicit, Mapping):  # from a JSON round trip
            explicit = self.parallelism_config = AutoParallelismConfig.from_dict(explicit)
        if self.auto_parallel is not None:
            config = AutoParallelismConfig.parse(self.auto_parallel)
            if explicit is not None and not (
                isinstance(explicit, AutoParallelismConfig) and explicit.agrees_with(config)
            ):
                raise ConfigError(
                    f"auto_parallel={self.auto_parallel!r} and parallelism_config={explicit!r} were both given and "
                    f"differ. Give one of the two."
                )
            if explicit is None:
                self.parallelism_config = config
            if not isinstance(self.auto_parallel, str):  # to_dict and to_json_string do not convert the field
                self.auto_parallel = _as_json(self.auto_parallel)


def _as_json(value: Any) -> Any:
    """Convert ``value`` (config, dict or path) to JSON types that :meth:`AutoParallelismConfig.parse` reads."""
    if isinstance(value, AutoParallelismConfig):
        return value.to_dict()
    return plain(value) if isinstance(value, Mapping) else os.fspath(value)


@dataclass
class AutoParallelTrainingArguments(AutoParallelArgumentsMixin, TrainingArguments):
    """``transformers.TrainingArguments`` with the flag ``--auto_parallel``; see :class:`AutoParallelArgumentsMixin`.

    Examples:
        >>> args = AutoParallelTrainingArguments(output_dir="out", auto_parallel="tp=2,dp_shard=4")
        >>> trainer = Trainer(model, args, train_dataset=data)
    """
