"""The parity matrix of sequence parallelism: its axes, its cells, what one cell does (DESIGN: promise 1).

Every cell has a length that its tp axis does not divide. An eager cell runs two forwards of different lengths before
one backward of both; a compiled one a single forward, because a second length would compile everything once more.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, fields
from typing import Any

from harness.meshes import MESHES
from harness.oracle import loss_and_grads
from harness.pool import run_distributed
from harness.training import LORA, build

from parity.cells import Verdict, judge
from parity.sequence_jobs import ODD, batches_of, sequence_gradients

AXES: dict[str, tuple[Any, ...]] = {
    "model": (
        "llama",
        "llama_tied",
        "qwen3",
        "gemma3",
        "phi3",
        "mistral",
        "mixtral",
        "qwen3_moe",
        "olmo2",
        "cohere",
    ),
    "adapter": ("full", "lora"),
    "mesh": ("tp2", "tp4", "tp2_fsdp2"),
    "checkpointing": ("none", "full", "submodule", "selective", "own"),
    "compiled": (False, True),
    "gathered": ("kept", "again"),
}

#: value of the axis "checkpointing" -> (config fields, arguments of the job); "own" is that of transformers.
CHECKPOINTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({}, {}),
    "full": ({"activation_checkpointing": "full"}, {}),
    "submodule": ({"activation_checkpointing": "submodule"}, {}),
    "selective": ({"activation_checkpointing": "selective"}, {}),
    "own": ({}, {"own_checkpointing": {"use_reentrant": False}}),
}


@dataclass(frozen=True)
class SequenceCell:
    """One combination of :data:`AXES`."""

    model: str
    adapter: str
    mesh: str
    checkpointing: str
    compiled: bool
    gathered: str = "kept"

    def __str__(self) -> str:
        mode = "compiled" if self.compiled else "eager"
        again = ["again"] if self.gathered == "again" else []
        return "-".join([self.model, self.adapter, self.mesh, self.checkpointing, mode, *again])

    @property
    def lengths(self) -> tuple[int, ...]:
        return (ODD,) if self.compiled else (ODD, 10)

    @property
    def overrides(self) -> dict[str, Any]:
        """Of the model's config: four ranks need four heads for keys and values."""
        return {"num_key_value_heads": 4} if self.mesh == "tp4" else {}


def is_meaningful(cell: SequenceCell) -> bool:
    """Most checkpoints gather again in backward anyway, so the option that says so is refused beside them."""
    return cell.gathered == "kept" or cell.checkpointing in ("none", "selective")


def all_cells() -> list[SequenceCell]:
    """Every meaningful combination of the axes."""
    return list(filter(is_meaningful, itertools.starmap(SequenceCell, itertools.product(*AXES.values()))))


def pairs_of(cell: SequenceCell) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    """The pairs of values of two axes that a cell has."""
    return set(itertools.combinations([(field.name, getattr(cell, field.name)) for field in fields(cell)], 2))


def uncovered(cells: list[SequenceCell]) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    """The pairs of values that some cell has and none of ``cells``."""
    return set().union(*map(pairs_of, all_cells())) - set().union(*map(pairs_of, cells))


@functools.cache
def _reference(model: str, adapter: str, heads: int | None, parts: int, lengths: tuple[int, ...]) -> tuple[float, dict]:
    overrides = {} if heads is None else {"num_key_value_heads": heads}
    reference = build(model, LORA if adapter == "lora" else None, **overrides).train()
    batches = [part for length in lengths for part in batches_of(reference, parts, length)]
    return loss_and_grads(reference, batches)


def run_cell(cell: SequenceCell, backend: str, timeout: float = 280.0) -> Verdict:
    """Run one cell on its ranks and in one process; raises only what the harness raises."""
    world, sizes, parts = MESHES[cell.mesh]
    options, more = CHECKPOINTS[cell.checkpointing]
    options = {**options, "compile": backend if cell.compiled else False}
    options["check_optimizer"] = False  # a third of an eager cell's time, and about something else
    if cell.gathered == "again":
        options["sequence_parallel_regather"] = True
    loss, gradients = run_distributed(
        world,
        sequence_gradients,
        cell.model,
        {**sizes, **options},
        adapter=LORA if cell.adapter == "lora" else None,
        overrides=cell.overrides,
        dp_size=parts,
        lengths=cell.lengths,
        timeout=timeout,
        **more,
    )[0]
    want = _reference(cell.model, cell.adapter, cell.overrides.get("num_key_value_heads"), parts, cell.lengths)
    return judge(loss, gradients, *want)


#: model -> the modes of checkpointing whose cells are compiled: mostly on tp2, where there are two processes to
#: compile.
_COMPILED = {
    "llama": ("none",),
    "llama_tied": ("selective",),
    "qwen3": ("full",),
    "gemma3": ("selective",),
    "phi3": ("submodule",),
    "mistral": ("own",),
    "mixtral": ("selective",),
    "qwen3_moe": ("submodule",),
    "olmo2": ("full",),
    "cohere": ("none",),
}


def _checked() -> list[SequenceCell]:
    """Every model with every mode of checkpointing; adapters and meshes in turn."""
    cells = []
    for row, model in enumerate(AXES["model"]):
        for column, mode in enumerate(AXES["checkpointing"]):
            adapter = AXES["adapter"][(row + column) % 2]
            mesh = AXES["mesh"][(row + column) % 3]
            again = mode == ("selective" if row % 4 < 2 else "none")
            compiled = mode in _COMPILED[model]
            cells.append(SequenceCell(model, adapter, mesh, mode, compiled, "again" if again else "kept"))
    cells.append(SequenceCell("llama", "lora", "tp2_fsdp2", "selective", True))
    cells.append(SequenceCell("llama", "lora", "tp2", "selective", True, "again"))
    return cells


#: Every pair of values of two axes, see :func:`uncovered`.
CI_CELLS = _checked()
