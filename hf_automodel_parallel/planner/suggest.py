"""``suggest``: which mesh to train on. All meshes by arithmetic from one measured run, the best ones measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..core.options import CHECKPOINTING_MODES
from ..errors import AutoParallelError, ConfigError
from .arithmetic import ALIKE, RECOMPUTED, Arithmetic, Candidate
from .explain import explain
from .interconnect import Interconnect
from .models import model_config
from .sizes import gib

#: Share of a GPU's memory that tensors may take; CUDA, NCCL and the allocator's fragments need the rest.
USABLE = 0.85
#: If nothing fits by arithmetic, what misses by less than this is measured all the same.
_NEARLY = 1.15


@dataclass
class Suggestion:
    """What :func:`suggest` found.

    Attributes:
        ranked: of each mesh that fits its best candidate, the first choice first.
        refused: mesh, or size of an axis -> why it does not go, shortest lack of memory first.
        about: model, GPUs, memory, interconnect, ...
    """

    ranked: list[Candidate]
    refused: dict[str, str]
    about: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON types."""
        rows = [{**dataclasses.asdict(found), "auto_parallel": found.flag} for found in self.ranked]
        return {"ranked": rows, "refused": self.refused, "about": self.about}


def suggest(
    model: nn.Module | str | Any,
    gpus: int,
    gpu_memory: int,
    *,
    per_node: int | None = None,
    interconnect: str = "h100-infiniband",
    rows: int | None = None,
    batch: int | None = None,
    sequence: int = 4096,
    dtype: str | None = None,
    mixed_precision: str = "bf16",
    optimizer: str = "adamw",
    lora: Mapping[str, Any] | None = None,
    measured: int = 2,
    imports: Sequence[str] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> Suggestion:
    """Rank the meshes on which ``model`` can be trained.

    One run on simulated ranks (FSDP2 over all GPUs, every mode of activation checkpointing) gives the sizes from which
    arithmetic estimates every mesh; the best ``measured`` meshes are then run themselves.

    Args:
        model, sequence, dtype, mixed_precision, optimizer, lora, imports: as for :func:`.explain.explain`.
        gpus: number of GPUs.
        gpu_memory: bytes of a GPU; 15 % are left to CUDA, NCCL and the allocator (:data:`USABLE`).
        per_node: GPUs of a node, instead of the interconnect's.
        interconnect: see ``planner/interconnects.yaml``; orders meshes that fit.
        rows: of an optimizer step, of all ranks together, so that meshes are compared at equal work; None: one for each
            GPU.
        batch: rows of a data-parallel rank in a micro-batch; None: as suits each mesh.
        measured: how many of the best meshes are run.
        progress: called with a line for each result.

    Raises:
        ConfigError: an argument is wrong, or nothing fits (the message says what would).
        AutoParallelError: the model cannot be prepared at all.
    """
    link = Interconnect.named(interconnect, per_node)
    nodes, rest = divmod(gpus, link.gpus_per_node)
    if nodes and rest:
        raise ConfigError(f"--gpus {gpus} does not divide by the {link.gpus_per_node} GPUs of a node; see --per-node.")
    rows = rows or gpus * (batch or 1)
    given: dict[str, Any] = {"sequence": sequence, "dtype": dtype, "mixed_precision": mixed_precision}
    given |= {"optimizer": optimizer, "lora": lora, "imports": imports}
    base = explain(
        model,
        {"dp_shard_size": gpus, "activation_checkpointing": "full"},
        checkpointing=CHECKPOINTING_MODES,
        progress=lambda line: progress(f"FSDP2 over all GPUs, {line}"),
        **given,
    )
    arithmetic = Arithmetic(base, _config_of(model), link, gpus, rows, batch)
    usable = int(gpu_memory * USABLE)
    refused = dict(arithmetic.impossible())
    counted: list[Candidate] = []
    everything, sequence_parallel = arithmetic.candidates(True), True
    if not everything:
        raise ConfigError(
            f"{rows} rows of a step{f' in micro-batches of {batch}' if batch else ''} cannot be divided among the "
            f"data-parallel ranks of {gpus} GPUs: each needs as many, and tp has {link.gpus_per_node} at most. Give "
            f"--rows a multiple of the GPUs{' times --batch' if batch else ''}."
        )
    tries = 0
    while sum(found.memory <= usable for found in counted) < measured and tries < measured + 3:
        pool = _still_open(everything, counted, usable, refused)
        if not pool:
            break
        best, tries = pool[0], tries + 1
        fields = {f"{axis}_size": size for axis, size in best.sizes.items()} | best.options
        try:
            found = explain(model, fields, batch=best.batch, **given)
        except AutoParallelError as error:
            if best.sequence_parallel and sequence_parallel and "sequence" in str(error):
                everything, sequence_parallel = arithmetic.candidates(False), False
                progress("without sequence parallelism, which this model refuses")
                continue
            if best.sizes["tp"] == 1 and best.sizes["cp"] == 1:
                raise
            refused[f"{'tp' if best.sizes['tp'] > 1 else 'cp'}={max(best.sizes['tp'], best.sizes['cp'])}"] = str(error)
            continue
        counted.append(arithmetic.counted(best, found))
        missed = counted[-1].memory - best.memory
        # What the arithmetic missed here, it missed wherever activations are divided and kept alike.
        for other in everything:
            alike = other.divided == best.divided and other.checkpointing == best.checkpointing
            if alike and other is not best and missed > 0:
                other.memory += missed * other.batch // best.batch
        progress(f"{best.mesh}, checkpointing {best.checkpointing}, {best.batch} rows")
    ranked = _ranked(everything, counted, usable, refused)
    if not ranked:
        raise ConfigError(_nothing_fits(arithmetic, everything, counted, usable, gpu_memory))
    for other in ranked[1:]:
        other.reason = reason(other, ranked[0])
    about = {**base.about, "gpus": gpus, "gpu_memory": gpu_memory, "usable_memory": usable, "rows": rows}
    about |= {"interconnect": link.name, "gpus_per_node": min(link.gpus_per_node, gpus), "parameters": base.parameters}
    about |= {
        "even_shards": arithmetic.even_shards,
        "considered": len(everything),
        "trainable": base.trainable,
        "sequence_parallel": sequence_parallel,
    }
    for name in ("world_size", "batch", "checkpointing"):  # of the first run
        about.pop(name, None)
    return Suggestion(ranked, refused, about)


def _config_of(model: Any) -> Any:
    return model_config(model) if isinstance(model, str) else getattr(model, "config", model)


def _still_open(
    everything: list[Candidate], counted: list[Candidate], usable: int, refused: Mapping[str, str]
) -> list[Candidate]:
    """The best candidate of each mesh worth a run, in order: of no mesh that was measured and fits."""
    done = {found.mesh for found in counted if found.memory <= usable}
    tried = {_key(found) for found in counted}
    left = [
        found
        for found in everything
        if found.mesh not in done and _key(found) not in tried and not _axis_refused(found, refused)
    ]
    for limit in (usable, usable * _NEARLY):
        fits = _in_order(_best_of_each([found for found in left if found.memory <= limit]))
        if fits or done:
            return fits
    return []


def _key(found: Candidate) -> tuple[str, str, int]:
    return found.mesh, found.checkpointing, found.batch


def _best_of_each(candidates: list[Candidate]) -> list[Candidate]:
    best: dict[str, Candidate] = {}
    for found in candidates:
        if found.mesh not in best or found.order < best[found.mesh].order:
            best[found.mesh] = found
    return list(best.values())


def _in_order(candidates: list[Candidate]) -> list[Candidate]:
    quickest = min((found.seconds for found in candidates), default=0.0)
    return sorted(candidates, key=lambda found: found.place(quickest))


def _axis_refused(found: Candidate, refused: Mapping[str, str]) -> bool:
    return any(f"{axis}={size}" in refused for axis, size in found.sizes.items() if axis in ("tp", "cp"))


def _ranked(
    everything: list[Candidate], counted: list[Candidate], usable: int, refused: dict[str, str]
) -> list[Candidate]:
    """Of each mesh its best candidate; those that were measured before those that were not."""
    known = {_key(found): found for found in counted}
    current = [known.get(_key(found), found) for found in everything if not _axis_refused(found, refused)]
    fits = [found for found in current if found.memory <= usable]
    measured = _best_of_each([found for found in fits if found.measured])
    there = {found.mesh for found in measured}
    others = _best_of_each([found for found in fits if found.mesh not in there])
    there |= {found.mesh for found in others}
    for found in sorted(current, key=lambda found: found.memory):
        if found.mesh not in there and found.mesh not in refused:
            refused[found.mesh] = f"does not fit: {gib(found.memory)} at least, {gib(found.memory - usable)} too much"
    return [*_in_order(measured), *_in_order(others)] if measured else []


def _nothing_fits(
    arithmetic: Arithmetic, everything: list[Candidate], counted: list[Candidate], usable: int, memory: int
) -> str:
    known = {_key(found): found for found in counted}
    closest = min(
        (known.get(_key(found), found) for found in everything), key=lambda found: (found.memory, found.order)
    )
    text = (
        f"no mesh of {arithmetic.gpus} GPUs fits: the least is {gib(closest.memory)} of a rank ({closest.flag}), and "
        f"of {gib(memory)} a rank can use {gib(usable)}."
    )
    for factor in (2, 4, 8, 16, 32):
        more = arithmetic.with_gpus(arithmetic.gpus * factor)
        if min((found.memory for found in more.candidates(True)), default=usable + 1) <= usable:
            return f"{text} By arithmetic {more.gpus} GPUs do; else use --lora, shorter sequences or another optimizer."
    return f"{text} Use --lora, shorter sequences or another optimizer."


def reason(found: Candidate, winner: Candidate) -> str:
    """Why ``found`` is not the first choice, in a few words: what costs it most."""
    if found.seconds <= winner.seconds * ALIKE and found.divided > winner.divided:
        return f"{_speed(found, winner)}, and each layer waits for {found.divided} ranks"
    if found.seconds <= winner.seconds * 1.05:
        if found.memory >> 30 > winner.memory >> 30:
            return f"{_speed(found, winner)}, {gib(found.memory - winner.memory)} more memory"
        if found.between_nodes > winner.between_nodes:
            return f"{_times(found.between_nodes, winner.between_nodes)} bytes between nodes"
        return "about as good; not measured" if not found.measured else "about as good"
    extra = []
    if found.between_nodes > winner.between_nodes * 1.05:
        extra.append(f"{_times(found.between_nodes, winner.between_nodes)} bytes between nodes")
    if found.accumulation > winner.accumulation:
        extra.append(f"{found.accumulation} micro-batches")
    if RECOMPUTED[found.checkpointing] > RECOMPUTED[winner.checkpointing]:
        extra.append(f"has to recompute ({found.checkpointing})")
    if found.within_node > winner.within_node * 1.05 and len(extra) < 2:
        extra.append(f"{_times(found.within_node, winner.within_node)} bytes in the node")
    return ", ".join(extra[:2]) or f"{found.seconds / winner.seconds:.2g} x the time by estimate"


def _speed(found: Candidate, winner: Candidate) -> str:
    percent = round(100 * (1 - found.seconds / winner.seconds))
    return f"{percent} % quicker by estimate" if percent >= 1 else "not quicker"


def _times(many: int, few: int) -> str:
    return f"{many / few:.2g} x" if few else gib(many)
