"""The options of a parallel run, each declared once; see :mod:`.option_fields` for the uses of a declaration.

To add an option, add a field to :class:`OptionFields`. A strategy reads it as ``context.options.<name>``; code outside
of a strategy reads the attribute of the config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import FrozenInstanceError, dataclass
from typing import Any, Literal, NoReturn, get_args

from .modality_encoders import PLACEMENTS, EncoderPlacement
from .option_fields import BACKENDS, Anything, Backend, Choice, Condition, Flag, Number, option, options_of
from .sharding_spec import PLAN_SOURCES

#: Forms in which a tensor-parallel plan can be given.
GivenPlan = str | Mapping[str, Any] | Callable[..., Mapping[str, Any]] | None

#: Values of ``activation_checkpointing``.
CheckpointingMode = Literal["none", "full", "submodule", "selective"]
CHECKPOINTING_MODES: tuple[str, ...] = get_args(CheckpointingMode)

#: Values of ``audit``, the default first.
AuditMode = Literal["first_step", "every_n_steps", "off"]
AUDIT_MODES: tuple[str, ...] = get_args(AuditMode)

#: Values of ``adapters_over_dp``, the default first.
AdapterPlacement = Literal["sharded", "replicated", "auto"]
ADAPTER_PLACEMENTS: tuple[str, ...] = get_args(AdapterPlacement)

_ONLY_FSDP2 = ("fsdp2",)


def _plan_order(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(value.replace("+", " ").split())
    return tuple(value) if isinstance(value, Iterable) else value


def _is_plan_order(value: Any) -> bool:
    known = isinstance(value, tuple) and bool(value) and all(source in PLAN_SOURCES for source in value)
    return known and len(set(value)) == len(value)


@dataclass(repr=False)
class OptionFields:
    """The option fields: base class of ``AutoParallelismConfig`` (the user's config) and :class:`ParallelOptions`."""

    tp_plan: GivenPlan = option(
        None,
        Anything(
            "a dict, a callable that returns one, an import path or a plan name",
            lambda value: isinstance(value, (str, Mapping)) or callable(value),
        ),
        "Explicit tensor-parallel plan, preferred to every other source: a dict (module or parameter pattern -> style "
        "name or `torch.distributed.tensor.parallel.ParallelStyle`), a callable returning one (with or without the "
        'model as argument), the import path of either (`"my_package.plans:llama"`), or the name of a named plan.',
        collective=False,  # where a plan comes from; what it resolves to is compared when a model is prepared
        tp_axis="there is nothing that it could shard",
        argument="tp_shard_plan",
    )
    plan_order: tuple[str, ...] = option(
        PLAN_SOURCES,
        Anything(f"an order of {', '.join(PLAN_SOURCES)} (a subset, each once)", _is_plan_order, _plan_order),
        "Sources of plans to try, in order, when `tp_plan` is None.",
        collective=False,
        tp_axis="without tensor parallelism no plan is looked for",
    )
    reshard_after_forward: bool | None = option(
        None,
        Flag(optional=True),
        "Reshard a layer's parameters after its forward, and all-gather them again in backward. None: what the "
        "`fsdp_plugin` says, else true. The last layer is never resharded, its backward comes next.",
        belongs_to="fsdp2",
        by_strategy=False,  # with the plugin's answer it is in ShardingOptions, which every strategy gets
    )
    forward_prefetch: int = option(
        1,
        Number(0, "the number of layers to gather ahead"),
        "How many layers ahead FSDP2 all-gathers in forward. 0 leaves it to FSDP2.",
        belongs_to="fsdp2",
        by_strategy=False,
    )
    backward_prefetch: int = option(
        2,
        Number(0, "the number of layers to gather ahead"),
        "How many layers ahead FSDP2 all-gathers in backward. 0 leaves it to FSDP2.",
        belongs_to="fsdp2",
        by_strategy=False,
    )
    sequence_parallel: bool = option(
        False,
        Flag(),
        "Shard the activations between attention and MLP blocks along the sequence, over the tp ranks: norms, dropout "
        "and residuals take 1 / tp_size of the memory, at the same communication. Derived from the plan.",
        tp_axis="sequences are sharded over the ranks of the tp axis",
        backends=_ONLY_FSDP2,
        argument="sequence_parallel",
    )
    sequence_parallel_regather: bool = option(
        False,
        Flag(),
        "Keep only this rank's sequence shard of the inputs of attention and MLP, and all-gather them again in "
        "backward: less memory, for two more all-gathers per dense layer. Goes with "
        '`activation_checkpointing="selective"`; the other checkpoints do the same anyway, and it is refused beside '
        "them.",
        needs=Condition("sequence_parallel", True, "without it nothing is gathered along the sequence"),
        backends=_ONLY_FSDP2,
    )
    async_tensor_parallel: bool = option(
        False,
        Flag(),
        "Overlap the collectives of sequence parallelism with matrix products. Needs `sequence_parallel`, "
        "`compile=True` and CUDA with symmetric memory, and is refused elsewhere.",
        backends=_ONLY_FSDP2,
        argument="enable_async_tensor_parallel",
    )
    loss_parallel: bool | None = option(
        None,
        Flag(optional=True),
        "Keep the logits sharded over the vocabulary and compute cross entropy on the shards. None: under tensor "
        "parallelism wherever the output projection is sharded that way. True requires it, false gathers the full "
        "logits.",
        tp_axis="the vocabulary is sharded over the ranks of the tp axis",
        backends=_ONLY_FSDP2,
        off=(False,),
    )
    loss_chunk_size: int | None = option(
        None,
        Number(1, "a number of rows (tokens)"),
        "Rows (tokens) whose logits that loss has in float32 at a time. None: as many as fit in 64 MiB "
        "(256 MiB in TRL's fused head).",
        collective=False,  # each rank computes its own rows
        tp_axis="the vocabulary is sharded over the ranks of the tp axis",
        excludes=Condition("loss_parallel", False, "it is about loss parallelism, which that switches off"),
        backends=_ONLY_FSDP2,
    )
    activation_checkpointing: CheckpointingMode | bool | None = option(
        None,
        Choice(CHECKPOINTING_MODES, {True: "full", False: "none"}),
        '"none", "full" (whole layers), "submodule" (attention and MLP of each layer) or "selective" (keep attention, '
        'collectives and half of the matrix products); true means "full". None: what the `fsdp_plugin` says. The '
        "model's own `gradient_checkpointing_enable` is the alternative, never both.",
        by_strategy=False,  # with the plugin's answer it is in ParallelizeContext.checkpointing
    )
    compile: bool | str = option(
        False,
        Anything(
            "true, false or the name of a torch.compile backend",
            lambda value: isinstance(value, (bool, str)) and value != "",
            lambda value: False if value is None else value,
        ),
        "Compile each layer: true, or the name of a `torch.compile` backend. False: what Accelerate's dynamo settings "
        "(`torch_compile=True` in `TrainingArguments`) say.",
        belongs_to="fsdp2",
        by_strategy=False,
    )
    check_optimizer: bool = option(
        True,
        Flag(),
        "At `prepare`, try on small tensors that the optimizer computes on shards what it computes on full "
        "parameters, and refuse it if not. False trusts it.",
        by_strategy=False,
    )
    async_save: bool = option(
        False,
        Flag(),
        "Write training checkpoints in the background: weights and optimizer state are copied to the CPU, and training "
        "goes on while they are written. The checkpoint is complete when its manifest is there.",
        belongs_to="fsdp2",
        by_strategy=False,
    )
    audit: AuditMode | bool | None = option(
        None,
        Choice(AUDIT_MODES, {None: "first_step", True: "first_step", False: "off"}),
        "When to check that no trainable parameter lost its gradient, that none was frozen or unfrozen unasked, and "
        'that replicas of parameters are equal on all ranks: "first_step" (the first optimizer step; also None and '
        'true), "every_n_steps" (again every `audit_steps` optimizer steps), "off" (also false).',
        by_strategy=False,
    )
    audit_steps: int = option(
        100,
        Number(1, "the number of optimizer steps between two audits"),
        'The n of `audit="every_n_steps"`.',
        needs=Condition("audit", "every_n_steps"),
        by_strategy=False,
    )
    backend: Backend = option(
        BACKENDS[0],
        Choice(BACKENDS),
        'What shards parameters over the data-parallel ranks: "fsdp2", or "megatron_fsdp", NVIDIA\'s package of that '
        "name (extra `megatron`).",
        by_strategy=False,
    )
    megatron_fsdp: Mapping[str, Any] | None = option(
        None,
        Anything("a mapping of option names to values", lambda value: isinstance(value, Mapping)),
        'Options of that backend by name, such as `{"zero_dp_strategy": 2}`: the arguments of '
        "`megatron_fsdp_strategy_parallelize`.",
        belongs_to="megatron_fsdp",
        by_strategy=False,
    )
    towers: EncoderPlacement | None = option(
        None,
        Choice(PLACEMENTS, {None: "root"}),
        "Where FSDP2 keeps the parameters of modality encoders (vision, audio), which only some forwards run. "
        '"root" (also None): in the root\'s param group, all-gathered in every forward, so that ranks with and without '
        'images can be combined; "layers": a param group for each of their layers, which takes less memory and needs '
        'images on all data-parallel ranks or none; "replicated": frozen parameters replicated on each rank, trained '
        'ones with the root. Naming their classes in `transformer_cls_names_to_wrap` means "layers".',
        belongs_to="fsdp2",
    )
    adapters_over_dp: AdapterPlacement | None = option(
        None,
        Choice(ADAPTER_PLACEMENTS, {None: ADAPTER_PLACEMENTS[0]}),
        "Where the data-parallel ranks keep adapters (LoRA, IA3, biases: few trained parameters beside frozen ones of "
        'the same layer). "sharded" (also None): in FSDP2\'s units, all-gathered and reduce-scattered with each layer; '
        '"replicated": on every rank, outside of FSDP2, with one all-reduce per dtype and optimizer step for all '
        'gradients, tensor parallelism\'s included; "auto": replicated where they are at most an eighth of what is '
        "frozen beside them and 64 million elements in all. Full copies (`modules_to_save`) are always sharded.",
        belongs_to="fsdp2",
    )
    verbose: Literal[0, 1, 2] | None = option(
        None,
        Anything("0, 1 or 2", lambda value: value in (0, 1, 2) and not isinstance(value, bool)),
        "What rank 0 prints by itself: 0 nothing, 1 what a run is and does, in a few lines, 2 each entry of the plan "
        "as well. None: the environment variable `HF_AUTO_PARALLEL_VERBOSE`, then the Trainer's `log_level`, then 1.",
        collective=False,
        by_strategy=False,
    )


@dataclass(repr=False)
class ParallelOptions(OptionFields):
    """The options of one run, read-only. A strategy gets them as ``ParallelizeContext.options``.

    The values are those of the config. Settings that Accelerate's plugins and the model decide are in the context and
    in ``ShardingOptions``. This is not a frozen dataclass, because a frozen dataclass cannot inherit fields from the
    base class that it shares with the mutable config.
    """

    _frozen = False

    def __post_init__(self) -> None:
        self._frozen = True

    def __setattr__(self, name: str, value: Any) -> None:
        if self._frozen:
            raise FrozenInstanceError(f"cannot assign to field {name!r}")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> NoReturn:
        raise FrozenInstanceError(f"cannot delete field {name!r}")

    def __repr__(self) -> str:
        values = ((item, getattr(self, item.name)) for item in options_of(self))
        changed = (f"{item.name}={value!r}" for item, value in values if value != item.default)
        return f"{type(self).__name__}({', '.join(changed)})"

    @classmethod
    def of(cls, config: OptionFields) -> ParallelOptions:
        """Copy the current values of ``config``."""
        return cls(**{item.name: getattr(config, item.name) for item in dataclasses.fields(cls)})
