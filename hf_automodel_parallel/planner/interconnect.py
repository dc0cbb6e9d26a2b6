"""A lower bound of the time that collectives take: bytes over bandwidth. An estimate, from published bandwidths."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.mesh import AXES
from ..errors import ConfigError

_FILE = Path(__file__).parent / "interconnects.yaml"

#: The mesh axes that can have several ranks, the outermost first: the ranks of the last one are neighbours.
ORDER = tuple(axis for axis in AXES if axis != "sp")


@dataclass(frozen=True)
class Interconnect:
    """Bandwidths of a cluster, and the speed of its GPUs.

    Attributes:
        name: its name in the file.
        gpus_per_node: GPUs that the fast links connect.
        intra_node, inter_node: 1e9 bytes per second that a GPU sends, in one direction, within its node and to others.
        tflops: 1e12 operations per second of a GPU in bf16.
    """

    name: str
    gpus_per_node: int
    intra_node: float
    inter_node: float
    tflops: float = 989.0

    @classmethod
    def named(cls, text: str, gpus_per_node: int | None = None) -> Interconnect:
        """The interconnect ``text``: a name of the shipped file, or "path.yaml:name".

        Raises:
            ConfigError: the file or the name does not exist, or a field is missing.
        """
        import yaml

        path, separator, name = text.rpartition(":")
        file = Path(path) if separator else _FILE
        try:
            known = yaml.safe_load(file.read_text(encoding="utf-8"))
            found = cls(name=name, **known[name])
        except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
            names = ", ".join(yaml.safe_load(_FILE.read_text(encoding="utf-8")))
            raise ConfigError(
                f"--interconnect {text}: {type(error).__name__} while reading {name!r} of {file.name}. Give one of "
                f"{names}, or FILE.yaml:NAME with gpus_per_node, intra_node and inter_node."
            ) from error
        return found if gpus_per_node is None else dataclasses.replace(found, gpus_per_node=gpus_per_node)

    def within_node(self, axis: str, sizes: Mapping[str, int]) -> bool:
        """True if the ranks of a group along ``axis`` are on one node, ranks filling one node after the other."""
        return span(axis, sizes) <= self.gpus_per_node

    def seconds(self, collectives: list[dict[str, Any]], sizes: Mapping[str, int]) -> dict[str, float]:
        """Mesh axis -> seconds that its collectives take at least: no latency, full bandwidth.

        Args:
            collectives: dicts with ``axis`` and ``sent_bytes``.
            sizes: mesh axis -> ranks.
        """
        found: dict[str, float] = {}
        for row in collectives:
            axis = row["axis"]
            speed = self.intra_node if self.within_node(axis, sizes) else self.inter_node
            found[axis] = found.get(axis, 0.0) + row["sent_bytes"] / (speed * 1e9)
        return found


def span(axis: str, sizes: Mapping[str, int]) -> int:
    """Number of consecutive ranks that hold a whole group along ``axis``; joined axes by the outermost of them.

    Args:
        axis: a mesh axis, or joined axes; the ranks of the last of :data:`ORDER` are neighbours.
        sizes: mesh axis -> ranks.
    """
    outer = "dp_shard" if axis == "dp_shard_cp" else axis
    begin = ORDER.index(outer) if outer in ORDER else 0
    return math.prod(sizes.get(name, 1) for name in ORDER[begin:])
