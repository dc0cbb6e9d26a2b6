"""What is remembered of a prepared model, and what is checked whenever it is used."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import ParallelismConfig
from torch import nn

from .. import compat
from ..audit import Audit
from ..core.mesh import AXES
from ..core.options import OptionFields
from ..errors import PrepareError
from ..fsdp.shard import free_gathered
from ..strategies.base import ParallelizationStrategy
from ..strategies.context import ParallelizeContext


@dataclass
class PreparedModel:
    """What is remembered of a model that was prepared here.

    Attributes:
        context: the finished job.
        config: the user's config, for its sizes; its options at the time of preparing are those of the context.
        strategy: what parallelised it.
        trainable: an optimizer holds its parameters; without one the model is for evaluation.
        trainable_names: parameters that were trainable when the user handed the model over.
        handed_over_late: it was prepared for evaluation first, and got an optimizer later.
        audit: looks at its first optimizer step, and later ones if asked to; None until it has an optimizer.
        names: of the parameters it had when it was prepared.
        unloaded: the plain model that ``merge_and_unload`` or ``unload`` left; for evaluation and saving.
    """

    context: ParallelizeContext
    config: ParallelismConfig
    strategy: ParallelizationStrategy
    trainable: bool
    trainable_names: frozenset[str] = frozenset()
    handed_over_late: bool = False
    audit: Audit | None = None
    names: set[str] = field(default_factory=set)
    unloaded: bool = False


#: Every model prepared in this process; a second ``Accelerator`` (another Trainer) recognises it and leaves it as it
#: is.
_PREPARED: weakref.WeakSet[nn.Module] = weakref.WeakSet()

#: Where a model keeps its record, which refers to it: in a table outside, the record would keep the model alive for
#: ever.
_RECORD = "_automodel_parallel_record"


def remember(model: nn.Module, record: PreparedModel) -> None:
    """Keep ``record`` on ``model``."""
    record.names = {name for name, _ in model.named_parameters()}
    model.__dict__[_RECORD] = record
    _PREPARED.add(model)


def all_prepared() -> list[PreparedModel]:
    """The records of all prepared models that still exist."""
    return [record for record in map(prepared, _PREPARED) if record is not None]


def attach(optimizer: torch.optim.Optimizer, record: PreparedModel) -> None:
    """Note that ``optimizer`` trains the model of ``record``."""
    setattr(optimizer, _RECORD, record)


def attached_to(optimizer: torch.optim.Optimizer) -> PreparedModel | None:
    """The record of the model that ``optimizer`` was attached to."""
    return getattr(optimizer, _RECORD, None)


def prepared(model: nn.Module) -> PreparedModel | None:
    """The record of ``model`` if it was prepared in this process, else None."""
    return model.__dict__.get(_RECORD)


def release_gathered(model: nn.Module, args: Any, output: Any) -> None:
    """After a forward without gradients, free what FSDP2 keeps gathered for a backward that will not come.

    Otherwise parameters written in place before the next forward (an averaged model, clamping) would not be seen by it.
    """
    if not torch.is_grad_enabled():
        free_gathered(model)


def check_use(model: nn.Module, args: Any) -> None:
    """Before each forward: the model is used with the mesh it was sharded on, and trained only with an optimizer."""
    record = prepared(model)
    if record is None:
        return
    state = compat.accelerator_already_exists()
    if state is not None and not _same_mesh(state.parallelism_config, record.config):
        raise PrepareError(
            f"this model is sharded by {record.config!r}, but the Accelerator of this process has "
            f"{state.parallelism_config!r}: it would deal different batches to ranks that compute together. Give the "
            f"second Trainer or Accelerator the same AutoParallelismConfig."
        )
    if not (model.training and torch.is_grad_enabled()):
        return
    added = [name for name, p in model.named_parameters() if p.requires_grad and name not in record.names]
    if added:
        raise PrepareError(
            f"{len(added)} trainable parameters have been added since accelerator.prepare ({added[0]}, ...): they are "
            "not sharded, and nobody would sum their gradients over the ranks. Wrap and extend the model before "
            "prepare."
        )
    if record.trainable:
        return
    if record.unloaded:
        raise PrepareError(
            "this model has been unloaded from its adapters and now runs in training mode with gradients; what is left "
            "is for evaluation and saving (model.eval() or torch.no_grad()). To train it on, save it and load it again."
        )
    if any(p.requires_grad for p in model.parameters()):
        raise PrepareError(
            "this model was prepared without an optimizer, for evaluation, and now runs in training mode with "
            "gradients. Pass both in one call, model, optimizer = accelerator.prepare(model, optimizer); for "
            "evaluation use model.eval() or torch.no_grad()."
        )


def _same_mesh(theirs: Any, ours: ParallelismConfig) -> bool:
    return isinstance(theirs, OptionFields) and all(
        getattr(theirs, f"{axis}_size") == getattr(ours, f"{axis}_size") for axis in AXES
    )
