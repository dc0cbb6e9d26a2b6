"""What each tensor-parallel style name means for the parameters and the tp input and output hooks of a layer.

The names are those of transformers' ``_tp_plan`` (``ALL_PARALLEL_STYLES``, 5.17 to 5.23). The table has one row per
meaning. Which dimension of a weight is "out" or "in" depends on the layer class; :mod:`.resolve` decides it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .. import compat
from ..core.sharding_spec import InputHook, OutputHook
from ..errors import PlanError


@dataclass(frozen=True)
class LinearStyle:
    """Style of a layer that multiplies by a matrix: the sharded side of the weight, and the input and output hook.

    Attributes:
        side: "out" (column-wise) or "in" (row-wise).
        input: the hook in front of the layer.
        output: the hook behind it.
        blocks: number of projections packed along the sharded side.
        swap: the style that computes the same with the other side sharded, for a side that tp_size does not divide.
    """

    side: str
    input: InputHook
    output: OutputHook
    blocks: int = 1
    swap: str | None = None


LINEAR_STYLES: dict[str, LinearStyle] = {
    "colwise": LinearStyle("out", InputHook.COPY_TO_TP, OutputHook.NONE),
    "colwise_gather_output": LinearStyle("out", InputHook.COPY_TO_TP, OutputHook.GATHER, swap="rowwise_split_input"),
    "colwise_rep": LinearStyle("out", InputHook.COPY_TO_TP, OutputHook.GATHER, swap="rowwise_split_input"),
    "rowwise": LinearStyle("in", InputHook.NONE, OutputHook.REDUCE_FROM_TP),
    "rowwise_split_input": LinearStyle(
        "in", InputHook.SCATTER, OutputHook.REDUCE_FROM_TP, swap="colwise_gather_output"
    ),
    "rowwise_rep": LinearStyle("in", InputHook.SCATTER, OutputHook.REDUCE_FROM_TP, swap="colwise_gather_output"),
    "packed_colwise": LinearStyle("out", InputHook.COPY_TO_TP, OutputHook.NONE, blocks=2),
    "qkv_colwise": LinearStyle(
        "out", InputHook.COPY_TO_TP, OutputHook.NONE, blocks=3
    ),  # ours: GPT-2's c_attn, three equal projections
    "packed_rowwise": LinearStyle("in", InputHook.NONE, OutputHook.REDUCE_FROM_TP, blocks=2),
}

#: Styles of an embedding table: which dimension is sharded.
EMBEDDING_STYLES: dict[str, int] = {"embedding_rowwise": 0, "embedding_colwise": 1}

#: Styles that shard no weight: they concern activations of a module, or gradients of its replicated parameters.
MODULE_STYLES = (
    "replicated_with_grad_allreduce",
    "mla_kv_a_proj",
    "all_reduce",
    "moe_tp_experts",
    "moe_identity_expert",
    "local_params",
    "replicate",
)

#: Style names of transformers that a tensor-parallel plan may not have here -> what to do instead.
REFUSED_STYLES: dict[str, str] = {
    "sequence_parallel": "Sequence parallelism is derived from the plan, not written into it; remove the entry.",
    **dict.fromkeys(
        ("grouped_gemm", "ep_dispatch_experts", "ep_router", "megamoe_router", "megamoe_experts"),
        "It shards by expert (expert parallelism), which is not available yet; use 'packed_colwise' / 'rowwise' on the "
        "expert weights and 'moe_tp_experts' on the experts module.",
    ),
}

KNOWN_STYLES = (*LINEAR_STYLES, *EMBEDDING_STYLES, *MODULE_STYLES)


def is_torch_style(style: Any) -> bool:
    """True for a ``ParallelStyle``, which torch's ``parallelize_module`` can apply."""
    from torch.distributed.tensor.parallel import ParallelStyle

    return isinstance(style, ParallelStyle)


def is_style_name(name: str) -> bool:
    """True for a style name that a plan may have: a known one, or one that the user registered with transformers."""
    return name in KNOWN_STYLES or name in compat.transformers_parallel_styles()


def check_style(pattern: str, style: Any) -> None:
    """Raise :class:`PlanError` unless ``style`` can be executed.

    Args:
        pattern: the plan key, for the message.
        style: a known style name, a name registered with transformers by the user, or a torch ``ParallelStyle``.
    """
    if not isinstance(style, str):
        if not is_torch_style(style):
            raise PlanError(
                f"the plan entry {pattern!r} has the style {style!r} of type {type(style).__name__}; give a style name "
                f"or a torch.distributed.tensor.parallel.ParallelStyle. Known names: {', '.join(KNOWN_STYLES)}."
            )
        return
    if style in REFUSED_STYLES:
        raise PlanError(f"the plan entry {pattern!r} has the style {style!r}. {REFUSED_STYLES[style]}")
    if not is_style_name(style):
        raise PlanError(
            f"the plan entry {pattern!r} has the unknown style {style!r}. Known styles: {', '.join(KNOWN_STYLES)}. "
            "A style of your own is registered with transformers' ALL_PARALLEL_STYLES or given as a torch "
            "ParallelStyle."
        )
