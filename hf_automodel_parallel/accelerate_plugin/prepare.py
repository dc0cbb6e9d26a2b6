"""``Accelerator.prepare``: plan and shard the models, hand their optimizers over, and remember what was prepared."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..backends.megatron_fsdp.accelerate import megatron_strategy
from ..backends.megatron_fsdp.accelerate import sharded_parameters as megatron_parameters
from ..backends.megatron_fsdp.accelerate import watch as watch_megatron
from ..backends.megatron_fsdp.sharding import managed_by_megatron
from ..core.model_view import ModelView
from ..core.options import ParallelOptions
from ..core.ranks import raise_on_all_ranks
from ..errors import PrepareError
from ..export.gathering import file_dtypes, keep_file_dtypes
from ..fsdp.shard import sharded_parameters, upcast_trainable
from ..loading.fill import PendingValues
from ..optim.handoff import check_optimizers, parameter_names, raw_optimizer, replace_parameters
from ..optim.sharding_check import check_on_shards
from ..peft.late_adapters import adding
from ..peft.operations import manage_adapters, merge_whole_weights
from ..strategies.base import refuse_sharded
from ..strategies.context import ParallelizeContext
from ..strategies.registry import get_parallelization_strategy
from .generation import guard_generation
from .hooks import hooks_of
from .options import checkpointing, compile_options, layer_classes, offload_activations, sharding_options
from .parameter_use import AssignedData, explain_reads
from .prepared import PreparedModel, all_prepared, attached_to, check_use, prepared, release_gathered, remember
from .run_report import report
from .saving import bind_saving
from .step import attach_step_hooks
from .untried_arguments import warn_of_untried

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


def prepare(self: Accelerator, *args: Any, device_placement: list[bool] | None = None) -> Any:
    """Like ``Accelerator.prepare``; a model without its optimizer is prepared for evaluation."""
    models = [obj for obj in args if isinstance(obj, nn.Module)]
    optimizers = [obj for obj in args if isinstance(obj, torch.optim.Optimizer)]
    if models or optimizers:
        with raise_on_all_ranks("Accelerator.prepare"):
            _check_arguments(models, device_placement)
            if optimizers:
                hooks_of(self).check(self)
    hooks_of(self).before_prepare()
    record = prepared(models[0]) if models else None
    if models and record is None:
        record = _parallelize(self, models[0], optimizers)
        args = tuple(
            record.context.model if obj is models[0] else obj for obj in args
        )  # a strategy may replace the model
        models = [record.context.model]
    elif optimizers:
        _adopt_optimizers(self, record, optimizers)
    # Two passes, like Accelerate: schedulers come second, because they need the prepared optimizers.
    result: list[Any] = [obj if isinstance(obj, nn.Module) else self._prepare_one(obj, first_pass=True) for obj in args]
    result = [obj if isinstance(obj, nn.Module) else self._prepare_one(obj) for obj in result]
    for model in models:
        if not any(model is known for known in self._models):
            self._models.append(model)
    for item in result:
        known_lists = (self._dataloaders, self._models, self._optimizers, self._schedulers)
        if any(item is known for known_list in known_lists for known in known_list):
            item._is_accelerate_prepared = True
    report(self, args)
    return tuple(result) if len(result) > 1 else result[0]


def _check_arguments(models: list[nn.Module], device_placement: list[bool] | None) -> None:
    if device_placement is not None:
        raise PrepareError("device_placement cannot be customised: FSDP2 decides where parameters are. Leave it out.")
    if len(models) > 1:
        raise PrepareError(
            f"{len(models)} models in one prepare call ({', '.join(type(m).__name__ for m in models)}). Prepare each "
            f"model with its own optimizer in a call of its own; a frozen one alone."
        )


def _parallelize(accelerator: Accelerator, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> PreparedModel:
    raw = [raw_optimizer(optimizer) for optimizer in optimizers]
    with PendingValues(model, raw) as pending, _resting_parametrizations(model):
        return _shard(accelerator, model, raw, pending)


@contextmanager
def _resting_parametrizations(model: nn.Module) -> Iterator[None]:
    """Parametrizations in evaluation mode: each read of a spectral norm's weight in training moves its buffers."""
    resting = [
        module
        for owner in model.modules()
        if is_parametrized(owner)
        for module in owner.parametrizations.modules()  # type: ignore[union-attr,operator]
        if module.training
    ]
    for module in resting:
        module.training = False
    try:
        yield
    finally:
        for module in resting:
            module.training = True


