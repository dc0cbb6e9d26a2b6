"""Loss parallelism in a plan: an output projection that is sharded over the vocabulary keeps its logits sharded."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from .. import compat
from ..core.model_view import ModelView
from ..core.sharding_spec import OutputHook, ShardingSpec
from ..errors import PlanError


def keep_logits_sharded(
    model: nn.Module | ModelView, spec: ShardingSpec, wanted: bool | None = None, chunk_rows: int | None = None
) -> None:
    """Let the output projection of ``model`` keep its logits sharded instead of all-gathering them; changes ``spec``.

    Args:
        model: the model, plain or PEFT-wrapped; only read.
        spec: the resolved spec.
        wanted: None: do it where possible, else add a note with the reason. True: required. False: leave ``spec``
            unchanged.
        chunk_rows: number of rows (tokens) whose logits the loss holds in float32 at a time; a number makes loss
            parallelism required.

    Raises:
        PlanError: it is required, and the model or the plan does not allow it.
    """
    if wanted is False:
        return
    view = ModelView.of(model)
    model, inner = view.model, view.inner
    # Also names below the head: `modules_to_save` has copies of the head there, with hooks of their own.
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
            f"style 'colwise_gather_output' for it, or leave it out: every rank then has the full logits, which is "
            f"exact."
        )
    if names:
        spec.notes.append(f"{reason}, so every rank has the full logits (no loss parallelism).")
