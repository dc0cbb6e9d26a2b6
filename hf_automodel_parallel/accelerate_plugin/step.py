"""The training step of a prepared model: gradients of replicas, and Partial ones, are complete before they are clipped
or used, and the first gradients are audited.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..audit import Audit
from ..backends.megatron_fsdp.accelerate import owner_of
from ..core.option_fields import meaning_of
from ..fsdp.replicas import ReplicaGradients
from ..fsdp.shard import fsdp_units, without_units_inside
from ..optim.gradient_norm import clip_
from ..strategies.context import ParallelizeContext
from ..tensor_parallel.grad_sync import PartialGradients
from .hooks import Hooks, hooks_of
from .parameter_use import explain
from .prepared import PreparedModel, attach, attached_to, prepared

if TYPE_CHECKING:
    from accelerate import Accelerator


def _incomplete_gradients(context: ParallelizeContext) -> list[PartialGradients | ReplicaGradients]:
    """What completes gradients once per step: those of replicas over all axes, and Partial ones over tp."""
    partial = None if context.tensor_parallel is None else context.tensor_parallel.partial
    return [part for part in (context.replicas, partial) if part is not None]


def _of_all_models(accelerator: Accelerator) -> list[PartialGradients | ReplicaGradients]:
    records = [record for model in accelerator._models if (record := prepared(model)) is not None]
    return [part for record in records for part in _incomplete_gradients(record.context)]


def _flush_all(accelerator: Accelerator) -> None:
    for part in _of_all_models(accelerator):
        part.flush()


def backward(self: Accelerator, loss: torch.Tensor, **kwargs: Any) -> None:
    """Like ``Accelerator.backward``; completes the gradients of replicas, and Partial ones over tp, if this backward
    completes the optimizer step.
    """
    incomplete = _of_all_models(self)
    for part in incomplete:
        part.deferred = True
    try:
        type(self).backward(self, loss, **kwargs)
    except RuntimeError as error:
        explain(error)
        raise
    finally:
        for part in incomplete:
            part.deferred = False
    if self.sync_gradients:
        _flush_all(self)


def clip_grad_norm_(self: Accelerator, parameters: Any, max_norm: float, norm_type: float = 2) -> torch.Tensor:
    """Like ``Accelerator.clip_grad_norm_``, after Partial gradients have been summed: the norm needs full gradients.

    One all-reduce for each mesh axis; torch's would reduce the norm of each parameter.
    """
    _flush_all(self)
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    managed = owner_of(self._models, parameters)
    if managed is not None:
        return managed.clip_grad_norm_(max_norm, norm_type, parameters)
    self.unscale_gradients()
    return clip_(parameters, max_norm, norm_type)


# ---- hooks of the optimizer step -------------------------------------------------------------------------------------


def attach_step_hooks(accelerator: Accelerator, optimizer: torch.optim.Optimizer, record: PreparedModel) -> None:
    """Register the step hooks of ``optimizer``, once, however often it is prepared.

    Before each step: complete the gradients of replicas, and Partial ones, that are still outstanding, and audit the
    first gradients. So a loop that never calls ``accelerator.backward`` is correct too, as long as it clips with
    ``accelerator.clip_grad_norm_``. After each step: reshard the FSDP units, because an evaluation since the last
    backward may have left unsharded parameters with the old values.
    """
    if attached_to(optimizer) is record:
        return
    hooks = hooks_of(accelerator)
    attach(optimizer, record)
    if record.audit is None:
        record.audit = _audit(record)
    record.audit.optimizers.add(optimizer)
    optimizer.register_step_pre_hook(lambda stepping, *_: _before_step(record, stepping, hooks))

    def reshard(*_: Any) -> None:
        for unit in fsdp_units(record.context.model):
            unit.reshard()

    optimizer.register_step_post_hook(reshard)


def _audit(record: PreparedModel) -> Audit:
    context = record.context
    every = {"off": 0, "every_n_steps": context.options.audit_steps}.get(meaning_of(context.options, "audit"))
    compiled = (
        without_units_inside(context.structure.layers)
        if context.compile_options is not None and context.structure
        else []
    )
    # A model that was prepared for evaluation first: the user chose its trainable parameters after that.
    now = {name for name, parameter in context.model.named_parameters() if parameter.requires_grad}
    trainable = now if record.handed_over_late else set(record.trainable_names)
    tp_group = None if context.tp_mesh is None else context.tp_mesh.get_group()
    return Audit(context.model, trainable, compiled, tp_group, every)


def _before_step(record: PreparedModel, optimizer: torch.optim.Optimizer, hooks: Hooks) -> None:
    """Complete outstanding gradients, then audit this step if it is due, then call the loop's hook."""
    if record.assigned is not None:
        record.assigned.check()
    for part in _incomplete_gradients(record.context):
        part.flush()
    # After the flush: the audit compares replicas, and Partial gradients differ over tp until they are summed.
    if record.audit is not None:
        record.audit.before_step(optimizer)
    hooks.before_step()
