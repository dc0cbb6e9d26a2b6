"""The state that is kept for each prepared model, and the check before each of its forwards."""

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
from ..core.registrations import Registrations
from ..errors import PrepareError
from ..fsdp.shard import free_gathered
from ..strategies.base import ParallelizationStrategy
from ..strategies.context import ParallelizeContext
from .parameter_use import AssignedData


@dataclass
class PreparedModel:
    """The state of one prepared model.

    Attributes:
        context: its context, with the options as they were at ``prepare``.
        config: the user's config, for the sizes of the mesh.
        strategy: the strategy that parallelised it.
        trainable: an optimizer holds its parameters. False: the model is for evaluation.
        trainable_names: names of the parameters that were trainable when ``prepare`` was called.
        handed_over_late: it was prepared for evaluation first and got an optimizer later.
        audit: checks the gradients of its first optimizer step, and of later ones on request; None without optimizer.
        names: names of its parameters when it was prepared, and of adapters that were added since.
        assigned: finds assignments to ``.data`` of its parameters.
        reported: what rank 0 has described it for, "training" or "evaluation".
        registrations: says when new parameters have to be looked for.
        unloaded: it is the plain model that ``merge_and_unload`` or ``unload`` returned, for evaluation and saving.
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
    assigned: AssignedData | None = None
    reported: str = ""
    registrations: Registrations = field(default_factory=Registrations)


#: Every model prepared in this process. A second ``Accelerator`` (of another Trainer) finds it here and does not shard
#: it again.
_PREPARED: weakref.WeakSet[nn.Module] = weakref.WeakSet()

#: Attribute of the model (and of its optimizers). Not a global table: the state refers to the model and would keep it
#: alive for ever.
_RECORD = "_automodel_parallel_record"


def remember(model: nn.Module, record: PreparedModel) -> None:
    """Store ``record`` on ``model`` and register the model as prepared."""
    record.names = {name for name, _ in model.named_parameters()}
    record.assigned = AssignedData(model)
    model.__dict__[_RECORD] = record
    _PREPARED.add(model)


def all_prepared() -> list[PreparedModel]:
    """The state of every prepared model that still exists."""
    return [record for record in map(prepared, _PREPARED) if record is not None]


def attach(optimizer: torch.optim.Optimizer, record: PreparedModel) -> None:
    """Store on ``optimizer`` which prepared model it trains."""
    setattr(optimizer, _RECORD, record)


def attached_to(optimizer: torch.optim.Optimizer) -> PreparedModel | None:
    """The prepared model that ``optimizer`` trains; None for a foreign optimizer."""
    return getattr(optimizer, _RECORD, None)


def prepared(model: nn.Module) -> PreparedModel | None:
    """The state of ``model`` if it was prepared in this process, else None."""
    return model.__dict__.get(_RECORD)


def release_gathered(model: nn.Module, args: Any, output: Any) -> None:
    """Forward hook: after a forward without gradients, reshard what FSDP2 keeps unsharded for a backward.

    Otherwise the next forward would use the unsharded copies and miss writes into the shards (weight averaging,
    clamping).
    """
    if not torch.is_grad_enabled():
        free_gathered(model)


def check_use(model: nn.Module, args: Any) -> None:
    """Forward pre-hook: the model runs with the mesh that it was sharded on, and trains only with an optimizer.

    Raises:
        PrepareError: ``.data`` of a parameter was assigned, another mesh, trainable parameters that ``prepare`` did
            not see, or training without an optimizer.
        GradientAuditError: hooks on gradients that would see Partial ones.
    """
    record = prepared(model)
    if record is None:
        return
    if record.assigned is not None and not torch.compiler.is_compiling():
        record.assigned.check()
    # A second Trainer or Accelerator may have been built with another config since.
    state = compat.accelerator_already_exists()
    if state is not None and not _same_mesh(state.parallelism_config, record.config):
        raise PrepareError(
            f"this model is sharded by {record.config!r}, but the Accelerator of this process has "
            f"{state.parallelism_config!r}: it would deal different batches to ranks that compute together. Give the "
            f"second Trainer or Accelerator the same AutoParallelismConfig."
        )
    if not (model.training and torch.is_grad_enabled()):
        return
    if record.audit is not None:
        record.audit.before_forward()
    if not torch.compiler.is_compiling() and record.registrations.news:
        _refuse_added(model, record)
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


@torch.compiler.disable  # where a script compiles all of the model; it is called once
def _refuse_added(model: nn.Module, record: PreparedModel) -> None:
    added = {name: p.requires_grad for name, p in model.named_parameters() if name not in record.names}
    trainable = [name for name, requires_grad in added.items() if requires_grad]
    if trainable:
        raise PrepareError(
            f"{len(trainable)} trainable parameters have been added since accelerator.prepare ({trainable[0]}, ...): "
            "they are not sharded, and their gradients would not be reduced over the ranks. Wrap and extend the model "
            "before prepare."
        )
    if not added:  # else a frozen one may become trainable
        record.registrations.seen(model)


def _same_mesh(theirs: Any, ours: ParallelismConfig) -> bool:
    return isinstance(theirs, OptionFields) and all(
        getattr(theirs, f"{axis}_size") == getattr(ours, f"{axis}_size") for axis in AXES
    )