def _shard(
    accelerator: Accelerator, model: nn.Module, raw: list[torch.optim.Optimizer], pending: PendingValues
) -> PreparedModel:
    config: Any = accelerator.parallelism_config
    options = ParallelOptions.of(config)
    with raise_on_all_ranks("Accelerator.prepare"):
        strategy = get_parallelization_strategy(model)
        if options.backend == "megatron_fsdp":
            strategy = megatron_strategy(accelerator, options, strategy)
        if accelerator.verify_device_map(model):
            raise PrepareError(
                "the model was loaded with a device_map over several devices; load it without device_map."
            )
        names = check_optimizers(model, raw) if raw else []
        pending.begin()
        context = ParallelizeContext(
            model=model,
            mesh=accelerator.torch_device_mesh,
            pending=pending,
            device=accelerator.device,
            options=options,
            fsdp=sharding_options(accelerator, options, model),
            context_parallel=config.cp_enabled,
            layer_classes=layer_classes(accelerator.state.fsdp_plugin),
            load_on_rank_zero=bool(accelerator.state.fsdp_plugin.cpu_ram_efficient_loading),
            sharded_checkpoints="SHARDED_STATE_DICT" in str(accelerator.state.fsdp_plugin.state_dict_type),
            checkpointing=checkpointing(accelerator, options, model),
            compile_options=compile_options(accelerator, options),
            offload_activations=offload_activations(accelerator, options, model),
        )
        strategy.plan(context)
        strategy.check_planned(context)
    # Collectives from here on, so outside of the block above: each rank has planned without an error.
    strategy.compare_ranks(context)
    # Before the model changes, so that a refused optimizer leaves it as it was.
    _check_on_shards(context, raw, names)
    upcast: list[str] = []
    # Before the upcast: files get the dtypes in which the model was loaded.
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    if accelerator.mixed_precision != "no":
        upcast = upcast_trainable(model)
        if upcast and accelerator.is_main_process:
            logger.info("%d trainable parameters are kept in float32 under mixed precision", len(upcast))
    before = dict(model.named_parameters())
    # The audit of the first step expects a gradient for each of these.
    trainable_names = frozenset(name for name, parameter in before.items() if parameter.requires_grad)
    # The model changes from here on: after an error there is nothing left to restore.
    pending.keep()
    strategy.carry_out(context)
    with raise_on_all_ranks("Accelerator.prepare"):
        strategy.check_carried_out(context)
    for optimizer, groups in zip(raw, names, strict=True):
        strategy.switch_optimizer(context, optimizer, groups, before)
    model = context.model
    record = PreparedModel(context, config, strategy, trainable=bool(raw), trainable_names=trainable_names)
    keep_file_dtypes(model, {name: dtypes[name] for name in upcast})
    remember(model, record)
    for optimizer in raw:
        attach_step_hooks(accelerator, optimizer, record)
    _watch(model, context)
    if managed_by_megatron(model) is not None:
        watch_megatron(model)
        return record
    manage_adapters(
        model,
        context.tensor_parallel,
        on_unload=lambda plain: _after_unload(plain, record),
        add=lambda original: adding(model, context, original, done=lambda: _after_adding(record)),
    )
    return record


def _watch(model: nn.Module, context: ParallelizeContext) -> None:
    guard_generation(model, context)
    model.register_forward_pre_hook(check_use)
    model.register_forward_hook(release_gathered)
    model.register_forward_hook(explain_reads, always_call=True)
    bind_saving(model)
    inner = ModelView.of(model).inner
    if context.plan is not None and context.plan.tried_arguments is not None:
        warn_of_untried(inner, context.plan.tried_arguments)
    for module in (model, inner):
        if hasattr(module, "resize_token_embeddings"):
            module.resize_token_embeddings = functools.partial(_refuse_to_resize, module)  # type: ignore[assignment]


