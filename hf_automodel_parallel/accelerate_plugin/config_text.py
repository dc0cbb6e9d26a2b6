"""The text forms of a config: YAML and JSON files, JSON text and ``name=value`` pairs."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    import yaml

logger = logging.getLogger(__name__)


def is_file(text: str) -> bool:
    """True if ``text`` is the path of a file. A list of ``name=value`` pairs is not an error here, even where it is
    too long for a path or has characters that no path may have.
    """
    try:
        return bool(text) and Path(text).is_file()
    except (OSError, ValueError):
        return False


def read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the parallelism config {str(path)!r}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the parallelism config {str(path)!r} is not a text file in UTF-8: {error.reason}."
        ) from error
    return load_yaml(text, f"the file {str(path)!r}")


def load_yaml(text: str, where: str) -> dict[str, Any]:
    """Parse YAML, of which JSON is a subset."""
    import yaml

    try:
        values = yaml.load(text, Loader=_loader_without_duplicates())
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML or JSON: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must hold a mapping of fields such as 'tp: 2', but holds {values!r}.")
    return values


def _loader_without_duplicates() -> type[yaml.SafeLoader]:
    """YAML's safe loader that refuses duplicate keys; PyYAML silently keeps the last one."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value]
            twice = next((key for key in keys if keys.count(key) > 1), None)
            if twice is not None:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {twice!r} is given twice", node.start_mark
                )
            return super().construct_mapping(node, deep)

    return Loader


def parse_pairs(text: str) -> dict[str, Any]:
    import yaml

    values: dict[str, Any] = {}
    for part in _nonempty(text.split(",")):
        key, separator, raw = part.partition("=")
        key = key.strip()
        if not key.isidentifier():
            raise ConfigError(
                f"cannot read {part!r} in the parallelism config {text!r}: write name=value pairs separated by commas, "
                f"for example 'tp=2,dp_shard=4', or the path of a YAML or JSON file."
            )
        if key in values:
            raise ConfigError(f"the field {key!r} is given twice in the parallelism config {text!r}.")
        if separator and not raw.strip():
            raise ConfigError(f"the field {key!r} has no value in the parallelism config {text!r}.")
        try:
            values[key] = yaml.safe_load(raw) if separator else True
        except yaml.YAMLError as error:
            raise ConfigError(f"cannot read the value {raw!r} of {key!r} in {text!r}.") from error
    if not values:
        raise ConfigError("the parallelism config is empty: write for example 'tp=2,dp_shard=4'.")
    return values


def _nonempty(parts: Iterable[str]) -> Iterable[str]:
    return (part.strip() for part in parts if part.strip())


#: Prefix of the sizes in Accelerate's config files, and the name of the section that they are in.
_SECTION = "parallelism_config"


def parallelism_section(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the section ``parallelism_config`` of a config file of Accelerate; other ``values`` unchanged.

    Raises:
        ConfigError: it is a config file of Accelerate without that section.
    """
    if "compute_environment" in values and not values.get(_SECTION):
        raise ConfigError(
            f"a config file of Accelerate without a section {_SECTION}: nothing says how to parallelise. Add it "
            f"(accelerate_configs/ has examples), or give the sizes themselves, such as tp=2."
        )
    section = values.get(_SECTION)
    if not isinstance(section, Mapping):
        return values
    rest = [str(key) for key in values if key != _SECTION]
    if rest and os.environ.get("RANK", "0") == "0":
        _warn_of_rest(", ".join(rest[:6]) + (", ..." if len(rest) > 6 else ""))
    fields = {str(key).removeprefix(f"{_SECTION}_"): value for key, value in section.items()}
    if "cp_comm_strategy" in fields:
        fields["cp_handler"] = {"cp_comm_strategy": fields.pop("cp_comm_strategy")}
    return fields


@functools.cache  # the text is parsed by the launcher and for each Accelerator
def _warn_of_rest(rest: str) -> None:
    logger.warning(
        "of Accelerate's config file only the section %s is read here. The rest (%s) takes effect with accelerate "
        "launch --config_file.",
        _SECTION,
        rest,
    )


def restore(name: str, value: Any) -> Any:
    """The value of the field ``name`` from its JSON form; mappings become Accelerate's handler objects."""
    if name.endswith("_handler") and isinstance(value, Mapping):
        from accelerate.utils import dataclasses as accelerate_dataclasses

        handler = {"tp_handler": "TorchTensorParallelConfig", "cp_handler": "TorchContextParallelConfig"}.get(name)
        if handler is None:
            raise ConfigError(f"{name} cannot be given as a mapping.")
        return getattr(accelerate_dataclasses, handler)(**value)
    return value
