"""What ``explain`` returns."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Explanation:
    """What :func:`~.explain.explain` found. Bytes are of one rank (rank 0), parameters are counted once.

    Attributes:
        sizes: mesh axis -> number of ranks.
        origin: source of the tensor-parallel plan; None without tensor parallelism.
        rows: of the plan: pattern, style, number of matches, placement of the weight, source.
        notes: why an entry or a source was not used.
        parameters, trainable: numbers of elements, of the whole model.
        replicated_over_tp: elements that tp does not shard.
        memory: "parameters", "gradients", "optimizer", "buffers", "activations" (kept by a forward for its backward),
            "logits", "gathered" (most bytes of unsharded parameters at a time), "peak".
        peaks: phase of a step -> the most bytes that are alive in it.
        by_checkpointing: mode of activation checkpointing -> {"activations": bytes, "peak": bytes}.
        collectives: of one step: dicts with kind, axis, count, tensor_bytes (of full tensors), sent_bytes (by each
            rank, ring algorithms).
        layer: one of the repeated layers as it ran, see :class:`.layer.LayerTrace`; empty without a step.
        seconds: mesh axis -> lower bound of the time that its collectives take, an estimate; empty without an
            interconnect.
        warnings: what is likely to be unwanted, each with a remedy.
        modes: mode of activation checkpointing -> all that was found in it, this one included; not in :meth:`to_dict`.
        about: model, dtype, batch, sequence, optimizer, ...
    """

    sizes: dict[str, int]
    about: dict[str, Any]
    origin: str | None = None
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    parameters: int = 0
    trainable: int = 0
    replicated_over_tp: int = 0
    largest_replicated: list[tuple[int, str]] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    by_checkpointing: dict[str, dict[str, int]] = field(default_factory=dict)
    collectives: list[dict[str, Any]] = field(default_factory=list)
    layer: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    modes: dict[str, Explanation] = field(default_factory=dict, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """All fields besides :attr:`modes`, as JSON types."""
        return dataclasses.asdict(dataclasses.replace(self, modes={}))
