"""Data classes between planning and execution: plan entries, and the sharding spec of one model."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, fields, replace
from typing import Any

#: Sources of plans in the default order of preference. An explicit ``tp_plan`` always comes first.
PLAN_SOURCES = ("hf", "registry", "default", "derived")


@dataclass(frozen=True)
class PlanEntry:
    """One line of a plan.

    Attributes:
        pattern: dotted path of modules or parameters, relative to the unwrapped model; ``*`` matches one path
            component.
        style: a style name as in transformers' ``_tp_plan``, or a ``torch.distributed.tensor.parallel.ParallelStyle``.
        source: origin of the line, for the plan table ("class LlamaForCausalLM", "config base_model_tp_plan",
            "derived: ...").
    """

    pattern: str
    style: Any
    source: str

    @property
    def style_name(self) -> str:
        """The style name. For a style object this is its ``style_name`` attribute, or else its class name."""
        return str(
            getattr(self.style, "style_name", self.style if isinstance(self.style, str) else type(self.style).__name__)
        )


@dataclass(frozen=True)
class Plan:
    """A tensor-parallel plan: entries by pattern.

    Attributes:
        origin: the source that the plan was taken from ("explicit", "hf", "registry", "default", "derived").
        entries: pattern -> entry. If two patterns with equally many wildcards match, the later entry wins.
        strict: each pattern must match something (a user's plan). False for plans of Hugging Face classes, which also
            name modules that some configs leave out.
        notes: reasons for the choice of this plan, one sentence each (why an earlier source was not used).
        counts: pattern of modules -> integer attributes that count sharded features or heads; they are divided by
            tp_size.
        head_arguments: pattern of modules -> argument of their forward with a value for each head (ALiBi) -> (the
            dimension over heads, the attribute of the module that counts the heads).
        tried_arguments: the arguments with which a forward of the model's own was tried by values; None if it was not.
        kept: attributes of modules in which the forward leaves activations, found by that trial.
    """

    origin: str
    entries: dict[str, PlanEntry]
    strict: bool = False
    notes: tuple[str, ...] = ()
    counts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    head_arguments: dict[str, dict[str, tuple[int, str]]] = field(default_factory=dict)
    tried_arguments: frozenset[str] | None = None
    kept: tuple[str, ...] = ()


class InputHook(enum.Enum):
    """How an activation changes its placement on the tp axis in front of a module.

    The comments give source -> destination placement, and what runs in forward / backward.
    """

    NONE = "none"
    COPY_TO_TP = "copy to tp"  # Replicate -> Replicate with a Partial gradient: identity / all-reduce (Megatron's f)
    COPY_ALL_TO_TP = "copy all to tp"  # the same for every floating-point argument (experts: states, routing weights)
    SCATTER = "scatter"  # Replicate -> Shard(-1): local slice / all-gather
    MASK_IDS = "mask ids"  # token ids outside of this rank's rows of the vocabulary are masked
    DIVIDE = "divide by tp"  # Replicate -> Partial: divided by tp_size / the same


class OutputHook(enum.Enum):
    """How an activation changes its placement on the tp axis behind a module; comments as in :class:`InputHook`."""

    NONE = "none"
    REDUCE_FROM_TP = "reduce from tp"  # Partial -> Replicate: all-reduce / identity (Megatron's g)
    GATHER = "gather"  # Shard(-1) -> Replicate: all-gather / local slice
    SHARDED_LOGITS = "sharded logits"  # stays Shard(-1); code that needs the full logits gathers them / local slice
    COPY_TAIL_TO_TP = "copy tail to tp"  # COPY_TO_TP for the last `tail` features only
    REDUCE_SCATTER_SEQUENCE = "reduce-scatter sequence"  # Partial -> Shard(1): reduce-scatter / all-gather


@dataclass(frozen=True)
class ParameterSpec:
    """Placement of one parameter on the tp axis: of the DTensor between forwards, and of its gradient.

    Attributes:
        dim: ``Shard(dim)``, or None for ``Replicate``.
        blocks: number of equal blocks packed along ``dim``, each of them sharded (2 for fused gate and up).
        partial_gradient: the gradient is ``Partial``: a local contribution on each rank, reduced once per optimizer
            step.
        on_sequence_shards: the gradient is ``Partial`` only in sequence-parallel forwards.
        rank_zero_only: the parameter is added to a ``Partial`` activation, so that tp rank 0 alone adds it and the
            other ranks compute with zeros.
        forward_shard_dim: ``Replicate`` between forwards, but in forward each rank uses one of ``forward_shards``
            slices along this dimension (of each block). For models with fewer key/value heads than tp ranks, and for
            vectors of packed features.
        forward_shards: number of these slices; a divisor of tp_size. With fewer slices than ranks, adjacent ranks use
            the same slice.
    """

    dim: int | None = None
    blocks: int = 1
    partial_gradient: bool = False
    on_sequence_shards: bool = False
    rank_zero_only: bool = False
    forward_shard_dim: int | None = None
    forward_shards: int = 1

    def __str__(self) -> str:
        if self.forward_shard_dim is not None:
            return f"Replicate, 1 of {self.forward_shards} slices in forward, Partial gradient"
        if self.dim is None:
            return "Replicate, Partial gradient" if self.partial_gradient else "Replicate"
        return f"Shard({self.dim})" if self.blocks == 1 else f"Shard({self.dim}) in {self.blocks} blocks"


REPLICATED = ParameterSpec()
PARTIAL_GRADIENT = ParameterSpec(partial_gradient=True)
ON_SEQUENCE_SHARDS = ParameterSpec(partial_gradient=True, on_sequence_shards=True)
RANK_ZERO_ONLY = ParameterSpec(partial_gradient=True, rank_zero_only=True)


@dataclass(frozen=True)
class ModuleSpec:
    """The tp input and output hook of one module.

    Attributes:
        input: the input hook.
        output: the output hook.
        deferred_bias: name of the module, relative to this one ("" or "base_layer"), whose bias is added once after the
            all-reduce instead of once per rank before it; None if there is none.
        tail: number of trailing features for :attr:`OutputHook.COPY_TAIL_TO_TP`.
        chunk_rows: number of rows (tokens) whose logits the loss converts to float32 at a time, for
            :attr:`OutputHook.SHARDED_LOGITS`; None: chosen by memory.
        native_style: a ``ParallelStyle`` object of torch, transformers or the user, which applies itself; the other
            fields are then unused.
    """

    input: InputHook = InputHook.NONE
    output: OutputHook = OutputHook.NONE
    deferred_bias: str | None = None
    tail: int = 0
    chunk_rows: int | None = None
    native_style: Any = None


@dataclass(frozen=True)
class SequenceBlock:
    """A module inside of a layer that needs the full sequence, while the rest of the layer runs on sequence shards.

    Attributes:
        gathers: all-gather the module's first tensor argument along the sequence.
        scatters: the output is ``Replicate``, and each rank keeps its sequence shard of it. False: the output already
            is a sequence shard, or does not have the layer's width.
        mutates_input: the module changes the gathered tensor in place, so it must not share it with other blocks.
    """

    gathers: bool
    scatters: bool
    mutates_input: bool = False


@dataclass(frozen=True)
class SequenceSpec:
    """Sequence parallelism of a stack of layers: the modules that scatter and gather the hidden states.

    Attributes:
        stack: name of the module whose forward runs the layers.
        layers: names of the layers in forward order. The first one's input is scattered.
        blocks: name of a module inside of a layer -> its hooks along the sequence.
        tail: name of the module at whose output the hidden states are gathered (the final norm or the last layer).
        on_shards: names of modules whose parameters are used on sequence shards; their gradients are ``Partial``.
        regather: blocks save the sequence shard of their input instead of the gathered input, and re-all-gather it in
            backward. Not used if a checkpoint around the layer recomputes the gather anyway.
    """

    stack: str
    layers: tuple[str, ...]
    blocks: dict[str, SequenceBlock]
    tail: str
    on_shards: frozenset[str]
    regather: bool = False


@dataclass(frozen=True)
class VaryingActivations:
    """Which activations of a module inside of a layer vary across the ranks; found by a run on fake tensors.

    Attributes:
        inputs: one of its arguments does.
        output: its output does, or the first element of a tuple.
        rest: indices of the further elements of a tuple that do.
    """

    inputs: bool = False
    output: bool = False
    rest: tuple[int, ...] = ()


@dataclass
class ShardingSpec:
    """A plan resolved on one model. Names are those of ``named_modules`` / ``named_parameters`` of that model.

    Attributes:
        parameters: parameter name -> spec; a parameter that is not listed is replicated with a full gradient.
        modules: module name -> spec; a module that is not listed has no hooks.
        head_counts: module name -> attribute that counts heads of sharded projections -> its value on one rank.
        head_arguments: module name -> keyword argument of its forward -> (dimension over heads, or over batch x heads;
            number of heads). Each rank takes the slice of its heads.
        reduced_dora_norms: names of DoRA magnitude layers of row-wise layers; their weight norm is reduced over tp.
        rows: the plan table: (pattern, style, number of matches, placement, source).
        unmatched: entries of a non-strict plan without a match in this model.
        notes: decisions of the resolution, one sentence each.
        sequence: the spec of sequence parallelism; None without it.
        varying: name of a module inside of a layer -> which of its activations vary; only modules that were run.
    """

    parameters: dict[str, ParameterSpec] = field(default_factory=dict)
    modules: dict[str, ModuleSpec] = field(default_factory=dict)
    head_counts: dict[str, dict[str, int]] = field(default_factory=dict)
    head_arguments: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    reduced_dora_norms: list[str] = field(default_factory=list)
    rows: list[tuple[str, str, int, str, str]] = field(default_factory=list)
    unmatched: list[PlanEntry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sequence: SequenceSpec | None = None
    varying: dict[str, VaryingActivations] = field(default_factory=dict)

    def packed(self) -> list[str]:
        """Names of the parameters that are sharded in more than one block."""
        return [name for name, spec in self.parameters.items() if spec.blocks > 1 and spec.dim is not None]

    def described(self) -> list[str]:
        """Return a line for each entry that decides collectives, in the same order in all processes.

        Parameters are left out; :func:`~.consistency.check_same_structure` describes them with the model's. A native
        style appears with its class name only, because its ``repr`` may contain an address. ``chunk_rows`` is left out:
        it decides no collective and may differ across ranks.
        """
        lines = [f"tp hooks of {name}: {_line(module)}" for name, module in self.modules.items()]
        for what, table in (("head counts", self.head_counts), ("arguments by heads", self.head_arguments)):
            lines += [f"{what} of {name}: {sorted(values.items())}" for name, values in table.items()]
        lines += [f"reduced DoRA norm of {name}" for name in self.reduced_dora_norms]
        for part in fields(self.sequence) if self.sequence is not None else ():
            value = getattr(self.sequence, part.name)
            ordered = sorted(value) if isinstance(value, (set, frozenset)) else value
            items = list(value.items()) if isinstance(value, dict) else [ordered]
            lines += [f"sequence parallelism, {part.name}: {item}" for item in items]
        # Some tables are filled from sets, whose order differs between processes.
        return sorted(lines)


def _line(spec: ModuleSpec) -> str:
    style = None if spec.native_style is None else type(spec.native_style).__name__
    return str(replace(spec, chunk_rows=None, native_style=style))