def _refuse_to_resize(model: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
    if new_num_tokens in (None, model.config.get_text_config().vocab_size):
        return model.get_input_embeddings()  # nothing to resize
    raise PrepareError(
        "resize_token_embeddings after accelerator.prepare: the new weights would not be sharded, nor be in the "
        "optimizer. Resize the model before prepare."
    )


def _after_adding(record: PreparedModel) -> None:
    """Adapters were added after ``prepare``: accept their names, and audit their first optimizer step."""
    model = record.context.model
    record.names = {name for name, _ in model.named_parameters()}
    record.assigned = AssignedData(model)
    merge_whole_weights(model)
    if record.audit is not None:
        record.audit.again({name for name, parameter in model.named_parameters() if parameter.requires_grad})


def _after_unload(plain: nn.Module, record: PreparedModel) -> None:
    """Register the model without its adapters as a prepared model, for evaluation and saving.

    Not for training: no optimizer holds the parameters that are left.
    """
    # Unloading removes PEFT's prefixes from the names; the parameters are the same objects.
    kept = {id(p): n for n, p in plain.named_parameters()}
    dtypes = file_dtypes(record.context.model)
    dtypes = {
        kept[id(p)]: dtypes[name]
        for name, p in record.context.model.named_parameters()
        if name in dtypes and id(p) in kept
    }
    keep_file_dtypes(plain, dtypes)
    remember(plain, PreparedModel(record.context, record.config, record.strategy, trainable=False, unloaded=True))
    _watch(plain, record.context)


def _check_on_shards(
    context: ParallelizeContext,
    optimizers: list[torch.optim.Optimizer],
    names: list[list[list[str]]],
) -> None:
    """Refuse, on all ranks, optimizers whose step on shards differs from their step on full parameters."""
    if not optimizers or not context.options.check_optimizer:
        return
    parameters = dict(context.model.named_parameters())
    if context.options.backend == "megatron_fsdp":
        from ..backends.megatron_fsdp.accelerate import check_elementwise

        with raise_on_all_ranks("Accelerator.prepare"):
            check_elementwise(optimizers, names, {name: p.shape for name, p in parameters.items()})
        return
    with raise_on_all_ranks("Accelerator.prepare"):
        check_on_shards(
            optimizers,
            names,
            {name: p.shape for name, p in parameters.items()},
            context.spec.parameters if context.spec is not None else {},
            context.dp_mesh,
            context.tp_mesh,
            context.device,
            context.fsdp.offload_policy,
            {name for name, p in parameters.items() if p in context.fsdp.ignored_parameters},
        )


def _adopt_optimizers(self: Accelerator, record: PreparedModel | None, optimizers: list[torch.optim.Optimizer]) -> None:
    """Accept optimizers that hold the parameters of a model that is prepared already; refuse all others."""
    owners = []
    with raise_on_all_ranks("Accelerator.prepare"):
        for optimizer in map(raw_optimizer, optimizers):
            candidates = [record] if record is not None else all_prepared()
            for owner in candidates:
                managed = managed_by_megatron(owner.context.model)
                sharded = sharded_parameters(owner.context.model) if managed is None else megatron_parameters(managed)
                if all(id(p) in sharded for group in optimizer.param_groups for p in group["params"]):
                    break
            else:
                raise PrepareError(
                    f"{type(optimizer).__name__} does not hold the parameters of a model prepared here. Pass model and "
                    f"optimizer in one call, model, optimizer = accelerator.prepare(model, optimizer), or create the "
                    f"optimizer from the parameters of the prepared model."
                )
            replace_parameters(optimizer, sharded)
            owners.append((optimizer, owner))
    # A second loop, outside of the block: the check on shards raises on all ranks by itself.
    for optimizer, owner in owners:
        owner.handed_over_late = not owner.trainable
        names = parameter_names(owner.context.model)
        groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        _check_on_shards(owner.context, [optimizer], [groups])
        if managed_by_megatron(owner.context.model) is not None and attached_to(optimizer) is not owner:
            owner.strategy.switch_optimizer(
                owner.context, optimizer, groups, dict(owner.context.model.named_parameters())
            )
        owner.trainable = True
        attach_step_hooks(self, optimizer, owner)


def prepare_model(
    self: Accelerator, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
) -> nn.Module:
    """Like ``Accelerator.prepare_model``, but a model that this package shards is not wrapped in DDP, and its layers
    are compiled instead of the entire model.

    Under ``torch_compile`` the Trainer calls this with ``evaluation_mode`` for an evaluation before training. Other
    models for evaluation (TRL's reference and reward models) stay unsharded on each rank, as in stock Accelerate.
    """
    if evaluation_mode and prepared(model) is None:
        refuse_sharded(model)  # the Trainer prepares such a model with evaluation_mode for training, too
        if not hooks_of(self).trains(model):
            return type(self).prepare_model(self, model, device_placement, evaluation_mode)
    return self.prepare(model)
