"""Loss parallelism in a plan: the output projection that is sharded over the vocabulary need not gather its output."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from .. import compat
from ..core.model_view import ModelView
from ..core.sharding_spec import OutputHook, ShardingSpec
from ..errors import PlanError


def keep_logits_sharded(
    model: nn.Module, spec: ShardingSpec, wanted: bool | None = None, chunk_rows: int | None = None
) -> None:
    """Let the output projection of ``model`` keep its output sharded, where it would gather it; changes ``spec``.

    Args:
        model: the model, plain or PEFT-wrapped. It is only read.
        spec: the resolved spec.
        wanted: None: where it is possible, else a note says why not. True: it has to be possible. False: leave ``spec``
        alone.
        chunk_rows: rows whose logits the loss has in float32 at a time; a number requires loss parallelism, too.

    Raises:
        PlanError: it was required and the model or the plan does not allow it.
    """
    if wanted is False:
        return
    inner = ModelView.of(model).inner
    head = compat.lm_head_module(inner)
    names = [name for name, module in model.named_modules() if module is head] if head is not None else []
    projections = [
        name
        for name, module in spec.modules.items()
        if module.output is OutputHook.GATHER and any(name == top or name.startswith(f"{top}.") for top in names)
    ]
    for name in projections:
        spec.modules[name] = replace(spec.modules[name], output=OutputHook.SHARDED_LOGITS, chunk_rows=chunk_rows)
    if projections:
        spec.notes.append(f"{projections[0]}: logits stay sharded, the loss is computed on the shards (loss_parallel).")
        return
    reason = (
        f"{type(inner).__name__} has no output projection (get_output_embeddings)"
        if not names
        else f"{names[0]} is not sharded over the vocabulary"
    )
    if wanted or chunk_rows is not None:
        field = "loss_parallel=True" if wanted else f"loss_chunk_size={chunk_rows}"
        raise PlanError(
            f"{field} cannot be honoured: {reason}. Use a tp_size that divides the vocabulary and a plan with the "
            f"style 'colwise_gather_output' for it, or leave it out: logits are then whole, which is exact."
        )
    if names:
        spec.notes.append(f"{reason}, so logits are whole (no loss parallelism).")
