"""The data that plan and execution exchange: plan entries, and the sharding spec a plan resolves to on one model."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, fields, replace
from typing import Any

#: Where a plan may come from, in the default order of preference (an explicit ``tp_plan`` always comes first).
PLAN_SOURCES = ("hf", "registry", "default", "derived")


@dataclass(frozen=True)
class PlanEntry:
    """One line of a plan.

    Attributes:
        pattern: dotted path of modules or parameters, relative to the unwrapped model; ``*`` matches one path
            component.
        style: a style name as in transformers' ``_tp_plan``, or a ``torch.distributed.tensor.parallel.ParallelStyle``.
        source: where the line comes from, for the plan table ("class LlamaForCausalLM", "config base_model_tp_plan",
            "derived: ...").
    """

    pattern: str
    style: Any
    source: str

    @property
    def style_name(self) -> str:
        """The style name; of a style object its ``style_name``, if it has one, else its class name."""
        return str(
            getattr(self.style, "style_name", self.style if isinstance(self.style, str) else type(self.style).__name__)
        )


@dataclass(frozen=True)
class Plan:
    """A tensor-parallel plan: entries by pattern.

    Attributes:
        origin: the source that the plan was taken from ("explicit", "hf", "registry", "default", "derived").
        entries: pattern -> entry; later entries win over earlier ones with as many wildcards.
        strict: every pattern must match something (a user's own plan). The plans of Hugging Face classes name modules
            that a config may leave out.
        notes: decisions taken on the way, one sentence each (why an earlier source was not used).
        counts: pattern of modules -> integer attributes that count sharded features or heads; they are divided by
            tp_size.
        head_arguments: pattern of modules -> argument of their forward with a value for each head (ALiBi) -> its
            dimension that runs over heads, and the attribute of the module that counts the heads.
    """

    origin: str
    entries: dict[str, PlanEntry]
    strict: bool = False
    notes: tuple[str, ...] = ()
    counts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    head_arguments: dict[str, dict[str, tuple[int, str]]] = field(default_factory=dict)


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
        forward_shard_dim: ``Replicate`` between forwards, but each rank computes with one of ``forward_shards`` slices
            along this dimension (of each block). For key/value heads that are fewer than ranks, and for vectors of
            packed features.
        forward_shards: number of these slices. It divides tp_size; neighbouring ranks use the same slice where there
            are fewer slices than ranks.
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
        chunk_rows: rows whose logits the loss has in float32 at a time, for :attr:`OutputHook.SHARDED_LOGITS`; None:
            chosen by memory.
        native_style: a style object of torch, of transformers or of the user, which runs on its own engine; all other
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
    """A module inside of a layer that works on the full sequence, while the rest of the layer works on sequence shards.

    Attributes:
        gathers: its first tensor argument is all-gathered along the sequence.
        scatters: its output is replicated, and each rank keeps its sequence shard. False: the output is a sequence
            shard already, or does not have the layer's width.
        mutates_input: it changes the gathered tensor in place, so that it must not share that tensor with other blocks.
    """

    gathers: bool
    scatters: bool
    mutates_input: bool = False


@dataclass(frozen=True)
class SequenceSpec:
    """Where the hidden states of a stack of layers are scattered along the sequence, and where they are gathered.

    Attributes:
        stack: name of the module whose forward runs the layers.
        layers: names of the layers in forward order. The first one's input is scattered.
        blocks: name of a module inside of a layer -> its hooks along the sequence.
        tail: name of the module at whose output the hidden states are gathered (the final norm or the last layer).
        on_shards: modules whose parameters are used on sequence shards.
        regather: blocks do not save the gathered input for backward, but all-gather it again there. Not used where a
            checkpoint around the layer recomputes it anyway.
    """

    stack: str
    layers: tuple[str, ...]
    blocks: dict[str, SequenceBlock]
    tail: str
    on_shards: frozenset[str]
    regather: bool = False


@dataclass
class ShardingSpec:
    """A plan resolved on one model. Names are those of ``named_modules`` / ``named_parameters`` of that model.

    Attributes:
        parameters: parameter name -> spec; a parameter that is not listed is replicated with a full gradient.
        modules: module name -> spec; a module that is not listed has no hooks.
        head_counts: module name -> attribute -> value on one rank, of modules that count the heads of sharded
            projections.
        head_arguments: module name -> keyword argument of its forward -> (dimension that runs over heads, or over
            sequences and, within each, heads; number of heads). Each rank takes the slice of its heads.
        reduced_dora_norms: names of DoRA magnitude layers of row-wise layers, whose weight norm is reduced over tp.
        rows: the plan table: (pattern, style, number of matches, placement, source).
        unmatched: entries of a non-strict plan that matched nothing here.
        notes: decisions taken on the way, one sentence each.
        sequence: sequence parallelism; None without it.
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

    def packed(self) -> list[str]:
        """Names of the parameters that are sharded in more than one block."""
        return [name for name, spec in self.parameters.items() if spec.blocks > 1 and spec.dim is not None]

    def described(self) -> list[str]:
        """A line for each decision about collectives, equal in all processes with the same plan.

        Without the parameters, which are compared with the model's. Of a native style only the class is named (its
        ``repr`` may hold an address). ``chunk_rows`` is left out: it decides no collective and may differ.
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
