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
        source: where the line comes from, for humans ("class LlamaForCausalLM", "config base_model_tp_plan", "derived:
            ...").
    """

    pattern: str
    style: Any
    source: str

    @property
    def style_name(self) -> str:
        """The style as shown to people: its name (a :class:`~.torch_styles.NamedStyle` has one, too), or its class."""
        return str(
            getattr(self.style, "style_name", self.style if isinstance(self.style, str) else type(self.style).__name__)
        )


@dataclass(frozen=True)
class Plan:
    """A tensor-parallel plan: entries by pattern.

    Attributes:
        origin: which source won ("explicit", "hf", "registry", "default", "derived").
        entries: pattern -> entry; later entries win over earlier ones of equal precision.
        strict: every pattern must match something (a user's own plan); HF's plans name parts that a config may not
        have.
        notes: decisions taken on the way to it, one sentence each (why an earlier source was passed over).
        counts: pattern of modules -> integer attributes that count what is sharded there; a rank gets its part of each.
        head_arguments: pattern of modules -> argument of their forward with a value for each head (ALiBi) -> its
            dimension that runs over heads, and the attribute of the module that counts these.
    """

    origin: str
    entries: dict[str, PlanEntry]
    strict: bool = False
    notes: tuple[str, ...] = ()
    counts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    head_arguments: dict[str, dict[str, tuple[int, str]]] = field(default_factory=dict)


class Input(enum.Enum):
    """What happens to a module's activation on its way in (forward / backward)."""

    NONE = "none"
    COPY = "copy"  # identity / all-reduce
    COPY_ALL = "copy all"  # the same for every floating-point argument (experts: hidden states and routing weights)
    SPLIT = "split"  # take this rank's slice of the last dim / all-gather
    MASK = "mask ids"  # token ids outside of this rank's vocabulary slice are masked
    SCALE = "scale"  # divide by the axis size / the same


class Output(enum.Enum):
    """What happens to a module's activation on its way out (forward / backward)."""

    NONE = "none"
    REDUCE = "reduce"  # all-reduce / identity
    GATHER = "gather"  # all-gather the last dim / take this rank's slice
    LOGITS = "keep logits sharded"  # nothing; reading them whole gathers / takes this rank's slice
    COPY_TAIL = "copy tail"  # identity / all-reduce, of the last `tail` features only
    SCATTER_SEQUENCE = "scatter sequence"  # reduce-scatter along the sequence / all-gather


@dataclass(frozen=True)
class ParameterSpec:
    """Where one parameter lives on the tp axis, at rest.

    Attributes:
        dim: sharded dimension, or None for replicated.
        blocks: number of equal blocks packed along ``dim``, each sharded on its own (2 for fused gate and up).
        partial_gradient: every rank computes only a summand of the gradient; it is summed once per optimizer step.
        on_sequence_shards: the gradient is partial where the parameter meets shares of the sequence, and whole
        elsewhere.
        counts_once: it is added to activations that are summed over the ranks, so all but the first rank compute with
        zeros.
        part_dim: replicated at rest, but each rank computes with one part of it along this dimension (of each of its
        blocks).
        parts: number of these parts. It divides the axis: neighbours share one where they are fewer than ranks.
    """

    dim: int | None = None
    blocks: int = 1
    partial_gradient: bool = False
    on_sequence_shards: bool = False
    counts_once: bool = False
    part_dim: int | None = None
    parts: int = 1

    def __str__(self) -> str:
        if self.part_dim is not None:
            return f"Replicate, 1 of {self.parts} parts in flight, grad summed"
        if self.dim is None:
            return "Replicate, grad summed" if self.partial_gradient else "Replicate"
        return f"Shard({self.dim})" if self.blocks == 1 else f"Shard({self.dim}) in {self.blocks} blocks"


REPLICATED = ParameterSpec()
PARTIAL = ParameterSpec(partial_gradient=True)
ON_SHARES = ParameterSpec(partial_gradient=True, on_sequence_shards=True)
ADDED_ONCE = ParameterSpec(partial_gradient=True, counts_once=True)


@dataclass(frozen=True)
class ModuleSpec:
    """How one module's activations cross the tp boundary.

    Attributes:
        input: what happens on the way in.
        output: what happens on the way out.
        deferred_bias: name of the module, relative to this one ("" or "base_layer"), whose bias is added once after the
            reduction instead of once per rank before it; None if there is none.
        tail: number of trailing features for :attr:`Output.COPY_TAIL`.
        chunk_rows: rows whose logits the loss has in float32 at a time, for :attr:`Output.LOGITS`; None: chosen by
        memory.
        foreign: a style object of torch or of the user that runs on its own engine; all other fields are then unused.
    """

    input: Input = Input.NONE
    output: Output = Output.NONE
    deferred_bias: str | None = None
    tail: int = 0
    chunk_rows: int | None = None
    foreign: Any = None


@dataclass(frozen=True)
class SequenceBlock:
    """A part of a layer that works on the whole sequence, between parts that work on this rank's share of it.

    Attributes:
        gathers: its first tensor argument is gathered along the sequence.
        splits: its output is the same on all ranks, and each keeps its share. False: it is split already, or no
            activation of the layer's width.
        writes: it changes what is gathered in place, so that its parts read something else than what the others read.
    """

    gathers: bool
    splits: bool
    writes: bool = False


@dataclass(frozen=True)
class SequenceSpec:
    """Where the hidden states of a stack of layers are split along the sequence, and where they are whole.

    Attributes:
        stack: name of the module whose forward runs the layers.
        layers: names of the layers in forward order. The first one's input is split.
        blocks: name of a module inside of a layer -> how it is entered and left.
        tail: name of the module at whose output the hidden states are gathered again (the final norm or the last
        layer).
        on_shards: modules whose parameters work on this rank's share of the sequence.
        regather: what blocks gather is not kept for backward, but gathered again; where checkpoints do not see to it.
    """

    stack: str
    layers: tuple[str, ...]
    blocks: dict[str, SequenceBlock]
    tail: str
    on_shards: frozenset[str]
    regather: bool = False


@dataclass
class ShardingSpec:
    """A plan resolved on one model. Names are those of ``named_modules`` / ``named_parameters`` of the given object.

    Attributes:
        parameters: parameter name -> spec; a parameter that is not listed is replicated with a complete gradient.
        modules: module name -> spec; a module that is not listed has no boundary.
        head_counts: module name -> attribute -> value on one rank, of modules that count the heads of sharded
        projections.
        head_arguments: module name -> keyword argument of its forward -> (dimension that runs over heads, or over
            sequences and, within each, heads; number of heads). Each rank takes the part of its heads.
        summed_norms: names of DoRA magnitude layers of row-wise layers, whose weight norm is a sum over the ranks.
        rows: for people: (pattern, style, number of matches, placement, source).
        unmatched: entries of a non-strict plan that matched nothing here.
        notes: decisions taken on the way, one sentence each.
        sequence: where sequence parallelism splits and gathers, None without it.
    """

    parameters: dict[str, ParameterSpec] = field(default_factory=dict)
    modules: dict[str, ModuleSpec] = field(default_factory=dict)
    head_counts: dict[str, dict[str, int]] = field(default_factory=dict)
    head_arguments: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    summed_norms: list[str] = field(default_factory=list)
    rows: list[tuple[str, str, int, str, str]] = field(default_factory=list)
    unmatched: list[PlanEntry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sequence: SequenceSpec | None = None

    def packed(self) -> list[str]:
        """Names of the parameters that are sharded in more than one block."""
        return [name for name, spec in self.parameters.items() if spec.blocks > 1 and spec.dim is not None]

    def described(self) -> list[str]:
        """A line for each thing that decides which collectives run, equal in all processes with the same plan.

        Parameters are left to whoever describes the model. Of a foreign style only the type is told (its ``repr`` may
        hold an address), and not how many rows of logits a rank computes at a time, which is its own affair.
        """
        lines = [f"boundaries of {name}: {_line(module)}" for name, module in self.modules.items()]
        for what, table in (("head counts", self.head_counts), ("arguments by heads", self.head_arguments)):
            lines += [f"{what} of {name}: {sorted(values.items())}" for name, values in table.items()]
        lines += [f"summed norm of {name}" for name in self.summed_norms]
        for part in fields(self.sequence) if self.sequence is not None else ():
            value = getattr(self.sequence, part.name)
            ordered = sorted(value) if isinstance(value, (set, frozenset)) else value
            items = list(value.items()) if isinstance(value, dict) else [ordered]
            lines += [f"sequence parallelism, {part.name}: {item}" for item in items]
        return sorted(lines)  # sets of names, from which tables are filled, have another order in each process


def _line(spec: ModuleSpec) -> str:
    foreign = None if spec.foreign is None else type(spec.foreign).__name__
    return str(replace(spec, chunk_rows=None, foreign=foreign))
